"""The pages of the documentation as programs.

What a page leaves unsaid, such as where its data come from, is in a comment that nobody sees:
``<!-- run:`` before the code and ``-->`` after it. A page that needs the libraries of
``make test-real`` says so in its first line.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(
    r"^(?:```python[^\n]*\n(.*?)^```|<!-- run:\n(.*?)^-->)", re.DOTALL | re.MULTILINE
)
ELSEWHERE = "<!-- run by: make test-real -->\n"


def pages(*, elsewhere: bool) -> list[Path]:
    """The pages with code for the environment of ``make test-real``, or those for this one."""
    found = []
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if BLOCK.search(text) and text.startswith(ELSEWHERE) is elsewhere:
            found.append(page)
    return found


def name(page: Path) -> str:
    return page.relative_to(DOCS.parent).as_posix()


def run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page in its order, in one namespace, from ``folder``."""
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    # As a script has it: torch.compile looks for a function's globals in its module.
    script = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    namespace: dict[str, Any] = vars(script)
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        code = "\n" * line + (found[1] or found[2])  # so that errors have the lines of the page
        exec(compile(code, str(page), "exec"), namespace)
