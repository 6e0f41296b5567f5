"""`hypergradient` against exact answers: every solver on every problem it claims."""

from __future__ import annotations

from collections.abc import Callable

import optree
import pytest
import torch
from problems import (
    ALL,
    HUGE,
    SMALL,
    Problem,
    name_of,
    quadratic,
    relative_error,
    ridge,
    traits,
)
from solvers import SOLVERS

import hypergrad as hg

PAIRS = [
    pytest.param(
        case.exact, make, id=f"{name}-{name_of(make)}", marks=[pytest.mark.long] * (make in HUGE)
    )
    for name, case in SOLVERS.items()
    if case.exact is not None
    for make in ALL + HUGE
    if case.affordable(*traits(make))
]


@pytest.mark.parametrize(("make_solver", "make"), PAIRS)
def test_every_solver_converges_to_the_exact_hypergradient(
    make_solver: Callable[[Problem], hg.LinearSolver], make: Callable[[], Problem]
) -> None:
    problem = make()
    result = hg.hypergradient(
        problem.inner,
        problem.outer,
        problem.params,
        problem.hparams,
        method=hg.Implicit(make_solver(problem), damping=problem.damping),
    )
    assert not result.solve.status.failed
    assert relative_error(result.grads, problem.hypergradient) < 1e-8


@pytest.mark.parametrize("make", ALL, ids=name_of)
def test_float32_agrees_to_what_its_precision_allows(make: Callable[[], Problem]) -> None:
    problem = make()
    single = problem.to(torch.float32)
    result = hg.hypergradient(
        single.inner,
        single.outer,
        single.params,
        single.hparams,
        method=hg.Implicit(hg.CG(rtol=1e-7), damping=single.damping),
        on_failure="ignore",
    )
    assert result.solve.status in (hg.Status.CONVERGED, hg.Status.STAGNATED)
    assert all(leaf.dtype == torch.float32 for leaf in optree.tree_leaves(result.grads))
    # A backward stable solve loses the condition number, a hundred roundings deep.
    bound = 100 * torch.finfo(torch.float32).eps * problem.condition
    assert relative_error(result.grads, problem.hypergradient) < max(bound, 1e-5)


@pytest.mark.parametrize("make", SMALL, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_sensible(make: Callable[[], Problem], dtype: torch.dtype) -> None:
    problem = make()
    half = problem.to(dtype)
    result = hg.hypergradient(
        half.inner,
        half.outer,
        half.params,
        half.hparams,
        method=hg.Implicit(hg.CG(rtol=1e-2), damping=half.damping),
        on_failure="ignore",
    )
    assert all(leaf.dtype == dtype for leaf in optree.tree_leaves(result.grads))
    assert all(leaf.dtype == torch.float32 for leaf in optree.tree_leaves(result.solve.x))
    # Rounding θ and φ moves the answer by their epsilon times the condition number already.
    bound = 5 * torch.finfo(dtype).eps * problem.condition
    assert relative_error(result.grads, problem.hypergradient) < max(bound, 0.05)


@pytest.mark.parametrize("solver", [
    hg.CG(rtol=1e-2), hg.Neumann(terms=30, step=0.3), hg.Nystrom(rank=10, rho=0.1),
    hg.Nystrom(rank=10, rho=0.1, chunk_size=3), hg.Dense(), hg.Identity(0.5),
])  # fmt: skip
def test_every_method_in_bfloat16_is_near_itself_in_float64(solver: hg.LinearSolver) -> None:
    double, half = ridge(), ridge().to(torch.bfloat16)
    grads = [
        hg.hypergradient(p.inner, p.outer, p.params, p.hparams, method=solver).grads
        for p in (double, half)
    ]
    # Eight bits an operation, and some twenty operations deep.
    assert relative_error(grads[1], grads[0]) < 0.1


@pytest.mark.parametrize("make", SMALL, ids=name_of)
def test_modes_agree(make: Callable[[], Problem]) -> None:
    problem = make()
    tolerances = {
        "reverse": 1e-8,
        "forward": 1e-8,
        "finite-difference": 1e-5,
        "auto": 1e-8,
        "compiled": 1e-8,
    }
    for mode, tolerance in tolerances.items():
        result = hg.hypergradient(
            problem.inner,
            problem.outer,
            problem.params,
            problem.hparams,
            method=hg.Implicit(
                hg.CG(rtol=max(tolerance / 100, 1e-11)), damping=problem.damping, mode=mode
            ),
            on_failure="ignore",
        )
        assert relative_error(result.grads, problem.hypergradient) < tolerance, mode


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: (w[:2], w[2:]),
        lambda w: [w[:1].reshape(()), w[1:]],
        lambda w: {"b": w[:2], "a": {"deep": (w[2:],)}},
    ],
    ids=["tensor", "tuple", "list-with-scalar", "nested-dict"],
)
@pytest.mark.parametrize("name", SOLVERS)
def test_results_have_the_structure_of_the_trees(wrap: Callable, name: str) -> None:
    problem = quadratic(5, 10.0)
    solver = (SOLVERS[name].exact or (lambda _: SOLVERS[name].cheap()))(problem)

    def flat(tree: object) -> torch.Tensor:
        if isinstance(tree, dict):
            return torch.cat([tree["b"], tree["a"]["deep"][0]])
        if isinstance(tree, torch.Tensor):
            return tree
        return torch.cat([leaf.reshape(-1) for leaf in tree])  # type: ignore[attr-defined]

    params, hparams = wrap(problem.params), {"phi": [problem.hparams]}
    result = hg.hypergradient(
        lambda w, h: problem.inner(flat(w), h["phi"][0]),
        lambda w, h: problem.outer(flat(w), h["phi"][0]),
        params,
        hparams,
        method=solver,
    )
    assert optree.tree_structure(result.grads) == optree.tree_structure(hparams)
    assert optree.tree_structure(result.solve.x) == optree.tree_structure(params)
    if SOLVERS[name].exact is not None:
        assert relative_error(result.grads["phi"][0], problem.hypergradient) < 1e-9


