"""What `check` finds: on the demo's problem, on an untrained network, and on broken ones."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from problems import dense_parts, mlp, ridge
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad as hg
from hypergrad import Status
from hypergrad.diagnosis.report import Finding

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def test_the_demos_problem_is_fine() -> None:
    import weight_decay

    data = weight_decay.load(seed=0)
    *_, log_decay = weight_decay.start()
    params = weight_decay.fit(data, log_decay)

    def inner(w: Tensor, log_decay: Tensor) -> Tensor:
        return weight_decay.inner(w, log_decay, data[0])

    def outer(w: Tensor, log_decay: Tensor) -> Tensor:
        return weight_decay.outer(w, log_decay, data[1])

    report = hg.check(inner, outer, params, log_decay)
    assert report.ok
    assert report.findings == ()
    assert (report.size, report.outer_size) == (31, 30)
    assert report.newton_step < 1e-6
    assert report.eigenvalues.smallest > 0.0
    H, *_ = dense_parts_of(inner, params, log_decay)
    values = torch.linalg.eigvalsh(H)
    assert report.eigenvalues.largest == pytest.approx(float(values[-1]), rel=1e-3)
    assert report.eigenvalues.smallest == pytest.approx(float(values[0]), rel=0.05)
    assert report.condition == pytest.approx(float(values[-1] / values[0]), rel=0.06)
    assert report.slope_by_differences == pytest.approx(report.slope, rel=1e-3)
    assert report.reference == "Dense"
    assert report.trials["CG"].status is Status.CONVERGED
    assert report.trials["CG"].difference < 1e-2
    assert "hg.CG" in report.recommendation
    assert report.matvec_seconds > 0.0
    assert report.damping == 0.0


def dense_parts_of(inner: Callable, params: Tensor, log_decay: Tensor) -> tuple:
    from problems import Problem

    problem = Problem("", inner, lambda w, h: w.sum(), params, log_decay, None, 0, 0.0)
    return dense_parts(problem)


def untrained() -> tuple[Callable, Callable, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 3))
    x, y = torch.randn(64, 10), torch.randint(3, (64,))
    x_val, y_val = torch.randn(64, 10), torch.randint(3, (64,))
    params = {k: v.detach() for k, v in model.named_parameters()}

    def inner(w: dict[str, Tensor], h: Tensor) -> Tensor:
        penalty = sum(d * t.square().sum() for d, t in zip(h.exp(), w.values(), strict=True))
        return F.cross_entropy(functional_call(model, w, (x,)), y) + 0.5 * penalty

    def outer(w: dict[str, Tensor], h: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, w, (x_val,)), y_val)

    return inner, outer, params, torch.full((4,), -5.0)


def test_an_untrained_network_is_not_stationary_and_curves_downwards() -> None:
    report = hg.check(*untrained())
    assert not report.ok
    assert Finding.NOT_STATIONARY in report.findings
    assert Finding.NEGATIVE_CURVATURE in report.findings
    assert Finding.FINITE_DIFFERENCES_FAILED in report.findings
    assert report.eigenvalues.smallest < 0
    assert report.damping > -report.eigenvalues.smallest
    assert "train" in report.recommendation
    assert "damping" in report.recommendation
    printed = str(report)
    for words in ("NOT_STATIONARY", "eigenvalues of H", "Hessian product", "MINRES", "> First"):
        assert words in printed


def test_a_large_network_is_examined_without_its_matrix() -> None:
    h = torch.full((4,), -5.0)
    torch.manual_seed(1)
    wide = nn.Sequential(nn.Linear(10, 100), nn.Tanh(), nn.Linear(100, 3))
    x, y = torch.randn(64, 10), torch.randint(3, (64,))
    params = {k: v.detach() for k, v in wide.named_parameters()}

    def wide_inner(w: dict[str, Tensor], h: Tensor) -> Tensor:
        penalty = sum(d * t.square().sum() for d, t in zip(h.exp(), w.values(), strict=True))
        return F.cross_entropy(functional_call(wide, w, (x,)), y) + 0.5 * penalty

    report = hg.check(wide_inner, wide_inner, params, h)
    assert report.size > 1000
    assert report.reference == "CG"
    assert Finding.NEGATIVE_CURVATURE in report.findings


def test_a_point_beside_the_minimum_is_called_so() -> None:
    p = ridge()
    report = hg.check(p.inner, p.outer, 1.2 * p.params, p.hparams)
    assert Finding.NOT_STATIONARY in report.findings
    assert Finding.NEGATIVE_CURVATURE not in report.findings
    assert report.newton_step == pytest.approx(0.2 / 1.2, rel=1e-6)
    # Finite differences solve the inner problem again and see the true slope.
    assert Finding.FINITE_DIFFERENCES_DISAGREE in report.findings
    assert report.recommendation.startswith("First train")


def f(w: Tensor, h: Tensor) -> Tensor:
    return 0.5 * ((w - 1.0) ** 2).sum() + 0.5 * (h.exp() * w**2).sum()


def test_flat_ill_conditioned_and_detached_problems_are_named() -> None:
    h = torch.zeros(3, dtype=torch.float64)
    w = torch.full((3,), 0.5, dtype=torch.float64)
    flat = hg.check(lambda w, h: 0.5 * (w[:2] - h[:2]).square().sum(), f, 0 * w, h)
    assert Finding.SINGULAR in flat.findings
    assert flat.damping > 0
    scales = torch.tensor([1.0, 1e3, 1e7], dtype=torch.float64)
    ill = hg.check(lambda w, h: 0.5 * (scales * (w - h - 1) ** 2).sum(), f, 1 + h, h)
    assert Finding.ILL_CONDITIONED in ill.findings
    assert ill.condition == pytest.approx(1e7, rel=1e-3)
    detached = hg.check(lambda w, h: f(w, h.detach()), lambda w, h: (w**2).sum(), w, h)
    assert Finding.ZERO_HYPERGRADIENT in detached.findings


def test_what_the_gradient_misses_is_seen_by_finite_differences() -> None:
    """φ enters the inner problem through a detached copy as well: the formula cannot know."""
    h = torch.tensor([0.3, -0.2], dtype=torch.float64)

    def half_detached(w: Tensor, h: Tensor) -> Tensor:
        return 0.5 * (w - h - h.detach()).square().sum()

    report = hg.check(half_detached, lambda w, h: (w**2).sum(), 2 * h, h)
    assert report.findings == (Finding.FINITE_DIFFERENCES_DISAGREE,)
    assert report.slope_by_differences == pytest.approx(2 * report.slope, rel=1e-4)


def test_a_nystrom_preconditioner_is_recommended_where_it_pays() -> None:
    values = 1e-3 + 1.0 / torch.arange(1, 201, dtype=torch.float64) ** 2
    Q = torch.linalg.qr(
        torch.randn(200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q
    A = (Q * values) @ Q.T
    A = (A + A.T) / 2
    h = torch.ones(200, dtype=torch.float64)
    report = hg.check(
        lambda w, h: 0.5 * w @ A @ w - w @ h,
        lambda w, h: ((w - 1) ** 2).sum(),
        torch.linalg.solve(A, h),
        h,
    )
    assert report.ok
    assert "NystromPreconditioner(rank=25)" in report.recommendation
    assert report.trials["Nyström-PCG"].iterations < 0.6 * report.trials["CG"].iterations


def test_nothing_of_the_callers_changes_and_bad_input_is_refused() -> None:
    p = mlp()
    before = torch.get_rng_state()
    hg.check(p.inner, p.outer, p.params, p.hparams)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError, match="inner must be a function"):
        hg.check(3, p.outer, p.params, p.hparams)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outer must return a scalar"):
        hg.check(f, lambda w, h: w, torch.ones(2), torch.ones(2))


def test_a_dense_reference_that_rounding_breaks_gives_way_to_an_iterative_one() -> None:
    """Eigenvalues of 2e-5 and 1 to 2 in float32: the dense solve takes the smallest for zero."""
    diagonal = torch.cat([torch.full((1,), 2e-5), torch.linspace(1.0, 2.0, 99)])

    def inner(w: Tensor, c: Tensor) -> Tensor:
        return (0.5 * diagonal * w.square() - c * w).sum()

    def outer(w: Tensor, c: Tensor) -> Tensor:
        return w.sum()

    c = diagonal.clone()
    report = hg.check(inner, outer, torch.ones(100), c)
    assert report.reference == "CG"
    assert report.trials["MINRES"].difference < 1e-2
    assert report.slope == pytest.approx(report.slope_by_differences, rel=1e-2)


def test_a_tolerance_is_recommended_that_leaves_an_error_of_one_percent() -> None:
    diagonal = torch.cat([torch.logspace(-4, -3, 40), torch.ones(1)]).double()

    def inner(w: Tensor, c: Tensor) -> Tensor:
        return (0.5 * diagonal * w.square() - c * w).sum()

    def outer(w: Tensor, c: Tensor) -> Tensor:
        return w[-1] + 1e-4 * w[:-1].sum()  # of the residual only the last number is large

    c = diagonal.clone()
    report = hg.check(inner, outer, torch.ones_like(diagonal), c)
    assert Finding.SOLVERS_DISAGREE in report.findings
    rtol = re.search(r"hg\.CG\(rtol=(1e-\d+)", report.recommendation)
    assert rtol is not None
    tight = hg.hypergradient(
        inner, outer, torch.ones_like(diagonal), c, method=hg.CG(rtol=float(rtol[1]))
    ).grads
    exact = hg.hypergradient(inner, outer, torch.ones_like(diagonal), c, method=hg.Dense()).grads
    assert (tight - exact).norm() < 1e-2 * exact.norm()
