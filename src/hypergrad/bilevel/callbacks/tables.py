"""The history as a file that grows with each step."""

from __future__ import annotations

import csv
import io
import json
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TextIO

from hypergrad.bilevel.callbacks.base import Callback
from hypergrad.bilevel.history import Record, Value

if TYPE_CHECKING:
    from hypergrad.bilevel.solver import BilevelSolver

Row = dict[str, Value]


class TableFile(Callback):
    """A file with a row for each outer step, written as the step ends.

    A loop that resumes goes on below the row of its step: later ones, which it will make again, are
    dropped, and so is a last row that was cut off. A loop that starts anew starts the file anew.

    Args:
        path: the file; its folder is made if need be.
    """

    first_rank_only: ClassVar[bool] = True

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    @abstractmethod
    def read(self) -> list[Row]:
        """The rows in the file."""

    @abstractmethod
    def render(self, rows: list[Row]) -> str:
        """The whole file."""

    @abstractmethod
    def render_row(self, row: Row) -> str | None:
        """One more row, or ``None`` if the whole file must be written anew for it."""

    def on_start(self, solver: BilevelSolver) -> None:
        """Drop the rows that will be made again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.read() if self.path.exists() and solver.outer_step else []
        self._rewrite([row for row in rows if int(row["step"] or 0) <= solver.outer_step])

    def on_step(self, solver: BilevelSolver, record: Record) -> None:
        """Write the row."""
        row = record.row()
        text = self.render_row(row)
        if text is None:
            self._rewrite([*self.read(), row])
            return
        assert self._file is not None
        self._file.write(text)
        self._file.flush()

    def on_end(self, solver: BilevelSolver, error: BaseException | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rewrite(self, rows: list[Row]) -> None:
        if self._file is not None:
            self._file.close()
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(self.render(rows), encoding="utf-8", newline="")
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8", newline="")


class CSV(TableFile):
    """Comma-separated values, with a header; an entry that is missing is empty."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self._names: list[str] = []

    def read(self) -> list[Row]:
        """The rows in the file; numbers stay the words that were written."""
        with self.path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
        if not lines:
            return []
        whole = self.path.read_text(encoding="utf-8").endswith("\n")
        names, rows = lines[0], lines[1:] if whole else lines[1:-1]
        return [dict(zip(names, row, strict=True)) for row in rows]

    def render(self, rows: list[Row]) -> str:
        """The header and the rows."""
        self._names = list(dict.fromkeys(name for row in rows for name in row))
        header: Row = {name: name for name in self._names}
        return "".join(self._line(row) for row in [header, *rows])

    def render_row(self, row: Row) -> str | None:
        """A line, if the header has all of its columns."""
        return self._line(row) if row.keys() <= set(self._names) else None

    def _line(self, row: Row) -> str:
        if not self._names:
            return ""
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(
            ["" if (value := row.get(name)) is None else value for name in self._names]
        )
        return line.getvalue()


class JSONL(TableFile):
    """One JSON object a line; an entry that is missing is null."""

    def read(self) -> list[Row]:
        """The rows in the file."""
        lines = self.path.read_text(encoding="utf-8").split("\n")
        # What follows the last line break was cut off.
        return [json.loads(line) for line in lines[:-1]]

    def render(self, rows: list[Row]) -> str:
        """All rows."""
        return "".join(json.dumps(row) + "\n" for row in rows)

    def render_row(self, row: Row) -> str | None:
        """A line."""
        return json.dumps(row) + "\n"
