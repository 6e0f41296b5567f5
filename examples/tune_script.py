"""Tune ten numbers of a training script at once, through its own steps.

    inner  θ_T = T steps of Adam on the cross-entropy of noisy rows with smoothed labels, plus a
                 decay of each layer, gradients clipped, rates on a cosine
    outer  g(θ_T) = mean cross-entropy on the validation rows, batch norm in eval mode

The script is what many have: a network with batch norm, a cosine schedule, clipping, a few hundred
rows of scikit-learn's digits. φ holds the decay and the rate of each of three layers, where the
cosine ends, the smoothing of the labels, and how much noise is on the pixels and the hidden units.
The running statistics of batch norm, which g reads, depend on φ as the weights do, and are
differentiated with them. Twelve outer steps are compared with random search for the same time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import hypergrad as hg
import report

Rows = tuple[Tensor, Tensor]  # pixels from 0 to 1, and labels
Hparams = dict[str, Tensor]
Row = dict[str, Any]

# --- your part ------------------------------------------------------------------------------------


class Network(nn.Module):
    """Three layers, batch norm after the first two, and noise of a given size."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, width), nn.Linear(width, width)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(width), nn.BatchNorm1d(width)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The logits; ``noise`` is on the pixels and on both hidden layers while training."""
        if noise is not None:
            x = x + noise[0] * torch.randn_like(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)).relu()
            if noise is not None:
                x = x * (1.0 + noise[1] * torch.randn_like(x))
        logits: Tensor = self.head(x)
        return logits


START = {
    "rates": torch.full((3,), math.log(3e-3)),
    "decays": torch.full((3,), math.log(1e-3)),
    "end": torch.tensor(math.log(0.1)),  # of the cosine, a part of the rates
    "smoothing": torch.tensor(-3.0),  # a logit
    "noises": torch.full((2,), math.log(0.1)),
}


def layer(name: str) -> int:
    """The layer that a parameter belongs to."""
    return 2 if name.startswith("head") else int(name.split(".")[1])


def tune(
    model: Network, hparams: Hparams, loader: DataLoader[Any], validation: Rows, budget: Budget
) -> tuple[hg.bilevel.History, hg.bilevel.KeepBest]:
    """Twelve outer steps; ``hparams`` are the best of them afterwards."""

    def inner(model: Network, h: Hparams, batch: Rows) -> Tensor:
        model.train()
        x, labels = batch
        logits = model(x, h["noises"].exp())
        decays, named = h["decays"].exp(), model.named_parameters()
        decay = sum(decays[layer(k)] * p.square().sum() for k, p in named if p.ndim > 1)
        target = F.one_hot(labels, 10).to(logits)
        smooth = h["smoothing"].sigmoid()
        target = (1.0 - smooth) * target + smooth / 10.0
        return -(target * logits.log_softmax(-1)).sum(-1).mean() + decay

    def outer(model: Network, h: Hparams, _: Any) -> Tensor:
        model.eval()
        return F.cross_entropy(model(validation[0]), validation[1])

    def adam(h: Hparams) -> hg.optimizers.Adam:
        names = [name for name, _ in model.named_parameters()]
        peaks, end = h["rates"].exp(), h["end"].exp()

        def rates(step: int) -> dict[str, Tensor]:
            cosine = 0.5 * (1.0 + math.cos(math.pi * step / budget.inner_steps))
            return {name: peaks[layer(name)] * (end + (1.0 - end) * cosine) for name in names}

        return hg.optimizers.Adam(lr=rates)

    best = hg.bilevel.KeepBest("outer_loss")
    solver = hg.BilevelSolver(
        hg.Level(inner, model, adam, loader, clip=1.0),
        hg.Level(outer, hparams, torch.optim.Adam(hparams.values(), lr=budget.lr), clip=1.0),
        method=hg.Unrolled(memory="graph"),
        inner_steps=budget.inner_steps,
        outer_steps=budget.outer_steps,
        restart="initial",
        callbacks=[best],
    )
    return solver.run(), best


