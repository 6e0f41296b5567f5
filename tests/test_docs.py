"""Every block of Python in the documentation runs, page by page, in the order of the page.

What a page leaves unsaid, such as where its data come from, is in a comment that nobody sees:
``<!-- run:`` before the code and ``-->`` after it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gallery import ROOT

BLOCK = re.compile(
    r"^(?:```python[^\n]*\n(.*?)^```|<!-- run:\n(.*?)^-->)", re.DOTALL | re.MULTILINE
)
PAGES = [
    page
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if BLOCK.search(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
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
