"""Checkpoints: whole or not at all, refused where they do not fit, bit for bit where they do."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optree
import pytest
import torch
from loops import FEATURES, TRAIN, VALIDATION, digits_solver, inner, outer, ridge_solver, shuffled
from torch import Tensor, nn

import hypergrad as hg
from hypergrad import bilevel as bl
from hypergrad.bilevel.checkpoints import files
from hypergrad.bilevel.checkpoints.store import checkpoints


def sketched() -> hg.Implicit:
    generator = torch.Generator().manual_seed(3)
    made = hg.NystromPreconditioner(rank=4, generator=generator)
    return hg.Implicit(hg.CG(rtol=1e-2, maxiter=4, preconditioner=made), damping=1.0)


METHODS: dict[str, Callable[[], Any]] = {
    "CG, preconditioned": sketched,
    "CG, damped by itself": lambda: hg.Implicit(hg.CG(rtol=1e-2, maxiter=8)),
    "Nyström": lambda: hg.Nystrom(rank=3, rho=1.0, generator=torch.Generator()),
    "unrolled": hg.Unrolled,
    "unrolled, forward": lambda: hg.Unrolled(
        memory="forward", directions=2, generator=torch.Generator().manual_seed(1)
    ),
    "T1-T2": bl.T1T2,
    "DARTS": bl.DARTS,
    "stocBiO": lambda: bl.StocBiO(terms=3, step=0.05),
    "AmIGO": lambda: bl.AmIGO(steps=3, step=0.05),
    "SOBA": hg.single_loop.SOBA,
    "F2SA": hg.single_loop.F2SA,
    "MEHA": hg.single_loop.MEHA,
}


def everything(solver: hg.BilevelSolver) -> list[Tensor]:
    """Both trees, the buffers, and the random state."""
    buffers = [buffer for module in solver.modules for buffer in module.buffers()]
    trees = optree.tree_leaves((solver.params, solver.hparams))
    return [tensor.detach().clone() for tensor in [*trees, *buffers, torch.get_rng_state()]]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_loop_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    """With dropout, batch norm, a shuffling loader, momentum, a schedule, and random states."""
    single = isinstance(METHODS[name](), hg.single_loop.SingleLoop)

    def make(*callbacks: bl.Callback) -> hg.BilevelSolver:
        return digits_solver(
            METHODS[name](), inner_steps=1 if single else 2, outer_steps=7, warmup_steps=2,
            on_failure="ignore",
            callbacks=[bl.EarlyStopping(patience=100), *callbacks],
        )  # fmt: skip

    whole = make()
    whole.run()
    expected = everything(whole)
    began = make(bl.Checkpoint(tmp_path))
    for record in began:
        if record.step == 3:
            break
    torch.manual_seed(99)
    resumed = make(bl.Checkpoint(tmp_path))
    assert resumed.resume(tmp_path)
    assert resumed.outer_step == 3
    resumed.run()
    assert same(everything(resumed), expected)
    assert len(resumed.history) == 7
    for column in whole.history.columns:
        if column not in ("seconds", "verification"):  # a resumed loop verifies once more
            assert resumed.history[column] == whole.history[column], column


def test_saba_remembers_its_batches(tmp_path: Path) -> None:
    def make() -> hg.BilevelSolver:
        parts = [tuple(part[k::3] for part in TRAIN) for k in range(3)]
        return ridge_solver(
            method=hg.single_loop.SABA(), inner_loader=parts, outer_steps=8,
            outer_optimizer=lambda c: torch.optim.SGD([c], lr=0.1),
        )  # fmt: skip

    whole = make()
    whole.run()
    began = make()
    for record in began:
        if record.step == 4:
            began.save(tmp_path / "state.pt")
            break
    resumed = make()
    resumed.load(tmp_path / "state.pt")
    resumed.run()
    assert torch.equal(resumed.hparams, whole.hparams)


def test_schedules_restarts_and_every_random_state_are_resumed(tmp_path: Path) -> None:
    def make() -> hg.BilevelSolver:
        w, decay = (torch.zeros(FEATURES, dtype=torch.float64) for _ in range(2))
        sgd = torch.optim.SGD([w], lr=0.1, momentum=0.9)
        adam = torch.optim.Adam([decay], lr=0.1)

        def noisy(w: Tensor, c: Tensor, batch: Any) -> Tensor:
            noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
            return inner(w, c, batch) * (1.0 + 0.1 * noise)

        return hg.BilevelSolver(
            hg.Level(
                noisy,
                w,
                sgd,
                shuffled(),
                scheduler=torch.optim.lr_scheduler.OneCycleLR(sgd, 0.2, total_steps=100),
            ),
            hg.Level(
                outer,
                decay,
                adam,
                [VALIDATION],
                scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(adam, patience=1),
            ),
            seed=1,
            inner_steps=3,
            outer_steps=8,
            restart=lambda: torch.randn(FEATURES, dtype=torch.float64),
            restart_every=2,
            method=bl.T1T2(lr=0.1),
        )

    def seeded() -> hg.BilevelSolver:
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        return make()

    whole = seeded()
    whole.run()
    began = seeded()
    for record in began:
        if record.step == 5:
            began.save(tmp_path / "state.pt")
            break
    random.seed(6)
    np.random.seed(6)  # noqa: NPY002
    resumed = make()
    resumed.load(tmp_path / "state.pt")
    resumed.run()
    assert torch.equal(resumed.params, whole.params)
    assert torch.equal(resumed.hparams, whole.hparams)


KILLED = Path(__file__).parent / "killed.py"


METHODS_KILLED = ("implicit", "unrolled", "soba")
LONG = [
    pytest.param(name, 20, marks=pytest.mark.long)
    for name in (*METHODS_KILLED, "saba", "iterable", "persistent")
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize(("method", "kills"), [*((name, 4) for name in METHODS_KILLED), *LONG])
def test_a_loop_killed_at_random_moments_ends_as_one_that_was_not(
    tmp_path: Path, method: str, kills: int
) -> None:
    """Each time by SIGKILL, with two workers a loader; a resumption a time."""
    done = subprocess.run(
        [sys.executable, str(KILLED), method, str(tmp_path), f"--kills={kills}"],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout


def test_the_newest_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.pt.123.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"mine")
    solver = ridge_solver(outer_steps=9, callbacks=[bl.Checkpoint(tmp_path, every=2, keep=2)])
    solver.run()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["notes.tmp", "step-00000008.pt", "step-00000009.pt"]


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path: Path) -> None:
    solver = ridge_solver(outer_steps=4, callbacks=[bl.Checkpoint(tmp_path)])
    solver.run()
    newest = tmp_path / "step-00000004.pt"
    newest.write_bytes(newest.read_bytes()[:-200])
    resumed = ridge_solver(outer_steps=4, callbacks=[bl.Checkpoint(tmp_path)])
    with pytest.warns(hg.CheckpointWarning, match=r"step-00000004\.pt is damaged .*00003\.pt is u"):
        assert resumed.resume(tmp_path)
    assert resumed.outer_step == 3
    resumed.run()
    assert torch.equal(resumed.hparams, solver.hparams)
    assert (tmp_path / "step-00000004.pt.damaged").exists()


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda whole: b"", "is damaged or no checkpoint"),
    "truncated": (lambda whole: whole[: len(whole) // 2], "is damaged or no checkpoint"),
    "text": (lambda whole: b"hello", "is damaged or no checkpoint"),
    "pickle": (lambda whole: b"\x80\x02cos\nsystem\n", "is damaged or no checkpoint"),
    "scrambled": (
        lambda whole: whole[:1000] + bytes(byte ^ 255 for byte in whole[1000:3000]) + whole[3000:],
        "is damaged or no checkpoint",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_checkpoint_is_refused_and_nothing_changes(
    tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "step-00000003.pt"
    ridge_solver().save(path)
    change, message = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    solver = ridge_solver()
    before = everything(solver)
    with pytest.raises(hg.CheckpointError, match=message):
        solver.load(path)
    with pytest.raises(hg.CheckpointError, match=message):
        solver.resume(tmp_path)
    assert same(everything(solver), before)
    assert path.exists()


def test_foreign_and_later_files_are_refused(tmp_path: Path) -> None:
    solver = ridge_solver()
    torch.save({"model": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(hg.CheckpointError, match="no checkpoint: it has no checksum at its end"):
        solver.load(tmp_path / "foreign.pt")
    files.write({"format": "another program's"}, tmp_path / "other.pt")
    with pytest.raises(hg.CheckpointError, match=r"is no checkpoint of a hypergrad\.BilevelSolver"):
        solver.load(tmp_path / "other.pt")
    solver.save(tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save(state, tmp_path / "again.pt")
    with pytest.raises(hg.CheckpointError, match=r"it has no checksum .* BilevelSolver\.save"):
        solver.load(tmp_path / "again.pt")
    files.write({**state, "version": 99}, tmp_path / "later.pt")
    with pytest.raises(hg.CheckpointError, match="has version 99 of the format, this hypergrad re"):
        solver.load(tmp_path / "later.pt")
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none\.pt"):
        solver.load(tmp_path / "none.pt")
    assert not solver.resume(tmp_path / "empty")


OTHERS: dict[str, tuple[Callable[[], hg.BilevelSolver], str]] = {
    "shapes": (lambda: digits_solver(hg.CG()), r"is of another problem: params there \["),
    "method": (
        lambda: ridge_solver(method=hg.MINRES()),
        r"method there \['CG'\], here \['MINRES'\]",
    ),
    "sketch": (
        lambda: ridge_solver(method=hg.CG(preconditioner=hg.JacobiPreconditioner())),
        r"method there \['CG'\], here \['CG', 'JacobiPreconditioner'\]",
    ),
    "optimiser": (
        lambda: ridge_solver(outer_optimizer=lambda c: torch.optim.Adam([c])),
        r"optimizers there .*'SGD', \[1\], None.*, here .*'Adam', \[1\], None",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_problem_is_refused(tmp_path: Path, name: str) -> None:
    solver = ridge_solver(callbacks=[bl.Checkpoint(tmp_path)])
    solver.run()
    make, message = OTHERS[name]
    other = make()
    before = everything(other)
    with pytest.raises(hg.CheckpointError, match=message):
        other.resume(tmp_path)
    assert same(everything(other), before)
    assert other.outer_step == 0


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    ridge_solver(callbacks=[bl.Checkpoint(tmp_path)]).run()
    again = ridge_solver(callbacks=[bl.Checkpoint(tmp_path)])
    with pytest.raises(ValueError, match=r"folder must hold no later steps than .* resume\("):
        again.run()
    overwriting = bl.Checkpoint(tmp_path, overwrite=True)
    ridge_solver(outer_steps=2, callbacks=[overwriting]).run()
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-00000002.pt", "step-00000001.pt",
    ]  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files")
def test_a_full_disk_costs_a_warning_and_no_checkpoint(tmp_path: Path) -> None:
    """A real one: the system lets this process write no file beyond some kilobytes."""
    program = f"""
