"""Pytrees of tensors as vectors: the only vector arithmetic of the library.

A *tree* is any nesting of tuples, lists, dicts and the like whose leaves are floating-point
tensors. Every operation works leaf by leaf, never on one flat copy, so mixed-device trees work
unchanged. On a sharded leaf it works on this rank's part (:mod:`hypergrad._sharding`). Only
``add_`` and ``scale_`` change a tensor in place, for vectors that a solver made itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from hypergrad import _sharding as pl

Tree: TypeAlias = Any
"""A nesting of containers whose leaves are tensors; the word for θ, φ and every vector."""


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of ``tree``, in the order of its structure; a bare list of tensors as it is."""
    if type(tree) is list and set(map(type, tree)) == pl.PLAIN:
        return tree
    return optree.tree_leaves(tree)


def map_leaves(function: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """``function`` applied to each leaf of ``tree`` (and to the matching leaves of ``others``)."""
    return optree.tree_map(function, tree, *others)


def unflatten_like(tree: Tree, values: Sequence[Tensor]) -> Tree:
    """``values`` arranged in the structure of ``tree``."""
    return optree.tree_unflatten(optree.tree_structure(tree), values)


def split(anything: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors among the leaves of any tree, and how to rebuild the tree from others."""
    every, structure = optree.tree_flatten(anything)
    places = [i for i, leaf in enumerate(every) if isinstance(leaf, Tensor)]

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        merged = list(every)
        for i, tensor in zip(places, tensors, strict=True):
            merged[i] = tensor
        return optree.tree_unflatten(structure, merged)

    tensors = [every[i] for i in places]
    for i in places:
        every[i] = None  # so that the rebuilder does not keep the tensors
    return tensors, rebuild


def size(tree: Tree) -> int:
    """The number n of scalars in ``tree``."""
    return sum(leaf.numel() for leaf in leaves(tree))


def zeros_like(tree: Tree) -> Tree:
    """The zero vector of the same structure, shapes, dtypes and devices."""
    return map_leaves(torch.zeros_like, tree)


def clone(tree: Tree) -> Tree:
    """A copy that shares no memory."""
    return map_leaves(torch.clone, tree)


def detach(tree: Tree) -> Tree:
    """The same values, cut from any autograd graph."""
    return map_leaves(torch.Tensor.detach, tree)


def cast_like(tree: Tree, reference: Tree) -> Tree:
    """``tree`` with each leaf in the dtype of the matching leaf of ``reference``."""
    if [leaf.dtype for leaf in leaves(tree)] == [leaf.dtype for leaf in leaves(reference)]:
        return tree
    return map_leaves(lambda leaf, ref: leaf.to(ref.dtype), tree, reference)


def at_least_float32(tree: Tree) -> Tree:
    """``tree`` with its half-precision leaves widened to float32, the others as they are."""
    return map_leaves(
        lambda leaf: leaf.float() if torch.finfo(leaf.dtype).bits < 32 else leaf, tree
    )


def epsilon(tree: Tree) -> float:
    """The coarsest machine epsilon among the dtypes of ``tree``."""
    return max(torch.finfo(leaf.dtype).eps for leaf in leaves(tree))


def add(x: Tree, y: Tree, alpha: float = 1.0) -> Tree:
    """``x + alpha y``."""
    return unflatten_like(
        x,
        pl.elementwise(partial(torch._foreach_add, alpha=_fitting(alpha, x)), leaves(x), leaves(y)),
    )


def add_(x: Tree, y: Tree, alpha: float = 1.0) -> None:
    """``x ← x + alpha y``, in place."""
    every, others = leaves(x), leaves(y)
    if pl.any_distributed(every):
        every, others = pl.parts(every), pl.parts(others)
    torch._foreach_add_(every, others, alpha=_fitting(alpha, every))


def scale_(x: Tree, alpha: float) -> None:
    """``x ← alpha x``, in place."""
    torch._foreach_mul_(pl.parts(leaves(x)), _fitting(alpha, x))


def subtract(x: Tree, y: Tree) -> Tree:
    """``x − y``."""
    return unflatten_like(x, pl.elementwise(torch._foreach_sub, leaves(x), leaves(y)))


def scale(x: Tree, alpha: float) -> Tree:
    """``alpha x``."""
    alpha = _fitting(alpha, x)
    return unflatten_like(
        x, pl.elementwise(lambda some: torch._foreach_mul(some, alpha), leaves(x))
    )


def divide(x: Tree, alpha: float) -> Tree:
    """``x / alpha``, which does not overflow where ``1 / alpha`` or ``alpha`` does."""
    if math.isinf(_fitting(alpha, x)) and math.isfinite(alpha):
        root = math.sqrt(abs(alpha))
        return divide(divide(x, root), math.copysign(root, alpha))
    return unflatten_like(
        x, pl.elementwise(lambda some: torch._foreach_div(some, alpha), leaves(x))
    )


# In the range of every floating-point dtype.
_SAFE_FACTOR = 6e4


def _fitting(alpha: float, x: Tree) -> float:
    """``alpha``, or an infinity where a dtype of ``x`` cannot hold it.

    PyTorch raises an error there. With an infinity the result is not finite, which every caller
    checks.
    """
    if abs(alpha) <= _SAFE_FACTOR:
        return alpha
    largest = min(torch.finfo(leaf.dtype).max for leaf in leaves(x))
    return math.copysign(math.inf, alpha) if abs(alpha) > largest else alpha


def dot(x: Tree, y: Tree) -> Tensor:
    """``⟨x, y⟩`` as a 0-dimensional tensor, accumulated in float32 or better.

    It stays on its device: collect several with :func:`to_floats` for one copy to the host.
    """
    every, others = leaves(x), leaves(y)
    if pl.any_distributed(every):
        return _total(_products(pl.parts(every), pl.parts(others)), every)
    return _added(_products(every, others))


def pairing(x: Tree, y: Tree) -> Tensor:
    """``⟨x, y⟩`` of this rank's parts: a scalar to pull y back from through the graph of x."""
    return _added(_products(pl.parts(leaves(x)), pl.parts(leaves(y))))


# A sum of float32 squares in this range keeps its small terms.
_SAFE_SQUARES = (1e-20, 1e30)


def norm(x: Tree) -> float:
    """``‖x‖₂``; no square under- or overflows."""
    total = dot(x, x).item()
    if _SAFE_SQUARES[0] <= total <= _SAFE_SQUARES[1]:
        return math.sqrt(total)
    # In float64, where the device has it.
    total = _sum_of_squares(x, 1.0)
    if total in (0.0, math.inf):
        peak = largest(x)
        if 0.0 < peak < math.inf:
            return peak * math.sqrt(_sum_of_squares(x, peak))
    return math.sqrt(total)


def largest(x: Tree) -> float:
    """``max_i |x_i|``."""

    def peak(leaf: Tensor) -> float:
        part = pl.local(leaf)
        return float(pl.greatest(part.abs().max() if part.numel() else part.new_zeros(()), leaf))

    return max((peak(leaf) for leaf in leaves(x) if leaf.numel()), default=0.0)


def to_floats(*scalars: Tensor) -> list[float]:
    """The values of 0-dimensional tensors on one device, in a single copy to the host."""
    return torch.stack(scalars).tolist()


def is_finite(tree: Tree) -> bool:
    """Whether no leaf holds an infinity or a NaN; usually one pass and one copy to the host."""
    every = leaves(tree)
    parts = pl.parts(every)
    # A finite sum has finite terms only. An infinite one may have overflowed.
    if math.isfinite(_total([part.sum() for part in parts], every).item()):
        return True
    return bool(_total([(~torch.isfinite(part)).sum() for part in parts], every) == 0)


def random_normal_like(tree: Tree, generator: torch.Generator) -> Tree:
    """A standard normal vector, the same on every device: it is drawn on the generator's device."""

    def draw(leaf: Tensor) -> Tensor:
        drawn = torch.randn(leaf.shape, generator=generator, device=generator.device)
        return pl.placed(drawn.to(device=leaf.device, dtype=leaf.dtype), leaf)

    return map_leaves(draw, tree)


def random_signs_like(tree: Tree, generator: torch.Generator | None) -> Tree:
    """A vector of independent signs ±1, by default from PyTorch's default CPU generator."""
    device = "cpu" if generator is None else generator.device

    def draw(leaf: Tensor) -> Tensor:
        bits = torch.randint(2, leaf.shape, generator=generator, device=device)
        return pl.placed((2 * bits - 1).to(device=leaf.device, dtype=leaf.dtype), leaf)

    return map_leaves(draw, tree)


def _sum_of_squares(x: Tree, unit: float) -> float:
    squares = []
    every = leaves(x)
    for leaf in pl.parts(every):
        wide = torch.float32 if leaf.device.type == "mps" else torch.float64
        scaled = leaf if unit == 1.0 else leaf.to(wide) / unit
        squares.append(torch.linalg.vector_norm(scaled, dtype=wide).square())
    return _total(squares, every).item()


def _products(x: list[Tensor], y: list[Tensor]) -> list[Tensor]:
    if len(x) > _MANY and len({(leaf.dtype, leaf.device) for leaf in (*x, *y)}) == 1:
        # Joined, since two calls per leaf take longer than the sums of thousands of small leaves.
        small = [i for i, leaf in enumerate(x) if leaf.numel() <= _SMALL]
        if small:
            large = [_product(a, b) for a, b in zip(x, y, strict=True) if a.numel() > _SMALL]
            joined = [torch.cat([leaves[i].reshape(-1) for i in small]) for leaves in (x, y)]
            return [*large, _product(*joined)]
    return [_product(a, b) for a, b in zip(x, y, strict=True)]


_MANY, _SMALL = 256, 1 << 12


# Plain sums lose digits with n: in float32 at n = 1e8 torch.dot has an error of 1e-3, a sum of
# pieces 2e-8. (a * b).sum() is as exact, but takes six times as long, through memory.
_PIECE = 1 << 16


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype.itemsize < 4:
        a, b = a.float(), b.float()
    if not a.is_cpu or a.dtype != b.dtype:
        return (a * b).sum()
    if a.ndim != 1:
        a, b = a.reshape(-1), b.reshape(-1)
    if a.numel() <= _PIECE:
        return torch.dot(a, b)
    pairs = zip(a.split(_PIECE), b.split(_PIECE), strict=True)
    return torch.stack([torch.dot(some, others) for some, others in pairs]).sum()


def _total(scalars: list[Tensor], every: Sequence[Tensor]) -> Tensor:
    """The sum of each leaf's contribution, over all ranks that share the leaf."""
    if pl.any_distributed(every):
        scalars = pl.contributions(zip(scalars, every, strict=True))
    return _added(scalars)


def _added(scalars: list[Tensor]) -> Tensor:
    first = scalars[0]
    if len(scalars) == 1:
        return first
    # Mixed trees: one dtype and one device for the sum, the widest and the first.
    if any(s.dtype != first.dtype or s.device != first.device for s in scalars):
        dtype = max((s.dtype for s in scalars), key=lambda d: d.itemsize)
        scalars = [s.to(device=first.device, dtype=dtype) for s in scalars]
    # An addition is one operation; stacking and summing are two.
    return sum(scalars[1:], first) if len(scalars) <= 3 else torch.stack(scalars).sum()
