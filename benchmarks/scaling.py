"""Scaling of one hypergradient over processes of one thread on this machine.

``python -m benchmarks.scaling`` prints weak and strong scaling of a hypergradient by CG, and what
the messages of a product cost beside the product; ``--write`` keeps the figures in
``benchmarks/results/scaling.json`` and puts the tables into ``docs/arithmetic.md``. All that is
sent goes over the loopback, by gloo.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

import hypergrad as hg
from benchmarks.arithmetic import bytes_per_product, flops_per_product, rows_at_which_it_pays
from benchmarks.blocks import ROOT, fill, table
from hypergrad import tree as tr
from hypergrad.distributed import DataParallel

COMMAND = "python -m benchmarks.scaling"
PAGE = ROOT / "docs" / "arithmetic.md"
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
RANKS = (1, 2, 4)
ITERATIONS = 5
ROWS = 1024  # of all ranks together in strong scaling, of each in weak scaling
SIZES, QUICK_SIZES = (784, 512, 512, 10), (20, 16, 4)

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """Medians of one way to share the work, the slowest rank's; seconds.

    Attributes:
        scaling: ``"strong"``, the rows of all ranks together stay; ``"weak"``, those of each do.
        placement: of the parameters: ``"alone"`` without a process group, or as in
            :mod:`benchmarks.arithmetic`.
        ranks: processes.
        rows: of each of them.
        hypergradient: all of it.
        product: one with the Hessian.
        messages: those of a product by themselves, all ranks being ready for them.
    """

    scaling: str
    placement: str
    ranks: int
    rows: int
    hypergradient: float
    product: float
    messages: float


def params(sizes: Sequence[int]) -> Params:
    """Of a dense network, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"W{k}": torch.randn(a, b, generator=generator) * a**-0.5
        for k, (a, b) in enumerate(pairwise(sizes))
    }


