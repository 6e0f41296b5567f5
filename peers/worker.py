"""The process in which one peer works: requests come as lines of JSON, and answers go out likewise.

    {"do": "open", "key": k, "kind": "implicit", "problem": path, "settings": {…}}
    {"do": "run", "key": k}           → {"seconds": …, "error": …}
    {"do": "peak", "key": k}          → {"mebibytes": …}
    {"do": "profile", "key": k}       → {"shares": {operator: share of the time, …}}
    {"do": "close", "key": k}

An answer with ``failure`` says what went wrong in one line; with ``missing``, that the peer has no
such method. ``python -m peers.worker NAME`` in the environment of the peer NAME.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TextIO

import torch

from benchmarks.memory import can_be_measured, peak_mebibytes
from peers import cleaning, problems
from peers.adapters import NoSuchMethod

Answer = dict[str, Any]
SHORT = 0.2
"""Seconds: what takes less is done once untimed, right before."""
PROFILED = 5
"""Operators that a profile names."""
LOADERS: dict[str, Callable[[str], Any]] = {"cleaning": cleaning.load}
"""By the kind of work, where it is no problem at one θ."""


class Bench:
    """What one peer has open: by its key, a problem and a function that works on it."""

    def __init__(self, name: str) -> None:
        self.adapter = importlib.import_module(f"peers.adapters.{name}")
        self.open_work: dict[str, tuple[Any, Callable[[], Any]]] = {}
        self.last_seconds: dict[str, float] = {}

    def answer(self, request: dict[str, Any]) -> Answer:
        """Do what is asked; a failure is an answer too."""
        try:
            action: Callable[..., Answer] = getattr(self, f"do_{request.pop('do')}")
            return action(**request)
        except NoSuchMethod as error:
            return {"missing": str(error) or "no such method"}
        except Exception as error:  # whatever a peer raises goes into the tables
            return {"failure": one_line(error), "traceback": traceback.format_exc()}

    def do_open(self, key: str, kind: str, problem: str, settings: dict[str, Any]) -> Answer:
        """Prepare a piece of work: what a user does once is not timed."""
        prepare = getattr(self.adapter, kind, None)
        if prepare is None:
            raise NoSuchMethod
        given = LOADERS.get(kind, problems.load)(problem)
        self.last_seconds.pop(key, None)
        self.open_work[key] = given, prepare(given, **settings)
        return {}

    def do_run(self, key: str, busy: float = 0.0) -> Answer:
        """Time it once, and say how wrong the answer is.

        Args:
            key: what.
            busy: seconds of the same work right before, unless once takes as long: for a while a
                machine that has rested is faster.
        """
        problem, work = self.open_work[key]
        gc.collect()
        # Collecting, and the peers before, have emptied the caches, which a loop finds full.
        least = max(busy, SHORT)
        if self.last_seconds.get(key, least) < least:
            began = time.perf_counter()
            work()
            while time.perf_counter() - began < busy:
                work()
        began = time.perf_counter()
        result = work()
        seconds = self.last_seconds[key] = time.perf_counter() - began
        if isinstance(result, dict):
            return {"seconds": seconds, **result}
        answer: Answer = {"seconds": seconds, "error": problem.error(result)}
        if not bool(torch.isfinite(result).all()):
            answer["failure"] = "the hypergradient is not finite"
        return answer

    def do_peak(self, key: str) -> Answer:
        """The peak of memory of one run above what was resident before it."""
        if not can_be_measured():
            return {"failure": "not measured: it takes Linux's /proc"}
        return {"mebibytes": peak_mebibytes(self.open_work[key][1])}

    def do_profile(self, key: str) -> Answer:
        """How the CPU time of one run is shared: by operators of PyTorch, and by all else."""
        work = self.open_work[key][1]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            began = time.perf_counter()
            work()
            seconds = time.perf_counter() - began
        spent = {
            event.key: event.self_cpu_time_total / 1e6
            for event in profile.key_averages()
            if event.key.startswith("aten::")
        }
        largest = sorted(spent.items(), key=lambda item: -item[1])[:PROFILED]
        shares = {name: part / seconds for name, part in largest}
        shares["all operators"] = sum(spent.values()) / seconds
        return {"shares": shares}

    def do_close(self, key: str) -> Answer:
        """Forget it."""
        self.open_work.pop(key, None)
        gc.collect()
        return {}

    def do_versions(self) -> Answer:
        """Of Python, PyTorch and the peer."""
        return {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "peer": importlib.metadata.version(self.adapter.DISTRIBUTION),
            "threads": torch.get_num_threads(),
        }


def one_line(error: BaseException) -> str:
    """The kind of the error, and the first line of what it says."""
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0]}".rstrip(": ")[:200]


def main(name: str) -> None:
    """Answer requests until there are no more."""
    # What a library prints must not get between the answers.
    out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)

    def say(answer: Answer) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    try:
        bench = Bench(name)
    except Exception as error:
        say({"failure": one_line(error), "traceback": traceback.format_exc()})
        return
    say(bench.answer({"do": "versions"}))
    for line in sys.stdin:
        say(bench.answer(json.loads(line)))


if __name__ == "__main__":
    main(sys.argv[1])
