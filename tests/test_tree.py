"""Trees as vectors and blocks of them, against the same arithmetic on one flat tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypergrad import block as bl
from hypergrad import tree as tr

SHAPES = st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 1, 2)])


@st.composite
def structures(draw: st.DrawFn, depth: int = 2) -> Any:
    """A nesting of tuples, lists and dicts of shapes."""
    if depth == 0 or draw(st.booleans()):
        return torch.zeros(draw(SHAPES), dtype=torch.float64)
    children = draw(st.lists(structures(depth - 1), min_size=1, max_size=3))
    kind = draw(st.sampled_from(["tuple", "list", "dict"]))
    if kind == "dict":
        return {f"key{i}": child for i, child in enumerate(children)}
    return tuple(children) if kind == "tuple" else children


def filled(structure: Any, seed: int) -> Any:
    return tr.random_normal_like(structure, torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(structures(), st.floats(-3.0, 3.0))
def test_arithmetic_is_that_of_flat_vectors(structure: Any, alpha: float) -> None:
    x, y = filled(structure, 0), filled(structure, 1)
    a, b = bl.to_flat(x), bl.to_flat(y)
    torch.testing.assert_close(bl.to_flat(tr.add(x, y, alpha)), a + alpha * b)
    torch.testing.assert_close(bl.to_flat(tr.subtract(x, y)), a - b)
    torch.testing.assert_close(bl.to_flat(tr.scale(x, alpha)), alpha * a)
    torch.testing.assert_close(tr.dot(x, y), a @ b)
    assert tr.norm(x) == pytest.approx(float(a.norm()))
    assert tr.size(x) == a.numel()
    torch.testing.assert_close(bl.to_flat(bl.from_flat(a, x)), a)
    assert not bl.to_flat(tr.zeros_like(x)).any()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(structures(), st.integers(1, 5), st.data())
def test_blocks_are_matrices(structure: Any, k: int, data: st.DataObject) -> None:
    vectors = [filled(structure, i) for i in range(k)]
    block = bl.stack(vectors)
    matrix = torch.stack([bl.to_flat(v) for v in vectors])
    n = tr.size(structure)
    torch.testing.assert_close(bl.to_matrix(block), matrix)
    torch.testing.assert_close(bl.gram(block, block), matrix @ matrix.T)
    torch.testing.assert_close(bl.dots(block, vectors[0]), matrix @ matrix[0])
    c = torch.arange(1.0, k + 1, dtype=torch.float64)
    torch.testing.assert_close(bl.to_flat(bl.combine(block, c)), c @ matrix)
    again = bl.assemble(bl.chunks(block, 2), k)
    torch.testing.assert_close(bl.to_matrix(again), matrix)
    if n == 0:
        return
    indices = torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=4)))
    )
    torch.testing.assert_close(bl.gather(block, indices), matrix[:, indices])
    units = bl.to_matrix(bl.unit_vectors(structure, indices))
    torch.testing.assert_close(units, torch.eye(n, dtype=torch.float64)[indices])
    values = torch.arange(1.0, len(indices) + 1, dtype=torch.float64)
    scattered = bl.to_flat(bl.scatter(structure, indices, values))
    torch.testing.assert_close(scattered, values @ units)


def test_inner_products_of_half_precision_accumulate_in_float32() -> None:
    ones = torch.ones(5000, dtype=torch.bfloat16)
    assert tr.dot(ones, ones).item() == 5000.0  # bfloat16 itself stops at 256
    assert tr.dot({"a": ones}, {"a": ones}).dtype == torch.float32
    big = torch.full((10,), 1000.0, dtype=torch.float16)
    assert tr.dot(big, big).item() == 1e7  # float16 itself ends at 65504


def test_inner_products_of_long_vectors_lose_no_digits() -> None:
    """One pass of torch.dot over as many numbers is off by 1e-5."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(10_000_019, generator=generator)
    exact = float(x.double() @ x.double())
    assert float(tr.dot([x], [x])) == pytest.approx(exact, rel=3e-7)
    assert tr.norm([x]) == pytest.approx(math.sqrt(exact), rel=3e-7)


def test_norms_do_not_underflow_or_overflow() -> None:
    for value in (1e-200, 1e200):
        tree = (torch.full((4,), value, dtype=torch.float64), torch.zeros(2))
        assert tr.norm(tree) == pytest.approx(2 * value)
    assert tr.norm(torch.full((4,), 1e-42)) == pytest.approx(2e-42, rel=1e-3)
    assert tr.norm(torch.zeros(3)) == 0.0
    assert tr.norm(torch.tensor([float("inf"), 1.0])) == float("inf")


def test_mixed_dtypes_and_views() -> None:
    x = {"a": torch.ones(3, 2).T, "b": torch.full((2,), 2.0, dtype=torch.float64)}
    assert tr.dot(x, x).dtype == torch.float64
    assert tr.dot(x, x).item() == 14.0
    doubled = tr.add(x, x)
    assert (doubled["a"].dtype, doubled["b"].dtype) == (torch.float32, torch.float64)
    assert tr.epsilon(x) == torch.finfo(torch.float32).eps
    assert tr.is_finite(x)
    assert not tr.is_finite((x, torch.tensor(float("nan"))))


def test_nothing_is_changed_in_place() -> None:
    x, y = torch.ones(3), torch.ones(3)
    tr.add(x, y, 2.0)
    tr.scale(x, 5.0)
    tr.divide(x, 5.0)
    tr.subtract(x, y)
    assert torch.equal(x, torch.ones(3))
    assert torch.equal(y, torch.ones(3))
