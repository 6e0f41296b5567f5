"""Which training rows raise or lower the validation loss: influence, checked by retraining.

    inner  f(θ, φ) = mean of φ_i · logistic loss of training row i, and a little decay
    outer  g(θ)    = mean logistic loss on the validation rows

With all weights φ_i = 1 this is plain logistic regression, and dg/dφ_i is the influence of row i:
−∇g · H⁻¹ ∇ℓ_i / n, that of all rows from a single linear solve. Leaving row i out changes the
validation loss by −dg/dφ_i to first order. Here each row of scikit-learn's breast-cancer data is in
fact left out and scikit-learn trains again, and the two are compared, for several ways to solve the
linear system. Then labels are flipped, and looked for.

Koh & Liang 2017, *Understanding black-box predictions via influence functions*. `--full` takes the
squares and products of the 30 features as well: 496 parameters, more than there are rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.stats import pearsonr, spearmanr
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import hypergrad as hg
import report

Method = hg.LinearSolver | hg.Implicit
Rows = tuple[Tensor, Tensor]  # features, shape (m, d), and labels −1 and 1, shape (m,)

# --- your part ------------------------------------------------------------------------------------


def load(seed: int = 0, products: bool = False) -> list[Rows]:
    """60 % of the rows to train on, the rest halved to validate and test, by 30 features or 495."""
    X, y = load_breast_cancer(return_X_y=True)
    X, rest, y, y_rest = train_test_split(X, y, train_size=0.6, stratify=y, random_state=seed)
    halves = train_test_split(rest, y_rest, train_size=0.5, stratify=y_rest, random_state=seed)
    pairs = [StandardScaler(), PolynomialFeatures(2, include_bias=False)] if products else []
    features = make_pipeline(*pairs, StandardScaler()).fit(X)
    splits = ((X, y), halves[0::2], halves[1::2])
    return [
        (torch.as_tensor(features.transform(x)), torch.as_tensor(2.0 * t - 1)) for x, t in splits
    ]


def losses(w: Tensor, rows: Rows) -> Tensor:
    """The logistic loss of each row; w is the bias and then the coefficients."""
    X, y = rows
    return F.softplus(-y * (X @ w[1:] + w[0]))


@dataclass(frozen=True)
class Problem:
    """Logistic regression with a weight for each training row."""

    train: Rows
    validation: Rows
    decay: float  # λ

    @property
    def ones(self) -> Tensor:
        """φ: all rows alike."""
        return torch.ones_like(self.train[1])

    def inner(self, w: Tensor, weights: Tensor) -> Tensor:
        """The objective f; the bias has no decay."""
        return (weights * losses(w, self.train)).mean() + 0.5 * self.decay * w[1:].square().sum()

    def outer(self, w: Tensor, _: Tensor) -> Tensor:
        """The loss g."""
        return losses(w, self.validation).mean()

    def fit(self, weights: Tensor) -> Tensor:
        """The w of least f, by scikit-learn."""
        C = 1.0 / (len(weights) * self.decay)
        model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000)
        model.fit(*(part.numpy() for part in self.train), sample_weight=weights.numpy())
        return torch.cat([torch.from_numpy(model.intercept_), torch.from_numpy(model.coef_[0])])

    def influence(self, w: Tensor, method: Method) -> hg.Hypergradient:
        """Of each training row on g: one linear solve."""
        return hg.hypergradient(self.inner, self.outer, w, self.ones, method=method)

    def influence_on_each(self, w: Tensor, rows: Rows) -> Tensor:
        """Of each training row on the loss of each of ``rows``, ``(rows, n)``: one block solve."""
        fit = hg.argmin(self.inner, solver=hg.BlockCG(rtol=1e-6))(lambda weights: w)
        return torch.func.jacrev(lambda weights: losses(fit(weights), rows))(self.ones)


# --- the end of your part -------------------------------------------------------------------------

HARDEST = 5  # validation rows of the largest loss, each predicted by itself
FLIPPED, DRAWS = 0.1, 10  # share of the training labels, how often
PERCENT = range(0, 35, 5)  # of the training rows, which are looked at


def compare(problem: Problem, w: Tensor) -> tuple[list[dict[str, Any]], Tensor]:
    """A row a method, its cost and how near it comes to training again; and what that comes to."""
    changes, ms = timed(partial(leave_out, problem, w), times=1)
    rows: list[dict[str, Any]] = [{"method": f"training {len(changes)} times", "CPU ms": ms}]
    rank = 15 if len(w) < 100 else 100
    # ρ is the decay, so that the sketch need only be of the rest of the Hessian.
    rest = partial(hg.operators.hessian, replace(problem, decay=0.0).inner)
    nystrom = hg.Nystrom(rank, rho=problem.decay, test="gaussian")
    methods: dict[str, Method] = {
        "Dense": hg.Dense(),
        "CG": hg.CG(rtol=1e-6),
        f"Nyström of rank {rank}": hg.Implicit(nystrom, curvature=rest),
        "Identity": hg.Identity(),
    }
    exact = problem.influence(w, hg.Dense()).grads
    for name, method in methods.items():
        result, ms = timed(partial(problem.influence, w, method))
        error = float((result.grads - exact).norm() / exact.norm())
        cost = {"CPU ms": ms, "products with H": result.solve.matvecs, "relative error": error}
        rows.append({"method": name, **cost, **agreement(-result.grads, changes.mean(1))})
    hardest = losses(w, problem.validation).topk(HARDEST).indices
    X, y = problem.validation
    each, ms = timed(partial(problem.influence_on_each, w, (X[hardest], y[hardest])))
    name = f"BlockCG, on each of {HARDEST} validation rows"
    rows.append({"method": name, "CPU ms": ms, **agreement(-each.T, changes[:, hardest])})
    return rows, changes.mean(1)


def leave_out(problem: Problem, w: Tensor) -> Tensor:
    """How each validation loss changes without a training row: ``(n, validation rows)``."""
    before, changes = losses(w, problem.validation), []
    for i in tqdm(range(len(problem.ones)), desc="training without a row", leave=False):
        weights = problem.ones
        weights[i] = 0.0
        changes.append(losses(problem.fit(weights), problem.validation) - before)
    return torch.stack(changes)


def timed(call: Callable[[], Any], times: int = 20) -> tuple[Any, float]:
    """What it returns, and the median of its milliseconds of CPU time."""
    milliseconds = []
    for _ in range(times):
        torch.manual_seed(0)  # of the sketches
        began = time.process_time()
        result = call()
        milliseconds.append(1e3 * (time.process_time() - began))
    return result, statistics.median(milliseconds)


def agreement(predicted: Tensor, actual: Tensor) -> dict[str, float]:
    """Both correlations."""
    pair = (predicted.flatten().numpy(), actual.flatten().numpy())
    return {"Pearson": float(pearsonr(*pair)[0]), "Spearman": float(spearmanr(*pair)[0])}


def mislabelled(problem: Problem, flipped: Tensor) -> Problem:
    """With some training labels changed."""
    X, y = problem.train
    return replace(problem, train=(X, torch.where(flipped, -y, y)))


def orders(problem: Problem) -> dict[str, Tensor]:
    """The training rows by each score, the most suspicious first."""
    w = problem.fit(problem.ones)
    scores = {
        "influence on the validation loss": problem.influence(w, hg.CG(rtol=1e-6)).grads,
        "influence on the row's own loss": -problem.influence_on_each(w, problem.train).diagonal(),
        "the row's own loss": losses(w, problem.train),
        "chance": torch.rand(len(problem.ones)),
    }
    return {name: score.argsort(descending=True) for name, score in scores.items()}


def search(problem: Problem, test: Rows) -> dict[str, Tensor]:
    """For each order what is found, and the loss with it put right: ``(DRAWS, 2, PERCENT)``."""
    n = len(problem.ones)
    curves: dict[str, list[Tensor]] = {}
    for _ in tqdm(range(DRAWS), desc="looking for flipped labels", leave=False):
        flipped = torch.zeros(n, dtype=torch.bool)
        flipped[torch.randperm(n)[: round(FLIPPED * n)]] = True
        for name, order in orders(mislabelled(problem, flipped)).items():
            points = []
            for percent in PERCENT:
                remaining = flipped.clone()
                remaining[order[: round(percent * n / 100)]] = False
                w = mislabelled(problem, remaining).fit(problem.ones)
                found = 100.0 * (1.0 - float(remaining.sum() / flipped.sum()))
                points.append([found, float(losses(w, test).mean())])
            curves.setdefault(name, []).append(torch.tensor(points).T)
    return {name: torch.stack(several) for name, several in curves.items()}


def summary(order: str, curves: Tensor) -> dict[str, Any]:
    """A row of the table: means over the draws, and the standard deviation of the last."""
    found, loss = curves.mean(0).tolist()
    return {
        "order": order,
        **{f"found in {PERCENT[i]} %, %": found[i] for i in (2, 4)},
        **{f"test loss after {PERCENT[i]} %": loss[i] for i in (1, 2, 4)},
        "its deviation": float(curves.std(0)[1, 4]),
    }


def draw(predicted: Tensor, actual: Tensor, curves: dict[str, Tensor]) -> Figure:
    """Predicted beside actual changes, and the search for flipped labels."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    scatter, found, loss = figure.subplots(1, 3)
    scatter.axline((0.0, 0.0), slope=1.0, color="0.6", label="equal", zorder=0)
    scatter.scatter(predicted, actual, s=16, alpha=0.6, label="a training row")
    for name, curve in curves.items():
        look = {"color": "0.5", "linestyle": "--"} if name == "chance" else {"marker": "o"}
        for axes, values in zip((found, loss), curve.mean(0), strict=True):
            axes.plot(PERCENT, values, label=name, **look)
            axes.set(xlabel="training rows looked at, %")
    scatter.set(title="Change of the validation loss without a row")
    scatter.set(xlabel="predicted: −dg/dφ of the row", ylabel="actual: trained again without it")
    found.set(ylabel="flipped labels found, %", title=f"Flipped labels, mean of {DRAWS} draws")
    loss.set(ylabel="test loss", title="Trained again with those found put right")
    scatter.legend(loc="upper left")
    figure.legend(*found.get_legend_handles_labels(), title="rows in the order of",
                  loc="outside lower right", ncols=4)  # fmt: skip
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Predict, retrain and compare; flip labels and look for them."""
    parser = report.arguments(__doc__, full="495 features", seed="of the splits and the flips")
    parser.add_argument("--decay", type=float, default=1e-2, help="λ; 0.01")
    options = parser.parse_args(argv)
    if not 0.0 < options.decay < float("inf"):
        parser.error(f"--decay must be a positive number, not {options.decay}")

    torch.set_num_threads(1)  # faster for operations as small as these, here and in scikit-learn
    threadpool_limits(1)
    train, validation, test = load(options.seed, options.full)
    problem = Problem(train, validation, options.decay)
    w, n = problem.fit(problem.ones), len(problem.ones)
    influence = problem.influence(w, hg.CG(rtol=1e-6))
    print(f"{n} training rows, {len(w)} parameters; influence of all rows: {influence.solve}")
    table, changes = compare(problem, w)
    torch.manual_seed(options.seed)
    curves = search(problem, test)
    tables = {
        f"Change of the validation loss without each of {n} rows, predicted": table,
        f"{100 * FLIPPED:.0f} % of the labels flipped, and looked for in an order of the rows, "
        f"means of {DRAWS} draws": [summary(*item) for item in curves.items()],
    }
    figure = draw(-influence.grads, changes, curves)
    report.finish("influence", options, tables, figure)


if __name__ == "__main__":
    main()
