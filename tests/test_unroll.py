"""Unrolled differentiation: all memory modes agree, with each other and with finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from problems import relative_error, spd_matrix
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from unrolled import LOOPS, MEMORIES, REVERSE, Loop, fresh, leaf, outer_value

import hypergrad as hg
from hypergrad import optimizers as opt
from hypergrad import tree as tr


def make_optimizer(name: str, lr: Tensor, eps: float = 1e-8) -> opt.Optimizer:
    return {
        "sgd": opt.SGD(lr=lr, momentum=0.9, weight_decay=1e-3),
        "adam": opt.Adam(lr=lr, eps=eps),
        "schedule": opt.AdamW(lr=lambda step: lr / (1 + step), eps=eps),
    }[name]


OPTIMIZERS = ["sgd", "adam", "schedule"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("make", LOOPS, ids=lambda make: make.__name__)
def test_all_memory_modes_give_the_hypergradient_of_the_full_graph(
    make: Callable[[], Loop], name: str
) -> None:
    results = {}
    for memory in MEMORIES:
        loop, lr = make(), leaf(0.05)
        hparams = fresh(loop.hparams)
        value = outer_value(loop, hparams, make_optimizer(name, lr), memory=memory)
        value.backward()
        results[memory] = value.detach(), optree.tree_map(lambda t: t.grad, (hparams, lr))
    value, grads = results["graph"]
    for memory in ("recompute", "checkpoint", "forward"):
        assert results[memory][0] == value
        assert relative_error(results[memory][1], grads) < 1e-9, memory


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("make", LOOPS, ids=lambda make: make.__name__)
def test_gradients_in_start_and_hyperparameters_agree_with_finite_differences(
    make: Callable[[], Loop], name: str
) -> None:
    loop = make()
    at = fresh((loop.params, loop.hparams, {"lr": leaf(0.05)}))

    def value(params: Any, hparams: Any, rate: Any) -> Tensor:
        # With a small ε the first step is the sign of the gradient, which jumps.
        optimizer = make_optimizer(name, rate["lr"], eps=1e-2)
        return outer_value(make(), hparams, optimizer, params=params)

    value(*at).backward()
    generator = torch.Generator().manual_seed(0)
    step = 1e-5
    for part in range(3):
        direction = optree.tree_map(
            lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype), at[part]
        )
        ends = []
        for sign in (1, -1):
            moved = list(optree.tree_map(torch.Tensor.detach, at))
            moved[part] = tr.add(moved[part], direction, sign * step)
            with torch.no_grad():
                ends.append(value(*moved))
        difference = (ends[0] - ends[1]) / (2 * step)
        slopes = optree.tree_map(lambda t, d: (t.grad * d).sum(), at[part], direction)
        torch.testing.assert_close(
            sum(optree.tree_leaves(slopes)), difference, rtol=1e-4, atol=1e-9
        )


@pytest.mark.parametrize("memory", REVERSE)
def test_a_loop_may_go_on_from_the_state_of_another(memory: Any) -> None:
    loop = LOOPS[0]()
    grads = []
    for cut in (None, 2):
        hparams, params, lr = fresh(loop.hparams), fresh(loop.params), leaf(0.05)
        optimizer = make_optimizer("schedule", lr)
        if cut is None:
            end = hg.unroll(loop.inner, optimizer, params, hparams, loop.batches, memory=memory)
        else:
            first, rest = loop.batches[:cut], loop.batches[cut:]
            middle, state = hg.unroll(
                loop.inner, optimizer, params, hparams, first, memory=memory, return_state=True
            )
            assert state.step == cut
            end = hg.unroll(
                loop.inner, optimizer, middle, hparams, rest, memory=memory, state=state
            )
        loop.outer(end, hparams).backward()
        grads.append(optree.tree_map(lambda t: t.grad, (hparams, params, lr)))
    assert relative_error(grads[1], grads[0]) < 1e-12


@pytest.mark.parametrize("memory", MEMORIES)
def test_the_gradient_through_many_steps_is_that_of_the_implicit_function_theorem(
    memory: Any,
) -> None:
    A, b = spd_matrix(6, 10.0, 0), torch.arange(6, dtype=torch.float64)
    phi = torch.zeros(6, dtype=torch.float64, requires_grad=True)

    def inner(w: Tensor, p: Tensor) -> Tensor:
        return 0.5 * w @ A @ w - w @ (b + p)

    start = torch.zeros(6, dtype=torch.float64)
    end = hg.unroll(inner, opt.SGD(lr=0.18), start, phi, 150, memory=memory)
    end.square().sum().backward()
    solution = torch.linalg.solve(A, b)
    assert relative_error(phi.grad, 2 * torch.linalg.solve(A, solution)) < 1e-9


@pytest.mark.parametrize("memory", REVERSE)
def test_second_derivatives_are_exact(memory: Any) -> None:
    """Through the steps twice: a Hessian in φ, against that of plain autograd."""
    loop = LOOPS[0]()

    def value(decay: Tensor, mode: Any) -> Tensor:
        end = hg.unroll(loop.inner, opt.SGD(lr=0.3), loop.params, decay, loop.batches, memory=mode)
        return loop.outer(end, decay)

    decay = loop.hparams.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda d: value(d, memory), decay)


def test_the_first_momentum_step_carries_its_gradient() -> None:
    decay = leaf(0.5)
    end = hg.unroll(
        lambda w, c: 0.5 * c * w.square().sum(), opt.SGD(lr=0.1, momentum=0.9),
        torch.ones(1, dtype=torch.float64), decay, 1,
    )  # fmt: skip
    end.sum().backward()
    torch.testing.assert_close(decay.grad, torch.tensor(-0.1, dtype=torch.float64))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("K", [1, 3, 5, 9])
def test_truncation_differentiates_the_last_steps_only(K: int, memory: Any) -> None:
    loop = LOOPS[1]()
    hparams = fresh(loop.hparams)
    outer_value(loop, hparams, opt.SGD(lr=0.1, momentum=0.9), truncate=K, memory=memory).backward()

    expected = fresh(loop.hparams)
    torch.manual_seed(3)
    cut = max(0, len(loop.batches) - K)
    params, state = loop.params, None
    optimizer = opt.SGD(lr=0.1, momentum=0.9)
    if cut:
        with torch.no_grad():
            params, state = hg.unroll(
                loop.inner, optimizer, params, expected, loop.batches[:cut], return_state=True
            )
    end = hg.unroll(
        loop.inner, optimizer, params, expected, loop.batches[cut:], state=state, memory="graph"
    )
    torch.manual_seed(4)
    loop.outer(end, expected).backward()
    for a, b in zip(optree.tree_leaves(hparams), optree.tree_leaves(expected), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-12


def test_the_error_of_truncation_falls_at_the_rate_that_theory_gives() -> None:
    """`‖dθ_T/dφ − its last K terms‖ ≤ κ (1 − ημ)^K` with equality on the slowest eigenvector.

    Gradient descent with step η on ½ wᵀAw − wᵀφ has dθ_T/dφ = η Σ_k (I − ηA)^k, k < T. The last K
    steps are its first K terms; what is missing is (I − ηA)^K A⁻¹ (I − (I − ηA)^(T−K)). Along the
    eigenvector of the smallest eigenvalue μ that is (1 − ημ)^K / μ for T → ∞ (Shaban et al. 2019,
    Prop. 3.1).
    """
    A = spd_matrix(8, 20.0, 1)
    eigenvalues, vectors = torch.linalg.eigh(A)
    mu, slowest, rate = eigenvalues[0], vectors[:, 0], 1.0 / eigenvalues[-1]
    start = torch.zeros(8, dtype=torch.float64)
    T = 600

    def hypergradient(K: int) -> Tensor:
        phi = torch.ones(8, dtype=torch.float64, requires_grad=True)
        end = hg.unroll(
            lambda w, p: 0.5 * w @ A @ w - w @ p, opt.SGD(lr=rate.item()), start, phi, T, truncate=K
        )
        (end @ slowest).backward()
        return phi.grad

    exact = slowest / mu
    errors = {K: float((hypergradient(K) - exact).norm()) for K in (10, 20, 40, 80)}
    for K, error in errors.items():
        assert math.isclose(error, float((1 - rate * mu) ** K / mu), rel_tol=1e-6)
    contraction = (errors[80] / errors[10]) ** (1 / 70)
    assert math.isclose(contraction, 1 - rate * mu, rel_tol=1e-8)


@pytest.mark.parametrize("memory", MEMORIES)
def test_first_order_takes_gradients_for_constants_and_gives_no_none(memory: Any) -> None:
    """First-order MAML: `dθ_T/dθ_0 = I` for gradient descent, and dθ_T/dφ is zero."""
    loop = LOOPS[1]()
    hparams, lr = fresh(loop.hparams), leaf(0.1)
    params = fresh(loop.params)
    torch.manual_seed(3)
    end = hg.unroll(
        loop.inner, opt.SGD(lr=lr), params, hparams, loop.batches, first_order=True, memory=memory
    )
    gradient_at_end = torch.autograd.grad(
        sum(t.square().sum() for t in end.values()), list(end.values()), retain_graph=True
    )
    sum(t.square().sum() for t in end.values()).backward()
    for parameter, expected in zip(params.values(), gradient_at_end, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
    for grad in optree.tree_leaves(optree.tree_map(lambda t: t.grad, hparams)):
        assert torch.equal(grad, torch.zeros_like(grad))
    # θ_T = θ_0 − lr · Σ g, and the sum is what it moved by.
    moved = sum(
        (2 * end[key] * (end[key] - params[key])).sum() for key in params
    ).detach() / lr.detach()  # fmt: skip
    torch.testing.assert_close(lr.grad, moved)


@pytest.mark.parametrize("memory", MEMORIES)
def test_an_input_that_nothing_depends_on_has_gradient_zero(memory: Any) -> None:
    hparams = {"used": leaf(1.0), "unused": leaf(2.0)}
    end = hg.unroll(
        lambda w, h: 0.5 * (w - h["used"]).square().sum(), opt.SGD(lr=1.0),
        torch.zeros(2, dtype=torch.float64, requires_grad=True), hparams, 1, memory=memory,
    )  # fmt: skip
    end.sum().backward()
    assert hparams["used"].grad == 2.0
    assert hparams["unused"].grad == 0.0


def test_random_directions_are_unbiased_with_the_variance_that_is_stated() -> None:
    """The mean over many estimates, within four standard errors; the variance within 20 %."""
    A, target = spd_matrix(4, 5.0, 2), torch.ones(4, dtype=torch.float64)

    def hypergradient(**options: Any) -> Tensor:
        phi = torch.ones(4, dtype=torch.float64, requires_grad=True)
        end = hg.unroll(
            lambda w, p: 0.5 * w @ A @ w - w @ p, opt.SGD(lr=0.1, momentum=0.5),
            torch.zeros(4, dtype=torch.float64), phi, 4, memory="forward", **options,
        )  # fmt: skip
        (end - target).square().sum().backward()
        return phi.grad

    exact = hypergradient()
    generator = torch.Generator().manual_seed(0)
    k, count = 2, 200
    estimates = torch.stack(
        [hypergradient(directions=k, generator=generator) for _ in range(count)]
    )
    variance = float((estimates - exact).square().sum(1).mean())
    assert math.isclose(variance, (4 - 1) / k * float(exact.square().sum()), rel_tol=0.2)
    assert (estimates.mean(0) - exact).norm() < 4 * math.sqrt(variance / count)


@pytest.mark.parametrize("memory", ["recompute", "checkpoint", "forward"])
@pytest.mark.parametrize("mode", ["reverse", "forward", "finite-difference", "compiled"])
def test_products_may_be_computed_in_any_mode(mode: Any, memory: Any) -> None:
    loop = LOOPS[1]()
    grads = []
    for options in ({"memory": "graph"}, {"memory": memory, "mode": mode}):
        hparams = fresh(loop.hparams)
        outer_value(loop, hparams, opt.Adam(lr=0.05), **options).backward()
        grads.append(optree.tree_map(lambda t: t.grad, hparams))
    assert relative_error(grads[1], grads[0]) < (1e-6 if mode == "finite-difference" else 1e-9)


@pytest.mark.parametrize("memory", MEMORIES)
def test_averaged_and_sampled_objectives_are_unrolled(memory: Any) -> None:
    loop = LOOPS[0]()

    def hypergradient(inner: Any, steps: Any, memory: Any) -> Tensor:
        decay = loop.hparams.clone().requires_grad_()
        end = hg.unroll(
            inner, opt.SGD(lr=0.3, momentum=0.9), loop.params, decay, steps, memory=memory
        )
        loop.outer(end, decay).backward()
        return decay.grad

    mean = lambda w, c: sum(loop.inner(w, c, b) for b in loop.batches) / len(loop.batches)  # noqa: E731
    averaged = hypergradient(hg.Averaged(loop.inner, loop.batches), 4, memory)
    assert relative_error(averaged, hypergradient(mean, 4, "graph")) < 1e-12
    sampled = hypergradient(hg.Sampled(loop.inner, loop.batches), 4, memory)
    assert relative_error(sampled, hypergradient(loop.inner, loop.batches[:4], "graph")) < 1e-12


@pytest.mark.parametrize("memory", MEMORIES)
def test_an_optimizer_of_torch_goes_on_and_is_left_alone(memory: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    X, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    adam = torch.optim.Adam(model.parameters(), lr=0.1)

    def loss(w: Any, c: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, w, (X,)), y) + c * w["weight"].square().sum()

    def train(steps: int) -> None:
        for _ in range(steps):
            adam.zero_grad()
            loss(dict(model.named_parameters()), decay.detach()).backward()
            adam.step()

    decay = leaf(0.1)
    train(3)
    params = dict(model.named_parameters())
    before = {key: value.detach().clone() for key, value in params.items()}
    end = hg.unroll(loss, opt.from_torch(adam), params, decay, 4, memory=memory)
    torch.testing.assert_close({k: v.detach() for k, v in params.items()}, before)
    end["weight"].sum().backward()
    assert decay.grad is not None
    train(4)
    for key, value in end.items():
        torch.testing.assert_close(value, params[key], rtol=1e-12, atol=1e-12)
