"""Classify the digits of MNIST by a layer of infinite depth: a deep equilibrium network.

    z* = Φ(z*, x) = tanh(W z* + U x + b),   logits = A z* + c

`hg.fixed_point` makes a layer of the iteration that finds z*. Its backward pass solves

    (I − ∂Φ/∂z)ᵀ v = ∂loss/∂z*,   then   gradient = (∂Φ/∂(W, U, b))ᵀ v

at z*, by products with the transposed Jacobian of Φ; of the steps before nothing is kept. tanh has
slopes of at most 1, so that Φ contracts in z where ‖W‖₂ < 1: W is a weight that is scaled down to a
norm of 0.9. So there is one equilibrium for each x, and the iterations of both passes converge.

It is compared with plain autograd through all steps of the same iteration, with the gradient of the
last step alone (Jacobian-free backpropagation, Fung et al. 2022: the identity in place of a solve),
and with a network of one layer and as many parameters, all trained by Adam as it is by default.

Bai, Kolter & Koltun 2019, *Deep equilibrium models*. `--full` takes all 60,000 images.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import hypergrad as hg
import mnist
import report

Rows = tuple[Tensor, Tensor]  # pixels from 0 to 1, shape (n, pixels), and labels, shape (n,)
Row = dict[str, Any]
Layer = Callable[..., Tensor]  # of W and of what each row brings, shape (n, hidden)

# --- your part ------------------------------------------------------------------------------------


def cell(z: Tensor, weight: Tensor, drive: Tensor) -> Tensor:
    """Φ: a step towards the equilibrium of each row of z, shape (n, hidden)."""
    return torch.tanh(z @ weight.T + drive)


def settle(
    weight: Tensor,
    drive: Tensor,
    rtol: float = 1e-4,
    maxiter: int = 200,
    changes: list[float] | None = None,
) -> Tensor:
    """z*, by steps from zero until one changes z by less than ``rtol`` of its norm."""
    z, changes = torch.zeros_like(drive), [] if changes is None else changes
    while len(changes) < maxiter and not (changes and changes[-1] <= rtol):
        last, z = z, cell(z, weight, drive)
        changes.append(float((z - last).detach().norm() / z.detach().norm()))
    return z


class Classifier(nn.Module):
    """Logits of the equilibrium to which an image drives the hidden units."""

    def __init__(self, pixels: int, hidden: int, layer: Layer, bound: float) -> None:
        super().__init__()
        self.layer, self.bound = layer, bound
        self.drive = nn.Linear(pixels, hidden)
        self.weight = nn.Parameter(torch.randn(hidden, hidden) / hidden**0.5)
        self.read = nn.Linear(hidden, 10)

    def contraction(self) -> Tensor:
        """W: the weight, scaled down to the bound if its largest singular value is above."""
        norm = torch.linalg.matrix_norm(self.weight, 2)
        return self.weight * (self.bound / norm).clamp(max=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (n, 10)."""
        return self.read(self.layer(self.contraction(), self.drive(x)))


def train(model: nn.Module, rows: Rows, epochs: int) -> Iterator[None]:
    """Adam on mini-batches, with a pause after each epoch for whoever wants to look."""
    optimiser = torch.optim.Adam(model.parameters())
    for _ in range(epochs):
        for x, y in DataLoader(TensorDataset(*rows), batch_size=100, shuffle=True):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
        yield


equilibrium = hg.fixed_point(cell, solver=hg.FixedPoint(rtol=1e-3))(settle)

# --- the end of your part -------------------------------------------------------------------------

MAIN, UNROLLED, SHALLOW = "equilibrium, FixedPoint", "unrolled", "one layer, as many parameters"
LAYERS: dict[str, Layer] = {
    MAIN: equilibrium,
    "equilibrium, GMRES": hg.fixed_point(cell, solver=hg.GMRES(rtol=1e-3))(settle),
    "equilibrium, Identity (JFB)": hg.fixed_point(cell, solver=hg.Identity())(settle),
    UNROLLED: settle,
}
SOLVERS: dict[str, hg.LinearSolver] = {
    "FixedPoint, memory 5": hg.FixedPoint(rtol=1e-6, record_residuals=True),
    "FixedPoint, memory 0 (plain)": hg.FixedPoint(rtol=1e-6, memory=0, record_residuals=True),
    "GMRES": hg.GMRES(rtol=1e-6, record_residuals=True),
}
METHOD, ACCURACY, ERROR, KEPT = "method", "test accuracy, %", "gradient error", "kept, kB"
FORWARD, CHANGE = "steps forward", "last change of z"
BACKWARD, RESIDUAL = "products backward", "residual backward"
BOUNDS = {"0.5": 0.5, "0.9": 0.9, "0.99": 0.99, "none": 1e6}
CONTRAST = (UNROLLED, MAIN)
FOREVER = -1.0  # a tolerance that no step meets


class Data(NamedTuple):
    """Rows to train on and to test, and those on which a model is looked at."""

    train: Rows
    test: Rows
    probe: Rows


