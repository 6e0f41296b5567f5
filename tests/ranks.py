"""Functions run on ranks of ``torch.distributed``, over gloo and this machine's loopback.

Importing PyTorch takes seconds, so the ranks are forked from a server that has done it and computed
nothing: a process that :class:`Ranks` starts at its first use and that runs this file as a program.
Every rank has one thread, logs to a file of its own and is killed at a deadline, so that ranks that
wait for each other fail a test and do not stop it.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

DEADLINE = 900.0
"""Seconds until whatever still runs is killed."""

_HOURS = datetime.timedelta(hours=2)  # gloo's own patience: never what ends a test


@dataclass(frozen=True)
class Outcome:
    """How a rank ended.

    Attributes:
        value: what the function returned; ``None`` if it did not.
        error: the type and the message of what it raised, if anything.
        status: the exit status of the process; negative for the signal that killed it.
        log: what it wrote, and where it was at the deadline.
    """

    value: Any
    error: tuple[str, str] | None
    status: int
    log: str


class Ranks:
    """The ranks that this process may start."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None

    def outcomes(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Outcome]:
        """How each of ``size`` ranks ended that ran ``function(*arguments)``.

        The function is one of a module, and what it returns can be pickled.
        """
        if self._server is None:
            command = [sys.executable, __file__, function.__module__]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with tempfile.TemporaryDirectory() as folder:
            _send(self._server.stdin, (size, function, arguments, folder))
            statuses = _received(self._server.stdout)
            return [_outcome(Path(folder, str(i)), status) for i, status in enumerate(statuses)]

    def __call__(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` returned on each rank; it must have on all of them."""
        outcomes = self.outcomes(size, function, *arguments)
        failed = {i: o for i, o in enumerate(outcomes) if o.status or o.error}
        assert not failed, "".join(f"\nrank {i}: {o.error}\n{o.log}" for i, o in failed.items())
        return [outcome.value for outcome in outcomes]

    def errors(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` raised on each rank, ``None`` where it returned."""
        outcomes = self.outcomes(size, function, *arguments)
        failed = {i: o for i, o in enumerate(outcomes) if o.status}
        assert not failed, "".join(f"\nrank {i}: {o.status}\n{o.log}" for i, o in failed.items())
        return [outcome.error for outcome in outcomes]

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait()
            self._server.stdout.close()


def _outcome(stem: Path, status: int) -> Outcome:
    result, log = stem.with_suffix(".result"), stem.with_suffix(".log")
    value, error = pickle.loads(result.read_bytes()) if result.exists() else (None, None)
    return Outcome(value, error, status, log.read_text(errors="replace"))


def _send(pipe: BinaryIO, value: Any) -> None:
    pipe.write(pickle.dumps(value))
    pipe.flush()


def _received(pipe: BinaryIO) -> Any:
    return pickle.load(pipe)


def serve() -> None:
    """Start ranks as asked on standard input, and tell their exit statuses on standard output."""
    import torch

    torch.set_num_threads(1)  # before anything is computed: threads are not there after a fork
    import torch._dynamo  # which DTensors import at their first use
    import torch.distributed.fsdp
    import torch.distributed.tensor

    __import__(sys.argv[1])
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    answers = os.fdopen(os.dup(1), "wb")
    while True:
        try:
            size, function, arguments, folder = _received(sys.stdin.buffer)
        except EOFError:
            return
        _send(answers, _run(size, function, arguments, Path(folder)))


def _run(size: int, function: Any, arguments: Any, folder: Path) -> list[int]:
    children = [_forked(i, size, function, arguments, folder) for i in range(size)]
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + DEADLINE
    while len(statuses) < size:
        for child in children:
            if child in statuses:
                continue
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                statuses[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[child] for child in children]


def _forked(rank: int, size: int, function: Any, arguments: Any, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for ours, theirs in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(ours, theirs)
        faulthandler.dump_traceback_later(DEADLINE - 2, file=os.fdopen(os.dup(log), "w"))
        result = _result(rank, size, function, arguments, folder)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _result(rank: int, size: int, function: Any, arguments: Any, folder: Path) -> Any:
    import torch
    import torch.distributed as dist

    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=_HOURS
    )
    try:
        return function(*arguments), None
    except Exception as error:
        traceback.print_exc()
        return None, (type(error).__name__, str(error))


if __name__ == "__main__":
    serve()
