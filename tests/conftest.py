"""Every test starts from the same random state, whichever tests ran before it, on one thread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Two threads on problems as small as these wait for each other on a busy machine: here, and in the
# programs that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The benchmark of peers is not in the sdist.
collect_ignore = [] if Path(__file__).parents[1].joinpath("peers").is_dir() else ["test_peers.py"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mode="compiled"`` runs its graphs as they are: compiling takes seconds for each.

    But for the tests that are marked as being about the compiler.
    """
    if "compiler" not in request.keywords:
        monkeypatch.setattr(
            "hypergrad.operators.compiled.program._compiled", lambda graph, inputs: graph
        )


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like MNIST's, with scikit-learn's digits: 1,200 to train on and 597 to test."""
    from gallery import write_digits  # only these tests wait for scikit-learn

    return write_digits(tmp_path_factory.mktemp("digits"))
