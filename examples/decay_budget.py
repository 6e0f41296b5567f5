"""Tune up to 650 weight decays at an equal budget: hypergradients, random search, Optuna.

    inner  f(θ, φ) = mean loss on the training rows + ½ Σ_i d(φ_i) θ_i²
    outer  g(θ)    = mean loss on the validation rows

θ is a linear model, with one decay for each of its parameters; θ*(φ) is 100 steps of gradient
descent from zero, whoever asks for it. The budget counts what everybody needs: evaluations of f and
g, and products with the Hessian, which cost about as much. Three problems: breast cancer (31
decays) and digits (650), where d is exp, and the synthetic one of Hataya & Yamada (2023, *Nyström
Method for Accurate and Scalable Implicit Differentiation*): 100 decays, d(φ) = φ, learned by SGD of
rate 1 and momentum 0.9. The searches without gradients draw from the same range, one decay for all
parameters or all decays apart.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optuna
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import hypergrad as hg
import report

Rows = tuple[Tensor, Tensor]  # features, shape (m, d), and labels, shape (m,)

LOW, HIGH = 1e-4, 10.0  # of every decay
INNER_STEPS, INNER_LR = 100, 0.1

# --- your part ------------------------------------------------------------------------------------


@dataclass
class Problem:
    """f, g and their data; ``spent`` counts their evaluations."""

    train: Rows
    validation: Rows
    test: Rows
    decay: Callable[[Tensor], Tensor]  # d
    start: Tensor  # φ at the start, of the shape of θ
    bounds: tuple[float, float]  # of φ
    outer_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    spent: int = 0

    def loss(self, theta: Tensor, rows: Rows) -> Tensor:
        """The mean logistic loss, or the mean cross-entropy of several classes."""
        scores = F.linear(rows[0], theta)
        if len(theta) == 1:
            return F.binary_cross_entropy_with_logits(scores[:, 0], rows[1].to(scores.dtype))
        return F.cross_entropy(scores, rows[1])

    def inner(self, theta: Tensor, phi: Tensor, _: None = None) -> Tensor:
        """F."""
        self.spent += 1
        return self.loss(theta, self.train) + 0.5 * (self.decay(phi) * theta.square()).sum()

    def outer(self, theta: Tensor, phi: Tensor, _: None = None) -> Tensor:
        """G."""
        self.spent += 1
        return self.loss(theta, self.validation)


def descend(problem: Problem, method: hg.bilevel.Method) -> hg.BilevelSolver:
    """The loop: in every outer step θ starts from zero, and φ stays within its bounds."""
    theta, phi = torch.zeros_like(problem.start, requires_grad=True), problem.start.clone()
    return hg.BilevelSolver(
        hg.Level(problem.inner, theta, torch.optim.SGD([theta], lr=INNER_LR)),
        hg.Level(problem.outer, phi, problem.outer_optimizer([phi])),
        method=method,
        inner_steps=INNER_STEPS,
        restart="initial",
        project=lambda phi: phi.clamp(*problem.bounds),
    )


# --- the end of your part -------------------------------------------------------------------------


@dataclass
class Course:
    """What a search has seen: g after each evaluation of a φ, and the best φ."""

    spent: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: float = 0.0

    def add(self, spent: int, loss: float, phi: Tensor) -> None:
        """Remember one φ."""
        if loss <= min(self.losses, default=math.inf):
            self.best = phi.clone()
        self.spent.append(spent)
        self.losses.append(loss)


Search = Callable[[Problem, int, int], Course]  # of a problem, the budget and a seed


def by_gradient(method: Callable[[], hg.bilevel.Method]) -> Search:
    """Outer steps until the budget is spent."""

    def search(problem: Problem, budget: int, _: int) -> Course:
        course, products, loop = Course(), 0, descend(problem, method())
        loop.outer_steps = budget  # more than there can be
        phi = loop.hparams.clone()
        for record in loop:
            products += record.matvecs
            course.add(problem.spent + products, record.outer_loss, phi)
            phi = loop.hparams.clone()
            if course.spent[-1] >= budget:
                break
        return course

    return search


def by_trial(sampler: Callable[[int], optuna.samplers.BaseSampler], *, all_decays: bool) -> Search:
    """Optuna asks for decays, all or one for all, uniform in their logarithms if it is random."""

    def search(problem: Problem, budget: int, seed: int) -> Course:
        course, study = Course(), optuna.create_study(sampler=sampler(seed))
        names = [str(i) for i in range(problem.start.numel() if all_decays else 1)]
        while problem.spent + INNER_STEPS < budget:
            trial = study.ask()
            decays = [trial.suggest_float(name, LOW, HIGH, log=True) for name in names]
            phi = torch.tensor(decays).expand(problem.start.numel()).view_as(problem.start)
            phi = phi.log() if problem.decay is torch.exp else phi
            loss = float(problem.outer(train(problem, phi), phi))
            study.tell(trial, loss)
            course.add(problem.spent, loss, phi)
        return course

    return search


def train(problem: Problem, phi: Tensor) -> Tensor:
    """θ*(φ), by the steps that the loop makes."""
    theta = torch.zeros_like(phi)
    for _ in range(INNER_STEPS):
        theta.requires_grad_()
        (gradient,) = torch.autograd.grad(problem.inner(theta, phi), theta)
        theta = theta.detach() - INNER_LR * gradient
    return theta


def random(seed: int) -> optuna.samplers.BaseSampler:
    """Independent draws."""
    return optuna.samplers.RandomSampler(seed)


def parzen(seed: int) -> optuna.samplers.BaseSampler:
    """The tree-structured Parzen estimator, Optuna's default."""
    return optuna.samplers.TPESampler(seed=seed)