import resource, warnings
from loops import ridge_solver
from hypergrad import bilevel as bl
from hypergrad.bilevel.checkpoints.store import checkpoints
from pathlib import Path
folder = Path({str(tmp_path)!r})
solver = ridge_solver(outer_steps=5, callbacks=[bl.Checkpoint(folder)])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for record in solver:
        if record.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
print(solver.outer_step, *(path.name for path in folder.iterdir()), sep=" ")
print(*(str(entry.message) for entry in caught if "written" in str(entry.message)), sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *warned = done.stdout.splitlines()
    assert sorted(first.split()) == ["5", "step-00000001.pt", "step-00000002.pt"]
    assert "step-00000003.pt could not be written" in warned[0]
    assert os.strerror(errno.EFBIG) in warned[0]
    solver = ridge_solver(outer_steps=5)
    assert solver.resume(tmp_path)
    assert solver.outer_step == 2


def test_a_state_that_could_not_be_read_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    class Odd(bl.Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"best": [np.float64(1.0)]}

    solver = ridge_solver(callbacks=[Odd()])
    message = r"got numpy\.float64 at the state\['callbacks'\]\[0\]\[1\]\['best'\]\[0\]"
    with pytest.raises(TypeError, match=message):
        solver.save(tmp_path / "state.pt")
    assert not list(tmp_path.iterdir())


def whole_and_resumed(
    make: Callable[[], hg.BilevelSolver], path: Path
) -> tuple[hg.BilevelSolver, hg.BilevelSolver]:
    """A solver that ran through, and one that went on from the third step of another."""
    whole, began, resumed = make(), make(), make()
    whole.run()
    for record in began:
        if record.step == 3:
            break
    began.save(path)
    resumed.load(path)
    resumed.run()
    return whole, resumed


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "milestones": lambda sgd: torch.optim.lr_scheduler.MultiStepLR(sgd, [2, 4]),
    "function": lambda sgd: torch.optim.lr_scheduler.LambdaLR(sgd, lambda k: 0.9**k),
    "cosine": lambda sgd: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(sgd, 3),
    "cyclic": lambda sgd: torch.optim.lr_scheduler.CyclicLR(sgd, 0.01, 0.1, step_size_up=2),
    "in turn": lambda sgd: torch.optim.lr_scheduler.SequentialLR(
        sgd,
        [
            torch.optim.lr_scheduler.LinearLR(sgd, total_iters=2),
            torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9),
        ],
        [3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_every_kind_are_resumed(tmp_path: Path, name: str) -> None:
    def make() -> hg.BilevelSolver:
        w, decay = (torch.zeros(FEATURES, dtype=torch.float64) for _ in range(2))
        sgd = torch.optim.SGD([w], lr=0.1, momentum=0.9)
        return hg.BilevelSolver(
            hg.Level(inner, w, sgd, [TRAIN], scheduler=SCHEDULES[name](sgd)),
            hg.Level(outer, decay, torch.optim.SGD([decay], lr=0.5), [VALIDATION]),
            outer_steps=7,
        )

    whole, resumed = whole_and_resumed(make, tmp_path / "state.pt")
    assert torch.equal(resumed.hparams, whole.hparams)
    assert resumed.history["inner_lr"] == whole.history["inner_lr"]


OPTIMIZERS: dict[str, Callable[[Tensor], torch.optim.Optimizer]] = {
    "LBFGS": lambda w: torch.optim.LBFGS([w], max_iter=5, line_search_fn="strong_wolfe"),
    "AdamW": lambda w: torch.optim.AdamW([w], amsgrad=True),
    "NAdam": lambda w: torch.optim.NAdam([w]),
    "Adafactor": lambda w: torch.optim.Adafactor([w]),
    "Rprop": lambda w: torch.optim.Rprop([w]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_of_every_kind_are_resumed(tmp_path: Path, name: str) -> None:
    def make() -> hg.BilevelSolver:
        return ridge_solver(
            inner_optimizer=OPTIMIZERS[name], inner_loader=shuffled(), outer_steps=6,
            method=bl.T1T2(lr=0.1),
        )  # fmt: skip

    whole, resumed = whole_and_resumed(make, tmp_path / "state.pt")
    assert torch.equal(resumed.params, whole.params)
    assert torch.equal(resumed.hparams, whole.hparams)


def test_a_folder_that_cannot_be_written_is_an_error_of_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OSError, match="file"):
        ridge_solver().save(tmp_path / "file" / "state.pt")


def test_a_module_that_is_frozen_in_part_is_restored_whole(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[hg.BilevelSolver, nn.Module]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(FEATURES, 3), nn.Linear(3, 1)).double()
        model[0].requires_grad_(False)
        decay = torch.zeros((), dtype=torch.float64)

        def objective(net: Any, decay: Tensor, batch: Any) -> Tensor:
            X, y = batch
            penalty = decay.exp() * net[1].weight.square().sum()
            return (net(X)[:, 0] - y).square().mean() + penalty

        solver = hg.BilevelSolver(
            hg.Level(objective, model, torch.optim.SGD(model[1].parameters(), lr=0.1), [TRAIN]),
            hg.Level(objective, decay, torch.optim.SGD([decay], lr=0.1), [VALIDATION]),
        )
        return solver, model

    solver, model = make(0)
    solver.run()
    solver.save(tmp_path / "state.pt")
    other, restored = make(1)
    other.load(tmp_path / "state.pt")
    for one, two in zip(model.parameters(), restored.parameters(), strict=True):
        assert torch.equal(one, two)
