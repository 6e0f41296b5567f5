"""The gallery's tuned script: the two ways of training agree, and a small run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gallery import refuses, run

import tune_script as example


def test_a_small_run_improves_on_the_scripts_own_numbers(tmp_path: Path) -> None:
    _, tables = run(tmp_path, "tune_script", "--seeds=1", "--steps=4", "--length=20", "--trials=2")
    rows = {row["numbers"]: row for row in tables["Each seed"]}
    tuned, plain = rows[example.TUNED], rows[example.UNTUNED]
    assert tuned[example.TEST] < 0.8 * plain[example.TEST]
    assert rows[example.SEARCHED]["trials"] >= 2


def test_there_are_ten_numbers() -> None:
    assert sum(value.numel() for value in example.START.values()) == 10
    torch.manual_seed(0)
    drawn = example.drawn()
    assert all((drawn[k] - example.START[k]).abs().max() < 2.31 for k in drawn)


def test_it_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    refuses(example.main, ["--seeds=0"], "--seeds must be at least 1, not 0", capsys)
