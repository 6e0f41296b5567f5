"""A rank is killed in the middle of a run, and ``torchrun`` starts all of them again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import distributed_programs as programs
import pytest
import restarted
import torch

from hypergrad import tree as tr

DEADLINE = 900.0
"""Seconds: some ten times what it takes on a busy machine."""


@pytest.mark.skipif(os.name != "posix", reason="torchrun and SIGKILL")
def test_a_run_with_a_killed_rank_ends_as_one_without(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", "1", restarted.__file__, str(tmp_path),
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            status = launcher.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if launcher.poll() is None:
                _kill_all(launcher.pid)
                launcher.wait()
    assert status == 0, log.read_text(errors="replace")
    assert "exitcode: -9" in log.read_text(errors="replace")
    found = torch.load(tmp_path / "end.pt", weights_only=True)
    # A rank is killed before all save that step.
    assert found["resumed"] == restarted.KILLED_AT - 1
    params, hparams, _ = programs.loop_alone("cg", restarted.OUTER_STEPS)
    assert _difference(found["params"], params) < 1e-10
    assert _difference(found["hparams"], hparams) < 1e-10


def _difference(found: object, expected: object) -> float:
    return tr.norm(tr.subtract(found, expected)) / tr.norm(expected)


def _kill_all(leader: int) -> None:
    """Kill the launcher and its ranks, each of which torchrun has put into a session of its own."""
    for process in _descendants(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _descendants(leader: int) -> list[int]:
    found, parents = [leader], _parents()
    for process in found:
        found.extend(child for child, parent in parents.items() if parent == process)
    return found


def _parents() -> dict[int, int]:
    """The parent of each process, where the system tells."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    return parents
