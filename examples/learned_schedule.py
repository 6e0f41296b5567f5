"""Learn the learning rate of each of 100 steps of Adam, and of each layer, by hypergradient.

    inner  θ_{t+1} = Adam step of f(θ_t, batch_t), the mean cross-entropy of 32 rows, by the rates
                     exp(φ_{t, layer}),   t = 0, …, 99
    outer  g(θ_100) = mean cross-entropy on the validation rows

The data are scikit-learn's handwritten digits. φ is differentiated through the 100 steps that use
it. A *draw* is what is random in a training: the initial parameters, and the rows of each batch.
The rates are learned twice: on one draw that stays as it is, and on eight new ones at each outer
step, which train side by side as one stack. All is then judged on 32 draws that none has seen, and
compared with the best constant rate of a grid, and with a cosine and a one-cycle schedule whose
peak is the best of that grid.

Maclaurin, Duvenaud & Adams 2015, *Gradient-based hyperparameter optimization through reversible
learning*. `--full` takes five times as many outer steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.optim import lr_scheduler
from tqdm import tqdm

import hypergrad as hg
import report

Rows = tuple[Tensor, Tensor]  # pixels from 0 to 1, shape (…, n, 64), and labels, shape (…, n)
Params = dict[str, Tensor]  # of several networks, which come first in each shape
Draw = tuple[Params, list[Rows]]
Each = dict[str, list[float]]  # the loss of every draw
Shapes = dict[str, tuple[int, int]]
Row = dict[str, Any]

# --- your part ------------------------------------------------------------------------------------

SHAPES = {"W₁": (64, 32), "b₁": (1, 32), "W₂": (32, 10), "b₂": (1, 10)}


def load(seed: int) -> list[Rows]:
    """1,000 rows to train on, and the others halved to validate and to test."""
    X, y = load_digits(return_X_y=True)
    X, rest, y, y_rest = train_test_split(X, y, train_size=1000, stratify=y, random_state=seed)
    halves = train_test_split(rest, y_rest, train_size=0.5, stratify=y_rest, random_state=seed)
    splits = ((X, y), halves[0::2], halves[1::2])
    return [(torch.as_tensor(x).float() / 16.0, torch.as_tensor(t)) for x, t in splits]


def draw(rows: Rows, networks: int, steps: int, seed: int) -> Draw:
    """Untrained networks, and what each sees in its steps."""
    source = torch.Generator().manual_seed(seed)
    params = {
        name: (torch.rand(networks, *shape, generator=source) - 0.5) / 4.0
        for name, shape in SHAPES.items()
    }
    chosen = torch.randint(len(rows[1]), (steps, networks, 32), generator=source)
    return params, [(rows[0][at], rows[1][at]) for at in chosen]


def losses(params: Params, rows: Rows) -> Tensor:
    """The mean cross-entropy of each network."""
    logits = predict(params, rows[0])
    labels = rows[1].expand(logits.shape[:-1]).unsqueeze(-1)
    return -logits.log_softmax(-1).gather(-1, labels).mean((-2, -1))


def predict(params: Params, x: Tensor) -> Tensor:
    """The logits of each network, shape (networks, n, 10)."""
    hidden = (x @ params["W₁"] + params["b₁"]).relu()
    return hidden @ params["W₂"] + params["b₂"]


def adam(log_rates: Tensor) -> hg.optimizers.Adam:
    """Adam by the rates exp(φ), of shape (steps, layers); either may be 1, for the same in all."""
    rates = log_rates.exp().expand(-1, len(SHAPES))
    return hg.optimizers.Adam(
        lr=lambda step: dict(zip(SHAPES, rates[step % len(rates)], strict=True))
    )


def learn(log_rates: Tensor, draws: Iterable[Draw], validation: Rows) -> tuple[Tensor, list[float]]:
    """φ after an outer step for each draw, and g before each."""
    log_rates, history = log_rates.clone().requires_grad_(), []
    optimiser = torch.optim.Adam([log_rates], lr=0.05)
    for params, batches in draws:
        result = hg.hypergradient(
            lambda params, _, batch: losses(params, batch).sum(),
            lambda params, _: losses(params, validation).mean(),
            params,
            log_rates,
            method=hg.Unrolled(adam, batches, memory="graph"),
        )
        log_rates.grad = result.grads
        optimiser.step()
        history.append(result.outer_value)
    return log_rates.detach(), history


# --- the end of your part -------------------------------------------------------------------------

GRID = torch.logspace(-3, 0, 13).log()  # four a decade
Schedule = Callable[[torch.optim.Optimizer, int], Any]  # a scheduler, for so many steps
SCHEDULES: dict[str, Schedule] = {
    "best constant rate": lambda optimiser, _: lr_scheduler.LambdaLR(optimiser, lambda _: 1.0),
    "best cosine": lr_scheduler.CosineAnnealingLR,
    "best one-cycle": lambda optimiser, steps: lr_scheduler.OneCycleLR(optimiser, 1.0, steps),
}
CONSTANT, EACH, BOTH = "best constant rate", "learned, steps", "learned, steps × layers"
NETWORKS, FRESH = 8, 32  # draws at once to learn from, and to judge by
WHAT, LOSS, SPREAD, SEEN = "rates", "validation loss", "±", "validation loss, the draw"


class Found(NamedTuple):
    """Log-rates, what it took to find them, and the losses on the way."""

    log_rates: Tensor
    numbers: int
    seconds: float
    history: list[float]


def train(log_rates: Tensor, start: Draw) -> Params:
    """The networks after their steps."""
    params, batches = start
    with torch.no_grad():
        trained: Params = hg.unroll(
            lambda params, _, batch: losses(params, batch).sum(),
            adam(log_rates),
            params,
            (),
            batches,
        )
    return trained


def shape(make: Schedule, steps: int) -> Tensor:
    """The logarithms of a schedule of PyTorch with a peak of 1."""
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=1.0, momentum=0.9)
    scheduler, rates = make(optimiser, steps), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr())
        optimiser.step()
        scheduler.step()
    return torch.tensor(rates).log()


def search(log_shape: Tensor, start: Draw, validation: Rows) -> Found:
    """The best peak of the grid."""
    began = time.process_time()
    values = [float(losses(train(peak + log_shape, start), validation).mean()) for peak in GRID]
    best = min(range(len(GRID)), key=values.__getitem__)
    return Found(GRID[best] + log_shape, 1, time.process_time() - began, values)


def find(splits: list[Rows], shapes: Shapes, draws: Sequence[Draw]) -> dict[str, Found]:
    """The best schedules of the grid on the first draw, and those learned from all, one a step."""
    found = {
        name: search(shape(make, len(draws[0][1])), draws[0], splits[1])
        for name, make in SCHEDULES.items()
    }
    start = found[CONSTANT].log_rates[:1]
    for name, size in shapes.items():
        began = time.process_time()
        watched = tqdm(draws, desc=name, leave=False)
        rates, history = learn(start.expand(size), watched, splits[1])
        found[name] = Found(rates, rates.numel(), time.process_time() - began, history)
    return found


def judge(found: dict[str, Found], splits: list[Rows], fresh: Draw) -> tuple[list[Row], Each]:
    """What each does on draws that it has not seen: a table, and the validation losses."""
    rows, each = [], {}
    for name, one in found.items():
        params = train(one.log_rates, fresh)
        validation, test = (losses(params, split) for split in splits[1:])
        right = predict(params, splits[2][0]).argmax(-1) == splits[2][1]
        rows.append(
            {
                WHAT: name,
                "numbers": one.numbers,
                "CPU seconds": one.seconds,
                LOSS: float(validation.mean()),
                SPREAD: float(validation.std()),
                "test loss": float(test.mean()),
                "test accuracy, %": 100.0 * float(right.double().mean()),
            }
        )
        each[name] = validation.tolist()
    return rows, each


def draw_figure(several: dict[str, Found], one: dict[str, Found], each: Each) -> Figure:
    """The rates of the schedules, those of each layer, the outer loss, and losses by draw."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    for name in (*SCHEDULES, EACH):
        rates = several[name].log_rates.exp()[:, 0]
        first.plot(rates, linewidth=2.5 if name == EACH else 1.2, label=name)
    first.set(title="A rate a step", ylim=(1e-3, 0.3))
    for name, rates in zip(SHAPES, several[BOTH].log_rates.exp().T, strict=True):
        second.plot(rates, label=name)
    second.set(title="A rate a step and a layer", ylim=(1e-3, 0.3))
    for axes in (first, second):
        axes.set(xlabel="step of Adam", ylabel="learning rate", yscale="log")
    for label, found in (("on new draws", several), ("on one draw", one)):
        third.plot(found[BOTH].history, label=label)
    third.set(xlabel="outer step", ylabel=LOSS, title="While a rate a step and a layer is learned")
    third.set_ylim(0.0, 1.25 * max(several[BOTH].history))
    names = [*each]
    fourth.boxplot([each[name] for name in names], orientation="horizontal", whis=(0, 100))
    fourth.set_yticks(range(1, len(names) + 1), [name.replace(", ", ",\n") for name in names])
    fourth.invert_yaxis()
    fourth.set(xlabel=LOSS, title=f"On {FRESH} draws that none has seen")
    for axes in (first, second):
        axes.legend(loc="lower center", bbox_to_anchor=(0.44, 0.0), ncols=2, fontsize=9)
    third.legend(loc="upper center", ncols=2)
    for axes in (first, second, third, fourth):
        axes.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Search the grid, learn on one draw and on many, judge; print, save and draw."""
    parser = report.arguments(__doc__, full="200 outer steps", seed="of splits and draws")
    parser.add_argument("--steps", type=int, help="outer steps; 40")
    parser.add_argument("--length", type=int, default=100, help="steps of Adam; 100")
    options = parser.parse_args(argv)
    steps = 200 if options.full else 40
    if options.steps is not None:
        steps = options.steps
    for name, value in {"steps": steps, "length": options.length}.items():
        if value < 2:
            parser.error(f"--{name} must be at least 2, not {value}")

    torch.set_num_threads(1)  # faster for operations as small as these
    splits, length, first = load(options.seed), options.length, 1_000_000 * options.seed
    many = [draw(splits[0], NETWORKS, length, first + step) for step in range(steps)]
    single = draw(splits[0], 1, length, first)
    fresh = draw(splits[0], FRESH, length, first + 999_999)
    layers = len(SHAPES)
    shapes = {"learned, layers": (1, layers), EACH: (length, 1), BOTH: (length, layers)}
    several = find(splits, shapes, many)
    one = find(splits, {BOTH: shapes[BOTH]}, [single] * steps)
    rows, each = judge(several, splits, fresh)
    other, other_each = judge(one, splits, fresh)
    seen = [
        {
            WHAT: row[WHAT],
            SEEN: float(losses(train(one[row[WHAT]].log_rates, single), splits[1])),
            f"{LOSS}, fresh draws": row[LOSS],
            SPREAD: row[SPREAD],
        }
        for row in other
    ]
    each[f"{BOTH}, one draw"] = other_each[BOTH]
    tables = {
        f"Found on {NETWORKS} draws, new ones at each of {steps} outer steps": rows,
        "Found on one draw": seen,
    }
    report.finish("learned_schedule", options, tables, draw_figure(several, one, each))


if __name__ == "__main__":
    main()
