"""Which training rows raise or lower the validation loss: influence, checked by retraining.

    inner  f(θ, φ) = mean of φ_i · logistic loss of training row i, and a little decay
    outer  g(θ)    = mean logistic loss on the validation rows

With all weights φ_i = 1 this is plain logistic regression, and dg/dφ_i is the influence of row i
(Koh & Liang 2017): −∇g · H⁻¹ ∇ℓ_i / n, that of all rows from a single linear solve. Leaving row i
out changes the validation loss by −dg/dφ_i to first order. Here every row of scikit-learn's
breast-cancer data is in fact left out and scikit-learn trains again, and the two are compared, for
several ways to solve the linear system. Then labels are flipped, and looked for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.stats import pearsonr, spearmanr
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import hypergrad as hg
from report import print_table, save

HARDEST = 5
SHARES = [i / 100 for i in range(0, 32, 2)]
"""How much of the training rows is looked at in the search for flipped labels."""


@dataclass(frozen=True)
class Rows:
    """Features, shape ``(m, d)``, labels −1 and 1, and their places in the data, shape ``(m,)``."""

    X: Tensor
    y: Tensor
    places: Tensor


@dataclass(frozen=True)
class Data:
    """The three splits, and λ."""

    train: Rows
    validation: Rows
    test: Rows
    decay: float

    def inner(self, w: Tensor, weights: Tensor) -> Tensor:
        """The objective f; w is the bias, which has no decay, and then the coefficients."""
        return (weights * losses(w, self.train)).mean() + 0.5 * self.decay * w[1:].square().sum()

    def outer(self, w: Tensor, _: Tensor) -> Tensor:
        """The loss g on the validation rows."""
        return losses(w, self.validation).mean()

    def fit(self, weights: Tensor) -> Tensor:
        """The w of least f, by scikit-learn; shape ``(d + 1,)``."""
        C = 1.0 / (len(weights) * self.decay)
        model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000)
        model.fit(self.train.X.numpy(), self.train.y.numpy(), sample_weight=weights.numpy())
        return torch.cat([torch.from_numpy(model.intercept_), torch.from_numpy(model.coef_[0])])

    @property
    def ones(self) -> Tensor:
        """φ: all rows alike."""
        return torch.ones_like(self.train.y)


def losses(w: Tensor, rows: Rows) -> Tensor:
    """The logistic loss of each row."""
    return F.softplus(-rows.y * (rows.X @ w[1:] + w[0]))


def load(seed: int, products: bool, decay: float) -> Data:
    """The breast-cancer data: 60 % to train on, the rest halved; standardised on the first.

    Args:
        seed: of the splits.
        products: whether the products of all pairs of the 30 features are features as well.
        decay: λ.
    """
    X, y = load_breast_cancer(return_X_y=True)
    places, rest = train_test_split(range(len(y)), train_size=0.6, stratify=y, random_state=seed)
    halves = train_test_split(rest, train_size=0.5, stratify=y[rest], random_state=seed)
    if products:
        X = StandardScaler().fit(X[places]).transform(X)
        X = PolynomialFeatures(2, include_bias=False).fit_transform(X)
    X = torch.from_numpy(StandardScaler().fit(X[places]).transform(X))
    sign = torch.from_numpy(2.0 * y - 1.0)
    train, validation, test = (Rows(X[p], sign[p], torch.tensor(p)) for p in (places, *halves))
    return Data(train, validation, test, decay)


# --- how well retraining is predicted -------------------------------------------------------------


def methods(data: Data, parameters: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Makers of options, so that every use starts with a generator in its first state."""
    rank = 15 if parameters < 100 else 100

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def preconditioned() -> dict[str, Any]:
        preconditioner = hg.NystromPreconditioner(rank, generator=generator())
        return {"solver": hg.CG(rtol=1e-6, preconditioner=preconditioner)}

    def nystrom() -> dict[str, Any]:
        # ρ is the decay, so that the sketch need only be of the rest of the Hessian.
        def curvature(w: Tensor, weights: Tensor) -> hg.operators.Hessian:
            return hg.operators.hessian(replace(data, decay=0.0).inner, w, weights)

        solver = hg.Nystrom(rank, rho=data.decay, test="gaussian", generator=generator())
        return {"solver": solver, "curvature": curvature}

    return {
        "Dense": lambda: {"solver": hg.Dense()},
        "CG": lambda: {"solver": hg.CG(rtol=1e-6)},
        f"CG, Nyström preconditioner {rank}": preconditioned,
        f"Nyström, rank {rank}": nystrom,
        "Identity": lambda: {"solver": hg.Identity()},
    }


