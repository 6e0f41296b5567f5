"""The benchmark of peers: that it runs, and that its page is what its last run wrote."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import checkpointed, large_models
from benchmarks.blocks import written
from peers import __main__ as program
from peers import data, growth, page, record, truth
from peers.adapters import floor, ours
from peers.environments import BY_NAME
from peers.session import Measured, Session, Task


@pytest.mark.long
def test_ours_and_the_floor_go_through_every_workload(tmp_path, capsys):
    program.main(["--quick", "--peers", "ours,floor", "--output", str(tmp_path)])
    content = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    tables = {"goals", "a", "a_profile", "b_neumann", "b_nystrom", "c", "d_sgd", "d_adam"}
    assert tables | {"d_profile", "e", "f_time", "f_memory"} == set(content["tables"])
    assert_both_have_times(content, ["a", "d_sgd", "d_adam"], tmp_path, capsys.readouterr().out)
    assert {path.name for path in tmp_path.glob("*.png")} >= {"peers_error.png", "peers_growth.png"}


def test_ours_and_the_floor_go_through_a_workload(tmp_path, capsys):
    arguments = ["--quick", "--peers", "ours,floor", "--only", "a", "--output", str(tmp_path)]
    program.main(arguments)
    content = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    tables = {"goals", "a", "a_profile", "b_neumann", "b_nystrom"}
    assert tables == set(content["tables"])
    assert_both_have_times(content, ["a"], tmp_path, capsys.readouterr().out)


def assert_both_have_times(content, names, folder, out):
    for name in names:
        rows = content["tables"][name]["rows"]
        assert {row[""].split(",")[0] for row in rows} == {"hypergrad (here)", "PyTorch"}
        assert all(row["ms"] > 0.0 and row["remark"] == "" for row in rows)
    assert (folder / "peers.md").read_text(encoding="utf-8") in out


@pytest.mark.parametrize("method", ["cg", "neumann"])
def test_ours_and_the_floor_give_one_answer(method):
    problem = data.digits_network((64, 8, 10), rows=64).to(torch.float64)
    settings = {"iterations": 200, "alpha": 1.0 / problem.facts["largest curvature"]}
    by_ours, by_hand = (m.implicit(problem, method, **settings)() for m in (ours, floor))
    assert (by_ours - by_hand).norm() < 1e-8 * by_hand.norm()
    if method == "cg":
        assert problem.error(by_ours) < 1e-6


def test_the_reference_solves_the_same_system_both_ways():
    problem = data.digits_network((64, 4, 10), rows=64).to(torch.float64)
    assert torch.allclose(truth.implicit(problem), truth.dense(problem), rtol=1e-8)


def test_what_a_peer_raises_is_a_cell_of_its_row(tmp_path):
    problem = data.random_network((3, 2, 2), 4)
    with Session(["ours"]) as session:
        path = session.file("problem", problem)
        tasks = [
            Task("ours", "unrolled", path, {"optimizer": "sgd", "steps": 0, "lr": 0.1}),
            Task("ours", "implicit", path, {"method": "no such"}),
            Task("ours", "unrolled", path, {"optimizer": "sgd", "steps": 2, "lr": 0.1}),
        ]
        failed, missing, right = session.measure(tasks, 2)
    assert record.remark(failed).startswith("ValueError: steps")
    assert record.remark(missing) == "no such method"
    assert record.remark(right) == ""
    assert len(right.seconds) == 2


def test_an_environment_that_is_not_there_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr("peers.environments.FOLDER", tmp_path)
    with Session(["higher"]) as session:
        (measured,) = session.measure([Task("higher", "unrolled", "nowhere", {})], 1)
    assert measured.failure == "not installed"


def test_growth_is_the_slope_of_logarithms():
    sizes = [10.0, 20.0, 40.0]
    assert growth.exponent(sizes, [3.0 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert growth.exponent(sizes[:1], [1.0]) is None


def test_a_goal_without_a_figure_is_not_met():
    assert not record.Goal("time", 1.0, None).met
    assert record.Goal("time", 1.0, 0.99).met
    assert not record.Goal("time", 1.0, math.nan).met


def test_the_fastest_peer_is_neither_ours_nor_the_floor():
    found = [
        Measured(Task(name, "implicit", "", {}), seconds=[seconds])
        for name, seconds in (("ours", 1.0), ("floor", 0.5), ("higher", 3.0), ("boat", 2.0))
    ]
    assert record.fastest(found).task.peer == "boat"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "a,x"], "--only must be of a, b, c, d, e, f, not 'x'"),
        (["--peers", "none"], "--peers must be of"),
        (["--repeats", "0"], "--repeats must be at least 1, not 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert message in capsys.readouterr().err


def test_the_page_is_what_its_run_wrote():
    page.main(["--check"])
    content = json.loads((record.RESULTS / "peers.json").read_text(encoding="utf-8"))
    assert set(content["versions"]) | set(content["failures"]) == set(BY_NAME)


@pytest.mark.parametrize("row", [0, pytest.param(5, marks=pytest.mark.long)])
def test_the_page_of_large_models_has_what_its_command_counts(row):
    setting = large_models.SETTINGS[row]
    cells = [*setting.cells, f"{large_models.peak(setting):.0f}"]
    page_text = large_models.PAGE.read_text(encoding="utf-8")
    assert f"| {' | '.join(cells)} |" in written(page_text, large_models.COMMAND)


@pytest.mark.parametrize("row", [1, pytest.param(5, marks=pytest.mark.long)])
def test_the_page_of_large_models_has_what_checkpoints_save(row):
    setting = checkpointed.SETTINGS[row]
    cells = [*setting.cells, f"{checkpointed.peak(setting):.0f}"]
    page_text = large_models.PAGE.read_text(encoding="utf-8")
    assert f"| {' | '.join(cells)} |" in written(page_text, checkpointed.COMMAND)
