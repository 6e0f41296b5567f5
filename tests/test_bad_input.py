"""Bad input: which error, which words, and that nothing of the caller's has changed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from problems import flat_hypergradient
from torch import Tensor, nn

import hypergrad as hg


def f(w: Tensor, p: Tensor) -> Tensor:
    return 0.5 * (w - p).square().sum()


def g(w: Tensor, p: Tensor) -> Tensor:
    return w.square().sum()


W, P = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5])
TWICE = torch.ones(2)

# what to change in a good call, the error, its words
CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "inner-not-callable": (
        {"inner": 3},
        TypeError,
        "inner must be a function of (params, hparams)",
    ),
    "outer-not-callable": ({"outer": None}, TypeError, "outer must be a function"),
    "inner-not-scalar": (
        {"inner": lambda w, p: (w - p).square()},
        ValueError,
        "inner must return a scalar, got shape (2,); reduce it, for example with .mean()",
    ),
    "outer-not-scalar": (
        {"outer": lambda w, p: w},
        ValueError,
        "outer must return a scalar, got shape (2,)",
    ),
    "inner-not-a-tensor": (
        {"inner": lambda w, p: 1.0},
        TypeError,
        "inner must return a scalar tensor, got float",
    ),
    "outer-integer": (
        {"outer": lambda w, p: w.argmax()},
        TypeError,
        "outer must return a floating-point scalar, got dtype torch.int64",
    ),
    "inner-nan": (
        {"inner": lambda w, p: f(w, p) * torch.nan},
        ValueError,
        "inner must return a finite value, got nan",
    ),
    "outer-infinite": (
        {"outer": lambda w, p: g(w, p) / 0.0},
        ValueError,
        "outer must return a finite value, got inf",
    ),
    "inner-ignores-params": (
        {"inner": lambda w, p: p.sum()},
        ValueError,
        "inner must depend on the inner parameters, got a value that does not",
    ),
    "inner-detaches-params": (
        {"inner": lambda w, p: f(w.detach(), p)},
        ValueError,
        "inner must depend on the inner parameters",
    ),
    "inner-constant": (
        {"inner": lambda w, p: torch.tensor(1.0)},
        ValueError,
        "inner must depend on the inner parameters",
    ),
    "outer-ignores-params": (
        {"outer": lambda w, p: p.sum()},
        ValueError,
        "outer must depend on the inner parameters",
    ),
    "params-empty": ({"params": ()}, ValueError, "params must hold at least one tensor, got ()"),
    "hparams-empty": ({"hparams": {}}, ValueError, "hparams must hold at least one tensor, got {}"),
    "params-no-element": (
        {"params": [torch.zeros(0)]},
        ValueError,
        "params must hold at least one element, got only tensors of size 0",
    ),
    "params-integer": (
        {"params": {"w": torch.ones(2, dtype=torch.int64)}},
        TypeError,
        "params['w'] must be a floating-point tensor, got dtype torch.int64",
    ),
    "hparams-boolean": (
        {"hparams": (P, torch.tensor([True]))},
        TypeError,
        "hparams[1] must be a floating-point tensor, got dtype torch.bool",
    ),
    "params-complex": (
        {"params": torch.ones(2, dtype=torch.complex64)},
        TypeError,
        "params must be a floating-point tensor, got dtype torch.complex64",
    ),
    "params-sparse": (
        {"params": W.to_sparse()},
        TypeError,
        "params must be a dense tensor, got layout torch.sparse_coo",
    ),
    "hparams-number": (
        {"hparams": {"lr": 0.1}},
        TypeError,
        "hparams['lr'] must be a tensor, got float",
    ),
    "params-module": (
        {"params": nn.Linear(2, 2).requires_grad_(False)},
        ValueError,
        "params must have parameters that require gradients, got a Linear with none",
    ),
    "params-generator": (
        {"params": nn.Linear(2, 2).parameters()},
        TypeError,
        "params must be a tensor, got generator; pass tuple(...) of it, such as",
    ),
    "params-twice": (
        {"params": (TWICE, TWICE)},
        ValueError,
        "params must hold each tensor once, got one at params[0] and params[1]",
    ),
    "solver-a-string": (
        {"solver": "cg"},
        TypeError,
        "solver must be a LinearSolver such as hg.CG(), got str",
    ),
    "solver-a-class": ({"solver": hg.CG}, TypeError, "solver must be a LinearSolver"),
    "damping-negative": (
        {"damping": -0.1},
        ValueError,
        "damping must be a finite number >= 0, got -0.1",
    ),
    "damping-tensor": (
        {"damping": torch.tensor(0.1)},
        TypeError,
        "damping must be a real number, got Tensor",
    ),
    "x0-structure": ({"x0": (W,)}, ValueError, "x0 must have the structure of params"),
    "x0-shape": ({"x0": torch.ones(3)}, ValueError, "got a leaf of shape (3,) where (2,)"),
    "x0-dtype": (
        {"x0": torch.ones(2, dtype=torch.float16)},
        ValueError,
        "got a leaf of torch.float16 on cpu where torch.float32 on cpu was expected",
    ),
    "x0-device": (
        {"x0": torch.ones(2, device="meta")},
        ValueError,
        "got a leaf of torch.float32 on meta where torch.float32 on cpu",
    ),
    "on-failure": (
        {"on_failure": "panic"},
        ValueError,
        "on_failure must be one of 'warn', 'raise', 'ignore', got 'panic'",
    ),
    "mode": ({"mode": "fast"}, ValueError, "mode must be one of 'auto', 'reverse'"),
    "rank-above-n": (
        {"solver": hg.Nystrom(rank=3)},
        ValueError,
        "rank must be at most the number of parameters, got rank=3 for n=2",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_arguments_are_refused_by_name_and_change_nothing(name: str) -> None:
    changes, error, words = CASES[name]
    params, hparams = W.clone().requires_grad_(), P.clone().requires_grad_()
    hparams.grad = torch.ones(2)
    random_state = torch.get_rng_state()
    arguments: dict[str, Any] = {"inner": f, "outer": g, "params": params, "hparams": hparams}
    arguments |= changes
    with pytest.raises(error, match=re.escape(words)):
        flat_hypergradient(**arguments)
    if isinstance(arguments.get("solver"), hg.Nystrom):
        return
    assert torch.equal(params, W)
    assert params.grad is None
    assert torch.equal(hparams.grad, torch.ones(2))
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: hg.CG(rtol=-1.0), ValueError, "rtol must be a finite number >= 0, got -1.0"),
        (lambda: hg.CG(rtol=float("nan")), ValueError, "rtol must be a finite number"),
        (lambda: hg.CG(rtol="tight"), TypeError, "rtol must be a real number, got str"),
        (lambda: hg.CG(atol=-1), ValueError, "atol must be a finite number >= 0, got -1"),
        (lambda: hg.CG(maxiter=0), ValueError, "maxiter must be at least 1, got 0"),
        (lambda: hg.CG(maxiter=2.5), TypeError, "maxiter must be an integer >= 1 or None"),
        (
            lambda: hg.CG(preconditioner=3),
            TypeError,
            "preconditioner must be a Preconditioner",
        ),
        (lambda: hg.Neumann(terms=0), ValueError, "terms must be at least 1, got 0"),
        (lambda: hg.Neumann(step=0.0), ValueError, "step must be a finite number > 0, got 0.0"),
        (lambda: hg.Neumann(rtol=-1.0), ValueError, "rtol must be a finite number >= 0"),
        (lambda: hg.Nystrom(rank=0), ValueError, "rank must be at least 1, got 0"),
        (lambda: hg.Nystrom(rank=True), TypeError, "rank must be an integer >= 1, got bool"),
        (lambda: hg.Nystrom(rho=0.0), ValueError, "rho must be a finite number > 0, got 0.0"),
        (lambda: hg.Nystrom(chunk_size=0), ValueError, "chunk_size must be at least 1, got 0"),
        (lambda: hg.Nystrom(generator=7), TypeError, "generator must be a torch.Generator or None"),
        (lambda: hg.Identity(scale=-1.0), ValueError, "scale must be a finite number > 0"),
        (lambda: hg.Dense(max_size=0), ValueError, "max_size must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(build: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()


@pytest.mark.parametrize("mode", ["reverse", "forward", "finite-difference", "compiled"])
def test_every_mode_refuses_a_bad_inner_objective(mode: Any) -> None:
    for inner, words in (
        (lambda w, p: p.sum(), "inner must depend on the inner parameters"),
        (lambda w, p: w, "inner must return a scalar"),
        (lambda w, p: w.sum() * torch.inf, "inner must return a finite value"),
    ):
        with pytest.raises(ValueError, match=words):
            hg.operators.hessian(inner, W, P, mode=mode)


def test_a_second_derivative_that_is_nan_is_reported_not_returned() -> None:
    def inner(w: Tensor, p: Tensor) -> Tensor:
        return (w - p).square().sum() + (w - w.detach()).abs().pow(1.5).sum()

    with pytest.warns(hg.LinearSolveWarning, match="NON_FINITE"):
        result = hg.hypergradient(inner, g, W, P, method=hg.Implicit(mode="reverse"))
    assert result.solve.status is hg.Status.NON_FINITE
    assert torch.isfinite(result.solve.x).all()


def test_solvers_refuse_vectors_of_another_space() -> None:
    A = hg.operators.Matrix(torch.eye(2))
    with pytest.raises(ValueError, match="rhs must have the shapes of the operator's vectors"):
        hg.CG().solve(A, torch.ones(3))
    with pytest.raises(ValueError, match="x0 must have the structure of the operator's vectors"):
        hg.CG().solve(A, torch.ones(2), x0=[torch.ones(2)])
    with pytest.raises(TypeError, match="rhs must be a floating-point tensor"):
        hg.CG().solve(A, torch.ones(2, dtype=torch.int32))
