"""Promises of the loop to those who bring an optimiser, and to those who take the result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import TRAIN, VALIDATION, inner, outer, ridge_solver
from problems import relative_error
from torch import Tensor, nn
from unrolled import MEMORIES

import hypergrad as hg
from hypergrad import bilevel as bl

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam])
def test_from_torch_never_writes_into_a_rate_that_is_a_tensor(kind: Any, schedule: str) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = kind([p], lr=torch.tensor(0.05))
    scheduler = SCHEDULERS[schedule](optimizer)
    before = copy.deepcopy(scheduler.state_dict())
    twin = hg.optimizers.from_torch(optimizer, scheduler=scheduler)
    hg.unroll(lambda w, c: (w * c).square().sum(), twin, p, torch.ones(4), 5)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)
    assert scheduler.state_dict() == before


def test_a_twin_keeps_the_rate_of_its_birth() -> None:
    p = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([p], lr=torch.tensor(0.5))
    twin = hg.optimizers.from_torch(optimizer)
    optimizer.param_groups[0]["lr"].fill_(9.0)
    end = hg.unroll(lambda w, c: (w * c).sum(), twin, p, torch.ones(1), 1)
    assert float(end.detach()) == 0.5


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda w: torch.optim.SGD([w], lr=0.05, momentum=0.9),
    "Adam": lambda w: torch.optim.Adam([w], lr=0.05, amsgrad=True),
    "a tensor's rate": lambda w: torch.optim.AdamW([w], lr=torch.tensor(0.05)),
    "RMSprop": lambda w: torch.optim.RMSprop([w], lr=0.05, momentum=0.5),
    "Adagrad": lambda w: torch.optim.Adagrad([w], lr=0.05),
    "no namesake": lambda w: torch.optim.NAdam([w], lr=0.05),
}


def trained(make: Any, method: Any, **options: Any) -> tuple[Any, Any, Tensor]:
    """The optimiser, its scheduler and θ after two outer steps that leave φ alone."""
    w = torch.zeros(5, dtype=torch.float64)
    c = torch.zeros(5, dtype=torch.float64)
    optimizer = make(w)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    solver = hg.BilevelSolver(
        hg.Level(inner, w, optimizer, [TRAIN], scheduler=scheduler),
        hg.Level(outer, c, torch.optim.SGD([c], lr=0.0), [TRAIN]),
        method=method,
        inner_steps=3,
        outer_steps=2,
        seed=0,
        **options,
    )
    solver.run()
    solver.train(2)
    return optimizer, scheduler, w


@pytest.mark.parametrize("restart", [None, "initial"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimiser_of_unrolled_steps_stands_where_training_left_it(
    name: str, restart: Any
) -> None:
    """As after T1-T2, which trains by the optimiser itself; and it trains on from there."""
    make = OPTIMIZERS[name]
    states = []
    for method in (hg.Unrolled(), bl.T1T2()):
        optimizer, scheduler, w = trained(make, method, restart=restart)
        w.grad = torch.ones_like(w)
        optimizer.step()
        slots = {key: torch.as_tensor(v) for key, v in optimizer.state[w].items() if v is not None}
        states.append((slots, optimizer.param_groups[0]["lr"], scheduler.last_epoch, w))
    (slots, lr, epoch, w), (right_slots, right_lr, right_epoch, right_w) = states
    assert slots.keys() == right_slots.keys()
    for key, value in slots.items():
        # Some counts and products of theirs are float32 in a float64 optimiser.
        torch.testing.assert_close(value, right_slots[key], rtol=1e-6, atol=1e-9)
    assert float(lr) == pytest.approx(float(right_lr))
    assert epoch == right_epoch
    torch.testing.assert_close(w, right_w, rtol=1e-6, atol=1e-9)


def test_a_resumed_loop_brings_its_optimiser_along(tmp_path: Path) -> None:
    ends = []
    for steps in (2, 4):
        w = torch.zeros(5, dtype=torch.float64)
        c = torch.zeros(5, dtype=torch.float64)
        optimizer = torch.optim.SGD([w], lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
        solver = hg.BilevelSolver(
            hg.Level(inner, w, optimizer, [TRAIN], scheduler=scheduler),
            hg.Level(outer, c, torch.optim.SGD([c], lr=0.1), [TRAIN]),
            method=hg.Unrolled(),
            inner_steps=3,
            outer_steps=steps,
            seed=0,
        )
        solver.resume(tmp_path)
        ends.append((optimizer, scheduler))
        if steps == 2:
            solver.run()
            solver.save(tmp_path / "step-00000002.pt")
    (one, schedule_one), (two, schedule_two) = ends
    assert schedule_one.last_epoch == schedule_two.last_epoch == 6
    assert one.param_groups[0]["lr"] == two.param_groups[0]["lr"] == pytest.approx(0.005)
    torch.testing.assert_close(
        *(next(iter(o.state.values()))["momentum_buffer"] for o in (one, two)), rtol=0, atol=0
    )


STARTS: dict[str, tuple[hg.LinearSolver, bool]] = {
    "a fixed number of iterations": (hg.CG(rtol=None, maxiter=3), False),
    "a series summed to its end": (hg.Neumann(terms=4, step=0.1, rtol=0.0), False),
    "a tolerance": (hg.CG(rtol=1e-3), True),
    "GMRES": (hg.GMRES(), True),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_warm_start_where_the_solver_says_that_it_gains(name: str) -> None:
    solver, gains = STARTS[name]
    assert solver.gains_from_x0 == gains
    counts = [
        ridge_solver(
            method=hg.Implicit(solver, warm_start=warm), on_failure="ignore", inner_steps=5
        ).run()["matvecs"]
        for warm in (None, gains)
    ]
    assert counts[0] == counts[1]


def test_an_attribute_called_rtol_says_nothing() -> None:
    class Named(hg.LinearSolver):
        rtol = 1e-3

        def solve_scaled(self, operator: Any, rhs: Any, rhs_scale: float) -> Any:
            raise AssertionError

    assert not Named().gains_from_x0


def slope(w: Tensor, decay: Tensor) -> Tensor:
    return torch.func.grad(inner)(w, decay, TRAIN)


AHEAD: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum and weight decay": lambda w: torch.optim.SGD(
        [w], lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True
    ),
    "AdamW": lambda w: torch.optim.AdamW([w], lr=0.05, weight_decay=0.1, eps=1e-3),
}


@pytest.mark.parametrize("name", AHEAD)
def test_darts_looks_ahead_by_the_step_that_trains(name: str) -> None:
    """Against differences of g after one more step of the optimiser itself."""
    solver = ridge_solver(
        method=bl.DARTS(mode="reverse"), inner_optimizer=AHEAD[name], inner_steps=3,
        outer_steps=1,
    )  # fmt: skip
    solver.run()
    found = -solver.hparams.detach()
    start = torch.zeros_like(found)
    optimizer = AHEAD[name](start)
    for _ in range(3):
        start.grad = slope(start, torch.zeros_like(start))
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())

    def after(decay: Tensor) -> Tensor:
        moved = start.clone()
        again = AHEAD[name](moved)
        again.load_state_dict(copy.deepcopy(state))
        moved.grad = slope(moved, decay)
        again.step()
        return outer(moved, decay, VALIDATION)

    right = torch.stack(
        [
            (after(1e-5 * e) - after(-1e-5 * e)) / 2e-5
            for e in torch.eye(len(start), dtype=start.dtype)
        ]
    )
    assert relative_error(found, right) < 1e-5


def test_darts_says_where_it_cannot() -> None:
    solver = ridge_solver(
        method=bl.DARTS(), inner_optimizer=lambda w: torch.optim.LBFGS([w], lr=0.1),
        outer_steps=1,
    )  # fmt: skip
    with pytest.warns(hg.HypergradWarning, match="gradient descent, since LBFGS has no"):
        solver.run()


@pytest.mark.parametrize("memory", MEMORIES)
def test_clipping_is_a_part_of_the_unrolled_step(memory: Any) -> None:
    """Against differences, where some steps are clipped and the last ones are not."""
    sgd = lambda h: hg.optimizers.SGD(lr=h.exp(), momentum=0.5)  # noqa: E731
    rate = torch.tensor(-2.0, dtype=torch.float64)
    target = torch.tensor([3.0, -4.0], dtype=torch.float64)

    def g(w: dict[str, Tensor], h: Tensor) -> Tensor:
        return (w["a"] - 1.0).square().sum() + w["b"].square().sum()

    def f(w: dict[str, Tensor], h: Tensor) -> Tensor:
        return (w["a"] - target).square().sum() + (w["b"] * w["a"]).sum().cosh()

    def run(h: Tensor) -> Any:
        method = hg.Unrolled(
            lambda h: hg.optimizers.Clipped(sgd(h), max_norm=3.0), steps=8, memory=memory
        )
        start = {key: torch.zeros(2, dtype=torch.float64) for key in "ab"}
        return hg.hypergradient(f, g, start, h, method=method)

    slope = (run(rate + 1e-6).outer_value - run(rate - 1e-6).outer_value) / 2e-6
    assert float(run(rate).grads) == pytest.approx(slope, rel=1e-6)


def test_clipped_steps_in_the_loop_are_those_of_training() -> None:
    clipped = [
        ridge_solver(method=method, clip_inner=0.3, inner_steps=4, outer_steps=1)
        for method in (hg.Unrolled(), bl.T1T2())
    ]
    for solver in clipped:
        solver.run()
    torch.testing.assert_close(clipped[0].params, clipped[1].params, rtol=1e-12, atol=0)
    free = ridge_solver(method=hg.Unrolled(), inner_steps=4, outer_steps=1)
    free.run()
    assert relative_error(free.params, clipped[0].params) > 0.01


def overshooting(**options: Any) -> hg.BilevelSolver:
    """φ jumps past its best and away: g falls, then rises without end."""
    w, c = torch.zeros(1), torch.full((1,), 3.0)
    return hg.BilevelSolver(
        hg.Level(lambda w, c, _: (w - c).square().sum(), w, torch.optim.SGD([w], 0.5)),
        hg.Level(
            lambda w, c, _: (w - 1).square().sum() + 0.01,
            c,
            torch.optim.SGD([c], 0.1, momentum=1.1),
        ),
        outer_steps=20,
        seed=0,
        **options,
    )


def test_a_loop_that_leaves_its_best_behind_says_so_once() -> None:
    solver = overshooting()
    with pytest.warns(hg.HypergradWarning, match="risen from .* past twice its best") as seen:
        solver.run()
    assert len(seen) == 1
    row = solver.history.best("outer_loss")
    assert row["outer_loss"] == min(solver.history["outer_loss"])
    assert "history.best('outer_loss') names it" in str(seen[0].message)
    assert solver.history.best("outer_loss", mode="max")["outer_loss"] == max(
        solver.history["outer_loss"]
    )
    with pytest.raises(KeyError, match="no column 'loss'"):
        solver.history.best("loss")
    with pytest.raises(ValueError, match="got 'multiplier' with none"):
        solver.history.best("multiplier")


@pytest.mark.filterwarnings("ignore:the outer loss has risen")
def test_the_best_step_comes_back_with_the_hparams_that_made_it() -> None:
    """Training θ anew at that φ gives the best outer loss again."""
    best = bl.KeepBest()
    solver = overshooting(callbacks=[best])
    solver.run()
    row = solver.history.best()
    assert (best.best_step, best.best) == (row["step"], row["outer_loss"])
    torch.testing.assert_close(solver.params, solver.hparams, rtol=1e-6, atol=1e-6)
    assert float((solver.params - 1).square().sum() + 0.01) == pytest.approx(best.best)


@pytest.mark.filterwarnings("ignore:the outer loss has risen")
def test_the_best_step_survives_a_checkpoint(tmp_path: Path) -> None:
    """A loop that is interrupted after its best keeps it, and goes on bit for bit."""
    whole = overshooting(callbacks=[bl.KeepBest()])
    whole.run()
    first = overshooting(callbacks=[bl.KeepBest(restore=False)])
    first.outer_steps = 15
    first.run()
    first.save(tmp_path / "step-00000015.pt")
    second = overshooting(callbacks=[kept := bl.KeepBest()])
    assert second.resume(tmp_path)
    second.run()
    assert kept.best_step == whole.history.best()["step"] <= 15
    assert second.history["outer_loss"] == whole.history["outer_loss"]
    assert torch.equal(second.params, whole.params)
    assert torch.equal(second.hparams, whole.hparams)


def test_a_metric_of_a_callback_belongs_to_the_hparams_after_the_step() -> None:
    class Distance(bl.Callback):
        def measure(self, solver: Any, record: Any) -> Any:
            return {"distance": float((solver.hparams - 1.0).abs().sum())}

    best = bl.KeepBest("distance", restore=False)
    solver = overshooting(callbacks=[Distance(), best])
    with pytest.warns(hg.HypergradWarning, match="risen"):
        solver.run()
    with pytest.raises(ValueError, match="restore must come after a step"):
        bl.KeepBest().restore(solver)
    best.restore(solver)
    assert float((solver.hparams - 1.0).abs().sum()) == pytest.approx(best.best)


def test_a_column_that_never_comes_is_told() -> None:
    with pytest.warns(hg.HypergradWarning, match="monitor must be a column.*'accuracy'"):
        ridge_solver(outer_steps=1, callbacks=[bl.KeepBest("accuracy", mode="max")]).run()


def test_hard_batches_are_no_rise() -> None:
    """One batch of three is a hundred times as hard as the others."""
    w, c = torch.zeros(1), torch.full((1,), 3.0)
    solver = hg.BilevelSolver(
        hg.Level(lambda w, c, _: (w - c).square().sum(), w, torch.optim.SGD([w], 0.5)),
        hg.Level(
            lambda w, c, k: k * (w - 1).square().sum() + k,
            c,
            torch.optim.SGD([c], 1e-4),
            [torch.tensor(float(k)) for k in (1, 100, 1)],
        ),
        outer_steps=12,
        seed=0,
    )
    solver.run()
