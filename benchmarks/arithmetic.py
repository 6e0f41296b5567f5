"""What a hypergradient over R ranks sends, computes and holds, by arithmetic.

``python -m benchmarks.arithmetic`` prints the tables of ``docs/arithmetic.md``, and with
``--write`` puts them there. n is the number of inner parameters. The functions are compared with
counted messages, bytes, flops and peaks of memory in ``tests/test_distributed_arithmetic.py``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

from benchmarks.blocks import ROOT, fill, table

Placement: TypeAlias = Literal["replicated", "sharded", "layer by layer"]
"""``DataParallel`` of plain tensors, or of ``DTensor`` objects; ``WholeModule`` of a module whose
layers were wrapped by ``fully_shard``, with finite differences."""

PLACEMENTS: tuple[Placement, ...] = ("replicated", "sharded", "layer by layer")
COMMAND = "python -m benchmarks.arithmetic"
PAGE = ROOT / "docs" / "arithmetic.md"

RING: Mapping[str, int] = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
"""How many times (R − 1)/R of the vector a rank sends, and receives, by a ring."""

GLOO: Mapping[str, int] = {**RING, "reduce_scatter": 2}
"""The same for gloo, whose reduce-scatter is an all-reduce of which each rank keeps its part."""

MESSAGES: Mapping[Placement, Mapping[str, int]] = {
    "replicated": {"all_reduce": 1},
    "sharded": {"all_gather": 1, "reduce_scatter": 1},
    # Two gradients; each gathers every layer once forwards and once backwards.
    "layer by layer": {"all_gather": 4, "reduce_scatter": 2},
}
"""The collectives of one product with the Hessian, as numbers of vectors of n elements."""

FLOPS = 12
"""Per row and weight of a product, see :func:`flops_per_product`."""

# What a rank holds at the peak of a hypergradient by CG, as numbers of vectors of n elements: first
# those of which a sharded rank has its part, then those that it has whole.
VECTORS: Mapping[Placement, Mapping[str, tuple[int, int]]] = {
    "replicated": {
        "θ": (1, 0), "∇f, kept": (1, 0), "b, as it came and scaled": (2, 0),
        "x, r, p, A p, the best x": (5, 0), "a product on its way": (2, 0),
    },
    "sharded": {
        "θ": (1, 1), "∇f, kept": (1, 0), "b, as it came and scaled": (2, 0),
        "x, r, p, A p, the best x": (5, 0), "a product on its way": (1, 3),
    },
    "layer by layer": {
        "θ": (1, 0), "∇f, kept": (1, 0), "b, as it came and scaled": (2, 0),
        "x, r, p, A p, the best x": (5, 0), "a product on its way": (4, 0),
    },
}  # fmt: skip

GATHERED_LAYERS = 5
"""How many layers ``fully_shard`` holds whole at the most, with their gradients."""

CAPACITY = 80e9
"""Bytes of a device, for the examples."""


def bytes_per_product(
    n: float,
    ranks: int,
    placement: Placement = "replicated",
    *,
    itemsize: int = 4,
    passes: Mapping[str, int] = RING,
) -> float:
    """What each rank sends for one product with the Hessian; it receives as much."""
    vectors = sum(passes[name] * count for name, count in MESSAGES[placement].items())
    return vectors * (ranks - 1) / ranks * n * itemsize


def flops_per_product(widths: Sequence[int], rows: float) -> float:
    """Of a Hessian product over the kept graph of a dense network, matrix products alone.

    A layer of n weights multiplies rows by a matrix at 2 n flops a row. Its backward pass has two
    such products, those for its weights and for its input. A reverse pass over all of it has two
    for each of the backward pass and two for the forward pass: 6 · 2 n = 12 n. The first layer has
    2 · 2 n: nothing is derived in its input.

    Args:
        widths: of the input, the hidden layers and the output.
        rows: of data.
    """
    first, *others = [a * b for a, b in pairwise(widths)]
    return rows * (4 * first + FLOPS * sum(others))


def rows_at_which_it_pays(flops: float, bandwidth: float, *, itemsize: int = 4) -> float:
    """How many rows a product must work on before sharing them over ranks makes it faster.

    R ranks with M rows together take ``12 n M / (R F) + 2 (R − 1)/R · n b / B`` for a product,
    one alone ``12 n M / F``. The first is less where ``M > b F / (6 B)``, whatever n and R are.
    It is also the number of rows on each of many ranks at which half of the time is communication.

    Args:
        flops: F, of a rank in a second.
        bandwidth: B, the bytes that a rank sends in a second while it receives as many.
        itemsize: b, bytes of an element.
    """
    return RING["all_reduce"] * itemsize * flops / (FLOPS * bandwidth)


def efficiency(
    rows: float, ranks: int, flops: float, bandwidth: float, *, itemsize: int = 4
) -> float:
    """The part of a product's time that is computing, with ``rows`` on each rank."""
    threshold = rows_at_which_it_pays(flops, bandwidth, itemsize=itemsize)
    return 1.0 / (1.0 + (ranks - 1) / ranks * threshold / rows)


