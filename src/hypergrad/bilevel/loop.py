"""The steps of the loop and its state, without those who listen and without files."""

from __future__ import annotations

import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from hypergrad import tree as tr
from hypergrad._saving import check_form, check_keys
from hypergrad.autodiff.modules import modes_put_back
from hypergrad.bilevel.batches import Stream
from hypergrad.bilevel.history import Record
from hypergrad.bilevel.methods.procedures import Procedure
from hypergrad.bilevel.problem import Problem
from hypergrad.bilevel.random_state import (
    check_method_state,
    check_random_states,
    method_parts,
    method_state,
    random_states,
    set_method_state,
    set_random_states,
)
from hypergrad.bilevel.steps import OuterStep, naming
from hypergrad.bilevel.variables import Variables
from hypergrad.errors import HypergradWarning, NonFiniteError, warn
from hypergrad.linsolve import Solution
from hypergrad.results import Hypergradient
from hypergrad.tree import Tree
from hypergrad.verification.dependence import told_by_the_caller
from hypergrad.verification.verification import Verify

Restart: TypeAlias = Literal["initial"] | Callable[[], Tree | None] | None
"""Where the inner problem starts in each outer step; ``None``: where the last one ended."""

# Outer steps between verifications of the derivatives.
_VERIFY_EVERY = 100