def leave_out(data: Data, w: Tensor, left_out: Sequence[int]) -> Tensor:
    """How each validation loss changes when a training row is left out and w trained again.

    Returns:
        Shape ``(rows left out, validation rows)``.
    """
    before, changes = losses(w, data.validation), []
    for i in tqdm(left_out, desc="training without a row", leave=False):
        weights = data.ones
        weights[i] = 0.0
        changes.append(losses(data.fit(weights), data.validation) - before)
    return torch.stack(changes)


def compare_methods(
    data: Data, w: Tensor, left_out: Sequence[int], changes: Tensor, repeats: int
) -> list[dict[str, Any]]:
    """A row a method: what it costs, and how near it comes to retraining."""
    exact = hg.hypergradient(data.inner, data.outer, w, data.ones, solver=hg.Dense()).grads
    rows = []
    for name, make in methods(data, len(w)).items():
        seconds = []
        for _ in range(repeats):
            options, began = make(), time.perf_counter()
            result = hg.hypergradient(data.inner, data.outer, w, data.ones, **options)
            seconds.append(time.perf_counter() - began)
        cost = (result.solve.matvecs, statistics.median(seconds))
        error = float((result.grads - exact).norm() / exact.norm())
        predicted = -result.grads[left_out]
        rows.append(agreement(name, cost, error, predicted, changes.mean(1)))
    return rows


def compare_hardest(
    data: Data, w: Tensor, left_out: Sequence[int], changes: Tensor, repeats: int
) -> dict[str, Any]:
    """The same for the single losses of a few validation rows, from one block solve."""
    hardest = losses(w, data.validation).topk(HARDEST).indices
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        influences, solve = influence_on_each(data, w, pick(data.validation, hardest))
        seconds.append(time.perf_counter() - began)
    cost = (solve.matvecs, statistics.median(seconds))
    name = f"BlockCG, {HARDEST} hardest rows"
    return agreement(name, cost, None, -influences[:, left_out].T, changes[:, hardest])


def influence_on_each(data: Data, w: Tensor, rows: Rows) -> tuple[Tensor, hg.BlockSolution]:
    """The influence of every training row on the loss of each of ``rows``, not on their mean.

    Returns:
        ``−∇ℓ_j · H⁻¹ ∇ℓ_i / n``, shape ``(rows, training rows)``, and the receipt of the solves.
    """
    H = hg.operators.hessian(data.inner, w, data.ones)
    of_rows, of_training = (torch.func.jacrev(losses)(w, part) for part in (rows, data.train))
    solve = hg.BlockCG(rtol=1e-6).solve_block(H, of_rows)
    return -solve.x @ of_training.T / len(of_training), solve


def agreement(
    method: str,
    cost: tuple[int, float],
    error: float | None,
    predicted: Tensor,
    actual: Tensor,
) -> dict[str, Any]:
    """One row of the table."""
    pair = (predicted.flatten().numpy(), actual.flatten().numpy())
    return {
        "method": method,
        "products": cost[0],
        "ms": 1e3 * cost[1],
        "relative error": error,
        "Pearson": float(pearsonr(*pair).statistic),
        "Spearman": float(spearmanr(*pair).statistic),
    }


def pick(rows: Rows, chosen: Tensor) -> Rows:
    """Some of the rows."""
    return Rows(rows.X[chosen], rows.y[chosen], rows.places[chosen])


# --- flipped labels -------------------------------------------------------------------------------


