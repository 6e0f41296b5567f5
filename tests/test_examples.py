"""The examples of BilevelSolver: what a user writes, and a run that is stopped and resumed."""

from __future__ import annotations

import ast
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hypergrad as hg

ROOT = Path(__file__).parent.parent
STEPS = 16


class Run(NamedTuple):
    """What was printed, and the folder that was written to."""

    out: str
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        lines = (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [
        "examples/bilevel_training.py", f"--steps={STEPS}", f"--folder={folder}",
        f"--output={folder / 'deep' / 'history.png'}", *arguments,
    ]  # fmt: skip
    # Where this process was told to ignore Ctrl-C, as shells tell what they start with "&", the
    # child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process: subprocess.Popen[str], folder: Path) -> Run:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return Run(out, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One that nothing stops, and beside it one that is interrupted, and resumed then."""
    whole, stopped = (tmp_path_factory.mktemp(name) for name in ("whole", "stopped"))
    unharmed, process = start(whole), start(stopped)
    log = stopped / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 1):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    interrupted = finish(process, stopped)
    resumed = finish(start(stopped, "--resume"), stopped)
    return {"whole": finish(unharmed, whole), "interrupted": interrupted, "resumed": resumed}


def test_the_learned_weights_find_the_wrong_labels_and_help_on_test_rows(
    runs: dict[str, Run],
) -> None:
    out = runs["whole"].out
    accuracy = dict(re.findall(r"^(\S.+?) +\S+ +(\S+)%$", out, flags=re.MULTILINE))
    assert float(accuracy["all rows as weighted"]) > float(accuracy["all rows alike"]) + 10.0
    right, wrong = re.findall(r"0\.\d+", out[out.index("mean weight") :])
    assert float(right) > 0.7
    assert float(wrong) < 0.3


def test_event_files_hold_what_the_log_does(runs: dict[str, Run]) -> None:
    assert_events_match(runs["whole"])
    assert_events_match(runs["resumed"])


def test_ctrl_c_ends_the_run_after_a_step_and_saves_it(runs: dict[str, Run]) -> None:
    stop = re.search(r"interrupted \(Ctrl-C\) after step (\d+)", runs["interrupted"].out)
    assert stop is not None
    assert 0 < int(stop[1]) < STEPS
    assert f"going on after step {stop[1]}\n" in runs["resumed"].out


def test_a_resumed_run_is_the_uninterrupted_one(runs: dict[str, Run]) -> None:
    whole, resumed = runs["whole"], runs["resumed"]
    assert [row["step"] for row in resumed.rows] == list(range(1, STEPS + 1))
    for row, expected in zip(resumed.rows, whole.rows, strict=True):
        # A resumed loop verifies once more.
        alike = {"seconds": 0, "verification": None}
        assert {**row, **alike} == {**expected, **alike}
    table = whole.out[: whole.out.index("picture")]
    assert table in resumed.out


def test_the_history_is_drawn(runs: dict[str, Run]) -> None:
    picture = runs["whole"].folder / "deep" / "history.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_demo_asks_for_under_40_lines_which_run_by_themselves() -> None:
    source = (ROOT / "examples" / "weight_decay.py").read_text(encoding="utf-8")
    begin, end = source.index("# --- your part"), source.index("# --- the end of your part")
    part = source[begin:end]
    used = {node.id for node in ast.walk(ast.parse(part)) if isinstance(node, ast.Name)}
    imports = [
        ast.unparse(node)
        for node in ast.parse(source).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and used & {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    ]
    program = "\n".join([*imports, part])
    assert count_code(program) < 40, program
    names: dict[str, Any] = {}
    exec(program, names)
    losses = names["tune"](names["load"](), hg.CG(), 2).history["outer_loss"]
    assert losses[1] < losses[0]


def assert_events_match(run: Run) -> None:
    events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0})
    events.Reload()
    read = {
        short(tag): {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }
    written: dict[str, dict[int, float]] = {}
    for row in run.rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                # Event files are in single precision.
                single = torch.tensor(value, dtype=torch.float32).item()
                written.setdefault(short(name), {})[row["step"]] = single
    assert {"outer_loss", "test/accuracy", "mean"} <= set(read)
    assert read == written


def short(name: str) -> str:
    """The name of an outer parameter without what groups it."""
    return name.removeprefix("hparams").lstrip("/ ")


def count_code(source: str) -> int:
    """Lines that are not blank, a comment or a docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    return sum(
        line.strip() != "" and not line.lstrip().startswith("#") and number not in docstrings
        for number, line in enumerate(source.splitlines(), start=1)
    )
