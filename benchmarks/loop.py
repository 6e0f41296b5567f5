"""The overhead of :class:`hypergrad.BilevelSolver` over a hand-written loop that does the same.

``python -m benchmarks.loop`` prints it. An outer step is five of SGD on a network, the
hypergradient by five iterations of CG, and one of Adam on a log-decay for each tensor.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

import hypergrad as hg
from benchmarks.timing import machine, median_seconds, one_thread
from hypergrad.minibatches import bind

Params: TypeAlias = dict[str, Tensor]
Batch: TypeAlias = tuple[Tensor, Tensor]

INNER_STEPS = 5
SOLVER = hg.CG(rtol=0.0, maxiter=5)
DAMPING = 1.0
LR, OUTER_LR = 0.1, 0.01
GOAL = 1.05
REPEATS = 200


@dataclass(frozen=True)
class Overhead:
    """Milliseconds of an outer step, medians of alternating runs.

    Attributes:
        solver: by :class:`hypergrad.BilevelSolver`.
        by_hand: by the loop below.
        ratio: the first by the second.
    """

    solver: float
    by_hand: float
    ratio: float


@dataclass(frozen=True)
class Task:
    """Classification by a network: mini-batches, others for validation, and where to start."""

    batches: list[Batch]
    validation: list[Batch]
    params: Params
    hparams: Tensor

    def start(self) -> tuple[Params, Tensor]:
        """Copies of both parameters."""
        return {key: t.clone() for key, t in self.params.items()}, self.hparams.clone()


def task(quick: bool = False) -> Task:
    """64-128-128-10, batches of 256 rows."""
    width, rows = (16, 32) if quick else (128, 256)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[0] ** -0.5

    def batch() -> Batch:
        return draw(rows, 64) * rows**0.5, torch.randint(10, (rows,), generator=generator)

    sizes = (64, width, width, 10)
    params = {f"W{k}": draw(sizes[k], sizes[k + 1]) for k in range(3)}
    return Task(
        [batch() for _ in range(8)], [batch() for _ in range(4)], params, torch.full((3,), -4.0)
    )


def loss(params: Params, batch: Batch) -> Tensor:
    """The mean cross-entropy."""
    x, labels = batch
    hidden = torch.tanh(torch.tanh(x @ params["W0"]) @ params["W1"])
    return F.cross_entropy(hidden @ params["W2"], labels)


def inner(params: Params, decay: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy and ½ Σ_k exp(φ_k) ‖θ_k‖²."""
    squares = torch.stack([tensor.square().sum() for tensor in params.values()])
    return loss(params, batch) + 0.5 * (decay.exp() * squares).sum()


def outer(params: Params, decay: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return loss(params, batch)


def by_solver(task: Task) -> Iterator[Tensor]:
    """φ after each outer step of the solver."""
    params, hparams = task.start()
    optimizer = torch.optim.SGD(list(params.values()), lr=LR)
    solver = hg.BilevelSolver(
        hg.Level(inner, params, optimizer, task.batches),
        hg.Level(outer, hparams, torch.optim.Adam([hparams], lr=OUTER_LR), task.validation),
        method=hg.Implicit(SOLVER, damping=DAMPING, warm_start=False),
        inner_steps=INNER_STEPS,
        outer_steps=10**9,
        # A fixed number of iterations ends before the tolerance, which is meant here.
        on_failure="ignore",
        seed=0,
    )
    for _ in solver:
        yield hparams


def by_hand(task: Task) -> Iterator[Tensor]:
    """φ after each outer step, as one writes the loop without the solver."""
    params, hparams = task.start()
    for tensor in params.values():
        tensor.requires_grad_()
    sgd = torch.optim.SGD(list(params.values()), lr=LR)
    adam = torch.optim.Adam([hparams], lr=OUTER_LR)
    batches, validation = cycle(task.batches), cycle(task.validation)
    while True:
        for _ in range(INNER_STEPS):
            sgd.zero_grad()
            inner(params, hparams, next(batches)).backward()
            sgd.step()
        hparams.grad = hg.hypergradient(
            bind(inner, next(batches)),
            bind(outer, next(validation)),
            params,
            hparams,
            method=hg.Implicit(SOLVER, damping=DAMPING),
            on_failure="ignore",
        ).grads
        adam.step()
        yield hparams


@one_thread()
def measure(repeats: int, quick: bool = False) -> Overhead:
    """Both loops in turn, step by step, on one thread.

    Raises:
        RuntimeError: they do not compute the same φ.
    """
    work = task(quick)
    loops = {"solver": by_solver(work), "by hand": by_hand(work)}
    seconds = median_seconds({name: loop.__next__ for name, loop in loops.items()}, repeats)
    ends = [next(loop) for loop in loops.values()]
    if not torch.equal(*ends):
        raise RuntimeError(f"the loops must compute the same, got {ends[0]} and {ends[1]}")
    milliseconds = {name: 1e3 * median for name, median in seconds.items()}
    return Overhead(
        milliseconds["solver"], milliseconds["by hand"], seconds["solver"] / seconds["by hand"]
    )


def print_overhead(overhead: Overhead) -> None:
    """Print the figures and what became of the goal."""
    met = "met" if overhead.ratio <= GOAL else "missed"
    print("\n## The loop beside a hand-written one\n")
    print(
        f"An outer step of BilevelSolver takes {overhead.solver:.1f} ms, by hand "
        f"{overhead.by_hand:.1f} ms: × {overhead.ratio:.3f} (goal ≤ {GOAL}: {met})"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="outer steps of each")
    options = parser.parse_args(argv)
    print(machine())
    print_overhead(measure(options.repeats))


if __name__ == "__main__":
    main()
