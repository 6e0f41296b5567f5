"""Workload (c): one hypergradient to a given error, each peer with the settings that suit it.

It takes a session and a size, and puts a table and its goal into the record.
"""

from __future__ import annotations

from typing import Any

from peers import data
from peers.environments import BY_NAME, FLOOR, OURS
from peers.record import Goal, Record, Row, Table, by, fastest, remark, row
from peers.session import Measured, Session, Task
from peers.workloads import Size

TARGET = 1e-2
TRIALS = 3
"""Repeats of each budget in the grid."""
BUDGETS = {
    "cg": (5, 10, 15, 20, 25, 30, 40, 60, 100),
    "neumann": (50, 100, 200, 400, 800),
    "nystrom": (25, 50, 100, 200, 400),
}
FAMILIES: dict[str, tuple[str, ...]] = {
    OURS: (
        "cg",
        "block cg",
        "minres",
        "sketched cg",
        "jacobi cg",
        "neumann",
        "nystrom",
        "dense",
        "compiled cg",
        "compiled minres",
    ),
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
COMPILED = "compiled "


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
            if size.quick and family.startswith(COMPILED):
                continue  # compiling is not quick
            found, tried = _try(session, path, name, family, facts, size)
            points.setdefault(name, []).extend(
                _point(m, family) for m in tried if m.median is not None
            )
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
        + f", block CG, sketched CG (rank {SKETCH}, drawn again), CG by a "
        "diagonal of 10 products and MINRES as CG; α = 1/λ_max for Neumann, ρ = L2 for "
        "Nyström. What fails at all, or never reaches the error, is not timed.",
        rows,
    )
    record.curves["time against error"] = points
    reference = best.get(OURS)
    record.goals.append(
        Goal(
            "(c) time by the fastest peer that gets there", 0.5,
            *by(reference.median if reference else None, fastest(best.values())),
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
        if family.startswith(COMPILED):
            options.update(method=family.removeprefix(COMPILED), mode="compiled")
        task = Task(name, "implicit", path, options, label)
        (measured,) = session.measure([task], 1 if size.quick else TRIALS)
        tried.append(measured)
        if measured.failure or measured.missing is not None:
            break
        if measured.error is not None and measured.error <= TARGET:
            if not found:
                found.append(task)
            if family not in ("cg", "minres", COMPILED + "cg"):
                break  # the rest of the curve would only show that more of it costs more
    return found, tried


def _point(measured: Measured, family: str) -> dict[str, Any]:
    return {
        "settings": measured.task.label,
        "family": family,
        "seconds": measured.median,
        "error": measured.error,
    }
