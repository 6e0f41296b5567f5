"""Modules in the place of trees: each call gives what it gives for the dictionary of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import hypergrad as hg

X = torch.linspace(-1.0, 1.0, 60, dtype=torch.float64).reshape(20, 3).sin()
Y = X.sum(1).tanh()
PHI = torch.tensor([-2.0, -1.0], dtype=torch.float64)


class Network(nn.Module):
    """Batch norm, dropout and, if asked, activation checkpointing."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(5, 1)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return self.head(checkpoint(self.first, x, use_reentrant=False))[:, 0]
        return self.head(self.first(x))[:, 0]


def network(**options: Any) -> Network:
    torch.manual_seed(0)
    return Network(**options).double()


def f(net: nn.Module, phi: Tensor, rows: Any = slice(None)) -> Tensor:
    decay = torch.stack([p.square().sum() for p in net.parameters()]).sum()
    return (net(X[rows]) - Y[rows]).square().mean() + phi.exp().sum() * decay


def g(net: nn.Module, phi: Tensor, rows: Any = slice(None)) -> Tensor:
    return (net(X[rows]) - 0.5 * Y[rows]).square().mean()


def on_dictionaries(model: Network) -> tuple[Any, Any]:
    """f and g as they are written without modules."""

    def called(params: Any, rows: Any) -> Tensor:
        return functional_call(model, params, (X[rows],))

    def inner(params: Any, phi: Tensor, rows: Any = slice(None)) -> Tensor:
        decay = torch.stack([p.square().sum() for p in params.values()]).sum()
        return (called(params, rows) - Y[rows]).square().mean() + phi.exp().sum() * decay

    def outer(params: Any, phi: Tensor, rows: Any = slice(None)) -> Tensor:
        return (called(params, rows) - 0.5 * Y[rows]).square().mean()

    return inner, outer


