"""Tune one weight decay per feature of a logistic regression by hypergradient, on real data.

    inner  f(w, φ) = mean logistic loss on the training rows + ½ Σ_j exp(φ_j) w_j²
    outer  g(w)    = mean logistic loss on the validation rows

The data are scikit-learn's breast-cancer measurements. Every method starts from the same uniform
decay; each outer step trains w to its minimum, asks for dg/dφ and takes one step of Adam on φ. The
best single decay of a grid is there to show what the other 29 are worth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import hypergrad as hg

Params = dict[str, Tensor]

# Functions, so that every use starts with a generator in its first state.
METHODS: dict[str, Callable[[], hg.LinearSolver]] = {
    "Dense": hg.Dense,
    "CG": lambda: hg.CG(rtol=1e-6),
    "Neumann, 100 terms": lambda: hg.Neumann(terms=100),
    "Nyström, rank 10": lambda: hg.Nystrom(
        rank=10, rho=0.1, generator=torch.Generator().manual_seed(0)
    ),
    "Identity": lambda: hg.Identity(scale=1.0),
}
SINGLE = "best single decay"
INITIAL_DECAY = 0.1


@dataclass(frozen=True)
class Split:
    """Rows of standardised features, shape ``(m, d)``, and labels 0 or 1, shape ``(m,)``."""

    X: Tensor
    y: Tensor

    def loss(self, w: Params) -> Tensor:
        """The mean logistic loss."""
        return F.binary_cross_entropy_with_logits(self.X @ w["weight"] + w["bias"], self.y)

    def accuracy(self, w: Params) -> float:
        """The share of rows on the right side, in percent."""
        return 100.0 * float(((self.X @ w["weight"] + w["bias"] > 0) == self.y).double().mean())


@dataclass(frozen=True)
class Data:
    """The three splits and the names of the features."""

    train: Split
    validation: Split
    test: Split
    features: list[str]

    def inner(self, w: Params, log_decay: Tensor) -> Tensor:
        """f: the bias has no decay of its own, but a little keeps its curvature from vanishing."""
        penalty = (log_decay.exp() * w["weight"].square()).sum() + 1e-4 * w["bias"].square().sum()
        return self.train.loss(w) + 0.5 * penalty

    def outer(self, w: Params, _log_decay: Tensor) -> Tensor:
        """The validation loss, g."""
        return self.validation.loss(w)


def load(seed: int) -> Data:
    """100 rows to train on, the rest halved; standardised with the training rows alone."""
    raw = load_breast_cancer()
    X, X_rest, y, y_rest = train_test_split(
        raw.data, raw.target, train_size=100, stratify=raw.target, random_state=seed
    )
    mean, scale = X.mean(0), X.std(0)
    X_val, X_test, y_val, y_test = train_test_split(
        X_rest, y_rest, train_size=0.5, stratify=y_rest, random_state=seed
    )

    def split(X: object, y: object) -> Split:
        return Split(torch.as_tensor((X - mean) / scale), torch.as_tensor(y, dtype=torch.float64))

    return Data(split(X, y), split(X_val, y_val), split(X_test, y_test), list(raw.feature_names))


def train(data: Data, w: Params, log_decay: Tensor) -> Params:
    """Minimise f over w from where it is, to a gradient of about 1e-9."""
    w = {name: value.clone().requires_grad_() for name, value in w.items()}
    optimiser = torch.optim.LBFGS(
        list(w.values()),
        max_iter=500,
        history_size=40,
        tolerance_grad=1e-9,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = data.inner(w, log_decay.detach())
        value.backward()
        return value

    optimiser.step(closure)
    return {name: value.detach() for name, value in w.items()}


def start(data: Data) -> tuple[Params, Tensor]:
    """The model trained with the uniform decay, and that decay."""
    features = len(data.features)
    zero = {"weight": torch.zeros(features).double(), "bias": torch.zeros(1).double()}
    log_decay = torch.full((features,), INITIAL_DECAY, dtype=torch.float64).log()
    return train(data, zero, log_decay), log_decay


def compare_methods(data: Data, repeats: int) -> None:
    """Print the error, cost and receipt of each method at the starting point."""
    w, log_decay = start(data)
    print("\nWhat hg.check says of the problem\n")
    print(hg.check(data.inner, data.outer, w, log_decay))
    results: dict[str, hg.Hypergradient] = {}
    milliseconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(repeats):
        for name, make in METHODS.items():
            solver = make()
            began = time.perf_counter()
            results[name] = hg.hypergradient(data.inner, data.outer, w, log_decay, solver=solver)
            milliseconds[name].append(1e3 * (time.perf_counter() - began))

    exact = results["Dense"].grads
    print(f"\nHypergradient at the start (n = {len(exact) + 1} parameters, {len(exact)} decays)\n")
    print(f"{'method':<20} {'relative error':>14} {'matvecs':>8} {'ms':>7}  status")
    for name, result in results.items():
        error = float((result.grads - exact).norm() / exact.norm())
        took = statistics.median(milliseconds[name])
        solve = result.solve
        print(f"{name:<20} {error:>14.1e} {solve.matvecs:>8} {took:>7.1f}  {solve.status.name}")


def tune(data: Data, solver: hg.LinearSolver, steps: int, name: str) -> tuple[list[float], Tensor]:
    """Validation loss before each of ``steps`` outer steps and after the last; the final log φ."""
    w, log_decay = start(data)
    log_decay.requires_grad_()
    optimiser = torch.optim.Adam([log_decay], lr=0.1)
    losses = []
    for _ in tqdm(range(steps), desc=f"tuning with {name}", leave=False):
        result = hg.hypergradient(data.inner, data.outer, w, log_decay, solver=solver)
        losses.append(result.outer_value)
        optimiser.zero_grad()
        hg.accumulate_grad(log_decay, result.grads)
        optimiser.step()
        w = train(data, w, log_decay)
    losses.append(float(data.validation.loss(w)))
    return losses, log_decay.detach()


def best_single_decay(data: Data) -> Tensor:
    """The uniform log φ of least validation loss, of four a decade."""
    w, log_decay = start(data)
    grid = torch.logspace(-4, 1, 21, dtype=torch.float64).log()
    uniform = [value.expand_as(log_decay) for value in grid]
    return min(uniform, key=lambda phi: float(data.validation.loss(train(data, w, phi))))


def print_splits(data: Data, decays: dict[str, Tensor]) -> None:
    """Print loss and accuracy on the three splits for each learned decay."""
    print("\nLoss and accuracy (%) before and after tuning\n")
    print(f"{'':<20} {'train':>15} {'validation':>15} {'test':>15}")
    for name, log_decay in decays.items():
        w = train(data, start(data)[0], log_decay)
        cells = [
            f"{float(split.loss(w)):>8.4f} {split.accuracy(w):>6.1f}"
            for split in (data.train, data.validation, data.test)
        ]
        print(f"{name:<20} {' '.join(cells)}")


def draw(data: Data, losses: dict[str, list[float]], decays: dict[str, Tensor], path: Path) -> None:
    """Save validation loss over outer steps, and the learned decay of each feature."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    # The exact methods lie on top of each other: each is drawn thinner than the one below it.
    looks = [("0.8", "-", 7), ("C0", "-", 2.5), ("C1", "--", 2), ("C2", "-.", 2), ("C3", ":", 2)]
    for (color, line, width), (name, curve) in zip(looks, losses.items(), strict=True):
        left.plot(curve, color=color, linestyle=line, linewidth=width, label=name)
    single = train(data, start(data)[0], decays[SINGLE])
    left.axhline(float(data.validation.loss(single)), color="black", linewidth=1, label=SINGLE)
    left.set(xlabel="outer step", ylabel="validation loss", title="Tuning 30 weight decays")
    left.legend()
    left.grid(alpha=0.3)

    learned = decays["CG"].exp()
    order = learned.argsort().tolist()
    right.barh(
        [data.features[i] for i in order],
        [float(learned[i]) - INITIAL_DECAY for i in order],
        left=INITIAL_DECAY,
    )
    right.axvline(INITIAL_DECAY, color="black", linestyle="--", label="at the start")
    right.set(xscale="log", xlabel="weight decay", title="Learned decay per feature (CG)")
    right.tick_params(axis="y", labelsize=8)
    right.grid(axis="x", alpha=0.3)
    right.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\npicture: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison, the tuning and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="outer steps for each method")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each method")
    parser.add_argument("--seed", type=int, default=0, help="of the split into three")
    default_output = Path(__file__).parent / "figures" / "weight_decay.png"
    parser.add_argument("--output", type=Path, default=default_output, help="the picture")
    options = parser.parse_args(argv)

    data = load(options.seed)
    sizes = [len(split.y) for split in (data.train, data.validation, data.test)]
    print(f"breast cancer: {sizes[0]} training, {sizes[1]} validation, {sizes[2]} test rows")
    compare_methods(data, options.repeats)

    losses: dict[str, list[float]] = {}
    decays = {"before": start(data)[1], SINGLE: best_single_decay(data)}
    for name, make in METHODS.items():
        losses[name], decays[name] = tune(data, make(), options.steps, name)
    print_splits(data, decays)
    draw(data, losses, decays, options.output)


if __name__ == "__main__":
    main()
