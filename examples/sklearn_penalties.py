"""Tune the penalties of scikit-learn's Lasso, ElasticNet and Ridge by gradient, not by grid.

    inner   w_k(φ) = argmin_w  ‖X_k w − y_k‖² / 2 n_k + Σ_j l1_j |w_j| + ½ Σ_j l2_j w_j²
    outer   the mean over the folds k of the squared error of w_k on the rows left out of it

φ holds the logarithms of the penalties: one, two, one a group of features, or one a feature, which
for a grid is out of reach. The estimators stay
scikit-learn's, called through `.fit`; `hg.fixed_point` differentiates their solution as the fixed
point of a proximal gradient step, `hg.argmin` does where there is no corner. Value and gradient go
to SciPy's L-BFGS-B. LassoCV, ElasticNetCV and GridSearchCV search on the same folds.

The data are scikit-learn's diabetes with the squares and products of its features, 64 in all in
these three groups, and synthetic rows with features in groups of ten, of which few groups count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, ElasticNetCV, Lasso, LassoCV, Ridge
from sklearn.model_selection import GridSearchCV, KFold, train_test_split
from sklearn.preprocessing import PolynomialFeatures
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor
from tqdm import tqdm

import hypergrad as hg
from report import print_table, save

Fit = Callable[[Tensor], Tensor]
"""From log-penalties to the coefficients w, shape ``(p,)``."""

TIGHT = 1e-8
"""Of scikit-learn: a derivative at a solution needs a better one than a comparison of losses."""


@dataclass(frozen=True)
class Rows:
    """Features, shape ``(n, p)``, targets, shape ``(n,)``, and their products, all a fit needs."""

    X: Tensor
    y: Tensor
    gram: Tensor = field(init=False)
    moment: Tensor = field(init=False)
    step: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "gram", self.X.T @ self.X / len(self.y))
        object.__setattr__(self, "moment", self.X.T @ self.y / len(self.y))
        object.__setattr__(self, "step", 1.0 / torch.linalg.matrix_norm(self.gram, 2))

    def loss(self, w: Tensor) -> Tensor:
        """The mean squared error."""
        return (self.X @ w - self.y).square().mean()

    def proximal(self, w: Tensor, l1: Tensor, l2: Tensor) -> Tensor:
        """A proximal gradient step: its fixed point is the elastic net."""
        z = w - self.step * (self.gram @ w - self.moment)
        return z.sign() * (z.abs() - self.step * l1).clamp(min=0.0) / (1.0 + self.step * l2)


@dataclass(frozen=True)
class Data:
    """Rows to tune on, the same cut into folds, rows to test on, and what the truth is if known."""

    name: str
    train: Rows
    folds: list[tuple[Rows, Rows]]
    test: Rows
    splitter: KFold
    names: Sequence[str]
    groups: Tensor  # the number of the group that each feature is in, shape (p,)
    truth: Tensor | None = None

    @property
    def largest(self) -> float:
        """The least l1 at which all coefficients are zero."""
        return float(self.train.moment.abs().max())


# --- your part: scikit-learn's estimators, with a derivative --------------------------------------


def lasso(rows: Rows) -> Fit:
    """From log l1 of every feature."""
    zero = torch.zeros((), dtype=torch.float64)

    def step(w: Tensor, log_l1: Tensor) -> Tensor:
        return rows.proximal(w, log_l1.exp(), zero)

    @hg.fixed_point(step, solver=hg.GMRES(rtol=1e-6))
    def fit(log_l1: Tensor) -> Tensor:
        # Lasso has one penalty for all: in columns divided by l1_j, that of v_j = l1_j w_j is 1.
        l1 = log_l1.exp()
        gram = len(rows.y) * rows.gram / l1 / l1[:, None]
        model = Lasso(
            alpha=1.0,
            fit_intercept=False,
            tol=TIGHT,
            max_iter=100_000,
            precompute=gram.numpy(),
        )
        return torch.from_numpy(model.fit((rows.X / l1).numpy(), rows.y.numpy()).coef_) / l1

    return fit


def elastic_net(rows: Rows) -> Fit:
    """From (log l1, log l2)."""

    def step(w: Tensor, log_penalties: Tensor) -> Tensor:
        return rows.proximal(w, *log_penalties.exp())

    @hg.fixed_point(step, solver=hg.GMRES(rtol=1e-6))
    def fit(log_penalties: Tensor) -> Tensor:
        l1, l2 = log_penalties.exp().tolist()
        model = ElasticNet(
            alpha=l1 + l2,
            l1_ratio=l1 / (l1 + l2),
            fit_intercept=False,
            tol=TIGHT,
            max_iter=100_000,
            precompute=(len(rows.y) * rows.gram).numpy(),
        )
        return torch.from_numpy(model.fit(rows.X.numpy(), rows.y.numpy()).coef_)

    return fit


def ridge(rows: Rows) -> Fit:
    """From log l2 of every feature."""

    def objective(w: Tensor, log_l2: Tensor) -> Tensor:
        quadratic = w @ (rows.gram @ w) / 2.0 - rows.moment @ w
        return quadratic + 0.5 * (log_l2.exp() * w.square()).sum()

    @hg.argmin(objective, solver=hg.CG(rtol=1e-6))
    def fit(log_l2: Tensor) -> Tensor:
        # As for the lasso, with v_j = √l2_j w_j; Ridge does not divide the misfit by n.
        root = (0.5 * log_l2).exp()
        model = Ridge(alpha=len(rows.y), fit_intercept=False, solver="cholesky")
        return torch.from_numpy(model.fit((rows.X / root).numpy(), rows.y.numpy()).coef_) / root

    return fit


@dataclass(frozen=True)
class Result:
    """Penalties that a search ended with, and how it got there.

    Attributes:
        family: whose penalties they are.
        spread: the index that makes of φ what a fit takes, such as one log-penalty a feature.
        log_penalties: φ.
        fits: how many models were trained.
        seconds: how long all of it took.
        visited: φ of every step, or of the grid.
        losses: the cross-validation loss there.
        times: the seconds until then; empty for a grid.
    """

    family: Callable[[Rows], Fit]
    spread: Tensor
    log_penalties: Tensor
    fits: int
    seconds: float
    visited: list[Tensor]
    losses: list[float]
    times: list[float] = field(default_factory=list)


def cross_validation(
    folds: Sequence[tuple[Rows, Rows]], fits: Sequence[Fit], log_penalties: Tensor
) -> Tensor:
    """g: the mean over the folds."""
    left_out = [rest.loss(fit(log_penalties)) for fit, (_, rest) in zip(fits, folds, strict=True)]
    return torch.stack(left_out).mean()


def tune(
    data: Data,
    family: Callable[[Rows], Fit],
    start: Tensor,
    steps: int,
    name: str,
    spread: Tensor,
) -> Result:
    """L-BFGS-B on φ, from value and gradient of the cross-validation loss."""
    began = time.perf_counter()
    fits = [family(rows) for rows, _ in data.folds]
    visited: list[Tensor] = []
    losses: list[float] = []
    times: list[float] = []
    units: list[float] = []

    with tqdm(desc=f"{data.name}: {name}", leave=False) as bar:

        def value_and_gradient(point: Any) -> tuple[float, Any]:
            phi = torch.tensor(point, requires_grad=True)
            loss = cross_validation(data.folds, fits, phi[spread])
            loss.backward()
            assert phi.grad is not None
            visited.append(phi.detach())
            losses.append(loss.item())
            times.append(time.perf_counter() - began)
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.4f}")
            # The first step of L-BFGS-B is as long as the gradient, so too short where many
            # penalties share a small one: in these units it is 1.
            units.append(1.0 / float(phi.grad.norm()))
            return units[0] * loss.item(), units[0] * phi.grad.numpy()

        middle = np.log(data.largest)
        minimize(
            value_and_gradient,
            start.numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=[(middle - 9.0, middle + 4.0)] * len(start),
            options={"maxiter": steps, "ftol": 3e-6, "gtol": 0.0},
        )
    best = visited[int(np.argmin(losses))]
    seconds = time.perf_counter() - began
    made = len(losses) * len(fits)
    return Result(family, spread, best, made, seconds, visited, losses, times)


# --- the searches on a grid -----------------------------------------------------------------------


def path_search(data: Data, l1: Any) -> Result:
    """LassoCV: the whole path of each fold, each fit starting from the last."""
    began = time.perf_counter()
    model = LassoCV(alphas=l1, cv=data.splitter, fit_intercept=False, max_iter=10_000)
    model.fit(data.train.X.numpy(), data.train.y.numpy())
    seconds = time.perf_counter() - began
    return searched(lasso, np.log(model.alphas_)[:, None], model.mse_path_.mean(-1), data, seconds)


def elastic_net_path_search(data: Data, totals: Any, ratios: Sequence[float]) -> Result:
    """ElasticNetCV, a path for every ratio."""
    began = time.perf_counter()
    model = ElasticNetCV(
        alphas=totals, l1_ratio=ratios, cv=data.splitter, fit_intercept=False, max_iter=10_000
    )
    model.fit(data.train.X.numpy(), data.train.y.numpy())
    seconds = time.perf_counter() - began
    shares = np.array(ratios)[:, None]
    totals = np.sort(totals)[::-1]
    penalties = np.stack([shares * totals, (1.0 - shares) * totals], axis=-1).reshape(-1, 2)
    return searched(elastic_net, np.log(penalties), model.mse_path_.mean(-1).ravel(), data, seconds)


def grid_search(data: Data, family: Callable[[Rows], Fit], penalties: Any) -> Result:
    """GridSearchCV of Lasso or Ridge."""
    m = len(data.folds[0][0].y)
    model = Lasso(fit_intercept=False, max_iter=10_000) if family is lasso else Ridge(
        fit_intercept=False
    )  # fmt: skip
    alphas = penalties if family is lasso else penalties * m
    began = time.perf_counter()
    search = GridSearchCV(
        model, {"alpha": alphas}, cv=data.splitter, scoring="neg_mean_squared_error", refit=False
    )
    search.fit(data.train.X.numpy(), data.train.y.numpy())
    seconds = time.perf_counter() - began
    losses = -search.cv_results_["mean_test_score"]
    return searched(family, np.log(penalties)[:, None], losses, data, seconds)


def searched(
    family: Callable[[Rows], Fit], log_penalties: Any, losses: Any, data: Data, seconds: float
) -> Result:
    """The best of a grid."""
    visited = list(torch.from_numpy(np.array(log_penalties)))
    best = visited[int(np.argmin(losses))]
    made = len(visited) * len(data.folds)
    spread = torch.arange(2) if family is elastic_net else torch.zeros_like(data.groups)
    return Result(family, spread, best, made, seconds, visited, losses.tolist())


def compare(data: Data, steps: int) -> dict[str, Result]:
    """All searches; those with one penalty a feature start from the best single one."""
    l1 = data.largest * np.logspace(-3, 0, 100)
    l2 = np.logspace(-4, 2, 30)
    ratios = [0.1, 0.5, 0.7, 0.9, 0.95, 0.99]
    start = torch.tensor([data.largest / 30.0], dtype=torch.float64).log()
    one, two = torch.zeros_like(data.groups), torch.arange(2)

    results = {
        "lasso: LassoCV, 100 values": path_search(data, l1),
        "lasso: GridSearchCV, 30 values": grid_search(data, lasso, l1[::-1][::3][:30]),
        "lasso: gradient": tune(data, lasso, start, steps, "lasso", one),
        "elastic net: ElasticNetCV, 600 pairs": elastic_net_path_search(data, l1, ratios),
        "elastic net: gradient": tune(
            data, elastic_net, start.repeat(2), steps, "elastic net", two
        ),
        "ridge: GridSearchCV, 30 values": grid_search(data, ridge, l2),
        "ridge: gradient": tune(data, ridge, start, steps, "ridge", one),
    }
    for kind, spread in spreads(data).items():
        for name, family in {"lasso": lasso, "ridge": ridge}.items():
            single = results[f"{name}: gradient"].log_penalties.repeat(int(spread.max()) + 1)
            title = f"{name}: gradient, {kind}"
            results[title] = tune(data, family, single, steps, title, spread)
    return results


def spreads(data: Data) -> dict[str, Tensor]:
    """One penalty a group, and one a feature."""
    p = len(data.groups)
    groups = int(data.groups.max()) + 1
    return {f"{groups} groups": data.groups, f"{p} features": torch.arange(p)}


# --- the data -------------------------------------------------------------------------------------


def diabetes(seed: int, folds: int) -> Data:
    """442 patients; the square of a binary feature is left out, since it is the feature again."""
    X, y = load_diabetes(return_X_y=True)
    products = PolynomialFeatures(2, include_bias=False).fit(X)
    names = products.get_feature_names_out(load_diabetes().feature_names)
    kept = [i for i, name in enumerate(names) if name != "sex^2"]
    names = [names[i].replace("^2", "²").replace(" ", "·") for i in kept]
    groups = [1 if "²" in name else 2 if "·" in name else 0 for name in names]
    return cut("diabetes", products.transform(X)[:, kept], y, names, groups, seed, folds)


def synthetic(rows: int, features: int, seed: int, folds: int) -> Data:
    """Correlated features in groups of ten, one group in five counts; as much noise as signal."""
    draw = np.random.default_rng(seed)
    X = draw.standard_normal((rows, features))
    for j in range(1, features):
        X[:, j] = 0.5 * X[:, j - 1] + 0.75**0.5 * X[:, j]
    groups = np.arange(features) // 10
    counting = draw.permutation(groups[-1] + 1)[: max(1, (groups[-1] + 1) // 5)]
    w = np.isin(groups, counting) * draw.standard_normal(features)
    signal = X @ w
    y = signal + signal.std() * draw.standard_normal(rows)
    name = f"synthetic {rows} × {features}"
    return cut(name, X, y, [str(j) for j in range(features)], groups, seed, folds, w)


def cut(
    name: str,
    X: Any,
    y: Any,
    names: Sequence[str],
    groups: Any,
    seed: int,
    folds: int,
    truth: Any = None,
) -> Data:
    """A quarter of the rows to test on, the others in folds; standardised on the others."""
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.25, random_state=seed)
    center, scale, shift, unit = X.mean(0), X.std(0), y.mean(), y.std()

    def rows(X: Any, y: Any) -> Rows:
        return Rows(torch.from_numpy((X - center) / scale), torch.from_numpy((y - shift) / unit))

    splitter = KFold(folds, shuffle=True, random_state=seed)
    pairs = [(rows(X[a], y[a]), rows(X[b], y[b])) for a, b in splitter.split(X)]
    if truth is not None:
        truth = torch.from_numpy(truth * scale / unit)
    groups = torch.as_tensor(groups)
    return Data(name, rows(X, y), pairs, rows(X_test, y_test), splitter, names, groups, truth)


# --- what came of it ------------------------------------------------------------------------------


def table(data: Data, results: dict[str, Result]) -> list[dict[str, Any]]:
    """A row a search, all judged alike: by tight fits on the folds, and one on all their rows."""
    rows = []
    for name, result in results.items():
        fits = [result.family(part) for part, _ in data.folds]
        with torch.no_grad():
            penalties = result.log_penalties[result.spread]
            validation = cross_validation(data.folds, fits, penalties)
            w = result.family(data.train)(penalties)
        rows.append(
            {
                "data": data.name,
                "search": name,
                "penalties": len(result.log_penalties),
                "fits": result.fits,
                "seconds": result.seconds,
                "validation loss": float(validation),
                "test loss": float(data.test.loss(w)),
                "features used": int((w != 0).sum()),
            }
        )
    return rows


def draw(cases: list[tuple[Data, dict[str, Result]]], path: Path) -> None:
    """Save the lasso's losses over its penalty, all losses over time, and coefficients."""
    figure = Figure(figsize=(14, 5 * len(cases)), layout="constrained")
    grid = figure.subplots(len(cases), 3, squeeze=False)
    for (data, results), (along, over_time, coefficients) in zip(cases, grid, strict=True):
        draw_path(along, results)
        along.set(title=f"{data.name}: the lasso's one penalty")
        draw_times(over_time, results)
        over_time.set(title=f"{data.name}: all searches")
        draw_coefficients(coefficients, data, results)
        for axes in (along, over_time, coefficients):
            axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def draw_path(axes: Any, results: dict[str, Result]) -> None:
    """The validation loss over the penalty: of both grids, and of the steps."""
    looks: dict[str, dict[str, Any]] = {
        "lasso: LassoCV, 100 values": {"color": "0.6", "linewidth": 2.5},
        "lasso: GridSearchCV, 30 values": {"color": "0.2", "marker": "|", "linestyle": "none"},
        "lasso: gradient": {"color": "C0", "marker": "o", "linewidth": 0.8, "markersize": 5},
    }
    for name, look in looks.items():
        result = results[name]
        penalties = torch.stack(result.visited).exp()
        axes.plot(penalties, result.losses, label=f"{name}: {result.fits} fits", **look)
    lowest, start = min(result.losses), result.losses[0]
    axes.set(
        xscale="log",
        xlabel="penalty",
        ylabel="validation loss",
        xlim=(float(penalties.min()) / 6.0, float(penalties.max()) * 6.0),
        ylim=(lowest - 0.1 * (start - lowest), start + 1.5 * (start - lowest)),
    )
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def draw_times(axes: Any, results: dict[str, Result]) -> None:
    """The least validation loss so far over the seconds; a grid tells at its end."""
    colors = {"lasso": "C0", "elastic net": "C2", "ridge": "C1"}
    lines = {"groups": "--", "features": ":"}
    for name, result in results.items():
        look: dict[str, Any] = {"color": colors[name.split(":")[0]], "label": name}
        if result.times:
            line = lines.get(name.split()[-1], "-")
            axes.plot(result.times, np.minimum.accumulate(result.losses), line, **look)
        else:
            axes.plot(result.seconds, min(result.losses), "s" if "Grid" in name else "D", **look)
    losses = [min(result.losses) for result in results.values()]
    margin = 0.15 * (max(losses) - min(losses))
    axes.set(
        xscale="log",
        xlabel="seconds",
        ylabel="validation loss, the least so far",
        ylim=(min(losses) - margin, max(losses) + margin),
    )
    axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def draw_coefficients(axes: Any, data: Data, results: dict[str, Result]) -> None:
    """Those of the lasso with one penalty and with one a group; beside the truth if known."""
    groups = f"lasso: gradient, {next(iter(spreads(data)))}"
    pair = {"one penalty": "lasso: gradient", "one penalty a group": groups}
    fit = lasso(data.train)
    with torch.no_grad():
        found = {
            label: fit(results[name].log_penalties[results[name].spread])
            for label, name in pair.items()
        }
    axes.axhline(0.0, color="black", linewidth=0.8)
    if data.truth is None:
        order = torch.stack([*found.values()]).abs().amax(0).argsort(descending=True)[:20].tolist()
        for (label, w), shift in zip(found.items(), (-0.2, 0.2), strict=True):
            places = [i + shift for i in range(len(order))]
            axes.bar(places, w[order].tolist(), width=0.4, label=label)
        labels = [data.names[i] for i in order]
        axes.set_xticks(range(len(order)), labels, rotation=60, ha="right", fontsize=8)
        axes.set(ylabel="coefficient", title=f"{data.name}: lasso coefficients")
    else:
        order = data.truth.argsort().tolist()
        for label, w in found.items():
            axes.plot(w[order], ".", markersize=4, label=label)
        axes.plot(data.truth[order], color="black", linewidth=0.8, label="truth")
        axes.set(xlabel="feature, in the order of the truth", ylabel="coefficient")
        axes.set(title=f"{data.name}: lasso coefficients")
    axes.legend(fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    """Search, tune, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="20,000 × 500 synthetic numbers")
    parser.add_argument("--only", choices=("diabetes", "synthetic"), help="one of the data sets")
    parser.add_argument("--rows", type=int, default=2000, help="synthetic rows")
    parser.add_argument("--features", type=int, default=200, help="synthetic features")
    parser.add_argument("--folds", type=int, default=5, help="of the cross-validation")
    parser.add_argument("--steps", type=int, default=30, help="the most steps of L-BFGS-B")
    parser.add_argument("--seed", type=int, default=0, help="of data, splits and folds")
    parser.add_argument("--output", type=Path, help="the picture")
    parser.add_argument("--results", type=Path, help="the table, as JSON")
    options = parser.parse_args(argv)
    if options.full:
        options.rows, options.features = 20_000, 500

    # Faster for operations as small as these, and fair: everybody has one thread.
    torch.set_num_threads(1)
    threadpool_limits(1)
    sources = {
        "diabetes": lambda: diabetes(options.seed, options.folds),
        "synthetic": lambda: synthetic(options.rows, options.features, options.seed, options.folds),
    }
    cases, rows = [], []
    for name in [options.only] if options.only else sources:
        data = sources[name]()
        results = compare(data, options.steps)
        cases.append((data, results))
        rows += table(data, results)
    print_table(rows)
    name = "sklearn_penalties_full" if options.full else "sklearn_penalties"
    print(f"\nresults: {save(name, options, rows, options.results)}")
    draw(cases, options.output or Path(__file__).parent / "figures" / f"{name}.png")


if __name__ == "__main__":
    main()
