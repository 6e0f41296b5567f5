"""Unrolled hypergradients by memory mode, beside the libraries that keep every step's graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad as hg
from benchmarks.memory import can_be_measured
from benchmarks.processes import unroll_memory
from benchmarks.timing import median_seconds
from hypergrad.unrolling.unroll import Memory

Params = dict[str, Tensor]

COUNTS = (10, 50, 200)
MODES: tuple[Memory, ...] = ("graph", "recompute", "checkpoint", "forward")
FORWARD_PRODUCTS = "recompute, forward over reverse"
PEERS = ("higher", "torchopt")
LR, MOMENTUM = 0.1, 0.9


@dataclass(frozen=True)
class Task:
    """Classification with one log-decay per parameter tensor, trained by SGD with momentum.

    Attributes:
        model: the network, whose parameters are θ_0.
        data: inputs and labels.
        validation: others.
        hparams: φ.
    """

    model: nn.Module
    data: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    hparams: Tensor

    def inner(self, params: Params, hparams: Tensor) -> Tensor:
        """Cross-entropy and ½ Σ_k exp(φ_k) ‖θ_k‖²."""
        squares = torch.stack([tensor.square().sum() for tensor in params.values()])
        x, y = self.data
        loss = F.cross_entropy(functional_call(self.model, params, (x,)), y)
        return loss + 0.5 * (hparams.exp() * squares).sum()

    def outer(self, params: Params, _: Tensor) -> Tensor:
        """Cross-entropy on the other data."""
        x, y = self.validation
        return F.cross_entropy(functional_call(self.model, params, (x,)), y)

    def params(self) -> Params:
        """θ_0."""
        return {key: value.detach() for key, value in self.model.named_parameters()}


def task(quick: bool = False) -> Task:
    """64-256-256-10 on 2048 rows."""
    width, rows = (16, 64) if quick else (256, 2048)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    batches = [(torch.randn(rows, 64), torch.randint(10, (rows,))) for _ in range(2)]
    return Task(model, batches[0], batches[1], torch.full((6,), -4.0))


def available() -> list[str]:
    """The memory modes, and the peers that are installed."""
    return [*MODES, FORWARD_PRODUCTS, *(peer for peer in PEERS if importlib.util.find_spec(peer))]


def hypergradient(work: Task, method: str, steps: int) -> Tensor:
    """dg/dφ through ``steps`` steps, by a memory mode or by a peer."""
    if method == "higher":
        return _higher(work, steps)
    if method == "torchopt":
        return _torchopt(work, steps)
    optimizer = hg.optimizers.SGD(lr=LR, momentum=MOMENTUM)
    if method == FORWARD_PRODUCTS:
        unrolled = hg.Unrolled(optimizer, steps, mode="forward")
    else:
        unrolled = hg.Unrolled(optimizer, steps, memory=method)  # type: ignore[arg-type]
    result = hg.hypergradient(work.inner, work.outer, work.params(), work.hparams, method=unrolled)
    grads: Tensor = result.grads
    return grads


def _higher(work: Task, steps: int) -> Tensor:
    import higher

    hparams = work.hparams.clone().requires_grad_()
    optimizer = torch.optim.SGD(work.model.parameters(), lr=LR, momentum=MOMENTUM)
    with higher.innerloop_ctx(work.model, optimizer) as (model, differentiable):
        for _ in range(steps):
            squares = torch.stack([tensor.square().sum() for tensor in model.parameters()])
            x, y = work.data
            loss = F.cross_entropy(model(x), y)
            differentiable.step(loss + 0.5 * (hparams.exp() * squares).sum())
        x, y = work.validation
        return torch.autograd.grad(F.cross_entropy(model(x), y), hparams)[0]


def _torchopt(work: Task, steps: int) -> Tensor:
    import torchopt

    hparams = work.hparams.clone().requires_grad_()
    optimizer = torchopt.FuncOptimizer(torchopt.sgd(lr=LR, momentum=MOMENTUM))
    params = {key: value.clone().requires_grad_() for key, value in work.params().items()}
    for _ in range(steps):
        params = optimizer.step(work.inner(params, hparams), params)
    return torch.autograd.grad(work.outer(params, hparams), hparams)[0]


@dataclass(frozen=True)
class Unrolling:
    """What one method costs.

    Attributes:
        method: a memory mode, or a peer.
        seconds: by the number of steps.
        mebibytes: the peak by the number of steps; empty where it cannot be measured.
    """

    method: str
    seconds: dict[int, float]
    mebibytes: dict[int, float]


def measure(counts: Sequence[int], repeats: int, quick: bool) -> list[Unrolling]:
    """Time and peak memory of each method; what is slow is timed at the fewest steps only."""
    work = task(quick)
    expected = hypergradient(work, "graph", counts[0])
    for method in available():
        error = (hypergradient(work, method, counts[0]) - expected).norm() / expected.norm()
        if error > 1e-3:
            raise RuntimeError(f"{method} differs from the full graph by {float(error):.1e}")
    seconds = {
        steps: median_seconds(
            {
                method: partial(hypergradient, work, method, steps)
                for method in available()
                if steps == counts[0] or method not in ("forward", FORWARD_PRODUCTS)
            },
            max(3, repeats * counts[0] // steps),
        )
        for steps in counts
    }
    return [
        Unrolling(
            method,
            {steps: found[method] for steps, found in seconds.items() if method in found},
            {steps: unroll_memory(method, steps, quick) for steps in counts}
            if can_be_measured()
            else {},
        )
        for method in available()
    ]


def copies_a_step(row: Unrolling, quick: bool) -> float:
    """The growth of the peak with the steps, in copies of parameters and momentum."""
    few, many = sorted(row.mebibytes)[-2:]
    grown = (row.mebibytes[many] - row.mebibytes[few]) / (many - few) * 2**20
    scalars = 2 * sum(tensor.numel() for tensor in task(quick).params().values())
    return grown / (4 * scalars)