class Loop:
    """``θ`` by ``inner_steps`` of a procedure, then φ by one outer step, and so on.

    Args:
        problem: the problem.
        procedure: how θ moves, and where dg/dφ comes from.
        outer: how φ moves.
        method: what the procedure was made from, for the generators and sketches that it holds.
        inner_steps: per outer step.
        warmup_steps: before the first one.
        restart: see :class:`hypergrad.BilevelSolver`.
        restart_every: outer steps between restarts.
        verify: see :class:`hypergrad.BilevelSolver`.
        quiet: whether not to warn of outer parameters that no objective uses.

    Attributes:
        outer_step: how many outer steps were made.
    """

    def __init__(
        self,
        problem: Problem,
        procedure: Procedure,
        outer: OuterStep,
        method: Any,
        *,
        inner_steps: int,
        warmup_steps: int,
        restart: Restart,
        restart_every: int,
        quiet: bool,
        verify: Verify,
    ) -> None:
        self._problem = problem
        self._procedure = procedure
        self._outer = outer
        self._method = method
        self._inner_steps = inner_steps
        self._warmup_steps = warmup_steps
        self._restart = restart
        self._restart_every = restart_every
        self._initial = problem.params.state_dict() if restart == "initial" else None
        self._warned = quiet
        self._resumed = False
        self._verify = verify
        self.outer_step = 0

    @property
    def inner_step(self) -> int:
        """How many inner steps were made."""
        return self._procedure.count

    def warm_up(self, stopped: Callable[[], bool]) -> bool:
        """The inner steps before the first outer one, unless stopped; whether they are done."""
        while self.outer_step == 0 and self.inner_step < self._warmup_steps:
            if stopped():
                return False
            self.train(1)
        return True

    def train(self, steps: int) -> list[float]:
        """Inner steps alone; the loss before each."""
        return self._procedure.train(steps)

    def advance(self) -> Record:
        """One outer step.

        Raises:
            NonFiniteError: a loss, a gradient or a parameter is infinite or NaN.
            LoaderError: a loader raised.
        """
        began = time.perf_counter()
        problem = self._problem
        due = self._resumed or self.outer_step % _VERIFY_EVERY == 0
        problem.verify = "always" if due and self._verify == "once" else self._verify
        self._resumed = False
        begun = self.outer_step > 0 and self.outer_step % self._restart_every == 0
        if begun and self._restart is not None:
            self._restart_inner()
        streams = self._streams()
        with (
            naming(lambda: f"outer step {self.outer_step} ({'; '.join(map(str, streams))})"),
            told_by_the_caller(),
            modes_put_back(problem.params.module, problem.hparams.module),
        ):
            losses, estimate = self._procedure.advance(self._inner_steps)
            norm = self._outer.apply(estimate.grads, estimate.outer_value)
            for level in (problem.params, problem.hparams):
                if not tr.is_finite(level.tree):
                    raise NonFiniteError(f"{level.name} must stay finite, got an infinity or a NaN")
        self._warn_of_unused()
        self.outer_step += 1
        return self._record(losses, estimate, norm, time.perf_counter() - began)

    def identity(self) -> dict[str, Any]:
        """What must be the same in a loop that takes over the state of this one."""
        return {
            "params": self._problem.params.shapes(),
            "hparams": self._problem.hparams.shapes(),
            "method": [type(self._method).__name__, *method_parts(self._method)],
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on."""
        return {
            "outer_step": self.outer_step,
            "streams": [stream.state_dict() for stream in self._streams()],
            "parts": [part.state_dict() for part in self._parts()],
            "method": method_state(self._method),
            "random": random_states(self._problem.inner_stream.device),
        }

    def check_state(self, state: Any) -> None:
        """Raise ``ValueError`` unless ``state`` is whole and fits this loop; nothing is changed."""
        keys = ("outer_step", "streams", "parts", "method", "random")
        check_keys(state, keys, "the state of the loop")
        check_form(state["outer_step"], self.outer_step, "the outer step")
        for what, own in (("streams", self._streams()), ("parts", self._parts())):
            if not isinstance(state[what], list) or len(state[what]) != len(own):
                raise ValueError(f"the state of the loop must have {len(own)} {what}")
            for part, saved in zip(own, state[what], strict=True):
                part.check_state(saved)
        check_method_state(self._method, state["method"])
        check_random_states(state["random"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`check_state` let pass.

        Raises:
            CheckpointError, LoaderError: a loader cannot be brought to its position.
        """
        for stream, saved in zip(self._streams(), state["streams"], strict=True):
            stream.load_state_dict(saved)
        self._load_parts(state)

    def return_to(self, state: dict[str, Any]) -> None:
        """:meth:`load_state_dict`, but loaders go to their positions when they are used."""
        for stream, saved in zip(self._streams(), state["streams"], strict=True):
            stream.return_to(saved)
        self._load_parts(state)

    def _load_parts(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self._parts(), state["parts"], strict=True):
            part.load_state_dict(saved)
        set_method_state(self._method, state["method"], self._problem.params.tree)
        self.outer_step = state["outer_step"]
        self._resumed = True
        set_random_states(state["random"], self._problem.inner_stream.device)

    def _streams(self) -> list[Stream]:
        return [self._problem.inner_stream, self._problem.outer_stream]

    def _parts(self) -> list[Variables | Procedure | OuterStep]:
        return [self._problem.params, self._problem.hparams, self._procedure, self._outer]

    def _record(
        self, losses: Sequence[float], estimate: Hypergradient, norm: float, seconds: float
    ) -> Record:
        receipt, verification = estimate.receipt, estimate.verification
        solve = receipt if isinstance(receipt, Solution) else None
        metrics = {
            f"{name}/{key}": value
            for name, objective in (("inner", self._problem.f), ("outer", self._problem.g))
            for key, value in objective.take_metrics().items()
        }
        return Record(
            step=self.outer_step,
            inner_steps=self.inner_step,
            inner_loss=statistics.fmean(losses) if losses else math.nan,
            outer_loss=estimate.outer_value,
            hypergradient_norm=norm,
            seconds=seconds,
            inner_lr=self._procedure.lr,
            outer_lr=self._outer.lr,
            inner_grad_norm=estimate.inner_grad_norm,
            status=None if solve is None else solve.status.name,
            iterations=None if solve is None else solve.iterations,
            matvecs=estimate.matvecs,
            relative_residual=None if solve is None else solve.relative_residual,
            multiplier=estimate.multiplier,
            verification=None if verification is None else verification.status.name,
            damping=estimate.damping,
            metrics=metrics,
            hparams=self._outer.summary(),
        )

    def _restart_inner(self) -> None:
        if self._initial is not None:
            self._problem.params.load_state_dict(self._initial)
        elif callable(self._restart):
            values = self._restart()
            if values is not None:
                self._problem.params.assign(values, "the value of restart")
        self._procedure.reset()

    def _warn_of_unused(self) -> None:
        in_f, in_g = self._problem.f.uses, self._problem.g.uses
        if self._warned or in_f is None or in_g is None:
            return
        self._warned = True
        named = self._problem.hparams.named()
        unused = [
            where for (where, _), *used in zip(named, in_f, in_g, strict=True) if not any(used)
        ]
        if unused:
            warn(
                f"neither inner nor outer uses {', '.join(unused)}: the hypergradient there is 0",
                HypergradWarning,
            )


@contextmanager
def interrupts(wish: Callable[[], None]) -> Iterator[None]:
    """Call ``wish`` at the first SIGINT inside; a second one raises ``KeyboardInterrupt``.

    Outside the main thread, or where the program has a handler of its own, nothing is changed.
    """
    handler = signal.getsignal(signal.SIGINT)
    if (
        threading.current_thread() is not threading.main_thread()
        or handler is not signal.default_int_handler
    ):
        yield
        return
    owner = os.getpid()
    wished = False

    def first(number: int, frame: Any) -> None:
        nonlocal wished
        # The terminal sends the signal to the workers of a loader as well, which inherit this
        # handler: they must serve the step to its end.
        if os.getpid() != owner:
            return
        if wished:
            signal.default_int_handler(number, frame)
        wished = True
        wish()

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
