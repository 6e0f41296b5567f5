"""The gallery's examples beside scikit-learn: what their pages claim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gallery import finish, refuses, start

import hypergrad as hg
import influence
import sklearn_penalties

ARGUMENTS = {
    "influence": (),
    "sklearn_penalties": ("--only=synthetic", "--size", "400", "40"),
}

Table = dict[str, dict[str, Any]]  # rows under what is in their first column
Runs = dict[str, list[Table]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The tables of both, run beside each other."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ARGUMENTS}
    processes = {name: start(folders[name], name, *ARGUMENTS[name]) for name in ARGUMENTS}
    return {
        name: [
            {next(iter(row.values())): row for row in rows}
            for rows in finish(process, folders[name])[1].values()
        ]
        for name, process in processes.items()
    }


def test_influence_predicts_what_training_without_a_row_does(runs: Runs) -> None:
    methods = runs["influence"][0]
    assert methods["CG"]["relative error"] < 1e-4
    assert methods["CG"]["products with H"] < methods["Dense"]["products with H"]
    for name in ("CG", "Dense", "Nyström of rank 15", "BlockCG, on each of 5 validation rows"):
        assert methods[name]["Spearman"] > 0.95, name
    assert methods["Identity"]["Spearman"] < methods["CG"]["Spearman"] - 0.2


def test_influence_finds_flipped_labels(runs: Runs) -> None:
    orders = runs["influence"][1]
    chance, harm = orders["chance"], orders["influence on the validation loss"]
    for row in (harm, orders["influence on the row's own loss"]):
        assert row["found in 10 %, %"] > 70.0
        assert row["found in 20 %, %"] > 80.0
        assert row["test loss after 10 %"] < 0.6 * chance["test loss after 10 %"]
    assert harm["test loss after 5 %"] < orders["the row's own loss"]["test loss after 5 %"]


def test_influence_on_each_row_has_the_influence_on_their_mean_as_its_mean() -> None:
    train, validation, _ = influence.load()
    problem = influence.Problem(train, validation, decay=1e-2)
    w = problem.fit(problem.ones)
    each = problem.influence_on_each(w, validation)
    torch.testing.assert_close(
        each.mean(0), problem.influence(w, hg.CG()).grads, rtol=1e-3, atol=1e-9
    )


@pytest.mark.parametrize("family", ["lasso", "elastic net", "ridge"])
def test_the_gradient_ends_where_the_grid_does_with_fewer_fits(runs: Runs, family: str) -> None:
    searches = runs["sklearn_penalties"][0]
    tuned = searches[f"{family}: gradient"]
    grids = [
        row for name, row in searches.items() if name.startswith(f"{family}:") and "CV" in name
    ]
    assert grids
    for grid in grids:
        assert tuned["validation loss"] < 1.01 * grid["validation loss"]
        assert tuned["fits"] < grid["fits"]


@pytest.mark.parametrize("family", ["lasso", "ridge"])
def test_more_penalties_fit_the_folds_better_and_groups_the_test_rows_too(
    runs: Runs, family: str
) -> None:
    searches = runs["sklearn_penalties"][0]
    kinds = "", ", one per group", ", one per feature"
    one, groups, features = (searches[f"{family}: gradient{kind}"] for kind in kinds)
    assert [row["penalties"] for row in (one, groups, features)] == [1, 4, 40]
    assert features["validation loss"] < one["validation loss"]
    assert groups["validation loss"] < one["validation loss"]
    assert groups["test loss"] < one["test loss"]


@pytest.mark.parametrize("name", ["lasso", "ridge", "elastic_net"])
def test_the_derivative_of_a_fit_is_that_of_finite_differences(name: str) -> None:
    data = sklearn_penalties.synthetic(200, 20, seed=0)
    fit = getattr(sklearn_penalties, name)(data.train)
    phi = torch.full((2 if name == "elastic_net" else 20,), -2.5, dtype=torch.float64)
    direction = torch.linspace(-1.0, 1.0, len(phi), dtype=torch.float64)

    def along(t: torch.Tensor) -> torch.Tensor:
        return sklearn_penalties.error(fit(phi + t * direction), data.test)

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(along(t), t)
    h = torch.tensor(1e-4, dtype=torch.float64)
    used = [fit(phi + side * direction) != 0 for side in (-h, h)]
    assert torch.equal(*used)  # else there is a kink between
    torch.testing.assert_close(derivative, (along(h) - along(-h)) / (2 * h), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (influence.main, ["--decay=0"], "--decay must be a positive number, not 0.0"),
        (influence.main, ["--decay=inf"], "--decay must be a positive number, not inf"),
        (sklearn_penalties.main, ["--size", "99", "20"], "must be at least 100 and 20, not 99 and"),
        (sklearn_penalties.main, ["--size", "100", "19"], "at least 100 and 20, not 100 and 19"),
        (sklearn_penalties.main, ["--only=iris"], "invalid choice: 'iris'"),
    ],
)
def test_what_they_cannot_do_is_refused(
    main: Any, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses(main, arguments, words, capsys)
