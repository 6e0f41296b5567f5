"""The gallery's examples beside scikit-learn, at a small size: what their pages claim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

Table = dict[str, dict[str, Any]]

SMALL = {
    "influence": ("--retrain=40", "--draws=1", "--repeats=1"),
    "sklearn_penalties": ("--only=synthetic", "--rows=400", "--features=40", "--folds=3"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each example's results, all run beside each other."""
    folders = {name: tmp_path_factory.mktemp(name) for name in SMALL}
    processes = {
        name: subprocess.Popen(
            [
                sys.executable,
                f"examples/{name}.py",
                *SMALL[name],
                f"--output={folder / 'deep' / 'picture.png'}",
                f"--results={folder / 'deep' / 'results.json'}",
            ],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name, folder in folders.items()
    }
    for name, process in processes.items():
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "picture: " in out, name
        assert "Warning" not in errors, errors
    return folders


def table(runs: dict[str, Path], name: str, column: str) -> Table:
    """The rows by what is in their column."""
    record = json.loads((runs[name] / "deep" / "results.json").read_text(encoding="utf-8"))
    return {row[column]: row for row in record["rows"] if column in row}


@pytest.mark.parametrize("name", SMALL)
def test_the_picture_is_drawn(runs: dict[str, Path], name: str) -> None:
    assert (runs[name] / "deep" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_influence_predicts_what_training_without_a_row_does(runs: dict[str, Path]) -> None:
    methods = table(runs, "influence", "method")
    assert methods["CG"]["relative error"] < 1e-4
    assert methods["CG"]["products"] < methods["Dense"]["products"]
    for name in ("CG", "Dense", "Nyström, rank 15", "BlockCG, 5 hardest rows"):
        assert methods[name]["Spearman"] > 0.9, name
    assert methods["Identity"]["Spearman"] < methods["CG"]["Spearman"] - 0.1


def test_influence_finds_flipped_labels(runs: dict[str, Path]) -> None:
    orders = table(runs, "influence", "order")
    chance = orders["chance"]
    for name in ("influence on the validation loss", "influence on the row's own loss"):
        assert orders[name]["precision at k"] > 0.6
        assert orders[name]["found at 20 %"] > 0.8
        assert orders[name]["at 10 %"] < 0.7 * chance["at 10 %"]


@pytest.mark.parametrize("family", ["lasso", "elastic net", "ridge"])
def test_the_gradient_ends_where_the_grid_does_with_fewer_fits(
    runs: dict[str, Path], family: str
) -> None:
    searches = table(runs, "sklearn_penalties", "search")
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
    runs: dict[str, Path], family: str
) -> None:
    searches = table(runs, "sklearn_penalties", "search")
    one, groups, features = (
        searches[f"{family}: gradient{kind}"] for kind in ("", ", 4 groups", ", 40 features")
    )
    assert features["validation loss"] < one["validation loss"]
    assert groups["validation loss"] < one["validation loss"]
    assert groups["test loss"] < one["test loss"]