SEARCHES: dict[str, Search] = {
    "CG": by_gradient(lambda: hg.CG(rtol=1e-2)),
    "CG, damped by 1 / (η T)": by_gradient(
        lambda: hg.Implicit(hg.CG(rtol=1e-2), damping=1 / (INNER_LR * INNER_STEPS))
    ),
    "Nyström-PCG": by_gradient(
        lambda: hg.CG(rtol=1e-2, preconditioner=hg.NystromPreconditioner(10))
    ),
    "Nyström, rank 10": by_gradient(lambda: hg.Nystrom(rank=10, rho=0.1, test="gaussian")),
    "Neumann, 10 terms": by_gradient(lambda: hg.Neumann(terms=10)),
    "identity × η T": by_gradient(lambda: hg.Identity(scale=INNER_LR * INNER_STEPS)),
    "unrolled": by_gradient(hg.Unrolled),
    "Optuna, all decays": by_trial(parzen, all_decays=True),
    "Optuna, one decay": by_trial(parzen, all_decays=False),
    "random, all decays": by_trial(random, all_decays=True),
    "random, one decay": by_trial(random, all_decays=False),
}


def split(X: Any, y: Any, size: int, seed: int) -> Problem:
    """``size`` rows to train on, the others halved; all decays exp(φ) = 0.1 at the start."""
    X, rest, y, y_rest = train_test_split(X, y, train_size=size, stratify=y, random_state=seed)
    halves = train_test_split(rest, y_rest, train_size=0.5, stratify=y_rest, random_state=seed)
    center, scale = X.mean(0), X.std(0).clip(min=1.0)  # pixels that hardly vary are only centred

    def rows(x: Any, y: Any) -> Rows:
        x = torch.as_tensor((x - center) / scale, dtype=torch.float32)
        return torch.cat([x, torch.ones(len(x), 1)], 1), torch.as_tensor(y)

    parameters = (1 if y.max() == 1 else int(y.max()) + 1, X.shape[1] + 1)
    return Problem(
        rows(X, y),
        rows(*halves[0::2]),
        rows(*halves[1::2]),
        torch.exp,
        torch.full(parameters, 0.1).log(),
        (math.log(LOW), math.log(HIGH)),
        partial(torch.optim.Adam, lr=0.1),
    )


def breast_cancer(seed: int) -> Problem:
    """100 rows to train on, 234 and 235 to validate and to test; 31 decays."""
    X, y = load_breast_cancer(return_X_y=True)
    return split(X / X.std(0), y, 100, seed)


def digits(seed: int) -> Problem:
    """200 rows to train on, 798 and 799 to validate and to test; 650 decays."""
    X, y = load_digits(return_X_y=True)
    return split(X, y, 200, seed)


