"""Tune the penalties of scikit-learn's Lasso, ElasticNet and Ridge by gradient, not by grid.

    inner   w_k(φ) = argmin_w  ‖X_k w − y_k‖² / 2 n_k + Σ_j l1_j |w_j| + ½ Σ_j l2_j w_j²
    outer   g(φ) = mean over the folds k of the squared error of w_k on the rows left out of it

φ holds the logarithms of the penalties: one, two, one per group of features, or one per feature,
which for a grid is out of reach. The estimators stay scikit-learn's, called through `.fit`:
`hg.fixed_point` differentiates their solution as the fixed point of a proximal gradient step,
`hg.argmin` where there is no corner. Value and gradient go to SciPy's L-BFGS-B. LassoCV,
ElasticNetCV and GridSearchCV search on the same folds.

Bertrand et al. 2020, *Implicit differentiation of Lasso-type models for hyperparameter
optimization*. `--full` takes 20,000 rows of 500 features for the second, synthetic data set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, ElasticNetCV, Lasso, LassoCV, Ridge
from sklearn.model_selection import GridSearchCV, KFold, train_test_split
from sklearn.preprocessing import PolynomialFeatures
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

import hypergrad as hg
import report

Rows = tuple[Tensor, Tensor]  # features, shape (n, p), and targets, shape (n,)
Fit = Callable[[Tensor], Tensor]  # from log-penalties to the coefficients w, shape (p,)
Family = Callable[[Rows], Fit]
TIGHT: dict[str, Any] = {"fit_intercept": False, "tol": 1e-8, "max_iter": 100_000}

# --- your part ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Rows to tune on, the same in folds (to fit, left out), and rows to test on."""

    train: Rows
    folds: list[tuple[Rows, Rows]]
    test: Rows
    splitter: KFold
    groups: Tensor  # the number of the group that each feature is in, shape (p,)


def prepare(X: Any, y: Any, groups: Any, seed: int = 0) -> Data:
    """A quarter of the rows to test on, the others in five folds; standardised on the others."""
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.25, random_state=seed)
    X_test, y_test = (X_test - X.mean(0)) / X.std(0), (y_test - y.mean()) / y.std()
    X, y = torch.as_tensor((X - X.mean(0)) / X.std(0)), torch.as_tensor((y - y.mean()) / y.std())
    splitter = KFold(5, shuffle=True, random_state=seed)
    folds = [((X[a], y[a]), (X[b], y[b])) for a, b in splitter.split(X)]
    test = (torch.as_tensor(X_test), torch.as_tensor(y_test))
    return Data((X, y), folds, test, splitter, torch.as_tensor(groups))


def error(w: Tensor, rows: Rows) -> Tensor:
    """The mean squared error."""
    return (rows[0] @ w - rows[1]).square().mean()


def moments(rows: Rows) -> tuple[Tensor, Tensor]:
    """All that a fit needs to know of the rows."""
    X, y = rows
    return X.T @ X / len(y), X.T @ y / len(y)


def proximal(gram: Tensor, moment: Tensor) -> Callable[..., Tensor]:
    """A proximal gradient step: its fixed point is the lasso, or the elastic net."""
    t = 1.0 / torch.linalg.matrix_norm(gram, 2)

    def step(w: Tensor, l1: Tensor, l2: Tensor | float = 0.0) -> Tensor:
        z = w - t * (gram @ w - moment)
        return z.sign() * (z.abs() - t * l1).clamp(min=0.0) / (1.0 + t * l2)

    return step


def lasso(rows: Rows) -> Fit:
    """From log l1 of every feature."""
    (X, y), (gram, moment) = rows, moments(rows)
    step = proximal(gram, moment)

    @hg.fixed_point(lambda w, log_l1: step(w, log_l1.exp()), solver=hg.GMRES(rtol=1e-6))
    def fit(log_l1: Tensor) -> Tensor:
        # Lasso has one penalty for all: in columns divided by l1_j, that of v_j = l1_j w_j is 1.
        l1 = log_l1.exp()
        model = Lasso(1.0, precompute=(len(y) * gram / l1 / l1[:, None]).numpy(), **TIGHT)
        return torch.as_tensor(model.fit((X / l1).numpy(), y.numpy()).coef_) / l1

    return fit


