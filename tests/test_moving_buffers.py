"""Buffers that the steps of f change and g reads: part of the hypergradient, or told by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from unrolled import MEMORIES

import hypergrad as hg


class Centre(nn.Module):
    """Subtracts a running mean, which ``update`` moves while training."""

    def __init__(self, update: Callable[[Centre, Tensor], None]) -> None:
        super().__init__()
        self.update = update
        self.register_buffer("centre", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.update(self, x)
        return x - self.centre


class OwnNorm(nn.BatchNorm1d):
    """Batch norm by PyTorch's functions, as libraries write it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(
            torch.batch_norm(
                x, self.weight, self.bias, self.running_mean, self.running_var,
                self.training, 0.2, 1e-4, False,
            )
        )  # fmt: skip


class Recomputed(nn.Module):
    """Batch norm inside activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.norm(x).tanh(), x, use_reentrant=False)


def replace(module: Centre, x: Tensor) -> None:
    module.centre = 0.8 * module.centre + 0.2 * x.mean(0)


def without_graph(module: Centre, x: Tensor) -> None:
    with torch.no_grad():
        module.centre.mul_(0.8).add_(x.mean(0), alpha=0.2)


def detached(module: Centre, x: Tensor) -> None:
    module.centre = 0.8 * module.centre + 0.2 * x.mean(0).detach()


MIDDLES: dict[str, Callable[[], list[nn.Module]]] = {
    "batch norm": lambda: [nn.BatchNorm1d(6)],
    "cumulative average": lambda: [nn.BatchNorm1d(6, momentum=None, affine=False)],
    "two dimensions": lambda: [nn.Unflatten(1, (3, 2, 1)), nn.BatchNorm2d(3), nn.Flatten()],
    "instance norm": lambda: [
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ],
    "of a library": lambda: [OwnNorm(6)],
    "checkpointed": lambda: [Recomputed()],
    "own mean, also read by f": lambda: [Centre(replace)],
}  # fmt: skip


class Task:
    """Regression with validation in eval mode; φ is the log of the learning rate."""

    def __init__(self, middle: list[nn.Module]) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 1)
        self.model = nn.Sequential(*layers).double()
        self.X, self.y = torch.randn(40, 4).double(), torch.randn(40).double()
        self.Xv, self.yv = torch.randn(20, 4).double() + 0.3, torch.randn(20).double()
        self.batches = [torch.randint(0, 40, (12,)) for _ in range(5)]
        self.start = {key: value.clone() for key, value in self.model.state_dict().items()}

    def inner(self, params: Any, hparams: Any, rows: Tensor) -> Tensor:
        self.model.train()
        output = functional_call(self.model, params, (self.X[rows],))[:, 0]
        return (output - self.y[rows]).square().mean()

    def outer(self, params: Any, hparams: Any, _: Any = None) -> Tensor:
        self.model.eval()
        return (functional_call(self.model, params, (self.Xv,))[:, 0] - self.yv).square().mean()

    def run(self, rate: Tensor, **options: Any) -> Any:
        self.model.load_state_dict(self.start)
        method = hg.Unrolled(
            lambda h: hg.optimizers.SGD(lr=h.exp(), momentum=0.5), steps=self.batches, **options
        )
        params = {key: value.detach().clone() for key, value in self.model.named_parameters()}
        return hg.hypergradient(self.inner, self.outer, params, rate, method=method)

    def differences(self, rate: Tensor, step: float = 1e-5) -> float:
        values = [self.run(rate + sign * step).outer_value for sign in (1, -1)]
        return (values[0] - values[1]) / (2 * step)


RATE = torch.tensor(-1.0, dtype=torch.float64)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("middle", MIDDLES)
def test_statistics_that_the_steps_move_are_differentiated(middle: str, memory: Any) -> None:
    task = Task(MIDDLES[middle]())
    grads = task.run(RATE, memory=memory).grads
    assert float(grads) == pytest.approx(task.differences(RATE), rel=1e-6)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("middle", ["batch norm", "own mean, also read by f"])
def test_also_where_only_later_steps_read_them(middle: str, memory: Any) -> None:
    """g normalises by its own batch."""
    task = Task(MIDDLES[middle]())

    def outer(params: Any, hparams: Any) -> Tensor:
        task.model.train()
        return (functional_call(task.model, params, (task.Xv,))[:, 0] - task.yv).square().mean()

    task.outer = outer  # type: ignore[method-assign]
    grads = task.run(RATE, memory=memory).grads
    assert float(grads) == pytest.approx(task.differences(RATE), rel=1e-6)


@pytest.mark.parametrize("mode", ["forward", "finite-difference"])
def test_in_every_mode_of_products(mode: Any) -> None:
    task = Task([nn.BatchNorm1d(6)])
    assert float(task.run(RATE, mode=mode).grads) == pytest.approx(task.differences(RATE), rel=1e-6)


@pytest.mark.parametrize("options", [{"truncate": 2}, {"first_order": True}])
def test_all_memories_agree_on_biased_derivatives_too(options: dict[str, Any]) -> None:
    task = Task([nn.BatchNorm1d(6)])
    found = [float(task.run(RATE, memory=memory, **options).grads) for memory in MEMORIES]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-9)


# f itself reads what it changes there, so that its own derivatives lack a part as well.
@pytest.mark.filterwarnings("ignore::hypergrad.errors.VerificationWarning")
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("update", [without_graph, detached])
def test_a_buffer_changed_out_of_sight_is_named(update: Any, memory: Any) -> None:
    task = Task([Centre(update)])
    with pytest.warns(hg.HypergradWarning, match=r"outer reads the buffer '1\.centre'.*no_grad"):
        task.run(RATE, memory=memory)


@pytest.mark.filterwarnings("ignore::hypergrad.errors.VerificationWarning")
def test_no_word_where_outer_does_not_read_what_was_changed() -> None:
    """By the filter of the tests, which turns a warning into an error."""
    task = Task([Centre(without_graph)])
    method = hg.Unrolled(hg.optimizers.SGD(lr=0.1), steps=task.batches)
    params = dict(task.model.named_parameters())
    decay = lambda w, h: h * w["0.weight"].square().sum()  # noqa: E731
    hg.hypergradient(task.inner, decay, params, RATE, method=method)


def test_the_modules_end_with_the_values_of_training() -> None:
    """Plain tensors, with the statistics that five steps leave."""
    task = Task([nn.BatchNorm1d(6)])
    task.run(RATE)
    buffers = dict(task.model.named_buffers())
    assert not any(buffer.requires_grad for buffer in buffers.values())
    assert int(buffers["1.num_batches_tracked"]) == len(task.batches)


def test_in_the_loop() -> None:
    """One outer step of SGD at rate 1 moves φ by the hypergradient."""
    task = Task([nn.BatchNorm1d(6)])
    right = task.differences(RATE)
    task.model.load_state_dict(task.start)
    rate = RATE.clone().requires_grad_()
    hg.BilevelSolver(
        hg.Level(
            task.inner,
            dict(task.model.named_parameters()),
            lambda h: hg.optimizers.SGD(lr=h.exp(), momentum=0.5),
            task.batches,
        ),
        hg.Level(task.outer, rate, torch.optim.SGD([rate], 1.0)),
        method=hg.Unrolled(),
        inner_steps=5,
        outer_steps=1,
        seed=0,
    ).run()
    assert float(RATE - rate.detach()) == pytest.approx(right, rel=1e-6)


def implicit(task: Task) -> Any:
    params = {key: value.detach() for key, value in task.model.named_parameters()}
    rows = task.batches[0]
    return hg.hypergradient(
        lambda w, h: task.inner(w, h, rows) + h.exp() * sum(p.square().sum() for p in w.values()),
        task.outer,
        params,
        RATE,
        method=hg.Implicit(damping=10.0),
    )


@pytest.mark.parametrize("middle", ["batch norm", "instance norm", "of a library"])
def test_the_implicit_derivative_names_the_statistics_that_it_leaves_out(middle: str) -> None:
    task = Task(MIDDLES[middle]())
    with pytest.warns(hg.HypergradWarning, match=r"outer reads the buffer .*running_.*Unrolled"):
        implicit(task)


def test_the_implicit_derivative_is_quiet_where_the_remedies_are_taken() -> None:
    """By the filter of the tests, which turns a warning into an error."""
    by_batch, frozen = Task([nn.BatchNorm1d(6)]), Task([nn.BatchNorm1d(6)])
    by_batch.model.eval = lambda: by_batch.model.train()  # type: ignore[method-assign]
    frozen.model.train = lambda mode=True: nn.Module.train(frozen.model, False)  # type: ignore[method-assign]
    implicit(by_batch)
    implicit(frozen)
