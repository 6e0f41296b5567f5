"""Weight decays at an equal budget: what the page says of the searches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gallery import refuses, run

import decay_budget
import hypergrad as hg


def test_with_hundreds_of_decays_only_the_gradient_uses_them(tmp_path: Path) -> None:
    _, tables = run(tmp_path, "decay_budget", "--problem", "digits", "--budget=1000")
    (rows,) = tables.values()
    searches = {row["search"]: row for row in rows}
    assert set(searches) == set(decay_budget.SEARCHES)
    for blind in ("Optuna, all decays", "random, all decays"):
        for method in ("CG", "CG, damped by 1 / (η T)", "Nyström, rank 10", "Neumann, 10 terms"):
            assert searches[method]["validation loss"] < searches[blind]["validation loss"] - 0.05
        assert searches[blind]["φ evaluated"] == 9
    # An unrolled outer step costs what two others do and more.
    assert 2 * searches["unrolled"]["φ evaluated"] < searches["CG"]["φ evaluated"] <= 10


def test_damping_stands_for_training_that_ended_early() -> None:
    problem = decay_budget.digits(seed=0)
    rate, steps = decay_budget.INNER_LR, decay_budget.INNER_STEPS
    phi = problem.start
    theta = decay_budget.train(problem, phi)
    unrolled = hg.Unrolled(hg.optimizers.SGD(lr=rate), steps=steps)
    exact = hg.hypergradient(
        problem.inner, problem.outer, torch.zeros_like(phi), phi, method=unrolled
    ).grads

    def error(damping: float) -> float:
        found = hg.hypergradient(
            problem.inner,
            problem.outer,
            theta,
            phi,
            method=hg.Implicit(hg.CG(rtol=1e-4), damping=damping),
        ).grads
        return float((found - exact).norm() / exact.norm())

    assert error(1 / (rate * steps)) < 0.5 * error(0.0)


def test_in_the_synthetic_problem_nystroem_is_ahead_by_the_length_of_its_gradient() -> None:
    problem = decay_budget.synthetic(seed=0)
    phi = problem.start
    theta = decay_budget.train(problem, phi)
    exact, nystrom = (
        hg.hypergradient(problem.inner, problem.outer, theta, phi, method=solver).grads
        for solver in (hg.Dense(), hg.Nystrom(rank=10, rho=0.1, test="gaussian"))
    )
    assert nystrom.norm() > 5.0 * exact.norm()


def test_a_budget_that_is_too_small_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refuses(decay_budget.main, ["--budget=150"], "--budget must be at least 200, not 150", capsys)
