"""Many tensors in one message: a flat buffer for each dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from hypergrad import _sharding as pl
from hypergrad._private import as_batch, is_batch_of_cotangents, whole_batch
from hypergrad.distributed.ranks import Ranks


def summed(tensors: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """The sum of each tensor over the ranks, by one all-reduce per dtype."""
    found = list(tensors)
    for places in _by_dtype(tensors):
        flat = torch.cat([found[i].reshape(-1) for i in places])
        flat = _on_the_whole_batch(flat, lambda whole: dist.all_reduce(whole, group=ranks.group))
        for i, part in zip(places, flat.split([found[i].numel() for i in places]), strict=True):
            found[i] = part.reshape(found[i].shape)
    return found


class Shards:
    """Gathers sharded leaves, and scatters sums of whole ones, with one message for all leaves.

    It raises ``ValueError`` if one of the ``DTensor`` objects ``leaves`` is not spread over just
    these ``ranks``.
    """

    def __init__(self, leaves: Sequence[Any], ranks: Ranks) -> None:
        self._leaves = leaves
        self._ranks = ranks
        for leaf in leaves:
            if leaf.device_mesh.size() != ranks.size:
                raise ValueError(
                    f"params and hparams must be sharded over all {ranks.size} ranks of the group, "
                    f"got a DTensor on a mesh of {leaf.device_mesh.size()}"
                )
        # Replicas and meshes of several dimensions go leaf by leaf, by PyTorch's own functions.
        self._simple = all(_is_simple(leaf, ranks) for leaf in leaves)

    def gathered(self, tensors: Sequence[Any]) -> list[Tensor]:
        """All of each tensor, plain."""
        if not self._simple:
            return [tensor.full_tensor() for tensor in tensors]
        found: list[Tensor] = list(tensors)
        for places in _by_dtype(tensors):
            own = {i: pl.local(tensors[i]).detach() for i in places}
            flat = torch.cat([_padded(own[i], self._part_shape(i)).reshape(-1) for i in places])
            every = flat.new_empty(self._ranks.size * len(flat))
            _all_gather(every, flat, self._ranks)
            widths = [math.prod(self._part_shape(i)) for i in places]
            columns = every.view(self._ranks.size, -1).split(widths, dim=1)
            for i, rows in zip(places, columns, strict=True):
                dim, length = _dim(self._leaves[i]), self._leaves[i].shape
                parts = rows.reshape(-1, *self._part_shape(i)).unbind()
                found[i] = torch.cat(parts, dim=dim).narrow(dim, 0, length[dim]).contiguous()
        return found

    def scattered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each tensor over the ranks, sharded like its leaf."""
        if not self._simple:
            return [self._by_dtensor(*pair) for pair in zip(tensors, self._leaves, strict=True)]
        found = list(tensors)
        for places in _by_dtype(tensors):
            rows = torch.cat([self._parts(i, tensors[i]) for i in places], dim=1)
            own = rows.new_empty(rows.shape[1])
            _reduce_scatter(own, rows.reshape(-1), self._ranks)
            widths = [math.prod(self._part_shape(i)) for i in places]
            for i, part in zip(places, own.split(widths), strict=True):
                leaf, dim = self._leaves[i], _dim(self._leaves[i])
                length = pl.local(leaf).shape[dim]
                whole = part.reshape(self._part_shape(i))
                found[i] = pl.through(lambda _, t=whole, d=dim, n=length: t.narrow(d, 0, n), leaf)
        return found

    def _part_shape(self, i: int) -> list[int]:
        """The shape of the largest part of a leaf; the last ranks may have less, or nothing."""
        shape, dim = list(self._leaves[i].shape), _dim(self._leaves[i])
        shape[dim] = -(-shape[dim] // self._ranks.size)
        return shape

    def _parts(self, i: int, tensor: Tensor) -> Tensor:
        shape, dim = self._part_shape(i), _dim(self._leaves[i])
        every = list(self._leaves[i].shape)
        every[dim] = shape[dim] * self._ranks.size
        pieces = _padded(tensor.detach(), every).split(shape[dim], dim=dim)
        return torch.stack([piece.reshape(-1) for piece in pieces])

    def _by_dtensor(self, tensor: Tensor, leaf: Any) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        mesh = leaf.device_mesh
        partial = DTensor.from_local(tensor, mesh, [Partial()] * mesh.ndim, run_check=False)
        return partial.redistribute(mesh, leaf.placements)


def _is_simple(leaf: Any, ranks: Ranks) -> bool:
    from torch.distributed.tensor import Shard

    mesh = leaf.device_mesh
    if mesh.ndim != 1 or type(leaf.placements[0]) is not Shard:
        return False
    return dist.get_process_group_ranks(mesh.get_group()) == dist.get_process_group_ranks(
        ranks.group
    )


def _dim(leaf: Any) -> int:
    return leaf.placements[0].dim % leaf.ndim


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    missing = [wanted - size for size, wanted in zip(tensor.shape, shape, strict=True)]
    if not any(missing):
        return tensor
    return pad(tensor, [n for size in reversed(missing) for n in (0, size)])


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    places: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault(tensor.dtype, []).append(i)
    return list(places.values())


def _on_the_whole_batch(tensor: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    """``tensor`` after ``change``; of a batch of cotangents, ``change`` gets the whole batch.

    Autograd represents such a batch as a special tensor; messages must carry its batch dimension.
    """
    if not is_batch_of_cotangents(tensor):
        change(tensor)
        return tensor
    whole = whole_batch(tensor).contiguous()
    change(whole)
    return as_batch(whole)


def _all_gather(output: Tensor, given: Tensor, ranks: Ranks) -> None:
    # The names in PyTorch 2.13 and in earlier versions.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, given, group=ranks.group)


def _reduce_scatter(output: Tensor, given: Tensor, ranks: Ranks) -> None:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(output, given, group=ranks.group)
