"""The loop makes the steps that one would write by hand, whatever the method and the options."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import FEATURES, TRAIN, VALIDATION, digits_solver, inner, outer, ridge_solver, shuffled
from problems import relative_error
from torch import Tensor, nn

import hypergrad as hg
from hypergrad import bilevel as bl


def derivatives(w: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`∂_θ f`, `H` and `∂_φ F` on the training rows, `∂_θ g` on the others, by matrix algebra."""
    (X, y), (X_val, y_val) = TRAIN, VALIDATION
    gradient = X.T @ (X @ w - y) / len(y) + decay.exp() * w
    hessian = X.T @ X / len(y) + decay.exp().diag()
    mixed = (decay.exp() * w).diag()
    return gradient, hessian, mixed, X_val.T @ (X_val @ w - y_val) / len(y_val)


def exact(w: Tensor, decay: Tensor) -> Tensor:
    _, H, J, b = derivatives(w, decay)
    return -J.T @ torch.linalg.solve(H, b)


def last_step(w: Tensor, decay: Tensor) -> Tensor:
    _, _, J, b = derivatives(w, decay)
    return -0.1 * J.T @ b


def step_ahead(w: Tensor, decay: Tensor) -> Tensor:
    gradient, _, J, _ = derivatives(w, decay)
    return -0.1 * J.T @ derivatives(w - 0.1 * gradient, decay)[3]


def neumann(w: Tensor, decay: Tensor) -> Tensor:
    _, H, J, b = derivatives(w, decay)
    v = term = 0.2 * b
    for _ in range(7):
        term = term - 0.2 * H @ term
        v = v + term
    return -J.T @ v


