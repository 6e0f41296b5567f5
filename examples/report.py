"""What the examples of the gallery share: a table in the terminal, and the same rows in a file."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

import hypergrad as hg

Row = Mapping[str, Any]  # a cell of a table under the name of its column

ROOT = Path(__file__).parent.parent


def save(name: str, options: Namespace, rows: Sequence[Row], path: Path | None = None) -> Path:
    """Write the rows, and all that is needed to get them again, as JSON.

    Args:
        name: of the example.
        options: those of its command line, ``seed`` among them.
        rows: of the table.
        path: of the file; ``None`` is ``examples/results/<name>.json``.

    Returns:
        The path.
    """
    path = path or ROOT / "examples" / "results" / f"{name}.json"
    record = {
        "name": name,
        "command": shlex.join(["python", _plain(Path(sys.argv[0])), *sys.argv[1:]]),
        "options": {key: _plain(value) for key, value in vars(options).items()},
        "seed": options.seed,
        "date": date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "hypergrad": hg.__version__,
        },
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "rows": [{key: _plain(value) for key, value in row.items()} for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows under the names of their columns, words to the left and numbers to the right.

    The columns are those of the first row; a cell that is missing or ``None`` is a dash.
    """
    columns = list(rows[0])
    cells = [columns, *([_shown(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = [any(isinstance(row.get(name), str) for row in rows) for name in columns]
    print()
    for line in cells:
        padded = (
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(line, widths, words, strict=True)
        )
        print("  ".join(padded).rstrip())


def _shown(value: Any) -> str:
    """A number by four digits, or more where they are before the point."""
    if value is None:
        return "—"
    if isinstance(value, float) and abs(value) < 1e4:
        return f"{value:#.4g}".rstrip(".")
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """What JSON can hold. Paths are relative to the repository if they are in it."""
    if isinstance(value, Path):
        inside = value.is_absolute() and value.is_relative_to(ROOT)
        return (value.relative_to(ROOT) if inside else value).as_posix()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