def find_flipped(data: Data, share: float, repeats: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """What is found by looking at the training rows in the order of a score, the worst first.

    Returns:
        For each score the share of the flipped labels that are ``found`` after each of ``SHARES``
        of the rows, and the ``loss`` on the test rows when these are put right and w is trained
        again; and the ``precision`` among the first k rows, where k labels are flipped. The first
        two of shape ``(repeats, len(SHARES))``, the last of shape ``(repeats,)``.
    """
    n = len(data.train.y)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, list[Any]]] = {}
    for _ in tqdm(range(repeats), desc="looking for flipped labels", leave=False):
        flipped = torch.zeros(n, dtype=torch.bool)
        flipped[torch.randperm(n, generator=generator)[: round(share * n)]] = True
        for name, order in orders(with_flipped(data, flipped), generator).items():
            hits = flipped[order]
            columns = found.setdefault(name, {"found": [], "loss": [], "precision": []})
            columns["precision"].append(hits[: int(flipped.sum())].double().mean())
            looked_at = [round(part * n) for part in SHARES]
            columns["found"].append(
                torch.stack([hits[:m].sum() / flipped.sum() for m in looked_at])
            )
            columns["loss"].append(
                torch.stack([loss_after(data, flipped, order[:m]) for m in looked_at])
            )
    return {
        name: {column: torch.stack(values) for column, values in columns.items()}
        for name, columns in found.items()
    }


def with_flipped(data: Data, flipped: Tensor) -> Data:
    """The data with some training labels changed."""
    labels = torch.where(flipped, -data.train.y, data.train.y)
    return replace(data, train=replace(data.train, y=labels))


def orders(data: Data, generator: torch.Generator) -> dict[str, Tensor]:
    """The training rows by each score, the most suspicious first."""
    w = data.fit(data.ones)
    harm = hg.hypergradient(data.inner, data.outer, w, data.ones, solver=hg.CG(rtol=1e-6)).grads
    on_itself, _ = influence_on_each(data, w, data.train)
    scores = {
        "influence on the validation loss": harm,
        "influence on the row's own loss": -on_itself.diagonal(),
        "the row's own loss": losses(w, data.train),
        "chance": torch.rand(len(harm), generator=generator),
    }
    return {name: score.argsort(descending=True) for name, score in scores.items()}


def loss_after(data: Data, flipped: Tensor, looked_at: Tensor) -> Tensor:
    """The test loss once the labels that were looked at are right."""
    remaining = flipped.clone()
    remaining[looked_at] = False
    mended = with_flipped(data, remaining)
    return losses(mended.fit(data.ones), data.test).mean()


def flip_table(found: dict[str, dict[str, Tensor]]) -> list[dict[str, Any]]:
    """A row a score, means over the repetitions."""
    tenth, fifth = SHARES.index(0.1), SHARES.index(0.2)
    return [
        {
            "order": name,
            "precision at k": float(columns["precision"].mean()),
            "found at 20 %": float(columns["found"].mean(0)[fifth]),
            "test loss at 0 %": float(columns["loss"].mean(0)[0]),
            "at 10 %": float(columns["loss"].mean(0)[tenth]),
            "at 20 %": float(columns["loss"].mean(0)[fifth]),
        }
        for name, columns in found.items()
    ]


# --- the picture ----------------------------------------------------------------------------------


