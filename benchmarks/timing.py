"""Median times of pieces of work run in turn, so that a drifting machine hits all alike."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


def median_seconds(work: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each piece of work, over ``repeats`` rounds through all of them."""
    for run in work.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """For work so small that threads would mostly wait for each other, or for other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def machine() -> str:
    """What the figures were measured on, and when."""
    return (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"{datetime.datetime.now(datetime.timezone.utc).date()}"
    )
