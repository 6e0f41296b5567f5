"""Training code as libraries have it: lightning, accelerate, and a language model in the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import lightning
import pytest
import torch
from language import VOCABULARY, gpt2
from reference import Call, Problem, certify
from torch import Tensor, nn
from torch.nn import functional as F

import hypergrad as hg


class Classifier(lightning.LightningModule):
    """Its losses are methods that are not ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y, weights = batch
        return (weights * F.cross_entropy(self.net(x), y, reduction="none")).mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class Step(nn.Module):
    """A module whose ``forward`` calls a method of another one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, *arguments: Any) -> Any:
        return getattr(self.module, method)(*arguments)


def test_the_losses_of_a_lightning_module_agree_with_first_derivatives() -> None:
    x, x_val = torch.randn(2, 20, 6)
    y, y_val = torch.randint(0, 3, (2, 20))

    def inner(call: Call, hparams: Tensor) -> Tensor:
        return call("training_step", (x, y, hparams.sigmoid()), 0)

    def outer(call: Call, hparams: Tensor) -> Tensor:
        return call("validation_step", (x_val, y_val), 0)

    certify(Problem(Step(Classifier()), inner, outer, torch.randn(20)).trained())


def digits_loop(prepare: Callable[..., Any], method: Any) -> tuple[list[float], Tensor]:
    """A loop over a network with batch norm, after ``prepare(model, optimizer, scheduler)``."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    optimizer: Any = torch.optim.AdamW(model.parameters(), 1e-2)
    scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    model, optimizer, scheduler = prepare(model, optimizer, scheduler)
    weights = torch.zeros(20, requires_grad=True)

    def inner(net: Any, hparams: Tensor, batch: None) -> Tensor:
        losses = F.cross_entropy(net(x[:20]), y[:20], reduction="none")
        return (hparams.sigmoid() * losses).mean()

    def outer(net: Any, hparams: Tensor, batch: None) -> Tensor:
        return F.cross_entropy(net(x[20:]), y[20:])

    solver = hg.BilevelSolver(
        hg.Level(inner, model, optimizer, scheduler=scheduler),
        hg.Level(outer, weights, torch.optim.Adam([weights], 0.1)),
        method=method, inner_steps=5, outer_steps=3, seed=0,
    )  # fmt: skip
    return list(solver.run()["outer_loss"]), weights.detach()


def accelerated(*parts: Any) -> Any:
    return accelerate.Accelerator(cpu=True).prepare(*parts)


def fabricated(model: nn.Module, optimizer: Any, scheduler: Any) -> Any:
    return *lightning.Fabric(accelerator="cpu", devices=1).setup(model, optimizer), scheduler


@pytest.mark.parametrize("prepare", [accelerated, fabricated])
@pytest.mark.parametrize("method", [hg.Implicit(hg.CG(rtol=1e-6), damping=1.0), hg.Unrolled()])
def test_what_a_launcher_prepared_is_trained_as_what_it_was(prepare: Any, method: Any) -> None:
    plain, prepared = (digits_loop(how, method) for how in (lambda *parts: parts, prepare))
    assert prepared[0] == plain[0]
    torch.testing.assert_close(prepared[1], plain[1], rtol=0.0, atol=0.0)


# AdamW leaves negative curvature behind, and the default damping says how much it took.
@pytest.mark.filterwarnings("ignore::hypergrad.DampingWarning")
def test_a_language_model_learns_which_sequences_count() -> None:
    torch.set_default_dtype(torch.float32)
    model = gpt2()
    start, stride = torch.randint(0, VOCABULARY, (64, 1)), torch.randint(1, 4, (64, 1))
    clean = (start + stride * torch.arange(8)) % VOCABULARY
    noisy = torch.cat([torch.randint(0, VOCABULARY, (16, 8)), clean[:16]])
    weights = torch.zeros(32, requires_grad=True)

    def inner(net: Any, hparams: Tensor, batch: None) -> Tensor:
        logits = net(noisy).logits
        losses = F.cross_entropy(logits[:, :-1].mT, noisy[:, 1:], reduction="none").mean(1)
        return (hparams.sigmoid() * losses).mean()

    def outer(net: Any, hparams: Tensor, batch: None) -> Tensor:
        return net(clean[32:], labels=clean[32:]).loss

    solver = hg.BilevelSolver(
        hg.Level(inner, model, torch.optim.AdamW(model.parameters(), 1e-2)),
        hg.Level(outer, weights, torch.optim.Adam([weights], 0.1)),
        inner_steps=10, outer_steps=8,
    )  # fmt: skip
    history = solver.run()
    assert min(history["hypergradient_norm"]) > 0.0
    assert history["outer_loss"][-1] < history["outer_loss"][0]
    assert weights[:16].mean() < weights[16:].mean()
