"""Learn to weight the rows of a long-tailed MNIST by their loss, as Meta-Weight-Net does.

    inner  f(θ, φ) = Σ_i w_i ℓ_i / Σ_i w_i + ½ decay ‖θ‖²,   w_i = V(ℓ_i; φ),   over a batch
    outer  g(θ)    = mean cross-entropy on 10 rows of each class, the meta rows

θ is a network on the pixels and ℓ_i its cross-entropy on training row i. V is a small network
itself, from the loss of a row to its weight between 0 and 1; φ are its parameters. To θ the weights
are constants, as in the paper: else a row could lower f by a loss so high that V forgets it. The
number of training rows falls exponentially from class 0 to class 9, by an imbalance factor.

Shu, Xie, Yi, Zhao, Zhou, Xu & Meng 2019, *Meta-Weight-Net: learning an explicit mapping for sample
weighting*; Hataya & Yamada 2023 compare hypergradients on the same problem. Every method here makes
the same number of steps of θ. `--full` makes twice as many as the default, for three seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

import hypergrad as hg
import mnist
import report

Rows = tuple[Tensor, Tensor]  # pixels from 0 to 1, shape (n, pixels), and labels, shape (n,)

BATCH, DECAY, LR, META = 100, 5e-4, 0.1, 10  # META: rows of a class

# --- your part ------------------------------------------------------------------------------------


def long_tail(images: mnist.Split, factor: int, largest: int) -> tuple[Rows, Rows]:
    """Training rows, ``largest`` of class 0 and a ``factor``-th of these of class 9; meta rows."""
    order = torch.randperm(len(images.labels))
    classes = [order[images.labels[order] == k] for k in range(10)]
    ends = [META + round(largest * factor ** (-k / 9)) for k in range(10)]
    train = torch.cat([rows[META:end] for rows, end in zip(classes, ends, strict=True)])
    meta = torch.cat([rows[:META] for rows in classes])
    x = images.images.flatten(1) / 255.0
    return (x[train], images.labels[train]), (x[meta], images.labels[meta])


def classifier(pixels: int) -> nn.Module:
    """θ: one hidden layer of 100."""
    return nn.Sequential(nn.Linear(pixels, 100), nn.ReLU(), nn.Linear(100, 10))


def batches(rows: Rows) -> DataLoader[Any]:
    """Shuffled anew in every pass."""
    data = TensorDataset(*rows)
    return DataLoader(data, None, sampler=BatchSampler(RandomSampler(data), BATCH, drop_last=False))


def learn(
    train: Rows, meta: Rows, method: hg.bilevel.Method, inner: int, outer: int, lr: float, seed: int
) -> tuple[nn.Module, nn.Module]:
    """The classifier and V, from losses of shape (n, 1) to weights, after ``outer`` steps of V."""
    model, steps = classifier(train[0].shape[1]), inner * outer
    weigh = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)

    def f(model: nn.Module, weigh: nn.Module, rows: Rows) -> Tensor:
        losses = F.cross_entropy(model(rows[0]), rows[1], reduction="none")
        weights = weigh(losses.detach()[:, None])[:, 0]
        norm = sum(weight.square().sum() for weight in model.parameters())
        return weights @ losses / weights.sum() + 0.5 * DECAY * norm

    def g(model: nn.Module, _: nn.Module, rows: Rows) -> Tensor:
        return F.cross_entropy(model(rows[0]), rows[1])

    hg.BilevelSolver(
        hg.Level(
            f,
            model,
            sgd,
            batches(train),
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps + steps // 5),
        ),
        hg.Level(g, weigh, torch.optim.Adam(weigh.parameters(), lr=lr), [meta]),
        method=method,
        inner_steps=inner,
        outer_steps=outer,
        warmup_steps=steps // 5,
        on_failure="ignore",
        # V sees losses that are detached: the gradient is meant to differ from the value.
        verify="never",
        seed=seed,
        callbacks=[hg.bilevel.ProgressBar(leave=False)],
    ).run()
    return model, weigh


# --- the end of your part -------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A method, the inner steps for each of its outer steps, and how far φ may go in all."""

    hypergradient: hg.bilevel.Method
    inner_steps: int = 10
    reach: float = 0.3  # outer steps times the learning rate of Adam


def implicit(solver: hg.LinearSolver, damping: float = 0.0) -> hg.Implicit:
    """Away from a minimum H is indefinite: a solve that fails gives what it has, in silence."""
    return hg.Implicit(solver, damping=damping)


METHODS = {
    "one step": Recipe(hg.Unrolled(memory="graph"), inner_steps=1),  # as in Meta-Weight-Net
    "unrolled": Recipe(hg.Unrolled(memory="graph"), reach=1.0),
    "t1t2": Recipe(hg.bilevel.T1T2(lr=LR)),
    "neumann": Recipe(implicit(hg.Neumann(terms=20, step=0.05))),
    "cg": Recipe(implicit(hg.CG(rtol=0.1, maxiter=10), damping=0.1), reach=1.0),
    "nystrom": Recipe(implicit(hg.Nystrom(rank=10, rho=1.0, test="gaussian"))),
}

