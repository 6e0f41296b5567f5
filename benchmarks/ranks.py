"""What ``torch.distributed`` costs where it is not used, and where there is one rank.

``python -m benchmarks.ranks`` prints it: a hypergradient of a small network by ten iterations of
CG, as it is; with all that looks for sharded tensors taken out; beside a process group of one rank;
and with both objectives as means over that rank.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import hypergrad as hg
from benchmarks.loop import Params, inner, loss, task
from benchmarks.timing import machine, one_thread
from hypergrad import _sharding as sharding

GOAL = 1.02
REPEATS = 300
SOLVER = hg.CG(rtol=0.0, maxiter=10)


@dataclass(frozen=True)
class RankCost:
    """Milliseconds of a hypergradient, medians of alternating runs, and their ratios.

    Attributes:
        plain: without a process group.
        by_bare: its time by that of hypergrad without a look for sharded tensors.
        beside_a_group: with a process group that is not used, by the plain time.
        data_parallel: as means over a group of one rank, by the plain time.
    """

    plain: float
    by_bare: float
    beside_a_group: float
    data_parallel: float


@one_thread()
def measure(repeats: int, quick: bool = False) -> RankCost:
    """All four in turn, on one thread.

    Raises:
        RuntimeError: they do not compute the same.
    """
    problem = task(quick)
    params, hparams = problem.start()
    batch, validation = problem.batches[0], problem.validation[0]

    def f(params: Params, hparams: Tensor) -> Tensor:
        return inner(params, hparams, batch)

    def g(params: Params, hparams: Tensor) -> Tensor:
        return loss(params, validation)

    def hypergradient(f: Callable[..., Tensor], g: Callable[..., Tensor]) -> Tensor:
        return hg.hypergradient(
            f, g, params, hparams, method=hg.Implicit(SOLVER, damping=1.0), on_failure="ignore"
        ).grads

    seconds: dict[str, list[float]] = {}
    found: dict[str, Tensor] = {}

    def timed(name: str, *objectives: Callable[..., Tensor]) -> None:
        began = time.perf_counter()
        found[name] = hypergradient(*objectives)
        seconds.setdefault(name, []).append(time.perf_counter() - began)

    for k in range(repeats + 1):
        # Which comes first changes: the second finds its code and data in the caches.
        for name in ("plain", "bare") if k % 2 else ("bare", "plain"):
            if name == "bare":
                with _bare():
                    timed(name, f, g)
            else:
                timed(name, f, g)
        with _one_rank():
            timed("beside", f, g)
            timed("parallel", *map(hg.distributed.DataParallel, (f, g)))
    if any(not torch.allclose(value, found["plain"]) for value in found.values()):
        raise RuntimeError(f"all ways must compute the same, got {found}")
    # The first round warms up.
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    plain = median["plain"]
    return RankCost(
        1e3 * plain, plain / median["bare"], median["beside"] / plain, median["parallel"] / plain
    )


@contextmanager
def _bare() -> Iterator[None]:
    """The functions of ``_sharding`` as they would be if there were no sharded tensors."""

    def same(value: Any, *_: Any, **__: Any) -> Any:
        return value

    def called(function: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        return function(*arguments)

    functions: dict[str, Any] = {
        "is_distributed": lambda value: False,
        "any_distributed": lambda values: False,
        "local": same, "parts": same, "full": same, "greatest": same, "placed": same,
        "replicated_like": same, "placed_alike": same, "elementwise": called, "through": called,
        "contributions": lambda parts: [part for part, _ in parts],
    }  # fmt: skip
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(sharding, name, function))
        yield


@contextmanager
def _one_rank() -> Iterator[None]:
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def print_cost(cost: RankCost) -> None:
    """Print the figures and what became of the goal."""
    met = "met" if cost.by_bare <= GOAL else "missed"
    print("\n## torch.distributed, unused and with one rank\n")
    print(
        f"A hypergradient without torch.distributed takes {cost.plain:.2f} ms, by hypergrad with "
        f"no look for sharded tensors × {cost.by_bare:.3f} (goal ≤ {GOAL}: {met})"
    )
    print(
        f"Beside a process group of one rank: × {cost.beside_a_group:.3f}; as means over that "
        f"rank, DataParallel: × {cost.data_parallel:.3f}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="hypergradients of each")
    options = parser.parse_args(argv)
    print(machine())
    print_cost(measure(options.repeats))


if __name__ == "__main__":
    main()
