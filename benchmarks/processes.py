"""What only a fresh process can show: the time of the import and the peak of memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks.memory import can_be_measured

_NYSTROM = """
import json, sys
import torch
import hypergrad as hg
from benchmarks.memory import peak_mebibytes
from benchmarks.workloads import mlp

rank, chunk_size, quick = json.loads(sys.argv[1])
work = mlp(quick)
theta = {key: value.clone().requires_grad_() for key, value in work.params.items()}
torch.autograd.grad(work.inner(theta, work.hparams), list(theta.values()))
generator = torch.Generator().manual_seed(0)
solver = hg.Nystrom(rank=rank, rho=0.1, chunk_size=chunk_size, generator=generator)
peak = peak_mebibytes(
    lambda: hg.hypergradient(work.inner, work.outer, work.params, work.hparams, method=solver)
)
size = sum(value.numel() for value in work.params.values()) * 4 / 2**20
print(json.dumps([peak, size]))
"""

_UNROLL = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from benchmarks.memory import peak_mebibytes
from benchmarks.unrolling import hypergradient, task

method, steps, quick = json.loads(sys.argv[1])
work = task(quick)
if method in ("higher", "torchopt"):
    __import__(method)
theta = {key: value.requires_grad_() for key, value in work.params().items()}
torch.autograd.grad(work.inner(theta, work.hparams), list(theta.values()))
print(json.dumps(peak_mebibytes(lambda: hypergradient(work, method, steps))))
"""


@dataclass(frozen=True)
class Memory:
    """Peak memory of a Nyström hypergradient, above that of the process before the call."""

    rank: int
    chunk_size: int | None
    mebibytes: float
    copies_of_the_parameters: float


def nystrom_memory(ranks: tuple[int, ...], chunk_size: int, quick: bool) -> list[Memory]:
    """The peak at each rank, with all columns at once and in chunks; empty where not on Linux."""
    if not can_be_measured():
        return []
    rows = []
    for rank in ranks:
        for chunk in (None, chunk_size):
            output = _python(_NYSTROM, json.dumps([rank, chunk, quick]))
            peak, size = json.loads(output)
            rows.append(Memory(rank, chunk, peak, peak / size))
    return rows


def unroll_memory(method: str, steps: int, quick: bool) -> float:
    """The peak, in MiB, of an unrolled hypergradient above the process after one gradient.

    Blocks of 64 KiB and more are mapped one by one, so that the peak is what the method holds and
    not the holes that it leaves in glibc's heap.
    """
    arguments = json.dumps([method, steps, quick])
    peak: float = json.loads(_python(_UNROLL, arguments, MALLOC_MMAP_THRESHOLD_="65536"))
    return peak


def import_ratio(repeats: int) -> tuple[float, float]:
    """Seconds of ``import torch``, and the ratio with ``import hypergrad`` after it."""
    programs = ("import torch", "import torch, hypergrad")
    seconds: dict[str, list[float]] = {program: [] for program in programs}
    for _ in range(repeats + 1):
        for program in programs:
            began = time.perf_counter()
            _python(program)
            seconds[program].append(time.perf_counter() - began)
    # The first round fills the page cache.
    alone, both = (statistics.median(seconds[program][1:]) for program in programs)
    return alone, both / alone


def _python(program: str, *arguments: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=True, capture_output=True, text=True, env={**os.environ, **environment},
    ).stdout  # fmt: skip
