"""Every planted fault in a derivative is found, and nothing sound is blamed."""

from __future__ import annotations

import functools
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import flat_hypergradient
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad as hg
from hypergrad import Verdict
from hypergrad.diagnosis.report import Finding
from hypergrad.verification.fingerprint import Memory, fingerprint
from hypergrad.verification.verification import report_verification

SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "quadratic": lambda x: x + x.square() / 4,
    "gelu": F.gelu,
}


def slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]


class WrongSecond(torch.autograd.Function):
    """A share of the derivative is a constant to the second one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any, share: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.share = function, share
        return function(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        right, fixed = slope(ctx.function, x), slope(ctx.function, x.detach()).detach()
        return cotangent * (ctx.share * fixed + (1.0 - ctx.share) * right), None, None


class WrongFirst(torch.autograd.Function):
    """A derivative that is too long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any, share: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.share = function, share
        return function(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return cotangent * slope(ctx.function, x) * (1.0 + ctx.share), None, None


def regression(act: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    X, y, Xv, yv = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((60, 5), (60,), (60, 5), (60,))
    )

    def f(w: Tensor, c: Tensor) -> Tensor:
        return (act(X @ w) - y).square().mean() + (c.exp() * w.square()).sum()

    def g(w: Tensor, c: Tensor) -> Tensor:
        return (act(Xv @ w) - yv).square().mean()

    return f, g, torch.full((5,), 0.1, dtype=dtype), torch.full((5,), -1.0, dtype=dtype)


def two_layers(act: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    X, y, Xv, yv = draw(60, 5), draw(60), draw(60, 5), draw(60)
    w = {"first": draw(5, 16) / 2, "second": draw(16) / 4}

    def f(w: Any, c: Tensor) -> Tensor:
        penalty = c[0].exp() * w["first"].square().sum() + c[1].exp() * w["second"].square().sum()
        return (act(X @ w["first"]) @ w["second"] - y).square().mean() + penalty

    def g(w: Any, c: Tensor) -> Tensor:
        return (act(Xv @ w["first"]) @ w["second"] - yv).square().mean()

    return f, g, w, torch.full((2,), -3.0, dtype=dtype)


def penalised(act: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Any, ...]:
    """The function is one of φ alone."""
    f, g, w, c = regression(lambda z: z, dtype)
    return lambda w, c: f(w, c) + (act(c) * w.square()).sum() + w.square().sum(), g, w, c


def verified(problem: tuple[Any, ...], **options: Any) -> hg.Verification:
    result = flat_hypergradient(
        *problem,
        solver=hg.CG(maxiter=60), damping=0.2, on_failure="ignore", verify="always", **options,
    )  # fmt: skip
    assert result.verification is not None
    return result.verification


# (make, share, dtype): from 2 to 1000 percent.
PLANTED_SECOND = [
    (make, share, torch.float64)
    for make in (regression, two_layers)
    for share in (0.02, 0.1, 1.0, -9.0)
] + [(regression, 0.1, torch.float32), (two_layers, 1.0, torch.float32)]
PLANTED_FIRST = [
    (regression, 0.02, torch.float64), (two_layers, 0.1, torch.float64),
    (penalised, 0.02, torch.float64), (penalised, 0.2, torch.float32),
    (two_layers, 0.2, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(("make", "share", "dtype"), PLANTED_SECOND)
def test_every_wrong_second_derivative_is_found(
    name: str, make: Any, share: float, dtype: torch.dtype
) -> None:
    wrong = make(lambda z: WrongSecond.apply(z, SMOOTH[name], share), dtype)
    found = verified(wrong, mode="reverse")
    assert found.status is Verdict.FAILED
    assert "second" in found.wrong
    assert "first" not in found.wrong
    assert found.suspects == ("WrongSecondBackward",)
    assert verified(make(SMOOTH[name], dtype)).status is Verdict.PASSED


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(("make", "share", "dtype"), PLANTED_FIRST)
def test_every_wrong_first_derivative_is_found(
    name: str, make: Any, share: float, dtype: torch.dtype
) -> None:
    found = verified(make(lambda z: WrongFirst.apply(z, SMOOTH[name], share), dtype))
    assert found.status is Verdict.FAILED
    assert {"first", "outer"}.intersection(found.wrong)
    assert found.suspects == ("WrongFirstBackward",)


def test_a_wrong_gradient_of_the_outer_objective_is_found() -> None:
    f, _, w, c = regression(torch.tanh, torch.float64)
    _, g, *_ = regression(lambda z: WrongFirst.apply(z, torch.tanh, 0.05), torch.float64)
    found = verified((f, g, w, c))
    assert found.wrong == ("outer",)
    assert found.suspects == ("WrongFirstBackward",)


def test_an_outer_gradient_that_is_zero_by_a_fault_is_found() -> None:
    f, _, w, c = regression(torch.tanh, torch.float64)
    _, g, *_ = regression(lambda z: WrongFirst.apply(z, torch.tanh, -1.0), torch.float64)
    found = verified((f, g, w, c))
    assert found.wrong == ("outer",)
    # At a minimum of g it is zero by right.
    assert verified((f, lambda v, c: (v - w).square().sum(), w, c)).status is Verdict.PASSED


def relu(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


def pooled(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, width, 3), nn.MaxPool1d(2), nn.LeakyReLU(),
        nn.Flatten(), nn.Linear(3 * width, 3),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [relu, pooled])
@pytest.mark.parametrize("rows", [50, 3000])
def test_kinks_are_no_failure(make: Any, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = make(32).to(dtype)
    X, y = torch.randn(rows, 8, dtype=dtype), torch.randint(0, 3, (rows,))

    def f(p: Any, h: Tensor) -> Tensor:
        loss = F.cross_entropy(functional_call(model, p, (X,)), y)
        return loss + h.exp() * sum(v.square().sum() for v in p.values())

    def g(p: Any, h: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, p, (X + 0.1,)), y)

    problem = f, g, dict(model.named_parameters()), torch.tensor(-3.0, dtype=dtype)
    assert verified(problem).status is not Verdict.FAILED


def test_absolute_errors_of_many_rows_are_no_failure() -> None:
    """In float32 the differences agree: they see the curvature of the mean of many kinks."""
    torch.manual_seed(0)
    X = torch.randn(200_000, 3)
    y = X @ torch.randn(3) + torch.randn(200_000)
    problem = (
        lambda w, c: (X @ w - y).abs().mean() + c.exp() * w.square().sum(),
        lambda w, c: (X @ w - y).square().mean(),
        torch.zeros(3),
        torch.tensor(-3.0),
    )
    assert verified(problem).status is not Verdict.FAILED


def test_half_precision_inside_is_no_failure() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    X, y = torch.randn(100, 8), torch.randn(100)

    def f(p: Any, h: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = functional_call(model, p, (X,))[:, 0]
        return (outputs.float() - y).square().mean() + h.exp() * sum(
            v.square().sum() for v in p.values()
        )

    problem = f, lambda p, h: f(p, h.detach()), dict(model.named_parameters()), torch.tensor(-2.0)
    assert verified(problem).status is not Verdict.FAILED


@pytest.mark.parametrize("seed", range(5))
def test_single_precision_inside_of_double_is_no_failure_and_hides_none(seed: int) -> None:
    """As a norm that is computed in float32 whatever the dtype of the model."""
    torch.manual_seed(seed)
    X, y = torch.randn(40, 6).double(), torch.randn(40).double()

    def inner(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def f(w: Tensor, c: Tensor) -> Tensor:
            normed = F.normalize((X * w).float(), dim=1).double()
            return (act(normed @ w) - y).square().mean() + c.exp() * w.square().sum()

        return f

    def g(w: Tensor, c: Tensor) -> Tensor:
        return ((X @ w).tanh() - y).square().mean().float()

    w, c = torch.randn(6).double(), torch.tensor(0.0).double()
    options: Any = {"damping": 5.0, "verify": "always", "mode": "reverse"}
    found = flat_hypergradient(inner(F.silu), g, w, c, **options).verification
    assert found is not None
    assert found.status is not Verdict.FAILED, found
    wrong = inner(lambda x: WrongSecond.apply(x, F.silu, 0.5))
    with pytest.warns(hg.VerificationWarning, match="second derivative.*WrongSecond"):
        flat_hypergradient(wrong, g, w, c, **options)


def test_what_cannot_be_evaluated_next_to_theta_is_inconclusive() -> None:
    theta = torch.tensor([1.0, 2.0])

    def f(w: Tensor, c: Tensor) -> Tensor:
        if not torch.equal(w.detach(), theta):
            raise RuntimeError("out of the domain")
        return (w - c).square().sum()

    found = verified((f, lambda w, c: w.square().sum(), theta, torch.ones(2)))
    assert found.status is Verdict.INCONCLUSIVE


def test_auto_goes_on_with_differences_and_says_so_once() -> None:
    wrong = regression(lambda z: WrongSecond.apply(z, F.silu, 0.5), torch.float64)
    right = regression(F.silu, torch.float64)
    expected = hg.hypergradient(*right, method=hg.Implicit(damping=0.5)).grads
    with pytest.warns(hg.DoubleBackwardWarning, match="going on with finite differences") as caught:
        first = hg.hypergradient(*wrong, method=hg.Implicit(damping=0.5))
    assert len(caught) == 1
    assert torch.allclose(first.grads, expected, rtol=1e-6)
    assert first.verification is not None
    assert first.verification.status is Verdict.PASSED
    # The next call knows, without a word.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = hg.hypergradient(*wrong, method=hg.Implicit(damping=0.5))
    assert second.verification is None
    assert torch.allclose(second.grads, expected, rtol=1e-6)


def test_unrolled_goes_on_with_differences_in_every_memory_mode() -> None:
    right = regression(F.silu, torch.float64)
    wrong = regression(lambda z: WrongSecond.apply(z, F.silu, 0.5), torch.float64)
    for memory in ("recompute", "graph", "checkpoint"):
        method = hg.Unrolled(hg.optimizers.SGD(lr=0.1), steps=20, memory=memory)
        expected = hg.hypergradient(*right, method=method).grads
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = hg.hypergradient(*wrong, method=method, verify="always")
        told = [w.category for w in caught if issubclass(w.category, hg.HypergradWarning)]
        assert told == ([hg.DoubleBackwardWarning] if memory == "recompute" else [])
        assert result.verification.status is Verdict.PASSED
        assert torch.allclose(result.grads, expected, rtol=1e-6)


def test_a_mode_that_was_asked_for_stays_and_is_told() -> None:
    wrong = regression(lambda z: WrongSecond.apply(z, F.silu, 0.5), torch.float64)
    message = "second derivative of inner .* suspect: WrongSecondBackward; use mode='finite-diff"
    with pytest.warns(hg.VerificationWarning, match=message):
        hg.hypergradient(*wrong, method=hg.Implicit(damping=0.5, mode="reverse"))
    with pytest.raises(hg.VerificationError, match=message):
        hg.hypergradient(
            *wrong,
            method=hg.Implicit(damping=0.5, mode="reverse"),
            verify="always",
            on_failure="raise",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hg.hypergradient(*wrong, method=hg.Implicit(damping=0.5, mode="reverse"), verify="never")


def test_differences_that_are_wrong_do_not_recommend_themselves() -> None:
    found = hg.Verification(Verdict.FAILED, second=0.1, wrong=("second",))
    with pytest.warns(hg.VerificationWarning, match="compute in float64"):
        report_verification(found, mode="finite-difference", on_failure="warn")


def test_a_wrong_gradient_is_told_with_what_to_do() -> None:
    wrong = regression(lambda z: WrongFirst.apply(z, F.silu, 0.5), torch.float64)
    with pytest.warns(hg.VerificationWarning, match=r"first derivative .*gradcheck"):
        hg.hypergradient(*wrong, method=hg.Implicit(damping=0.5))


def test_once_is_for_each_kind_of_problem() -> None:
    f, g, w, c = regression(lambda z: torch.tanh(z), torch.float64)
    assert hg.hypergradient(f, g, w, c).verification is not None
    assert hg.hypergradient(f, g, w, c).verification is None
    assert hg.hypergradient(f, g, w, c, verify="always").verification is not None
    # Other dtypes and another function are other problems.
    f32, g32, w32, c32 = regression(lambda z: torch.tanh(z), torch.float32)
    assert hg.hypergradient(f32, g32, w32, c32).verification is not None
    other, *_ = regression(F.silu, torch.float64)
    assert hg.hypergradient(other, g, w, c).verification is not None
    assert hg.hypergradient(other, g, w, c, verify="never").verification is None


def test_fingerprints_tell_functions_apart_and_batches_not() -> None:
    def make(act: Any, batch: Tensor) -> Any:
        return lambda w: act(w * batch)

    same = fingerprint(make(torch.tanh, torch.ones(3)))
    assert fingerprint(make(torch.tanh, torch.zeros(5))) == same
    assert fingerprint(make(F.silu, torch.ones(3))) != same
    assert fingerprint(make(torch.tanh, torch.ones(3, dtype=torch.float64))) != same
    closed = [fingerprint(lambda w, on=on: w * on) for on in (True, False, True)]
    assert closed[0] != closed[1]
    assert closed[0] == closed[2]
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert fingerprint(functools.partial(make, one)) == fingerprint(functools.partial(make, one))
    assert fingerprint(functools.partial(make, one)) != fingerprint(functools.partial(make, other))
    averaged = [hg.Averaged(make, [torch.ones(k), torch.ones(2)]) for k in (2, 3)]
    assert fingerprint(averaged[0]) == fingerprint(averaged[1])
    nested: list[Any] = []
    nested.append(nested)
    assert fingerprint(nested) == fingerprint(nested)


def test_a_memory_forgets_the_oldest() -> None:
    memory = Memory()
    for key in range(1000):
        memory.put(key, "kept")
    assert memory.get(999) == "kept"
    assert memory.get(0) is None


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    X = torch.randn(20, 5)
    calls = []

    def f(p: Any, h: Tensor) -> Tensor:
        calls.append(random.random() + np.random.rand())  # noqa: NPY002
        penalty = h.exp() * sum(v.square().sum() for v in p.values())
        return functional_call(model, p, (X,)).square().mean() + penalty

    params, h = dict(model.named_parameters()), torch.tensor(0.0)
    ends = []
    for verify in ("always", "never"):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        buffers = {k: v.clone() for k, v in model.named_buffers()}
        hg.hypergradient(f, f, params, h, verify=verify, on_failure="ignore")
        ends.append((random.random(), np.random.rand(), float(torch.rand(()))))  # noqa: NPY002
        assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert ends[0] == ends[1]


def test_the_loop_verifies_at_its_first_step_and_every_hundredth() -> None:
    w, c = torch.zeros(2), torch.zeros(2)

    def solver(method: Any, **options: Any) -> hg.BilevelSolver:
        with torch.no_grad():
            w.zero_(), c.zero_()
        return hg.BilevelSolver(
            hg.Level(
                lambda w, c, _: (w - 1.0).square().sum() + c.exp() @ w.square(),
                w,
                torch.optim.SGD([w], 0.1),
            ),
            hg.Level(
                lambda w, c, _: ((w - 2.0).square().sum(), {"metric": 1.0}),
                c,
                torch.optim.SGD([c], 0.01),
            ),
            method=method,
            inner_steps=1,
            outer_steps=102,
            **options,
        )

    for method in (hg.CG(), hg.Unrolled(), hg.single_loop.SOBA()):
        history = solver(method).run()
        steps = [k for k, verdict in enumerate(history["verification"]) if verdict is not None]
        assert steps == [0, 100], method
        assert set(history["outer/metric"]) == {1.0}
    history = solver(hg.CG(), verify="never").run()
    assert "verification" not in history.columns


def test_the_loop_goes_on_with_differences() -> None:
    found = []
    for act in (F.silu, lambda z: WrongSecond.apply(z, F.silu, 0.9)):
        for method in (hg.CG(), hg.Unrolled(), hg.single_loop.SOBA()):
            f, g, w, c = regression(act, torch.float64)
            solver = hg.BilevelSolver(
                hg.Level(lambda w, c, _, f=f: f(w, c), w, torch.optim.SGD([w], 0.1)),
                hg.Level(lambda w, c, _, g=g: g(w, c), c, torch.optim.SGD([c], 0.5)),
                method=method,
                inner_steps=1,
                outer_steps=5,
            )
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                solver.run()
            told = [w for w in caught if issubclass(w.category, hg.DoubleBackwardWarning)]
            assert len(told) == (0 if act is F.silu else 1)
            found.append(c.clone())
    for right, wrong in zip(found[:3], found[3:], strict=True):
        assert torch.allclose(right, wrong, rtol=1e-5)


def test_check_verifies_and_compares_whole_runs() -> None:
    problem = regression(F.silu, torch.float64)
    report = hg.check(*problem)
    assert report.verification.status is Verdict.PASSED
    wrong = regression(lambda z: WrongSecond.apply(z, F.silu, 0.5), torch.float64)
    report = hg.check(*wrong, method=hg.Implicit(mode="reverse"))
    assert Finding.DERIVATIVE_WRONG in report.findings
    assert "WrongSecondBackward" in str(report)

    method = hg.Unrolled(hg.optimizers.Adam(lr=0.05), steps=20)
    unrolled = hg.check(*problem, method=method)
    assert unrolled.ok
    assert unrolled.steps == 20
    assert unrolled.slope_by_differences == pytest.approx(unrolled.slope, rel=1e-5)
    assert "slope by differences of runs" in str(unrolled)
    biased = hg.check(*problem, method=hg.Unrolled(hg.optimizers.SGD(0.05), 20, truncate=1))
    assert Finding.UNROLLED_DISAGREES in biased.findings
    tried = hg.check(*problem, method=hg.GMRES()).trials["given: GMRES"]
    assert tried.status is hg.Status.CONVERGED
    with pytest.raises(TypeError, match=r"method must be a linear solver"):
        hg.check(*problem, method="cg")  # type: ignore[call-overload]


def test_check_of_whole_runs_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))
    model.double()
    X, y = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, dtype=torch.float64)

    def f(p: Any, h: Tensor, rows: Tensor) -> Tensor:
        error = functional_call(model, p, (X[rows],))[:, 0] - y[rows]
        return error.square().mean() + h.exp() * sum(v.square().sum() for v in p.values())

    def g(p: Any, h: Tensor) -> Tensor:
        return (functional_call(model, p, (X,))[:, 0] - y).square().mean()

    before = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = torch.get_rng_state()
    batches = [torch.arange(k, k + 20) for k in range(10)]
    report = hg.check(
        f, g, dict(model.named_parameters()), torch.tensor(-3.0, dtype=torch.float64),
        method=hg.Unrolled(hg.optimizers.SGD(lr=0.1), steps=batches),
    )  # fmt: skip
    assert report.ok
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert math.isfinite(report.outer_value)


def test_verify_is_checked() -> None:
    with pytest.raises(ValueError, match="verify must be one of 'once', 'always', 'never'"):
        hg.hypergradient(*regression(F.silu, torch.float32), verify="sometimes")  # type: ignore