def test_the_receipt_says_what_happened() -> None:
    problem = ridge()
    shifted = problem.params + 0.1
    result = hg.hypergradient(problem.inner, problem.outer, shifted, problem.hparams)
    w = shifted.clone().requires_grad_()
    value = problem.inner(w, problem.hparams)
    (gradient,) = torch.autograd.grad(value, w)
    assert result.inner_grad_norm == pytest.approx(float(gradient.norm()), rel=1e-12)
    assert result.inner_value == pytest.approx(value.item(), rel=1e-12)
    assert result.outer_value == pytest.approx(
        problem.outer(shifted, problem.hparams).item(), rel=1e-12
    )
    assert result.solve.converged
    assert result.solve.relative_residual is not None
    assert result.solve.relative_residual <= 1e-5
    assert "CONVERGED" in str(result.solve)


def test_a_warm_start_needs_no_iteration() -> None:
    problem = ridge()
    cold = hg.hypergradient(problem.inner, problem.outer, problem.params, problem.hparams)
    warm = hg.hypergradient(
        problem.inner, problem.outer, problem.params, problem.hparams, x0=cold.solve.x
    )
    assert cold.solve.iterations > 0
    assert warm.solve.iterations == 0
    assert relative_error(warm.grads, cold.grads) < 1e-12


def test_parameters_that_carry_a_graph_are_not_counted_twice() -> None:
    problem = ridge()
    hparams = problem.hparams.clone().requires_grad_()
    attached = problem.params + 0.0 * hparams.sum()
    plain = hg.hypergradient(problem.inner, problem.outer, problem.params, problem.hparams)
    result = hg.hypergradient(problem.inner, problem.outer, attached, hparams)
    assert torch.equal(result.grads, plain.grads)
    assert hparams.grad is None
    assert not result.grads.requires_grad


def test_outer_parameters_that_only_g_uses_or_nobody() -> None:
    problem = ridge()
    hparams = {
        "decay": problem.hparams,
        "only_outer": torch.tensor([2.0, 3.0], dtype=torch.float64),
        "unused": torch.ones(3),
    }
    with pytest.warns(hg.HypergradWarning, match="neither inner nor outer uses hparams"):
        result = hg.hypergradient(
            lambda w, h: problem.inner(w, h["decay"]),
            lambda w, h: problem.outer(w, h["decay"]) + h["only_outer"].square().sum(),
            problem.params,
            hparams,
            method=hg.CG(rtol=1e-12),
        )
    assert relative_error(result.grads["decay"], problem.hypergradient) < 1e-9
    assert torch.equal(result.grads["only_outer"], 2 * hparams["only_outer"])
    assert torch.equal(result.grads["unused"], torch.zeros(3))