FORMULAS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor], float]] = {
    # The method, the formula of its hypergradient, and the relative error that its rounding leaves.
    "CG": (hg.CG(rtol=1e-10), exact, 1e-8),
    "Dense": (hg.Implicit(hg.Dense()), exact, 1e-10),
    "Nyström": (hg.Nystrom(rank=FEATURES, rho=1e-10), exact, 1e-6),
    "T1-T2": (bl.T1T2(), last_step, 1e-10),
    "DARTS": (bl.DARTS(), step_ahead, 1e-6),
    "DARTS, reverse": (bl.DARTS(mode="reverse"), step_ahead, 1e-10),
    "stocBiO": (bl.StocBiO(terms=8, step=0.2), neumann, 1e-10),
    "AmIGO": (bl.AmIGO(steps=8, step=0.2), neumann, 1e-10),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loop_is_the_one_written_by_hand(name: str) -> None:
    """Gradient descent on θ, the method's formula, gradient descent on φ; by matrix algebra."""
    method, formula, bound = FORMULAS[name]
    solver = ridge_solver(method=method, inner_steps=4, warmup_steps=2, outer_steps=1)
    w, decay = torch.zeros(FEATURES).double(), torch.zeros(FEATURES).double()
    for _ in range(6):
        w = w - 0.1 * derivatives(w, decay)[0]
    expected = formula(w, decay)
    history = solver.run()
    assert relative_error(solver.params, w) < 1e-12
    assert relative_error(solver.hparams, -expected) < bound
    assert history["hypergradient_norm"] == [pytest.approx(float(expected.norm()), rel=bound)]
    assert solver.outer_step == 1
    assert solver.inner_step == 6


def test_solves_that_fail_alike_in_a_loop_warn_once() -> None:
    solver = ridge_solver(
        method=hg.CG(rtol=1e-12, maxiter=1), warmup_steps=2, inner_steps=1, outer_steps=4
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        solver.run()
    assert solver.history["status"] == ["MAX_ITERATIONS"] * 4
    (warning,) = [entry for entry in caught if entry.category is hg.LinearSolveWarning]
    assert "the linear solve of CG failed: MAX_ITERATIONS: the maximum" in str(warning.message)
    assert "history['status'] has every step" in str(warning.message)


def test_a_schedule_that_ends_at_zero_leaves_t1_t2_the_direct_gradient() -> None:
    w, decay = torch.zeros(FEATURES).double(), torch.zeros(FEATURES).double()
    sgd = torch.optim.SGD([w], lr=0.1)
    solver = hg.BilevelSolver(
        hg.Level(
            lambda w, decay, _: inner(w, decay, TRAIN),
            w,
            sgd,
            scheduler=torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: float(step < 2)),
        ),
        hg.Level(
            lambda w, decay, _: outer(w, decay, VALIDATION) + decay.sum(),
            decay,
            torch.optim.SGD([decay], lr=1.0),
        ),
        method=bl.T1T2(),
        outer_steps=3,
    )
    solver.run()
    last = solver.history[-1]
    assert last["hypergradient_norm"] == pytest.approx(FEATURES**0.5)


def test_amigo_starts_from_its_last_solution() -> None:
    """Two outer steps at one θ are one of twice as many steps."""
    still = {"inner_optimizer": lambda w: torch.optim.SGD([w], lr=1e-14)}
    start = torch.ones(FEATURES, dtype=torch.float64)

    def moved(steps: int, outer_steps: int) -> Tensor:
        solver = ridge_solver(
            method=bl.AmIGO(steps=steps, step=0.2),
            outer_steps=outer_steps,
            outer_optimizer=lambda c: torch.optim.SGD([c], lr=1e-14),
            warmup_steps=1,
            **still,
        )
        solver.params.copy_(start)
        records = list(solver)
        return torch.tensor(records[-1].hypergradient_norm)

    torch.testing.assert_close(moved(6, 2), moved(12, 1))


@pytest.mark.parametrize("memory", ["recompute", "graph", "checkpoint", "forward"])
def test_unrolling_differentiates_the_steps_that_it_makes(memory: Any) -> None:
    solver = ridge_solver(method=hg.Unrolled(memory=memory), inner_steps=4, outer_steps=2)
    w = torch.zeros(FEATURES, dtype=torch.float64)
    decay = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        for _ in range(4):
            gradient, *_ = derivatives(w, decay)
            w = w - 0.1 * gradient
        (grad,) = torch.autograd.grad(outer(w, decay, VALIDATION), decay)
        w, decay = w.detach(), (decay - grad).detach().requires_grad_()
    history = solver.run()
    assert relative_error(solver.params, w) < 1e-12
    assert relative_error(solver.hparams, decay) < 1e-12
    assert history["inner_loss"][0] > history["inner_loss"][1]


def test_unrolling_learns_what_the_optimiser_is_made_of() -> None:
    """φ is a log learning rate; the validation loss falls as it grows from far too small."""
    w = torch.zeros(FEATURES, dtype=torch.float64)
    rate = torch.tensor(-6.0, dtype=torch.float64)
    solver = hg.BilevelSolver(
        hg.Level(
            lambda w, rate, batch: inner(w, torch.full_like(w, -9.0), batch),
            w,
            lambda rate: hg.optimizers.SGD(lr=rate.exp()),
            [TRAIN],
        ),
        hg.Level(outer, rate, torch.optim.Adam([rate], lr=0.5), [VALIDATION]),
        method=hg.Unrolled(),
        inner_steps=5,
        outer_steps=10,
        restart="initial",
    )
    losses = solver.run()["outer_loss"]
    assert losses == sorted(losses, reverse=True)
    assert float(rate) > -3.0


def test_options_are_what_one_would_write() -> None:
    """Clipping, schedules, projection, warm-up and restarts beside torch's own."""
    schedule = torch.optim.lr_scheduler.ExponentialLR
    made: dict[str, Any] = {}

    def inner_optimizer(w: Tensor) -> Any:
        made["inner"] = torch.optim.SGD([w], lr=0.1, momentum=0.9)
        return made["inner"]

    def outer_optimizer(decay: Tensor) -> Any:
        made["outer"] = torch.optim.SGD([decay], lr=4.0)
        return made["outer"]

    options = {"inner_optimizer": inner_optimizer, "outer_optimizer": outer_optimizer}
    ridge_solver(**options)
    w, decay = (made[key].param_groups[0]["params"][0] for key in ("inner", "outer"))
    solver = hg.BilevelSolver(
        hg.Level(
            inner, w, made["inner"], [TRAIN], scheduler=schedule(made["inner"], 0.9), clip=0.3
        ),
        hg.Level(
            outer,
            decay,
            made["outer"],
            [VALIDATION],
            scheduler=schedule(made["outer"], 0.5),
            clip=0.05,
        ),
        method=hg.Implicit(hg.Dense()),
        project=lambda decay: decay.clamp(max=0.1),
        restart="initial",
        restart_every=2,
        inner_steps=3,
        outer_steps=4,
    )
    records = list(solver)

    theta, phi = torch.zeros(FEATURES).double(), torch.zeros(FEATURES).double()
    rate, outer_rate, velocity = 0.1, 4.0, torch.zeros_like(theta)
    for k in range(4):
        if k == 2:
            theta, rate, velocity = torch.zeros_like(theta), 0.1, torch.zeros_like(theta)
        for _ in range(3):
            gradient, *_ = derivatives(theta, phi)
            gradient = gradient * (0.3 / (gradient.norm() + 1e-6)).clamp(max=1.0)
            velocity = 0.9 * velocity + gradient
            theta = theta - rate * velocity
            rate *= 0.9
        grad = exact(theta, phi)
        grad = grad * (0.05 / (grad.norm() + 1e-6)).clamp(max=1.0)
        phi = (phi - outer_rate * grad).clamp(max=0.1)
        outer_rate *= 0.5
    assert relative_error(w, theta) < 1e-12
    assert relative_error(decay, phi) < 1e-10
    assert records[-1].inner_lr == pytest.approx(0.1 * 0.9**6)
    assert records[-1].outer_lr == pytest.approx(4.0 * 0.5**4)


def test_a_projection_may_work_in_place_and_a_restart_may_return_values() -> None:
    begun = []

    def restart() -> Tensor:
        begun.append(len(begun))
        return torch.full((FEATURES,), 2.0, dtype=torch.float64)

    solver = ridge_solver(
        project=lambda decay: decay.clamp_(min=0.2), restart=restart, restart_every=2, outer_steps=5
    )
    solver.run()
    assert begun == [0, 1]
    assert float(solver.hparams.min()) >= 0.2
    step = 2.0 - 0.1 * derivatives(torch.full((FEATURES,), 2.0).double(), solver.hparams)[0]
    assert solver.params.shape == step.shape


def test_batches_are_averaged_where_asked() -> None:
    """Over all batches of a pass the hypergradient is that of the whole set."""
    halves = [tuple(part[rows] for part in VALIDATION) for rows in (slice(0, 15), slice(15, 30))]
    thirds = [tuple(part[k::3] for part in TRAIN) for k in range(3)]
    still = {"inner_optimizer": lambda w: torch.optim.SGD([w], lr=1e-14), "outer_steps": 1}
    method = hg.Implicit(hg.Dense())
    whole = ridge_solver(method=method, inner_steps=3, **still)
    parts = ridge_solver(
        method=method, inner_steps=3, inner_loader=thirds, outer_loader=halves,
        inner_batches=3, outer_batches=2, **still,
    )  # fmt: skip
    for solver in (whole, parts):
        solver.params.fill_(1.0)
        solver.run()
    torch.testing.assert_close(parts.hparams, whole.hparams, rtol=1e-9, atol=0.0)


def test_a_truncated_solve_is_taken_up_where_it_ended() -> None:
    """Two iterations a step solve the system over a few steps, while θ and φ stay."""
    still = {"inner_optimizer": lambda w: torch.optim.SGD([w], lr=1e-14), "outer_steps": 12}
    errors = []
    for warm_start in (None, False):
        method = hg.Implicit(hg.CG(rtol=1e-9, maxiter=2), warm_start=warm_start)
        solver = ridge_solver(
            method=method,
            on_failure="ignore",
            outer_optimizer=lambda c: torch.optim.SGD([c], lr=1e-14),
            **still,
        )
        solver.params.fill_(1.0)
        norm = float(exact(solver.params, solver.hparams).norm())
        errors.append(abs(solver.run()["hypergradient_norm"][-1] / norm - 1.0))
    assert errors[0] < 1e-3 * errors[1]


def test_a_curvature_sees_the_batch_of_the_objective() -> None:
    """Gauss–Newton of least squares and its penalty is the Hessian."""

    def curvature(w: Tensor, c: Tensor, batch: Any) -> hg.operators.LinearOperator:
        X, y = batch
        return hg.operators.GaussNewton(
            lambda w, c: X @ w,
            lambda out, c: 0.5 * (out - y).square().mean(),
            w,
            c,
            regulariser=lambda w, c: 0.5 * (c.exp() * w.square()).sum(),
        )

    def moved(method: bl.Implicit) -> Tensor:
        solver = ridge_solver(method=method, outer_steps=2, inner_loader=shuffled())
        solver.run()
        return solver.hparams

    plain = moved(hg.Implicit(hg.CG(rtol=1e-12)))
    ours = moved(hg.Implicit(hg.CG(rtol=1e-12), curvature=curvature))
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=0.0)


