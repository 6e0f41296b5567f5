"""What users pass in place of what is meant: right all the same, or told in their words."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from problems import flat_hypergradient
from torch import Tensor, nn
from torch.func import functional_call

import hypergrad as hg


def f(w: Tensor, p: Tensor) -> Tensor:
    return 0.5 * (w - p).square().sum() + 0.1 * w.square().sum()


def g(w: Tensor, p: Tensor) -> Tensor:
    return w.square().sum()


W, P = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5])


class Output(dict):  # type: ignore[type-arg]
    """As the outputs of Hugging Face's models: a mapping with attributes."""

    @property
    def loss(self) -> Any:
        return self["loss"]


WORDS: dict[str, tuple[dict[str, Any], str]] = {
    "named-parameters": (
        {"params": nn.Linear(2, 2).named_parameters()},
        "params must be a tensor, got generator; pass dict(model.named_parameters())",
    ),
    "parameters": (
        {"hparams": nn.Linear(2, 2).parameters()},
        "hparams must be a tensor, got generator; pass tuple(...) of it, such as "
        "tuple(model.parameters())",
    ),
    "list-of-pairs": (
        {"params": list(nn.Linear(2, 2).named_parameters())},
        "params[0][0] must be a tensor, got str; of names with their tensors pass dict(...)",
    ),
    "numpy": (
        {"hparams": {"decay": np.ones(2)}},
        "hparams['decay'] must be a tensor, got ndarray; pass torch.as_tensor(...) of it",
    ),
    "numpy-scalar": ({"hparams": np.float32(0.5)}, "pass torch.as_tensor("),
    "float": ({"hparams": 0.5}, "hparams must be a tensor, got float; pass torch.as_tensor(0.5)"),
    "int": ({"hparams": [3]}, "hparams[0] must be a tensor, got int; pass torch.as_tensor(3.0)"),
    "a-class-of-tensors": ({"params": nn.Linear}, "params must be a tensor, got the class Linear"),
    "complex": (
        {"hparams": {"z": torch.ones(2, dtype=torch.complex64)}},
        "hparams['z'] must be a floating-point tensor, got dtype torch.complex64",
    ),
    "solver": ({"solver": hg.CG}, "got the class CG; make one: hg.CG(...)"),
    "method": ({"method": hg.Unrolled}, "got the class Unrolled; make one: hg.Unrolled(...)"),
    "unrolled-optimiser": (
        {"method": hg.Unrolled(hg.optimizers.SGD, steps=2)},
        "got the class SGD; make one: hg.optimizers.SGD(...)",
    ),
    "output": (
        {"inner": lambda w, p: Output(loss=f(w, p))},
        "inner must return a scalar tensor, got Output; return its .loss",
    ),
    "namespace": (
        {"outer": lambda w, p: SimpleNamespace(loss=g(w, p))},
        "outer must return a scalar tensor, got SimpleNamespace; return its .loss",
    ),
    "dict": (
        {"outer": lambda w, p: {"loss": g(w, p)}},
        "outer must return a scalar tensor, got dict; return its ['loss']",
    ),
    "tuple": (
        {"inner": lambda w, p: (f(w, p), w)},
        "inner must return a scalar tensor, got tuple; return the tensor alone",
    ),
    "item": (
        {"outer": lambda w, p: g(w, p).item()},
        "outer must return a scalar tensor, got float; keep it a tensor, without .item()",
    ),
}


@pytest.mark.parametrize("name", WORDS)
def test_what_is_meant_is_told(name: str) -> None:
    changes, words = WORDS[name]
    arguments: dict[str, Any] = {"inner": f, "outer": g, "params": W, "hparams": P} | changes
    with pytest.raises(TypeError, match=re.escape(words)):
        flat_hypergradient(**arguments)


