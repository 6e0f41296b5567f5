"""Find the wrong labels among 5,000 digits of MNIST, half of which have one: data hyper-cleaning.

    inner  f(θ, φ) = mean of sigmoid(φ_i) · cross-entropy of training row i, + decay · ‖θ‖²
    outer  g(θ)    = mean cross-entropy on 5,000 validation rows, whose labels are right

θ is a multinomial logistic regression on the pixels, φ holds one number for each training row. A
row whose weight sigmoid(φ_i) ends below ½ is called corrupted: the validation rows say so, through
θ*(φ). In the end logistic regression is trained anew, always to its minimum: on the rows as each
method weighted them, on all rows alike, on those that an oracle knows to be right, and on those
whose label is what a model of the validation rows alone would give them.

Franceschi, Donini, Frasconi & Pontil 2017, *Forward and reverse gradient-based hyperparameter
optimization*: the defaults have the sizes of their experiment. `--full` takes all of MNIST, 50,000
rows to train on and 10,000 to validate.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import hypergrad as hg
import mnist
import report

Params = tuple[Tensor, Tensor]  # weights, shape (10, pixels), and biases, shape (10,)
Rows = tuple[Tensor, Tensor]  # pixels from 0 to 1, shape (n, pixels), and labels, shape (n,)

DECAY = 1e-3

# --- your part ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Training rows as they are labelled, their true labels, and the rows that are right."""

    train: Rows
    truth: Tensor
    validation: Rows
    test: Rows
    shape: tuple[int, int]  # of an image

    @property
    def wrong(self) -> Tensor:
        """Which training labels are corrupted."""
        return self.train[1] != self.truth


def prepare(
    images: mnist.Split, test: mnist.Split, train: int, validation: int, noise: float
) -> Data:
    """Draw the rows, and for a share of the training rows one of the nine other labels."""
    order = torch.randperm(len(images.labels))
    chosen, clean = order[:train], order[train : train + validation]
    truth = images.labels[chosen]
    wrong = torch.randperm(train) < noise * train
    given = torch.where(wrong, (truth + torch.randint(1, 10, (train,))) % 10, truth)
    height, width = images.images.shape[1:]
    return Data(
        (pixels(images.images[chosen]), given),
        truth,
        (pixels(images.images[clean]), images.labels[clean]),
        (pixels(test.images), test.labels),
        (height, width),
    )


def pixels(images: Tensor) -> Tensor:
    """From 0 to 1, a row an image."""
    return images.flatten(1).float() / 255.0


def losses(params: Params, rows: Rows) -> Tensor:
    """The cross-entropy of each row."""
    x, y = rows
    return F.cross_entropy(F.linear(x, *params), y, reduction="none")


def weighted(params: Params, weights: Tensor, rows: Rows) -> Tensor:
    """f: the mean cross-entropy, each row by its weight, and a decay of the parameters."""
    decay = params[0].square().sum() + params[1].square().sum()
    return (weights * losses(params, rows)).mean() + DECAY * decay


def untrained(data: Data) -> Params:
    """Zeros: f is convex in θ."""
    height, width = data.shape
    return torch.zeros(10, height * width, requires_grad=True), torch.zeros(10, requires_grad=True)


def clean(data: Data, name: str, recipe: Recipe, seed: int) -> Tensor:
    """The weights of the training rows, learned."""
    theta, phi = untrained(data), torch.zeros(len(data.truth))

    def inner(theta: Params, phi: Tensor, _: None) -> Tensor:
        return weighted(theta, phi.sigmoid(), data.train)

    def outer(theta: Params, phi: Tensor, _: None) -> Tensor:
        return losses(theta, data.validation).mean()

    solver = hg.BilevelSolver(
        hg.Level(inner, theta, torch.optim.SGD(theta, lr=0.1, momentum=0.9)),
        hg.Level(outer, phi, torch.optim.Adam([phi], lr=recipe.lr)),
        method=recipe.hypergradient,
        inner_steps=recipe.inner_steps,
        outer_steps=recipe.outer_steps,
        warmup_steps=100,
        seed=seed,
        callbacks=[hg.bilevel.ProgressBar(desc=name, leave=False)],
    )
    solver.run()
    if solver.stop_reason is not None:
        raise SystemExit(f"{solver.stop_reason} after step {solver.outer_step}")
    return phi.sigmoid()