@pytest.mark.parametrize("mode", ["reverse", "forward", "finite-difference", "compiled"])
def test_an_inner_objective_that_ignores_the_outer_parameters(mode: hg.operators.Mode) -> None:
    w, phi = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    result = hg.hypergradient(
        lambda w, p: w.square().sum(),
        lambda w, p: (w.sum() * p).sum(),
        w,
        phi,
        method=hg.Implicit(mode=mode),
    )
    assert torch.equal(result.grads, torch.tensor([3.0]))


def test_a_parameter_that_the_inner_objective_does_not_use_is_reported() -> None:
    """H is singular there: fine where g does not need it, a breakdown where g does."""
    params = {"used": torch.tensor([1.0, 2.0]), "unused": torch.tensor([5.0])}
    phi = torch.tensor([0.5])

    def inner(w: dict, p: torch.Tensor) -> torch.Tensor:
        return 0.5 * (w["used"] - p).square().sum()

    fine = hg.hypergradient(inner, lambda w, p: w["used"].sum(), params, phi)
    assert fine.solve.converged
    assert fine.grads.item() == pytest.approx(2.0)
    both = (inner, lambda w, p: w["used"].sum() + w["unused"].sum(), params, phi)
    with pytest.warns(hg.LinearSolveWarning, match="singular along a direction"):
        broken = hg.hypergradient(*both, method=hg.Implicit(damping=0.0))
    assert broken.solve.status is hg.Status.BREAKDOWN
    assert broken.solve.relative_residual < 1.0
    # By default H is made regular by a damping that is small beside it.
    mended = hg.hypergradient(*both)
    assert mended.solve.converged
    assert 0.0 < mended.damping <= 0.01
    assert mended.grads.item() == pytest.approx(2.0 / (1.0 + mended.damping), rel=1e-4)


def test_a_failed_solve_warns_raises_or_is_ignored() -> None:
    problem = quadratic(60, 1e4)
    arguments = (problem.inner, problem.outer, problem.params, problem.hparams)
    solver = hg.CG(rtol=1e-10, maxiter=3)
    with pytest.warns(hg.LinearSolveWarning, match="CG failed: MAX_ITERATIONS: 3 iterations"):
        warned = hg.hypergradient(*arguments, method=solver)
    ignored = hg.hypergradient(*arguments, method=solver, on_failure="ignore")
    assert torch.equal(warned.grads, ignored.grads)
    with pytest.raises(hg.LinearSolveError, match="raise maxiter") as caught:
        hg.hypergradient(*arguments, method=solver, on_failure="raise")
    assert caught.value.solution.iterations == 3


def test_works_under_no_grad_and_inference_mode() -> None:
    problem = ridge()
    plain = hg.hypergradient(problem.inner, problem.outer, problem.params, problem.hparams)
    with torch.no_grad():
        quiet = hg.hypergradient(problem.inner, problem.outer, problem.params, problem.hparams)
    with torch.inference_mode():
        params = problem.params * 1.0
        inference = hg.hypergradient(problem.inner, problem.outer, params, problem.hparams)
    assert torch.equal(plain.grads, quiet.grads)
    assert torch.equal(plain.grads, inference.grads)


def test_accumulate_grad_adds_like_backward() -> None:
    hparams = {"a": torch.zeros(2, requires_grad=True), "b": [torch.zeros((), requires_grad=True)]}
    grads = {"a": torch.tensor([1.0, 2.0]), "b": [torch.tensor(3.0, dtype=torch.float64)]}
    hg.accumulate_grad(hparams, grads)
    held = hparams["a"].grad
    hg.accumulate_grad(hparams, grads)
    assert torch.equal(hparams["a"].grad, 2 * grads["a"])
    assert hparams["b"][0].grad.dtype == torch.float32
    assert hparams["b"][0].grad.item() == 6.0
    assert torch.equal(held, grads["a"]), "a .grad that somebody holds is not written to"
    torch.optim.SGD([hparams["a"]], lr=0.5).step()
    assert torch.equal(hparams["a"].detach(), -grads["a"])


def test_accumulate_grad_refuses_what_backward_could_not_fill() -> None:
    leaf = torch.zeros(2, requires_grad=True)
    grads = [torch.ones(2), torch.ones(2)]
    with pytest.raises(ValueError, match="requires_grad=False"):
        hg.accumulate_grad([leaf, torch.zeros(2)], grads)
    with pytest.raises(ValueError, match="is_leaf=False"):
        hg.accumulate_grad([leaf, leaf * 2], grads)
    with pytest.raises(ValueError, match="structure of hparams"):
        hg.accumulate_grad([leaf], grads)
    assert leaf.grad is None
