"""Learn to learn a sinusoid from ten points, by MAML, first-order MAML and iMAML.

    outer  g(φ) = mean over tasks of the squared error of θ_t(φ) on points that θ_t never saw
    MAML   θ_t(φ) = φ − α ∇f_t(φ)                    one step, which g is differentiated through
    iMAML  θ_t(φ) = argmin_θ f_t(θ) + ½ λ ‖θ − φ‖²   a solution, however it was found

φ are the weights that a network starts from in every task, and f_t is its mean squared error on ten
points of y = a sin(x − b), with a, b and x of its own. Such a network trained on all tasks together
is there to compare: it learns the mean of all sinusoids.

Finn, Abbeel & Levine 2017, *Model-agnostic meta-learning for fast adaptation of deep networks*: the
network, the tasks and the step sizes are those of their section 5.1. Rajeswaran, Finn, Kakade &
Levine 2019, *Meta-learning with implicit gradients*: iMAML. `--full` takes 10,000 iterations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn import functional as F
from tqdm import tqdm

import hypergrad as hg
import report

Rows: TypeAlias = tuple[Tensor, Tensor]  # x and y, shape (points,), after a dimension for tasks
Adapt: TypeAlias = Callable[..., Tensor]  # (φ, points of a task) ↦ its θ

# --- your part ------------------------------------------------------------------------------------

LAYERS = nn.Linear(1, 40), nn.Linear(40, 40), nn.Linear(40, 1)
ALPHA, LAMBDA = 0.01, 0.5


def network(theta: Tensor, x: Tensor) -> Tensor:
    """The outputs of a network whose weights are one vector."""
    a, b, c, d, e, f = theta.split([40, 40, 1600, 40, 40, 1])
    hidden = F.linear(x[:, None], a[:, None], b).relu()
    return F.linear(hidden, c.view(40, 40), d).relu() @ e + f


def loss(theta: Tensor, rows: Rows) -> Tensor:
    """f: the mean squared error."""
    return (network(theta, rows[0]) - rows[1]).square().mean()


def proximal(theta: Tensor, phi: Tensor, rows: Rows) -> Tensor:
    """What iMAML minimises: θ leaves φ as far as the points are worth it."""
    return loss(theta, rows) + 0.5 * LAMBDA * (theta - phi).square().sum()


def maml(phi: Tensor, rows: Rows, steps: int = 1, lr: float = ALPHA, **options: Any) -> Tensor:
    """θ after steps of gradient descent, through which gradients flow."""
    sgd = hg.optimizers.SGD(lr)
    adapted: Tensor = hg.unroll(
        lambda theta, _: loss(theta, rows), sgd, phi, (), steps, memory="graph", **options
    )
    return adapted


@hg.argmin(proximal, solver=hg.CG(maxiter=10), on_failure="ignore")
def imaml(phi: Tensor, rows: Rows, steps: int = 3) -> Tensor:
    """θ near the minimum, by Gauss–Newton steps, through which no gradient flows."""
    theta, (x, y), sizes = phi, rows, 0.5 ** torch.arange(6)
    for _ in range(steps):
        J = jacrev(network)(theta, x)
        error = network(theta, x) - y + J @ (phi - theta)
        kernel = J @ J.T + 0.5 * LAMBDA * len(y) * torch.eye(len(y))
        step = phi - J.T @ torch.linalg.solve(kernel, error) - theta
        values = vmap(lambda size, theta, step: proximal(theta + size * step, phi, rows),
                      in_dims=(0, None, None))(sizes, theta, step)  # fmt: skip
        theta = theta + sizes[values.argmin()] * step
    return theta


def tasks(count: int, points: int, unseen: int) -> tuple[Rows, Rows]:
    """Sinusoids: the points to learn from, and those to be judged by."""
    a, b = 0.1 + 4.9 * torch.rand(count, 1), math.pi * torch.rand(count, 1)
    x = 10.0 * torch.rand(count, points + unseen) - 5.0
    y = a * (x - b).sin()
    return (x[:, :points], y[:, :points]), (x[:, points:], y[:, points:])


def meta_train(adapt: Adapt, iterations: int, points: int, seed: int) -> Tensor:
    """φ: in each iteration 25 new tasks, adapted to side by side."""
    torch.manual_seed(seed)
    for layer in LAYERS:
        layer.reset_parameters()
    phi = nn.utils.parameters_to_vector(p for layer in LAYERS for p in layer.parameters())
    phi = phi.detach().requires_grad_()
    adam = torch.optim.Adam([phi], lr=1e-3)
    for _ in tqdm(range(iterations), leave=False):
        learn, judge = tasks(25, points, points)
        errors = vmap(lambda seen, unseen: loss(adapt(phi, seen), unseen))(learn, judge)
        adam.zero_grad()
        errors.mean().backward()
        adam.step()
    return phi.detach()


# --- the end of your part -------------------------------------------------------------------------

STEPS = (0, 1, 5, 10)
TOGETHER = "all tasks together"
RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)

# How φ is learned, and how a new task is learned from φ.
METHODS: dict[str, tuple[Adapt, Adapt]] = {
    "MAML": (maml, maml),
    "FOMAML": (lambda phi, rows: maml(phi, rows, first_order=True), maml),
    "iMAML": (imaml, imaml),
}


def after(adapt: Adapt, phi: Tensor, rows: Rows, steps: int) -> Tensor:
    """θ after so many steps."""
    with torch.no_grad():
        return vmap(lambda points: adapt(phi, points, steps) if steps else phi)(rows)


def errors(adapt: Adapt, phi: Tensor, data: tuple[Rows, Rows], steps: int) -> Tensor:
    """The error of each task after so many steps."""
    return vmap(loss)(after(adapt, phi, data[0], steps), data[1])


def best_rate(phi: Tensor, data: tuple[Rows, Rows]) -> float:
    """The step size whose error after ten steps is least; one that diverges has none."""
    found = {}
    for lr in RATES:
        error = float(errors(at_rate(lr), phi, data, 10).mean())
        found[lr] = error if math.isfinite(error) else math.inf
    return min(found, key=found.__getitem__)


def at_rate(lr: float) -> Adapt:
    """Gradient descent with this step size."""
    return lambda phi, rows, steps: maml(phi, rows, steps, lr)


def row_of(name: str, found: dict[int, Tensor], seconds: float) -> dict[str, Any]:
    """The mean error and its 95 % interval after each number of steps."""
    row: dict[str, Any] = {"method": name}
    for steps, error in found.items():
        half = 1.96 * float(error.std()) / math.sqrt(len(error))
        row[f"after {steps}"] = f"{float(error.mean()):.3f} ± {half:.3f}"
    return {**row, "seconds of meta-training": seconds}


def draw(learned: dict[str, tuple[Adapt, Tensor]], found: dict[str, dict[int, Tensor]],
         data: tuple[Rows, Rows]) -> Figure:  # fmt: skip
    """The first test task before and after adaptation, and the error by steps over all."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    pictured = [name for name in learned if name != "FOMAML"]
    *panels, last = figure.subplots(1, len(pictured) + 1)
    rows = data[0][0][:1], data[0][1][:1]
    x, order = data[1][0][0], data[1][0][0].argsort()
    for axes, name in zip(panels, pictured, strict=True):
        adapt, phi = learned[name]
        axes.plot(x[order], data[1][1][0][order], color="0.75", linewidth=5, label="the sinusoid")
        looks = {0: ("C0", ":"), 1: ("C1", "--"), 10: ("C3", "-")}
        for steps, (color, line) in looks.items():
            y = network(after(adapt, phi, rows, steps)[0], x)
            label = f"{steps or 'no'} step{'s' * (steps != 1)}"
            axes.plot(x[order], y[order], color=color, linestyle=line, label=label)
        axes.plot(rows[0][0], rows[1][0], "k^", label="its points")
        axes.set(xlabel="x", title=name)
        axes.grid(alpha=0.3)
        axes.sharey(panels[0])
    panels[0].set_ylabel("y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=5)
    for name, error in found.items():
        mean = [float(value.mean()) for value in error.values()]
        half = [1.96 * float(value.std()) / math.sqrt(len(value)) for value in error.values()]
        last.errorbar(range(len(STEPS)), mean, half, marker="o", capsize=3, label=name)
    last.set_xticks(range(len(STEPS)), STEPS)
    last.set(xlabel="steps of adaptation", ylabel="error on unseen points", yscale="log",
             title="New tasks")  # fmt: skip
    last.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    last.set_yticks([], minor=True)
    last.grid(alpha=0.3)
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower right", ncols=4)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Meta-train by each method, adapt to new tasks; print, save and draw."""
    parser = report.arguments(__doc__, full="10,000 iterations", seed="of weights and tasks")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME",
                        help=f"any of {', '.join(METHODS)}; all")  # fmt: skip
    parser.add_argument("--iterations", type=int, help="of meta-training; 1000")
    parser.add_argument("--points", type=int, default=10, help="to learn a task from; 10")
    parser.add_argument("--tasks", type=int, default=600, help="new ones, to judge by; 600")
    options = parser.parse_args(argv)
    if options.iterations is None:
        options.iterations = 10_000 if options.full else 1_000
    for name, least in (("iterations", 1), ("points", 1), ("tasks", 2)):
        if (value := getattr(options, name)) < least:
            parser.error(f"--{name} must be at least {least}, not {value}")

    torch.set_num_threads(1)  # faster for operations as small as these
    learned, seconds = {}, {}
    methods = {name: METHODS[name] for name in options.method}
    methods[TOGETHER] = lambda phi, rows: phi, maml
    for name, (meta, adapt) in methods.items():
        began = time.perf_counter()
        phi = meta_train(meta, options.iterations, options.points, options.seed)
        learned[name], seconds[name] = (adapt, phi), time.perf_counter() - began
        print(f"{name}: {seconds[name]:.0f} seconds")
    torch.manual_seed(options.seed + 1)
    validation, test = (tasks(options.tasks, options.points, 100) for _ in range(2))
    # MAML and iMAML adapt as they were meta-trained to; the baseline is tuned.
    _, phi = learned[TOGETHER]
    lr = best_rate(phi, validation)
    learned[TOGETHER] = at_rate(lr), phi
    print(f"{TOGETHER}: a step size of {lr} is best on {options.tasks} other tasks")
    found = {
        name: {steps: errors(adapt, phi, test, steps) for steps in STEPS}
        for name, (adapt, phi) in learned.items()
    }
    rows = [row_of(name, found[name], seconds[name]) for name in found]
    title = f"Mean squared error on {options.tasks} new tasks, by steps of adaptation to " \
            f"{options.points} points"  # fmt: skip
    report.finish("few_shot_sinusoid", options, {title: rows}, draw(learned, found, test))


if __name__ == "__main__":
    main()
