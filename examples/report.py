"""What the examples of the gallery share: options, tables in the terminal and in a file, a picture.

options = report.arguments(__doc__).parse_args(argv)
...
report.finish("example", options, {"title": rows}, figure)
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import hypergrad as hg

Row = Mapping[str, Any]  # a cell of a table under the name of its column
Tables = Mapping[str, Sequence[Row]]  # under their titles

ROOT = Path(__file__).parent.parent
BEGAN = time.perf_counter()


def arguments(
    doc: str, *, full: str | None = None, seed: str = "of all that is drawn"
) -> ArgumentParser:
    """A parser with the options that every example has: --seed, --output, --results, and --full.

    Args:
        doc: of the module; its first line describes the program.
        full: what is different with ``--full``; ``None`` is no such option.
        seed: what is drawn from it.
    """
    parser = ArgumentParser(description=doc.splitlines()[0])
    if full is not None:
        parser.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--seed", type=int, default=0, help=f"{seed}; 0")
    parser.add_argument("--output", type=Path, help="the picture; in examples/figures")
    parser.add_argument("--results", type=Path, help="the tables, as JSON; in examples/results")
    return parser


def finish(name: str, options: Namespace, tables: Tables, figure: Figure) -> None:
    """Print the tables, save them with all that is needed to get them again, save the picture.

    Args:
        name: of the example, and of its files; those of ``--full`` end in ``_full``.
        options: as parsed.
        tables: rows under the title of their table.
        figure: the picture.
    """
    for title, rows in tables.items():
        print(f"\n{title}")
        print_table(rows)
    if getattr(options, "full", False):
        name += "_full"
    results = options.results or ROOT / "examples" / "results" / f"{name}.json"
    picture = options.output or ROOT / "examples" / "figures" / f"{name}.png"
    results.parent.mkdir(parents=True, exist_ok=True)
    record = json.dumps(describe(name, options, tables), indent=2, ensure_ascii=False)
    results.write_text(record + "\n", encoding="utf-8")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    print(f"\nresults: {results}\npicture: {picture}")


def describe(name: str, options: Namespace, tables: Tables) -> dict[str, Any]:
    """The tables, and where they come from."""
    return {
        "name": name,
        "command": shlex.join(["python", _plain(Path(sys.argv[0])), *sys.argv[1:]]),
        "options": {key: _plain(value) for key, value in vars(options).items()},
        "seed": options.seed,
        "date": date.today().isoformat(),
        "seconds": time.perf_counter() - BEGAN,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "hypergrad": hg.__version__,
        },
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "tables": {
            title: [{key: _plain(value) for key, value in row.items()} for row in rows]
            for title, rows in tables.items()
        },
    }


def columns(rows: Sequence[Row]) -> list[str]:
    """The names of all columns, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows under the names of their columns, words to the left and numbers to the right.

    A cell that is missing or ``None`` is a dash.
    """
    names = columns(rows)
    cells = [names, *([shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = [any(isinstance(row.get(name), str) for row in rows) for name in names]
    print()
    for line in cells:
        padded = (
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(line, widths, words, strict=True)
        )
        print("  ".join(padded).rstrip())


def shown(value: Any) -> str:
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