def test_the_inner_problem_is_trained_alone_where_asked() -> None:
    solver = ridge_solver(outer_steps=1)
    solver.run()
    before = solver.hparams.clone()
    losses = solver.train(200)
    assert len(losses) == 200
    assert losses[100] < losses[0]
    assert torch.equal(solver.hparams, before)
    assert float(derivatives(solver.params, before)[0].norm()) < 1e-6
    assert solver.inner_step == 201
    with pytest.raises(ValueError, match="steps must be at least 1"):
        solver.train(0)


def test_objectives_without_data_need_no_loader() -> None:
    w, c = torch.zeros(()), torch.ones(())
    solver = hg.BilevelSolver(
        hg.Level(
            lambda w, c, batch: 0.5 * (w - 3.0) ** 2 + 0.5 * c * w**2,
            w,
            torch.optim.SGD([w], lr=0.3),
        ),
        hg.Level(lambda w, c, batch: 0.5 * (w - 1.0) ** 2, c, torch.optim.SGD([c], lr=2.0)),
        inner_steps=20,
        outer_steps=60,
    )
    solver.run()
    assert float(c) == pytest.approx(2.0, abs=1e-4)


def test_an_optimiser_that_evaluates_several_times_may_train() -> None:
    """LBFGS solves the inner problem in one step, so that the hypergradient is exact."""
    solver = ridge_solver(
        inner_optimizer=lambda w: torch.optim.LBFGS(
            [w],
            max_iter=50,
            tolerance_grad=1e-12,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        ),
        method=hg.CG(rtol=1e-12),
        outer_steps=1,
    )
    (X, y), start = TRAIN, torch.zeros(FEATURES, dtype=torch.float64)
    w = torch.linalg.solve(X.T @ X / len(y) + torch.eye(FEATURES).double(), X.T @ y / len(y))
    solver.run()
    assert relative_error(solver.params, w) < 1e-8
    assert relative_error(solver.hparams, -exact(w, start)) < 1e-7


