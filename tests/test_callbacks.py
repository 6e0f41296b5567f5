"""What listens to a loop: what it writes, when it stops it, and that it comes back with it."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import FEATURES, TRAIN, VALIDATION, digits_solver, outer, ridge_solver, shuffled
from torch import Tensor, nn

import hypergrad as hg
from hypergrad import bilevel as bl
from hypergrad.bilevel.checkpoints.store import checkpoints


def test_callbacks_are_called_in_their_order() -> None:
    calls: list[str] = []

    class Loud(bl.Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_start(self, solver: bl.BilevelSolver) -> None:
            calls.append(f"{self.name} start {solver.outer_step}")

        def measure(self, solver: bl.BilevelSolver, record: bl.Record) -> Mapping[str, float]:
            calls.append(f"{self.name} measure {len(solver.history)}")
            return {self.name: float(record.step)}

        def on_step(self, solver: bl.BilevelSolver, record: bl.Record) -> None:
            # The row is in the history, with what every callback has measured.
            assert solver.history[-1]["a"] == solver.history[-1]["b"] == record["b"]
            calls.append(f"{self.name} step {record.step}")

        def on_end(self, solver: bl.BilevelSolver, error: BaseException | None) -> None:
            calls.append(f"{self.name} end {error}")

    class Saving(Loud):
        saves = True

    ridge_solver(outer_steps=1, callbacks=[Saving("a"), Loud("b")]).run()
    assert calls == [
        "b start 0", "a start 0", "b measure 0", "a measure 0", "b step 1", "a step 1",
        "b end None", "a end None",
    ]  # fmt: skip


def test_every_callback_hears_of_an_error() -> None:
    heard: list[Any] = []

    class Listening(bl.Callback):
        def on_end(self, solver: bl.BilevelSolver, error: BaseException | None) -> None:
            heard.append(error)
            raise RuntimeError("while closing")

    class Failing(Listening):
        def on_step(self, solver: bl.BilevelSolver, record: bl.Record) -> None:
            raise ValueError("mine")

    with pytest.raises(RuntimeError, match="while closing"):
        ridge_solver(callbacks=[Listening(), Failing()]).run()
    assert len(heard) == 2
    assert all(isinstance(error, ValueError) for error in heard)


def test_progress_shows_losses_and_the_receipt_of_the_solve() -> None:
    screen = io.StringIO()
    bar = bl.ProgressBar(file=screen, mininterval=0.0, ncols=160, desc="tuning")
    history = ridge_solver(callbacks=[bar]).run()
    last = screen.getvalue().rstrip().split("\r")[-1]
    row = history[-1]
    assert last.startswith("tuning: 3/3 |")
    assert f"inner {row['inner_loss']:#.4g}, outer {row['outer_loss']:#.4g}" in last
    assert last.endswith(f"CONVERGED in {row['iterations']}")


def test_progress_shows_the_residual_of_a_solve_that_failed() -> None:
    screen = io.StringIO()
    bar = bl.ProgressBar(file=screen, mininterval=0.0, ncols=160)
    method = hg.CG(maxiter=1)
    history = ridge_solver(method=method, on_failure="ignore", callbacks=[bar]).run()
    residual = f"MAX_ITERATIONS in 1, residual {history[-1]['relative_residual']:.0e}"
    assert screen.getvalue().rstrip().endswith(residual)


def test_progress_goes_on_where_the_loop_does() -> None:
    screen = io.StringIO()
    solver = ridge_solver(outer_steps=4, callbacks=[bl.ProgressBar(file=screen, mininterval=0.0)])
    solver.step()
    solver.run()
    first = screen.getvalue().split("\r")[1]
    assert "1/4" in first


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    return [json.loads(line) for line in text.splitlines()]


def as_number(value: Any) -> float | None:
    return None if value in (None, "") else float(value)


TABLES: dict[str, Any] = {"log.csv": bl.CSV, "log.jsonl": bl.JSONL}


class EveryOther(bl.Callback):
    """A column that begins late and has gaps."""

    def measure(self, solver: bl.BilevelSolver, record: bl.Record) -> Mapping[str, float]:
        return {} if record.step % 2 else {"late": 0.1 * record.step}


@pytest.mark.parametrize("name", TABLES)
def test_tables_hold_the_history(tmp_path: Path, name: str) -> None:
    path = tmp_path / "deep" / name
    solver = ridge_solver(outer_steps=5, callbacks=[TABLES[name](path), EveryOther()])
    history = solver.run()
    rows = rows_of(path)
    assert len(rows) == 5
    for column in ("step", "outer_loss", "hparams[2]", "late", "relative_residual"):
        assert [as_number(row.get(column)) for row in rows] == history[column], column
    assert [row["status"] for row in rows] == history["status"]


def test_a_new_run_hides_the_events_of_the_one_before(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (6, 3):
        ridge_solver(outer_steps=steps, callbacks=[bl.TensorBoard(tmp_path)]).run()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("outer_loss")] == [1, 2, 3]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("torn", ["", '{"step": 4, "inner_l', "4,1,0.3"])
def test_tables_go_on_where_the_loop_does(tmp_path: Path, name: str, torn: str) -> None:
    """Rows after the checkpoint, and one that was cut off, are made again."""

    def make(steps: int, every: int) -> hg.BilevelSolver:
        callbacks = [
            TABLES[name](tmp_path / name), EveryOther(),
            bl.Checkpoint(tmp_path / "saved", every=every),
        ]  # fmt: skip
        return ridge_solver(inner_loader=shuffled(), outer_steps=steps, callbacks=callbacks)

    make(2, 2).run()
    began = make(6, 100)
    assert began.resume(tmp_path / "saved")
    for _ in began:
        began.stop()
    for newer in checkpoints(tmp_path / "saved")[:1]:
        newer.unlink()
    with (tmp_path / name).open("a", encoding="utf-8") as file:
        file.write(torn)
    resumed = make(6, 2)
    assert resumed.resume(tmp_path / "saved")
    assert resumed.outer_step == 2
    history = resumed.run()
    rows = rows_of(tmp_path / name)
    assert [as_number(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [as_number(row["outer_loss"]) for row in rows] == history["outer_loss"]
    assert [as_number(row.get("late")) for row in rows] == history["late"]


def test_a_new_run_begins_a_new_table(tmp_path: Path) -> None:
    for _ in range(2):
        ridge_solver(callbacks=[bl.CSV(tmp_path / "log.csv")]).run()
    assert len(rows_of(tmp_path / "log.csv")) == 3


def test_tensorboard_reads_back_what_the_history_holds(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def make(steps: int) -> hg.BilevelSolver:
        return ridge_solver(
            outer_steps=steps,
            callbacks=[bl.TensorBoard(tmp_path / "events"), bl.Checkpoint(tmp_path / "saved")],
        )

    make(3).run()
    resumed = make(5)
    resumed.resume(tmp_path / "saved")
    history = resumed.run()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert "step" not in events.Tags()["scalars"]
    for column, tag in [("outer_loss",) * 2, ("iterations",) * 2, ("hparams[0]", "hparams/[0]")]:
        scalars = events.Scalars(tag)
        assert [event.step for event in scalars] == [1, 2, 3, 4, 5]
        # Event files hold float32.
        expected = torch.tensor(history[column], dtype=torch.float32)
        torch.testing.assert_close(torch.tensor([event.value for event in scalars]), expected)


def test_evaluation_averages_over_a_third_loader() -> None:
    X, y = VALIDATION
    parts = [(X[:10], y[:10]), (X[10:], y[10:])]

    def test_loss(w: Tensor, decay: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return outer(w, decay, batch), {"first": batch[1][0]}

    evaluation = bl.Evaluation(
        test_loss, parts, name="held out", every=2, weight=lambda batch: len(batch[1])
    )
    solver = ridge_solver(outer_steps=4, callbacks=[evaluation])
    losses = []
    for _ in solver:
        losses.append(float(outer(solver.params, solver.hparams, VALIDATION)))
    history = solver.history
    assert history["held out/loss"] == [None, pytest.approx(losses[1]), None,
                                        pytest.approx(losses[3])]  # fmt: skip
    assert history["held out/first"][1] == pytest.approx(float(y[0] + 2 * y[10]) / 3)


def test_evaluation_leaves_modules_and_random_state_alone() -> None:
    modes: list[bool] = []

    def spy(model: nn.Module, hparams: Any, batch: Any) -> Tensor:
        modes.append(model.training)
        x, labels = batch
        logits = model(x)
        return nn.functional.cross_entropy(logits, labels) + 0.0 * torch.rand(())

    def make(*callbacks: bl.Callback) -> hg.BilevelSolver:
        return digits_solver(bl.T1T2(), outer_steps=3, callbacks=callbacks)

    batch = [(torch.rand(8, 64), torch.arange(8))]
    plain = make()
    plain.run()
    expected = [b.clone() for b in plain.modules[0].buffers()]
    solver = make(bl.Evaluation(spy, batch))
    solver.modules[0].layers[3].eval()
    solver.modules[0].layers[3].train()
    solver.run()
    assert modes == [False] * 3
    assert solver.modules[0].training
    assert all(map(torch.equal, solver.modules[0].buffers(), expected))
    for name, leaf in plain.params.items():
        assert torch.equal(solver.params[name], leaf)


@pytest.mark.parametrize(
    ("mistake", "error", "message"),
    [
        (lambda: bl.Evaluation(outer, iter([1])), TypeError, "loader must be iterable again"),
        (lambda: bl.Evaluation(outer, [1], every=0), ValueError, "every must be at least 1"),
        (lambda: bl.Checkpoint("x", keep=0), ValueError, "keep must be at least 1"),
        (lambda: bl.EarlyStopping(patience=0), ValueError, "patience must be at least 1"),
        (lambda: bl.EarlyStopping(mode="best"), ValueError, "mode must be one of 'min', 'max'"),
        (lambda: bl.EarlyStopping(min_delta=-1.0), ValueError, "min_delta must be"),
        (lambda: bl.Timer(limit=0.0), ValueError, "limit must be a finite number > 0"),
        (
            lambda: ridge_solver(callbacks=[bl.Evaluation(outer, [])]).run(),
            ValueError,
            "the loader of test must hold at least one batch",
        ),
        (
            lambda: ridge_solver(callbacks=[bl.EarlyStopping("accuracy", patience=2)]).run(),
            hg.HypergradWarning,
            "monitor must be a column of the history, got 'accuracy'; there are step, inner_steps",
        ),
    ],
    ids=lambda value: "",
)
def test_mistakes_are_named(mistake: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mistake()


class Scripted(bl.Callback):
    """A column with given values."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def measure(self, solver: bl.BilevelSolver, record: bl.Record) -> Mapping[str, float]:
        return {"score": self.values[record.step - 1]}


