"""The memory of SAGA (Defazio, Bach & Lacoste-Julien 2014): one derivative of each batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.packing import from_leaves
from hypergrad.tree import Tree


@dataclass(frozen=True)
class Table:
    """The last derivative of each of N batches, and their weighted mean ``Σ_i p_i entry_i``.

    The mean is carried on in float64 (float32 on MPS, which has no float64), whatever the entries
    are: each step rounds it once, and a rounding stays. In float32 those of the first steps, where
    derivatives are large, would be the floor of all later ones; in float64, T steps leave about
    ``√T · 1e-16`` of the largest entry, below what the entries themselves carry.

    Attributes:
        entries: one a batch.
        shares: ``p_i = w_i / Σ_j w_j``.
        mean: of the entries.
    """

    entries: tuple[Tree, ...]
    shares: tuple[float, ...]
    mean: Tree

    @classmethod
    def of(cls, entries: Sequence[Tree], weights: Sequence[float]) -> Table:
        """The table of the given entries."""
        total = sum(weights)
        shares = tuple(weight / total for weight in weights)
        mean = tr.zeros_like(_wide(entries[0]))
        for entry, share in zip(entries, shares, strict=True):
            mean = tr.add(mean, _wide(entry), share)
        return cls(tuple(entries), shares, mean)

    def replace(self, i: int, entry: Tree) -> tuple[Tree, Table]:
        """The estimate ``N p_i (entry − entry_i) + mean``, and the table with ``entry`` at i.

        Unbiased for a uniform i. The new table shares all other entries with this one, which stays
        as it is.
        """
        change = tr.subtract(_wide(entry), _wide(self.entries[i]))
        estimate = tr.add(self.mean, change, len(self.entries) * self.shares[i])
        mean = tr.add(self.mean, change, self.shares[i])
        entries = (*self.entries[:i], entry, *self.entries[i + 1 :])
        return estimate, Table(entries, self.shares, mean)

    def to_lists(self) -> list[list[Tensor]]:
        """The shares as one tensor, the leaves of the mean, and the leaves of each entry."""
        shares = torch.tensor(self.shares, dtype=torch.float64)
        return [[shares], tr.leaves(self.mean), *map(tr.leaves, self.entries)]

    @classmethod
    def from_lists(cls, lists: Any, like: Tree, name: str) -> Table:
        """The inverse of :meth:`to_lists`.

        Args:
            lists: what it returned.
            like: a tree of the structure, shapes and dtypes of an entry, on the devices to use.
            name: what to call ``lists`` in errors.

        Raises:
            ValueError: ``lists`` is no table of such entries.
        """
        if not isinstance(lists, list) or len(lists) < 3:
            raise ValueError(f"{name} must be a list of shares, mean and entries, got {lists!r}")
        count = torch.empty(len(lists) - 2, dtype=torch.float64)
        shares = from_leaves(lists[0], count, f"the shares in {name}", "one number a batch")
        mean, *entries = (from_leaves(row, like, name, "an entry") for row in lists[1:])
        return cls(tuple(entries), tuple(shares.tolist()), _wide(mean))


def _wide(tree: Tree) -> Tree:
    return tr.map_leaves(lambda leaf: leaf if leaf.device.type == "mps" else leaf.double(), tree)
