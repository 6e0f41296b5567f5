"""Callbacks that write the history to a file, row by row."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import ClassVar

from hypergrad.bilevel.callbacks.base import Callback, Solver
from hypergrad.bilevel.history import Record, Value
from hypergrad.errors import CheckpointWarning, warn

Row = dict[str, Value]


class TableFile(Callback):
    """A file with a row for each outer step, written as the step ends.

    A loop that resumes continues below the row of its step: later rows, which it will make again,
    are dropped, as is a last row that was cut off. A loop that starts at step 0 starts a new file.
    Where the file cannot be written (a full disk), a :class:`CheckpointWarning` says why, the loop
    goes on, and the missing rows are written with the next one.

    Args:
        path: the file; its folder is made if need be. A relative path counts from the directory in
            which the callback was made. A symbolic link stands for the file that it points to.
    """

    first_rank_only: ClassVar[bool] = True

    def __init__(self, path: Path | str) -> None:
        self.path = Path(os.path.realpath(path))
        self._file: FileIO | None = None
        self._behind = False

    @abstractmethod
    def read(self) -> list[Row]:
        """Return the rows in the file; ``ValueError`` if a line before the last one is broken."""

    @abstractmethod
    def render(self, rows: list[Row]) -> str:
        """Return the text of the whole file."""

    @abstractmethod
    def render_row(self, row: Row) -> str | None:
        """Return one more row, or ``None`` if the whole file must be written again for it."""

    def on_start(self, solver: Solver) -> None:
        """Drop the rows that will be made again; raise ``ValueError`` as :meth:`read`."""

        def begin() -> None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = self.read() if self.path.exists() and solver.outer_step else []
            self._rewrite([row for row in rows if int(str(row["step"])) <= solver.outer_step])

        self._try(begin)

    def on_step(self, solver: Solver, record: Record) -> None:
        def write() -> None:
            text = None if self._behind else self.render_row(record.row())
            if text is None:
                # The file may have lost rows. The history has all rows, this one included.
                self._rewrite([past.row() for past in solver.history])
            else:
                self._write(text)

        self._try(write)

    def on_end(self, solver: Solver, error: BaseException | None) -> None:
        if self._behind and len(solver.history):
            self._try(lambda: self._rewrite([past.row() for past in solver.history]))
        self._close()

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self._behind = True
            self._close()
            # The same message each time, so that Python's filter shows it once.
            warn(
                f"{self.path} could not be written ({error}); the loop goes on, and the missing "
                "rows are written when that works again",
                CheckpointWarning,
            )

    def _rewrite(self, rows: list[Row]) -> None:
        self._close()
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_bytes(_encoded(self.render(rows)))
        temporary.replace(self.path)
        # Without a buffer, which close() would try to write again.
        self._file = self.path.open("ab", buffering=0)
        self._behind = False

    def _write(self, text: str) -> None:
        assert self._file is not None
        content = _encoded(text)
        written = self._file.write(content)
        if written != len(content):
            raise OSError(f"{written} of {len(content)} bytes were written")

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rows(self, lines: Sequence[bytes], parse: Callable[[str], Row], first: int) -> list[Row]:
        """Parse each line; a broken last line is left out, an earlier one is a ``ValueError``."""
        rows = []
        for number, line in enumerate(lines, first):
            try:
                row = parse(line.decode())
                int(str(row["step"]))
            except (csv.Error, KeyError, RecursionError, TypeError, ValueError) as error:
                if number == first + len(lines) - 1:
                    break
                raise self._broken(number, error) from error
            rows.append(row)
        return rows

    def _lines(self) -> list[bytes]:
        """The lines of the file, without what follows the last line break, which was cut off."""
        return self.path.read_bytes().split(b"\n")[:-1]

    def _broken(self, number: int, error: Exception) -> ValueError:
        return ValueError(
            f"path must be a file that {type(self).__name__} wrote, got one whose line {number} is "
            f"broken ({type(error).__name__}: {error}); mend {self.path}, or move it away"
        )


class CSV(TableFile):
    """Comma-separated values, with a header; an entry that is missing is empty.

    Control characters in the names of metrics, such as line breaks, are escaped. ``read`` returns
    numbers as text.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self._names: list[str] = []

    def read(self) -> list[Row]:
        lines = self._lines()
        if not lines:
            return []
        try:
            names = _cells(lines[0].decode())
        except (csv.Error, ValueError) as error:
            raise self._broken(1, error) from error

        def parse(line: str) -> Row:
            return dict(zip(names, _cells(line), strict=True))

        return self._rows(lines[1:], parse, 2)

    def render(self, rows: list[Row]) -> str:
        rows = [{_escaped(name): value for name, value in row.items()} for row in rows]
        self._names = list(dict.fromkeys(name for row in rows for name in row))
        header: Row = {name: name for name in self._names}
        return "".join(self._line(row) for row in [header, *rows])

    def render_row(self, row: Row) -> str | None:
        row = {_escaped(name): value for name, value in row.items()}
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
    """One JSON object per line; an entry that is missing is null."""

    def read(self) -> list[Row]:
        return self._rows(self._lines(), json.loads, 1)

    def render(self, rows: list[Row]) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    def render_row(self, row: Row) -> str | None:
        return json.dumps(row) + "\n"


def _cells(line: str) -> list[str]:
    # No cell holds a line break: names are escaped, and a status has none.
    (cells,) = csv.reader([line], strict=True)
    return cells


def _escaped(name: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], name)


def _encoded(text: str) -> bytes:
    # A name may hold half of a surrogate pair, which has no encoding.
    return text.encode("utf-8", errors="backslashreplace")
