"""Learn the learning rate of each of 50 steps of Adam by hypergradient, on real data.

    inner  f(w, batch) = mean cross-entropy of a network on a mini-batch
    outer  g(w_50)     = mean cross-entropy on the validation rows

The data are scikit-learn's handwritten digits. The 50 rates are differentiated through the steps
that use them; the best constant rate of a grid, where the learning starts, is there to compare.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm

import hypergrad as hg

Params = dict[str, Tensor]

STEPS = 50
BATCH = 32
GRID = torch.logspace(-4, 0, 20).log()


@dataclass(frozen=True)
class Data:
    """A network at its start, the mini-batches of its 50 steps, and the other splits."""

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def loss(self, params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean cross-entropy."""
        x, y = batch
        return F.cross_entropy(functional_call(self.model, params, (x,)), y)

    def inner(self, params: Params, _: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """f, which does not depend on φ: the optimiser does."""
        return self.loss(params, batch)

    def outer(self, params: Params, _: Tensor) -> Tensor:
        """g, the validation loss."""
        return self.loss(params, self.validation)

    def start(self) -> Params:
        """The untrained parameters."""
        return {name: value.detach() for name, value in self.model.named_parameters()}


def load(seed: int) -> Data:
    """1000 rows to train on, the rest halved."""
    X, y = load_digits(return_X_y=True)
    X, X_rest, y, y_rest = train_test_split(X, y, train_size=1000, stratify=y, random_state=seed)
    X_val, X_test, y_val, y_test = train_test_split(
        X_rest, y_rest, train_size=0.5, stratify=y_rest, random_state=seed
    )

    def split(X: object, y: object) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(X, dtype=torch.float32) / 16.0, torch.as_tensor(y)

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    x, labels = split(X, y)
    rows = torch.randint(len(x), (STEPS, BATCH))
    batches = [(x[chosen], labels[chosen]) for chosen in rows]
    return Data(model, batches, split(X_val, y_val), split(X_test, y_test))


def adam(log_rates: Tensor) -> hg.optimizers.Adam:
    """Adam with one learning rate a step."""
    return hg.optimizers.Adam(lr=lambda step: log_rates[step].exp())


def train(data: Data, log_rates: Tensor) -> Params:
    """The parameters after the 50 steps."""
    with torch.no_grad():
        trained: Params = hg.unroll(
            data.inner, adam(log_rates), data.start(), log_rates, data.batches
        )
    return trained


def best_constant(data: Data) -> tuple[Tensor, list[float]]:
    """The constant log-rate of least validation loss, and the loss at each of the grid."""
    losses = [float(data.outer(train(data, rate.expand(STEPS)), rate)) for rate in GRID]
    return GRID[min(range(len(GRID)), key=losses.__getitem__)].expand(STEPS), losses


def learn(data: Data, log_rates: Tensor, steps: int) -> tuple[Tensor, list[float]]:
    """The log-rates after ``steps`` of outer Adam, and the validation loss before each."""
    log_rates = log_rates.clone().requires_grad_()
    outer_optimiser = torch.optim.Adam([log_rates], lr=0.05)
    method = hg.Unrolled(adam, data.batches)
    losses = []
    for _ in tqdm(range(steps), desc="learning the schedule", leave=False):
        result = hg.hypergradient(data.inner, data.outer, data.start(), log_rates, method=method)
        losses.append(result.outer_value)
        outer_optimiser.zero_grad()
        hg.accumulate_grad(log_rates, result.grads)
        outer_optimiser.step()
    return log_rates.detach(), losses


def print_results(data: Data, schedules: dict[str, Tensor]) -> None:
    """Print loss and accuracy on validation and test rows of each schedule."""
    print(f"\n{'':<22} {'validation loss':>15} {'test loss':>10} {'test accuracy':>14}")
    for name, log_rates in schedules.items():
        params = train(data, log_rates)
        x, y = data.test
        hits = functional_call(data.model, params, (x,)).argmax(1) == y
        validation, test = (float(data.loss(params, part)) for part in (data.validation, data.test))
        accuracy = 100 * float(hits.float().mean())
        print(f"{name:<22} {validation:>15.4f} {test:>10.4f} {accuracy:>13.1f}%")


def draw(
    schedules: dict[str, Tensor], grid_losses: list[float], losses: list[float], path: Path
) -> None:
    """Save the schedules, and the validation loss over the grid and over outer steps."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, log_rates), line in zip(schedules.items(), ("--", "-"), strict=True):
        left.plot(log_rates.exp().tolist(), line, marker=".", label=name)
    left.set(xlabel="step of Adam", ylabel="learning rate", title="Learning rate of each step")
    left.set_yscale("log")
    left.legend()
    right.plot(losses, label="learned schedule")
    right.axhline(min(grid_losses), color="black", linestyle="--", label="best constant rate")
    right.set(xlabel="outer step", ylabel="validation loss", title="Loss after 50 steps of Adam")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\npicture: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    """Search the grid, learn the schedule, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="outer steps")
    parser.add_argument("--seed", type=int, default=0, help="of the splits and the network")
    default_output = Path(__file__).parent / "figures" / "learned_schedule.png"
    parser.add_argument("--output", type=Path, default=default_output, help="the picture")
    options = parser.parse_args(argv)

    data = load(options.seed)
    constant, grid_losses = best_constant(data)
    print(
        f"digits: best of {len(GRID)} constant rates {float(constant[0].exp()):.4f}, "
        f"validation loss {min(grid_losses):.4f}"
    )
    learned, losses = learn(data, constant, options.steps)
    schedules = {"best constant rate": constant, "learned schedule": learned}
    print_results(data, schedules)
    draw(schedules, grid_losses, losses, options.output)


if __name__ == "__main__":
    main()
