"""Learn to tell five unknown digits apart by one image of each, or five: MAML and iMAML on MNIST.

    outer  g(φ) = mean over tasks of the cross-entropy of θ_t(φ) on images that θ_t never saw
    MAML   θ_t(φ) = φ after steps of θ ← θ − α ∇f_t(θ)   five steps, which g goes through
    iMAML  θ_t(φ) = argmin_θ f_t(θ) + ½ λ ‖θ − φ‖²      a solution, however it was found

φ are the weights that a network starts from in every task, and f_t is its mean cross-entropy on the
few images of a task. A task has five classes, with labels in any order. Meta-training knows the
digits 2, 3, 4, 5 and 7 of MNIST's training set, each in four orientations that count as classes of
their own; the new tasks are of the digits 0, 1, 6, 8 and 9 of its test set, by other writers.

Finn, Abbeel & Levine 2017, *Model-agnostic meta-learning for fast adaptation of deep networks*, and
Rajeswaran, Finn, Kakade & Levine 2019, *Meta-learning with implicit gradients*, do so on Omniglot,
where there are 1,623 characters; α and the quarter turns are theirs. λ and the solver of iMAML did
best on tasks of the digits of meta-training. `--full` takes 1,500 iterations.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from tqdm import tqdm

import hypergrad as hg
import mnist
import report

Params: TypeAlias = dict[str, Tensor]
Rows: TypeAlias = tuple[Tensor, Tensor]  # images and labels, after a dimension for tasks
Adapt: TypeAlias = Callable[..., Params]  # (φ, rows of a task) ↦ its θ

# --- your part ------------------------------------------------------------------------------------

LAYERS = nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 5)
NETWORK = nn.Sequential(*LAYERS)
ALPHA, LAMBDA = 0.4, 0.2


def loss(theta: Params, rows: Rows) -> Tensor:
    """f: the mean cross-entropy."""
    return F.cross_entropy(functional_call(NETWORK, theta, rows[0]), rows[1])


def proximal(theta: Params, phi: Params, rows: Rows) -> Tensor:
    """What iMAML minimises: θ leaves φ as far as the images are worth it."""
    away = torch.stack([(theta[name] - phi[name]).square().sum() for name in phi]).sum()
    return loss(theta, rows) + 0.5 * LAMBDA * away


def maml(phi: Params, rows: Rows, steps: int = 5, lr: float = ALPHA, **options: Any) -> Params:
    """θ after steps of gradient descent, through which gradients flow."""
    sgd = hg.optimizers.SGD(lr)
    adapted: Params = hg.unroll(
        lambda theta, _: loss(theta, rows), sgd, phi, (), steps, memory="graph", **options
    )
    return adapted


@hg.argmin(proximal, solver=hg.CG(maxiter=10), on_failure="ignore")
def imaml(phi: Params, rows: Rows, steps: int = 10) -> Params:
    """θ near the minimum, by gradient descent, through which no gradient flows."""
    sgd = hg.optimizers.SGD(0.2, momentum=0.5)
    with torch.no_grad():
        adapted: Params = hg.unroll(
            lambda theta, phi: proximal(theta, phi, rows), sgd, phi, phi, steps, memory="graph"
        )
    return adapted


def digits(split: mnist.Split, chosen: Sequence[int], turns: int) -> Tensor:
    """Images of 14 × 14, each of mean 0 and deviation ½, shape (classes, images, 196)."""
    pooled = F.adaptive_avg_pool2d(split.images.float(), (14, 14))
    scaled = 0.5 * F.layer_norm(pooled, (14, 14))
    images = [scaled[split.labels == digit] for digit in chosen]
    least = min(map(len, images))
    if least < 2:
        raise ValueError(f"there must be two images of each digit, not {least} of one of {chosen}")
    turned = [torch.rot90(one[:least], turn, (1, 2)) for one in images for turn in range(turns)]
    return torch.stack(turned).flatten(2)


def tasks(classes: Tensor, count: int, shots: int, unseen: int) -> tuple[Rows, Rows]:
    """Five classes each: images to learn from, of the first half of a class, and to judge by."""
    half, ways = classes.shape[1] // 2, torch.rand(count, len(classes)).argsort(1)[:, :5, None]

    def rows(images: int, first: int) -> Rows:
        chosen = classes[ways, first + torch.randint(half, (count, 5, images))]
        return chosen.flatten(1, 2), torch.arange(5).repeat_interleave(images).expand(count, -1)

    return rows(shots, 0), rows(unseen, half)


def untrained(seed: int) -> Params:
    """Weights at random; the tasks that follow are drawn from the same seed."""
    torch.manual_seed(seed)
    for layer in LAYERS[::2]:
        assert isinstance(layer, nn.Linear)
        layer.reset_parameters()
    return {name: w.detach().clone().requires_grad_() for name, w in NETWORK.named_parameters()}


def meta_train(adapt: Adapt, classes: Tensor, shots: int, iterations: int, seed: int) -> Params:
    """φ: in each iteration 16 new tasks, adapted to side by side."""
    phi = untrained(seed)
    adam = torch.optim.Adam(phi.values(), lr=1e-3)
    for _ in tqdm(range(iterations), leave=False):
        learn, judge = tasks(classes, 16, shots, unseen=5)
        losses = vmap(lambda seen, unseen: loss(adapt(phi, seen), unseen))(learn, judge)
        adam.zero_grad()
        losses.mean().backward()
        adam.step()
    return phi


# --- the end of your part -------------------------------------------------------------------------

KNOWN, NEW = (2, 3, 4, 5, 7), (0, 1, 6, 8, 9)
SHOTS = (1, 5)
STEPS = (0, 1, 2, 5, 10, 20)

# How φ is learned, and how a new task is learned from φ; steps in meta-training are the defaults.
METHODS: dict[str, tuple[Adapt, Adapt]] = {
    "MAML": (maml, maml),
    "FOMAML": (lambda phi, rows: maml(phi, rows, first_order=True), maml),
    "iMAML": (imaml, imaml),
}
SCRATCH = "untrained network"
TEST_STEPS = {"MAML": 10, "FOMAML": 10, "iMAML": 10, SCRATCH: 50}
RATES = (0.05, 0.1, 0.2, 0.4)


def accuracies(adapt: Adapt, phi: Params, data: tuple[Rows, Rows], steps: int) -> Tensor:
    """The share of right answers in each task after so many steps, in percent."""
    learn, (images, labels) = data

    def answers(rows: Rows, images: Tensor) -> Tensor:
        theta = adapt(phi, rows, steps) if steps else phi
        return functional_call(NETWORK, theta, images).argmax(1)

    with torch.no_grad():
        return share(vmap(answers, chunk_size=60)(learn, images), labels)


def share(answers: Tensor, labels: Tensor) -> Tensor:
    """Of right answers, in percent."""
    return 100.0 * (answers == labels).float().mean(1)


def at_rate(lr: float) -> Adapt:
    """Gradient descent with this step size."""
    return lambda phi, rows, steps: maml(phi, rows, steps, lr)


def nearest(data: tuple[Rows, Rows]) -> Tensor:
    """Accuracies of the label of the nearest image."""
    (x, y), (images, labels) = data
    return share(y.gather(1, torch.cdist(images, x).argmin(2)), labels)


def logistic(data: tuple[Rows, Rows]) -> Tensor:
    """Accuracies of scikit-learn's logistic regression on the pixels, with its default penalty."""
    (x, y), (images, labels) = data
    with threadpool_limits(1):  # several threads would only wait for each other
        answers = [
            torch.as_tensor(LogisticRegression().fit(a, b).predict(c))
            for a, b, c in zip(x.numpy(), y.numpy(), images.numpy(), strict=True)
        ]
    return share(torch.stack(answers), labels)


