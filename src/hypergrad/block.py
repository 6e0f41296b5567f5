"""Blocks: k vectors at once, as one tree whose leaves carry a leading dimension k.

The *coordinates* of a vector are numbered 0 … n−1 through the leaves in order, row-major in each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from hypergrad import _sharding as pl
from hypergrad import tree as tr
from hypergrad.tree import Tree


def width(block: Tree) -> int:
    """The number k of vectors in ``block``."""
    return int(tr.leaves(block)[0].shape[0])


def stack(vectors: Sequence[Tree]) -> Tree:
    """The block of the given vectors."""
    return tr.map_leaves(
        lambda *rows: pl.through(lambda *parts: torch.stack(parts), *rows, after=1), *vectors
    )


def unstack(block: Tree) -> list[Tree]:
    """The vectors of ``block``."""
    return [pick(block, i) for i in range(width(block))]


def pick(block: Tree, i: int) -> Tree:
    """Vector ``i`` of ``block``."""
    return tr.map_leaves(lambda leaf: pl.through(lambda part: part[i], leaf, before=1), block)


def single(vector: Tree) -> Tree:
    """The block of one vector."""
    return tr.map_leaves(
        lambda leaf: pl.through(lambda part: part.unsqueeze(0), leaf, after=1), vector
    )


def piece(block: Tree, start: int, stop: int) -> Tree:
    """Vectors ``start`` to ``stop`` as a block."""
    return tr.map_leaves(
        lambda leaf: pl.through(lambda part: part[start:stop], leaf, before=1, after=1), block
    )


def chunks(block: Tree, chunk_size: int) -> Iterator[Tree]:
    """``block`` in consecutive pieces of at most ``chunk_size`` vectors."""
    for start in range(0, width(block), chunk_size):
        yield piece(block, start, start + chunk_size)


def assemble(parts: Iterable[Tree], total: int) -> Tree:
    """Join consecutive pieces of a block of ``total`` vectors; a piece is free once copied."""
    whole: Tree = None
    start = 0
    for part in parts:
        if width(part) == total:
            return part
        if whole is None:
            whole = tr.map_leaves(partial(_empty, total), part)
        for leaf, own in zip(tr.leaves(whole), tr.leaves(part), strict=True):
            pl.local(leaf)[start : start + len(own)] = pl.local(own)
        start += width(part)
    return whole


def unit_vectors(like: Tree, indices: Tensor) -> Tree:
    """The block of unit vectors ``e_i`` for the coordinates ``indices``, shape ``(k,)``."""
    block = []
    for leaf, (where, local) in zip(tr.leaves(like), _locate(like, indices), strict=True):

        def ones(own: Tensor, where: Tensor = where, local: Tensor = local) -> Tensor:
            part = own.new_zeros((len(indices), own.numel()))
            part[where, local] = 1.0
            return part.reshape(len(indices), *own.shape)

        block.append(pl.through(ones, leaf, after=1))
    return tr.unflatten_like(like, block)


def scatter(like: Tree, indices: Tensor, values: Tensor) -> Tree:
    """The vector with ``values``, shape ``(k,)``, at ``indices``, and zero elsewhere."""
    vector = []
    for leaf, (where, local) in zip(tr.leaves(like), _locate(like, indices), strict=True):

        def spread(own: Tensor, where: Tensor = where, local: Tensor = local) -> Tensor:
            part = own.new_zeros(own.numel())
            part[local] = values[where].to(part)
            return part.reshape(own.shape)

        vector.append(pl.through(spread, leaf))
    return tr.unflatten_like(like, vector)


def gather(block: Tree, indices: Tensor) -> Tensor:
    """Entries of every vector at ``indices``; float64, shape ``(k, len(indices))``."""

    def entries(leaf: Tensor, where: Tensor, local: Tensor) -> Tensor:
        part = _rows(leaf)
        found = part.new_zeros((len(part), len(indices)), dtype=_wide(leaf))
        found[:, where] = part[:, local].to(found)
        return found

    located = _locate(pick(block, 0), indices)
    every = tr.leaves(block)
    return _sum((entries(leaf, *own), leaf) for leaf, own in zip(every, located, strict=True))


def dots(block: Tree, vector: Tree) -> Tensor:
    """``Vᵀx``: the inner product of each vector of ``block`` with ``vector``; shape ``(k,)``."""
    return gram(block, single(vector))[:, 0]


def gram(left: Tree, right: Tree) -> Tensor:
    """``LᵀR`` for two blocks, accumulated in float64 where the device has it; shape ``(k, l)``."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        total = pl.local(a).new_zeros((len(a), len(b)), dtype=_wide(a))
        for rows_a, rows_b in _slabs(_rows(a), _rows(b)):
            total += rows_a.to(_wide(a)) @ rows_b.to(_wide(b)).T
        return total

    pairs = zip(tr.leaves(left), tr.leaves(right), strict=True)
    return _sum((product(a, b), a) for a, b in pairs)