PLAIN, INVERSE = "all rows alike", "inverse frequency"
Weigh = Callable[[Tensor, Tensor], Tensor]  # losses and labels to weights


@dataclass(frozen=True)
class Outcome:
    """One training: test accuracies of the classes, in percent, without and with the meta rows."""

    alone: Tensor
    together: Tensor
    seconds: float | None = None
    weigh: nn.Module | None = None


def fit(rows: Rows, weigh: Weigh, steps: int, seed: int, warmup: int = 0) -> nn.Module:
    """A classifier trained as :func:`learn` does, with weights that are known, 1 in the warm-up."""
    torch.manual_seed(seed)
    model = classifier(rows[0].shape[1])
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    loader = batches(rows)
    for step, (x, y) in zip(range(steps), chain.from_iterable(repeat(loader)), strict=False):
        each = F.cross_entropy(model(x), y, reduction="none")
        weights = torch.ones_like(each) if step < warmup else weigh(each, y)
        sgd.zero_grad()
        (weights @ each / weights.sum()).backward()
        sgd.step()
        schedule.step()
    return model


def by_class(model: nn.Module, test: Rows) -> Tensor:
    """The share of right answers among the test rows of each class, in percent."""
    with torch.no_grad():
        right = model(test[0]).argmax(1) == test[1]
    return torch.stack([100.0 * right[test[1] == k].double().mean() for k in range(10)])


def one_training(train: Rows, meta: Rows, test: Rows, name: str, steps: int, seed: int) -> Outcome:
    """The classifier of one method or baseline, and its weights once more, on all rows."""
    x, y = (torch.cat(pair) for pair in zip(train, meta, strict=True))
    if name in METHODS:
        began = time.process_time()  # other programs do not count
        recipe = METHODS[name]
        outer = steps * 5 // 6 // recipe.inner_steps  # the others warm up
        torch.manual_seed(seed)
        model, net = learn(
            train, meta, recipe.hypergradient, recipe.inner_steps, outer, recipe.reach / outer, seed
        )
        seconds = time.process_time() - began
        net.requires_grad_(False)
        again = fit(
            (x, y), lambda each, _: net(each.detach()[:, None])[:, 0], steps, seed, steps // 6
        )
        return Outcome(by_class(model, test), by_class(again, test), seconds, net)

    def weights_of(labels: Tensor) -> Weigh:
        rarity = 1.0 / labels.bincount(minlength=10)
        return lambda _, y: rarity[y] if name == INVERSE else torch.ones(len(y))

    alone = fit(train, weights_of(train[1]), steps, seed)
    return Outcome(by_class(alone, test), by_class(fit((x, y), weights_of(y), steps, seed), test))


Outcomes = dict[str, dict[int, list[Outcome]]]  # by method and factor, one a seed
ALONE, TOGETHER = (
    f"Balanced test accuracy, %, trained on the {rows}"
    for rows in ("training rows", "training rows and the meta rows")
)


def tables(outcomes: Outcomes) -> dict[str, list[dict[str, Any]]]:
    """Accuracies, means over the seeds and their deviation, and the weights that were learned."""
    found: dict[str, list[dict[str, Any]]] = {ALONE: [], TOGETHER: []}
    for name, by_factor in outcomes.items():
        for title, rows in found.items():
            row: dict[str, Any] = {"weights": name}
            for factor, runs in by_factor.items():
                means = [run.alone if title == ALONE else run.together for run in runs]
                balanced = torch.stack(means).mean(1)
                row[f"factor {factor}"] = float(balanced.mean())
                if len(runs) > 1:
                    row[f"± ({factor})"] = float(balanced.std())
            rows.append(row)
        seconds = [run.seconds for runs in by_factor.values() for run in runs if run.seconds]
        found[ALONE][-1]["CPU seconds"] = sum(seconds) / len(seconds) if seconds else None
    factor, at = max(outcomes[PLAIN]), (0.01, 0.1, 0.5, 1.0, 2.0, 5.0)
    found[f"Learned weight by the loss of a row, factor {factor}"] = [
        {"method": name, **{f"loss {x:g}": y for x, y in zip(at, curve, strict=True)}}
        for name, curve in curves(outcomes, factor, torch.tensor(at)).items()
    ]
    return found


def curves(outcomes: Outcomes, factor: int, losses: Tensor) -> dict[str, list[float]]:
    """V of each method at these losses, the mean over the seeds."""
    found = {}
    for name, by_factor in outcomes.items():
        nets = [run.weigh for run in by_factor[factor] if run.weigh is not None]
        if nets:
            found[name] = torch.cat([net(losses[:, None]) for net in nets], 1).mean(1).tolist()
    return found


