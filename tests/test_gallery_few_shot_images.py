"""Learning to tell new digits apart: the example at a small size, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from gallery import refuses, run, write

import few_shot_images
import mnist


def test_maml_tells_digits_apart_by_one_image_of_each(digits: Path, tmp_path: Path) -> None:
    """Of 8 × 8 pixels and 60 images a class: enough for other images of the known digits."""
    _, tables = run(
        tmp_path, "few_shot_images", f"--data={digits}", "--method=MAML", "--iterations=60",
        "--tasks=100",
    )  # fmt: skip
    accuracy = {
        row["learned by"]: float(row["known digits, 1 image a class, %"].split(" ± ")[0])
        for row in next(iter(tables.values()))
    }
    others = ("untrained network", "logistic regression", "nearest neighbour")
    assert accuracy["MAML"] > 4.0 + max(accuracy[name] for name in others)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--iterations=0"], "--iterations must be at least 1, not 0"),
        (["--tasks=1"], "--tasks must be at least 2, not 1"),
    ],
)
def test_few_shot_images_refuses_what_it_cannot_do(
    digits: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses(few_shot_images.main, [f"--data={digits}", *arguments], words, capsys)


def test_few_shot_images_needs_two_images_of_each_digit(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = dict(zip(("train", "t10k"), mnist.load(digits), strict=True))
    write(
        tmp_path,
        {name: split.images[split.labels != 7] for name, split in splits.items()},
        {name: split.labels[split.labels != 7] for name, split in splits.items()},
    )
    refuses(
        few_shot_images.main,
        [f"--data={tmp_path}"],
        "there must be two images of each digit, not 0 of",
        capsys,
    )