def test_modules_keep_buffers_and_frozen_parameters_apart() -> None:
    solver = digits_solver(
        hg.Implicit(hg.CG(maxiter=3), damping=1.0), on_failure="ignore", inner_steps=2
    )
    (model,) = solver.modules
    norm = model.layers[1]
    before = norm.running_mean.clone(), int(norm.num_batches_tracked)
    solver.step()
    # Training moves the statistics, twice; the hypergradient does not.
    assert int(norm.num_batches_tracked) == before[1] + 2
    assert not torch.equal(norm.running_mean, before[0])
    frozen = nn.Sequential(nn.Linear(FEATURES, 3), nn.Linear(3, 1)).double()
    frozen[0].requires_grad_(False)
    kept = frozen[0].weight.clone()
    decay = torch.zeros((), dtype=torch.float64)

    def objective(net: Any, decay: Tensor, batch: Any) -> Tensor:
        X, y = batch
        assert net is frozen
        misfit = (net(X)[:, 0] - y).square().mean()
        return misfit + decay.exp() * net[1].weight.square().sum()

    solver = hg.BilevelSolver(
        hg.Level(objective, frozen, torch.optim.SGD(frozen[1].parameters(), lr=0.1), [TRAIN]),
        hg.Level(objective, decay, torch.optim.SGD([decay], lr=0.1), [VALIDATION]),
        outer_steps=2,
        inner_steps=3,
    )
    assert set(solver.params) == {"1.weight", "1.bias"}
    solver.run()
    assert torch.equal(frozen[0].weight, kept)
    assert all(p.grad is None for p in [*frozen.parameters(), decay])


def test_the_outer_parameters_may_be_a_module() -> None:
    """A weighting network, as in learning to reweight."""
    torch.manual_seed(0)
    weigh = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).double()
    w = torch.zeros(FEATURES, dtype=torch.float64)

    def weighted(w: Tensor, weigh: nn.Module, batch: Any) -> Tensor:
        X, y = batch
        losses = (X @ w - y).square()
        weights = weigh(losses.detach()[:, None])[:, 0]
        return (weights * losses).mean() + 0.01 * w.square().sum()

    solver = hg.BilevelSolver(
        hg.Level(weighted, w, torch.optim.SGD([w], lr=0.1), [TRAIN]),
        hg.Level(outer, weigh, torch.optim.Adam(weigh.parameters(), lr=0.05), [VALIDATION]),
        inner_steps=10,
        outer_steps=20,
    )
    losses = solver.run()["outer_loss"]
    assert losses[-1] < losses[0]
    assert solver.modules == [weigh]