@pytest.mark.parametrize(
    ("values", "options", "stopped", "best"),
    [
        ([5.0, 4.0, 4.5, 4.2, 9.0, 1.0], {"patience": 3}, 5, 4.0),
        ([5.0, 4.0, 4.5, 3.9, 4.0, 4.0], {"patience": 3}, 6, 3.9),
        ([1.0, 2.0, 1.5, 1.6, 3.0, 3.0], {"patience": 2, "mode": "max"}, 4, 2.0),
        ([5.0, 4.95, 4.9, 4.8, 4.7, 4.6], {"patience": 2, "min_delta": 0.2}, 3, 5.0),
    ],
)
def test_early_stopping(
    values: list[float], options: dict[str, Any], stopped: int, best: float
) -> None:
    stopping = bl.EarlyStopping("score", **options)
    solver = ridge_solver(outer_steps=6, callbacks=[stopping, Scripted(values)])
    solver.run()
    assert solver.outer_step == stopped
    assert stopping.best == best
    ended_early = stopped < 6 or options["patience"] == 2
    assert (solver.stop_reason is not None) == ended_early


def test_early_stopping_is_resumed_with_the_loop(tmp_path: Path) -> None:
    values = [5.0, 4.0, 4.5, 4.2, 9.0, 1.0]

    def make() -> hg.BilevelSolver:
        stopping = bl.EarlyStopping("score", patience=3)
        # A checkpoint that stands first still hears of the step last.
        callbacks = [bl.Checkpoint(tmp_path), stopping, Scripted(values)]
        return ridge_solver(outer_steps=6, callbacks=callbacks)

    for record in make():
        if record.step == 4:
            break
    resumed = make()
    assert resumed.resume(tmp_path)
    resumed.run()
    assert resumed.outer_step == 5


