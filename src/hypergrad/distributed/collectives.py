"""θ and φ on their way to the ranks and back, as nodes of autograd.

Two linear maps, each the transpose of the other, so that they can be differentiated endlessly:

    spread:   θ  ↦  a copy of all of θ per rank            (no message; gathers what is sharded)
    collect:  one vector per rank  ↦  their sum            (one all-reduce; or one reduce-scatter)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad import _sharding as pl
from hypergrad.distributed.packed import Shards, summed
from hypergrad.distributed.ranks import Ranks


class Exchange:
    """How the leaves of one tree are spread and collected.

    Args:
        leaves: plain tensors, the same on all ranks; or ``DTensor`` objects.
        ranks: all that take part.

    Raises:
        ValueError: a leaf is sharded over other ranks.
    """

    def __init__(self, leaves: Sequence[Tensor], ranks: Ranks) -> None:
        self._ranks = ranks
        self._like = [leaf.detach() for leaf in leaves]
        self._sharded = [i for i, leaf in enumerate(leaves) if pl.is_distributed(leaf)]
        self._plain = [i for i, leaf in enumerate(leaves) if not pl.is_distributed(leaf)]
        self._shards = Shards([self._like[i] for i in self._sharded], ranks)

    def spread(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This rank's copy of all leaves."""
        found = list(tensors)
        _put(found, self._sharded, self._shards.gathered([found[i] for i in self._sharded]))
        return found

    def collect(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """The sums over the ranks, in the placements of the leaves; ``None`` counts as zero."""
        found = [
            torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if t is None else t
            for t, leaf in zip(tensors, self._like, strict=True)
        ]
        _put(found, self._plain, summed([found[i] for i in self._plain], self._ranks))
        _put(found, self._sharded, self._shards.scattered([found[i] for i in self._sharded]))
        return found


def _put(tensors: list[Tensor], places: Sequence[int], values: Sequence[Tensor]) -> None:
    for i, value in zip(places, values, strict=True):
        tensors[i] = value


def spread(exchange: Exchange, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    """The copy of this rank."""
    return _Spread.apply(exchange, *leaves)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(exchange: Exchange, *leaves: Tensor) -> tuple[Tensor, ...]:
        return _views(leaves, exchange.spread(leaves))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.exchange = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        return None, *_Collect.apply(ctx.exchange, *cotangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        # Plain leaves only: DTensors have neither a forward mode nor transforms.
        return _views(tangents[1:], tangents[1:])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], exchange: Exchange, *leaves: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        return _views(leaves, leaves), in_dims[1:]


def _views(given: Sequence[Any], found: Sequence[Any]) -> tuple[Any, ...]:
    """``found``, with a view for each input, since a function must not return its inputs."""
    return tuple(
        new.view_as(new) if new is not None and new is old else new
        for old, new in zip(given, found, strict=True)
    )


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(exchange: Exchange, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(exchange.collect(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.exchange, *tensors = inputs
        ctx.given = [tensor is not None for tensor in tensors]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        copies = _Spread.apply(ctx.exchange, *cotangents)
        grads = [copy if here else None for copy, here in zip(copies, ctx.given, strict=True)]
        return None, *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(ctx.exchange.collect(tangents[1:]))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], exchange: Exchange, *tensors: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        dims = in_dims[1:]
        given = [
            None if t is None else t if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, dims, strict=True)
        ]
        found = exchange.collect(given)
        return tuple(found), tuple(
            None if t is None or dim is None else 0 for t, dim in zip(given, dims, strict=True)
        )
