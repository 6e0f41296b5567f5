"""The ranks of a process group, their failures, and tasks spread over them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hypergrad._checks import check_objective
from hypergrad.errors import DistributedError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group."""

    group: dist.ProcessGroup

    @property
    def size(self) -> int:
        """The number of ranks."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return dist.get_rank(self.group)

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks; anything that can be pickled."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def raise_failure(self, own: BaseException | None) -> NoReturn:
        """Raise a rank's failure on all ranks; all must call it once one has failed."""
        reports = self.gathered(None if own is None else f"{type(own).__name__}: {own}")
        failed = [f"rank {i}: {report}" for i, report in enumerate(reports) if report is not None]
        raise DistributedError("; ".join(failed)) from own

    def together(self, work: Callable[[], Result]) -> Result:
        """Return ``work()``, which must not communicate; if it fails on one rank, all raise."""
        try:
            result, failure = [work()], None
        except Exception as error:
            result, failure = [], error
        if any(self.gathered(failure is not None)):
            self.raise_failure(failure)
        return result[0]

    def first(self, work: Callable[[], object]) -> None:
        """Call ``work()`` on rank 0, while the others wait; if it fails, all raise."""
        self.together(lambda: work() if self.rank == 0 else None)


def ranks_of(group: Any, name: str = "group") -> Ranks:
    """Return the ranks of a group; ``None`` is the default group.

    Raises:
        TypeError: it is no process group.
        ValueError: ``torch.distributed`` is not initialised, or this process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"{name} must be a process group, but torch.distributed is not initialised; call "
            "torch.distributed.init_process_group and start the program by torchrun"
        )
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup, got {type(group).__name__}"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"{name} must hold this process, got a group of others")
    return Ranks(group)


def fingerprint(tensors: list[Tensor]) -> int:
    """A number below 2²⁴ from the bits of some tensors, in any order of summation."""
    total = 0
    for i, tensor in enumerate(tensors):
        bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
        total += (i + 1) * int(bits.sum(dtype=torch.int64))
    return total % _PRIME


_PRIME = 2**24 - 3
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mean_of_all(numbers: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """The mean of each number over the ranks that have it."""
    every = ranks.gathered(dict(numbers))
    names = dict.fromkeys(name for part in every for name in part)
    return {name: statistics.fmean(p[name] for p in every if name in p) for name in names}


Task = TypeVar("Task")


def map_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, group: Any = None
) -> list[Result]:
    """``[function(task) for task in tasks]``, each on one rank; all results on all ranks.

    Rank r takes the tasks r, r + R, r + 2R, ... one after the other; in ``function`` ranks do not
    communicate. It is made for whole searches from several starts, cross-validation, evaluation. A
    loss that needs gradients, such as that of MAML, goes into a :class:`DataParallel` objective.

    Args:
        function: of one task; returns something that can be pickled, with tensors on the CPU.
        tasks: the same on all ranks.
        group: the process group; ``None`` is the default group.

    Raises:
        TypeError, ValueError: ``function`` cannot be called, or there is no process group.
        DistributedError: on all ranks, after all tasks have run: some of them failed.
    """
    check_objective(function, "function", "(task)")
    ranks = ranks_of(group)

    def own() -> list[Result]:
        return [function(task) for task in tasks[ranks.rank :: ranks.size]]

    parts = ranks.gathered(ranks.together(own))
    return [parts[i % ranks.size][i // ranks.size] for i in range(len(tasks))]