def synthetic(seed: int, lr: float = 1.0) -> Problem:
    """Hataya & Yamada's: 500 + 500 points of 100 dimensions, decays φ = 1 at first, SGD."""
    draw = torch.Generator().manual_seed(seed)
    w, X = torch.randn(100, generator=draw), torch.randn(3000, 100, generator=draw)
    y = (X @ w + 0.1 * torch.randn(3000, generator=draw) > 0).long()
    train, validation, test = zip(X.split([500, 500, 2000]), y.split([500, 500, 2000]), strict=True)
    return Problem(
        train,
        validation,
        test,
        lambda phi: phi,
        torch.ones(1, 100),
        (1e-8, HIGH),
        partial(torch.optim.SGD, lr=lr, momentum=0.9),
    )


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "breast cancer": breast_cancer,
    "digits": digits,
    "synthetic": synthetic,
    "synthetic, ten times the rate": partial(synthetic, lr=10.0),
}


def row(name: str, problems: Sequence[Problem], courses: Sequence[Course]) -> dict[str, Any]:
    """Of the table: means over the seeds, and the spread of the test loss."""
    thetas = [train(*pair) for pair in zip(problems, (run.best for run in courses), strict=True)]
    tests = [float(p.loss(theta, p.test)) for p, theta in zip(problems, thetas, strict=True)]
    hits = [accuracy(theta, p.test) for p, theta in zip(problems, thetas, strict=True)]
    return {
        "search": name,
        "φ evaluated": statistics.mean(len(run.losses) for run in courses),
        "validation loss": statistics.mean(min(run.losses) for run in courses),
        "test loss": statistics.mean(tests),
        "± over seeds": statistics.stdev(tests) if len(tests) > 1 else None,
        "test accuracy, %": statistics.mean(hits),
        "seconds": statistics.mean(run.seconds for run in courses),
    }


def accuracy(theta: Tensor, rows: Rows) -> float:
    """The share of right answers, in percent."""
    scores = F.linear(rows[0], theta)
    predicted = (scores[:, 0] > 0).long() if len(theta) == 1 else scores.argmax(1)
    return 100.0 * float((predicted == rows[1]).double().mean())


def draw(courses: dict[str, dict[str, list[Course]]]) -> Figure:
    """The least validation loss so far over the evaluations, a panel a problem; the first seed."""
    figure = Figure(figsize=(4.2 * len(courses), 5), layout="constrained")
    panels = figure.subplots(1, len(courses), squeeze=False)[0]
    for axes, (problem, searches) in zip(panels, courses.items(), strict=True):
        for number, (name, (first, *_)) in enumerate(searches.items()):
            line = ":" if "one" in name else "--" if "all" in name else "-"
            least = torch.tensor(first.losses).cummin(0).values
            axes.plot(first.spent, least, line, color=f"C{number % 10}", label=name)
        axes.set(title=problem, xlabel="evaluations of f and g, and products")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss, the least so far")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Search each problem in every way; print, save and draw."""
    parser = report.arguments(
        __doc__, full="three seeds and a budget of 20,000", seed="of data and searches, the first"
    )
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=[*PROBLEMS],
                        metavar="NAME", help=f"any of {', '.join(PROBLEMS)}; all")  # fmt: skip
    parser.add_argument("--budget", type=int, help="evaluations for each search; 4000")
    options = parser.parse_args(argv)
    budget = options.budget or (20_000 if options.full else 4_000)
    if budget < 2 * INNER_STEPS:
        parser.error(f"--budget must be at least {2 * INNER_STEPS}, not {budget}")

    torch.set_num_threads(1)  # faster for operations as small as these
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seeds = range(options.seed, options.seed + (3 if options.full else 1))
    tables, courses = {}, {}
    for title in options.problem:
        problems = [PROBLEMS[title](seed) for seed in seeds]
        found: dict[str, list[Course]] = {name: [] for name in SEARCHES}
        for name, search in tqdm(SEARCHES.items(), desc=title, leave=False):
            for seed, problem in zip(seeds, problems, strict=True):
                problem.spent = 0
                torch.manual_seed(seed)
                began = time.perf_counter()
                course = search(problem, budget, seed)
                course.seconds = time.perf_counter() - began
                found[name].append(course)
        courses[title] = found
        heading = f"{title}, {problems[0].start.numel()} decays, a budget of {budget}"
        tables[heading] = [row(name, problems, runs) for name, runs in found.items()]
    report.finish("decay_budget", options, tables, draw(courses))


if __name__ == "__main__":
    main()
