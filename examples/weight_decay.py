"""Tune one weight decay per feature of a logistic regression by hypergradient, on real data.

    inner  f(w, φ) = mean logistic loss on the training rows + ½ Σ_j exp(φ_j) w_j²
    outer  g(w)    = mean logistic loss on the validation rows

The data are scikit-learn's breast-cancer measurements. Each outer step trains w to its minimum,
asks for dg/dφ and takes one step of Adam on φ. What you would write for a problem of your own is
marked as such: under 40 lines with its imports, and `tune(load(), hg.CG(), 40)` runs it. The rest
compares methods, all from the same uniform decay, and draws; the best single decay of a grid is
there to show what the other 29 are worth.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import hypergrad as hg
import report

# --- your part ------------------------------------------------------------------------------------


def load(seed: int = 0) -> list[list[torch.Tensor]]:
    """Features, shape ``(m, 30)``, and labels: 100 rows to train on, the others halved."""
    X, y = load_breast_cancer(return_X_y=True)
    X, rest, y, y_rest = train_test_split(X, y, train_size=100, stratify=y, random_state=seed)
    halves = train_test_split(rest, y_rest, train_size=0.5, stratify=y_rest, random_state=seed)
    splits = [((x - X.mean(0)) / X.std(0), t) for x, t in ((X, y), halves[0::2], halves[1::2])]
    return [[torch.as_tensor(x), torch.as_tensor(t).double()] for x, t in splits]


def outer(w: torch.Tensor, _: torch.Tensor, rows: list[torch.Tensor]) -> torch.Tensor:
    """g: the mean logistic loss; w is the bias and then the weights."""
    return torch.nn.functional.binary_cross_entropy_with_logits(rows[0] @ w[1:] + w[0], rows[1])


def inner(w: torch.Tensor, log_decay: torch.Tensor, rows: list[torch.Tensor]) -> torch.Tensor:
    """f: the bias has no decay of its own, but a little keeps its curvature from vanishing."""
    penalty = (log_decay.exp() * w[1:].square()).sum() + 1e-4 * w[0].square()
    return outer(w, log_decay, rows) + 0.5 * penalty


def start() -> tuple[torch.Tensor, torch.optim.LBFGS, torch.Tensor]:
    """w, what trains it to a gradient of about 1e-9 in one step, and φ."""
    w = torch.zeros(31, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )
    return w, lbfgs, torch.full((30,), 0.1, dtype=torch.float64).log()


def tune(data: list[list[torch.Tensor]], method: hg.LinearSolver, steps: int) -> hg.BilevelSolver:
    """The solver after its run: ``hparams`` is φ, ``history`` a table of the outer steps."""
    w, lbfgs, log_decay = start()
    solver = hg.BilevelSolver(
        hg.Level(inner, w, lbfgs, [data[0]]),
        hg.Level(outer, log_decay, torch.optim.Adam([log_decay], lr=0.1), [data[1]]),
        method=method,
        outer_steps=steps,
        callbacks=[hg.bilevel.ProgressBar(leave=False)],
    )
    losses = solver.run()["outer_loss"]
    print(f"{type(method).__name__:<10} {losses[0]:.4f} → {losses[-1]:.4f}")
    return solver


# --- the end of your part -------------------------------------------------------------------------

# Functions, so that every use starts with a generator in its first state.
METHODS: dict[str, Callable[[], hg.LinearSolver]] = {
    "Dense": hg.Dense,
    "CG": lambda: hg.CG(rtol=1e-6),
    "Neumann, 100 terms": lambda: hg.Neumann(terms=100),
    "Nyström, rank 10": lambda: hg.Nystrom(
        rank=10, rho=0.1, generator=torch.Generator().manual_seed(0)
    ),
    "Identity": lambda: hg.Identity(scale=1.0),
}
SINGLE = "best single decay"


def fit(data: list[list[torch.Tensor]], log_decay: torch.Tensor) -> torch.Tensor:
    """The w of least f."""
    w, lbfgs, _ = start()

    def closure() -> torch.Tensor:
        lbfgs.zero_grad()
        value = inner(w, log_decay, data[0])
        value.backward()
        return value

    lbfgs.step(closure)
    return w.detach()


def loss(data: list[list[torch.Tensor]], log_decay: torch.Tensor) -> float:
    """The validation loss of the w of least f."""
    return float(outer(fit(data, log_decay), log_decay, data[1]))


def compare_methods(data: list[list[torch.Tensor]], repeats: int) -> list[dict[str, Any]]:
    """Print what hg.check says; the error, cost and receipt of each method at the start."""
    log_decay = start()[2]
    problem = (
        lambda w, log_decay: inner(w, log_decay, data[0]),
        lambda w, log_decay: outer(w, log_decay, data[1]),
        fit(data, log_decay),
        log_decay,
    )
    print(f"\nWhat hg.check says of the problem\n\n{hg.check(*problem)}")
    results: dict[str, hg.Hypergradient] = {}
    milliseconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(repeats):
        for name, make in METHODS.items():
            solver = make()
            began = time.perf_counter()
            results[name] = hg.hypergradient(*problem, method=solver)
            milliseconds[name].append(1e3 * (time.perf_counter() - began))

    exact = results["Dense"].grads
    return [
        {
            "method": name,
            "relative error": float((result.grads - exact).norm() / exact.norm()),
            "products": result.solve.matvecs,
            "ms": statistics.median(milliseconds[name]),
            "status": result.solve.status.name,
        }
        for name, result in results.items()
    ]


def best_single_decay(data: list[list[torch.Tensor]]) -> torch.Tensor:
    """The uniform log φ of least validation loss, of four a decade."""
    grid = torch.logspace(-4, 1, 21, dtype=torch.float64).log()
    return min((value.expand(30) for value in grid), key=lambda uniform: loss(data, uniform))


def splits(data: list[list[torch.Tensor]], decays: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Loss and accuracy on the three splits for each decay."""
    rows = []
    for name, log_decay in decays.items():
        w = fit(data, log_decay)
        row: dict[str, Any] = {"decays": name}
        for split, (X, y) in zip(("training", "validation", "test"), data, strict=True):
            hits = ((X @ w[1:] + w[0] > 0) == y).double().mean()
            row[f"{split} loss"] = float(outer(w, log_decay, [X, y]))
            row[f"{split} accuracy, %"] = 100.0 * float(hits)
        rows.append(row)
    return rows


