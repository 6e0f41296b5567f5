"""The gallery's equilibrium network: its gradients, what it keeps, and a small run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gallery import refuses, run

import equilibrium as example
import hypergrad as hg

DEEP = {"rtol": 1e-14, "maxiter": 2000}


@pytest.fixture
def model() -> example.Classifier:
    return example.Classifier(20, 12, example.equilibrium, bound=0.9).double()


@pytest.fixture
def rows() -> example.Rows:
    return torch.rand(7, 20, dtype=torch.float64), torch.arange(7)


@pytest.mark.parametrize("solver", [hg.FixedPoint(rtol=1e-12), hg.GMRES(rtol=1e-12)])
def test_the_gradient_is_that_through_very_many_steps(
    model: example.Classifier, rows: example.Rows, solver: hg.LinearSolver
) -> None:
    layer = hg.fixed_point(example.cell, solver=solver)(example.settle)
    found = example.gradient(model, layer, rows, **DEEP)
    exact = example.gradient(model, example.settle, rows, **DEEP)
    assert (found - exact).norm() < 1e-9 * exact.norm()


def test_the_equilibrium_does_not_depend_on_where_the_iteration_starts(
    model: example.Classifier, rows: example.Rows
) -> None:
    weight, drive = model.contraction(), model.drive(rows[0])
    z = 10.0 * torch.randn_like(drive)
    for _ in range(500):
        z = example.cell(z, weight, drive)
    torch.testing.assert_close(z, example.settle(weight, drive, **DEEP))
    assert torch.linalg.matrix_norm(weight, 2) < 0.9 + 1e-9


def test_what_is_kept_does_not_depend_on_the_number_of_steps(
    model: example.Classifier, rows: example.Rows
) -> None:
    kept = example.memory(model, rows[0])
    assert len({row[f"{example.MAIN}, kB"] for row in kept}) == 1
    unrolled = {row["steps"]: row[f"{example.UNROLLED}, kB"] for row in kept}
    z = 7 * 12 * 8 / 1e3  # kB
    assert unrolled[100] - unrolled[50] == pytest.approx(50 * z)
    assert kept[0][f"{example.MAIN}, kB"] < unrolled[5]


def test_the_other_network_has_as_many_parameters(model: example.Classifier) -> None:
    ours, theirs = (
        sum(p.numel() for p in net.parameters()) for net in (model, example.shallow(20, 12))
    )
    assert ours <= theirs <= ours + 20 + 11


def test_it_learns_as_well_as_the_unrolled_network_and_keeps_less(
    digits: Path, tmp_path: Path
) -> None:
    _, tables = run(
        tmp_path, "equilibrium", f"--data={digits}", "--train=1200", "--epochs=8", "--hidden=40",
        "--repeats=1",
    )  # fmt: skip
    methods, solves, bounds, _ = tables.values()
    rows = {row["method"]: row for row in methods}
    unrolled = rows[example.UNROLLED]
    for name in (example.MAIN, "equilibrium, GMRES"):
        assert rows[name][example.ACCURACY] > max(80.0, unrolled[example.ACCURACY] - 2.0)
        assert rows[name][example.ERROR] < 0.02
        assert rows[name][example.KEPT] < 0.5 * unrolled[example.KEPT]
    assert rows["equilibrium, Identity (JFB)"][example.ERROR] > 0.1
    assert len(solves) == 8
    for row in solves:
        assert row["status"] == "CONVERGED"
        assert row[example.FORWARD] < 60
        assert row[example.CHANGE] <= 1e-4
        assert row[example.RESIDUAL] <= 1e-3
    steps = [row[example.FORWARD] for row in bounds]
    assert steps == sorted(steps)
    assert steps[-1] > 2 * steps[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train=0"], "--train must be at least 1, not 0"),
        (["--train=1201"], "--train must be at most 1200, not 1201"),
        (["--full"], "--train must be at most 1200, not 60000"),
        (["--epochs=-1"], "--epochs must be at least 1, not -1"),
        (["--hidden=0"], "--hidden must be at least 1, not 0"),
        (["--repeats=0"], "--repeats must be at least 1, not 0"),
        (["--bound=0"], "--bound must be above 0, not 0.0"),
        (["--bound=nan"], "--bound must be above 0, not nan"),
    ],
)
def test_it_refuses_what_it_cannot_do(
    digits: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses(example.main, [f"--data={digits}", *arguments], words, capsys)