def learn_all(
    options: Namespace, known: Tensor, shots: int
) -> tuple[dict[str, tuple[Adapt, Params]], dict[str, float]]:
    """φ of each method and how it is adapted, and the seconds that each took."""
    learned: dict[str, tuple[Adapt, Params]] = {}
    seconds = {}
    for name in options.method:
        meta, adapt = METHODS[name]
        began = time.perf_counter()
        phi = meta_train(meta, known, shots, options.iterations, options.seed)
        learned[name], seconds[name] = (adapt, phi), time.perf_counter() - began
    start, data = untrained(options.seed), tasks(known, 100, shots, 15)
    lr = max(RATES, key=lambda lr: accuracies(at_rate(lr), start, data, 50).mean())
    learned[SCRATCH] = at_rate(lr), start
    print(f"{shots} a class: {SCRATCH} with a step size of {lr}, the best on known digits")
    return learned, seconds


def compare(learned: dict[str, tuple[Adapt, Params]], data: tuple[Rows, Rows]) -> dict[str, Tensor]:
    """The accuracies of each method, and of two that are no networks."""
    return {
        **{
            name: accuracies(adapt, phi, data, TEST_STEPS[name])
            for name, (adapt, phi) in learned.items()
        },
        "logistic regression": logistic(data),
        "nearest neighbour": nearest(data),
    }