def loop(w: Tensor, c: Tensor, **options: Any) -> hg.BilevelSolver:
    optimizers: dict[str, Any] = {
        "inner_optimizer": torch.optim.SGD([w], 0.1),
        "outer_optimizer": torch.optim.SGD([c], 0.1),
    }
    return hg.BilevelSolver(
        lambda w, c, _: f(w, c),
        lambda w, c, _: g(w, c),
        w,
        c,
        outer_steps=2,
        **optimizers | options,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": hg.CG}, "got the class CG; make one: hg.CG(...)"),
        (
            {"method": hg.single_loop.SOBA},
            "got the class SOBA; make one: hg.single_loop.SOBA(...)",
        ),
        (
            {"inner_optimizer": torch.optim.SGD},
            "got the class SGD; make one: torch.optim.SGD(...)",
        ),
        (
            {"inner_optimizer": hg.optimizers.Adam, "method": hg.Unrolled()},
            "got the class Adam; make one: hg.optimizers.Adam(...)",
        ),
        (
            {"callbacks": [hg.bilevel.ProgressBar]},
            "got the class ProgressBar; make one: hg.bilevel.ProgressBar(...)",
        ),
        (
            {"inner_optimizer": torch.optim.SparseAdam([W])},
            "inner.optimizer must take dense gradients",
        ),
    ],
)
def test_classes_in_a_loop_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        loop(W.clone(), P.clone(), **options)


class Accelerated(torch.optim.Optimizer):
    """As ``AcceleratedOptimizer``: an optimiser that steps when its library says so."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise AssertionError("no step of the library's own")


class Fabric:
    """As ``_FabricOptimizer``, which is no optimiser of ``torch.optim``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


@pytest.mark.parametrize("wrap", [Accelerated, Fabric])
@pytest.mark.parametrize("method", [hg.CG(), hg.Unrolled(), hg.single_loop.SOBA(1.0)])
@pytest.mark.parametrize("scheduled_first", [True, False])
def test_prepared_optimisers_and_schedulers_are_taken(
    wrap: Any, method: Any, scheduled_first: bool
) -> None:
    def run(prepare: bool) -> tuple[Tensor, Tensor]:
        w, c = W.clone(), P.clone()
        inner, outer = torch.optim.SGD([w], 0.1), torch.optim.SGD([c], 0.1)
        make = torch.optim.lr_scheduler.ExponentialLR
        if not prepare:
            solver = loop(
                w, c, inner_optimizer=inner, outer_optimizer=outer, method=method,
                inner_scheduler=make(inner, 0.5),
            )  # fmt: skip
        else:
            wrapped = wrap(inner)
            of_wrapped = wrap is Accelerated and not scheduled_first
            schedule = make(wrapped if of_wrapped else inner, 0.5)
            prepared = SimpleNamespace(scheduler=schedule, optimizers=[wrapped])
            solver = loop(
                w, c, inner_optimizer=wrapped, outer_optimizer=wrap(outer), method=method,
                inner_scheduler=prepared,
            )  # fmt: skip
        solver.run()
        assert solver.params is w
        assert inner.param_groups[0]["params"][0] is w
        return w, c

    torch.testing.assert_close(run(True), run(False))


def embedded(sparse: bool) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    rows, t = torch.randint(0, 9, (40, 3)), torch.randn(40)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 1))

    def outer(p: Any, c: Tensor) -> Tensor:
        return (functional_call(model, p, (rows,))[:, 0] - t).square().mean()

    def inner(p: Any, c: Tensor) -> Tensor:
        return outer(p, c) + c.exp() * sum(v.square().sum() for v in p.values())

    return model.double(), inner, outer


SPARSE: dict[str, dict[str, Any]] = {
    "auto": {"damping": 1.0},
    "finite-difference": {"damping": 1.0, "mode": "finite-difference"},
    "recompute": {"method": hg.Unrolled(hg.optimizers.SGD(lr=0.1), steps=4)},
    "forward": {"method": hg.Unrolled(hg.optimizers.SGD(lr=0.1), steps=4, memory="forward")},
}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.filterwarnings("ignore::hypergrad.DoubleBackwardWarning")
def test_sparse_gradients_of_embeddings_are_right(name: str) -> None:
    found = []
    for sparse in (False, True):
        model, inner, outer = embedded(sparse)
        params, phi = dict(model.named_parameters()), torch.tensor(-1.0, dtype=torch.float64)
        found.append(flat_hypergradient(inner, outer, params, phi, **SPARSE[name]).grads)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", ["reverse", "forward", "compiled"])