# --- the end of your part -------------------------------------------------------------------------

TUNED, SEARCHED, UNTUNED = "tuned through the steps", "random search", "as it was"
WHAT, TEST = "numbers", "test loss"


class Budget(NamedTuple):
    """How long the script trains, and how many outer steps of what size tune it."""

    inner_steps: int
    outer_steps: int
    lr: float = 0.25


class Answer(NamedTuple):
    """What was found for one seed: a row of the table, and validation losses by seconds."""

    row: Row
    course: list[tuple[float, float]]


def load(seed: int) -> list[Rows]:
    """300 rows to train on, 300 to validate, and the others to test."""
    X, y = load_digits(return_X_y=True)
    X, rest, y, y_rest = train_test_split(X, y, train_size=300, stratify=y, random_state=seed)
    halves = train_test_split(rest, y_rest, train_size=300, stratify=y_rest, random_state=seed)
    splits = ((X, y), halves[0::2], halves[1::2])
    return [(torch.as_tensor(x).float() / 16.0, torch.as_tensor(t)) for x, t in splits]


def batches(rows: Rows) -> DataLoader[Any]:
    """Of 50 rows, in an order of their own in each pass."""
    return DataLoader(TensorDataset(*rows), 50, shuffle=True)


def fresh(seed: int) -> Network:
    """The network before its training, always the same."""
    torch.manual_seed(seed)
    return Network()


@torch.no_grad()
def loss(model: Network, rows: Rows) -> float:
    """The mean cross-entropy in eval mode."""
    model.eval()
    return float(F.cross_entropy(model(rows[0]), rows[1]))


def train(hparams: Hparams, train_rows: Rows, budget: Budget, seed: int) -> Network:
    """The script with other numbers, by PyTorch alone."""
    model = fresh(seed)
    groups = [
        {"params": [p for k, p in model.named_parameters() if layer(k) == i],
         "lr": float(hparams["rates"][i].exp())}
        for i in range(3)
    ]  # fmt: skip
    optimiser = torch.optim.Adam(groups)
    end, decays = float(hparams["end"].exp()), hparams["decays"].exp()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: (
            end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * step / budget.inner_steps))
        ),
    )
    smoothing, noises = float(hparams["smoothing"].sigmoid()), hparams["noises"].exp()
    rows = round_and_round(batches(train_rows))
    model.train()
    for batch in islice(rows, budget.inner_steps):
        value = F.cross_entropy(model(batch[0], noises), batch[1], label_smoothing=smoothing)
        weights = [(k, p) for k, p in model.named_parameters() if p.ndim > 1]
        value = value + sum(decays[layer(k)] * p.square().sum() for k, p in weights)
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model


def round_and_round(loader: DataLoader[Any]) -> Iterator[Any]:
    """Batches for ever."""
    while True:
        yield from loader


def drawn() -> Hparams:
    """Numbers of a random trial: a decade around the script's own, in the logarithm."""
    return {
        name: value + (2.0 * torch.rand_like(value) - 1.0) * math.log(10.0)
        for name, value in START.items()
    }


def by_steps(splits: list[Rows], budget: Budget, seed: int) -> tuple[Answer, Hparams]:
    """Ours: the best of the outer steps, trained once more."""
    hparams = {name: value.clone().requires_grad_() for name, value in START.items()}
    began = time.process_time()
    history, best = tune(fresh(seed), hparams, batches(splits[0]), splits[1], budget)
    seconds = time.process_time() - began
    found = {name: value.detach() for name, value in hparams.items()}
    model = train(found, splits[0], budget, seed)
    row = {
        "seed": seed, WHAT: TUNED, "trials": len(history), "CPU seconds": seconds,
        "validation loss": best.best, TEST: loss(model, splits[2]),
    }  # fmt: skip
    marks: list[tuple[float, float]] = []
    low = math.inf
    for i, value in enumerate(history["outer_loss"]):
        low = min(low, value)
        marks.append(((i + 1) * seconds / len(history), low))
    return Answer(row, marks), found


