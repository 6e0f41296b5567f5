"""Kill a loop at random moments, resume it each time, and compare its end with an unharmed one.

Run as a program: ``python killed.py implicit FOLDER --kills=20``. The processes that are killed are
forked from this one, which has imported everything and trained nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

# Before anything is computed: the threads of a parent are not there after a fork.
torch.set_num_threads(1)

from loops import digits_solver  # noqa: E402

import hypergrad as hg  # noqa: E402
from hypergrad import bilevel as bl  # noqa: E402

METHODS: dict[str, Any] = {
    "implicit": lambda: hg.Implicit(
        hg.CG(rtol=1e-2, maxiter=5, preconditioner=hg.NystromPreconditioner(rank=4)),
        damping=1.0,
    ),
    "unrolled": hg.Unrolled,
    "soba": hg.single_loop.SOBA,
    "saba": hg.single_loop.SABA,
    "iterable": bl.T1T2,
    "persistent": bl.T1T2,
}
SINGLE = ("soba", "saba")
OUTER_STEPS = 30


def run(method: str, folder: Path, result: Path) -> None:
    """Resume if there is something to resume, run to the end, leave the result."""
    solver = digits_solver(
        METHODS[method](),
        workers=2,
        inner_steps=1 if method in SINGLE else 2,
        outer_steps=OUTER_STEPS,
        on_failure="ignore",
        callbacks=[bl.Checkpoint(folder), bl.JSONL(folder / "log.jsonl")],
        **loaders(method),
    )
    solver.resume(folder)
    solver.run()
    buffers = [buffer for module in solver.modules for buffer in module.buffers()]
    state = {"params": solver.params, "hparams": solver.hparams, "buffers": buffers}
    unfinished = result.with_suffix(".unfinished")
    torch.save({**state, "losses": solver.history["outer_loss"]}, unfinished)
    unfinished.replace(result)


class Rows(IterableDataset[Any]):
    """Rows of digits in order, each worker its own."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for i in range(first, 200, step):
            generator = torch.Generator().manual_seed(i)
            yield torch.rand(64, generator=generator), i % 10


def loaders(method: str) -> dict[str, Any]:
    """What the methods named after a kind of loader train on; others have workers that shuffle."""
    if method == "saba":
        generator = torch.Generator().manual_seed(0)
        rows = [(torch.rand(20, 64, generator=generator), torch.arange(20) % 10) for _ in range(5)]
        return {"inner_loader": rows[:3], "outer_loader": rows[3:]}
    if method == "iterable":
        return {"inner_loader": DataLoader(Rows(), 32, num_workers=2)}
    if method == "persistent":
        rows = TensorDataset(
            torch.rand(200, 64, generator=torch.Generator()), torch.arange(200) % 10
        )
        options: dict[str, Any] = {"num_workers": 2, "persistent_workers": True}
        return {"inner_loader": DataLoader(rows, 32, shuffle=True, **options)}
    return {}


def forked(method: str, folder: Path, result: Path) -> int:
    """The process that runs, with its workers in a group of its own."""
    child = os.fork()
    if child == 0:
        os.setsid()
        # Not the pipes of whoever reads from this program: workers may outlive their parent.
        log = os.open(f"{result}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            run(method, folder, result)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def ended(child: int) -> int:
    """Wait for the process; its status.

    Workers of a process that is killed while it starts them wait for ever, since they take whoever
    adopts them for their parent (``torch.utils.data._utils.worker.ManagerWatchdog``).
    """
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return status


def survive(method: str, folder: Path, kills: int) -> int:
    """Run once unharmed and once with kills; how many there were."""
    began = time.perf_counter()
    result = folder / "whole.pt"
    check(ended(forked(method, folder / "whole", result)), result)
    duration = time.perf_counter() - began
    chance, killed, result = random.Random(0), 0, folder / "killed.pt"
    while killed < kills or not result.exists():
        if result.exists():
            # It ended before its kills were spent: once more from the beginning.
            result.unlink()
            for old in (folder / "killed").iterdir():
                old.unlink()
        child = forked(method, folder / "killed", result)
        if killed < kills:
            deadline = time.perf_counter() + chance.uniform(0.0, duration / 5)
            while time.perf_counter() < deadline:
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
        status = ended(child)
        if os.WIFSIGNALED(status):
            killed += 1
        else:
            check(status, result)
    return killed


def check(status: int, result: Path) -> None:
    """End with what the process had to say if it failed."""
    if status:
        log = Path(f"{result}.log").read_text(encoding="utf-8")
        raise SystemExit(f"the loop failed with status {status}:\n{log}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    # The first optimiser of a process imports for a second; its children are spared that.
    torch.optim.SGD([torch.zeros(1)], lr=0.1)
    kills = survive(options.method, options.folder, options.kills)
    whole, killed = (
        torch.load(options.folder / f"{name}.pt", weights_only=True) for name in ("whole", "killed")
    )
    for key, expected in whole.items():
        got = killed[key]
        pairs = zip(leaves(expected), leaves(got), strict=True)
        if not all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs):
            raise SystemExit(f"{key} differs")
    rows = (options.folder / "killed" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    if len(rows) != OUTER_STEPS:
        raise SystemExit(f"the log has {len(rows)} rows, not {OUTER_STEPS}")
    print(f"{options.method}: {kills} kills, the same bits in {', '.join(whole)}")


def leaves(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value)


if __name__ == "__main__":
    main()
