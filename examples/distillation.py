"""Distil the 60,000 digits of MNIST into 50 images that train a network: data-set distillation.

    inner  f(θ, φ) = mean cross-entropy on the 50 images φ, five for each class
    outer  g(θ)    = mean cross-entropy on rows of the real training set

θ*(φ) is where a few steps of SGD end that start from a fresh initialisation. φ starts as noise, and
its labels are fixed. After each outer step the network is initialised anew, so that the images have
to serve any initialisation. In the end networks are trained by the same steps on what each method
distilled, on as many real images, and on noise; the test rows say how well.

So few steps reach no minimum of f. T steps of SGD at rate η do about what a ridge of ρ = 1/(ηT)
does, and that is the damping of every solver here; where it solves, the Gauss-Newton matrix stands
in for the Hessian, which is indefinite so far from a minimum.

Wang, Zhu, Torralba & Efros 2018, *Dataset distillation*; Hataya & Yamada 2023, *Nyström method for
accurate and scalable implicit differentiation*. `--full` takes the LeNet of the latter and its
inner steps, 100 of rate 0.01.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hypergrad as hg
import mnist
import report

Rows = tuple[Tensor, Tensor]  # images, shape (n, 1, height, width), and labels, shape (n,)
Curvature = Callable[[Any, Any, Any], hg.operators.LinearOperator]

LABELS = torch.arange(10).repeat_interleave(5)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on the images, and the images through it."""

    inner_steps: int = 20
    lr: float = 0.1  # of SGD
    outer_steps: int = 40
    outer_lr: float = 0.1  # of Adam, falling to 0 as a cosine
    lenet: bool = False

    @property
    def ridge(self) -> float:
        """The damping that so few steps amount to: ρ = 1/(ηT)."""
        return 1.0 / (self.lr * self.inner_steps)


FULL = Recipe(inner_steps=100, lr=0.01, outer_steps=300, outer_lr=0.2, lenet=True)
Method = Callable[[Recipe, Curvature], hg.bilevel.Method]

# --- your part ------------------------------------------------------------------------------------


def network(shape: torch.Size, lenet: bool) -> nn.Sequential:
    """LeNet; or, smaller and for images of any shape, two strided convolutions and a linear map."""
    act, pool, conv = nn.LeakyReLU, nn.MaxPool2d, nn.Conv2d
    large = [conv(1, 6, 5, padding=2), act(), pool(2), conv(6, 16, 5), act(), pool(2), nn.Flatten(),
             nn.LazyLinear(120), act(), nn.Linear(120, 84), act(), nn.Linear(84, 10)]  # fmt: skip
    small = [conv(1, 6, 5, stride=2, padding=2), act(), conv(6, 16, 5, stride=2, padding=2), act(),
             nn.Flatten(), nn.LazyLinear(10)]  # fmt: skip
    net = nn.Sequential(*(large if lenet else small))
    net(torch.zeros(1, *shape))  # now the lazy layer knows its size
    return net


def initialise(net: nn.Sequential) -> None:
    """Draw all parameters anew."""
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.reset_parameters()


def cg(recipe: Recipe, curvature: Curvature) -> hg.bilevel.Method:
    """Conjugate gradient; to be cut off after 20 products is no failure here."""
    solver = hg.CG(rtol=1e-2, maxiter=20)
    return hg.Implicit(solver, recipe.ridge, curvature)