def draw(
    data: Data,
    left_out: Sequence[int],
    predicted: Tensor,
    actual: Tensor,
    found: dict[str, dict[str, Tensor]],
    path: Path,
) -> None:
    """Save predicted beside actual changes, the rows of most influence, the search for flips."""
    figure = Figure(figsize=(12, 9.5), layout="constrained")
    (scatter, bars), (search, mended) = figure.subplots(2, 2)

    scatter.axline((0.0, 0.0), slope=1.0, color="0.7", zorder=0)
    scatter.scatter(predicted, actual, s=14, alpha=0.6)
    scatter.set(
        xlabel="predicted: −dg/dφ of the row",
        ylabel="actual: trained again without it",
        title=f"Change of the validation loss without a row, {len(left_out)} rows",
    )

    order = predicted.argsort().tolist()
    few = min(6, len(order) // 2)
    ends = [*order[:few], *order[-few:]]
    kinds = {-1.0: "malignant", 1.0: "benign"}
    names = [
        f"{kinds[float(data.train.y[left_out[i]])]}, row {int(data.train.places[left_out[i]])}"
        for i in ends
    ]
    positions = torch.arange(len(ends))
    bars.barh(positions + 0.2, predicted[ends], height=0.4, label="predicted")
    bars.barh(positions - 0.2, actual[ends], height=0.4, label="actual")
    bars.axvline(0.0, color="black", linewidth=0.8)
    bars.set_yticks(positions, names, fontsize=8)
    bars.set(xlabel="change of the validation loss without the row")
    bars.set_title("Most harmful rows (below), most helpful rows (above)")
    bars.legend()

    for name, columns in found.items():
        look = {"color": "0.6", "linestyle": "--"} if name == "chance" else {}
        percent = [100 * share for share in SHARES]
        search.plot(percent, 100 * columns["found"].mean(0), label=name, **look)
        mended.plot(percent, columns["loss"].mean(0), label=name, **look)
    repeats = len(next(iter(found.values()))["precision"])
    search.set(ylabel="flipped labels found, %", title=f"Flipped labels, mean of {repeats} draws")
    mended.set(ylabel="test loss", title="The test loss when those found are put right")
    search.legend(
        title="rows in the order of", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12)
    )
    for axes in (search, mended):
        axes.set(xlabel="training rows looked at, %")
    for axes in (scatter, bars, search, mended):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    """Predict, retrain and compare; flip labels and look for them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="495 features: products of pairs too")
    parser.add_argument("--decay", type=float, default=1e-2, help="λ of the logistic regression")
    parser.add_argument("--retrain", type=int, help="rows to leave out, half of them the most "
                        "influential, half drawn (default: every row)")  # fmt: skip
    parser.add_argument("--flip", type=float, default=0.1, help="share of the labels to flip")
    parser.add_argument("--draws", type=int, default=10, help="times that labels are flipped")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each method")
    parser.add_argument("--seed", type=int, default=0, help="of the splits and the flips")
    parser.add_argument("--output", type=Path, help="the picture")
    parser.add_argument("--results", type=Path, help="the table, as JSON")
    options = parser.parse_args(argv)

    torch.set_num_threads(1)  # faster for operations as small as these, here and in scikit-learn
    threadpool_limits(1)
    data = load(options.seed, options.full, options.decay)
    w = data.fit(data.ones)
    n, parameters = len(data.train.y), len(w)
    print(f"breast cancer: {n} training rows, {parameters} parameters, λ = {data.decay:g}")

    influence = hg.hypergradient(data.inner, data.outer, w, data.ones, solver=hg.CG(rtol=1e-6))
    print(f"the influence of all rows: {influence.solve}")
    order = influence.grads.abs().argsort(descending=True)
    half = n if options.retrain is None else options.retrain // 2
    drawn = torch.randperm(n - half, generator=torch.Generator().manual_seed(options.seed))
    left_out = torch.cat([order[:half], order[half:][drawn[:half]]]).tolist()
    changes = leave_out(data, w, left_out)
    table = compare_methods(data, w, left_out, changes, options.repeats)
    table.append(compare_hardest(data, w, left_out, changes, options.repeats))
    print(f"\nChanges of the validation loss without a row, {len(left_out)} rows")
    print_table(table)

    found = find_flipped(data, options.flip, options.draws, options.seed)
    flips = flip_table(found)
    print(f"\nLooking for {round(options.flip * n)} flipped labels among {n}")
    print_table(flips)
    name = "influence_full" if options.full else "influence"
    print(f"\nresults: {save(name, options, [*table, *flips], options.results)}")
    predicted, actual = -influence.grads[left_out], changes.mean(1)
    picture = options.output or Path(__file__).parent / "figures" / f"{name}.png"
    draw(data, left_out, predicted, actual, found, picture)


if __name__ == "__main__":
    main()
