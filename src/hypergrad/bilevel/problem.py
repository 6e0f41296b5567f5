"""What a method of the loop works on: two objectives, their variables, their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hypergrad import _sharding as pl
from hypergrad import tree as tr
from hypergrad._checks import check_count, check_dependence, check_number, check_value
from hypergrad._private import inside_a_transform
from hypergrad.autodiff.checkpointing import checkpoints_followed
from hypergrad.autodiff.evaluation import Objective, fresh_leaves, gradient
from hypergrad.autodiff.isolation import own_parameters_refused
from hypergrad.bilevel.batches import Failed, Stream, to_device
from hypergrad.bilevel.variables import Variables
from hypergrad.distributed import DataParallel
from hypergrad.errors import NonFiniteError
from hypergrad.linsolve import AutoDamping
from hypergrad.linsolve.base import OnFailure
from hypergrad.minibatches import Averaged, Sampled, bind
from hypergrad.optimizers import Optimizer
from hypergrad.tree import Tree
from hypergrad.verification.differences import is_verifying
from hypergrad.verification.verification import Verify

LoopObjective: TypeAlias = Callable[[Tree, Tree, Any], Any]
"""``f(params, hparams, batch)``: returns a scalar tensor, or it and a mapping of metrics."""

InnerOptimizer: TypeAlias = torch.optim.Optimizer | Optimizer | Callable[[Tree], Optimizer]
"""What ``optimizer`` of the inner level may be; all but the first for unrolling only."""


@dataclass(frozen=True)
class Level:
    """One level of a bilevel problem: what is minimised, over what, how, and on which batches.

    Args:
        objective: ``f(params, hparams, batch)``, a scalar tensor, or ``(scalar, metrics)`` with a
            mapping from names to numbers. Its arguments are the parameters of the inner and of the
            outer level, for both objectives. A module comes as the module that was given, with the
            parameters of the moment in it and in the mode of the time when the solver was made;
            anything else as a tree like the one given.
        params: the parameters of this level: a module, whose parameters that require gradients are
            meant and whose buffers and modes are looked after; or any tree of leaf tensors.
            Changed in place.
        optimizer: of ``torch.optim``, over ``params``; also as Accelerate or Fabric prepared it.
            The inner one with ``hg.Unrolled()`` also one of :mod:`hypergrad.optimizers`, or a
            function of the outer parameters that returns one.
        loader: batches for the objective, anything that can be iterated again and again; their
            tensors are moved to the device. ``None``: the batch is always ``None``.
        scheduler: of ``optimizer``, stepped with it. A plateau scheduler gets the loss.
        clip: the largest norm of a gradient of this level. With ``hg.Unrolled()`` the clipping of
            inner gradients is differentiated too, see :class:`hypergrad.optimizers.Clipped`.
        batches: over how many batches the objective is averaged for a hypergradient.
        functional: whether objectives get the dictionary of a module's parameters in the place of
            the module, for ``torch.func.functional_call(model, params, ...)``.

    Raises:
        TypeError, ValueError: ``batches`` or ``clip`` of the wrong kind or out of its range.
    """

    objective: LoopObjective
    params: Tree | nn.Module
    optimizer: InnerOptimizer
    loader: Iterable[Any] | None = None
    scheduler: Any = None
    clip: float | None = None
    batches: int = 1
    functional: bool = False

    @property
    def handed(self) -> Tree | nn.Module:
        """What objectives get of this level: the module, or else a tree."""
        return None if self.functional else self.params

    def __post_init__(self) -> None:
        check_count(self.batches, "batches")
        if self.clip is not None:
            check_number(self.clip, "clip", above=0.0)


class Measured:
    """An objective whose metrics are put aside, under autocast if asked.

    Args:
        objective: returns a scalar or ``(scalar, metrics)``.
        name: what to call it in errors.
        device: where autocast works.
        autocast: its dtype; ``None`` is none.
        group: of processes, over which the value is averaged; ``None`` is this one alone.

    Attributes:
        uses: which leaves of φ the value depends on; ``None`` until it was differentiated in φ.
    """

    def __init__(
        self,
        objective: LoopObjective,
        name: str,
        device: torch.device,
        autocast: torch.dtype | None,
        group: Any = None,
    ) -> None:
        self._objective = objective
        self._value: LoopObjective = self._own_value
        self._group = group
        if group is not None:
            self._value = DataParallel(self._own_value, group=group)
        self._name = name
        self._device = device
        self._autocast = autocast
        self._sums: dict[str, Any] = {}
        self._count = 0
        self.uses: list[bool] | None = None

    def __call__(self, params: Tree, hparams: Tree, batch: Any) -> Any:
        """The scalar."""
        return self._value(params, hparams, batch)

    def over(self, batches: list[Any]) -> Objective:
        """The mean over some batches, as a function of θ and φ alone."""
        if len(batches) == 1:
            return bind(self, *batches)
        if self._group is None:
            return Averaged(self, batches)
        return DataParallel(Averaged(self._own_value, batches), group=self._group)

    def _own_value(self, params: Tree, hparams: Tree, batch: Any) -> Any:
        if isinstance(batch, Failed):
            raise batch.error
        with own_parameters_refused():
            if self._autocast is None:
                value = self._objective(params, hparams, batch)
            else:
                with torch.autocast(self._device.type, dtype=self._autocast):
                    value = self._objective(params, hparams, batch)
        if isinstance(value, tuple):
            value, metrics = self._split(value)
            if not is_verifying():
                self._add(metrics)
        if self.uses is None and not is_verifying():
            self._notice_hparams(value, hparams)
        if isinstance(value, Tensor):
            value = pl.full(value)
            # A sum of losses in bfloat16 would lose digits; a float32 scalar costs nothing.
            if value.dtype in (torch.bfloat16, torch.float16):
                return value.float()
        return value

    def _notice_hparams(self, value: Any, hparams: Tree) -> None:
        if not isinstance(value, Tensor) or torch.compiler.is_compiling() or inside_a_transform():
            return
        leaves = tr.leaves(hparams)
        if value.requires_grad and all(leaf.requires_grad for leaf in leaves):
            found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            self.uses = [grad is not None for grad in found]

    def take_metrics(self) -> dict[str, float]:
        """The mean of each over the evaluations since the last call."""
        means = {key: float(total) / self._count for key, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def _add(self, metrics: dict[str, Any]) -> None:
        for key, entry in metrics.items():
            self._sums[key] = self._sums[key] + entry if key in self._sums else entry
        self._count += 1

    def _split(self, value: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
        if len(value) != 2 or not isinstance(value[1], Mapping):
            raise TypeError(
                f"{self._name} must return a scalar tensor or (scalar, metrics), metrics a mapping "
                f"from names to numbers, got a tuple of {[type(part).__name__ for part in value]}"
            )
        metrics = {
            str(key): entry.detach() if isinstance(entry, Tensor) else entry
            for key, entry in value[1].items()
        }
        return value[0], metrics


class Problem:
    """A bilevel problem as the methods of the loop see it.

    Attributes:
        f: the inner objective, of a batch.
        g: the outer one.
        params: θ.
        hparams: φ.
        inner: the inner level, as it was given.
        outer: the outer one.
        inner_stream: the batches of f.
        outer_stream: those of g.
        inner_lr: the present learning rate of the inner optimiser, if it has one.
        verify: whether this outer step verifies derivatives.
        on_failure: what a failed solve does.
        damping: what linear solves with ``damping="auto"`` remember.
    """

    def __init__(
        self,
        f: Measured,
        g: Measured,
        params: Variables,
        hparams: Variables,
        inner_stream: Stream,
        outer_stream: Stream,
        inner: Level,
        outer: Level,
        on_failure: OnFailure,
    ) -> None:
        self.f = f
        self.g = g
        self.params = params
        self.hparams = hparams
        self.inner_stream = inner_stream
        self.outer_stream = outer_stream
        self.inner_lr: float | None = None
        self.verify: Verify = "once"
        self.on_failure = on_failure
        self.damping = AutoDamping()
        self.inner = inner
        self.outer = outer

    def inner_loss_and_grads(self, batch: Any) -> float:
        """``f`` on a batch, as training sees it; leaves ``∂_θ f`` where the optimiser looks.

        Raises:
            TypeError, ValueError: f returns no scalar that depends on θ.
            NonFiniteError: the value or the gradient is infinite or NaN; θ has no gradient then.
        """
        theta = self.params.tree
        if not all(leaf.requires_grad for leaf in self.params.leaves):
            theta = fresh_leaves(theta)
        with torch.enable_grad():
            with checkpoints_followed():
                value = self.f(theta, tr.detach(self.hparams.tree), batch)
            check_value(value, "inner")
            grads = gradient(value, theta)
        check_dependence(grads, "inner")
        present = [grad for grad in grads if grad is not None]
        if not tr.is_finite(present):
            raise NonFiniteError(
                f"the gradient of inner must be finite, got an infinity or a NaN where the value "
                f"is {value.item():.6g}"
            )
        for leaf, grad in zip(self.params.leaves, grads, strict=True):
            leaf.grad = grad
        return value.item()

    def draw_inner(self) -> list[Any]:
        """The batches of f for one hypergradient."""
        return [self.inner_stream.next() for _ in range(self.inner.batches)]

    def inner_objective(self, batches: list[Any] | None = None) -> Objective:
        """``f(params, hparams)``, the mean over some batches; by default the next ones."""
        return self.f.over(self.draw_inner() if batches is None else batches)

    def outer_objective(self) -> Objective:
        """``g(params, hparams)`` on the next batch, or the mean over the next few."""
        return self.g.over([self.outer_stream.next() for _ in range(self.outer.batches)])

    def sampled_inner(self) -> Sampled:
        """``f`` on a fresh batch at each evaluation."""
        return Sampled(self.f, self.inner_stream)

    def over_all_batches(self) -> tuple[Averaged, Averaged]:
        """Both objectives as means over all batches of their loaders, which are sequences."""
        return (
            Averaged(self.f, _all_batches(self.inner_stream)),
            Averaged(self.g, _all_batches(self.outer_stream)),
        )


def _all_batches(stream: Stream) -> Sequence[Any]:
    return [to_device(batch, stream.device) for batch in stream.loader]
