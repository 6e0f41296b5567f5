"""Penalty methods: known solutions, the limit of a large penalty, and first derivatives only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import OnceDifferentiable
from problems import Problem, logistic, newton, relative_error, ridge, spd_matrix
from torch import Tensor

import hypergrad as hg
from hypergrad.first_order import BOME, F2SA, MEHA, VPBGD, PenaltyMethod, PenaltyState

METHODS: dict[str, tuple[PenaltyMethod, float, float, int]] = {
    # The method, step sizes of θ and φ, steps.
    "F2SA": (F2SA(lr=0.2, penalty=5.0, growth=0.1), 0.2, 0.05, 1500),
    "V-PBGD": (VPBGD(lr=0.45, penalty=50.0), 0.2, 0.02, 1500),
    "BOME": (BOME(lr=0.45), 0.02, 0.02, 3000),
    "MEHA": (MEHA(lr=0.2), 0.2, 0.5, 3000),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reaches_the_solution_of_a_quadratic_bilevel_problem(name: str) -> None:
    """θ*(φ) = A⁻¹(Bφ + c), so that φ* is the solution of a least-squares problem."""
    method, theta_lr, phi_lr, steps = METHODS[name]
    generator = torch.Generator().manual_seed(0)
    A = spd_matrix(5, 4.0, 0)
    B, c, t = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 3), 5, 5))
    B = 0.4 * B
    J, offset = torch.linalg.solve(A, B), torch.linalg.solve(A, c)
    expected = torch.linalg.solve(torch.eye(3) + J.T @ J, J.T @ (t - offset))

    def inner(w: Tensor, p: Tensor) -> Tensor:
        return 0.5 * w @ A @ w - w @ (B @ p + c)

    def outer(w: Tensor, p: Tensor) -> Tensor:
        return 0.5 * (w - t).square().sum() + 0.5 * p.square().sum()

    w, p = torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    state = method.init(w)
    for _ in range(steps):
        found = method.directions(inner, outer, w, p, state)
        w, p, state = w - theta_lr * found.params, p - phi_lr * found.hparams, found.state
    assert state.step == steps
    # Each method's bias at its last penalty is below 1/50; BOME's falls with its step size.
    assert relative_error(p, expected) < 0.04
    assert relative_error(w, J @ expected + offset) < 0.04


@pytest.mark.parametrize("make", [ridge, logistic], ids=["ridge", "logistic"])
def test_a_large_penalty_gives_the_hypergradient(make: Callable[[], Problem]) -> None:
    """At ω = argmin f and θ = argmin f + g/λ it is off by O(1/λ) (Kwon et al. 2023, Lemma 3.1)."""
    problem = make()
    errors = []
    for penalty in (1e3, 1e4):

        def penalised(w: Any, p: Any, penalty: float = penalty) -> Tensor:
            return problem.inner(w, p) + problem.outer(w, p) / penalty

        theta = newton(penalised, problem.params, problem.hparams)
        state = PenaltyState(0, problem.params)
        found = F2SA(lr=1e-12, penalty=penalty).directions(
            problem.inner, problem.outer, theta, problem.hparams, state
        )
        errors.append(relative_error(found.hparams, problem.hypergradient))
    assert errors[1] < 1e-2
    assert 8.0 < errors[0] / errors[1] < 12.0


def test_the_multiplier_of_bome_closes_the_gap_at_its_rate() -> None:
    """``⟨∇q, ∇g + λ∇q⟩ ≥ η ‖∇q‖²``, with equality wherever λ > 0."""
    problem, method = ridge(), BOME(lr=0.1, eta=0.7, inner_steps=4)
    generator = torch.Generator().manual_seed(0)
    multipliers = []
    for scale in (1e-3, 1e-1, 1.0):
        noise = torch.randn(problem.params.shape, generator=generator, dtype=torch.float64)
        theta = problem.params + scale * noise
        found = method.directions(
            problem.inner, problem.outer, theta, problem.hparams, method.init(theta)
        )

        def gap(w: Tensor, p: Tensor, omega: Tensor = found.state.params) -> Tensor:
            return problem.inner(w, p) - problem.inner(omega, p)

        q_theta, q_phi = torch.func.grad(gap, argnums=(0, 1))(theta, problem.hparams)
        square = q_theta.square().sum() + q_phi.square().sum()
        rate = ((found.params * q_theta).sum() + (found.hparams * q_phi).sum()) / square
        assert rate > 0.7 * (1 - 1e-9)
        if found.multiplier > 0.0:
            torch.testing.assert_close(rate, torch.tensor(0.7, dtype=torch.float64))
        multipliers.append(found.multiplier)
    assert max(multipliers) > 0.0


@pytest.mark.parametrize("name", METHODS)
def test_first_derivatives_are_enough_and_nothing_is_changed(name: str) -> None:
    method, *_ = METHODS[name]
    w = torch.tensor([0.5, -0.3], requires_grad=True)
    p = torch.tensor(0.7, requires_grad=True)
    before = torch.get_rng_state()

    def inner(w: Tensor, p: Tensor) -> Tensor:
        return (OnceDifferentiable.apply(w) * p).sum() + w.square().sum() + 0 * torch.rand(()).sum()

    state = method.init(w)
    kept = state.params.clone()
    found = method.directions(inner, lambda w, p: w.sum() + p, w, p, state)
    assert found.params.shape == w.shape
    assert found.hparams.shape == p.shape
    assert w.grad is None
    assert p.grad is None
    assert torch.equal(state.params, kept)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.inner_value == pytest.approx(float(inner(w, p)))


def test_averaged_objectives_are_taken_batch_by_batch() -> None:
    problem, method = ridge(), F2SA(lr=0.1)
    halves = hg.Averaged(lambda w, p, b: b * problem.inner(w, p), [0.5, 1.5])
    state = method.init(problem.params)
    at = problem.params + 0.1, problem.hparams, state
    whole = method.directions(problem.inner, problem.outer, *at)
    parts = method.directions(halves, problem.outer, *at)
    torch.testing.assert_close(parts.params, whole.params)
    torch.testing.assert_close(parts.hparams, whole.hparams)


MISTAKES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: F2SA(lr=0.0), ValueError, "lr must be a finite number > 0"),
    (lambda: F2SA(lr=0.1, growth=-1.0), ValueError, "growth must be a finite number >= 0"),
    (lambda: VPBGD(lr=0.1, penalty=0.0), ValueError, "penalty must be"),
    (lambda: VPBGD(lr=0.1, inner_steps=0), ValueError, "inner_steps must be at least 1"),
    (lambda: BOME(lr=0.1, eta=0.0), ValueError, "eta must be"),
    (lambda: MEHA(lr=0.1, power=0.5), ValueError, "power must be a number < 0.5"),
    (lambda: MEHA(lr=0.1, gamma=-1.0), ValueError, "gamma must be"),
    (lambda: F2SA(lr=0.1).init({}), ValueError, "params must hold at least one tensor"),
    (
        lambda: F2SA(lr=0.1).directions(
            ridge().inner, ridge().outer, ridge().params, ridge().hparams,
            PenaltyState(0, torch.ones(2)),
        ),
        ValueError,
        r"state\.params must have the shapes of params",
    ),
    (
        lambda: F2SA(lr=0.1).directions(
            3, ridge().outer, ridge().params, ridge().hparams, PenaltyState(0, ridge().params)
        ),
        TypeError,
        "inner must be a function",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "error", "message"), MISTAKES, ids=lambda x: "")
def test_mistakes_are_named(
    mistake: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        mistake()
