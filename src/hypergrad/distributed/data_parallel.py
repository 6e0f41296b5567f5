"""An objective that is the mean of those of all ranks.

f̄(θ, φ) = Σ_r w_r f_r(θ, φ) / Σ_r w_r

θ and φ pass through a node that copies them to the ranks, and whose derivative sums over the ranks
(:mod:`hypergrad.distributed.collectives`); the value is averaged. Whatever is made of derivatives
of f̄, Hessian products, mixed products, unrolled steps, is then that of the mean, the same on every
rank, and each product is communicated once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hypergrad import placement as pl
from hypergrad import tree as tr
from hypergrad.checks import check_number, check_objective
from hypergrad.distributed.collectives import Exchange, spread
from hypergrad.distributed.ranks import Ranks, fingerprint, ranks_of
from hypergrad.errors import DistributedError
from hypergrad.isolation import RandomState
from hypergrad.partial import inside_a_transform
from hypergrad.tree import Tree


class DataParallel:
    """``f̄ = Σ_r w_r f_r / Σ_r w_r`` over the ranks of a group; an objective like any other.

    Each rank gives the objective on its own batches, and all ranks make the same calls of this
    library. Values, gradients and products are those of the mean, the same on all ranks: any number
    of ranks gives the answer of one process that has all their batches. θ and φ may be

    - plain tensors, the same on all ranks: a product costs one all-reduce of their size;
    - ``DTensor`` objects, sharded over the ranks: f sees them whole, as plain tensors. A product
      costs one all-gather and one reduce-scatter, and the vectors of solvers and optimisers stay
      sharded.

    Ranks must draw the same random numbers outside f (seed them alike); inside, each rank draws its
    own. Each evaluation compares θ, φ and the random states of the ranks by checksums, and carries
    the failures of ranks to all others. Buffers of modules, such as the statistics of batch norm,
    are each rank's own, as are those of ``torch.nn.parallel.DistributedDataParallel``.

    Args:
        objective: ``f_r(params, hparams, ...)``, a scalar, on this rank's data.
        group: the process group; ``None`` is the default group.
        weight: ``w_r`` > 0, such as the number of rows behind f_r, or a function of the arguments
            that follow ``hparams``, such as ``len`` of a batch.

    Attributes:
        ranks: those of the group.

    Raises:
        TypeError, ValueError: ``objective`` cannot be called, ``weight`` is out of its range, or
            there is no process group.
        DistributedError: while it runs, on all ranks: one of them failed, or they differ in θ, φ or
            their random states.
    """

    def __init__(
        self,
        objective: Callable[..., Any],
        *,
        group: Any = None,
        weight: float | Callable[..., float] = 1.0,
    ) -> None:
        check_objective(objective, "objective", "(params, hparams, ...)")
        if not callable(weight):
            check_number(weight, "weight", above=0.0)
        self.ranks = ranks_of(group)
        self._objective = objective
        self._weight = weight

    def __call__(self, params: Tree, hparams: Tree, *arguments: Any) -> Tensor:
        """The mean; its graph leads to this rank's ``params`` and ``hparams``."""
        theta, phi = self._copies(params), self._copies(hparams)
        call = _Call(self.ranks, params, hparams)
        try:
            call.weight = self._weight(*arguments) if callable(self._weight) else self._weight
            check_number(call.weight, "weight", above=0.0)
            with call.own_random_numbers(theta, phi):
                value = self._objective(theta, phi, *arguments)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise TypeError(f"objective must return a scalar tensor, got {_words(value)}")
        except Exception as error:
            call.failure = error
            value = torch.zeros(())
        tie = _tie(theta, phi)
        return _Mean.apply(call, value.reshape(()).to(tie.device) + tie.to(value.dtype))

    def _copies(self, tree: Tree) -> Tree:
        leaves = tr.leaves(tree)
        return tr.unflatten_like(tree, spread(Exchange(leaves, self.ranks), leaves))