def objective(sizes: Sequence[int], rows: int, seed: int) -> Callable[[Params, Tensor], Tensor]:
    """Cross-entropy on rows of noise, and ½ Σ_k exp(φ_k) ‖θ_k‖²."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, sizes[0], generator=generator)
    labels = torch.randint(sizes[-1], (rows,), generator=generator)

    def f(params: Params, decays: Tensor) -> Tensor:
        *hidden, last = params.values()
        h = x
        for W in hidden:
            h = torch.tanh(h @ W)
        squares = torch.stack([W.square().sum() for W in params.values()])
        return F.cross_entropy(h @ last, labels) + 0.5 * (decays.exp() * squares).sum()

    return f


def measure_rank(placement: str, sizes: Sequence[int], rows: int, repeats: int) -> dict[str, float]:
    """The medians of one rank."""
    rank, ranks = (0, 1) if placement == "alone" else (dist.get_rank(), dist.get_world_size())
    f, g = (objective(sizes, rows, 2 * rank + k) for k in range(2))
    theta, phi = params(sizes), torch.full((len(sizes) - 1,), -4.0)
    if placement == "sharded":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (ranks,))
        theta = {key: distribute_tensor(W, mesh, [Shard(0)]) for key, W in theta.items()}
    inner, outer = (f, g) if placement == "alone" else (DataParallel(f), DataParallel(g))
    operator = hg.operators.hessian(inner, theta, phi)
    n = tr.size(theta)
    whole, part = torch.ones(n), torch.ones(-(-n // ranks))
    padded = torch.ones(ranks * len(part))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def messages() -> None:
        if placement == "replicated":
            dist.all_reduce(whole)
        elif placement == "sharded":
            gather(padded, part)
            scatter(part, padded)

    work: dict[str, Callable[[], object]] = {
        "hypergradient": lambda: hg.hypergradient(
            inner,
            outer,
            theta,
            phi,
            method=hg.Implicit(hg.CG(rtol=0.0, maxiter=ITERATIONS), damping=1.0),
            on_failure="ignore",
        ),
        "product": lambda: operator.matvec(theta),
        "messages": messages,
    }  # fmt: skip
    return {name: _median(run, repeats, placement != "alone") for name, run in work.items()}


def _median(run: Callable[[], object], repeats: int, together: bool) -> float:
    seconds = []
    for _ in range(repeats + 1):
        if together:
            dist.barrier()
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _rank(rank: int, ranks: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments[0] != "alone":
        if "lo" in [name for _, name in socket.if_nameindex()]:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    found = measure_rank(*arguments)
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    if arguments[0] != "alone":
        dist.barrier()
        os._exit(0)  # a thread of gloo's that still runs aborts an ordinary end


def measure(scaling: str, placement: str, ranks: int, rows: int, quick: bool) -> Row:
    """One row of a table, from fresh processes."""
    sizes, repeats = (QUICK_SIZES, 2) if quick else (SIZES, 5)
    with tempfile.TemporaryDirectory() as folder:
        arguments = placement, sizes, rows, repeats
        spawn(_rank, (ranks, folder, arguments), nprocs=ranks)
        every = [
            json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8"))
            for rank in range(ranks)
        ]
    return Row(scaling, placement, ranks, rows, **{k: max(e[k] for e in every) for k in every[0]})


def measured(quick: bool = False) -> dict[str, Any]:
    """Alone, then strong and weak scaling of both placements, and where that was.

    Args:
        quick: a small network, few repeats.
    """
    counts, rows, sizes = ((2,), 32, QUICK_SIZES) if quick else (RANKS, ROWS, SIZES)
    found = [measure("strong", "alone", 1, rows, quick)]
    for scaling in ("strong", "weak"):
        for placement in ("replicated", "sharded"):
            for ranks in counts:
                own = rows // ranks if scaling == "strong" else rows
                found.append(measure(scaling, placement, ranks, own, quick))
    return record(found, sizes)


def record(rows: list[Row], sizes: Sequence[int]) -> dict[str, Any]:
    """What is kept of a run."""
    return {
        "command": COMMAND,
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version(),
                     "hypergrad": hg.__version__},
        "network": "-".join(map(str, sizes)),
        "parameters": sum(a * b for a, b in pairwise(sizes)),
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip


def tables(kept: dict[str, Any]) -> str:
    """The page's tables, and where they come from."""
    alone, *rows = (Row(**row) for row in kept["rows"])
    versions = kept["versions"]
    sizes = [int(size) for size in kept["network"].split("-")]
    flops = flops_per_product(sizes, alone.rows) / alone.product
    lines = [
        f"A network {kept['network']} of {kept['parameters']:,} parameters, {ITERATIONS} "
        f"iterations of CG. Alone, without a process\ngroup and on {alone.rows:,} rows, a "
        f"hypergradient takes {1e3 * alone.hypergradient:.0f} ms and a product "
        f"{1e3 * alone.product:.1f} ms: F = {flops / 1e12:.2f} Tflop/s.\n"
    ]
    pairs = [row for row in rows if (row.placement, row.ranks) == ("replicated", 2)]
    if pairs:
        sent = bytes_per_product(kept["parameters"], 2)
        widths = sorted(sent / row.messages for row in pairs)
        most, least = (rows_at_which_it_pays(flops, width) for width in (widths[0], widths[-1]))
        lines.append(
            f"Two ranks sum a vector at B = {widths[0] / 1e9:.1f} to {widths[-1] / 1e9:.1f} GB/s: "
            f"by the formula it pays from {least:.0f} to {most:.0f} rows on.\n"
        )
    for scaling in ("strong", "weak"):
        of_it = [row for row in rows if row.scaling == scaling]
        lines.append(f"{scaling.capitalize()} scaling:\n\n{_table(of_it, alone, kept['cores'])}\n")
    lines.append(
        f"`{kept['command']}` printed this on {kept['date']}: {kept['cores']} cores, a thread a "
        f"rank, {kept['machine']},\ngloo over the loopback, torch {versions['torch']}, Python "
        f"{versions['python']}, hypergrad {versions['hypergrad']}. Medians of the\nslowest rank."
    )
    return "\n".join(lines)


def _table(rows: list[Row], alone: Row, cores: int) -> str:
    body = []
    for row in rows:
        share = row.ranks if row.scaling == "strong" else 1
        computing = row.product - row.messages
        body.append([
            row.placement, str(row.ranks), f"{row.rows:,}", f"{1e3 * row.hypergradient:.0f}",
            f"{alone.hypergradient / (share * row.hypergradient):.0%}",
            f"{min(1.0, cores / row.ranks):.0%}",
            f"{1e3 * row.product:.1f}", f"{1e3 * row.messages:.1f}",
            f"{min(row.messages, max(computing, 0.0)) / row.product:.0%}",
        ])  # fmt: skip
    heads = ["parameters", "ranks", "rows a rank", "hypergradient, ms", "efficiency",
             "at most, on these cores", "product, ms", "its messages alone, ms",
             "overlap saves at most"]  # fmt: skip
    return table(heads, body)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and keep it if asked to."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small network, two ranks")
    parser.add_argument("--write", action="store_true", help="keep the figures and fill the page")
    parser.add_argument("--kept", action="store_true", help="measure nothing, take those kept")
    options = parser.parse_args(argv)
    if options.quick and options.write:
        parser.error("--write keeps whole runs only, got --quick as well")
    if options.kept:
        kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    else:
        kept = measured(options.quick)
    print(tables(kept))
    if options.write:
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        fill(PAGE, COMMAND, tables(kept))


if __name__ == "__main__":
    main()