# --- the end of your part -------------------------------------------------------------------------

# The columns of the table: what is kept of the training rows, and the accuracy after training on
# them, and on them and the validation rows.
CASE, ALONE, TOGETHER = "training rows", "test accuracy, %", "with validation rows, %"


@dataclass(frozen=True)
class Recipe:
    """A method, and the steps that it takes."""

    hypergradient: hg.bilevel.Method
    inner_steps: int = 10
    outer_steps: int = 40
    lr: float = 0.3  # of Adam over φ


METHODS = {
    "cg": Recipe(hg.CG(rtol=1e-2)),
    "nystrom": Recipe(hg.Nystrom(rank=20, rho=0.01, test="gaussian")),
    "neumann": Recipe(hg.Neumann(terms=20)),
    "unrolled": Recipe(hg.Unrolled()),
    "t1t2": Recipe(hg.bilevel.T1T2()),
    "soba": Recipe(hg.single_loop.SOBA(), inner_steps=1, outer_steps=500, lr=0.02),
}


def fit(data: Data, rows: Rows, weights: Tensor) -> Params:
    """The minimum of f on any rows as weighted."""
    theta = untrained(data)
    optimiser = torch.optim.LBFGS(
        theta, max_iter=200, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = weighted(theta, weights, rows)
        loss.backward()
        return loss

    optimiser.step(closure)
    return theta


def predict(params: Params, x: Tensor) -> Tensor:
    """The likeliest label of each row."""
    with torch.no_grad():
        return F.linear(x, *params).argmax(1)


def accuracy(params: Params, rows: Rows) -> float:
    """The share of right answers, in percent."""
    return 100.0 * float((predict(params, rows[0]) == rows[1]).double().mean())


def compare(data: Data, weights: Tensor) -> dict[str, float]:
    """Accuracy after training on the training rows as weighted, without and with the validation."""
    x, y = (torch.cat(columns) for columns in zip(data.train, data.validation, strict=True))
    all_weights = torch.cat([weights, torch.ones(len(data.validation[1]))])
    return {
        ALONE: accuracy(fit(data, data.train, weights), data.test),
        TOGETHER: accuracy(fit(data, (x, y), all_weights), data.test),
    }


def f1(called: Tensor, wrong: Tensor) -> float:
    """How well the rows that are called corrupted agree with those that are: 1 is perfect."""
    return float(2 * (called & wrong).sum() / (called.sum() + wrong.sum()))


def measure(
    data: Data, recipes: dict[str, Recipe], seed: int
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """The table, and the weights of each method."""
    plain = fit(data, data.validation, torch.ones(len(data.validation[1])))
    agree = predict(plain, data.train[0]) == data.train[1]
    rows: list[dict[str, Any]] = [
        {CASE: "all alike", "F1": None, **compare(data, torch.ones(len(agree))), "seconds": None},
        {CASE: "none", TOGETHER: accuracy(plain, data.test)},
        {CASE: "those as predicted", "F1": f1(~agree, data.wrong), **compare(data, agree.float())},
    ]
    found = []
    for name, recipe in recipes.items():
        began = time.perf_counter()
        weights = clean(data, name, recipe, seed)
        seconds = time.perf_counter() - began
        score = {"F1": f1(weights < 0.5, data.wrong), "seconds": seconds}
        rows.append({CASE: f"as weighted by {name}", **score, **compare(data, weights)})
        found.append(weights)
    rows.append({CASE: "the right ones (oracle)", "F1": 1.0, **compare(data, 1.0 * ~data.wrong)})
    return rows, found


def draw(data: Data, rows: list[dict[str, Any]], name: str, weights: Tensor) -> Figure:
    """The weights by truth, the accuracies, and images with what was made of them."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    panels: Any = figure.subfigures(1, 3, width_ratios=[1.0, 1.2, 1.3])
    left, middle, right = panels
    draw_weights(left.subplots(), weights, data.wrong, name)
    draw_accuracies(middle.subplots(), rows)
    draw_images(right.subplots(3, 6), data, weights)
    return figure


def draw_weights(axes: Any, weights: Tensor, wrong: Tensor, name: str) -> None:
    """A histogram of the weights of right labels, and one of wrong ones."""
    for label, chosen in (("right label", ~wrong), ("corrupted label", wrong)):
        axes.hist(weights[chosen].tolist(), bins=40, range=(0, 1), alpha=0.6, label=label)
    axes.axvline(0.5, color="black", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set(xlabel="weight", ylabel="training rows", title=f"Learned weights ({name})")
    axes.legend(loc="upper center")
    axes.grid(alpha=0.3)


def draw_accuracies(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Two bars a row of the table."""
    for column, offset, label in (
        (ALONE, -0.2, "training rows"),
        (TOGETHER, 0.2, "training and validation rows"),
    ):
        there = [(at + offset, row[column]) for at, row in enumerate(rows) if column in row]
        bars = axes.barh(*zip(*there, strict=True), height=0.4, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set_yticks(range(len(rows)), [row[CASE] for row in rows])
    axes.invert_yaxis()
    values = [row[TOGETHER] for row in rows] + [row[ALONE] for row in rows if ALONE in row]
    axes.set_xlim(min(values) - 8.0, max(values) + 3.0)
    axes.set(xlabel="test accuracy, %", title="Trained anew")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8)


def draw_images(grid: Any, data: Data, weights: Tensor) -> None:
    """The lowest weights, the lowest of rows that are right, the highest of those that are not."""
    order, wrong, (x, given) = weights.argsort(), data.wrong, data.train
    lines = {
        "lowest weights": order,
        "right labels of lowest weight": order[~wrong[order]],
        "corrupted labels of highest weight": order[wrong[order]].flip(0),
    }
    for line, (title, chosen) in zip(grid, lines.items(), strict=True):
        caption = line[0].text(0.0, -0.3, title, transform=line[0].transAxes)
        caption.set_in_layout(False)  # else the first image gets room for all of it
        for axes, row in zip(line, chosen.tolist(), strict=False):
            axes.imshow(x[row].view(data.shape), cmap="gray_r")
            axes.set_axis_off()
            label = f"{given[row]}, is {data.truth[row]}" if wrong[row] else f"{given[row]}"
            axes.set_title(label, fontsize=9, color="tab:red" if wrong[row] else "black")


def main(argv: Sequence[str] | None = None) -> None:
    """Corrupt, clean by each method, train anew; print, save and draw."""
    parser = report.arguments(__doc__, full="50,000 and 10,000 rows", seed="of rows and labels")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME",
                        help=f"any of {', '.join(METHODS)}; all")  # fmt: skip
    parser.add_argument("--steps", type=int, help="outer steps; each method's own")
    parser.add_argument("--train", type=int, help="training rows; 5000")
    parser.add_argument("--validation", type=int, help="validation rows; 5000")
    parser.add_argument("--noise", type=float, default=0.5, help="share of corrupted labels; 0.5")
    parser.add_argument("--data", type=Path, default=mnist.FOLDER, help="the files of MNIST")
    options = parser.parse_args(argv)
    sizes = (50_000, 10_000) if options.full else (5_000, 5_000)
    train, validation = (
        size if given is None else given
        for given, size in zip((options.train, options.validation), sizes, strict=True)
    )
    if min(train, validation) < 1:
        parser.error(
            f"there must be rows to train on and to validate, not {train} and {validation}"
        )
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, not {options.steps}")
    if not 0.0 < options.noise < 1.0:
        parser.error(f"--noise must be between 0 and 1, not {options.noise}")
    try:
        images, test = mnist.load(options.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if train + validation > len(images.labels):
        parser.error(f"there are {len(images.labels)} rows, not {train} + {validation}")

    torch.set_num_threads(1)  # not slower for a matrix of ten columns
    torch.manual_seed(options.seed)
    data = prepare(images, test, train, validation, options.noise)
    print(f"{train} training rows, {int(data.wrong.sum())} of them with a wrong label; "
          f"{validation} validation rows, {len(test.labels)} test rows")  # fmt: skip
    recipes = {name: METHODS[name] for name in options.method}
    if options.steps is not None:
        recipes = {
            name: replace(recipe, outer_steps=options.steps) for name, recipe in recipes.items()
        }
    rows, found = measure(data, recipes, options.seed)
    figure = draw(data, rows, options.method[0], found[0])
    report.finish("hyper_cleaning", options, {f"{train} training rows": rows}, figure)


if __name__ == "__main__":
    main()
