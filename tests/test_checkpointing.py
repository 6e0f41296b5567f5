"""Activation checkpointing inside objectives: the answer is that without it, or a refusal."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import flat_hypergradient
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import hypergrad as hg
from hypergrad import operators

# As Hugging Face does, which keeps the function itself.
CAPTURED = functools.partial(checkpoint, use_reentrant=False)
ROWS, WIDTH = 12, 4


class Layers(nn.Module):
    """What all networks here share: they recompute if asked."""

    recompute = False

    def call(self, function: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        """``function(*args)``."""
        return CAPTURED(function, *args, **options) if self.recompute else function(*args)


class Block(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 6), nn.Linear(6, 1)

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.block, x)[:, 0]


class Nested(Block):
    def inner(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.call(self.inner, x))


class Sequential(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)[:, 0]
        return self.layers(x)[:, 0]


class Dropped(Block):
    """Its mask is drawn anew in the second run, unless somebody sees to it."""

    def block(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(self.first(x).tanh(), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        options = {"preserve_rng_state": False} if self.recompute else {}
        return self.call(self.block, x, **options)[:, 0]


class Attention(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(1, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 1)

    def block(self, x: Tensor) -> Tensor:
        return x + self.attend(x, x, x, need_weights=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self.block, self.embed(x[..., None]))).mean((1, 2))


class Normed(Layers):
    """Running statistics, which training moves on and evaluation reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, 6), nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 1)

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.block, x)[:, 0]


class Tied(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.call(lambda x: self.second(self.first(x).tanh()), x).sum(1)


NETWORKS = [Block, Nested, Sequential, Dropped, Attention, Normed, Tied]


class Problem:
    """Ridge regression by a network, at other parameters than the module's own."""

    def __init__(self, kind: type[Layers], recompute: bool) -> None:
        torch.manual_seed(0)
        self.model = kind().double()
        for module in self.model.modules():
            module.recompute = recompute  # type: ignore[assignment]
        self.x, self.xv = torch.randn(2, ROWS, WIDTH, dtype=torch.float64).unbind()
        self.y, self.yv = torch.randn(2, ROWS, dtype=torch.float64).unbind()
        named = self.model.named_parameters()
        self.theta = {k: v.detach() + 0.1 * torch.randn_like(v) for k, v in named}
        self.phi = torch.tensor(-1.0, dtype=torch.float64)

    def outputs(self, params: Any, x: Tensor) -> Tensor:
        return functional_call(self.model, params, (x,))

    def f(self, params: Any, phi: Tensor, rows: Any = slice(None)) -> Tensor:
        penalty = sum(v.square().sum() for v in params.values())
        misfit = (self.outputs(params, self.x[rows]) - self.y[rows]).square().mean()
        return misfit + phi.exp() * penalty

    def g(self, params: Any, phi: Tensor) -> Tensor:
        return (self.outputs(params, self.xv) - self.yv).square().mean()


def implicit(problem: Problem, **options: Any) -> Tensor:
    options = {"damping": 20.0, **options}
    f, g = problem.f, problem.g
    return flat_hypergradient(f, g, problem.theta, problem.phi, **options).grads


def unrolled(problem: Problem, **options: Any) -> Tensor:
    method = hg.Unrolled(hg.optimizers.SGD(lr=0.05, momentum=0.5), steps=4, **options)
    return hg.hypergradient(problem.f, problem.g, problem.theta, problem.phi, method=method).grads


def outside(problem: Problem, **options: Any) -> Tensor:
    """The graph outlives the call, and the module has moved on when it is differentiated."""
    phi = problem.phi.clone().requires_grad_()
    optimizer = hg.optimizers.SGD(lr=0.05)
    theta = hg.unroll(problem.f, optimizer, problem.theta, phi, 3, **options)
    value = sum(v.square().sum() for v in theta.values())
    problem.model.eval()
    with torch.no_grad():
        for tensor in (*problem.model.parameters(), *problem.model.buffers()):
            tensor.zero_()
    return torch.autograd.grad(value, phi)[0]


def argmin(problem: Problem) -> Tensor:
    phi = problem.phi.clone().requires_grad_()
    fit = hg.argmin(problem.f, damping=20.0)(lambda phi: problem.theta)
    return torch.autograd.grad(sum(v.square().sum() for v in fit(phi).values()), phi)[0]


def root(problem: Problem) -> Tensor:
    phi = problem.phi.clone().requires_grad_()

    def equation(params: Any, phi: Tensor) -> Any:
        scale = 1 + problem.outputs(params, problem.x).square().mean()
        return {k: scale * v + phi * v.detach().square() for k, v in params.items()}

    solve = hg.root(equation, solver=hg.GMRES())(lambda phi: problem.theta)
    return torch.autograd.grad(sum(v.square().sum() for v in solve(phi).values()), phi)[0]


def gauss_newton(problem: Problem) -> Tensor:
    def curvature(params: Any, phi: Any) -> Any:
        x, y = problem.x, problem.y
        return operators.GaussNewton(
            lambda w, _: problem.outputs(w, x),
            lambda z, _: (z - y).square().mean(),
            params,
            phi,
        )

    return implicit(problem, curvature=curvature)


def averaged(problem: Problem) -> Tensor:
    mean = hg.Averaged(problem.f, [slice(0, 6), slice(6, 12)])
    return hg.hypergradient(
        mean, problem.g, problem.theta, problem.phi, method=hg.Implicit(damping=20.0)
    ).grads


def loop(problem: Problem, method: Any) -> Tensor:
    """θ is not the module's own."""
    steps = 1 if isinstance(method, hg.single_loop.SingleLoop) else 3
    theta = {k: v.clone().requires_grad_() for k, v in problem.theta.items()}
    phi = problem.phi.clone().requires_grad_()
    solver = hg.BilevelSolver(
        hg.Level(lambda w, h, _: problem.f(w, h), theta, torch.optim.SGD(theta.values(), 0.05)),
        hg.Level(lambda w, h, _: problem.g(w, h), phi, torch.optim.SGD([phi], 0.1)),
        method=method,
        inner_steps=steps,
        outer_steps=2,
        seed=0,
    )
    solver.run()
    return torch.cat([phi.detach().reshape(1), theta["second.bias"].detach().reshape(-1)])


ROUTES: dict[str, Callable[[Problem], Tensor]] = {
    "reverse": functools.partial(implicit, mode="reverse"),
    "forward": functools.partial(implicit, mode="forward"),
    "finite differences": functools.partial(implicit, mode="finite-difference"),
    "a block of vectors": functools.partial(implicit, solver=hg.Nystrom(rank=3)),
    "recompute": functools.partial(unrolled, memory="recompute"),
    "graph": functools.partial(unrolled, memory="graph"),
    "checkpoint": functools.partial(unrolled, memory="checkpoint"),
    "tangents": functools.partial(unrolled, memory="forward"),
    "recompute, outside": functools.partial(outside, memory="recompute"),
    "graph, outside": functools.partial(outside, memory="graph"),
    "argmin": argmin,
    "root": root,
    "gauss_newton": gauss_newton,
    "averaged": averaged,
    "compiled": functools.partial(implicit, mode="compiled"),
}


def same(route: Callable[[Problem], Tensor], kind: type[Layers]) -> None:
    answers = []
    for recompute in (False, True):
        problem = Problem(kind, recompute)
        torch.manual_seed(1)
        answers.append(route(problem))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-6, atol=1e-9)


