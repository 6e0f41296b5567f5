"""The page on other libraries runs where those are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from documents import name, pages, run


# Its models are as they were initialised, where the default damping warns that it is large.
@pytest.mark.filterwarnings("ignore::hypergrad.DampingWarning")
@pytest.mark.parametrize("page", pages(elsewhere=True), ids=name)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float32)
    run(page, tmp_path, monkeypatch)
