"""Blocks: k vectors at once, as one tree whose leaves carry a leading dimension k.

The *coordinates* of a vector are numbered 0 … n−1 through the leaves in order, row-major in each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.tree import Tree


def width(block: Tree) -> int:
    """The number k of vectors in ``block``."""
    return int(tr.leaves(block)[0].shape[0])


def stack(vectors: Sequence[Tree]) -> Tree:
    """The block of the given vectors."""
    return tr.map_leaves(lambda *rows: torch.stack(rows), *vectors)


def unstack(block: Tree) -> list[Tree]:
    """The vectors of ``block``."""
    return [tr.map_leaves(lambda leaf, i=i: leaf[i], block) for i in range(width(block))]


def chunks(block: Tree, chunk_size: int) -> Iterator[Tree]:
    """``block`` in consecutive pieces of at most ``chunk_size`` vectors."""
    for start in range(0, width(block), chunk_size):
        yield tr.map_leaves(lambda leaf, s=start: leaf[s : s + chunk_size], block)


def assemble(parts: Iterable[Tree], total: int) -> Tree:
    """Consecutive pieces of a block of ``total`` vectors as one; a piece is free once copied."""
    whole: Tree = None
    start = 0
    for part in parts:
        if width(part) == total:
            return part
        if whole is None:
            whole = tr.map_leaves(lambda leaf: leaf.new_empty((total, *leaf.shape[1:])), part)
        for leaf, rows in zip(tr.leaves(whole), tr.leaves(part), strict=True):
            leaf[start : start + len(rows)] = rows
        start += width(part)
    return whole


def unit_vectors(like: Tree, indices: Tensor) -> Tree:
    """The block of unit vectors ``e_i`` for the coordinates ``indices``, shape ``(k,)``."""
    block = []
    for leaf, (where, local) in zip(tr.leaves(like), _locate(like, indices), strict=True):
        part = leaf.new_zeros((len(indices), leaf.numel()))
        part[where, local] = 1.0
        block.append(part.reshape(len(indices), *leaf.shape))
    return tr.unflatten_like(like, block)


def scatter(like: Tree, indices: Tensor, values: Tensor) -> Tree:
    """The vector with ``values``, shape ``(k,)``, at ``indices``, and zero elsewhere."""
    vector = []
    for leaf, (where, local) in zip(tr.leaves(like), _locate(like, indices), strict=True):
        part = leaf.new_zeros(leaf.numel())
        part[local] = values[where].to(part)
        vector.append(part.reshape(leaf.shape))
    return tr.unflatten_like(like, vector)


def gather(block: Tree, indices: Tensor) -> Tensor:
    """Entries of every vector at ``indices``; float64, shape ``(k, len(indices))``."""
    like = tr.map_leaves(lambda leaf: leaf[0], block)
    first = tr.leaves(block)[0]
    entries = first.new_zeros((width(block), len(indices)), dtype=_wide(first))
    for leaf, (where, local) in zip(tr.leaves(block), _locate(like, indices), strict=True):
        entries[:, where] = _rows(leaf)[:, local].to(entries)
    return entries


def dots(block: Tree, vector: Tree) -> Tensor:
    """``Vᵀx``: the inner product of each vector of ``block`` with ``vector``; shape ``(k,)``."""
    return gram(block, tr.map_leaves(lambda leaf: leaf.unsqueeze(0), vector))[:, 0]


def gram(left: Tree, right: Tree) -> Tensor:
    """``LᵀR`` for two blocks, accumulated in float64 where the device has it; shape ``(k, l)``."""
    first = tr.leaves(left)[0]
    total = first.new_zeros((width(left), width(right)), dtype=_wide(first))
    for a, b in zip(tr.leaves(left), tr.leaves(right), strict=True):
        for rows_a, rows_b in _slabs(_rows(a), _rows(b)):
            total += (rows_a.to(_wide(a)) @ rows_b.to(_wide(b)).T).to(total)
    return total


def norms(block: Tree) -> Tensor:
    """The norm of each vector of ``block``, float64, shape ``(k,)``."""
    first = tr.leaves(block)[0]
    squares = first.new_zeros(width(block), dtype=_wide(first))
    for leaf in tr.leaves(block):
        squares += torch.linalg.vector_norm(_rows(leaf), dim=1, dtype=_wide(leaf)).square()
    return squares.sqrt()


def scale_rows(block: Tree, factors: Tensor) -> Tree:
    """The block of ``c_i V_i`` for ``factors`` of shape ``(k,)``."""
    return tr.map_leaves(
        lambda leaf: leaf * factors.to(leaf).reshape(-1, *[1] * (leaf.ndim - 1)), block
    )


def combine(block: Tree, coefficients: Tensor) -> Tree:
    """``Σ_i c_i V_i`` for ``coefficients`` of shape ``(k,)``, or a block for shape ``(m, k)``."""

    def mix(leaf: Tensor) -> Tensor:
        return torch.tensordot(coefficients.to(leaf), leaf, dims=1)

    return tr.map_leaves(mix, block)


def orthonormal(block: Tree, epsilon: float) -> tuple[Tree, Tensor]:
    """``(Q, C)`` with ``block = C Q``, Q orthonormal; dependent directions are left out of Q.

    Directions count as dependent below ``epsilon`` of the longest, or what float64 can tell.
    """
    Q, C = _whiten(block, epsilon)
    # The Gram matrix squares the condition number; a second pass makes Q orthonormal to rounding.
    Q, again = _whiten(Q, 0.0)
    return Q, C @ again


def to_matrix(block: Tree) -> Tensor:
    """The dense ``(k, n)`` matrix of a block, in float64; for small problems."""
    parts = [_rows(leaf) for leaf in tr.leaves(block)]
    return torch.cat([part.to(device=parts[0].device, dtype=_wide(part)) for part in parts], dim=1)


def to_flat(vector: Tree) -> Tensor:
    """The dense ``(n,)`` vector of a tree, in float64; for small problems."""
    return to_matrix(tr.map_leaves(lambda leaf: leaf.unsqueeze(0), vector))[0]


def from_flat(flat: Tensor, like: Tree) -> Tree:
    """The inverse of :func:`to_flat`: ``flat`` in the structure, shapes and dtypes of ``like``."""
    parts = torch.split(flat, [leaf.numel() for leaf in tr.leaves(like)])
    shaped = [
        part.reshape(leaf.shape).to(leaf) for part, leaf in zip(parts, tr.leaves(like), strict=True)
    ]
    return tr.unflatten_like(like, shaped)


def _whiten(block: Tree, epsilon: float) -> tuple[Tree, Tensor]:
    inner = gram(block, block)
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    cutoff = max(epsilon**2, len(inner) * torch.finfo(inner.dtype).eps)
    kept = values > cutoff * values[-1:]
    root = values[kept].sqrt()
    return combine(block, (vectors[:, kept] / root).T), vectors[:, kept] * root


# Rows of a Gram product are widened to float64 a slab at a time, so that the copy stays small.
_SLAB_COLUMNS = 1 << 16


def _slabs(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, a.shape[1], _SLAB_COLUMNS):
        stop = start + _SLAB_COLUMNS
        yield a[:, start:stop], b[:, start:stop]


def _locate(like: Tree, indices: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each leaf: which of ``indices`` fall into it, and their places inside it."""
    located = []
    offset = 0
    for leaf in tr.leaves(like):
        where = ((indices >= offset) & (indices < offset + leaf.numel())).nonzero()[:, 0]
        located.append((where, indices[where] - offset))
        offset += leaf.numel()
    return located


def _rows(leaf: Tensor) -> Tensor:
    return leaf.reshape(len(leaf), math.prod(leaf.shape[1:]))


def _wide(leaf: Tensor) -> torch.dtype:
    return torch.float32 if leaf.device.type == "mps" else torch.float64