# Every way to a derivative for one network, and some of them for the others.
PAIRS = [(route, Block) for route in ROUTES] + [
    (route, kind)
    for kind in NETWORKS[1:]
    for route in ("reverse", "forward", "finite differences", "graph, outside")
]


@pytest.mark.parametrize(("route", "kind"), PAIRS)
def test_a_checkpointed_network_gives_the_answer_of_the_plain_one(
    route: str, kind: type[Layers]
) -> None:
    same(ROUTES[route], kind)


METHODS = [hg.Unrolled(), hg.CG(maxiter=3, rtol=None), hg.single_loop.F2SA()]


@pytest.mark.parametrize("method", METHODS)
def test_a_loop_trains_a_checkpointed_network_as_the_plain_one(method: Any) -> None:
    same(functools.partial(loop, method=method), Block)


def test_each_call_of_a_module_recomputes_with_its_own_parameters() -> None:
    def both(problem: Problem) -> Tensor:
        def f(params: Any, phi: Tensor) -> Tensor:
            shifted = {k: v * phi.exp() for k, v in params.items()}
            apart = problem.outputs(params, problem.x) - problem.outputs(shifted, problem.x)
            return problem.f(params, phi) + apart.square().mean()

        return hg.hypergradient(
            f, problem.g, problem.theta, problem.phi, method=hg.Implicit(damping=20.0)
        ).grads

    same(both, Block)


def test_a_checkpointed_function_that_calls_a_module_or_swaps_by_hand_stays_right() -> None:
    def closure(problem: Problem) -> Tensor:
        model = problem.model

        def outputs(params: Any, x: Tensor) -> Tensor:
            if not model.recompute:
                return functional_call(model, params, (x,))
            return CAPTURED(lambda x: functional_call(model, params, (x,)), x)

        problem.outputs = outputs  # type: ignore[method-assign]
        return implicit(problem)

    def by_hand(problem: Problem) -> Tensor:
        model = problem.model

        def outputs(params: Any, x: Tensor) -> Tensor:
            own = dict(model.first._parameters), dict(model.second._parameters)
            for key, value in params.items():
                module, name = key.split(".")
                model.get_submodule(module)._parameters[name] = value
            try:
                return model.call(model.block, x)[:, 0]
            finally:
                model.first._parameters.update(own[0])
                model.second._parameters.update(own[1])

        problem.outputs = outputs  # type: ignore[method-assign]
        return implicit(problem)

    same(closure, Block)
    same(by_hand, Block)


