"""Where the elements of a tensor are: all on this rank, or sharded over the ranks of a device mesh.

A sharded tensor is a ``DTensor``. Each rank works on its own shards of a vector, in the placement
of the parameters. Only sums over all elements are communicated, by one all-reduce for all leaves.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from hypergrad._private import local_part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_distributed(value: Any) -> TypeGuard[DTensor]:
    """Whether ``value`` is a ``DTensor``."""
    # Not imported here: the import takes as long as that of all of hypergrad.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


PLAIN = {Tensor}
"""The types in a list of nothing but ordinary tensors."""


def any_distributed(values: Iterable[Any]) -> bool:
    """Whether one of ``values`` is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    # By the set of types, which is small: every operation on vectors asks this.
    kinds = set(map(type, values))
    return kinds != PLAIN and any(issubclass(kind, module.DTensor) for kind in kinds)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of ``tensor``, in the same memory; all of it if it is not sharded."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def parts(leaves: list[Tensor]) -> list[Tensor]:
    """:func:`local` of each leaf."""
    return [local(leaf) for leaf in leaves] if any_distributed(leaves) else leaves


def full(tensor: Tensor) -> Tensor:
    """All of ``tensor``, gathered if it is sharded; differentiable."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def elementwise(
    function: Callable[..., Sequence[Tensor]], leaves: list[Tensor], *others: list[Tensor]
) -> Sequence[Tensor]:
    """``function`` of lists of tensors, which works element by element, on this rank's parts."""
    if not any_distributed(leaves):
        return function(leaves, *others)
    found = function(parts(leaves), *map(parts, others))
    return [
        _wrapped(part, leaf, 0, 0) if is_distributed(leaf) else part
        for part, leaf in zip(found, leaves, strict=True)
    ]


def through(
    function: Callable[..., Tensor], leaf: Tensor, *others: Tensor, before: int = 0, after: int = 0
) -> Tensor:
    """``function`` on this rank's parts, which leaves the dimensions of the vector alone.

    ``leaf`` and ``others`` have ``before`` dimensions in front of those of the vector, 1 for a leaf
    of a block of vectors; the result has ``after``.
    """
    if not is_distributed(leaf):
        return function(leaf, *others)
    return _wrapped(function(local(leaf), *map(local, others)), leaf, before, after)


def contributions(parts: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return what to add up for a sum over all elements of some leaves.

    ``parts`` holds pairs of this rank's contribution and its leaf; all contributions have one
    shape. Those of leaves that are not sharded come back as they are. The sharded ones of each mesh
    become one more, the same on all ranks, by one all-reduce.
    """
    here: list[Tensor] = []
    sharded: list[tuple[Any, Tensor]] = []
    for part, leaf in parts:
        if not is_distributed(leaf):
            here.append(part)
            continue
        # The replicas of an element count as one.
        share = part / _replicas(leaf)
        for i, (mesh, total) in enumerate(sharded):
            if mesh == leaf.device_mesh:
                dtype = torch.promote_types(total.dtype, share.dtype)
                sharded[i] = mesh, total.to(dtype) + share.to(dtype)
                break
        else:
            sharded.append((leaf.device_mesh, share))
    return here + [_reduced(total, mesh, "sum") for mesh, total in sharded]


def greatest(value: Tensor, leaf: Tensor) -> Tensor:
    """The largest value over the ranks, for a leaf that is sharded."""
    return _reduced(value, leaf.device_mesh, "max") if is_distributed(leaf) else value


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, known in full on every rank, in the placement of ``like``; no messages."""
    if not is_distributed(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def replicated_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, the same on every rank, ready for arithmetic with ``like``; differentiable."""
    if not is_distributed(like) or is_distributed(value):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def placed_alike(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """Each tensor in the placement of its leaf; autograd leaves partial sums or other shards."""
    if not any_distributed(like):
        return list(tensors)
    return [
        tensor.redistribute(leaf.device_mesh, leaf.placements)
        if is_distributed(tensor) and is_distributed(leaf)
        else tensor
        for tensor, leaf in zip(tensors, like, strict=True)
    ]


def located(leaf: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Which row-major ``indices`` into a leaf lie in this rank's part, and their places there."""
    if not is_distributed(leaf):
        where = ((indices >= 0) & (indices < leaf.numel())).nonzero()[:, 0]
        return where, indices[where]
    shape, offset = local_part(leaf)
    inside = (indices >= 0) & (indices < leaf.numel())
    position, rest = torch.zeros_like(indices), indices
    strides = [math.prod(leaf.shape[i + 1 :]) for i in range(leaf.ndim)]
    for stride, size, first, own in zip(strides, leaf.shape, offset, shape, strict=True):
        coordinate = rest.div(stride, rounding_mode="floor") % max(size, 1) - first
        inside = inside & (coordinate >= 0) & (coordinate < own)
        position = position * own + coordinate
    where = inside.nonzero()[:, 0]
    return where, position[where]


def _wrapped(part: Tensor, leaf: Any, before: int, after: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((*part.shape[:after], *leaf.shape[before:]))
    placements = [
        Shard(p.dim + after - before) if isinstance(p, Shard) else p for p in leaf.placements
    ]
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return DTensor.from_local(
        part.contiguous(), leaf.device_mesh, placements,
        run_check=False, shape=shape, stride=tuple(stride),
    )  # fmt: skip


def _replicas(leaf: Any) -> int:
    mesh = leaf.device_mesh
    return math.prod(mesh.size(i) for i, p in enumerate(leaf.placements) if p.is_replicate())


def _reduced(part: Tensor, mesh: Any, operation: str) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial

    partial = [Partial(operation)] * mesh.ndim
    return DTensor.from_local(part, mesh, partial, run_check=False).full_tensor()
