"""Independent tasks over the ranks: the tasks of meta-learning, the starts of a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hypergrad.checks import check_objective
from hypergrad.distributed.ranks import ranks_of

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, group: Any = None
) -> list[Result]:
    """``[function(task) for task in tasks]``, each on one rank; all results on all ranks.

    Rank r takes the tasks r, r + R, r + 2R, ... one after the other; in ``function`` ranks do not
    communicate. For whole searches from several starts, cross-validation, evaluation. Losses whose
    gradients are wanted, such as those of MAML, go into a :class:`DataParallel` objective instead.

    Args:
        function: of one task; returns something that can be pickled, with tensors on the CPU.
        tasks: the same on all ranks.
        group: the process group; ``None`` is the default group.

    Raises:
        TypeError, ValueError: ``function`` cannot be called, or there is no process group.
        DistributedError: on all ranks, when all have done what they could: tasks failed on some.
    """
    check_objective(function, "function", "(task)")
    ranks = ranks_of(group)

    def own() -> list[Result]:
        return [function(task) for task in tasks[ranks.rank :: ranks.size]]

    parts = ranks.gathered(ranks.together(own))
    return [parts[i % ranks.size][i // ranks.size] for i in range(len(tasks))]
