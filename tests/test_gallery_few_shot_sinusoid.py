"""Learning to learn sinusoids: the example at a small size, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from gallery import refuses, run

import few_shot_sinusoid


@pytest.mark.parametrize(("method", "iterations"), [("MAML", 700), ("iMAML", 150)])
def test_a_new_sinusoid_is_learned_in_a_few_steps(
    tmp_path: Path, method: str, iterations: int
) -> None:
    _, tables = run(
        tmp_path, "few_shot_sinusoid", f"--method={method}", f"--iterations={iterations}",
        "--tasks=300",
    )  # fmt: skip
    learned, together = (
        {steps: float(row[f"after {steps}"].split(" ± ")[0]) for steps in (0, 5)}
        for row in next(iter(tables.values()))
    )
    assert learned[5] < 0.75 * learned[0]
    assert learned[5] < 0.8 * together[5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--iterations=0"], "--iterations must be at least 1, not 0"),
        (["--points=0"], "--points must be at least 1, not 0"),
        (["--tasks=1"], "--tasks must be at least 2, not 1"),
    ],
)
def test_few_shot_sinusoid_refuses_what_it_cannot_do(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses(few_shot_sinusoid.main, arguments, words, capsys)
