"""Blocks of a page that a command wrote.

A page says where they belong by two lines, and all between them is written anew:

    <!-- printed by: COMMAND -->
    <!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: numbers to the right, words to the left."""
    words = [any(re.search(r"[^\W\d]{2}", row[i]) for row in rows) for i in range(len(heads))]
    lines = [heads, ["---" if word else "---:" for word in words], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(page: str, command: str) -> str:
    """What is in the block of a command.

    Raises:
        ValueError: the page has no such block, or several.
    """
    found = _block(command).findall(page)
    if len(found) != 1:
        raise ValueError(f"page must have one block of {command!r}, got {len(found)}")
    return str(found[0])


def fill(path: Path, command: str, text: str) -> None:
    """Write ``text`` into the block of a command.

    Raises:
        ValueError: see :func:`written`.
    """
    page = path.read_text(encoding="utf-8")
    written(page, command)
    new = f"{_opening(command)}\n\n{text}\n\n<!-- end -->"
    path.write_text(_block(command).sub(lambda _: new, page), encoding="utf-8")


def _opening(command: str) -> str:
    return f"<!-- printed by: {command} -->"


def _block(command: str) -> re.Pattern[str]:
    return re.compile(f"{re.escape(_opening(command))}\n+(.*?)\n*<!-- end -->", re.DOTALL)