def test_metrics_and_outer_parameters_enter_the_history() -> None:
    solver = digits_solver(bl.T1T2(), inner_steps=2, outer_steps=2)
    history = solver.run()
    assert all(0.0 <= value <= 1.0 for value in history["inner/accuracy"])
    assert "outer/accuracy" in history.columns
    assert history.hparams == [f"hparams[{name!r}]" for name in sorted(solver.hparams)]
    last = history[-1]
    assert last["hparams['layers.0.bias']"] == pytest.approx(float(solver.hparams["layers.0.bias"]))
    assert last["step"] == 2
    assert last["inner_steps"] == 4
    assert last["matvecs"] == 1


def test_many_outer_parameters_are_summed_up() -> None:
    w, many = torch.zeros(50), torch.linspace(0.0, 1.0, 50)
    solver = hg.BilevelSolver(
        hg.Level(lambda w, c, _: 0.5 * (w - c).square().sum(), w, torch.optim.SGD([w], lr=0.5)),
        hg.Level(lambda w, c, _: 0.5 * w.square().sum(), many, torch.optim.SGD([many], lr=0.1)),
        outer_steps=1,
    )
    row = solver.run()[0]
    assert row["hparams mean"] == pytest.approx(float(many.mean()))
    assert row["hparams std"] == pytest.approx(float(many.std(correction=0)))


@pytest.mark.parametrize("method", [bl.T1T2(), hg.Unrolled(), hg.single_loop.SOBA()])
def test_a_seed_fixes_everything(method: Any) -> None:
    """Order of the batches and dropout masks, whatever was drawn before and between."""
    steps = 1 if isinstance(method, hg.single_loop.SOBA) else 3

    def run(noise: bool, seed: int) -> Any:
        solver = ridge_solver(
            inner=lambda w, c, b: inner(nn.functional.dropout(w, 0.2), c, b),
            method=method, inner_loader=shuffled(), inner_steps=steps, seed=seed,
        )  # fmt: skip
        if noise:
            torch.utils.data.DataLoader(range(10), shuffle=True).__iter__()
        torch.manual_seed(3)
        solver.run()
        return solver.hparams

    assert torch.equal(run(False, 0), run(True, 0))
    assert not torch.equal(run(False, 0), run(False, 1))


def test_autocast_reaches_both_objectives() -> None:
    seen = []

    def objective(params: Any, hparams: Any, batch: Any) -> Tensor:
        X, y = batch
        out = X @ params
        seen.append(out.dtype)
        return (out.float() - y).square().mean() + (hparams.exp() * params.square()).sum()

    w, decay = torch.zeros(FEATURES), torch.zeros(FEATURES)
    data = [tuple(part.float() for part in TRAIN)]
    solver = hg.BilevelSolver(
        hg.Level(objective, w, torch.optim.SGD([w], lr=0.1), data),
        hg.Level(objective, decay, torch.optim.SGD([decay], lr=0.1), data),
        method=hg.CG(rtol=1e-1),
        inner_steps=5,
        autocast=torch.bfloat16,
        outer_steps=3,
    )
    losses = solver.run()["outer_loss"]
    assert set(seen) == {torch.bfloat16}
    assert w.dtype == torch.float32
    assert losses[-1] < losses[0]


def test_the_device_is_told_or_that_of_the_parameters() -> None:
    told, found = ridge_solver(device="cpu"), ridge_solver()
    assert told.device == found.device == torch.device("cpu")
    told.run()
    found.run()
    assert torch.equal(told.hparams, found.hparams)
    with pytest.raises(RuntimeError, match="nowhere"):
        ridge_solver(device="nowhere")


def test_whoever_breaks_off_can_go_on() -> None:
    whole, parts = (ridge_solver(inner_loader=shuffled(), outer_steps=6) for _ in range(2))
    whole.run()
    for record in parts:
        if record.step == 2:
            break
    parts.step()
    assert parts.outer_step == 3
    parts.run()
    assert len(parts.history) == 6
    assert torch.equal(parts.hparams, whole.hparams)


def test_a_single_loop_moves_both_from_where_they_were() -> None:
    """SOBA by matrix algebra, its step size that of the inner optimiser."""
    solver = ridge_solver(method=hg.single_loop.SOBA(), outer_steps=5)
    history = solver.run()
    w, decay, v = (torch.zeros(FEATURES, dtype=torch.float64) for _ in range(3))
    for _ in range(5):
        gradient, H, J, b = derivatives(w, decay)
        w, decay, v = w - 0.1 * gradient, decay + J.T @ v, v - 0.1 * (H @ v - b)
    assert relative_error(solver.params, w) < 1e-12
    assert relative_error(solver.hparams, decay) < 1e-12
    assert solver.inner_step == 5
    assert history["multiplier"] == [None] * 5
    assert history["matvecs"] == [1] * 5
