"""argmin, root and fixed_point: first and second derivatives, transforms, failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad as hg

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(20, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(20, generator=GENERATOR, dtype=torch.float64)
DECAY = torch.tensor([0.1, -0.3, 0.5, 0.0], dtype=torch.float64)


def inner(w: dict[str, Tensor], decay: Tensor, x: Tensor) -> Tensor:
    misfit = 0.5 * ((x @ w["a"] + w["b"] - Y) ** 2).mean()
    penalty = 0.5 * (decay.exp() * w["a"] ** 2).sum() + w["b"] ** 2
    return misfit + penalty + 0.1 * (w["a"] ** 4).sum()


def gradient(w: dict[str, Tensor], decay: Tensor, x: Tensor) -> dict[str, Tensor]:
    return torch.func.grad(inner)(w, decay, x)


def newton(decay: Tensor, x: Tensor) -> dict[str, Tensor]:
    w = torch.zeros(5, dtype=torch.float64)

    def flat(w: Tensor) -> Tensor:
        return inner({"a": w[:4], "b": w[4]}, decay, x)

    for _ in range(12):
        w = w - torch.linalg.solve(torch.func.hessian(flat)(w), torch.func.grad(flat)(w))
    return {"a": w[:4], "b": w[4]}


def step(w: dict[str, Tensor], decay: Tensor, x: Tensor) -> dict[str, Tensor]:
    grads = gradient(w, decay, x)
    return {k: w[k] - 0.2 * grads[k] for k in w}


Options = dict[str, Any]
EXACT: Options = {"on_failure": "ignore"}
DECORATED: dict[str, Callable[..., dict[str, Tensor]]] = {
    "argmin-cg": hg.argmin(inner, solver=hg.CG(rtol=1e-13), **EXACT)(newton),
    "argmin-minres": hg.argmin(inner, solver=hg.MINRES(rtol=1e-13), **EXACT)(newton),
    "argmin-block-cg": hg.argmin(inner, solver=hg.BlockCG(rtol=1e-13), **EXACT)(newton),
    "argmin-dense": hg.argmin(inner, solver=hg.Dense(), **EXACT)(newton),
    "root-gmres": hg.root(gradient, solver=hg.GMRES(rtol=1e-13), **EXACT)(newton),
    "root-normal-cg": hg.root(gradient, solver=hg.NormalCG(rtol=1e-13), **EXACT)(newton),
    "root-symmetric": hg.root(gradient, solver=hg.CG(rtol=1e-13), symmetric=True, **EXACT)(newton),
    "fixed-point": hg.fixed_point(step, solver=hg.FixedPoint(rtol=1e-13), **EXACT)(newton),
    "fixed-point-gmres": hg.fixed_point(step, solver=hg.GMRES(rtol=1e-13), **EXACT)(newton),
}
EVERY = pytest.mark.parametrize("name", DECORATED)


def outputs(name: str) -> Callable[..., tuple[Tensor, ...]]:
    return lambda decay, x: tuple(DECORATED[name](decay, x).values())


def inputs() -> tuple[Tensor, Tensor]:
    return DECAY.clone().requires_grad_(), X.clone().requires_grad_()


@EVERY
def test_gradcheck(name: str) -> None:
    decay, x = inputs()
    assert gradcheck(outputs(name), (decay, x), fast_mode=True)


@EVERY
def test_gradgradcheck(name: str) -> None:
    decay, x = inputs()
    assert gradgradcheck(outputs(name), (decay, x), fast_mode=True)


@EVERY
@pytest.mark.long
def test_gradients_are_right_entry_by_entry(name: str) -> None:
    decay, _ = inputs()
    assert gradcheck(lambda d: outputs(name)(d, X), (decay,))
    assert gradgradcheck(lambda d: outputs(name)(d, X), (decay,))


def test_second_derivatives_are_not_half() -> None:
    """TorchOpt gives 0.889 for 1.778: it saves detached tensors."""

    @hg.argmin(lambda w, c: 0.5 * c * w**2 - w)
    def fit(c: Tensor) -> Tensor:
        return 1.0 / c

    c = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(fit(c) ** 2, c, create_graph=True)
    (second,) = torch.autograd.grad(first, c, create_graph=True)
    (third,) = torch.autograd.grad(second, c)
    assert first.item() == pytest.approx(-2 / 1.5**3, rel=1e-6)
    assert second.item() == pytest.approx(6 / 1.5**4, rel=1e-6)
    assert third.item() == pytest.approx(-24 / 1.5**5, rel=1e-6)


@pytest.mark.parametrize("name", ["argmin-cg", "argmin-block-cg", "root-gmres", "fixed-point"])
def test_transforms(name: str) -> None:
    fit = DECORATED[name]

    def loss(decay: Tensor) -> Tensor:
        return (fit(decay, X)["a"] ** 3).sum()

    batch = DECAY + torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
    each = torch.stack(
        [torch.autograd.grad(loss(d), d)[0] for d in batch.clone().requires_grad_().unbind()]
    )
    leaf = batch.clone().requires_grad_()
    (through_vmap,) = torch.autograd.grad(torch.func.vmap(loss)(leaf).sum(), leaf)
    torch.testing.assert_close(through_vmap, each)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(batch), each)
    torch.testing.assert_close(torch.func.grad(loss)(batch[0]), each[0])
    jacobian = torch.autograd.functional.jacobian(lambda d: fit(d, X)["a"], batch[0])
    torch.testing.assert_close(torch.func.jacrev(lambda d: fit(d, X)["a"])(batch[0]), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(lambda d: fit(d, X)["a"])(batch[0]), jacobian)
    hessian = torch.autograd.functional.hessian(loss, batch[0])
    torch.testing.assert_close(torch.func.hessian(loss)(batch[0]), hessian, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        torch.func.jacrev(torch.func.jacrev(loss))(batch[0]), hessian, rtol=1e-6, atol=1e-9
    )


def test_transforms_reach_a_fit_that_leaves_pytorch() -> None:
    matrix = (X.T @ X).numpy()

    def loss(w: Tensor, decay: Tensor) -> Tensor:
        return 0.5 * (w @ (X.T @ X) @ w) + 0.5 * (decay.exp() * w**2).sum() - w.sum()

    @hg.argmin(loss, solver=hg.CG(rtol=1e-12), has_aux=True)
    def fit(decay: Tensor) -> tuple[Tensor, Tensor]:
        solved = np.linalg.solve(matrix + np.diag(np.exp(decay.numpy())), np.ones(len(matrix)))
        return torch.from_numpy(solved), decay

    def exact(decay: Tensor) -> Tensor:
        return torch.linalg.solve(X.T @ X + decay.exp().diag(), torch.ones_like(decay))

    decay = DECAY.detach().clone()
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(
            transform(lambda d: fit(d)[0])(decay), transform(exact)(decay), rtol=1e-8, atol=1e-12
        )
        of_aux = transform(lambda d: fit(d)[1])(decay)
        assert torch.equal(of_aux, torch.zeros_like(of_aux))
    torch.testing.assert_close(
        torch.func.hessian(lambda d: fit(d)[0].square().sum())(decay),
        torch.func.hessian(lambda d: exact(d).square().sum())(decay),
        rtol=1e-6,
        atol=1e-10,
    )


def test_forward_mode() -> None:
    @hg.argmin(lambda w, c: (c * w**2 / 2 - w).sum())
    def fit(c: Tensor) -> Tensor:
        w = torch.zeros_like(c)
        return w.add_(1.0 / c)  # in place, as training code works

    c = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(fit(forward_ad.make_dual(c, torch.ones_like(c)))).tangent
    torch.testing.assert_close(tangent, -1.0 / c**2)
    assert gradcheck(fit, (c.requires_grad_(),), check_forward_ad=True, atol=1e-4)


def test_leaves_of_different_dtypes() -> None:
    @hg.argmin(lambda w, c: 0.5 * (c[0] * w[0] ** 2 + c[1] * w[1] ** 2).sum() - w[0] - w[1])
    def fit(c: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return 1.0 / c[0], 1.0 / c[1]

    c = (
        torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
        torch.tensor(4.0, dtype=torch.float32, requires_grad=True),
    )
    w = fit(c)
    first = torch.autograd.grad(w[0] + w[1], c, create_graph=True)
    assert [t.item() for t in first] == pytest.approx([-1 / 4, -1 / 16], rel=1e-5)
    assert [t.dtype for t in first] == [torch.float64, torch.float32]
    second = torch.autograd.grad(first[0] + first[1], c)
    assert [t.item() for t in second] == pytest.approx([2 / 8, 2 / 64], rel=1e-5)


def test_vmap_over_data_as_well() -> None:
    fit = DECORATED["argmin-cg"]
    xs = torch.stack([X, X.flip(0), 2 * X])
    leaf = DECAY.clone().requires_grad_()
    found = torch.func.vmap(fit, in_dims=(None, 0))(leaf, xs)
    (batched,) = torch.autograd.grad((found["a"] ** 2).sum(), leaf)
    single = sum(torch.autograd.grad((fit(leaf, x)["a"] ** 2).sum(), leaf)[0] for x in xs)
    torch.testing.assert_close(batched, single)


def test_any_training_code_may_run_inside() -> None:
    """torch.optim inside, a module's graph around, gradients to both arguments."""

    @hg.argmin(inner, solver=hg.CG(rtol=1e-12))
    def fit(decay: Tensor, x: Tensor, steps: int = 100) -> dict[str, Tensor]:
        assert not decay.requires_grad
        w = {"a": torch.zeros(4, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
        leaves = [leaf.requires_grad_() for leaf in w.values()]
        optimizer = torch.optim.LBFGS(
            leaves, max_iter=steps, tolerance_grad=1e-13, tolerance_change=0.0
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = inner(w, decay, x)
            value.backward()
            return value

        optimizer.step(closure)
        return w

    decay, x = inputs()
    results = []
    for function, options in ((fit, {"steps": 200}), (DECORATED["argmin-dense"], {})):
        found = function(decay * 1.0, x * 1.0, **options)
        grads = torch.autograd.grad(found["a"].sum() + found["b"], (decay, x))
        results.append(grads)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        assert not fit(decay, x)["a"].requires_grad


def test_a_graph_inside_is_not_counted_twice() -> None:
    """BOAT adds the implicit term to the unrolled one."""
    decay = DECAY.clone().requires_grad_()

    @hg.argmin(lambda w, d: 0.5 * ((w - d) ** 2).sum())
    def fit(d: Tensor) -> Tensor:
        return decay * 1.0  # carries a graph to the very leaf

    fit(decay).sum().backward()
    torch.testing.assert_close(decay.grad, torch.ones(4, dtype=torch.float64))


def test_aux_and_other_arguments_pass_through() -> None:
    @hg.argmin(lambda w, h, labels, scale: (w - scale * h["c"]).square().sum(), has_aux=True)
    def fit(h: dict[str, Tensor], labels: Tensor, scale: float, note: str = "") -> Any:
        return scale * h["c"], {"note": note, "labels": labels, "c": h["c"] * 1.0}

    c = torch.ones(3, requires_grad=True)
    params, aux = fit({"c": c}, torch.arange(3), 2.0, note="kept")
    assert aux["note"] == "kept"
    assert torch.equal(aux["labels"], torch.arange(3))
    assert not aux["c"].requires_grad
    params.sum().backward()
    torch.testing.assert_close(c.grad, torch.full((3,), 2.0))
    assert fit.__name__ == "fit"


def test_a_warm_start_is_held_by_the_caller() -> None:
    held = hg.WarmStart()
    fit = hg.argmin(inner, solver=hg.CG(rtol=1e-8), warm_start=held)(newton)
    decay, x = inputs()
    torch.autograd.grad(fit(decay, x)["a"].sum(), decay)
    assert held.solution is not None
    first = held.solution.iterations
    torch.autograd.grad(fit(decay, x)["a"].sum(), decay)
    assert held.solution.iterations == 0 < first
    other = hg.argmin(lambda w, c: (w - c) ** 2, warm_start=held)(lambda c: c * 1.0)
    c = torch.tensor(1.0, requires_grad=True)
    other(c).backward()
    assert c.grad is not None
    assert c.grad.item() == pytest.approx(1.0)


def test_damping_and_half_precision() -> None:
    fit = hg.argmin(lambda w, c: 0.5 * w**2 - c * w, damping=1.0)(lambda c: c * 1.0)
    c = torch.tensor(3.0, requires_grad=True)
    fit(c).backward()
    assert c.grad is not None
    assert c.grad.item() == pytest.approx(0.5)
    half = torch.tensor(3.0, dtype=torch.bfloat16, requires_grad=True)
    fit(half).backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert half.grad.item() == pytest.approx(0.5, rel=1e-2)


def test_networks_with_dropout_and_batch_norm_leave_no_trace() -> None:
    """One set of masks for the solve and for every derivative; buffers and random state stay."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1)
    ).double()
    start = {k: v.detach() for k, v in model.named_parameters()}
    buffers = [b.clone() for b in model.buffers()]

    def loss(w: dict[str, Tensor], log_decay: Tensor) -> Tensor:
        misfit = (functional_call(model, w, (X,))[:, 0] - Y).square().mean()
        squares = torch.stack([(t - 0.1).square().sum() for t in w.values()]).sum()
        return misfit + 10 * log_decay.exp() * squares

    fit = hg.argmin(loss, solver=hg.MINRES(rtol=1e-11))(lambda d: start)
    d = torch.zeros((), dtype=torch.float64, requires_grad=True)
    state = torch.get_rng_state()

    def derivative(create_graph: bool) -> Tensor:
        torch.set_rng_state(state)
        total = sum(t.sum() for t in fit(d).values())
        return torch.autograd.grad(total, d, create_graph=create_graph)[0]

    torch.testing.assert_close(derivative(True).detach(), derivative(False))
    first = derivative(True)
    before = torch.get_rng_state()
    (second,) = torch.autograd.grad(first, d)
    assert second.isfinite()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(before, state)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_only_what_requires_a_gradient_is_differentiated() -> None:
    fit = DECORATED["argmin-cg"]
    decay = DECAY.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fit(decay, X)["b"], decay)
    assert grad.shape == decay.shape
    unused = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    ignoring = hg.argmin(lambda w, h: ((w - h[0]) ** 2).sum())(lambda h: h[0] * 1.0)
    used = torch.ones(2, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(ignoring((used, unused)).sum(), (used, unused))
    torch.testing.assert_close(grads[0], torch.ones(2, dtype=torch.float64))
    assert torch.equal(grads[1], torch.zeros(2, dtype=torch.float64))


def test_float32_agrees_with_float64() -> None:
    logistic = lambda w, d, x: F.softplus(x @ w).mean() + 0.5 * (d.exp() * w**2).sum()  # noqa: E731

    def fit(d: Tensor, x: Tensor) -> Tensor:
        w = torch.zeros(4, dtype=d.dtype)
        for _ in range(10):
            H = torch.func.hessian(logistic)(w, d, x)
            w = w - torch.linalg.solve(H, torch.func.grad(logistic)(w, d, x))
        return w

    grads = []
    for dtype in (torch.float64, torch.float32):
        d = DECAY.to(dtype).requires_grad_()
        differentiable = hg.argmin(logistic, solver=hg.CG(rtol=1e-6))(fit)
        grads.append(torch.autograd.grad(differentiable(d, X.to(dtype)).sum(), d)[0])
    torch.testing.assert_close(grads[1].double(), grads[0], rtol=1e-4, atol=1e-6)
