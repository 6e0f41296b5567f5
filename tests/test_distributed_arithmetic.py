"""The arithmetic of ranks is what messages, bytes, flops and peaks of memory were counted to be."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import pairwise

import arithmetic_programs as programs
import pytest
import torch
from gallery import ROOT
from ranks import Ranks
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import hypergrad as hg
from benchmarks import arithmetic, scaling
from benchmarks.blocks import fill, written
from benchmarks.memory import can_be_measured

PLACEMENTS = arithmetic.PLACEMENTS


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # for benchmarks.memory
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # peaks without holes in glibc's heap
        started = Ranks()
        yield started
        started.close()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_product_sends_what_the_arithmetic_says(ranks, size, placement):
    for n, received, elements in ranks(size, programs.product, placement):
        assert elements == {
            name: count * n for name, count in arithmetic.MESSAGES[placement].items()
        }
        if programs.can_be_counted():
            expected = arithmetic.bytes_per_product(n, size, placement, passes=arithmetic.GLOO)
            # Beside vectors: 64 bytes about each part of a message, and scalars.
            assert expected <= received <= 1.01 * expected


@pytest.mark.parametrize(("placement", "sent"), [("replicated", []), ("sharded", [("sum", 1)])])
def test_an_inner_product_sends_a_scalar_at_most(ranks, placement, sent):
    assert ranks(2, programs.inner_product, placement) == [sent] * 2


def test_a_hypergradient_sends_a_vector_for_each_product_and_two_more(ranks):
    for n, products, seen in ranks(2, programs.hypergradient, "replicated"):
        assert sum(elements == n for _, elements in seen) == products + 2
        # Of φ: the outer gradient and the mixed product. Of 16 numbers: the values of f and g.
        assert sorted(elements for _, elements in seen if elements != n) == [4, 4, 16, 16]
    for n, products, seen in ranks(2, programs.hypergradient, "sharded"):
        names = [name for name, elements in seen if elements >= n]
        assert names.count("reduce_scatter") == products + 2
        assert names.count("all_gather") == products + 3
        # Two per iteration, of which the last has a product more; and a few before and after them,
        # one of which asks whether the first product is a number.
        sums = [elements for name, elements in seen if name == "sum"]
        assert 2 * (products - 1) <= len(sums) <= 2 * (products - 1) + 9
        assert set(sums) == {1}


@pytest.mark.parametrize("widths", [(30, 40, 50, 7), (8, 9), (6, 5, 4)])
def test_flops_are_those_that_pytorch_counts(widths):
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    module = nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())))
    x = torch.randn(11, widths[0])
    params = {key: p.detach() for key, p in module.named_parameters()}
    operator = hg.operators.hessian(
        lambda params, hparams: hparams * functional_call(module, params, (x,)).square().sum(),
        params, torch.tensor(0.5), mode="reverse",
    )  # fmt: skip
    with FlopCounterMode(display=False) as counted:
        operator.matvec(params)
    assert counted.get_total_flops() == arithmetic.flops_per_product(widths, len(x))


def test_sharing_rows_pays_where_the_arithmetic_says():
    flops, bandwidth, n = 3e12, 2e9, 7e6
    threshold = arithmetic.rows_at_which_it_pays(flops, bandwidth)
    for ranks in (2, 8, 64):

        def seconds(rows: float, ranks: int) -> float:
            sent = arithmetic.bytes_per_product(n, ranks)
            return arithmetic.FLOPS * n * rows / ranks / flops + sent / bandwidth

        assert seconds(threshold, ranks) == pytest.approx(seconds(threshold, 1))
        assert seconds(1.01 * threshold, ranks) < seconds(1.01 * threshold, 1)
        assert seconds(0.99 * threshold, ranks) > seconds(0.99 * threshold, 1)
        weak = seconds(500, 1) / seconds(500 * ranks, ranks)
        assert arithmetic.efficiency(500, ranks, flops, bandwidth) == pytest.approx(weak)


@pytest.mark.skipif(not can_be_measured(), reason="it takes Linux's /proc")
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_peak_of_memory_is_what_the_arithmetic_says(ranks, placement):
    for n, peak in ranks(2, programs.peak, placement):
        parts = arithmetic.memory(n, 2, placement, layers=programs.LAYERS)
        given = 4 * n / (1 if placement == "replicated" else 2)
        # Half a vector more or less, of some ten: activations, pages, what is freed a line later.
        assert peak + given == pytest.approx(sum(parts.values()), abs=0.5 * 4 * n)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("sketch", [0, 20])
def test_the_fewest_ranks_are_enough_and_one_fewer_are_not(placement, sketch):
    for n in (1e9, 1e10, 1e11):

        def fits(ranks: int, n: float = n) -> bool:
            held = arithmetic.memory(n, ranks, placement, sketch=sketch)
            return sum(held.values()) <= arithmetic.CAPACITY

        fewest = arithmetic.fewest_ranks(n, placement, sketch=sketch)
        if fewest is None:
            assert not fits(10**6)
        else:
            assert fits(fewest)
            assert fewest == 1 or not fits(fewest - 1)


@pytest.mark.parametrize("name", arithmetic.TABLES)
def test_the_page_has_the_tables_that_are_printed(capsys, name):
    arithmetic.main([name])
    page = arithmetic.PAGE.read_text(encoding="utf-8")
    assert written(page, f"{arithmetic.COMMAND} {name}") == capsys.readouterr().out.strip()


def test_the_page_has_the_scaling_that_was_measured():
    kept = json.loads(scaling.RESULTS.read_text(encoding="utf-8"))
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert written(page, kept["command"]) == scaling.tables(kept)


def test_what_a_rank_measures_makes_a_table(ranks):
    sizes, rows = scaling.QUICK_SIZES, 32
    alone = scaling.Row("strong", "alone", 1, rows, **scaling.measure_rank("alone", sizes, rows, 1))
    found = ranks(2, scaling.measure_rank, "sharded", sizes, rows // 2, 1)[0]
    assert_tabled(alone, scaling.Row("strong", "sharded", 2, rows // 2, **found))


@pytest.mark.long
def test_scaling_is_measured_over_ranks():
    alone = scaling.measure("strong", "alone", 1, 32, quick=True)
    assert_tabled(alone, scaling.measure("strong", "sharded", 2, 16, quick=True))


def assert_tabled(alone, row):
    assert (row.ranks, row.rows, row.placement) == (2, 16, "sharded")
    assert min(row.hypergradient, row.product, row.messages) > 0
    tables = scaling.tables(scaling.record([alone, row], scaling.QUICK_SIZES))
    assert "| sharded | 2 | 16 |" in tables


def test_a_page_without_the_block_of_a_command_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- printed by: a -->\n<!-- end -->\n", encoding="utf-8")
    fill(page, "a", "figures")
    assert written(page.read_text(encoding="utf-8"), "a") == "figures"
    with pytest.raises(ValueError, match="page must have one block of 'b', got 0"):
        fill(page, "b", "figures")