def test_the_timer_counts_over_resumptions_and_stops(tmp_path: Path) -> None:
    class Slow(bl.Callback):
        def on_step(self, solver: bl.BilevelSolver, record: bl.Record) -> None:
            time.sleep(0.02)

    def make(limit: float | None) -> hg.BilevelSolver:
        return ridge_solver(
            outer_steps=1000 if limit else 5,
            callbacks=[bl.Timer(limit), Slow(), bl.Checkpoint(tmp_path)],
        )

    elapsed = make(None).run()["elapsed"]
    assert elapsed == sorted(elapsed)
    assert elapsed[-1] > 4 * 0.02
    resumed = make(limit=elapsed[-1] + 0.1)
    assert resumed.resume(tmp_path)
    later = resumed.run()["elapsed"]
    assert later[:5] == elapsed
    assert later[5] > elapsed[-1]
    assert resumed.outer_step < 1000
    assert resumed.stop_reason is not None
    assert "s have passed" in resumed.stop_reason


def test_the_history_is_a_table(tmp_path: Path) -> None:
    history = ridge_solver(outer_steps=4, callbacks=[EveryOther()]).run()
    frame = history.to_pandas()
    assert list(frame.columns) == history.columns
    assert len(frame) == len(history) == 4
    assert frame["outer_loss"].tolist() == history["outer_loss"]
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    assert history["late"] == [None, pytest.approx(0.2), None, pytest.approx(0.4)]
    assert "multiplier" not in history.columns
    with pytest.raises(KeyError, match="no column 'loss'; there are step, inner_steps"):
        history["loss"]
    twin = bl.History()
    twin.load_state_dict(history.state_dict())
    assert list(twin) == list(history)


