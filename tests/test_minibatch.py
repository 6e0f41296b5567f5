"""Objectives over mini-batches against the same objective on all data, and stochastic solvers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import hypergrad as hg
from hypergrad.operators import hessian

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(60, generator=GENERATOR, dtype=torch.float64)
X_VAL = torch.randn(40, 5, generator=GENERATOR, dtype=torch.float64)
Y_VAL = torch.randn(40, generator=GENERATOR, dtype=torch.float64)
DECAY = torch.full((5,), -1.0, dtype=torch.float64)


def inner(w: Tensor, decay: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    misfit = ((x.to(w) @ w - y.to(w)) ** 2 + 1).sqrt().mean()
    return misfit + 0.5 * (decay.exp() * w**2).sum() + 0.01 * (w**4).sum()


def outer(w: Tensor, decay: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (x.to(w) @ w - y.to(w)).square().mean() + decay.mean() ** 2


def whole(w: Tensor, decay: Tensor) -> Tensor:
    return inner(w, decay, (X, Y))


W = torch.linspace(-0.3, 0.3, 5, dtype=torch.float64)


def batches(size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), Y.split(size), strict=True))


def weight(batch: tuple[Tensor, Tensor]) -> float:
    return len(batch[0])


@pytest.mark.parametrize("keep_graphs", [False, True])
@pytest.mark.parametrize("size", [60, 20, 7])
@pytest.mark.parametrize("mode", ["auto", "reverse", "forward", "finite-difference", "compiled"])
def test_the_averaged_hessian_is_that_of_all_data(keep_graphs: bool, size: int, mode: Any) -> None:
    mean = hg.Averaged(inner, batches(size), weight=weight, keep_graphs=keep_graphs)
    A, B = hessian(mean, W, DECAY, mode=mode), hessian(whole, W, DECAY)
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if mode == "finite-difference" else {}
    assert A.value == pytest.approx(B.value)
    torch.testing.assert_close(A.gradient, B.gradient)
    v = torch.ones(3, 5, dtype=torch.float64).cumsum(1)
    torch.testing.assert_close(A.matvec(v[0]), B.matvec(v[0]), **tolerance)
    torch.testing.assert_close(A.matmat(v), B.matmat(v), **tolerance)
    torch.testing.assert_close(A.vjp_outer(v[0]), B.vjp_outer(v[0]), **tolerance)
    torch.testing.assert_close(mean(W, DECAY), whole(W, DECAY))
    assert A.symmetric


@pytest.mark.parametrize("keep_graphs", [False, True])
def test_hypergradients_over_loaders_are_those_of_all_data(keep_graphs: bool) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=9, shuffle=True)
    validation = DataLoader(TensorDataset(X_VAL, Y_VAL), batch_size=16)
    expected = hg.hypergradient(
        whole, lambda w, d: outer(w, d, (X_VAL, Y_VAL)), W, DECAY, method=hg.CG(rtol=1e-10)
    )
    before = torch.get_rng_state()
    result = hg.hypergradient(
        hg.Averaged(inner, loader, weight=weight, keep_graphs=keep_graphs),
        hg.Averaged(outer, validation, weight=weight),
        W,
        DECAY,
        method=hg.CG(rtol=1e-10),
    )
    assert torch.equal(torch.get_rng_state(), before), "a shuffling loader draws in private"
    assert result.outer_value == pytest.approx(expected.outer_value)
    torch.testing.assert_close(result.grads, expected.grads)


def test_one_batch_is_in_memory_at_a_time_unless_graphs_are_kept() -> None:
    alive = peak = 0

    class Watched:
        def __init__(self) -> None:
            nonlocal alive, peak
            alive += 1
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class Loader:
        def __iter__(self) -> Any:
            for batch in batches(10):
                yield (*batch, Watched())

    def watched(w: Tensor, d: Tensor, batch: Any) -> Tensor:
        return inner(w, d, batch[:2])

    hg.hypergradient(hg.Averaged(watched, Loader()), lambda w, d: w.sum(), W, DECAY)
    # The last one, and the one that the loader makes next.
    assert peak <= 3
    peak = alive = 0
    A = hessian(hg.Averaged(watched, Loader(), keep_graphs=True), W, DECAY)
    assert alive == 6
    assert A.matvec(W).isfinite().all()


def test_a_batch_that_fails_leaves_the_random_state_alone() -> None:
    def failing(w: Tensor, d: Tensor, batch: Any) -> Tensor:
        if batch == 1:
            raise RuntimeError("broken batch")
        return inner(w, d, (X, Y))

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken batch") as caught:
        hessian(hg.Averaged(failing, [0, 1]), W, DECAY)
    assert caught.value.__traceback__ is not None, "which keeps every frame of it alive"
    assert torch.equal(torch.get_rng_state(), before)
    model = nn.Dropout(0.5)
    dropping = hg.Averaged(lambda w, d, _: model(w).sum() * torch.nan, [0, 1])
    with pytest.raises(ValueError, match="inner must return a finite value") as caught_nan:
        hessian(dropping, W, DECAY)
    assert caught_nan.value.__traceback__ is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_is_accumulated_in_float32() -> None:
    """A thousand equal batches: a bfloat16 sum would stop growing at 256."""
    w, d = W.bfloat16(), DECAY.bfloat16()
    mean = hg.Averaged(lambda w, d, _: (w**2 * d.exp()).sum(), range(1000))
    A = hessian(mean, w, d)
    one = hessian(lambda w, d: (w**2 * d.exp()).sum(), w, d)
    v = torch.ones(5)
    torch.testing.assert_close(A.matvec(v), one.matvec(v), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(A.gradient, one.gradient)
    assert A.vjp_outer(v).dtype == torch.bfloat16


def test_dropout_masks_differ_between_batches_and_stay_between_products() -> None:
    model = nn.Sequential(nn.Linear(5, 32), nn.Dropout(0.5), nn.Linear(32, 1)).double()
    params = {k: v.detach() for k, v in model.named_parameters()}
    seen: list[Tensor] = []

    def dropping(w: Any, d: Tensor, batch: int) -> Tensor:
        out = functional_call(model, w, (torch.ones(1, 5, dtype=torch.float64),))
        seen.append(out.detach())
        return out.square().mean() + 0.5 * sum((d.exp().mean() * t**2).sum() for t in w.values())

    A = hessian(hg.Averaged(dropping, [0, 1]), params, DECAY)
    first = A.matvec(params)
    second = A.matvec(params)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_a_sampled_objective_takes_the_next_batch_each_time() -> None:
    sampled = hg.Sampled(inner, batches(20))
    each = [hessian(lambda w, d, b=b: inner(w, d, b), W, DECAY) for b in batches(20)]
    A = hessian(sampled, W, DECAY)
    torch.testing.assert_close(A.gradient, each[0].gradient)
    torch.testing.assert_close(A.matvec(W), each[1].matvec(W))
    torch.testing.assert_close(A.vjp_outer(W), each[2].vjp_outer(W))
    torch.testing.assert_close(A.matmat(W[None])[0], each[0].matvec(W))
    assert sampled(W, DECAY).item() == pytest.approx(each[1].value)


@pytest.mark.parametrize(
    "solver",
    [hg.StochasticNeumann(terms=150), hg.SGDSolve(steps=150), hg.SGDSolve(150, average=False)],
)
@pytest.mark.parametrize("draws", [8, pytest.param(40, marks=pytest.mark.long)])
def test_stochastic_solvers_are_right_on_average(solver: hg.LinearSolver, draws: int) -> None:
    """The mean of many runs tends to the exact answer; a fixed operator gives it at once."""
    validation = lambda w, d: outer(w, d, (X_VAL, Y_VAL))  # noqa: E731
    exact = hg.hypergradient(whole, validation, W, DECAY, method=hg.Dense()).grads
    at_once = hg.hypergradient(whole, validation, W, DECAY, method=solver).grads
    assert relative_error(at_once, exact) < 1e-2
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(X, Y), batch_size=20, shuffle=True, generator=generator)
    sampled = hg.Sampled(inner, loader)
    runs = torch.stack(
        [hg.hypergradient(sampled, validation, W, DECAY, method=solver).grads for _ in range(draws)]
    )
    error = relative_error(runs.mean(0), exact)
    spread = float(runs.std(0).norm() / exact.norm()) / draws**0.5
    # Products of two noisy factors have a bias of their own, of the order of one variance.
    assert error < 4 * spread + 0.05
    assert not torch.equal(runs[0], runs[1])


def test_averaging_the_iterates_of_sgd_takes_noise_away() -> None:
    validation = lambda w, d: outer(w, d, (X_VAL, Y_VAL))  # noqa: E731
    spreads = []
    for average in (True, False):
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, generator=generator)
        sampled = hg.Sampled(inner, loader)
        solver = hg.SGDSolve(100, average=average)
        solves = torch.stack(
            [
                hg.hypergradient(sampled, validation, W, DECAY, method=solver).solve.x
                for _ in range(10)
            ]
        )
        spreads.append(float(solves.std(0).norm()))
    assert spreads[0] < 0.7 * spreads[1]


def test_sgd_started_at_the_answer_is_no_noisier_than_where_it_ends() -> None:
    """A correction of the start would keep the noise of the one batch that it was found with."""
    validation = lambda w, d: outer(w, d, (X_VAL, Y_VAL))  # noqa: E731
    exact = hg.hypergradient(whole, validation, W, DECAY, method=hg.Dense()).solve.x
    errors = []
    for x0 in (None, exact):
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, generator=generator)
        sampled = hg.Sampled(inner, loader)
        runs = [
            hg.hypergradient(sampled, validation, W, DECAY, method=hg.SGDSolve(150), x0=x0).solve.x
            for _ in range(6)
        ]
        errors.append(sum(relative_error(x, exact) for x in runs) / len(runs))
    assert errors[1] < 1.2 * errors[0]
    A = hessian(whole, W, DECAY)
    H = torch.stack([A.matvec(e) for e in torch.eye(5, dtype=torch.float64)])
    corrected = [
        torch.linalg.solve(H, hessian(lambda w, d, b=b: inner(w, d, b), W, DECAY).matvec(exact))
        for b in batches(5)
    ]
    assert errors[1] < 0.5 * sum(relative_error(x, exact) for x in corrected) / len(corrected)


def test_stochastic_solvers_report_divergence() -> None:
    A = hg.operators.Matrix(torch.diag(torch.tensor([1.0, -1.0])))
    for solver in (hg.StochasticNeumann(50), hg.SGDSolve(500), hg.SGDSolve(500, step=5.0)):
        solution = solver.solve(A, torch.ones(2))
        assert solution.status is hg.Status.DIVERGED
        assert torch.isfinite(solution.x).all()


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: hg.Averaged(3, []), TypeError, r"objective must be a function of \(params, hpa"),
        (lambda: hg.Averaged(inner, iter([])), TypeError, "iterable again and again"),
        (lambda: hg.Sampled(inner, 3), TypeError, "batches must be iterable again and again"),
        (lambda: hessian(hg.Averaged(inner, []), W, DECAY), ValueError, "at least one batch"),
        (lambda: hessian(hg.Sampled(inner, []), W, DECAY), ValueError, "at least one batch"),
        (
            lambda: hessian(hg.Averaged(inner, batches(9), weight=lambda b: -1.0), W, DECAY),
            ValueError,
            "weight of a batch must be a finite number > 0, got -1.0",
        ),
        (lambda: hg.StochasticNeumann(0), ValueError, "terms must be at least 1"),
        (lambda: hg.StochasticNeumann(step=0.0), ValueError, "step must be a finite number > 0"),
        (lambda: hg.SGDSolve(0), ValueError, "steps must be at least 1"),
        (lambda: hg.SGDSolve(step=-1.0), ValueError, "step must be a finite number > 0"),
    ],
)
def test_bad_batches_are_refused(build: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()
