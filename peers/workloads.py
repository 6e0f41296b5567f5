"""Workloads (a), (b) and (d): one hypergradient, by every peer in turn.

Each takes a session and a size, and puts a table and its goals into the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from peers import data, truth
from peers.environments import BY_NAME, FLOOR, OURS
from peers.record import Goal, Record, Row, Table, by, fastest, ours, ratio, row
from peers.session import Measured, Session, Task

ITERATIONS = 20
RHO = 0.1
"""Of every Nyström approximation in (b)."""
STEPS = 50
PRODUCTS = {"kept graph": "auto", "compiled": "compiled"}
"""How ours multiplies by the Hessian, and the ``mode=`` of it."""
MEMORIES = {mode: mode for mode in ("recompute", "graph", "checkpoint")}
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
            Task(name, "implicit", path, {"method": method, **options, **mode}, label)
            for name in session.names
            for label, mode in _modes(name, PRODUCTS)
            if not (size.quick and label == "compiled")  # compiling is not quick
        ]
        results = session.measure(tasks, size.repeats)
        reference = ours(results, "kept graph")
        seconds = reference.median if reference else None
        rows = [row(m, **{"time by ours": ratio(m.median, seconds)}) for m in results]
        compiled = ours(results, "compiled")
        notes[method] += (
            f" The first compiled call took {compiled.first:.1f} s."
            if compiled and compiled.first
            else ""
        )
        title = {"cg": "CG", "neumann": "Neumann", "nystrom": "Nyström"}[method]
        record.tables["a" if method == "cg" else f"b_{method}"] = Table(
            f"{title}, {ITERATIONS}", notes[method], rows
        )
        if method == "cg" and reference is not None:
            _goals_of_implicit(record, results)
            _profile(session, record, "a", tasks)


def _goals_of_implicit(record: Record, results: list[Measured]) -> None:
    """Of either mode, each by itself."""
    for label in PRODUCTS:
        reference = ours(results, label)
        seconds = reference.median if reference else None
        record.goals += [
            Goal(f"(a) {label}: time by the fastest peer", 0.9, *by(seconds, fastest(results))),
            Goal(f"(a) {label}: time by 0.0.1", 0.25, *by(seconds, _of(results, "v001"))),
            Goal(f"(a) {label}: error by the least of a peer", 1.0, *_by_error(reference, results)),
        ]


def _by_error(reference: Measured | None, results: list[Measured]) -> tuple[float | None, str]:
    peers = [m for m in results if m.task.peer not in (OURS, FLOOR) and m.error is not None]
    least = min(peers, key=lambda m: m.error or 0.0, default=None)
    if least is None or reference is None:
        return None, ""
    return ratio(reference.error, least.error), BY_NAME[least.task.peer].title


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
            for label, mode in _modes(name, MEMORIES)
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
                *by(seconds, fastest(results)),
            ),
        ]  # fmt: skip


def _of_steps(optimizer: str, steps: int, lr: float) -> dict[str, Any]:
    return {"optimizer": optimizer, "steps": steps, "lr": lr}


def _modes(name: str, modes: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
    """The labels and settings of a peer's tasks: one for each mode of ours."""
    if name != OURS:
        return [("", {})]
    return [(label, {"mode": mode}) for label, mode in modes.items()]


def _has_peak(measured: Measured) -> bool:
    return measured.task.peer not in (OURS, FLOOR) and measured.mebibytes is not None


def _peak(measured: Measured | None) -> float | None:
    return None if measured is None else measured.mebibytes


def _of(results: list[Measured], peer: str) -> Measured | None:
    return next((m for m in results if m.task.peer == peer), None)
