"""What a run of the benchmark leaves: tables, goals and curves, in one JSON file.

A table is a list of rows, a row a cell for each of its columns. A peer that has no figure has a
row all the same, with the reason for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peers.environments import BY_NAME, FLOOR, OURS
from peers.session import Measured

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent.parent / "benchmarks" / "figures"
Row = dict[str, Any]
WRONG = 10.0
"""Times the least error: nobody wants to be as fast as an answer that is further off."""


@dataclass
class Table:
    """Rows under a title, with what must be known to read them."""

    title: str
    note: str
    rows: list[Row]


@dataclass(frozen=True)
class Goal:
    """A figure and its bound, and what came of it; no figure is no goal met."""

    goal: str
    bound: float
    figure: float | None
    of: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure is within the bound."""
        return self.figure is not None and self.figure <= self.bound


@dataclass
class Record:
    """All that a run found out."""

    about: dict[str, Any]
    tables: dict[str, Table] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it as JSON, the goals as the table that comes first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "goal": goal.goal,
                "bound": f"≤ {goal.bound:.3g}",
                "figure": goal.figure,
                "": "met" if goal.met else "missed" if goal.figure is not None else "no figure",
                "of": goal.of,
            }
            for goal in self.goals
        ]
        tables = {"goals": Table("Goals", "", rows), **self.tables}
        content = {
            **self.about,
            "tables": {name: asdict(table) for name, table in tables.items()},
            "curves": self.curves,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def row(measured: Measured, **columns: Any) -> Row:
    """The cells of one piece of work: who, how long, how wrong; or why not."""
    cells: Row = {"": who(measured)}
    cells["ms"] = None if measured.median is None else 1e3 * measured.median
    cells["relative error"] = measured.error
    cells.update(columns)
    cells["remark"] = remark(measured)
    return cells


def who(measured: Measured) -> str:
    """The title of the peer, and of its mode."""
    title = BY_NAME[measured.task.peer].title
    return f"{title}, {measured.task.label}" if measured.task.label else title


def remark(measured: Measured) -> str:
    """Why there is no figure, in a cell."""
    if measured.failure:
        return measured.failure
    if measured.missing is not None:
        missing = measured.missing
        return missing if missing.startswith("no such") else f"no such method: {missing}"
    return ""


def ours(results: Iterable[Measured], label: str | None = None) -> Measured | None:
    """Our own piece of work among others."""
    for measured in results:
        if measured.task.peer == OURS and label in (None, measured.task.label):
            return measured
    return None


def fastest(results: Iterable[Measured]) -> Measured | None:
    """The fastest peer with a right answer: of at most ten times the least error of all."""
    results = list(results)
    known = [m.error for m in results if m.error is not None]
    most = WRONG * min(known, default=0.0)
    peers = [
        m
        for m in results
        if m.task.peer not in (OURS, FLOOR) and m.median is not None and (m.error or 0.0) <= most
    ]
    return min(peers, key=lambda m: m.median or 0.0, default=None)


def ratio(a: float | None, b: float | None) -> float | None:
    """The first by the second, where there are both."""
    return None if a is None or b is None or b == 0.0 else a / b


def by(seconds: float | None, other: Measured | None) -> tuple[float | None, str]:
    """The ratio to the seconds of a peer, and its title; what a goal takes."""
    if other is None:
        return None, ""
    return ratio(seconds, other.median), BY_NAME[other.task.peer].title


def markdown(table: Table | dict[str, Any]) -> str:
    """A table as Markdown, its note below it: numbers to the right."""
    content = asdict(table) if isinstance(table, Table) else table
    rows: Sequence[Row] = content["rows"]
    names = list(dict.fromkeys(name for each in rows for name in each))
    names = [n for n in names if n != "remark" or any(each.get("remark") for each in rows)]
    words = [any(isinstance(each.get(name), str) for each in rows) for name in names]
    lines = [
        names,
        ["---" if word else "---:" for word in words],
        *([shown(each.get(name)) for name in names] for each in rows),
    ]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{body}\n\n{content['note']}".rstrip() if rows else "Not run."


def shown(value: Any) -> str:
    """A cell: three digits, small numbers by their power of ten."""
    if value is None:
        return "—"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value).replace("|", r"\|").replace("<", "&lt;").replace("_", r"\_")
    if value != 0.0 and abs(value) < 1e-2:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100.0 else f"{value:#.3g}".rstrip(".")
