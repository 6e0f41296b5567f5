"""Damaged, foreign and planted files: none is loaded, none runs code, and the loop goes on."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attacks
import odd_inputs
import pytest
import torch
from loops import ridge_solver

import hypergrad as hg
from hypergrad import bilevel as bl
from hypergrad.bilevel.checkpoints import files
from hypergrad.bilevel.checkpoints.store import checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("flips", "truncations"), [(50, 10), pytest.param(500, 100, marks=LONG)], ids=["some", "many"]
)
def test_no_damaged_checkpoint_is_loaded(tmp_path: Path, flips: int, truncations: int) -> None:
    """Of a process, and of ranks; half of the damages each."""
    for seed, path in enumerate(attacks.written(tmp_path)):
        ends = attacks.damaged(path, flips, truncations, random.Random(seed))
        assert ends == {"refused": flips + truncations}


def test_no_planted_pickle_runs(tmp_path: Path) -> None:
    count, ran, ends = attacks.run_planted(tmp_path)
    assert (count, ran) == (ends["refused or unread"], 0)
    assert count >= 15
    # The payload itself works, where it is trusted.
    sign = tmp_path / "sign"
    torch.save(attacks.Payload(sign), tmp_path / "trusted.pt")
    torch.load(tmp_path / "trusted.pt", weights_only=False)
    assert sign.exists()


@pytest.mark.parametrize("kind", ["cg", "saba"])
@pytest.mark.parametrize("most", [40, pytest.param(None, marks=LONG)])
def test_a_state_with_a_part_missing_or_changed_is_refused_whole(
    tmp_path: Path, kind: str, most: int | None
) -> None:
    ends, odd = attacks.run_mutations(tmp_path, kind, most)
    assert not odd
    assert ends["refused"] > 0.8 * ends.total()


@pytest.mark.parametrize("part", ["problem", "loop", "history", "callbacks"])
def test_a_checkpoint_without_a_part_says_which(tmp_path: Path, part: str) -> None:
    path = tmp_path / "state.pt"
    attacks.loop().save(path)
    state = files.read(path)
    del state[part]
    files.write(state, path)
    with pytest.raises(hg.CheckpointError, match=rf"state\.pt is not whole: .*'{part}'"):
        attacks.loop().load(path)


def test_a_callback_that_fails_to_load_leaves_all_as_it_was(tmp_path: Path) -> None:
    class Picky(bl.Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("no such column")

    solver = attacks.loop(callbacks=[Picky()])
    solver.run()
    solver.save(tmp_path / "state.pt")
    stopping = bl.EarlyStopping(patience=9)
    other = attacks.loop(outer_steps=2, callbacks=[Picky(), stopping])
    other.run()
    before = attacks.whole_state(other)
    with pytest.raises(hg.CheckpointError, match="cannot be loaded: 'no such column'"):
        other.load(tmp_path / "state.pt")
    assert attacks.whole_state(other) == before
    assert (other.outer_step, len(other.history), stopping.best_step) == (2, 2, 2)


def test_what_cannot_be_loaded_is_set_aside_and_the_one_before_used(tmp_path: Path) -> None:
    """A whole file of another problem, a link to nowhere, and a folder of that name."""
    ridge_solver(outer_steps=3, callbacks=[bl.Checkpoint(tmp_path)]).run()
    ridge_solver(method=hg.MINRES()).save(tmp_path / "step-00000004.pt")
    (tmp_path / "step-00000005.pt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step-00000006.pt").mkdir()
    solver = ridge_solver(outer_steps=5, callbacks=[bl.Checkpoint(tmp_path)])
    with pytest.warns(hg.CheckpointWarning) as caught:
        assert solver.resume(tmp_path)
    said = "\n".join(str(entry.message) for entry in caught)
    assert "step-00000004.pt is of another problem" in said
    assert "there is no checkpoint" in said
    assert "step-00000006.pt is damaged" in said
    assert solver.outer_step == 3
    solver.run()
    assert (tmp_path / "step-00000004.pt.refused").exists()
    assert checkpoints(tmp_path)[0] == tmp_path / "step-00000005.pt"


def test_old_files_that_cannot_be_removed_cost_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to a folder is removed itself, and what is behind it stays."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("kept")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "step-00000000.pt").symlink_to(elsewhere, target_is_directory=True)
    ridge_solver(outer_steps=2, callbacks=[bl.Checkpoint(folder, keep=1)]).run()
    assert [path.name for path in folder.iterdir()] == ["step-00000002.pt"]
    assert (elsewhere / "mine").exists()

    def refuse(path: Path, **options: Any) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    solver = ridge_solver(outer_steps=4, callbacks=[bl.Checkpoint(folder, keep=1)])
    assert solver.resume(folder)
    with pytest.warns(hg.CheckpointWarning, match=r"could not be removed .*not permitted"):
        solver.run()
    assert solver.outer_step == 4


LOGS: dict[str, Callable[[Path], bl.Callback]] = {
    "log.csv": lambda folder: bl.CSV(folder / "log.csv"),
    "log.jsonl": lambda folder: bl.JSONL(folder / "log.jsonl"),
}


def steps_in(path: Path) -> list[int]:
    lines = path.read_text().splitlines()
    if path.suffix == ".csv":
        column = lines[0].split(",").index("step")
        return [int(line.split(",")[column]) for line in lines[1:]]
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize("name", LOGS)
def test_a_folder_that_turns_read_only_costs_warnings_and_no_step(
    tmp_path: Path, name: str
) -> None:
    """A file stands where the folder was, for some steps; then all that is missing is written."""
    folder, away = tmp_path / "run", tmp_path / "away"
    solver = ridge_solver(outer_steps=6, callbacks=[bl.Checkpoint(folder), LOGS[name](folder)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", hg.CheckpointWarning)
        for record in solver:
            if record.step == 2:
                folder.rename(away)
                folder.write_text("in the way")
            if record.step == 4:
                folder.unlink()
                away.rename(folder)
    assert solver.outer_step == 6
    assert steps_in(folder / name) == [1, 2, 3, 4, 5, 6]
    assert "step-00000006.pt" in [path.name for path in checkpoints(folder)]
    said = "\n".join(str(entry.message) for entry in caught)
    assert "step-00000003.pt could not be written" in said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files")
def test_a_full_disk_costs_a_warning_and_the_logs_are_mended(tmp_path: Path) -> None:
    program = f"""