def distil(net: nn.Sequential, rows: Rows, recipe: Recipe, method: Method) -> hg.BilevelSolver:
    """The solver of the outer problem, whose ``hparams`` are the images."""

    def inner(net: nn.Module, images: Tensor, _: None) -> Tensor:
        return F.cross_entropy(net(images), LABELS)

    def outer(net: nn.Module, _: Tensor, batch: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        z = net(batch[0])
        right = (z.argmax(1) == batch[1]).float().mean()
        return F.cross_entropy(z, batch[1]), {"accuracy": right}

    def curvature(net: nn.Module, images: Tensor, _: None) -> hg.operators.GaussNewton:
        return hg.operators.GaussNewton(
            lambda net, images: net(images), lambda z, _: F.cross_entropy(z, LABELS), net, images
        )

    images = torch.randn(len(LABELS), *rows[0].shape[1:])
    adam = torch.optim.Adam([images], lr=recipe.outer_lr)
    return hg.BilevelSolver(
        hg.Level(inner, net, torch.optim.SGD(net.parameters(), lr=recipe.lr)),
        hg.Level(
            outer,
            images,
            adam,
            DataLoader(TensorDataset(*rows), batch_size=512, shuffle=True),
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(adam, recipe.outer_steps),
        ),
        method=method(recipe, curvature),
        inner_steps=recipe.inner_steps,
        outer_steps=recipe.outer_steps,
        restart=lambda: initialise(net),
        on_failure="ignore",
        callbacks=[hg.bilevel.ProgressBar(leave=False)],
    )


# --- the end of your part -------------------------------------------------------------------------


METHODS: dict[str, Method] = {
    "cg": cg,
    "nystrom-cg": lambda recipe, curvature: hg.Implicit(
        # Its sketch is kept from one outer step to the next, as long as it serves.
        hg.CG(rtol=1e-2, maxiter=20, preconditioner=hg.NystromPreconditioner(10)),
        recipe.ridge, curvature,
    ),
    "nystrom": lambda recipe, curvature: hg.Implicit(
        hg.Nystrom(20, rho=recipe.ridge, test="gaussian"), curvature=curvature
    ),
    # The settings of 0.0.1's example: five columns of the Hessian itself.
    "nystrom-0.0.1": lambda recipe, curvature: hg.Nystrom(5, rho=0.1),
    # A term for each inner step: these, unrolled, if the curvature were always that of the end.
    "neumann": lambda recipe, curvature: hg.Implicit(
        hg.Neumann(recipe.inner_steps, recipe.lr), curvature=curvature
    ),
    "unrolled": lambda recipe, curvature: hg.Unrolled(memory="graph"),
}  # fmt: skip
CASE, ACCURACY, SPREAD = "50 images", "test accuracy, %", "standard deviation"


@dataclass(frozen=True)
class Run:
    """What a method made: its images after some outer steps, and how it came to the last."""

    images: dict[int, Tensor]
    accuracies: list[float]  # on the batch of real rows of each outer step, before that step
    cost: dict[str, float]


def pixels(images: Tensor) -> Tensor:
    """Of mean 0 and variance 1 over MNIST; shape ``(n, 1, height, width)``."""
    return (images[:, None].float() / 255.0 - 0.1307) / 0.3081


def follow(rows: Rows, recipe: Recipe, method: Method, seed: int) -> Run:
    """Distil, and keep the images of some steps on the way."""
    torch.manual_seed(seed)  # the same noise, networks and batches for every method
    solver = distil(network(rows[0].shape[1:], recipe.lenet), rows, recipe, method)
    images = {0: solver.hparams.clone()}
    began = time.process_time()
    for record in solver:
        if record.step in {round(recipe.outer_steps * share) for share in (0.1, 0.25, 0.5, 1.0)}:
            images[record.step] = solver.hparams.clone()
    if solver.stop_reason is not None:
        raise SystemExit(f"{solver.stop_reason} after step {solver.outer_step}")
    products = sum(solver.history["matvecs"]) / recipe.outer_steps
    cost = {"products an outer step": products, "CPU seconds": time.process_time() - began}
    return Run(images, [100.0 * value for value in solver.history["outer/accuracy"]], cost)


def accuracies(sets: Sequence[Tensor], test: Rows, recipe: Recipe, trials: int) -> list[float]:
    """What networks get right, in percent, that are trained on the sets in turn."""
    net, found = network(test[0].shape[1:], recipe.lenet), []
    for trial in range(trials):
        torch.manual_seed(10_000 + trial)  # initialisations that no method has seen
        initialise(net)
        sgd = torch.optim.SGD(net.parameters(), lr=recipe.lr)
        for _ in range(recipe.inner_steps):
            sgd.zero_grad()
            F.cross_entropy(net(sets[trial % len(sets)]), LABELS).backward()
            sgd.step()
        with torch.no_grad():
            found.append(100.0 * float((net(test[0]).argmax(1) == test[1]).double().mean()))
    return found


def real(rows: Rows) -> Tensor:
    """Five random training images of each class."""
    classes = [rows[0][rows[1] == label] for label in range(10)]
    return torch.cat([images[torch.randperm(len(images))[:5]] for images in classes])


def draw(runs: dict[str, Run], results: dict[str, list[float]]) -> Figure:
    """The images of the first method on the way; the accuracy there, and of the networks after."""
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=[1.1, 1.0])
    left, right = panels
    name, run = next(iter(runs.items()))
    # The noise of the start stays where no gradient reaches; in the mean of five there is less.
    lines = {f"step {step}" if step else "noise": images.unflatten(0, (10, 5)).mean(1)
             for step, images in run.images.items()}  # fmt: skip
    lines["one of five"] = run.images[max(run.images)][::5]
    tiles = torch.stack([*lines.values()])[:, :, 0]  # steps, digits, height, width
    tiles = F.pad(tiles / tiles.std((1, 2, 3), keepdim=True), (1, 1, 1, 1), value=torch.inf)
    height, width = tiles.shape[2:]
    axes = left.subplots()
    axes.imshow(tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1), cmap="gray", vmin=-2.5, vmax=2.5)
    axes.set_xticks([(digit + 0.5) * width for digit in range(10)], range(10))
    axes.set_yticks([(line + 0.5) * height for line in range(len(lines))], lines)
    axes.tick_params(length=0)
    axes.set(xlabel="digit", title=f"Distilled by {name}: mean of each digit's five images")

    curves, dots = right.subplots(2, 1)
    for name, run in runs.items():
        window = max(1, len(run.accuracies) // 10)
        smooth = torch.tensor(run.accuracies).unfold(0, window, 1).mean(1)
        curves.plot(torch.arange(len(smooth)) + window, smooth, label=name)
    curves.set(xlabel="outer step", ylabel="accuracy on real rows, %")
    curves.set_title("A fresh network each step (running mean)")
    curves.legend(fontsize=8, loc="lower right")
    curves.grid(alpha=0.3)
    for at, values in enumerate(results.values()):
        dots.plot(values, [at] * len(values), "o", alpha=0.5, markersize=5)
        dots.plot(sum(values) / len(values), at, "k|", markersize=14)
    dots.set_yticks(range(len(results)), results)
    dots.invert_yaxis()
    dots.set(xlabel="test accuracy, %", title="Networks trained in the end (bar: mean)")
    dots.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Distil by each method, train networks on what comes out; print, save and draw."""
    parser = report.arguments(__doc__, full="LeNet and inner steps of the paper; cg and nystrom",
                              seed="of noise, networks and batches")  # fmt: skip
    parser.add_argument("--method", nargs="+", choices=METHODS, metavar="NAME",
                        help=f"any of {', '.join(METHODS)}; all")  # fmt: skip
    parser.add_argument("--steps", type=int, help="outer steps; 40, or 300 with --full")
    parser.add_argument("--trials", type=int, default=10, help="networks for each test; 10")
    parser.add_argument("--data", type=Path, default=mnist.FOLDER, help="the files of MNIST")
    options = parser.parse_args(argv)
    for name, least in (("steps", 1), ("trials", 2)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, not {value}")
    try:
        rows, test = ((pixels(split.images), split.labels) for split in mnist.load(options.data))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    fewest = int(torch.bincount(rows[1], minlength=10).min())
    if fewest < 5:
        parser.error(f"there must be 5 training rows of each digit, not {fewest}")
    height, width = rows[0].shape[2:]
    if options.full and min(height, width) < 12:
        parser.error(f"--full needs images of at least 12 × 12 pixels, not {height} × {width}")

    torch.set_num_threads(1)  # not slower for 50 images
    recipe = FULL if options.full else Recipe()
    if options.steps is not None:
        recipe = replace(recipe, outer_steps=options.steps)
    names = options.method or (["cg", "nystrom"] if options.full else [*METHODS])
    runs = {name: follow(rows, recipe, METHODS[name], options.seed) for name in names}
    torch.manual_seed(options.seed)
    draws = [real(rows) for _ in range(options.trials)]
    noise = [torch.randn_like(images) for images in draws]
    longer = replace(recipe, inner_steps=10 * recipe.inner_steps)
    tested = [
        ("noise", noise, recipe),
        ("real", draws, recipe),
        ("real, 10 × the inner steps", draws, longer),
        *((f"distilled by {name}", [run.images[recipe.outer_steps]], recipe)
          for name, run in runs.items()),
    ]  # fmt: skip
    results = {case: accuracies(sets, test, by, options.trials) for case, sets, by in tested}
    costs = {f"distilled by {name}": run.cost for name, run in runs.items()}
    table = [
        {CASE: case, ACCURACY: statistics.fmean(values), SPREAD: statistics.stdev(values),
         "worst": min(values), **costs.get(case, {})}
        for case, values in results.items()
    ]  # fmt: skip
    title = f"{recipe.inner_steps} inner steps, {recipe.outer_steps} outer steps"
    report.finish("distillation", options, {title: table}, draw(runs, results))


if __name__ == "__main__":
    main()
