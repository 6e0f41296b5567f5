"""Workload (f): how time and memory grow, ours and the fastest peer's, with fitted exponents.

An exponent is the slope of log(cost) against log(size), by least squares over the upper points of
the range, where fixed overheads no longer matter; each table says which points these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peers import data
from peers.environments import BY_NAME, OURS
from peers.problems import Problem
from peers.record import Goal, Record, Row, Table, ratio, remark
from peers.session import Measured, Session, Task
from peers.workloads import Size

EXPONENT_GOAL = 1.05
CROSS_GOAL = 1.25
"""Growth of the peak with the steps at the large batch, by that at the small one; 1 is none."""
MOST_SECONDS = 45.0
"""That a sweep goes on before its last round."""
BUSY = 1.0
"""Seconds of work before each repeat: after a rest the first second of work is faster than those
that follow, and what is short has nothing but that second."""
ITERATIONS = 5
L2 = 3.0
"""Where θ is not trained: large enough for the Hessian to be positive definite."""


@dataclass(frozen=True)
class Sweep:
    """One quantity that grows.

    Attributes:
        name: of it.
        what: is measured.
        sizes: it takes.
        fitted: how many of the largest are fitted.
        make: the problem of a size.
        kind: of work.
        settings: of the work at a size.
        peers: from which the fastest at the smallest fitted size is taken.
        goal: whether the exponent has one.
    """

    name: str
    what: str
    sizes: tuple[int, ...]
    fitted: int
    make: Callable[[int], Problem]
    kind: str
    settings: Callable[[int], dict[str, Any]]
    peers: tuple[str, ...]
    goal: bool = True


def _width(parameters: int) -> int:
    """Of two hidden layers between 64 and 10 that have about so many parameters."""
    return max(2, round((-76 + math.sqrt(76**2 + 4 * (parameters - 10))) / 2))


def _strong(sizes: tuple[int, ...], rows: int) -> Problem:
    problem = data.random_network(sizes, rows, "tanh")
    return replace(problem, hparams=problem.hparams * 0.0 + math.log(L2))


def _cg(_: int) -> dict[str, Any]:
    return {"method": "cg", "iterations": ITERATIONS, "alpha": 0.1}


def _steps(steps: int) -> dict[str, Any]:
    return {"optimizer": "sgd", "steps": steps, "lr": 0.1}


IMPLICIT = ("torchopt", "boat")  # those whose conjugate gradient is right
UNROLLED = ("torchopt", "higher", "boat")
SWEEPS = (
    Sweep(
        "parameters", f"a hypergradient, {ITERATIONS} CG, MLP 64-w-w-10, 64 rows",
        (1_000, 10_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000), 4,
        lambda n: _strong((64, _width(n), _width(n), 10), 64), "implicit", _cg, IMPLICIT,
    ),
    Sweep(
        "rank", "a hypergradient, Nyström, MLP 64-256-256-10, 512 rows",
        (1, 2, 4, 8, 16, 32, 64), 3,
        lambda n: _strong((64, 256, 256, 10), 512), "implicit",
        lambda n: {"method": "nystrom", "rank": n, "rho": 1.0}, ("v001",), goal=False,
    ),
    Sweep(
        "steps", "a hypergradient through SGD with momentum, MLP 64-64-64-10, 512 rows",
        (10, 25, 50, 100, 250, 500), 4,
        lambda n: data.random_network((64, 64, 64, 10), 512), "unrolled", _steps, UNROLLED,
    ),
    Sweep(
        "samples", f"a hypergradient, {ITERATIONS} CG, MLP 64-64-64-10",
        (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000), 3,
        lambda n: _strong((64, 64, 64, 10), n), "implicit", _cg, IMPLICIT,
    ),
)  # fmt: skip
MEMORY_STEPS = (10, 50, 200)
MEMORY_BATCHES = (128, 2048, 8192)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """The slope of log(cost) against log(size) by least squares; ``None`` of less than two."""
    if len(sizes) < 2:
        return None
    xs, ys = ([math.log(value) for value in values] for values in (sizes, costs))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return above / sum((a - x) ** 2 for a in xs)


def time(session: Session, record: Record, size: Size) -> None:
    """A table, an exponent and a curve for each sweep."""
    exponents: list[Row] = []
    for sweep in SWEEPS:
        sizes = sweep.sizes[:2] if size.quick else sweep.sizes
        results = _run(session, sweep, sizes, size)
        curves = {}
        for name, found in results.items():
            points = [(n, m.median) for n, m in zip(sizes, found, strict=True)]
            known = [(n, seconds) for n, seconds in points if seconds is not None]
            upper = [point for point in known if point[0] in sizes[-sweep.fitted :]]
            slope = exponent([n for n, _ in upper], [seconds for _, seconds in upper])
            curves[name] = {"sizes": [n for n, _ in known], "seconds": [s for _, s in known]}
            curves[name]["exponent"] = slope
            exponents.append(
                {
                    "": sweep.name,
                    "by": BY_NAME[name].title,
                    "exponent": slope,
                    "fitted": f"{upper[0][0]:,} to {upper[-1][0]:,}" if upper else None,
                    "smallest, ms": _ms(found[0].median),
                    "largest, ms": _ms(found[-1].median),
                    "of": sweep.what,
                    "remark": next((remark(m) for m in found if remark(m)), ""),
                }
            )
            if name == OURS and sweep.goal:
                record.goals.append(
                    Goal(f"(f) exponent of time in {sweep.name}", EXPONENT_GOAL, slope)
                )
        record.curves.setdefault("growth", {})[sweep.name] = curves
    record.tables["f_time"] = Table(
        "Growth of time", "Sizes are in the pictures; ranges from the smallest to the largest.",
        exponents,
    )  # fmt: skip


def _run(
    session: Session, sweep: Sweep, sizes: Sequence[int], size: Size
) -> dict[str, list[Measured]]:
    """Ours at all sizes, and of the peers the one that is fastest at the middle size."""
    middle = sizes[len(sizes) // 2]
    path = session.file("middle", sweep.make(middle))
    peers = [name for name in sweep.peers if name in session.workers]
    first = session.measure(
        [Task(name, sweep.kind, path, sweep.settings(middle)) for name in peers], 3
    )
    working = [m for m in first if m.median is not None]
    names = [OURS] if OURS in session.workers else []
    if working:
        names.append(min(working, key=lambda m: m.median or 0.0).task.peer)
    # All sizes in turn as well: what drifts from one size to the next would bend the exponent.
    tasks = [
        Task(
            name,
            sweep.kind,
            session.file(f"size {n}", sweep.make(n)),
            sweep.settings(n),
            busy=0.0 if size.quick else BUSY,
        )
        for n in sizes
        for name in names
    ]
    results: dict[str, list[Measured]] = {name: [] for name in names}
    for measured in session.measure(tasks, max(3, size.repeats // 3), most=MOST_SECONDS):
        results[measured.task.peer].append(measured)
    return results


def memory(session: Session, record: Record, size: Size) -> None:
    """Peaks of unrolling by steps and by batch, and whether the one grows with the other."""
    steps = MEMORY_STEPS[:2] if size.quick else MEMORY_STEPS
    batches = MEMORY_BATCHES[:1] if size.quick else MEMORY_BATCHES
    methods: list[tuple[str, str, dict[str, str]]] = []
    if OURS in session.workers:
        methods += [(OURS, mode, {"mode": mode}) for mode in ("recompute", "checkpoint", "graph")][
            : 1 if size.quick else None
        ]
    peer = next((name for name in UNROLLED if name in session.workers), None)
    methods += [(peer, "", {})] if peer else []
    peaks: dict[str, dict[str, list[float | None]]] = {}
    rows: list[Row] = []
    for batch in batches:
        path = session.file("memory", data.random_network(size.layers(64, 256, 256, 10), batch))
        for name, label, mode in methods:
            title = f"{BY_NAME[name].title}, {label}" if label else BY_NAME[name].title
            column: list[float | None] = []
            for count in steps:
                answer = session.peak(Task(name, "unrolled", path, {**mode, **_steps(count)}))
                column.append(answer.get("mebibytes"))
            peaks.setdefault(title, {})[str(batch)] = column
    crossings = {}
    for title, columns in peaks.items():
        small, large = (_growth(columns[str(batch)]) for batch in (batches[0], batches[-1]))
        crossings[title] = ratio(large, small)
        for batch in batches:
            rows.append(
                {
                    "": title,
                    "batch": batch,
                    **{
                        f"{n} steps, MiB": peak
                        for n, peak in zip(steps, columns[str(batch)], strict=True)
                    },
                    "growth by that at the smallest batch": ratio(
                        _growth(columns[str(batch)]), small
                    ),
                }
            )
    record.tables["f_memory"] = Table(
        "Memory of unrolled SGD with momentum by steps and batch",
        "MLP 64-256-256-10. Growth is from the fewest steps to the most: by that at the smallest "
        "batch it is 1 where memory does not grow with batch × steps.",
        rows,
    )
    record.curves["memory"] = {"steps": list(steps), "batches": list(batches), "peaks": peaks}
    default = next((title for title in peaks if title.endswith("recompute")), None)
    if default:
        record.goals.append(
            Goal(
                f"(f) default unrolling: growth of memory with the steps at batch {batches[-1]} by "
                f"that at {batches[0]}",
                CROSS_GOAL, crossings[default],
            )
        )  # fmt: skip


def _growth(column: Sequence[float | None]) -> float | None:
    first, last = column[0], column[-1]
    return None if first is None or last is None else last - first


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