def test_sparse_gradients_are_told_where_they_cannot_be_right(mode: Any) -> None:
    model, inner, outer = embedded(True)
    params, phi = dict(model.named_parameters()), torch.tensor(-1.0, dtype=torch.float64)
    errors = hg.DoubleBackwardError, hg.ForwardModeError, hg.CompilationError
    with pytest.raises(errors, match=r"nn\.Embedding\(sparse=True\)"):
        hg.hypergradient(inner, outer, params, phi, method=hg.Implicit(mode=mode))


@pytest.mark.filterwarnings("ignore::hypergrad.DoubleBackwardWarning")
def test_sparse_gradients_in_argmin_and_in_training_are_right() -> None:
    slopes, trained = [], []
    for sparse in (False, True):
        model, inner, outer = embedded(sparse)
        params = {name: p.detach().clone() for name, p in model.named_parameters()}
        c = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
        fit = hg.argmin(inner, damping=1.0)(lambda c, found=params: found)
        outer(fit(c), c).backward()
        slopes.append(c.grad)
        c = torch.tensor(-1.0, dtype=torch.float64)
        hg.BilevelSolver(
            hg.Level(
                lambda p, c, _, f=inner: f(p, c),
                dict(model.named_parameters()),
                torch.optim.Adam(model.parameters()),
                clip=1.0,
            ),
            hg.Level(lambda p, c, _, g=outer: g(p, c), c, torch.optim.Adam([c])),
            inner_steps=3,
            outer_steps=2,
        ).run()
        trained.append(model[0].weight.detach())
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-9, atol=1e-12)


X = torch.randn(8, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def distances(w: Tensor) -> Tensor:
    return torch.cdist(X * w, X * w)


def by_hand(w: Tensor) -> Tensor:
    return ((X * w)[:, None] - X * w).norm(dim=-1)


@pytest.mark.parametrize("distance", [distances, by_hand])
def test_distances_at_zero_go_on_with_finite_differences(distance: Any) -> None:
    def inner(w: Tensor, p: Tensor) -> Tensor:
        K = torch.exp(-distance(w).square() / 2) + p.exp() * torch.eye(8, dtype=torch.float64)
        return K.logdet() + K.inverse().sum() + w.square().sum()

    def squares(w: Tensor, p: Tensor) -> Tensor:
        K = torch.exp(-((X * w)[:, None] - X * w).square().sum(-1) / 2)
        K = K + p.exp() * torch.eye(8, dtype=torch.float64)
        return K.logdet() + K.inverse().sum() + w.square().sum()

    w, p = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), torch.tensor(0.0).double()
    expected = hg.hypergradient(squares, g, w, p, method=hg.Implicit(damping=5.0)).grads
    with pytest.warns(hg.DoubleBackwardWarning, match="finite differences") as seen:
        found = hg.hypergradient(inner, g, w, p, method=hg.Implicit(damping=5.0))
    assert len(seen) == 1
    torch.testing.assert_close(found.grads, expected, rtol=1e-5, atol=1e-8)
    if distance is by_hand:
        with pytest.warns(hg.LinearSolveWarning, match="or use mode='finite-difference'"):
            hg.hypergradient(inner, g, w, p, method=hg.Implicit(damping=5.0, mode="reverse"))


def test_norms_at_zero_are_multiplied_in_blocks_too() -> None:
    def inner(w: Tensor, p: Tensor) -> Tensor:
        return (w - p).square().sum() + (0.0 * w).norm()

    H = hg.operators.hessian(inner, W, P)
    with pytest.warns(hg.DoubleBackwardWarning, match="second derivative of inner is NaN"):
        products = H.matmat(torch.eye(2))
    torch.testing.assert_close(products, 2 * torch.eye(2), rtol=1e-3, atol=1e-3)
