"""The gallery's example of long-tailed reweighting on small images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gallery import refuses, run

import long_tail
import mnist


def test_learned_weights_help_the_rare_classes(digits: Path, tmp_path: Path) -> None:
    _, tables = run(
        tmp_path, "long_tail", f"--data={digits}", "--largest=100", "--factor=100", "--steps=120",
        "--seeds=3", "--method", "cg", "unrolled",
    )  # fmt: skip
    accuracies, _, weights = tables.values()
    balanced = {row["weights"]: row["factor 100"] for row in accuracies}
    for name in ("cg", "unrolled"):
        assert balanced[name] > balanced["all rows alike"] + 3.0
    for row in weights:
        assert row["loss 5"] > 2.0 * row["loss 0.1"]


def test_the_long_tail_has_the_rows_that_the_factor_says(digits: Path) -> None:
    images, _ = mnist.load(digits)
    (x, labels), (meta, meta_labels) = long_tail.long_tail(images, factor=50, largest=100)
    assert labels.bincount().tolist() == [round(100 * 50 ** (-k / 9)) for k in range(10)]
    assert meta_labels.bincount().tolist() == [long_tail.META] * 10
    assert float(torch.cdist(x, meta).min()) > 0.0  # no row is in both
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--factor", "50", "0"], "--factor must be at least 1, not 0"),
        (["--largest=80"], "--largest must leave a row of class 9, but 80 / 200 does not"),
        (["--largest=110"], "a class has 113 rows, not 110 + 10"),
        (["--steps=0"], "--steps must be a positive multiple of 60, not 0"),
        (["--steps=100"], "--steps must be a positive multiple of 60, not 100"),
        (["--seeds=0"], "--seeds must be at least 1, not 0"),
        (["--method", "sgd"], "invalid choice: 'sgd'"),
        (["--data=nowhere"], "`make data` fetches MNIST"),
    ],
)
def test_long_tail_refuses_what_it_cannot_do(
    digits: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses(long_tail.main, [f"--data={digits}", *arguments], words, capsys)
