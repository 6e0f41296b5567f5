"""The peak of memory of a piece of work, on Linux."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def can_be_measured() -> bool:
    """Whether the kernel counts peaks and starts them again."""
    return Path("/proc/self/clear_refs").exists()


def peak_mebibytes(work: Callable[[], object]) -> float:
    """The peak of resident memory while ``work`` runs, above what was resident before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