def interval(values: Tensor) -> tuple[float, float]:
    """The mean over tasks, and half of its 95 % interval."""
    return float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))


def draw(known: Tensor, task: Tensor, curves: dict[str, list[tuple[float, float]]],
         found: dict[str, list[tuple[float, float]]]) -> Figure:  # fmt: skip
    """Images of both kinds of classes, accuracy by steps, and the table as bars."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=[1, 2.3])
    left, right = halves
    grid = left.subplots(5, 5)
    shown = [*known[:: max(1, len(known) // 20)][:20, 0], *task]
    for axes, image in zip(grid.flat, shown, strict=False):
        axes.imshow(image.view(14, 14), cmap="gray_r")
        axes.set(xticks=[], yticks=[])
    left.suptitle("Classes of meta-training; below, a new task", fontsize=10)
    middle, last = right.subplots(1, 2, width_ratios=[1, 1.3])
    for name, curve in curves.items():
        middle.errorbar(range(len(STEPS)), *zip(*curve, strict=True), marker="o", capsize=3,
                        label=name)  # fmt: skip
    middle.set_xticks(range(len(STEPS)), STEPS)
    middle.set(xlabel="steps of adaptation", ylabel="accuracy on unseen images, %",
               title="New digits, one image a class")  # fmt: skip
    middle.grid(alpha=0.3)
    middle.legend(fontsize=8)
    for at, (shots, offset) in enumerate(zip(SHOTS, (-0.2, 0.2), strict=True)):
        mean, half = zip(*(values[at] for values in found.values()), strict=True)
        places = [place + offset for place in range(len(found))]
        bars = last.barh(places, mean, height=0.4, xerr=half, label=f"{shots} a class")
        last.bar_label(bars, fmt="%.1f", padding=4, fontsize=8)
    last.set_yticks(range(len(found)), found)
    last.invert_yaxis()
    last.set(xlim=(20, 105), xlabel="accuracy on unseen images, %", title="New digits")
    last.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Meta-train by each method for each number of images, adapt to new digits; print, draw."""
    parser = report.arguments(__doc__, full="1,500 iterations", seed="of weights and tasks")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME",
                        help=f"any of {', '.join(METHODS)}; all")  # fmt: skip
    parser.add_argument("--iterations", type=int, help="of meta-training; 300")
    parser.add_argument("--tasks", type=int, default=600, help="new ones, to judge by; 600")
    parser.add_argument("--data", type=Path, default=mnist.FOLDER, help="the files of MNIST")
    options = parser.parse_args(argv)
    if options.iterations is None:
        options.iterations = 1_500 if options.full else 300
    for name, least in (("iterations", 1), ("tasks", 2)):
        if (value := getattr(options, name)) < least:
            parser.error(f"--{name} must be at least {least}, not {value}")
    try:
        training, test = mnist.load(options.data)
        known, new = digits(training, KNOWN, turns=4), digits(test, NEW, turns=1)
        again = digits(test, KNOWN, turns=4)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    torch.set_num_threads(1)  # faster for operations as small as these
    rows: dict[str, dict[str, Any]] = {}
    found: dict[str, list[tuple[float, float]]] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for shots in SHOTS:
        learned, seconds = learn_all(options, known, shots)
        for kind, classes in {"new": new, "known": again}.items():
            torch.manual_seed(options.seed + 1)
            data = tasks(classes, options.tasks, shots, 15)
            for name, values in compare(learned, data).items():
                mean, half = interval(values)
                column = f"{kind} digits, {shots} image{'s' * (shots > 1)} a class, %"
                row = rows.setdefault(name, {"learned by": name})
                row[column] = f"{mean:.1f} ± {half:.1f}"
                if kind == "new":
                    found.setdefault(name, []).append((mean, half))
            if kind == "new" and not curves:
                curves = {
                    name: [interval(accuracies(adapt, phi, data, steps)) for steps in STEPS]
                    for name, (adapt, phi) in learned.items()
                }
                task = data[0][0][0]
        for name, took in seconds.items():
            column = "seconds of meta-training"
            rows[name][column] = rows[name].pop(column, 0.0) + took
    title = f"Accuracy on {options.tasks} tasks, on images by other writers than in meta-training"
    figure = draw(known, task, curves, found)
    report.finish("few_shot_images", options, {title: [*rows.values()]}, figure)


if __name__ == "__main__":
    main()
