"""The example of data-set distillation on small digits."""

from __future__ import annotations

from pathlib import Path

import pytest
from gallery import refuses, run

import distillation


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps=0"], "--steps must be at least 1, not 0"),
        (["--trials=1"], "--trials must be at least 2, not 1"),
        (["--method", "adam"], "invalid choice: 'adam'"),
        (["--full"], "--full needs images of at least 12 × 12 pixels, not 8 × 8"),
        (["--data=nowhere"], "`make data` fetches MNIST"),
    ],
)
def test_distillation_refuses_what_it_cannot_do(
    digits: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses(distillation.main, [f"--data={digits}", *arguments], words, capsys)


def test_distilled_images_train_better_than_real_ones_and_noise(
    digits: Path, tmp_path: Path
) -> None:
    _, tables = run(
        tmp_path, "distillation", f"--data={digits}", "--method=cg", "--steps=100", "--trials=5"
    )
    rows = {row["50 images"]: row for row in tables["20 inner steps, 100 outer steps"]}
    accuracy, spread = "test accuracy, %", "standard deviation"
    distilled = rows["distilled by cg"]
    assert rows["noise"][accuracy] < 30.0
    assert distilled[accuracy] > rows["noise"][accuracy] + 30.0
    assert distilled[accuracy] > rows["real"][accuracy] + 8.0
    assert distilled[spread] > 0.0  # networks of their own, not one over and over