class Run(NamedTuple):
    """A trained model, with its test accuracy and its solves after each epoch."""

    model: nn.Module
    curve: list[float]
    seconds: float
    solves: list[Row]


Runs = dict[str, list[Run]]


def shallow(pixels: int, hidden: int) -> nn.Module:
    """One hidden layer, with no fewer parameters than the equilibrium network."""
    width = -(-hidden * (pixels + hidden + 11) // (pixels + 11))
    return nn.Sequential(nn.Linear(pixels, width), nn.Tanh(), nn.Linear(width, 10))


def accuracy(model: nn.Module, rows: Rows) -> float:
    """The share of right answers, in percent."""
    with torch.no_grad():
        return 100.0 * float((model(rows[0]).argmax(1) == rows[1]).double().mean())


def gradient(model: Classifier, layer: Layer, rows: Rows, **options: Any) -> Tensor:
    """Of the loss in W, U and b, by any layer in place of the model's."""
    z = layer(model.contraction(), model.drive(rows[0]), **options)
    loss = F.cross_entropy(model.read(z), rows[1])
    parts = torch.autograd.grad(loss, [model.weight, *model.drive.parameters()])
    return torch.cat([part.flatten() for part in parts])


def solves(model: Classifier, rows: Rows, solver: hg.LinearSolver) -> tuple[Row, list[float]]:
    """What both passes take for these rows as things are, and the residuals of the backward one."""
    changes: list[float] = []
    held = hg.WarmStart()  # nothing is started warm: the receipt is in it
    layer = hg.fixed_point(cell, solver=solver, warm_start=held, on_failure="ignore")(settle)
    gradient(model, layer, rows, changes=changes)
    receipt = held.solution
    assert receipt is not None
    row = {
        FORWARD: len(changes),
        CHANGE: changes[-1],
        BACKWARD: receipt.matvecs,
        RESIDUAL: receipt.relative_residual,
        "status": receipt.status.name,
    }
    return row, [*(receipt.residuals or ())]


def fit(model: nn.Module, data: Data, epochs: int, bar: Any) -> Run:
    """Train, and look at the model after each epoch."""
    curve, table, seconds, began = [], [], 0.0, time.process_time()
    for _ in train(model, data.train, epochs):
        seconds += time.process_time() - began
        curve.append(accuracy(model, data.test))
        if isinstance(model, Classifier):
            row, _ = solves(model, data.probe, hg.FixedPoint(rtol=1e-3))
            table.append({"epoch": len(curve), **row, ACCURACY: curve[-1]})
        bar.update()
        began = time.process_time()
    return Run(model, curve, seconds, table)


def kept(model: Classifier, layer: Layer, x: Tensor, **options: Any) -> float:
    """The kB that autograd keeps between the passes of a layer, each piece of memory once."""
    pieces: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        pieces[storage.data_ptr()] = storage.nbytes()
        return tensor

    weight, drive = (t.detach().requires_grad_() for t in (model.contraction(), model.drive(x)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z = layer(weight, drive, **options)
    assert z.requires_grad  # it holds all that was packed
    return sum(pieces.values()) / 1e3


def compare(data: Data, hidden: int, bound: float, epochs: int, seeds: Sequence[int]) -> Runs:
    """The runs of each method, one a seed, all from the same weights."""
    pixels = data.train[0].shape[1]
    runs: Runs = {name: [] for name in (*LAYERS, SHALLOW)}
    with tqdm(total=len(runs) * len(seeds) * epochs, desc="epochs", leave=False) as bar:
        for seed in seeds:
            for name in runs:
                torch.manual_seed(seed)
                model = (
                    Classifier(pixels, hidden, LAYERS[name], bound)
                    if name in LAYERS
                    else shallow(pixels, hidden)
                )
                runs[name].append(fit(model, data, epochs, bar))
    return runs


def summary(runs: Runs, model: Classifier, data: Data) -> list[Row]:
    """A row for each method; its gradient and what it keeps are those at one model."""
    exact = gradient(model, settle, data.probe, rtol=FOREVER)
    rows = []
    for name, some in runs.items():
        ends = [run.curve[-1] for run in some]
        row: dict[str, Any] = {
            METHOD: name,
            "parameters": sum(p.numel() for p in some[0].model.parameters()),
            ACCURACY: statistics.mean(ends),
            "±": statistics.stdev(ends) if len(ends) > 1 else None,
            "CPU seconds": statistics.mean(run.seconds for run in some),
        }
        if name in LAYERS:
            found = gradient(model, LAYERS[name], data.probe)
            row[FORWARD] = statistics.mean(run.solves[-1][FORWARD] for run in some)
            row[ERROR] = float((found - exact).norm() / exact.norm())
            row[KEPT] = kept(model, LAYERS[name], data.probe[0])
        rows.append(row)
    return rows


def loosen(data: Data, hidden: int, seed: int) -> tuple[list[Row], dict[str, list[float]]]:
    """What becomes of the solves under other bounds in an epoch, and how z converges then."""
    # Where the iteration does not converge, the solves fail: the table says it.
    layer = hg.fixed_point(cell, solver=hg.FixedPoint(rtol=1e-3), on_failure="ignore")(settle)
    rows: list[Row] = []
    curves: dict[str, list[float]] = {}
    with tqdm(total=len(BOUNDS), desc="bounds", leave=False) as bar:
        for name, bound in BOUNDS.items():
            torch.manual_seed(seed)
            model = Classifier(data.train[0].shape[1], hidden, layer, bound)
            run = fit(model, data, 1, bar)
            rows.append({"bound of ‖W‖": name, **run.solves[-1]})
            curves[name] = []
            gradient(model, layer, data.probe, rtol=FOREVER, maxiter=60, changes=curves[name])
    return rows, curves


def memory(model: Classifier, x: Tensor) -> list[Row]:
    """The kB kept, against the number of steps."""
    never = {"rtol": FOREVER}
    return [
        {"steps": n}
        | {f"{name}, kB": kept(model, LAYERS[name], x, maxiter=n, **never) for name in CONTRAST}
        for n in (1, 2, 5, 10, 20, 50, 100)
    ]


def draw(
    runs: Runs, table: list[Row], changes: dict[str, list[float]], backward: dict[str, list[float]]
) -> Figure:
    """Accuracy over epochs, memory against steps, and the convergence of both passes."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    lines = ("-", "--", "-.", ":", "-")
    for (name, some), line in zip(runs.items(), lines, strict=True):
        means = [statistics.mean(at) for at in zip(*(run.curve for run in some), strict=True)]
        first.plot([*range(1, len(means) + 1)], means, line, marker=".", label=name)
    first.set(xlabel="epoch", ylabel=ACCURACY, title="Test accuracy")
    first.xaxis.get_major_locator().set_params(integer=True)
    for name, look in zip(CONTRAST, ("C3o:", "C0o-"), strict=True):
        kB = [row[f"{name}, kB"] for row in table]
        second.plot([row["steps"] for row in table], kB, look, label=name)
    second.set(xlabel="steps forward", ylabel="kB", title="Kept for the backward pass")
    for name, curve in changes.items():
        third.semilogy(
            range(1, len(curve) + 1), curve, label=f"‖W‖ ≤ {name}" if name != "none" else "no bound"
        )
    third.set(xlabel="step", ylabel="relative change of z", title="Iteration of the forward pass")
    for name, curve in backward.items():
        fourth.semilogy(curve, marker=".", label=name)
    fourth.set(xlabel="product", ylabel="relative residual", title="Solve of the backward pass")
    for axes in (first, second, third, fourth):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def pixels(images: Tensor) -> Tensor:
    """From 0 to 1, a row an image."""
    return images.flatten(1).float() / 255.0


def main(argv: Sequence[str] | None = None) -> None:
    """Train by each method; look at gradients, memory and convergence; print, save and draw."""
    parser = report.arguments(__doc__, full="all 60,000 images", seed="the first of them")
    parser.add_argument("--train", type=int, help="images to train on; 6000")
    parser.add_argument("--epochs", type=int, default=5, help="over them; 5")
    parser.add_argument("--hidden", type=int, default=100, help="hidden units; 100")
    parser.add_argument("--bound", type=float, default=0.9, help="of the norm of W; 0.9")
    parser.add_argument("--repeats", type=int, default=3, help="seeds; 3")
    parser.add_argument("--data", type=Path, default=mnist.FOLDER, help="the files of MNIST")
    options = parser.parse_args(argv)
    train_size = 60_000 if options.full else 6_000
    if options.train is not None:
        train_size = options.train
    counts = {name: getattr(options, name) for name in ("epochs", "hidden", "repeats")}
    for name, value in {"train": train_size, **counts}.items():
        if value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")
    if not options.bound > 0.0:
        parser.error(f"--bound must be above 0, not {options.bound}")
    try:
        images, test = mnist.load(options.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if train_size > len(images.labels):
        parser.error(f"--train must be at most {len(images.labels)}, not {train_size}")

    torch.set_num_threads(1)  # not slower for matrices as small as these
    torch.manual_seed(options.seed)
    chosen = torch.randperm(len(images.labels))[:train_size]
    rows = (pixels(images.images[chosen]), images.labels[chosen])
    data = Data(rows, (pixels(test.images), test.labels), (rows[0][:100], rows[1][:100]))
    seeds = range(options.seed, options.seed + options.repeats)
    runs = compare(data, options.hidden, options.bound, options.epochs, seeds)
    first = runs[MAIN][0]
    assert isinstance(first.model, Classifier)
    bounds, changes = loosen(data, options.hidden, options.seed)
    table = memory(first.model, data.probe[0])
    backward = {
        name: solves(first.model, data.probe, solver)[1] for name, solver in SOLVERS.items()
    }
    tables = {
        f"{train_size} images, {options.epochs} epochs, {options.repeats} seeds": summary(
            runs, first.model, data
        ),
        "The solves of FixedPoint after each epoch": first.solves,
        "After one epoch, by the bound of W": bounds,
        "Kept for the backward pass": table,
    }
    report.finish("equilibrium", options, tables, draw(runs, table, changes, backward))


if __name__ == "__main__":
    main()