def draw(
    data: list[list[torch.Tensor]],
    losses: dict[str, list[float]],
    decays: dict[str, torch.Tensor],
) -> Figure:
    """Validation loss over outer steps, and the learned decay of each feature."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    # The exact methods lie on top of each other: each is drawn thinner than the one below it.
    looks = [("0.8", "-", 7), ("C0", "-", 2.5), ("C1", "--", 2), ("C2", "-.", 2), ("C3", ":", 2)]
    for (color, line, width), (name, curve) in zip(looks, losses.items(), strict=True):
        left.plot(curve, color=color, linestyle=line, linewidth=width, label=name)
    left.axhline(loss(data, decays[SINGLE]), color="black", linewidth=1, label=SINGLE)
    left.set(xlabel="outer step", ylabel="validation loss", title="Tuning 30 weight decays")
    left.legend()
    left.grid(alpha=0.3)

    learned, initial = decays["CG"].exp(), float(decays["before"][0].exp())
    order = learned.argsort().tolist()
    features = load_breast_cancer().feature_names
    right.barh([features[i] for i in order], learned[order] - initial, left=initial)
    right.axvline(initial, color="black", linestyle="--", label="at the start")
    right.set(xscale="log", xlabel="weight decay", title="Learned decay per feature (CG)")
    right.tick_params(axis="y", labelsize=8)
    right.grid(axis="x", alpha=0.3)
    right.legend(loc="lower right")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison, the tuning and the picture."""
    parser = report.arguments(__doc__, seed="of the split into three")
    parser.add_argument("--steps", type=int, default=40, help="outer steps for each method; 40")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each method; 20")
    options = parser.parse_args(argv)
    if min(options.steps, options.repeats) < 1:
        parser.error("--steps and --repeats must be at least 1")

    torch.set_num_threads(1)  # faster for operations as small as these
    data = load(options.seed)
    sizes = [len(y) for _, y in data]
    print(f"breast cancer: {sizes[0]} training, {sizes[1]} validation, {sizes[2]} test rows")
    methods = compare_methods(data, options.repeats)

    print(f"\nValidation loss at the first and the last of {options.steps} outer steps\n")
    solvers = {name: tune(data, make(), options.steps) for name, make in METHODS.items()}
    learned = {name: solver.hparams for name, solver in solvers.items()}
    decays = {"before": start()[2], SINGLE: best_single_decay(data), **learned}
    # The last row is of before the last step.
    losses = {
        name: [*solver.history["outer_loss"], loss(data, solver.hparams)]
        for name, solver in solvers.items()
    }
    tables = {
        "Hypergradient at the start, 31 parameters and 30 decays": methods,
        f"Before and after {options.steps} outer steps": splits(data, decays),
    }
    report.finish("weight_decay", options, tables, draw(data, losses, decays))


if __name__ == "__main__":
    main()