@pytest.mark.parametrize("method", [hg.CG(), bl.DARTS(), hg.single_loop.F2SA()])
def test_a_plot_shows_what_the_history_holds(tmp_path: Path, method: Any) -> None:
    history = ridge_solver(method=method, outer_steps=5).run()
    path = tmp_path / "deep" / "history.png"
    figure = hg.plot(history, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    solves = ["Linear solves"] if isinstance(method, hg.CG) else []
    assert titles == ["Losses", "Norms", *solves, "Outer parameters"]
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    assert lines["outer loss"].get_ydata().tolist() == history["outer_loss"]
    assert lines[f"hparams[{FEATURES - 1}]"].get_ydata().tolist() == history["hparams[4]"]


def test_a_plot_has_a_panel_for_metrics() -> None:
    history = digits_solver(bl.T1T2(), outer_steps=3).run()
    axes = hg.plot(history).axes[-1]
    assert axes.get_title() == "Metrics"
    (line,) = (line for line in axes.get_lines() if line.get_label() == "inner/accuracy")
    assert line.get_ydata().tolist() == history["inner/accuracy"]


def test_a_plot_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="history must have at least one row"):
        hg.plot(bl.History())
    with pytest.raises(TypeError, match=r"history must be solver\.history, got list"):
        hg.plot([])  # type: ignore[arg-type]
    assert TRAIN[0].shape[1] == FEATURES
