"""One evaluation of an objective by all ranks, and what they send each other with its value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hypergrad import _sharding as pl
from hypergrad import tree as tr
from hypergrad._private import inside_a_transform
from hypergrad.autodiff.isolation import RandomState, own_parameters_refused
from hypergrad.distributed.ranks import Ranks, fingerprint
from hypergrad.errors import DistributedError
from hypergrad.tree import Tree


class Call:
    """One evaluation: its random numbers, its failure, the checksums of what must agree.

    Args:
        ranks: all that take part.
        params: θ, as it was given.
        hparams: φ, as it was given.

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
    def own_part(self, *trees: Tree) -> Iterator[None]:
        """Evaluate this rank's objective inside.

        The rank is seeded by the state that all ranks share and by its number. The state is
        restored afterwards.
        """
        with own_parameters_refused(), self._own_random_numbers(*trees):
            yield

    @contextmanager
    def _own_random_numbers(self, *trees: Tree) -> Iterator[None]:
        if inside_a_transform():
            yield
            return
        with RandomState(*trees).replayed():
            torch.manual_seed((self._seed + self._ranks.rank) % 2**63)
            seeded = RandomState(*trees)
            yield
            self._drew = seeded.moved()

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks, element by element; raises as :class:`DataParallel`."""
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
            torch.randint(2**62, ())  # the next evaluation draws other numbers, on all ranks
        self.share = self.weight / weights
        return (sums[: wide.numel()] / weights).reshape(value.shape).to(value.dtype)

    def _check_alike(self, sums: list[float], squares: list[float]) -> None:
        # They agree where the mean of the squares is the square of the mean: exact in integers.
        size = self._ranks.size
        alike = [size * q == s**2 for s, q in zip(sums, squares, strict=True)]
        unlike = [name for name in self._prints if not (alike.pop(0) & alike.pop(0))]
        if unlike:
            raise DistributedError(
                f"the {size} ranks must agree in {' and '.join(unlike)}, but they differ: seed all "
                "ranks alike, start them from the same parameters, and let none step on its own"
            )


def _peek() -> int:
    """A number from the random state of the CPU, which it does not change."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return int(torch.randint(2**62, (), generator=generator))


def _digits(number: int) -> tuple[int, int]:
    """Two digits of 12 bits, whose squares add up without rounding over twenty thousand ranks."""
    return number % 4096, number // 4096 % 4096
