"""Betty: two levels in an engine; the hypergradient is what the upper one gets as its gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem, IterativeProblem
from torch import Tensor
from torch.nn import functional as F

from peers.adapters import Done, NoSuchMethod, Vector, plain_optimizer
from peers.cleaning import INNER_LR, Cleaning, Watch, weighted
from peers.problems import Problem, penalty

DISTRIBUTION = "betty-ml"


class Outer(ImplicitProblem):  # type: ignore[misc]
    """g."""

    seen: Tensor

    def training_step(self, batch: Any) -> Tensor:
        """Its loss."""
        return F.cross_entropy(self.inner(batch[0]), batch[1])

    def grad_callback(self) -> None:
        """Keep the hypergradient."""
        self.seen = self.module.value.grad.clone()


class Inner(ImplicitProblem):  # type: ignore[misc]
    """f."""

    def training_step(self, batch: Any) -> Tensor:
        """Its loss."""
        data = F.cross_entropy(self.module(batch[0]), batch[1])
        return data + penalty(self.trainable_parameters(), self.outer())


class Steps(IterativeProblem):  # type: ignore[misc]
    """f, with steps that can be differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        """The network at the parameters that carry the graph."""
        output: Tensor = self.fmodule(self.params, self.buffers, x)
        return output

    def training_step(self, batch: Any) -> Tensor:
        """Its loss."""
        data = F.cross_entropy(self(batch[0]), batch[1])
        return data + penalty(self.params, self.outer())


def implicit(problem: Problem, method: str, **settings: Any) -> Callable[[], Tensor]:
    """``type="cg"`` or ``"neumann"``: a step of the upper level, without one of the lower."""
    if method == "cg":
        config = {"type": "cg", "cg_iterations": settings["iterations"], "cg_alpha": 1.0}
    elif method == "neumann":
        config = {
            "type": "neumann",
            "neumann_iterations": settings["iterations"],
            "neumann_alpha": settings["alpha"],
        }
    else:
        raise NoSuchMethod
    network = problem.network()
    inner = Inner(
        "inner", Config(unroll_steps=1, **config), network,
        torch.optim.SGD(network.parameters(), lr=0.0), None, [problem.train],
    )  # fmt: skip
    outer = _engine(problem, inner, first_order=True)
    inner.cur_batch = problem.train

    def run() -> Tensor:
        outer.one_step_descent()
        return outer.seen

    return run


def unrolled(problem: Problem, optimizer: str, steps: int, lr: float) -> Callable[[], Tensor]:
    """``IterativeProblem``; an engine for each run, since it goes on from where it ended."""

    def run() -> Tensor:
        network = problem.network()
        plain = plain_optimizer(optimizer, network.parameters(), lr)
        inner = Steps("inner", Config(unroll_steps=steps), network, plain, None, [problem.train])
        outer = _engine(problem, inner, first_order=False, steps=steps)
        outer.engine.run()
        return outer.seen

    run()
    return run


def _engine(problem: Problem, inner: Any, first_order: bool, steps: int = 1) -> Any:
    upper = Vector(problem.hparams)
    outer: Any = Outer(
        "outer", Config(log_step=-1, retain_graph=True, first_order=first_order), upper,
        torch.optim.SGD(upper.parameters(), lr=0.0), None, [problem.validation],
    )  # fmt: skip
    outer.engine = Engine(
        [outer, inner],
        EngineConfig(train_iters=steps, logger_type="none"),
        {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    return outer


class CleaningOuter(Outer):
    """g, until the run is over."""

    watch: Watch

    def grad_callback(self) -> None:
        """Nothing to keep."""

    def param_callback(self) -> None:
        """Look whether the run is over."""
        if self.watch.look(self.inner.trainable_parameters()):
            raise Done


class CleaningInner(Inner):
    """f."""

    def training_step(self, batch: Any) -> Tensor:
        """Its loss."""
        return weighted(self.module(batch[0]), batch[1], self.outer(), self.trainable_parameters())


def cleaning(
    data: Cleaning, method: str, lr: float, inner_steps: int, iterations: int = 1
) -> Callable[[], dict[str, Any]]:
    """An engine's ``run``."""
    configs: dict[str, dict[str, Any]] = {
        "cg": {"type": "cg", "cg_iterations": iterations, "cg_alpha": 1.0},
        "neumann": {
            "type": "neumann", "neumann_iterations": iterations, "neumann_alpha": INNER_LR,
        },
        "darts": {"type": "darts"},
    }  # fmt: skip
    if method not in configs:
        raise NoSuchMethod

    def run() -> dict[str, Any]:
        network, upper = data.network(), Vector(data.hparams())
        outer = CleaningOuter(
            "outer", Config(log_step=-1, retain_graph=True, first_order=True), upper,
            torch.optim.Adam(upper.parameters(), lr=lr), None, [data.validation],
        )  # fmt: skip
        outer.watch = Watch(data)
        inner = CleaningInner(
            "inner", Config(unroll_steps=inner_steps, **configs[method]), network,
            torch.optim.SGD(network.parameters(), lr=INNER_LR, momentum=0.9), None, [data.train],
        )  # fmt: skip
        engine = Engine(
            [outer, inner],
            EngineConfig(train_iters=10_000 * inner_steps, logger_type="none"),
            {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
        )
        with contextlib.suppress(Done):
            engine.run()
        return outer.watch.result()

    return run