def test_a_recomputation_is_under_the_autocast_of_the_first_run() -> None:
    def narrow(problem: Problem) -> Tensor:
        plain = problem.outputs
        problem.model.float()
        problem.theta = {k: v.float() for k, v in problem.theta.items()}

        def outputs(params: Any, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return plain(params, x.float()).double()

        problem.outputs = outputs  # type: ignore[method-assign]
        return implicit(problem, solver=hg.CG(rtol=None, maxiter=3), on_failure="ignore")

    same(narrow, Block)


def test_nothing_of_the_module_changes() -> None:
    problem = Problem(Normed, True)
    before = {k: (v, v.clone()) for k, v in problem.model.state_dict(keep_vars=True).items()}
    outside(Problem(Normed, True), memory="graph")
    implicit(problem)
    after = problem.model.state_dict(keep_vars=True)
    for key, (tensor, value) in before.items():
        assert after[key] is tensor
        assert torch.equal(tensor, value)
    assert problem.model.training


def test_threads_with_modules_of_their_own_do_not_meet() -> None:
    right = implicit(Problem(Block, False))
    problems = [Problem(Block, True) for _ in range(4)]
    found: list[Any] = [None] * 4

    def run(i: int) -> None:
        found[i] = [implicit(problems[i]) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answers in found:
        torch.testing.assert_close(answers, [right] * 3)


class Reentrant(Block):
    def forward(self, x: Tensor) -> Tensor:
        options = {"use_reentrant": True} if self.recompute else {}
        return checkpoint(self.block, x, **options)[:, 0] if options else self.block(x)[:, 0]


@pytest.mark.parametrize("route", ["reverse", "finite differences", "recompute", "argmin"])
def test_reentrant_checkpointing_is_refused_by_name(route: str) -> None:
    # Its penalty keeps the dependence on θ alive.
    with pytest.raises(ValueError, match="use_reentrant=False"):
        ROUTES[route](Problem(Reentrant, True))


def test_reentrant_checkpointing_is_refused_in_the_training_of_a_loop() -> None:
    with pytest.raises(ValueError, match="use_reentrant=False"):
        loop(Problem(Reentrant, True), hg.Unrolled())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_of_frozen_features_is_let_through() -> None:
    def frozen(problem: Problem) -> Tensor:
        features = nn.Linear(WIDTH, WIDTH, dtype=torch.float64).requires_grad_(False)
        nn.init.eye_(features.weight)
        plain = problem.outputs

        def outputs(params: Any, x: Tensor) -> Tensor:
            if problem.model.recompute:
                return plain(params, checkpoint(features, x, use_reentrant=True))
            return plain(params, features(x))

        problem.outputs = outputs  # type: ignore[method-assign]
        return implicit(problem)

    torch.manual_seed(0)
    same(frozen, Block)


class Debugged(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.block, x, **({"debug": True} if self.recompute else {}))[:, 0]


class Selective(Block):
    def forward(self, x: Tensor) -> Tensor:
        keep = functools.partial(
            create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]
        )
        return self.call(self.block, x, **({"context_fn": keep} if self.recompute else {}))[:, 0]


@pytest.mark.parametrize("kind", [Debugged, Selective])
def test_what_recomputes_only_once_serves_first_derivatives_and_is_refused_for_second(
    kind: type[Layers],
) -> None:
    same(ROUTES["finite differences"], kind)
    with pytest.raises(ValueError, match="context_fn"):
        implicit(Problem(kind, True))


def test_without_its_private_name_checkpointing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.utils.checkpoint, "_CheckpointFrame")
    problem = Problem(Block, True)

    def outputs(params: Any, x: Tensor) -> Tensor:
        run = lambda x: functional_call(problem.model, params, (x,))  # noqa: E731
        return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)

    problem.outputs = outputs  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"must not call torch\.utils\.checkpoint with torch"):
        implicit(problem)


def test_the_names_of_pytorch_are_as_before_after_failures_as_well() -> None:
    module = torch.utils.checkpoint
    before = module._CheckpointFrame, module.CheckpointFunction

    def broken(params: Any, phi: Tensor) -> Tensor:
        raise KeyError("mine")

    problem = Problem(Block, True)
    implicit(problem)
    with pytest.raises(KeyError):
        hg.hypergradient(broken, problem.g, problem.theta, problem.phi)
    assert (module._CheckpointFrame, module.CheckpointFunction) == before


def test_somebody_elses_replacement_made_meanwhile_stays() -> None:
    module, problem = torch.utils.checkpoint, Problem(Block, True)
    plain, counted = module._CheckpointFrame, []

    def wrapping(params: Any, phi: Tensor) -> Tensor:
        if module._CheckpointFrame not in counted:
            inside = module._CheckpointFrame

            def theirs(*args: Any) -> Any:
                return inside(*args)

            counted.append(theirs)
            module._CheckpointFrame = theirs
        return problem.f(params, phi)

    try:
        given = problem.g, problem.theta, problem.phi
        found = hg.hypergradient(wrapping, *given, method=hg.Implicit(damping=20.0)).grads
        assert module._CheckpointFrame is counted[-1]
        again = hg.hypergradient(wrapping, *given, method=hg.Implicit(damping=20.0)).grads
        assert len(counted) == 1 or module._CheckpointFrame is not plain
    finally:
        module._CheckpointFrame = plain
    right = implicit(Problem(Block, False))
    torch.testing.assert_close([found, again], [right, right])
