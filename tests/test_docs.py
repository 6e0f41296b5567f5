"""Every block of Python in the documentation runs, page by page, in the order of the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import name, pages, run


@pytest.mark.parametrize("page", pages(elsewhere=False), ids=name)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(page, tmp_path, monkeypatch)
