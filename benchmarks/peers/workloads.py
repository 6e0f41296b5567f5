"""Workloads (a) to (d): one hypergradient, by every peer in turn.

Each takes a session and a size, and puts a table and its goals into the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.peers import data, truth
from benchmarks.peers.environments import BY_NAME, FLOOR, OURS
from benchmarks.peers.record import Goal, Record, Row, Table, fastest, ours, ratio, remark, row
from benchmarks.peers.session import Measured, Session, Task

ITERATIONS = 20
RHO = 0.1
"""Of every Nyström approximation in (b)."""
STEPS = 50
MODES = ("recompute", "graph", "checkpoint")
OPTIMIZERS = {"sgd": ("SGD, momentum 0.9", 0.1), "adam": ("Adam", 1e-3)}


@dataclass(frozen=True)
class Size:
    """How much is measured: the whole, or what a test has time for."""

    repeats: int = 15
    quick: bool = False

    def layers(self, *widths: int) -> tuple[int, ...]:
        """Of a network; narrow if quick."""
        hidden = tuple(8 for _ in widths[1:-1])
        return (widths[0], *hidden, widths[-1]) if self.quick else widths


def implicit(session: Session, record: Record, size: Size) -> None:
    """(a) and (b): 20 iterations of CG, 20 terms of Neumann, rank 20 of Nyström."""
    sizes = size.layers(64, 256, 256, 10)
    problem = data.digits_network(sizes, rows=64 if size.quick else 512)
    facts = problem.facts or {}
    alpha = 1.0 / facts["largest curvature"]
    path = session.file("network", problem)
    settings = {
        "cg": {"iterations": ITERATIONS, "alpha": alpha},
        "neumann": {"iterations": ITERATIONS, "alpha": alpha},
        "nystrom": {"rank": ITERATIONS, "rho": RHO},
    }
    where = (
        f"MLP {'-'.join(map(str, sizes))}, tanh, digits, one L2 of 0.1 a tensor; at θ the "
        f"gradient has norm {facts['gradient norm']:.1e}, and the Hessian curvatures from "
        f"{facts['smallest curvature']:.1e} to {facts['largest curvature']:.2f} (Lanczos)."
    )
    notes = {
        "cg": f"{where} curvlinops has no hypergradient: products and CG are its own, the mixed "
        "product is autograd's.",
        "neumann": f"α = 1/λ_max = {alpha:.3f} for all.",
        "nystrom": f"ρ = {RHO} for all.",
    }
    for method, options in settings.items():
        tasks = [
            Task(name, "implicit", path, {"method": method, **options}) for name in session.names
        ]
        results = session.measure(tasks, size.repeats)
        reference = ours(results)
        seconds = reference.median if reference else None
        rows = [row(m, **{"time by ours": ratio(m.median, seconds)}) for m in results]
        title = {"cg": "CG", "neumann": "Neumann", "nystrom": "Nyström"}[method]
        record.tables["a" if method == "cg" else f"b_{method}"] = Table(
            f"{title}, {ITERATIONS}", notes[method], rows
        )
        if method == "cg" and reference is not None:
            _goals_of_implicit(record, results, reference)
            _profile(session, record, "a", tasks)


def _goals_of_implicit(record: Record, results: list[Measured], reference: Measured) -> None:
    best = fastest(results)
    record.goals += [
        Goal("(a) time by the fastest peer", 0.9, *_by(reference.median, best)),
        Goal("(a) time by hypergrad 0.0.1", 0.25, *_by(reference.median, _of(results, "v001"))),
    ]
    errors = {
        m.task.peer: m.error
        for m in results
        if m.task.peer not in (OURS, FLOOR) and m.error is not None
    }
    if errors and reference.error is not None:
        least = min(errors, key=lambda name: errors[name] or 0.0)
        record.goals.append(
            Goal(
                "(a) error by the least of a peer", 1.0,
                ratio(reference.error, errors[least]), BY_NAME[least].title,
            )
        )  # fmt: skip


def _profile(session: Session, record: Record, part: str, tasks: Sequence[Task]) -> None:
    """Where the time goes, ours and by hand."""
    rows: list[Row] = []
    for task in tasks:
        if task.peer in (OURS, FLOOR):
            title = BY_NAME[task.peer].title
            rows.append(
                {"share of the time": f"{title}, {task.label}" if task.label else title}
                | session.profile(task)
            )
    record.tables[f"{part}_profile"] = Table(
        "Where the time goes",
        "By PyTorch's profiler, which slows down what is short: the CPU time of the largest "
        "operators and of all of them, by the wall clock of one run.",
        rows,
    )


def unrolled(session: Session, record: Record, size: Size) -> None:
    """(d): 50 steps of SGD with momentum and of Adam."""
    sizes, rows = size.layers(64, 256, 256, 10), 64 if size.quick else 2048
    steps = 5 if size.quick else STEPS
    plain = data.random_network(sizes, rows)
    for optimizer, (title, lr) in OPTIMIZERS.items():
        exact = truth.through_steps(plain.to(torch.float64), optimizer, steps, lr)
        path = session.file(optimizer, replace(plain, exact=exact.detach()))
        tasks = [
            Task(
                name,
                "unrolled",
                path,
                {**mode, **_of_steps(optimizer, steps, lr)},
                label,
                apart=not size.quick,
            )
            for name in session.names
            for label, mode in _modes(name)
        ]
        results = session.measure(tasks, max(3, size.repeats // 3))
        session.add_peaks(results[:1] if size.quick else results)
        if optimizer == "sgd":
            _profile(
                session,
                record,
                "d",
                [replace(t, apart=False) for t in tasks if t.label in ("", "graph")],
            )
        reference = ours(results, "graph")
        seconds = reference.median if reference else None
        rows_of = [
            row(
                m,
                **{
                    "MiB": m.mebibytes,
                    "time by our graph": ratio(m.median, seconds),
                },
            )
            for m in results
        ]
        record.tables[f"d_{optimizer}"] = Table(
            f"{steps} steps of {title}",
            f"MLP {'-'.join(map(str, sizes))}, ReLU, {rows} random rows, rate {lr:g}. MiB: the "
            "peak of the first call in a fresh process, above what was resident before it.",
            rows_of,
        )
        default = ours(results, "recompute")
        least = min(filter(_has_peak, results), key=lambda m: m.mebibytes or 0.0, default=None)
        record.goals += [
            Goal(
                f"(d) {title}: memory of the default by the least of a peer", 1 / 3,
                ratio(_peak(default), _peak(least)),
                BY_NAME[least.task.peer].title if least else "",
            ),
            Goal(
                f"(d) {title}: time of graph mode by the fastest peer", 1.0,
                *_by(seconds, fastest(results)),
            ),
        ]  # fmt: skip


def _of_steps(optimizer: str, steps: int, lr: float) -> dict[str, Any]:
    return {"optimizer": optimizer, "steps": steps, "lr": lr}


def _modes(name: str) -> list[tuple[str, dict[str, str]]]:
    return [(mode, {"mode": mode}) for mode in MODES] if name == OURS else [("", {})]


def _has_peak(measured: Measured) -> bool:
    return measured.task.peer not in (OURS, FLOOR) and measured.mebibytes is not None


def _peak(measured: Measured | None) -> float | None:
    return None if measured is None else measured.mebibytes


def _of(results: list[Measured], peer: str) -> Measured | None:
    return next((m for m in results if m.task.peer == peer), None)


def _by(seconds: float | None, other: Measured | None) -> tuple[float | None, str]:
    if other is None:
        return None, ""
    return ratio(seconds, other.median), BY_NAME[other.task.peer].title


TARGET = 1e-2
TRIALS = 3
"""Repeats of each budget in the grid."""
BUDGETS = {
    "cg": (5, 10, 15, 20, 25, 30, 40, 60, 100),
    "neumann": (50, 100, 200, 400, 800),
    "nystrom": (25, 50, 100, 200, 400),
}
FAMILIES: dict[str, tuple[str, ...]] = {
    OURS: ("cg", "block cg", "minres", "sketched cg", "jacobi cg", "neumann", "nystrom", "dense"),
    "v001": ("cg", "neumann", "nystrom"),
    "betty": ("cg", "neumann"),
    "torchopt": ("cg", "normal cg", "neumann"),
    "boat": ("cg", "neumann"),
    "curvlinops": ("cg", "neumann"),
    "higher": ("cg",),
    FLOOR: ("cg", "neumann"),
}
"""The methods of each peer that go into its grid, with the budgets of BUDGETS."""
SKETCH = 25


def to_an_error(session: Session, record: Record, size: Size) -> None:
    """(c): logistic regression to a relative error of 0.01, each peer at its best."""
    problem = data.digits_logistic(rows=100 if size.quick else 1000)
    facts = problem.facts or {}
    path = session.file("logistic", problem)
    points: dict[str, list[dict[str, Any]]] = {}
    candidates: list[Task] = []
    refused: list[Measured] = []
    for name in session.names:
        for family in FAMILIES[name]:
            found, tried = _try(session, path, name, family, facts, size)
            points.setdefault(name, []).extend(_point(m) for m in tried if m.median is not None)
            candidates += found
            refused += [m for m in tried if m.median is None][:1]
    results = session.measure(candidates, size.repeats)
    best: dict[str, Measured] = {}
    for measured in results:
        name = measured.task.peer
        if measured.median is None:
            continue
        if name not in best or measured.median < (best[name].median or 0.0):
            best[name] = measured
    rows: list[Row] = []
    for name in session.names:
        if name in best:
            cells = row(best[name], settings=best[name].task.label)
            cells[""] = BY_NAME[name].title
        else:
            reason = next((remark(m) for m in refused if m.task.peer == name), "")
            cells = {"": BY_NAME[name].title, "remark": reason or "not reached"}
        rows.append(cells)
    size_of = sum(tensor.numel() for tensor in problem.params.values())
    record.tables["c"] = Table(
        f"Logistic regression to a relative error of {TARGET:g}",
        f"{size_of} parameters, {len(problem.train[0])} rows, one L2 of 0.001 a weight, λ_max "
        f"{facts['largest curvature']:.2f}. The grid of each peer: "
        + "; ".join(f"{BY_NAME[n].title}: {', '.join(FAMILIES[n])}" for n in session.names)
        + ". Budgets: "
        + "; ".join(f"{k} {', '.join(map(str, v))}" for k, v in BUDGETS.items())
        + f", block CG, sketched CG (rank {SKETCH}, drawn anew), CG by a "
        "diagonal of 10 products and MINRES as CG; α = 1/λ_max for Neumann, ρ = L2 for "
        "Nyström. What fails at all, or never reaches the error, is not timed.",
        rows,
    )
    record.curves["time against error"] = points
    reference = best.get(OURS)
    record.goals.append(
        Goal(
            "(c) time by the fastest peer that gets there", 0.5,
            *_by(reference.median if reference else None, fastest(best.values())),
        )
    )  # fmt: skip


def _try(
    session: Session, path: str, name: str, family: str, facts: dict[str, Any], size: Size
) -> tuple[list[Task], list[Measured]]:
    """The cheapest budget of a family that gets there, and all that were tried."""
    budgets = BUDGETS.get(family, BUDGETS["cg"]) if family != "dense" else (0,)
    tried: list[Measured] = []
    found: list[Task] = []
    for budget in budgets[-1:] if size.quick else budgets:
        options: dict[str, Any] = {"method": family, "alpha": 1.0 / facts["largest curvature"]}
        if family == "nystrom":
            options.update(rank=budget, rho=1e-3)
            label = f"Nyström, rank {budget}"
        else:
            options.update(iterations=budget, rank=SKETCH)
            label = family if family == "dense" else f"{family}, {budget}"
        task = Task(name, "implicit", path, options, label)
        (measured,) = session.measure([task], 1 if size.quick else TRIALS)
        tried.append(measured)
        if measured.failure or measured.missing is not None:
            break
        if measured.error is not None and measured.error <= TARGET:
            if not found:
                found.append(task)
            if family not in ("cg", "minres"):
                break  # the rest of the curve would only show that more of it costs more
    return found, tried


def _point(measured: Measured) -> dict[str, Any]:
    return {
        "settings": measured.task.label,
        "family": measured.task.settings["method"],
        "seconds": measured.median,
        "error": measured.error,
    }
