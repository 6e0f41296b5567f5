"""One outer step of the loop, for each kind of method: how θ moves, and where dg/dφ comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

from hypergrad import tree as tr
from hypergrad._checks import check_number
from hypergrad._saving import check_keys, from_leaves
from hypergrad.bilevel.methods.estimators import Estimator, step_size
from hypergrad.bilevel.problem import Problem
from hypergrad.bilevel.steps import Trainer
from hypergrad.errors import NonFiniteError
from hypergrad.linsolve import Solution, Status
from hypergrad.operators import Mode
from hypergrad.results import Hypergradient
from hypergrad.single_loop import LoopState, SingleLoop
from hypergrad.tree import Tree
from hypergrad.verification.verification import Course, verify_on_course


class Procedure(ABC):
    """Moves θ, and says where φ should go."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many steps of θ were made."""

    @property
    @abstractmethod
    def lr(self) -> float | None:
        """The present learning rate of θ, where it is one number."""

    @abstractmethod
    def train(self, steps: int) -> list[float]:
        """Inner steps alone, and the loss before each."""

    @abstractmethod
    def advance(self, steps: int) -> tuple[list[float], Hypergradient]:
        """Inner steps, their losses, and the hypergradient after them."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what the inner optimiser has learned."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, without the parameters, in plain containers."""

    @abstractmethod
    def check_state(self, state: Any) -> None:
        """Raise ``ValueError`` unless :meth:`load_state_dict` could take ``state``."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""


class Trained(Procedure):
    """Moves θ by an optimiser of ``torch.optim``.

    Args:
        problem: the problem.
        trainer: of θ.
    """

    def __init__(self, problem: Problem, trainer: Trainer) -> None:
        self._problem = problem
        self._trainer = trainer

    @property
    def count(self) -> int:
        """The trainer's."""
        return self._trainer.count

    @property
    def lr(self) -> float | None:
        """The optimiser's."""
        return self._trainer.lr

    def train(self, steps: int) -> list[float]:
        """By the optimiser, along plain gradients."""
        return [self._trainer.step() for _ in range(steps)]

    def reset(self) -> None:
        """The optimiser's state; the solution of a linear system is still a good start."""
        self._trainer.reset()


class Alternating(Trained):
    """Train θ, then estimate: implicit differentiation and its short-sighted relatives.

    Args:
        estimator: the method.
        problem: the problem.
        trainer: of θ.
    """

    def __init__(self, estimator: Estimator, problem: Problem, trainer: Trainer) -> None:
        super().__init__(problem, trainer)
        self._estimator = estimator
        self._solution: Tree = None

    def advance(self, steps: int) -> tuple[list[float], Hypergradient]:
        """Train, then estimate, from the last solution of the linear system."""
        losses = self.train(steps)
        self._problem.inner_lr = self._trainer.lr
        estimate = self._estimator.estimate(self._problem, self._solution)
        solve = estimate.receipt
        self._solution = None
        if isinstance(solve, Solution) and solve.status not in _LOST:
            self._solution = solve.x
        return losses, estimate

    def state_dict(self) -> dict[str, Any]:
        """The trainer's, the warm start, and the damping to start from."""
        solution = None if self._solution is None else tr.leaves(self._solution)
        return {
            "trainer": self._trainer.state_dict(),
            "solution": solution,
            "damping": self._problem.damping.start,
        }

    def check_state(self, state: Any) -> None:
        """The trainer's, the warm start, and the damping to start from."""
        check_keys(state, ("trainer", "solution", "damping"), "the state of the method")
        self._trainer.check_state(state["trainer"])
        check_number(state["damping"], "the damping", at_least=0.0)
        if state["solution"] is not None:
            from_leaves(state["solution"], self._problem.params.tree, "the warm start", "params")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self._trainer.load_state_dict(state["trainer"])
        self._problem.damping.start = state["damping"]
        self._solution = state["solution"]
        if self._solution is not None:
            like = self._problem.params.tree
            self._solution = from_leaves(self._solution, like, "the warm start", "params")


# Ends of a solve whose x is no start for the next one; one that only came too early is.
_LOST = (
    Status.BREAKDOWN,
    Status.DIVERGED,
    Status.NEGATIVE_CURVATURE,
    Status.NON_FINITE,
    Status.NOT_SYMMETRIC,
)


class Together(Trained):
    """One step of θ and of φ each, along the directions of a single loop.

    Args:
        method: says where to go.
        problem: the problem.
        trainer: of θ.
    """

    def __init__(self, method: SingleLoop, problem: Problem, trainer: Trainer) -> None:
        super().__init__(problem, trainer)
        self._method = method
        self._state: LoopState | None = None
        self._mode: Mode | None = getattr(method, "mode", None)
        self._whole = problem.over_all_batches() if method.over_all_batches else None

    def advance(self, steps: int) -> tuple[list[float], Hypergradient]:
        """One step, at the θ and φ of before it."""
        problem = self._problem
        inner, outer = self._whole or (problem.inner_objective(), problem.outer_objective())
        params, hparams = problem.params.tree, problem.hparams.tree
        problem.inner_lr = self._trainer.lr
        options: dict[str, Any] = {"lr": step_size(self._method.lr, problem, self._method)}
        verification = None
        if problem.verify == "always" and self._mode is not None:
            course = Course("always", self._mode, inner, outer, params, hparams)
            verification = verify_on_course(course, inner, outer, params, hparams)
            self._mode = course.mode
        if self._mode is not None:
            options["mode"] = self._mode
        method = replace(self._method, **options)
        state = self._state or method.init(params)
        found = method.directions(inner, outer, params, hparams, state)
        if not tr.is_finite((found.params, found.hparams)):
            raise NonFiniteError(f"{type(method).__name__} must give finite directions, got others")
        self._trainer.step_along(found.params, found.inner_value)
        self._state = found.state
        return [found.inner_value], Hypergradient(
            found.hparams,
            outer_value=found.outer_value,
            inner_value=found.inner_value,
            matvecs=found.matvecs,
            multiplier=found.multiplier,
            verification=verification,
        )

    def state_dict(self) -> dict[str, Any]:
        """The trainer's, and what the method remembers."""
        packed = None if self._state is None else self._method.pack(self._state)
        return {"trainer": self._trainer.state_dict(), "loop": packed}

    def check_state(self, state: Any) -> None:
        """The trainer's, and what the method remembers."""
        check_keys(state, ("trainer", "loop"), "the state of the method")
        self._trainer.check_state(state["trainer"])
        if state["loop"] is not None:
            # SABA's generator would go on from the state.
            generator = getattr(self._method, "generator", None)
            scratch = {} if generator is None else {"generator": generator.clone_state()}
            trees = self._problem.params.tree, self._problem.hparams.tree
            replace(self._method, **scratch).unpack(state["loop"], *trees)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self._trainer.load_state_dict(state["trainer"])
        self._state = None
        if state["loop"] is not None:
            trees = self._problem.params.tree, self._problem.hparams.tree
            self._state = self._method.unpack(state["loop"], *trees)