def tune(data: Data, family: Family, spread: Tensor, start: float) -> tuple[Any, list[float]]:
    """Every φ that L-BFGS-B tries and its g; ``φ[spread]`` is what a fit takes."""
    fits, units, tried, losses = [family(rows) for rows, _ in data.folds], [], [], []

    def value_and_gradient(point: Any) -> tuple[float, Any]:
        phi = torch.tensor(point, requires_grad=True)
        folds = zip(fits, data.folds, strict=True)
        loss = torch.stack([error(fit(phi[spread]), rest) for fit, (_, rest) in folds]).mean()
        gradient = torch.autograd.grad(loss, phi)[0].numpy()
        tried.append(point.copy())
        losses.append(loss.item())
        # The first step is as long as the gradient: in these units it is 1.
        units.append(1.0 / float(np.linalg.norm(gradient)))
        return units[0] * losses[-1], units[0] * gradient

    phi, options = np.full(int(spread.max()) + 1, start), {"ftol": 3e-6, "gtol": 0.0, "maxiter": 30}
    bounds = [(start - 6.0, start + 6.0)] * len(phi)
    minimize(value_and_gradient, phi, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return np.array(tried), losses


# --- the end of your part -------------------------------------------------------------------------


def elastic_net(rows: Rows) -> Fit:
    """From (log l1, log l2)."""
    (X, y), (gram, moment) = rows, moments(rows)
    step = proximal(gram, moment)

    @hg.fixed_point(lambda w, log_two: step(w, *log_two.exp()), solver=hg.GMRES(rtol=1e-6))
    def fit(log_two: Tensor) -> Tensor:
        l1, l2 = log_two.exp().tolist()
        total = (len(y) * gram).numpy()
        model = ElasticNet(l1 + l2, l1_ratio=l1 / (l1 + l2), precompute=total, **TIGHT)
        return torch.as_tensor(model.fit(X.numpy(), y.numpy()).coef_)

    return fit


def ridge(rows: Rows) -> Fit:
    """From log l2 of every feature: as for the lasso, in columns divided by √l2_j."""
    (X, y), (gram, moment) = rows, moments(rows)

    def objective(v: Tensor, l2: Tensor) -> Tensor:
        w = v / (1.0 + l2).sqrt()  # so that the Hessian has ones on its diagonal, about
        return 0.5 * (w @ (gram @ w)) - moment @ w + 0.5 * (l2 * w.square()).sum()

    @hg.argmin(objective, solver=hg.CG(rtol=1e-6))
    def fit(l2: Tensor) -> Tensor:
        model = Ridge(len(y), fit_intercept=False, solver="cholesky")  # its misfit is n times ours
        u = torch.as_tensor(model.fit((X / l2.sqrt()).numpy(), y.numpy()).coef_)
        return u * (1.0 + 1.0 / l2).sqrt()

    return lambda log_l2: fit(log_l2.exp()) / (1.0 + log_l2.exp()).sqrt()


def diabetes(seed: int) -> Data:
    """442 patients; groups are the 10 features, their products, and their squares but sex's."""
    X, y = load_diabetes(return_X_y=True)
    products = PolynomialFeatures(2, include_bias=False).fit(X)
    powers = products.powers_
    kept = powers[:, 1] < 2  # the square of sex is sex again
    groups = (powers.sum(1) == 2) * powers.max(1)
    return prepare(products.transform(X)[:, kept], y, groups[kept], seed)


def synthetic(rows: int, features: int, seed: int) -> Data:
    """Correlated features in groups of ten, one group in five counts; as much noise as signal."""
    draw = np.random.default_rng(seed)
    X = draw.standard_normal((rows, features))
    for j in range(1, features):
        X[:, j] = 0.5 * X[:, j - 1] + 0.75**0.5 * X[:, j]
    groups = np.arange(features) // 10
    counting = draw.permutation(groups[-1] + 1)[: max(1, (groups[-1] + 1) // 5)]
    signal = X @ (np.isin(groups, counting) * draw.standard_normal(features))
    return prepare(X, signal + signal.std() * draw.standard_normal(rows), groups, seed)


def compare(data: Data, title: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """A row a search, and what it tried; groups and features start from the best one penalty."""
    largest = float(moments(data.train)[1].abs().max())  # the least l1 that leaves no coefficient
    l1, l2 = largest * np.logspace(0, -3, 100), np.logspace(2, -4, 30)
    few, alphas = l1[::3][:30], len(data.folds[0][0][1]) * l2
    ratios = (0.1, 0.5, 0.7, 0.9, 0.95, 0.99)
    pairs = np.array([(ratio * total, (1.0 - ratio) * total) for ratio in ratios for total in l1])
    loose: dict[str, Any] = {"fit_intercept": False, "max_iter": 10_000}
    cv: dict[str, Any] = {"cv": data.splitter, **loose}
    score = {"cv": data.splitter, "scoring": "neg_mean_squared_error", "refit": False}
    path, net = LassoCV(alphas=l1, **cv), ElasticNetCV(alphas=l1, l1_ratio=ratios, **cv)
    lassos = GridSearchCV(Lasso(**loose), {"alpha": few}, **score)
    ridges = GridSearchCV(Ridge(fit_intercept=False), {"alpha": alphas}, **score)
    one, two, each = torch.zeros_like(data.groups), torch.arange(2), torch.arange(len(data.groups))
    searches: list[tuple[str, Family, Tensor, Any, Any]] = [
        ("lasso: LassoCV, 100 values", lasso, one, path, l1),
        ("lasso: GridSearchCV, 30 values", lasso, one, lassos, few),
        ("lasso: gradient", lasso, one, None, None),
        ("elastic net: ElasticNetCV, 600 pairs", elastic_net, two, net, pairs),
        ("elastic net: gradient", elastic_net, two, None, None),
        ("ridge: GridSearchCV, 30 values", ridge, one, ridges, l2),
        ("ridge: gradient", ridge, one, None, None),
        ("lasso: gradient, one per group", lasso, data.groups, None, None),
        ("ridge: gradient, one per group", ridge, data.groups, None, None),
        ("lasso: gradient, one per feature", lasso, each, None, None),
        ("ridge: gradient, one per feature", ridge, each, None, None),
    ]
    rows, curves = [], []
    starts = dict.fromkeys((lasso, elastic_net, ridge), float(np.log(largest / 30.0)))
    for name, family, spread, model, penalties in tqdm(searches, desc=title, leave=False):
        began = time.process_time()
        if model is None:
            tried, losses = tune(data, family, spread, starts[family])
        else:
            model.fit(*(part.numpy() for part in data.train))
            paths = hasattr(model, "mse_path_")
            losses = model.mse_path_.mean(-1) if paths else -model.cv_results_["mean_test_score"]
            tried = np.log(penalties).reshape(losses.size, -1)
        seconds = time.process_time() - began
        best = torch.as_tensor(tried[np.argmin(losses)])
        if model is None and len(best) == 1:
            starts[family] = float(best)
        cost = {"fits": len(data.folds) * len(tried), "CPU seconds": seconds}
        quality = judge(data, family, best[spread])
        rows.append({"search": name, "penalties": len(best), **cost, **quality})
        curves.append((np.exp(tried), np.ravel(losses)))
    return rows, curves


def judge(data: Data, family: Family, log_penalties: Tensor) -> dict[str, Any]:
    """All alike: by tight fits on the folds, and one on all their rows."""
    left_out = [float(error(family(rows)(log_penalties), rest)) for rows, rest in data.folds]
    w = family(data.train)(log_penalties)
    losses = {
        "validation loss": sum(left_out) / len(left_out),
        "test loss": float(error(w, data.test)),
    }
    return {**losses, "features used": int(w.count_nonzero())}


def draw(cases: dict[str, tuple[list[dict[str, Any]], list[Any]]]) -> Figure:
    """A data set a line: the lasso's loss over its one penalty, and the losses of all searches."""
    figure = Figure(figsize=(13, 4.6 * len(cases)), layout="constrained")
    grid = figure.subplots(len(cases), 2, squeeze=False)
    for (title, (rows, curves)), (along, losses) in zip(cases.items(), grid, strict=True):
        for row, curve, look in zip(rows, curves, ("C7-", "k|", "C0o"), strict=False):
            along.plot(*curve, look, label=f"{row['search']}: {row['fits']} fits")
        along.set(xscale="log", xlabel="penalty", ylabel="validation loss")
        along.set(title=f"{title}: one penalty of the lasso")
        for column, look in (("validation loss", "C0o"), ("test loss", "C1D")):
            values = [row[column] for row in rows]
            losses.plot(values, [row["search"] for row in rows], look, label=column)
        losses.invert_yaxis()
        losses.set(xlabel="squared error / variance", title=f"{title}: all searches")
        for axes in (along, losses):
            axes.legend()
            axes.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Search, tune, print and draw."""
    parser = report.arguments(__doc__, full="20,000 × 500", seed="of data, splits and folds")
    parser.add_argument("--only", choices=("diabetes", "synthetic"), help="one of the data sets")
    parser.add_argument("--size", type=int, nargs=2, metavar=("ROWS", "FEATURES"),
                        help="of the synthetic data; 2000 200")  # fmt: skip
    options = parser.parse_args(argv)
    rows, features = options.size or ((20_000, 500) if options.full else (2_000, 200))
    if rows < 100 or features < 20:
        parser.error(f"--size must be at least 100 and 20, not {rows} and {features}")

    torch.set_num_threads(1)  # faster for operations as small as these, and fair: one for everybody
    threadpool_limits(1)
    sources = {
        "diabetes": lambda: diabetes(options.seed),
        "synthetic": lambda: synthetic(rows, features, options.seed),
    }
    cases = {}
    for name in [options.only] if options.only else sources:
        data = sources[name]()
        n, p = data.train[0].shape
        cases[f"{name.title()}, {n} × {p}"] = compare(data, name)
    tables = {f"{title} to tune on": rows for title, (rows, _) in cases.items()}
    report.finish("sklearn_penalties", options, tables, draw(cases))


if __name__ == "__main__":
    main()
