"""A worker process for each peer, asked in turn: what drifts in the machine hits all alike."""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.environments import BY_NAME, ROOT, first_error, ready

Answer = dict[str, Any]
SECONDS = 120.0
"""That one request may take."""


class Worker:
    """One peer at work in its own environment."""

    def __init__(self, name: str, seconds: float = SECONDS, *, for_peaks: bool = False) -> None:
        self.name, self.seconds = name, seconds
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        environment = dict(os.environ)
        if for_peaks:
            # Blocks of 64 KiB and more are mapped one by one: a peak is then what is held, and not
            # the holes in glibc's heap. Not where seconds count: mapping doubles them.
            environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        self._process = subprocess.Popen(
            [str(BY_NAME[name].python), "-m", "peers.worker", name],
            cwd=ROOT, env=environment, text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.versions = self._receive()

    def ask(self, do: str, **request: Any) -> Answer:
        """Send a request and wait for its answer."""
        if self._process.poll() is not None:
            return {"failure": "the process has ended"}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _receive(self) -> Answer:
        try:
            line = self._lines.get(timeout=self.seconds)
        except queue.Empty:
            self._process.kill()
            return {"failure": f"no answer within {self.seconds:.0f} s"}
        if line:
            answer: Answer = json.loads(line)
            return answer
        self._process.wait()
        self._errors.seek(0)
        words = first_error(self._errors.read())
        return {"failure": f"the process ended with {self._process.returncode}: {words}"[:200]}


@dataclass(frozen=True)
class Task:
    """One piece of work for one peer.

    Attributes:
        peer: its name.
        kind: the function of the adapter.
        problem: the file.
        settings: of that function.
        label: what tells it from the same peer's others.
        apart: whether it has a process of its own, whose heap no other work has used.
        busy: seconds of the same work, untimed, before each repeat.
    """

    peer: str
    kind: str
    problem: str
    settings: dict[str, Any]
    label: str = ""
    apart: bool = False
    busy: float = 0.0

    @property
    def worker(self) -> str:
        """The process that does it."""
        return f"{self.peer} {self.label}" if self.apart else self.peer


@dataclass
class Measured:
    """What came of a task: a figure, or why there is none.

    Attributes:
        task: what it was.
        seconds: of each repeat.
        error: of the hypergradient, relative.
        mebibytes: the peak above the idle process.
        failure: why it has no figures, or what is wrong with them.
        missing: the peer has no such method; what it says of that.
        first: seconds of the run to warm up.
        extra: what else the adapter said at the last repeat.
    """

    task: Task
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    mebibytes: float | None = None
    failure: str | None = None
    missing: str | None = None
    first: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Of the seconds."""
        return statistics.median(self.seconds) if self.seconds and not self.failure else None

    def take(self, answer: Answer) -> bool:
        """Note an answer; whether it is one without a failure."""
        self.failure = answer.get("failure", self.failure)
        self.missing = answer.get("missing", self.missing)
        if self.failure and "traceback" in answer and os.environ.get("PEERS_DEBUG"):
            print(answer["traceback"], file=sys.stderr)
        return not (self.failure or self.missing is not None)


class Session:
    """The workers that were asked for, with what their environments are."""

    def __init__(self, names: Sequence[str], failures: dict[str, str] | None = None) -> None:
        self.names = tuple(names)
        self.failures: dict[str, str] = dict(failures or {})
        self.workers: dict[str, Worker] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="peers-"))
        for name in self.names:
            self._start(name)

    def _start(self, key: str) -> None:
        """Start a worker: ``key`` is the peer's name, or begins with it."""
        name = key.split()[0]
        if name in self.failures:
            return
        if not ready(BY_NAME[name]):
            self.failures[name] = "not installed"
            return
        worker = Worker(name)
        if "failure" in worker.versions:
            self.failures[name] = worker.versions["failure"]
            worker.close()
            return
        self.versions[name] = worker.versions
        self.workers[key] = worker

    def file(self, name: str, problem: Any) -> str:
        """Write a problem where the workers find it."""
        path = self.folder / f"{name}.pt"
        problem.save(path)
        return str(path)

    def measure(
        self, tasks: Sequence[Task], repeats: int, most: float = 1e9, *, warm_up: bool = True
    ) -> list[Measured]:
        """Open all tasks, run each once to warm up, then all in turn, ``repeats`` times.

        Args:
            tasks: what to do.
            repeats: rounds through all of them.
            most: seconds for the rounds; there is always one.
            warm_up: whether to.
        """
        results = [Measured(task) for task in tasks]
        at_work = [
            (str(number), measured)
            for number, measured in enumerate(results)
            if self._open(measured, str(number), warm_up)
        ]
        spent = 0.0
        for _ in range(repeats):
            if spent > most:
                break
            for key, measured in list(at_work):
                task = measured.task
                answer = self._ask(task.worker, "run", key=key, busy=task.busy)
                if not measured.take(answer):
                    at_work.remove((key, measured))
                    continue
                measured.seconds.append(answer.pop("seconds"))
                spent += measured.seconds[-1]
                measured.error = answer.pop("error", None)
                measured.extra = answer
        for number, measured in enumerate(results):
            key = measured.task.worker
            if key in self.workers and measured.task.apart:
                self.workers.pop(key).close()
            elif key in self.workers:
                self._ask(key, "close", key=str(number))
        return results

    def add_peaks(self, results: Sequence[Measured]) -> None:
        """The peak of each task that runs, each in a fresh process."""
        for measured in results:
            if measured.failure or measured.missing is not None:
                continue
            measured.mebibytes = self.peak(measured.task).get("mebibytes")

    def peak(self, task: Task) -> Answer:
        """The peak of the first run of a task in a fresh process."""
        worker = Worker(task.peer, for_peaks=True)
        try:
            answer = worker.ask(
                "open", key="0", kind=task.kind, problem=task.problem, settings=task.settings
            )
            if not {"failure", "missing"} & answer.keys():
                answer = worker.ask("peak", key="0")
        finally:
            worker.close()
        return answer

    def profile(self, task: Task) -> dict[str, float]:
        """How the time of one warm run is shared among operators; nothing where it fails."""
        self.measure([task], 1)
        measured = Measured(task)
        if not self._open(measured, "profile"):
            return {}
        answer = self._ask(task.worker, "profile", key="profile")
        self._ask(task.worker, "close", key="profile")
        return answer.get("shares", {})

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, measured: Measured, key: str, warm_up: bool = True) -> bool:
        task = measured.task
        if task.apart and task.worker not in self.workers:
            self._start(task.worker)
        answer = self._ask(
            task.worker, "open", key=key, kind=task.kind, problem=task.problem,
            settings=task.settings,
        )  # fmt: skip
        if measured.take(answer) and warm_up:
            answer = self._ask(task.worker, "run", key=key)
            measured.first = answer.get("seconds")
        return measured.take(answer)

    def _ask(self, worker: str, do: str, **request: Any) -> Answer:
        peer = worker.split()[0]
        if peer in self.failures:
            return {"failure": self.failures[peer]}
        answer = self.workers[worker].ask(do, **request)
        if "no answer within" in answer.get("failure", "") or "the process" in answer.get(
            "failure", ""
        ):
            # What it had open is lost, but not the workloads to come.
            self.workers.pop(worker).close()
            self._start(worker)
        return answer
