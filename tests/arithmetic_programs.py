"""What the ranks run where the arithmetic of ``benchmarks/arithmetic.py`` is compared."""

from __future__ import annotations

import os
import socket
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import distributed_programs as programs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hypergrad as hg
from benchmarks.memory import peak_mebibytes
from hypergrad import tree as tr
from hypergrad.distributed import DataParallel, WholeModule

Objective = Callable[[Any, Any], Tensor]

# Halves and thirds of its rows are whole: nothing is padded.
LAYERS, WIDTH = 4, 240
LARGE = 768  # for peaks: a vector is 9 MiB

_PLACEMENTS = {"replicated": "replicated", "sharded": "sharded-params"}
_RECEIVED = 128  # where tcpi_bytes_received is in Linux's struct tcp_info


def can_be_counted() -> bool:
    """Whether the kernel tells the bytes of a connection."""
    with socket.socket() as unconnected:
        try:
            info = unconnected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except (AttributeError, OSError):
            return False
    return len(info) >= _RECEIVED + 8


def received() -> int:
    """All bytes that came to this process over the connections that it has."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{descriptor}"
        if not (os.path.exists(path) or os.path.islink(path)):
            continue  # the one that listed them
        if not os.readlink(path).startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(int(descriptor))) as connection:
            internet = connection.family in (socket.AF_INET, socket.AF_INET6)
            if internet and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, _RECEIVED)[0]
    return total


def _module(width: int, device: str = "cpu") -> nn.Sequential:
    return nn.Sequential(
        *(m for _ in range(LAYERS) for m in (nn.Linear(width, width, device=device), nn.Tanh()))
    )


def problem(placement: str, width: int) -> tuple[Objective, Any, Tensor, Any]:
    """f, θ, φ and the mode of products, on one row."""
    module, x, hparams = _module(width), torch.randn(1, width), torch.tensor(0.1)
    if placement == "layer by layer":
        from torch.distributed.fsdp import fully_shard

        mesh = programs._mesh()
        for layer in module:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        whole = WholeModule(module, lambda module, h: h * module(x).square().sum())
        return whole, dict(whole.params), hparams, "finite-difference"
    params = {key: p.detach() for key, p in module.named_parameters()}
    shape = _module(width, "meta")  # so that the objective keeps no parameters

    def f(params: Any, hparams: Tensor) -> Tensor:
        return hparams * functional_call(shape, params, (x,)).square().sum()

    place, _ = programs.PLACEMENTS[_PLACEMENTS[placement]]
    return DataParallel(f), place(params), hparams, "reverse"


class Collectives(TorchDispatchMode):
    """Counts the collectives of more than one element, as elements of the longer side."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = {"allgather": "all_gather", "reduce_scatter": "reduce_scatter",
                 "allreduce": "all_reduce"}  # fmt: skip
        if func.namespace == "c10d":
            (name,) = (long for short, long in names.items() if func.__name__.startswith(
                (short, f"_{short}")))  # fmt: skip
            size = max(t.numel() for t in tree_leaves(args) if isinstance(t, Tensor))
            if size > 1:
                self.elements[name] += size
        return func(*args, **(kwargs or {}))


def product(placement: str) -> tuple[int, int, dict[str, int]]:
    """n, the bytes that a product brings to this rank, and the elements in its collectives."""
    f, params, hparams, mode = problem(placement, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hg.HypergradWarning)
        operator = hg.operators.hessian(f, params, hparams, mode=mode)
        vector = tr.scale(tr.detach(params), 0.1)
        operator.matvec(vector)
        dist.barrier()
        before = received()
        operator.matvec(vector)
        dist.barrier()
        after = received()
        with Collectives() as counted:
            operator.matvec(vector)
    return tr.size(params), after - before, dict(counted.elements)


def inner_product(placement: str) -> list[tuple[str, int]]:
    _, params, _, _ = problem(placement, WIDTH)
    with programs.Messages() as noted:
        tr.dot(params, params)
    return noted.seen


def hypergradient(placement: str) -> tuple[int, int, list[tuple[str, int]]]:
    """n, the products of CG, and what the whole hypergradient sent."""
    learning = programs.mlp()
    f, g = learning.shared()
    place, _ = programs.PLACEMENTS[_PLACEMENTS[placement]]
    params = place(learning.params)
    with programs.Messages() as noted:
        result = hg.hypergradient(
            f,
            g,
            params,
            learning.hparams,
            method=hg.Implicit(hg.CG(rtol=1e-8), damping=0.5),
            verify="never",
        )
    return tr.size(params), result.solve.matvecs, noted.seen


def peak(placement: str) -> tuple[int, float]:
    """n, and the peak of a hypergradient by CG above what it was given, in bytes."""
    f, params, hparams, mode = problem(placement, LARGE)

    def g(params: Any, hparams: Tensor) -> Tensor:
        return sum(leaf.square().sum() for leaf in params.values())

    def run() -> None:
        hg.hypergradient(
            f,
            DataParallel(g),
            params,
            hparams,
            method=hg.Implicit(hg.CG(rtol=0.0, maxiter=3), damping=1.0, mode=mode),
            on_failure="ignore",
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hg.HypergradWarning)
        run()  # loads what is loaded at the first use
        return tr.size(params), peak_mebibytes(run) * 2**20