def _tie(*trees: Tree) -> Tensor:
    """Zero, with zero derivatives, but a function of all trees to any order.

    So the graph of every rank leads to θ and φ, and so do those of its derivatives, even where its
    own objective does not: it would leave the others waiting for its part of a product.
    """
    firsts = [next(leaf for leaf in tr.leaves(tree) if leaf.numel()) for tree in trees]
    where = firsts[0]
    return 0.0 * torch.cos(torch.stack([leaf.reshape(-1)[0].to(where) for leaf in firsts]).sum())


def _words(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


class _Call:
    """One evaluation: its random numbers, and what the ranks tell each other beside the value.

    Attributes:
        weight: of this rank.
        failure: why this rank has no value.
        share: this rank's part of all weights; known after :meth:`mean`.
    """

    share: float

    def __init__(self, ranks: Ranks, params: Tree, hparams: Tree) -> None:
        self._ranks = ranks
        self._drew = False
        self.weight = 1.0
        self.failure: Exception | None = None
        self._prints: dict[str, int] = {}
        if not inside_a_transform():
            self._seed = _peek()
            self._prints["their random states"] = self._seed
            for name, tree in (("params", params), ("hparams", hparams)):
                plain = [leaf for leaf in tr.leaves(tree) if not pl.is_distributed(leaf)]
                self._prints[name] = fingerprint(plain)

    @contextmanager
    def own_random_numbers(self, *trees: Tree) -> Iterator[None]:
        """Seed this rank by the state that all share, and its number; put the state back after."""
        if inside_a_transform():
            yield
            return
        with RandomState(*trees).replayed():
            torch.manual_seed((self._seed + self._ranks.rank) % 2**63)
            seeded = RandomState(*trees)
            yield
            self._drew = seeded.moved()

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks, element by element.

        Raises:
            DistributedError: see :class:`DataParallel`.
        """
        numbers = [digits for number in self._prints.values() for digits in _digits(number)]
        header = [
            self.weight, float(self.failure is not None), float(self._drew),
            *map(float, numbers), *(float(number**2) for number in numbers),
        ]  # fmt: skip
        wide = value.detach().reshape(-1).double() * self.weight
        message = torch.cat([wide, wide.new_tensor(header)])
        sums = self._ranks.summed(message)
        weights, failures, drew, *prints = sums[wide.numel() :].tolist()
        if failures:
            self._ranks.raise_failure(self.failure)
        self._check_alike(prints[: len(numbers)], prints[len(numbers) :])
        if drew:
            torch.randint(2**62, ())  # so that the next evaluation has other numbers, on all ranks
        self.share = self.weight / weights
        return (sums[: wide.numel()] / weights).reshape(value.shape).to(value.dtype)

    def _check_alike(self, sums: list[float], squares: list[float]) -> None:
        # All are alike where the mean of the squares is the square of the mean: exact in integers.
        size = self._ranks.size
        alike = [size * q == s**2 for s, q in zip(sums, squares, strict=True)]
        unlike = [name for name in self._prints if not (alike.pop(0) & alike.pop(0))]
        if unlike:
            raise DistributedError(
                f"the {size} ranks must agree in {' and '.join(unlike)}, but they differ: seed all "
                "ranks alike, start them from the same parameters, and let none step on its own"
            )


def _peek() -> int:
    """A number that the random state of the CPU decides, which stays as it is."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return int(torch.randint(2**62, (), generator=generator))


def _digits(number: int) -> tuple[int, int]:
    """Of 12 bits, whose squares add up without rounding over twenty thousand ranks."""
    return number % 4096, number // 4096 % 4096


class _Mean(torch.autograd.Function):
    """``Σ_r w_r f_r / Σ_r w_r``."""

    @staticmethod
    def forward(call: _Call, value: Tensor) -> Tensor:
        return call.mean(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        return None, cotangent * ctx.call.share

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        tangent = tangents[1]
        return ctx.call.mean(tangent)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], call: _Call, value: Tensor
    ) -> tuple[Tensor, int | None]:
        dim = in_dims[1]
        whole = value if dim is None else value.movedim(dim, 0)
        return _Mean.apply(call, whole), None if dim is None else 0
