"""Every algorithm of the loop reaches two known solutions within its budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from problems import relative_error

import hypergrad as hg
from benchmarks.algorithms import PROBLEMS, run
from benchmarks.plans import PLANS
from benchmarks.timing import one_thread

DOCS = Path(__file__).parent.parent / "docs" / "algorithms.md"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# The penalty methods raise the outer loss before they lower it.
@pytest.mark.filterwarnings("ignore:the outer loss has risen")
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", PLANS)
def test_every_algorithm_reaches_the_solution_within_its_budget(name: str, problem: str) -> None:
    plan = PLANS[name][problem]
    course = run(name, plan, PROBLEMS[problem]())
    assert len(course.excess) == plan.outer_steps
    assert course.error <= plan.error
    assert course.excess[-1] <= plan.excess
    assert course.met


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_known_solutions_are_minima(name: str) -> None:
    """The hypergradient there is zero, and every way leads up, as the square of the distance."""
    problem = PROBLEMS[name]()
    phi = problem.solution
    theta = problem.minimiser(phi[None])[0]
    f, g = (
        lambda w, p, loss=loss, batch=batch: loss(w, p, batch)
        for loss, batch in (
            (problem.inner, problem.inner_whole),
            (problem.outer, problem.outer_whole),
        )
    )
    there = hg.hypergradient(f, g, theta, phi, method=hg.Dense())
    start = problem.minimiser(problem.hparams[None])[0]
    before = hg.hypergradient(f, g, start, problem.hparams, method=hg.Dense())
    assert there.inner_grad_norm < 1e-12
    assert there.grads.norm() < 1e-7 * before.grads.norm()
    away = torch.randn(50, len(phi), dtype=torch.float64)
    near, far = (problem.excess(phi + scale * away) for scale in (1e-3, 2e-3))
    assert (near > 0.0).all()
    torch.testing.assert_close(far / near, torch.full_like(near, 4.0), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_whole_is_the_mean_of_the_batches(name: str) -> None:
    problem = PROBLEMS[name]()
    at = torch.ones_like(problem.params), torch.ones_like(problem.hparams)
    for loss, batches, whole in (
        (problem.inner, problem.inner_batches, problem.inner_whole),
        (problem.outer, problem.outer_batches, problem.outer_whole),
    ):
        slopes = torch.func.grad(loss, argnums=(0, 1))
        every = [torch.cat(slopes(*at, batch)) for batch in batches]
        mean = torch.stack(every).mean(0)
        assert relative_error(mean, torch.cat(slopes(*at, whole))) < 1e-12
        assert relative_error(every[0], mean) > 0.01


def test_the_table_has_every_algorithm_that_the_documentation_names() -> None:
    rows = [line.split("|")[1].strip() for line in DOCS.read_text(encoding="utf-8").splitlines()
            if line.startswith("| ") and "hg." in line]  # fmt: skip
    assert sorted(rows) == sorted(PLANS)
    assert all(plans.keys() == PROBLEMS.keys() for plans in PLANS.values())
