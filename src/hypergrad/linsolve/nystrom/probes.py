"""The test matrix Ω of a sketch: random coordinates, Gaussian or orthonormal vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad.tree import Tree


class Probes(ABC):
    """The k vectors ω_j of a test matrix, each with the structure of a given one."""

    @abstractmethod
    def __len__(self) -> int:
        """The number k of vectors."""

    @abstractmethod
    def part(self, start: int, stop: int) -> Probes:
        """Vectors ``start`` to ``stop`` alone."""

    @abstractmethod
    def blocks(self, size: int) -> Iterator[Tree]:
        """The vectors in blocks of at most ``size``."""

    @abstractmethod
    def dots(self, block: Tree) -> Tensor:
        """``⟨v_i, ω_j⟩`` for the vectors of a block; float64, shape ``(width, k)``."""

    @abstractmethod
    def combine(self, coefficients: Tensor) -> Tree:
        """``Σ_j c_j ω_j``, in float32 or wider."""


@dataclass(frozen=True)
class Coordinates(Probes):
    """Unit vectors: their products are columns of the operator."""

    like: Tree  # a vector of the space
    indices: Tensor  # their coordinates, shape (k,)

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, start: int, stop: int) -> Probes:
        return Coordinates(self.like, self.indices[start:stop])

    def blocks(self, size: int) -> Iterator[Tree]:
        for part in self.indices.split(size):
            yield bl.unit_vectors(self.like, part)

    def dots(self, block: Tree) -> Tensor:
        return bl.gather(block, self.indices)

    def combine(self, coefficients: Tensor) -> Tree:
        return bl.scatter(tr.at_least_float32(self.like), self.indices, coefficients)


@dataclass(frozen=True)
class Gaussian(Probes):
    """Standard normal vectors, drawn from their seeds at each use and never kept."""

    like: Tree  # a vector of the space
    seeds: tuple[int, ...]  # one per vector

    def __len__(self) -> int:
        return len(self.seeds)

    def part(self, start: int, stop: int) -> Probes:
        return Gaussian(self.like, self.seeds[start:stop])

    def blocks(self, size: int) -> Iterator[Tree]:
        for start in range(0, len(self.seeds), size):
            yield bl.stack([self._draw(seed) for seed in self.seeds[start : start + size]])

    def dots(self, block: Tree) -> Tensor:
        return torch.stack([bl.dots(block, self._draw(seed)) for seed in self.seeds], dim=1)

    def combine(self, coefficients: Tensor) -> Tree:
        total = tr.zeros_like(tr.at_least_float32(self.like))
        for seed, coefficient in zip(self.seeds, coefficients.tolist(), strict=True):
            tr.add_(total, self._draw(seed), coefficient)
        return total

    def _draw(self, seed: int) -> Tree:
        wide = tr.at_least_float32(self.like)
        return tr.random_normal_like(wide, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Orthonormal(Probes):
    """Orthonormal vectors, kept in memory as one block."""

    block: Tree

    def __len__(self) -> int:
        return bl.width(self.block)

    def part(self, start: int, stop: int) -> Probes:
        return Orthonormal(bl.piece(self.block, start, stop))

    def blocks(self, size: int) -> Iterator[Tree]:
        return bl.chunks(self.block, size)

    def dots(self, block: Tree) -> Tensor:
        return bl.gram(block, self.block)

    def combine(self, coefficients: Tensor) -> Tree:
        return bl.combine(self.block, coefficients)


def draw_coordinates(
    like: Tree, k: int, generator: torch.Generator | None, *, shuffled: bool
) -> Coordinates:
    """Draw a uniformly random k-subset of the coordinates by Floyd's method: no array of size n."""
    n = tr.size(like)
    last = torch.arange(n - k, n)
    device = "cpu" if generator is None else generator.device
    uniform = torch.rand(k, dtype=torch.float64, generator=generator, device=device).cpu()
    chosen: set[int] = set()
    for candidate, fallback in zip(
        (uniform * (last + 1)).long().tolist(), last.tolist(), strict=True
    ):
        chosen.add(fallback if candidate in chosen else candidate)
    indices = torch.tensor(sorted(chosen))
    if shuffled:
        indices = indices[torch.randperm(k, generator=generator, device=device).cpu()]
    return Coordinates(tr.detach(like), indices)


def draw_gaussian(like: Tree, k: int, generator: torch.Generator | None) -> Gaussian:
    """Draw ``k`` independent standard normal vectors."""
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**62, (k,), generator=generator, device=device)
    return Gaussian(tr.detach(like), tuple(seeds.tolist()))


def draw_orthonormal(like: Tree, k: int, generator: torch.Generator | None) -> Orthonormal:
    """Draw an orthonormal basis of the span of k independent standard normal vectors."""
    (gaussian,) = draw_gaussian(like, k, generator).blocks(k)
    return Orthonormal(bl.orthonormal(gaussian, 0.0)[0])
