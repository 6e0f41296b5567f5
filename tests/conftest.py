"""Every test starts from the same random state, whichever tests ran before it, on one thread."""

from __future__ import annotations

import pytest
import torch

# Two threads on problems as small as these wait for each other on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
