"""Programs that are no part of the gallery run to their end, at the smallest size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_constrained_example_matches_differences_and_lowers_the_loss() -> None:
    out = run("examples/constrained.py", "--steps=20")
    rows = [row for row in out.splitlines() if row.startswith("Σ x = 1")]
    assert len(rows) == 2
    for row in rows:
        error, *_, before, after = re.findall(r"\d\.\d+(?:e-\d+)?", row)
        assert float(error) < 1e-5
        assert float(after) < float(before)


TITLES = (
    "One Hessian product",
    "A block of 10",
    "20 iterations of CG",
    "Work and time",
    "Unrolled SGD",
    "Import",
    "Peak",
    "The loop beside a hand-written one",
    "torch.distributed, unused",
    "Bilevel algorithms",
)


@pytest.mark.long
def test_the_benchmark_prints_every_table(tmp_path: Path) -> None:
    out = run("-m", "benchmarks", "--quick", f"--json={tmp_path / 'bench.json'}")
    assert_complete(out, tmp_path / "bench.json")


def test_the_benchmark_prints_every_table_of_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, without the others that it starts; two solvers, and two algorithms."""
    from benchmarks import __main__ as benchmark
    from benchmarks import algorithms, convergence, unrolling

    makers = convergence._makers

    def two(problem: Any, ranks: tuple[int, ...]) -> Any:
        made = makers(problem, ranks)
        return {name: made[name] for name in ("CG", convergence.kept(10))}

    monkeypatch.setattr(convergence, "_makers", two)
    monkeypatch.setattr(
        algorithms, "PLANS", {name: algorithms.PLANS[name] for name in ("CG", "SOBA")}
    )
    monkeypatch.setattr(unrolling, "can_be_measured", lambda: False)
    monkeypatch.setattr(benchmark, "import_ratio", lambda repeats: (1.0, 1.0))
    monkeypatch.setattr(benchmark, "nystrom_memory", lambda *sizes: [])
    benchmark.main(["--quick", f"--json={tmp_path / 'bench.json'}"])
    assert_complete(capsys.readouterr().out, tmp_path / "bench.json")


def assert_complete(out: str, path: Path) -> None:
    for title in TITLES:
        assert title in out
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert len(figures["costs"]) == 3
    assert len(figures["convergence"]) == 2
    methods = {row["method"] for row in figures["unrolling"]}
    assert {"graph", "recompute", "checkpoint", "forward"} <= methods
    assert set(figures["ranks"]) == {"plain", "by_bare", "beside_a_group", "data_parallel"}
    assert all(cost["hypergradient_ratio"] > 0 for cost in figures["costs"])
