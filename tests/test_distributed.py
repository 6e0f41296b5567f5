"""Any number of ranks gives the answer of one process, says what it sends, and fails together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import distributed_programs as programs
import pytest
import torch
from ranks import Ranks

import hypergrad as hg
from hypergrad import tree as tr


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.close()


def difference(a: object, b: object) -> float:
    return tr.norm(tr.subtract(a, b)) / tr.norm(b)


EVERY = tuple(programs.METHODS)
FEW = programs.FEW
BOTH = ("replicated", "sharded-params")
CASES = {
    "1-mlp": (1, "mlp", FEW, BOTH),
    "2-mlp, replicated": (2, "mlp", EVERY, ("replicated",)),
    "2-mlp, sharded": (2, "mlp", EVERY, ("sharded-params",)),
    "2-cnn": (2, "cnn", ("cg", "nystrom", "adam-graph"), (*BOTH, "sharded-columns")),
    "3-mlp": (3, "mlp", FEW, ("replicated", "sharded-both")),
    "3-cnn": (3, "cnn", ("cg", "sgd-recompute"), BOTH),
    "4-mlp": (4, "mlp", ("cg", "sgd-recompute"), ("replicas-of-shards",)),
    "4-cnn": (4, "cnn", ("cg", "nystrom"), ("shards-of-shards",)),
}
"""Every method, placement, model and number of ranks, but not all of them with each other."""
ALL = {
    "all, 1-mlp": (1, "mlp", EVERY, BOTH),
    "all, 1-cnn": (1, "cnn", FEW, BOTH),
    "all, 2-mlp": (2, "mlp", EVERY, (*BOTH, "sharded-both")),
    "all, 2-cnn": (2, "cnn", FEW, (*BOTH, "sharded-columns")),
    "all, 3-mlp": (3, "mlp", FEW, (*BOTH, "sharded-both")),
    "all, 3-cnn": (3, "cnn", FEW, BOTH),
    "all, 4-mlp": (4, "mlp", FEW, (*BOTH, "replicas-of-shards")),
    "all, 4-cnn": (4, "cnn", FEW, (*BOTH, "shards-of-shards")),
}


@pytest.mark.parametrize(
    ("size", "model", "methods", "placements"),
    [
        *(pytest.param(*case, id=name) for name, case in CASES.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.long) for name, case in ALL.items()),
    ],
)
def test_every_method_gives_the_answer_of_one_process(ranks, size, model, methods, placements):
    problem = programs.MODELS[model]()
    found = ranks(size, programs.all_hypergradients, model, placements, methods)[0]
    wrong = []
    for name in methods:
        expected = programs.METHODS[name](*problem.objectives(), problem.params, problem.hparams)
        for placement, grads in zip(placements, found, strict=True):
            error = difference(grads[name], tr.detach(expected))
            if not error <= programs.TOLERANCES.get(name, 1e-10):
                wrong.append(f"{placement}, {name}: {error:.1e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("size", [2, 3])
def test_objectives_on_dtensors_give_the_answer_of_one_process(ranks, size):
    problem = programs.mlp(24)
    expected = {
        name: programs.METHODS[name](*problem.objectives(), problem.params, problem.hparams)
        for name in programs.NATIVE
    }
    found = ranks(size, programs.native_hypergradients)[0]
    assert {
        name: difference(found[name], expected[name]) < 1e-10 for name in expected
    } == dict.fromkeys(expected, True)


@pytest.mark.parametrize("size", [2, 3])
def test_a_product_is_communicated_once(ranks, size):
    n = tr.size(programs.mlp().params)
    for counts in ranks(size, programs.messages, "replicated"):
        assert counts["product"] == [("all_reduce", n)]
        assert counts["block"] == [("all_reduce", 3 * n)]
        assert [name for name, _ in counts["solve"]] == ["all_reduce"] * counts["matvecs"]
    for counts in ranks(size, programs.messages, "sharded-params"):
        names = [name for name, _ in counts["product"]]
        assert names == ["all_gather", "reduce_scatter"]
        # Shards are padded to equal lengths: by less than a row of each leaf a rank.
        for _, elements in counts["product"]:
            assert (
                n
                <= elements
                <= n + size * sum(leaf[0].numel() for leaf in programs.mlp().params.values())
            )
        names = [name for name, _ in counts["solve"]]
        assert names.count("all_gather") == names.count("reduce_scatter") == counts["matvecs"]
        assert max((k for name, k in counts["solve"] if name == "sum"), default=0) == 1
        assert names.count("sum") <= counts["inner_products"]


@pytest.mark.parametrize("size", [2, 3])
def test_means_over_batches_of_each_rank_give_the_answer_of_one_process(ranks, size):
    problem = programs.mlp()
    found = ranks(size, programs.averaged_hypergradients, ("replicated", "sharded-both"))[0]
    for name in programs.AVERAGED:
        expected = programs.METHODS[name](*problem.objectives(), problem.params, problem.hparams)
        for grads in found:
            assert difference(grads[name], tr.detach(expected)) < 1e-10, name


@pytest.mark.parametrize("size", [2, 3])
def test_a_product_over_several_batches_of_a_rank_is_communicated_once(ranks, size):
    n = tr.size(programs.mlp().params)
    for counts in ranks(size, programs.averaged_messages, "replicated"):
        # The one number says whether a rank failed.
        assert counts["product"] == [("all_reduce", 1), ("all_reduce", n)]
        assert counts["block"] == [("all_reduce", 1), ("all_reduce", 3 * n)]
    for counts in ranks(size, programs.averaged_messages, "sharded-params"):
        for kind in ("product", "block"):
            names = [name for name, _ in counts[kind]]
            assert names == ["all_gather", "all_reduce", "reduce_scatter"]


def test_the_loop_communicates_a_product_over_several_batches_once(ranks):
    for matvecs, messages in ranks(2, programs.loop_messages):
        # Three inner steps, the gradients of f and g, and the products but for the mixed one.
        assert messages == 3 + 2 + matvecs - 1


def test_vectors_of_a_solver_take_a_part_of_the_memory_on_each_rank(ranks):
    whole = ranks(1, programs.elements_of_a_sketch)[0]
    for size in (2, 4):
        for part in ranks(size, programs.elements_of_a_sketch):
            # A leaf of r rows has at most ceil(r / size) of them on a rank.
            assert part <= whole / size + 5 * sum(
                leaf[0].numel() for leaf in programs.wide().values()
            )


def test_the_vectors_of_cg_take_a_part_of_the_memory_on_each_rank(ranks):
    whole = ranks(1, programs.elements_of_cg)[0]
    assert whole == 3 * tr.size(programs.wide())
    for size in (2, 4):
        for part in ranks(size, programs.elements_of_cg):
            # As above; x, r and p.
            assert part <= whole / size + 3 * sum(
                leaf[0].numel() for leaf in programs.wide().values()
            )


def test_the_average_of_local_inverses_is_another_quantity(ranks):
    problem = programs.mlp()
    exact = programs.METHODS["dense"](*problem.objectives(), problem.params, problem.hparams)
    ours, of_local_inverses = ranks(3, programs.both_averages)[0]
    assert difference(ours, exact) < 1e-10
    assert difference(of_local_inverses, exact) > 0.02


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.long), 3])
@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (programs.nan_on_one, "NonFiniteError", "inner must return a finite value, got nan"),
        (programs.raise_on_one, "DistributedError", "rank 1: KeyError: 'no such column'"),
        (programs.unlike_params, "DistributedError", "must agree in params"),
        (programs.unlike_hparams, "DistributedError", "must agree in hparams"),
        (programs.unlike_seeds, "DistributedError", "must agree in their random states"),
        (programs.bad_weight, "DistributedError", "weight must be a finite number > 0"),
        (programs.no_scalar, "DistributedError", "objective must return a scalar tensor, got (3,)"),
        (programs.later_batch_fails, "DistributedError", "rank 1: KeyError: 'no such column'"),
        (programs.loader_fails, "DistributedError", "LoaderError: inner.loader raised OSError"),
    ],
)
def test_what_fails_on_one_rank_stops_all_in_the_same_words(ranks, size, failure, kind, words):
    errors = ranks.errors(size, failure)
    assert {error[0] for error in errors} == {kind}
    assert len({error[1] for error in errors}) == 1
    assert words in errors[0][1]


def test_params_on_another_mesh_are_refused(ranks):
    for kind, words in ranks.errors(4, programs.half_a_mesh):
        assert kind == "ValueError"
        assert "sharded over all 4 ranks" in words


def test_forward_mode_is_refused_for_dtensors(ranks):
    for kind, words in ranks.errors(2, programs.forward_mode):
        assert kind == "ValueError"
        assert "mode must not be 'forward' for DTensors" in words


def test_a_rank_that_dies_ends_the_others(ranks):
    outcomes = ranks.outcomes(3, programs.die_on_one)
    assert outcomes[1].status == 3
    for survivor in (outcomes[0], outcomes[2]):
        assert survivor.status == 0
        assert survivor.error[0] == "RuntimeError"


def test_ranks_whose_objective_is_linear_keep_none_waiting(ranks):
    expected, found = ranks(3, programs.linear_on_one)[0]
    assert difference(found, expected) < 1e-10


@pytest.mark.parametrize("count", [2, 7])
def test_tasks_come_back_in_order_on_all_ranks(ranks, count):
    assert ranks(3, programs.squares, count) == [[k**2 for k in range(count)]] * 3


def test_a_failed_task_is_told_to_all_ranks(ranks):
    errors = ranks.errors(2, programs.failing_task)
    assert errors == [("DistributedError", "rank 1: ZeroDivisionError: division by zero")] * 2


def test_maml_over_ranks_is_maml(ranks):
    expected, found = ranks(3, programs.maml)[0]
    assert difference(found, expected) < 1e-12


def test_a_fully_sharded_module_goes_by_finite_differences(ranks):
    for expected, found, warned, kept in ranks(2, programs.fully_sharded):
        assert difference(found, expected) < 1e-6
        assert warned == ["DoubleBackwardWarning"]
        assert kept
    for kind, _ in ranks.errors(2, programs.fully_sharded_in_reverse):
        assert kind == "DoubleBackwardError"


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("implicit", "ValueError"),
        ("unrolled", "ValueError"),
        ("loop", "ValueError"),
        ("shared", "DistributedError"),
        ("alone", "DistributedError"),
    ],
)
def test_functional_call_of_a_fully_sharded_module_is_refused(ranks, how, kind):
    for error, words in ranks.errors(2, programs.functional_call_of_fully_sharded, how):
        assert error == kind
        assert "objectives must not call a module of fully_shard" in words
        assert "use hypergrad.distributed.WholeModule(module, loss)" in words


def test_a_frozen_fully_sharded_module_may_make_features(ranks):
    for expected, found in ranks(2, programs.fully_sharded_features):
        assert difference(found, expected) < 1e-10


def test_dropout_differs_between_ranks_and_not_between_products(ranks):
    found = ranks(3, programs.dropout)
    for asymmetry, same_values, other_values, states_differ in found:
        assert asymmetry < 1e-12
        assert same_values
        assert other_values
        assert not states_differ
    for asymmetry, as_one in ranks(3, programs.averaged_dropout):
        assert asymmetry < 1e-12
        assert as_one
    # Rank by rank another mask: the values of the ranks' own objectives differ.
    assert len(set(ranks(3, programs.own_masks))) == 3


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("replicated", "cg"),
        ("sharded-params", "unrolled"),
        ("sharded-params", "soba"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("replicated", "unrolled"),
                ("replicated", "soba"),
                ("sharded-params", "cg"),
            )
        ),
    ],
)
def test_a_run_goes_on_with_fewer_ranks(ranks, tmp_path, kind, method):
    whole = programs.loop_alone(method, 6)
    for size, steps in ((4, 2), (2, 4), (1, 6)):
        ranks(size, programs.loop, kind, method, steps, str(tmp_path))
    *_, (params, hparams, history) = ranks(2, programs.loop, kind, method, 6, str(tmp_path))
    assert difference(params, whole[0]) < 1e-10
    assert difference(hparams, whole[1]) < 1e-10
    assert history == pytest.approx(whole[2], rel=1e-10)
    # Only the first rank writes.
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 7


def test_a_checkpoint_of_ranks_is_read_without_them(ranks, tmp_path):
    ranks(3, programs.loop, "replicated", "cg", 4, str(tmp_path))
    params, hparams, _ = programs.loop_alone("cg", 6, tmp_path)
    whole = programs.loop_alone("cg", 6)
    assert difference(params, whole[0]) < 1e-10
    assert difference(hparams, whole[1]) < 1e-10


def test_a_damaged_checkpoint_is_told_from_a_good_one(ranks, tmp_path):
    ranks(2, programs.loop, "sharded-params", "cg", 4, str(tmp_path))
    newest = sorted(tmp_path.glob("step-*.dcp"))[-1]
    next(newest.glob("*.distcp")).write_bytes(b"")
    with pytest.warns(hg.CheckpointWarning, match="is damaged"):
        programs.loop_alone("cg", 6, tmp_path)


def test_a_stop_on_one_rank_stops_all(ranks):
    assert ranks(3, programs.stop_on_one) == [(2, "enough")] * 3


@pytest.mark.parametrize(
    ("group", "error", "words"),
    [
        (None, ValueError, "group must be a process group, but torch.distributed is not init"),
    ],
)
def test_ranks_must_have_been_started(group, error, words):
    with pytest.raises(error, match=words):
        hg.distributed.DataParallel(lambda params, hparams: params, group=group)


def test_importing_brings_no_dtensors():
    code = "import sys, hypergrad; assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_iterates_can_be_kept_elsewhere():
    problem = programs.mlp()
    f, g = problem.objectives()
    method = hg.Unrolled(hg.optimizers.Adam(lr=0.05), 6)
    expected = hg.hypergradient(f, g, problem.params, problem.hparams, method=method).grads
    kept: list[torch.Tensor] = []

    def put(tensor: torch.Tensor) -> int:
        kept.append(tensor.clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(put, kept.__getitem__):
        found = hg.hypergradient(f, g, problem.params, problem.hparams, method=method).grads
    assert difference(found, expected) == 0.0
    assert sum(tensor.numel() for tensor in kept) >= 6 * 3 * tr.size(problem.params)