import resource, signal, warnings
from loops import ridge_solver
from hypergrad import bilevel as bl
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for log in (bl.CSV({str(tmp_path / "log.csv")!r}), bl.JSONL({str(tmp_path / "log.jsonl")!r})):
    solver = ridge_solver(outer_steps=6, callbacks=[log])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for record in solver:
            if record.step == 2:
                size = log.path.stat().st_size + 5
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            if record.step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    print(len([entry for entry in caught if "could not be written" in str(entry.message)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2"]
    for name in LOGS:
        assert steps_in(tmp_path / name) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", LOGS)
def test_a_folder_in_the_place_of_a_log_costs_a_warning(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.warns(hg.CheckpointWarning, match="could not be written .*irectory"):
        assert len(ridge_solver(callbacks=[LOGS[name](tmp_path)]).run()) == 3


@pytest.mark.parametrize("name", LOGS)
def test_a_log_behind_a_link_is_written_there(tmp_path: Path, name: str) -> None:
    target = tmp_path / "disk" / name
    (tmp_path / name).symlink_to(target)
    ridge_solver(callbacks=[LOGS[name](tmp_path)]).run()
    assert (tmp_path / name).is_symlink()
    assert steps_in(target) == [1, 2, 3]


@pytest.mark.parametrize("name", LOGS)
def test_a_relative_folder_is_the_one_at_the_start(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    callbacks = [bl.Checkpoint("run"), LOGS[name](Path("run"))]
    for _ in ridge_solver(outer_steps=2, callbacks=callbacks):
        monkeypatch.chdir(tmp_path / "there")
    assert len(checkpoints(tmp_path / "run")) == 2
    assert steps_in(tmp_path / "run" / name) == [1, 2]
    assert not list((tmp_path / "there").iterdir())


BROKEN = {
    "cut": lambda line: line[: len(line) // 2],
    "text": lambda line: b"what is this",
    "zeros": lambda line: bytes(len(line)),
    "latin": lambda line: b"\xe9" + line,
    "quote": lambda line: b'"' + line,
    "no step": lambda line: b"{}" if line.startswith(b"{") else b"," * line.count(b","),
}


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_last_line_is_mended_and_an_earlier_one_told(
    tmp_path: Path, name: str, damage: str
) -> None:
    def make() -> hg.BilevelSolver:
        return ridge_solver(outer_steps=4, callbacks=[LOGS[name](tmp_path)])

    began = make()
    for record in began:
        if record.step == 3:
            break
    began.save(tmp_path / "state.pt")
    lines = (tmp_path / name).read_bytes().split(b"\n")[:-1]
    for broken, ending in ((-1, b"\n"), (-1, b""), (-2, b"\n")):
        changed = [*lines]
        changed[broken] = BROKEN[damage](lines[broken])
        (tmp_path / name).write_bytes(b"\n".join(changed) + ending)
        resumed = make()
        resumed.load(tmp_path / "state.pt")
        if broken == -1:
            resumed.run()
            # The row of the step that was lost is in no other file; the steps to come are.
            assert steps_in(tmp_path / name) == [1, 2, 4]
        else:
            number = len(lines) - 1
            kept = (tmp_path / name).read_bytes()
            with pytest.raises(ValueError, match=rf"path must be .* line {number} is broken \("):
                resumed.run()
            assert (tmp_path / name).read_bytes() == kept


@pytest.mark.parametrize("name", LOGS)
def test_names_with_control_characters_are_escaped(tmp_path: Path, name: str) -> None:
    odd = 'a\nb\r\x00\x1b[31m,"\u2028\ud800'

    class Odd(bl.Callback):
        def measure(self, solver: bl.BilevelSolver, record: bl.Record) -> Mapping[str, float]:
            return {odd: 0.5} if record.step > 1 else {}

    ridge_solver(callbacks=[LOGS[name](tmp_path), Odd()]).run()
    content = (tmp_path / name).read_bytes()
    assert not set(content) & ({*range(32), 127} - {ord("\n")})
    assert content.count(b"\n") == 3 + name.endswith("csv")
    assert rb"a\nb\r" in content
    assert steps_in(tmp_path / name) == [1, 2, 3]


@LONG
def test_two_processes_in_one_folder_leave_whole_files(tmp_path: Path) -> None:
    """Both run from the start; each file is one of theirs, and the same."""
    program = f"""
import warnings
from loops import ridge_solver
from hypergrad import bilevel as bl
warnings.simplefilter("ignore")
folder = {str(tmp_path)!r}
solver = ridge_solver(outer_steps=40, callbacks=[
    bl.Checkpoint(folder, keep=5, overwrite=True), bl.JSONL(folder + "/log.jsonl")])
solver.run()
"""
    command, folder = [sys.executable, "-c", program], Path(__file__).parent
    both = [subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
    alone = ridge_solver(outer_steps=40)
    alone.run()
    assert checkpoints(tmp_path)
    for path in checkpoints(tmp_path):
        solver = ridge_solver(outer_steps=40)
        solver.load(path)
        solver.run()
        assert torch.equal(solver.hparams, alone.hparams)
    assert not list(tmp_path.glob("*.pt.*"))


@pytest.mark.parametrize("most", [60, pytest.param(None, marks=LONG)])
def test_odd_inputs_are_right_or_told_and_leave_no_trace(most: int | None) -> None:
    ends, obscure, changed = odd_inputs.run(most)
    assert not obscure
    assert not changed
    assert min(ends["fine"], ends["told"]) > 0.3 * ends.total()