def norms(block: Tree) -> Tensor:
    """The norm of each vector of ``block``, float64, shape ``(k,)``."""
    return _sum(
        (torch.linalg.vector_norm(_rows(leaf), dim=1, dtype=_wide(leaf)).square(), leaf)
        for leaf in tr.leaves(block)
    ).sqrt()


def scale_rows(block: Tree, factors: Tensor) -> Tree:
    """The block of ``c_i V_i`` for ``factors`` of shape ``(k,)``."""

    def scaled(part: Tensor) -> Tensor:
        return part * factors.to(part).reshape(-1, *[1] * (part.ndim - 1))

    return tr.map_leaves(lambda leaf: pl.through(scaled, leaf, before=1, after=1), block)


def combine(block: Tree, coefficients: Tensor) -> Tree:
    """``Σ_i c_i V_i`` for ``coefficients`` of shape ``(k,)``, or a block for shape ``(m, k)``."""

    def mix(part: Tensor) -> Tensor:
        return torch.tensordot(coefficients.to(part), part, dims=1)

    after = coefficients.ndim - 1
    return tr.map_leaves(lambda leaf: pl.through(mix, leaf, before=1, after=after), block)


def orthonormal(block: Tree, epsilon: float) -> tuple[Tree, Tensor]:
    """Return ``(Q, C)`` with ``block = C Q`` and an orthonormal Q without dependent directions.

    Directions count as dependent below ``epsilon`` of the longest, or below the precision of
    float64.
    """
    Q, C = _whiten(block, epsilon)
    # The Gram matrix squares the condition number; a second pass makes Q orthonormal to rounding.
    Q, again = _whiten(Q, 0.0)
    return Q, C @ again


def to_matrix(block: Tree) -> Tensor:
    """The dense ``(k, n)`` matrix of a block, in float64; for small problems."""
    parts = [_rows(pl.full(leaf)) for leaf in tr.leaves(block)]
    return torch.cat([part.to(device=parts[0].device, dtype=_wide(part)) for part in parts], dim=1)


def to_flat(vector: Tree) -> Tensor:
    """The dense ``(n,)`` vector of a tree, in float64; for small problems."""
    return to_matrix(single(vector))[0]


def from_flat(flat: Tensor, like: Tree) -> Tree:
    """The inverse of :func:`to_flat`: ``flat`` in the structure, shapes and dtypes of ``like``."""
    parts = torch.split(flat, [leaf.numel() for leaf in tr.leaves(like)])
    shaped = [
        pl.placed(part.reshape(leaf.shape).to(device=leaf.device, dtype=leaf.dtype), leaf)
        for part, leaf in zip(parts, tr.leaves(like), strict=True)
    ]
    return tr.unflatten_like(like, shaped)


def _whiten(block: Tree, epsilon: float) -> tuple[Tree, Tensor]:
    inner = gram(block, block)
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    cutoff = max(epsilon**2, len(inner) * torch.finfo(inner.dtype).eps)
    kept = values > cutoff * values[-1:]
    root = values[kept].sqrt()
    return combine(block, (vectors[:, kept] / root).T), vectors[:, kept] * root


# A Gram product widens its rows to float64 slab by slab, so that the copy stays small.
_SLAB_COLUMNS = 1 << 16


def _slabs(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, a.shape[1], _SLAB_COLUMNS):
        stop = start + _SLAB_COLUMNS
        yield a[:, start:stop], b[:, start:stop]


def _locate(like: Tree, indices: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each leaf, the ``indices`` into this rank's part of it, and their places there."""
    located = []
    offset = 0
    for leaf in tr.leaves(like):
        located.append(pl.located(leaf, indices - offset))
        offset += leaf.numel()
    return located


def _rows(leaf: Tensor) -> Tensor:
    """This rank's part of a block's leaf, one row per vector."""
    part = pl.local(leaf)
    return part.reshape(len(part), math.prod(part.shape[1:]))


def _empty(total: int, leaf: Tensor) -> Tensor:
    def make(part: Tensor) -> Tensor:
        return part.new_empty((total, *part.shape[1:]))

    return pl.through(make, leaf, before=1, after=1)


def _sum(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of each leaf's contribution, on the device of the first, in its wide dtype."""
    first, *others = pl.contributions(parts)
    for part in others:
        first = first + part.to(first)
    return first


def _wide(leaf: Tensor) -> torch.dtype:
    return torch.float32 if leaf.device.type == "mps" else torch.float64