def by_search(
    splits: list[Rows], budget: Budget, seed: int, seconds: float, at_least: int
) -> Answer:
    """Random trials for so many seconds, and at least so many; the first are the script's own."""
    began = time.process_time()
    low, chosen, trials = math.inf, fresh(seed), 0
    marks: list[tuple[float, float]] = []
    while trials < at_least or time.process_time() - began < seconds:
        # Other draws of numbers in each seed; each trial starts from the same network.
        torch.manual_seed(1000 * seed + trials)
        numbers = START if trials == 0 else drawn()
        model = train(numbers, splits[0], budget, seed)
        value = loss(model, splits[1])
        trials += 1
        if value < low:
            low, chosen = value, model
        marks.append((time.process_time() - began, low))
    row = {
        "seed": seed, WHAT: SEARCHED, "trials": trials, "CPU seconds": time.process_time() - began,
        "validation loss": low, TEST: loss(chosen, splits[2]),
    }  # fmt: skip
    return Answer(row, marks)


def draw_figure(answers: list[Answer], found: list[Hparams]) -> Figure:
    """Validation losses by seconds, and what became of the ten numbers."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = {TUNED: "C0", SEARCHED: "C1"}
    for answer in answers:
        what = answer.row[WHAT]
        if what in colours:
            label = what if answer.row["seed"] == answers[0].row["seed"] else None
            left.step(
                *zip(*answer.course, strict=True), color=colours[what], where="post", label=label
            )
    left.set(xlabel="CPU seconds", ylabel="best validation loss so far", yscale="log")
    left.legend()
    names = [f"{name}[{i}]" for name, value in START.items() for i in range(value.numel())]
    for seed, hparams in enumerate(found):
        moved = torch.cat([(hparams[k] - START[k]).flatten() for k in START])
        right.plot(
            moved.tolist(), range(len(names)), "o", label=f"seed {answers[3 * seed].row['seed']}"
        )
    right.axvline(0.0, color="grey", linewidth=1)
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="change of φ")
    right.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, search, compare; print tables and save them with a picture."""
    parser = report.arguments(__doc__, seed="the first; each has its rows and its network")
    parser.add_argument("--seeds", type=int, default=3, help="how many; 3")
    parser.add_argument("--steps", type=int, default=12, help="outer steps; 12")
    parser.add_argument("--length", type=int, default=60, help="steps of the script; 60")
    parser.add_argument("--trials", type=int, default=35, help="random trials at least; 35")
    options = parser.parse_args(argv)
    for name in ("seeds", "steps", "length", "trials"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    budget = Budget(options.length, options.steps)
    answers, found = [], []
    for seed in tqdm(range(options.seed, options.seed + options.seeds), desc="seeds", leave=False):
        splits = load(seed)
        ours, hparams = by_steps(splits, budget, seed)
        searched = by_search(splits, budget, seed, ours.row["CPU seconds"], options.trials)
        plain = train(START, splits[0], budget, seed)
        values = {"validation loss": loss(plain, splits[1]), TEST: loss(plain, splits[2])}
        answers += [ours, searched, Answer({"seed": seed, WHAT: UNTUNED, "trials": 1} | values, [])]
        found.append(hparams)
    means = [
        {
            WHAT: what,
            **{
                key: sum(a.row[key] for a in answers if a.row[WHAT] == what) / options.seeds
                for key in ("validation loss", TEST)
            },
        }
        for what in (TUNED, SEARCHED, UNTUNED)
    ]
    tables = {"Each seed": [answer.row for answer in answers], "The mean": means}
    report.finish("tune_script", options, tables, draw_figure(answers, found))


if __name__ == "__main__":
    main()