BATCHES = [slice(0, 10), slice(10, 20)]
METHODS: dict[str, Any] = {
    "reverse": hg.Implicit(hg.CG(rtol=1e-10), damping=5.0),
    "forward": hg.Implicit(hg.CG(rtol=1e-10), damping=5.0, mode="forward"),
    "compiled": hg.Implicit(hg.CG(rtol=1e-10), damping=5.0, mode="compiled"),
    "a bound": hg.Implicit(hg.Dense(), damping=5.0, mu="auto"),
    "unrolled": hg.Unrolled(hg.optimizers.Adam(lr=0.01), steps=3),
    "unrolled, batches": hg.Unrolled(hg.optimizers.SGD(lr=0.1), steps=BATCHES, memory="graph"),
    "unrolled, forward": hg.Unrolled(hg.optimizers.SGD(lr=0.1), steps=2, memory="forward"),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_module_gives_what_its_dictionary_gives(name: str, checkpointed: bool) -> None:
    model = network(checkpointed=checkpointed)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    steps = getattr(METHODS[name], "steps", None)
    found = []
    for inner, outer, params in (
        (f, g, model),
        (*on_dictionaries(model), {k: p.detach() for k, p in model.named_parameters()}),
    ):
        torch.manual_seed(1)
        found.append(
            hg.hypergradient(inner, outer, params, PHI, method=METHODS[name], verify="always")
        )
        if steps is not None:
            model.load_state_dict(before)
    assert torch.equal(found[0].grads, found[1].grads)
    assert found[0].grads.abs().min() > 0.0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", [hg.Averaged, hg.Sampled])
def test_over_mini_batches(kind: Callable[..., Any]) -> None:
    model = network().eval()
    solver = hg.StochasticNeumann(terms=3, step=0.05) if kind is hg.Sampled else hg.CG(rtol=1e-10)
    method = hg.Implicit(solver, damping=5.0)
    params = {k: p.detach() for k, p in model.named_parameters()}
    grads = []
    for inner, outer, given in ((f, g, model), (*on_dictionaries(model), params)):
        torch.manual_seed(1)
        objective = kind(inner, BATCHES)
        grads.append(hg.hypergradient(objective, outer, given, PHI, method=method).grads)
    assert torch.equal(*grads)


def test_both_levels_may_be_modules_and_the_gradients_have_their_names() -> None:
    model, weigh = network().eval(), nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    weigh.double()

    def inner(net: nn.Module, weigh: nn.Module) -> Tensor:
        losses = (net(X) - Y).square()
        weights = weigh(losses.detach()[:, None]).sigmoid()[:, 0]
        decay = torch.stack([p.square().sum() for p in net.parameters()]).sum()
        return (weights * losses).mean() + 0.1 * decay

    result = hg.hypergradient(
        inner, g, model, weigh, method=hg.Implicit(damping=5.0), verify="never"
    )
    assert result.grads.keys() == dict(weigh.named_parameters()).keys()
    with torch.no_grad():
        for name, p in weigh.named_parameters():
            assert result.grads[name].shape == p.shape
    assert result.grads["2.weight"].norm() > 0.0


def test_a_curvature_of_the_module() -> None:
    model = network().eval()

    def curvature(net: nn.Module, phi: Tensor) -> hg.operators.GaussNewton:
        return hg.operators.GaussNewton(
            lambda net, phi: net(X), lambda z, phi: (z - Y).square().mean(), net, phi,
            regulariser=lambda net, phi: phi.exp().sum()
            * torch.stack([p.square().sum() for p in net.parameters()]).sum(),
        )  # fmt: skip

    found = hg.hypergradient(f, g, model, PHI, method=hg.Implicit(hg.Dense(), 0.0, curvature))
    operator = curvature(model, PHI)
    assert operator.like.keys() == dict(model.named_parameters()).keys()
    params = {k: p.detach() for k, p in model.named_parameters()}
    inner, outer = on_dictionaries(model)

    def of_dictionary(params: Any, phi: Tensor) -> hg.operators.GaussNewton:
        return hg.operators.GaussNewton(
            lambda params, phi: functional_call(model, params, (X,)),
            lambda z, phi: (z - Y).square().mean(), params, phi,
            regulariser=lambda params, phi: phi.exp().sum()
            * torch.stack([p.square().sum() for p in params.values()]).sum(),
        )  # fmt: skip

    assert torch.equal(operator.dense(), of_dictionary(params, PHI).dense())
    method = hg.Implicit(hg.Dense(), 0.0, of_dictionary)
    expected = hg.hypergradient(inner, outer, params, PHI, method=method)
    assert torch.equal(found.grads, expected.grads)
    assert found.grads.norm() > 0.0


def test_unroll_trains_the_module_elsewhere() -> None:
    model = network()
    kept = copy.deepcopy(model.state_dict())
    phi = PHI.clone().requires_grad_()
    theta = hg.unroll(f, hg.optimizers.SGD(lr=0.1), model, phi, BATCHES)
    functional_call(model, theta, (X,)).sum().backward()
    assert phi.grad is not None
    assert phi.grad.abs().min() > 0.0
    for name, p in model.named_parameters():
        assert torch.equal(p, kept[name])


def test_another_module_in_an_objective_is_left_alone() -> None:
    """One that is neither θ nor φ, with buffers that move."""
    model, other = network(), nn.BatchNorm1d(3).double()
    before = {key: value.clone() for key, value in other.state_dict().items()}

    def inner(net: nn.Module, phi: Tensor) -> Tensor:
        decay = torch.stack([p.square().sum() for p in net.parameters()]).sum()
        return (net(other(X)) - Y).square().mean() + phi.exp().sum() * decay

    hg.hypergradient(inner, g, model, PHI, method=hg.Implicit(damping=5.0), verify="always")
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_a_mode_that_one_objective_sets_is_not_that_of_the_other() -> None:
    model = network()

    def validates(net: nn.Module, phi: Tensor) -> Tensor:
        net.eval()
        return g(net, phi)

    inner, outer = on_dictionaries(model)
    params = {k: p.detach() for k, p in model.named_parameters()}

    def trains(params: Any, phi: Tensor) -> Tensor:
        model.train()
        return inner(params, phi)

    def evaluates(params: Any, phi: Tensor) -> Tensor:
        model.eval()
        return outer(params, phi)

    found = []
    for case in ((f, validates, model), (trains, evaluates, params)):
        torch.manual_seed(1)
        with pytest.warns(hg.HypergradWarning, match="outer reads the buffer"):
            result = hg.hypergradient(
                *case, PHI, method=hg.Implicit(hg.Dense(), damping=5.0), verify="always"
            )
        found.append(result.grads)
        assert model.training is (case[0] is f)
        model.train()
    assert torch.equal(*found)


def test_the_module_is_itself_and_may_be_checkpointed_as_a_whole() -> None:
    model = network().eval()
    sequential = nn.Sequential(model.first, model.head)

    def inner(net: nn.Sequential, phi: Tensor) -> Tensor:
        assert isinstance(net, nn.Sequential)
        assert len([*net]) == len(net) == 2
        outputs = checkpoint(net, X, use_reentrant=False)[:, 0]
        decay = torch.stack([p.square().sum() for p in net.parameters()]).sum()
        return (outputs - Y).square().mean() + phi.exp().sum() * decay

    def plain(net: nn.Sequential, phi: Tensor) -> Tensor:
        decay = torch.stack([p.square().sum() for p in net.parameters()]).sum()
        return (net(X)[:, 0] - Y).square().mean() + phi.exp().sum() * decay

    def outer(net: nn.Sequential, phi: Tensor) -> Tensor:
        return (net[1](net[0](X))[:, 0] - 0.5 * Y).square().mean()

    for method in METHODS.values():
        if isinstance(method, hg.Unrolled) and not isinstance(method.steps, int):
            continue
        if isinstance(method, hg.Implicit) and method.mode == "compiled":
            continue
        grads = [
            hg.hypergradient(objective, outer, sequential, PHI, method=method).grads
            for objective in (inner, plain)
        ]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_modules_that_share_parameters_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="hparams must be apart from params"):
        hg.hypergradient(f, g, model, model.head)


