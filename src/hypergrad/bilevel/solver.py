"""The loop: ``min_φ g(θ*(φ), φ)`` over mini-batches, by any method, resumable at every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from hypergrad._checks import check_choice, check_count, check_objective, given
from hypergrad._saving import check_form, check_keys
from hypergrad.autodiff.modules import on_modules
from hypergrad.bilevel.batches import Stream
from hypergrad.bilevel.callbacks import Callback
from hypergrad.bilevel.checkpoints.store import Store
from hypergrad.bilevel.history import History, Record
from hypergrad.bilevel.loop import Loop, Restart, interrupts
from hypergrad.bilevel.methods.choices import Method, check_scheduler, procedure
from hypergrad.bilevel.optimizer_state import signature
from hypergrad.bilevel.options import check_options
from hypergrad.bilevel.problem import Level, LoopObjective, Measured, Problem
from hypergrad.bilevel.rise import Rise
from hypergrad.bilevel.steps import OuterStep
from hypergrad.bilevel.variables import Variables
from hypergrad.distributed.ranks import mean_of_all, ranks_of
from hypergrad.errors import CheckpointError
from hypergrad.hypergradients import with_modules
from hypergrad.linsolve import CG
from hypergrad.linsolve.base import OnFailure
from hypergrad.optimizers import Optimizer
from hypergrad.optimizers.prepared import unprepared_optimizer, unprepared_scheduler
from hypergrad.tree import Tree
from hypergrad.verification.verification import Verify


class BilevelSolver:
    """Minimise ``g(θ*(φ), φ)`` over φ, ``θ*(φ) = argmin_θ f(θ, φ)``, over mini-batches.

    An outer step makes ``inner_steps`` steps of θ, asks ``method`` for dg/dφ and makes one step of
    φ. To change method is to change that one argument:

    ===============================  ===========================================================
    ``method=``                      what an outer step does
    ===============================  ===========================================================
    any linear solver, ``hg.CG()``   trains θ, then implicit differentiation with warm starts
    ``hg.Implicit(...)``             the same, with options
    ``hg.Unrolled(...)``             trains θ, then differentiates those very steps
    ``T1T2``, ``DARTS``              trains θ, then looks one step back, or ahead
    ``StocBiO``, ``AmIGO``           trains θ, then solves with a fresh batch per product
    ``hg.single_loop.SOBA`` ...      moves θ and φ together, one step each
    ===============================  ===========================================================

    The state between two outer steps is all there is: :meth:`save` writes it, and a solver that
    was built alike and calls :meth:`resume` goes on bit for bit (on a CPU), wherever a
    ``DataLoader`` was. A loader is iterated endlessly, each pass from a seed of its own.

    Args:
        inner: f, θ, and how θ is trained.
        outer: g, φ, and how φ is moved.
        params: θ, where ``inner`` is f alone.
        hparams: φ, where ``outer`` is g alone.
        method: where dg/dφ comes from, see above.
        inner_steps: per outer step; 1 for single loops.
        outer_steps: where the loop ends.
        warmup_steps: inner steps before the first outer step.
        restart: where the inner problem starts: ``None``, where it was; ``"initial"``, from the
            parameters, buffers and optimiser state of now; or a function without arguments that
            initialises θ in place, or returns new values for it.
        restart_every: outer steps between restarts.
        project: ``project(hparams)`` after each outer step changes φ in place, or returns what to
            put there, such as ``lambda decay: decay.clamp(min=0.0)``.
        on_failure: what a failed solve or verification does: ``"warn"`` (once for each way to fail;
            the history has every step), ``"raise"`` or ``"ignore"``.
        verify: whether an outer step compares the derivatives with differences, see
            :func:`hypergrad.hypergradient`: ``"once"`` is here the first step, the first one after
            a resumption and every hundredth; ``"always"`` or ``"never"``. Methods that draw a fresh
            batch for each product cannot be compared.
        autocast: ``torch.bfloat16`` or ``torch.float16``, for both objectives.
        device: where to compute; modules and tensors are moved there. ``None``: where θ is.
        seed: of PyTorch's random state, set now, and of the loaders. ``None`` draws one.
        process_group: of ``torch.distributed``; every rank has its own loaders, such as those of a
            ``DistributedSampler``, and both objectives are averaged over the ranks, see
            :class:`hypergrad.distributed.DataParallel`. θ and φ are the same on all ranks, or
            ``DTensor`` objects sharded over them. Only the first rank shows and writes; what stops
            or fails on one stops on all. ``None``: this process alone.
        callbacks: what listens, see :class:`hypergrad.bilevel.Callback`.
        fields: the other fields of the levels, where these are objectives alone, each with the name
            of its level: ``inner_optimizer=``, ``outer_loader=``, ``clip_inner=`` and so on. Such a
            level is ``functional``.

    Attributes:
        inner: the inner level, as it was given.
        outer: the outer one.
        history: a record of each outer step.
        outer_steps: how many to make.
        stop_reason: why the loop ended early, or ``None``.
        device: where it computes.
        autocast: the dtype, or ``None``.
        process_group: the group, or ``None``.
        store: how checkpoints are written: files, or with several ranks folders.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range, or choices that do
            not go together. While it runs: a loader without batches.
        NonFiniteError: while it runs, a loss, a gradient or a parameter is infinite or NaN; the
            message has the step and the batch.
        LoaderError: while it runs, a loader raised.
        DistributedError: while it runs, on all ranks, one of them failed, or they differ.

    Examples:
        Ridge regression on one number: θ*(φ) = 3 / (1 + φ), g = ½ (θ* − 1)², so φ* = 2.

        >>> import torch, hypergrad as hg
        >>> w, c = torch.zeros(1), torch.ones(1)
        >>> solver = hg.BilevelSolver(
        ...     hg.Level(
        ...         lambda w, c, _: (0.5 * (w - 3.0) ** 2 + 0.5 * c * w**2).sum(),
        ...         w,
        ...         torch.optim.SGD([w], lr=0.3),
        ...     ),
        ...     hg.Level(
        ...         lambda w, c, _: (0.5 * (w - 1.0) ** 2).sum(),
        ...         c,
        ...         torch.optim.SGD([c], lr=2.0),
        ...     ),
        ...     inner_steps=10,
        ...     outer_steps=50,
        ... )
        >>> history = solver.run()
        >>> c, history[-1]["status"]
        (tensor([2.0000]), 'CONVERGED')
    """

    def __init__(
        self,
        inner: Level | LoopObjective,
        outer: Level | LoopObjective,
        params: Tree | nn.Module | None = None,
        hparams: Tree | nn.Module | None = None,
        *,
        method: Method = CG(),
        inner_steps: int = 1,
        outer_steps: int = 100,
        warmup_steps: int = 0,
        restart: Restart = None,
        restart_every: int = 1,
        project: Callable[[Tree], Tree | None] | None = None,
        on_failure: OnFailure = "warn",
        verify: Verify = "once",
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
        process_group: Any = None,
        callbacks: Sequence[Callback] = (),
        **fields: Any,
    ) -> None:
        counts = {
            "inner_steps": inner_steps, "outer_steps": outer_steps, "restart_every": restart_every
        }  # fmt: skip
        check_options(counts, warmup_steps, project, restart, autocast, callbacks)
        check_choice(on_failure, "on_failure", get_args(OnFailure))
        check_choice(verify, "verify", get_args(Verify))
        inner = _unprepared(_level("inner", inner, params, fields), "inner")
        outer = _unprepared(_level("outer", outer, hparams, fields), "outer")
        if fields:
            raise TypeError(
                f"BilevelSolver has no argument {next(iter(fields))!r}; the method and "
                "its options are method=, such as method=hg.Implicit(hg.CG(), damping=0.1)"
            )
        device = None if device is None else torch.device(device)
        self._params = Variables(inner.params, "params", device)
        self._hparams = Variables(outer.params, "hparams", device)
        shared = {id(leaf) for leaf in self._params.leaves}
        for where, leaf in self._hparams.named():
            if id(leaf) in shared:
                raise ValueError(f"hparams must be apart from params, got {where} in both")
        self.device = device or self._params.leaves[0].device
        self.autocast = autocast
        self.inner, self.outer = inner, outer
        self.process_group = process_group
        self._ranks = None if process_group is None else ranks_of(process_group, "process_group")
        self.store = Store(self._ranks)
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64).random_())
        else:
            torch.manual_seed(seed)
        if self._ranks is not None:
            seed = self._ranks.gathered(seed)[0]
            torch.manual_seed(seed)
        f, g = (
            Measured(
                on_modules(level.objective, inner.handed, outer.handed),
                name, self.device, autocast, process_group,
            )
            for name, level in (("inner", inner), ("outer", outer))
        )  # fmt: skip
        inner_stream, outer_stream = (
            Stream(level.loader, f"{name}.loader", seed, self.device, self._ranks is not None)
            for name, level in (("inner", inner), ("outer", outer))
        )
        self._problem = problem = Problem(
            f, g, self._params, self._hparams, inner_stream, outer_stream, inner, outer, on_failure
        )
        # A curvature gets modules, as the objectives do.
        method = with_modules(method, inner.handed, outer.handed)
        self._loop = Loop(
            problem,
            procedure(method, problem, inner_steps=inner_steps, restarts=restart is not None),
            OuterStep(self._hparams, outer, project),
            method,
            inner_steps=inner_steps,
            warmup_steps=warmup_steps,
            restart=restart,
            restart_every=restart_every,
            verify=verify,
            # φ may act through a function that returns the optimiser.
            quiet=not isinstance(inner.optimizer, (torch.optim.Optimizer, Optimizer)),
        )
        self._optimizers = [
            signature(inner.optimizer, inner.scheduler),
            signature(outer.optimizer, outer.scheduler),
        ]
        # Those that save hear of a step when all others have.
        heard = [c for c in callbacks if self.is_first_rank or not c.first_rank_only]
        self._callbacks = sorted(heard, key=lambda callback: callback.saves)
        self.history = History()
        self._rise = Rise(outer.loader, outer.batches)
        self.outer_steps = outer_steps
        self.stop_reason: str | None = None

    @property
    def params(self) -> Tree:
        """θ: the tensors that are trained; for a module a dictionary of them."""
        return self._params.tree

    @property
    def hparams(self) -> Tree:
        """φ, in the structure that the caller gave."""
        return self._hparams.tree

    @property
    def modules(self) -> list[nn.Module]:
        """The modules among what was given."""
        return [level.module for level in (self._params, self._hparams) if level.module is not None]

    @property
    def is_first_rank(self) -> bool:
        """Whether this process shows and writes for all."""
        return self._ranks is None or self._ranks.rank == 0

    @property
    def outer_step(self) -> int:
        """How many outer steps were made."""
        return self._loop.outer_step

    @property
    def inner_step(self) -> int:
        """How many inner steps were made."""
        return self._loop.inner_step

    def run(self) -> History:
        """Go on to ``outer_steps``, or until something stops the loop; the table of all steps."""
        for _ in self:
            pass
        return self.history

    def __iter__(self) -> Iterator[Record]:
        """Go on as :meth:`run` does, one record at a time; after a break it can go on later.

        Ctrl-C stops the loop when the present step is done, a second one at once.
        """
        self.stop_reason = None
        failure: BaseException | None = None
        with interrupts(lambda: self.stop("interrupted (Ctrl-C)")):
            try:
                for callback in self._callbacks:
                    callback.on_start(self)
                # A rank that stops while it warms up would leave the others waiting.
                stopped = self._stopped if self._ranks is None else lambda: False
                while self._loop.warm_up(stopped) and self._goes_on():
                    yield self._recorded(self._loop.advance(), self._callbacks)
            except GeneratorExit:
                raise
            except BaseException as error:
                failure = error
                raise
            finally:
                self._end(failure)

    def step(self) -> Record:
        """One outer step by hand: in the history, but unheard by callbacks.

        Raises:
            NonFiniteError, LoaderError: see :class:`BilevelSolver`.
        """
        self.stop_reason = None
        self._loop.warm_up(self._stopped)
        return self._recorded(self._loop.advance(), ())

    def train(self, steps: int) -> list[float]:
        """Inner steps alone, such as those that bring θ to the φ of the end.

        Returns:
            The loss before each.

        Raises:
            TypeError, ValueError: ``steps`` is no integer or below 1.
            NonFiniteError, LoaderError: see :class:`BilevelSolver`.
        """
        check_count(steps, "steps")
        return self._loop.train(steps)

    def stop(self, reason: str = "stopped") -> None:
        """End the loop after the present step."""
        self.stop_reason = reason

    def save(self, path: Path | str) -> None:
        """Write everything to a file, or with several ranks to a folder: whole, or not at all.

        Both trees of parameters, buffers, optimisers and schedulers, the warm start and the sketch
        of the linear solve, what a single loop remembers, random states, counters, the positions in
        the loaders, the history, and the states of the callbacks.

        Raises:
            OSError: it cannot be written; what was there stays.
            TypeError: something has a state that a checkpoint cannot hold, such as a callback's.
        """
        self.store.write(self._state(), Path(path))

    def load(self, path: Path | str) -> None:
        """Go back to what :meth:`save` wrote, of a solver that was built alike.

        The number of ranks may be another one, if the batches of all ranks together are the same.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it is damaged, foreign, or of another problem; nothing is changed.
        """
        self._restore(self.store.read(Path(path), self.params), Path(path))

    def resume(self, folder: Path | str) -> bool:
        """:meth:`load` the newest checkpoint of a folder that can be loaded; whether there was one.

        One that cannot is set aside (``.damaged``, or ``.refused`` where it is whole but does not
        fit) with a :class:`hg.CheckpointWarning` that says why, and the one before it is used.

        Raises:
            CheckpointError: there are checkpoints, and none of them can be loaded; why not the
                newest. Nothing is changed.
        """
        return self.store.load_newest(Path(folder), self.params, self._restore)

    def _stopped(self) -> bool:
        return self.stop_reason is not None

    def _goes_on(self) -> bool:
        return self.outer_step < self.outer_steps and not self._stopped()

    def _recorded(self, record: Record, callbacks: Sequence[Callback]) -> Record:
        if self._ranks is not None:
            record = record.with_metrics(mean_of_all(record.metrics, self._ranks))
        for callback in callbacks:
            record = record.with_metrics(callback.measure(self, record))
        self.history.append(record)
        if self.is_first_rank:
            self._rise.see(record.outer_loss)
        for callback in callbacks:
            callback.on_step(self, record)
        if self._ranks is not None:
            reasons = self._ranks.gathered(self.stop_reason)
            self.stop_reason = next((reason for reason in reasons if reason is not None), None)
        return record

    def _end(self, error: BaseException | None) -> None:
        with ExitStack() as stack:
            # One that raises keeps none of the others from closing what it has open.
            for callback in reversed(self._callbacks):
                stack.callback(callback.on_end, self, error)
            for stream in (self._problem.inner_stream, self._problem.outer_stream):
                stack.callback(stream.close)

    def _identity(self) -> dict[str, Any]:
        return {**self._loop.identity(), "optimizers": self._optimizers}

    def _state(self) -> dict[str, Any]:
        return {
            "problem": self._identity(),
            "loop": self._loop.state_dict(),
            "history": self.history.state_dict(),
            "callbacks": [
                (type(callback).__name__, callback.state_dict()) for callback in self._callbacks
            ],
        }

    def _restore(self, saved: dict[str, Any], path: Path) -> None:
        self.store.together(lambda: self._check(saved, path))
        before = self._state()
        try:
            self.store.together(lambda: self._take(saved, self._loop.load_state_dict))
        except BaseException as error:
            self._take(before, self._loop.return_to, suppress(Exception))
            if isinstance(error, CheckpointError):
                raise CheckpointError(f"{path} cannot be loaded: {error}") from error
            raise

    def _check(self, saved: dict[str, Any], path: Path) -> None:
        """Raise unless ``saved`` is whole and of this problem; nothing is changed."""
        try:
            check_keys(saved, ("problem", "loop", "history", "callbacks"), "the state")
            here = self._identity()
            check_keys(saved["problem"], tuple(here), "the problem")
        except ValueError as error:
            raise CheckpointError(f"{path} is not whole: {error}") from error
        for key, own in here.items():
            if saved["problem"][key] != own:
                raise CheckpointError(
                    f"{path} is of another problem: {key} there {saved['problem'][key]}, here {own}"
                )
        try:
            self._loop.check_state(saved["loop"])
            self.history.check_state(saved["history"])
            for kind, state in saved["callbacks"]:
                check_form([kind, state], ["", state], "the state of a callback")
        except Exception as error:
            raise CheckpointError(f"{path} is not whole: {error}") from error

    def _take(
        self,
        saved: dict[str, Any],
        take_loop: Callable[[dict[str, Any]], None],
        careful: AbstractContextManager[Any] = nullcontext(),  # noqa: B008 - holds nothing
    ) -> None:
        take_loop(saved["loop"])
        self.history.load_state_dict(saved["history"])
        self._rise.restart(self.history["outer_loss"] if len(self.history) else [])
        # By kind and order: the callbacks of this run may be others.
        states: dict[str, list[Any]] = {}
        for kind, state in saved["callbacks"]:
            states.setdefault(kind, []).append(state)
        for callback in self._callbacks:
            own = states.get(type(callback).__name__)
            if own:
                # One that cannot take its own state back keeps none of the others from theirs.
                with careful:
                    callback.load_state_dict(own.pop(0))


def _level(name: str, given: Any, params: Any, fields: dict[str, Any]) -> Any:
    """The level itself; or one of the objective and the parameters, with its part of ``fields``.

    Raises:
        TypeError: there is a level and something that belongs into one.
    """
    own = {f"{name}_{field.name}": field.name for field in dataclasses.fields(Level)[2:]}
    own[f"clip_{name}"] = "clip"
    found = {field: fields.pop(key) for key, field in own.items() if key in fields}
    if params is None and not found:
        return given
    if isinstance(given, Level):
        raise TypeError(
            f"{name} must be an objective where its fields come as arguments of their own"
        )
    if params is None or "optimizer" not in found:
        raise TypeError(
            f"{name} must be hg.Level(objective, params, optimizer, ...), or come with its params "
            f"and {name}_optimizer="
        )
    return Level(given, params, **({"functional": True} | found))


def _unprepared(level: Any, name: str) -> Level:
    """The level with its own optimiser and scheduler, not what Accelerate or Fabric made of them.

    Raises:
        TypeError, ValueError: it is no level, or its parts do not belong together.
    """
    if not isinstance(level, Level):
        raise TypeError(
            f"{name} must be hg.Level(objective, params, optimizer, ...), got {given(level)}"
        )
    check_objective(level.objective, f"{name}.objective", "(params, hparams, batch)")
    level = replace(
        level,
        optimizer=unprepared_optimizer(level.optimizer),
        scheduler=unprepared_scheduler(level.scheduler),
    )
    check_scheduler(level.scheduler, level.optimizer, name)
    return level