def draw(outcomes: Outcomes, sizes: list[int]) -> Figure:
    """Accuracy over the factor, weight over the loss, and accuracy by class."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes: Any = figure.subplots(1, 3)
    left, middle, right = axes
    factors = sorted(outcomes[PLAIN])
    looks = {PLAIN: ("0.55", "--"), INVERSE: ("black", "--")}
    looks |= {name: (f"C{at}", "-") for at, name in enumerate(METHODS)}
    for at, (name, by_factor) in enumerate(outcomes.items()):
        color, line = looks[name]
        runs = [torch.stack([run.alone for run in by_factor[factor]]) for factor in factors]
        balanced = torch.stack([each.mean(1) for each in runs])
        places = [place + 0.03 * (at - len(outcomes) / 2) for place in range(len(factors))]
        left.plot(places, balanced.mean(1), f"o{line}", color=color, label=name, markersize=4)
        left.vlines(places, balanced.amin(1), balanced.amax(1), color=color, alpha=0.6)
        if name in (PLAIN, INVERSE, "cg"):
            right.plot(runs[-1].mean(0), f"o{line}", color=color)
    grid = torch.logspace(-3, 1, 200)
    for name, curve in curves(outcomes, factors[-1], grid).items():
        middle.plot(grid, curve, color=looks[name][0])
    left.set_xticks(range(len(factors)), factors)
    left.set(xlabel="imbalance factor", ylabel="balanced test accuracy, %",
             title="Trained on the training rows")  # fmt: skip
    middle.set(xscale="log", ylim=(-0.03, 1.03), xlabel="loss of a row", ylabel="weight",
               title=f"Learned weights, factor {factors[-1]}")  # fmt: skip
    right.set_xticks(range(10), [f"{k}\n{size}" for k, size in enumerate(sizes)])
    right.set(xlabel="class, and how many training rows it has", ylabel="test accuracy, %",
              title=f"By class, factor {factors[-1]}")  # fmt: skip
    for each in axes:
        each.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(outcomes))
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Draw a long tail, learn weights by each method, train with them; print, save and draw."""
    parser = report.arguments(__doc__, full="1,200 steps of θ, three seeds", seed="the first one")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME",
                        help=f"any of {', '.join(METHODS)}; all")  # fmt: skip
    parser.add_argument("--factor", nargs="+", type=int, default=[200, 100, 50],
                        help="of imbalance; 200 100 50")  # fmt: skip
    parser.add_argument("--largest", type=int, default=5000, help="rows of class 0; 5000")
    parser.add_argument("--steps", type=int, help="of θ, a multiple of 60; 600")
    parser.add_argument("--seeds", type=int, help="how many; 1")
    parser.add_argument("--data", type=Path, default=mnist.FOLDER, help="the files of MNIST")
    options = parser.parse_args(argv)
    steps = options.steps if options.steps is not None else 1200 if options.full else 600
    seeds = options.seeds if options.seeds is not None else 3 if options.full else 1
    if min(options.factor) < 1:
        parser.error(f"--factor must be at least 1, not {min(options.factor)}")
    if round(options.largest / max(options.factor)) < 1:
        parser.error(f"--largest must leave a row of class 9, but {options.largest} / "
                     f"{max(options.factor)} does not")  # fmt: skip
    if steps < 60 or steps % 60:
        parser.error(f"--steps must be a positive multiple of 60, not {steps}")
    if seeds < 1:
        parser.error(f"--seeds must be at least 1, not {seeds}")
    try:
        images, test_images = mnist.load(options.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    there = int(images.labels.bincount(minlength=10).min())
    if there < options.largest + META:
        parser.error(f"--largest must leave {META} meta rows, but a class has {there} rows, not "
                     f"{options.largest} + {META}")  # fmt: skip

    torch.set_num_threads(1)  # faster for networks as small as these
    test = (test_images.images.flatten(1) / 255.0, test_images.labels)
    names = [PLAIN, INVERSE, *options.method]
    outcomes: Outcomes = {name: {factor: [] for factor in options.factor} for name in names}
    for factor in sorted(set(options.factor)):
        for seed in range(options.seed, options.seed + seeds):
            torch.manual_seed(seed)
            train, meta = long_tail(images, factor, options.largest)
            for name in tqdm(names, desc=f"factor {factor}, seed {seed}", leave=False):
                outcome = one_training(train, meta, test, name, steps, seed)
                outcomes[name][factor].append(outcome)
    sizes = train[1].bincount(minlength=10).tolist()  # those of the largest factor
    report.finish("long_tail", options, tables(outcomes), draw(outcomes, sizes))


if __name__ == "__main__":
    main()