def test_a_problem_on_modules_is_verified_once() -> None:
    model, statuses = network().eval(), []
    for _ in range(2):
        method = hg.Implicit(damping=5.0)
        statuses.append(hg.hypergradient(f, g, model, PHI, method=method).verification)
    assert statuses[0] is not None
    assert statuses[1] is None


def test_check_takes_a_module() -> None:
    model = network().eval()
    report = hg.check(f, g, model, PHI)
    assert report.size == sum(p.numel() for p in model.parameters())
    assert report.verification.status is hg.Verdict.PASSED


def test_the_loop_calls_the_objectives_with_the_modules_themselves() -> None:
    model = network(checkpointed=True)
    phi = PHI.clone()
    seen: set[int] = set()

    def inner(net: nn.Module, phi: Tensor, rows: Any) -> Tensor:
        seen.add(id(net))
        return f(net, phi, rows)

    solver = hg.BilevelSolver(
        hg.Level(inner, model, torch.optim.SGD(model.parameters(), lr=0.1), BATCHES),
        hg.Level(g, phi, torch.optim.Adam([phi], lr=0.1), [slice(None)]),
        method=hg.Implicit(hg.CG(rtol=1e-3), damping=5.0),
        inner_steps=3,
        outer_steps=3,
        callbacks=[hg.bilevel.Evaluation(g, [slice(None)])],
    )
    history = solver.run()
    assert seen == {id(model)}
    assert min(history["hypergradient_norm"]) > 0.0
    assert all(torch.isfinite(torch.tensor(history["test/loss"])))
