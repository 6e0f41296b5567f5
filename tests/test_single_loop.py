"""Single loops: known solutions, large penalties, first derivatives where they suffice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import OnceDifferentiable
from problems import Problem, dense_parts, logistic, newton, relative_error, ridge, spd_matrix
from torch import Tensor

import hypergrad as hg
from hypergrad.block import from_flat, to_flat
from hypergrad.single_loop import BOME, F2SA, MEHA, SOBA, VPBGD, LoopState, SingleLoop

METHODS: dict[str, tuple[SingleLoop, float, float, int, float]] = {
    # The method, step sizes of θ and φ, steps, and the error that they leave.
    "F2SA": (F2SA(lr=0.2, penalty=5.0, growth=0.1), 0.2, 0.05, 1500, 0.02),
    "V-PBGD": (VPBGD(lr=0.45, penalty=50.0), 0.2, 0.02, 1500, 0.03),
    "BOME": (BOME(lr=0.45), 0.02, 0.02, 3000, 0.04),
    "MEHA": (MEHA(lr=0.2), 0.2, 0.5, 3000, 0.01),
    "SOBA": (SOBA(lr=0.2), 0.2, 0.05, 1000, 1e-6),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reaches_the_solution_of_a_quadratic_bilevel_problem(name: str) -> None:
    """θ*(φ) = A⁻¹(Bφ + c), so that φ* is the solution of a least-squares problem."""
    method, theta_lr, phi_lr, steps, bound = METHODS[name]
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
    # A penalty method is biased by the inverse of its last penalty, BOME by its step size.
    assert relative_error(p, expected) < bound
    assert relative_error(w, J @ expected + offset) < bound


@pytest.mark.parametrize("make", [ridge, logistic], ids=["ridge", "logistic"])
def test_a_large_penalty_gives_the_hypergradient(make: Callable[[], Problem]) -> None:
    """At ω = argmin f and θ = argmin f + g/λ it is off by O(1/λ) (Kwon et al. 2023, Lemma 3.1)."""
    problem = make()
    errors = []
    for penalty in (1e3, 1e4):

        def penalised(w: Any, p: Any, penalty: float = penalty) -> Tensor:
            return problem.inner(w, p) + problem.outer(w, p) / penalty

        theta = newton(penalised, problem.params, problem.hparams)
        state = LoopState(0, problem.params)
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

        def gap(w: Tensor, p: Tensor, omega: Tensor = found.state.companion) -> Tensor:
            return problem.inner(w, p) - problem.inner(omega, p)

        q_theta, q_phi = torch.func.grad(gap, argnums=(0, 1))(theta, problem.hparams)
        square = q_theta.square().sum() + q_phi.square().sum()
        rate = ((found.params * q_theta).sum() + (found.hparams * q_phi).sum()) / square
        assert rate > 0.7 * (1 - 1e-9)
        if found.multiplier > 0.0:
            torch.testing.assert_close(rate, torch.tensor(0.7, dtype=torch.float64))
        multipliers.append(found.multiplier)
    assert max(multipliers) > 0.0


FIRST_ORDER = [name for name in METHODS if name != "SOBA"]


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_derivatives_are_enough_and_nothing_is_changed(name: str) -> None:
    method, *_ = METHODS[name]
    w = torch.tensor([0.5, -0.3], requires_grad=True)
    p = torch.tensor(0.7, requires_grad=True)
    before = torch.get_rng_state()

    def inner(w: Tensor, p: Tensor) -> Tensor:
        return (OnceDifferentiable.apply(w) * p).sum() + w.square().sum() + 0 * torch.rand(()).sum()

    state = method.init(w)
    kept = state.companion.clone()
    found = method.directions(inner, lambda w, p: w.sum() + p, w, p, state)
    assert found.params.shape == w.shape
    assert found.hparams.shape == p.shape
    assert w.grad is None
    assert p.grad is None
    assert torch.equal(state.companion, kept)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.inner_value == pytest.approx(float(inner(w, p)))


@pytest.mark.parametrize("make", [ridge, logistic], ids=["ridge", "logistic"])
def test_soba_at_the_solution_of_both_systems_gives_the_hypergradient(
    make: Callable[[], Problem],
) -> None:
    problem = make()
    H, _, g_theta, _ = dense_parts(problem)
    flat = torch.linalg.solve(H, g_theta)
    v = from_flat(flat, problem.params)
    found = SOBA(lr=0.1).directions(
        problem.inner, problem.outer, problem.params, problem.hparams, LoopState(7, v)
    )
    assert relative_error(found.hparams, problem.hypergradient) < 1e-9
    assert relative_error(found.state.companion, v) < 1e-9
    assert found.state.step == 8
    assert float(to_flat(found.params).norm()) < 1e-9


@pytest.mark.parametrize("method", [F2SA(lr=0.1), SOBA(lr=0.1)], ids=["F2SA", "SOBA"])
def test_averaged_objectives_are_taken_batch_by_batch(method: SingleLoop) -> None:
    problem = ridge()
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
    (lambda: SOBA(lr=-1.0), ValueError, "lr must be"),
    (lambda: SOBA(lr=1.0, mode="sideways"), ValueError, "mode must be one of"),
    (lambda: MEHA(lr=0.1, gamma=-1.0), ValueError, "gamma must be"),
    (lambda: F2SA(lr=0.1).init({}), ValueError, "params must hold at least one tensor"),
    (
        lambda: F2SA(lr=0.1).directions(
            ridge().inner, ridge().outer, ridge().params, ridge().hparams,
            LoopState(0, torch.ones(2)),
        ),
        ValueError,
        r"state\.companion must have the shapes of params",
    ),
    (
        lambda: F2SA(lr=0.1).directions(
            3, ridge().outer, ridge().params, ridge().hparams, LoopState(0, ridge().params)
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