def memory(
    n: float,
    ranks: int,
    placement: Placement = "replicated",
    *,
    itemsize: int = 4,
    sketch: int = 0,
    layers: int = 100,
) -> dict[str, float]:
    """Bytes on each rank at the peak of a hypergradient by CG, by what takes them.

    Without what grows with the rows: activations, and the graph that keeps them.

    Args:
        n: inner parameters.
        ranks: R.
        placement: where they lie.
        itemsize: bytes of an element.
        sketch: columns of a Nyström preconditioner that is kept beside CG's vectors.
        layers: into how many equal ones ``fully_shard`` wrapped the model.
    """
    parts = 1 if placement == "replicated" else ranks
    found = {
        name: (shared / parts + whole) * n * itemsize
        for name, (shared, whole) in VECTORS[placement].items()
    }
    if placement == "layer by layer":
        found["layers, gathered"] = GATHERED_LAYERS * n / layers * itemsize
    if sketch:
        found[f"sketch of rank {sketch}"] = sketch / parts * n * itemsize
    return found


def fewest_ranks(n: float, placement: Placement, *, sketch: int = 0) -> int | None:
    """How many devices of 80 GB hold it; ``None`` where no number does."""

    def total(ranks: int) -> float:
        return sum(memory(n, ranks, placement, sketch=sketch).values())

    if total(1) <= CAPACITY:
        return 1
    if placement == "replicated":
        return None
    # total(R) = whole + shared / R, from two of its values.
    shared = 2 * (total(1) - total(2))
    whole = total(1) - shared
    return None if whole >= CAPACITY else math.ceil(shared / (CAPACITY - whole))


def bytes_table() -> str:
    """Bytes of a product, by placement and ranks."""
    n, counts = 1e9, (2, 3, 4, 8, 64)
    rows = [
        [placement, *(f"{bytes_per_product(n, r, placement) / 1e9:.2f}" for r in counts)]
        for placement in PLACEMENTS
    ]
    heads = ["n = 1e9, float32: GB a product", *(f"R = {r}" for r in counts)]
    return table(heads, rows)


def rows_table() -> str:
    """Rows at which it pays, for some machines."""
    cases = [(0.1, 1.0), (10.0, 1.25), (100.0, 12.5), (100.0, 100.0), (400.0, 400.0)]
    counts = (2, 8, 64)
    rows = []
    for tera, giga in cases:
        machine = tera * 1e12, giga * 1e9
        parts = [f"{efficiency(4096, r, *machine):.0%}" for r in counts]
        rows.append([f"{tera:g}", f"{giga:g}", f"{rows_at_which_it_pays(*machine):,.0f}", *parts])
    heads = ["F, Tflop/s", "B, GB/s", "rows at which it pays"]
    return table([*heads, *(f"of 4,096 rows a rank, R = {r}" for r in counts)], rows)


def memory_table() -> str:
    """Bytes of a rank, by what takes them."""
    return "\n\n".join(_memory(n) for n in (1e9, 1e11))


def _memory(n: float) -> str:
    names = [*memory(n, 1, "layer by layer", sketch=20)]
    cases: list[tuple[Placement, int]] = [("replicated", 1)]
    cases += [(placement, r) for placement in PLACEMENTS[1:] for r in (8, 128)]
    columns = [memory(n, r, placement, sketch=20) for placement, r in cases]
    rows = [[name, *(_gigabytes(c.get(name, 0.0)) for c in columns)] for name in names]
    without = [_gigabytes(sum(c.values()) - c["sketch of rank 20"]) for c in columns]
    rows.insert(-1, ["together, by CG", *without])
    heads = [f"{p}, {'any R' if p == 'replicated' else f'R = {r}'}" for p, r in cases]
    return table([f"n = {_power(n)}: GB a rank", *heads], rows)


def devices_table() -> str:
    """The fewest devices."""
    rows = []
    for n in (1e9, 1e10, 1e11):
        for sketch in (0, 20):
            found = [fewest_ranks(n, placement, sketch=sketch) for placement in PLACEMENTS]
            words = ["no number" if r is None else str(r) for r in found]
            rows.append([_power(n), str(sketch) if sketch else "none", *words])
    heads = ["n", "sketch of rank", *PLACEMENTS]
    return table(heads, rows)


def _power(n: float) -> str:
    return f"1e{math.log10(n):.0f}"


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.1f}" if number else "0"


TABLES: Mapping[str, Callable[[], str]] = {
    "bytes": bytes_table, "rows": rows_table, "memory": memory_table, "devices": devices_table,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Print tables, or write them."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TABLES)}; all of them")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name} as well")
    options = parser.parse_args(argv)
    for name in options.names or TABLES:
        if name not in TABLES:
            parser.error(f"names must be of {', '.join(TABLES)}, got {name!r}")
        print(f"{TABLES[name]()}\n")
        if options.write:
            fill(PAGE, f"{COMMAND} {name}", TABLES[name]())


if __name__ == "__main__":
    main()
