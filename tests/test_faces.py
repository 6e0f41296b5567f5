"""The names and signatures of hypergrad 0.0.1, as its home page and its wheel have them."""

from __future__ import annotations

import inspect

import pytest
import torch
from problems import quadratic, relative_error, ridge
from torch import Tensor

import hypergrad as hg
from hypergrad import utils
from hypergrad.approx_hypergrad import conjugate_gradient, neumann, nystrom


def as_tuples() -> tuple:
    problem = ridge()
    return (
        lambda w, p: problem.inner(w[0], p[0]),
        lambda w, p: problem.outer(w[0], p[0]),
        (problem.params,),
        (problem.hparams,),
    )


def test_signatures() -> None:
    common = ["inner_obj", "outer_obj", "in_params", "out_params"]
    for function, options in (
        (conjugate_gradient, ["num_iters", "lr"]),
        (neumann, ["num_iters", "lr"]),
        (nystrom, ["rank", "rho"]),
    ):
        assert list(inspect.signature(function).parameters)[:6] == common + options


@pytest.mark.parametrize("lr", [1.0, 0.1, 123.0])
def test_conjugate_gradient_is_exact_and_does_not_depend_on_lr(lr: float) -> None:
    grads = conjugate_gradient(*as_tuples(), num_iters=10, lr=lr)
    assert isinstance(grads, tuple)
    assert relative_error(grads[0], ridge().hypergradient) < 1e-10
    assert torch.equal(grads[0], conjugate_gradient(*as_tuples(), 10, 1.0)[0])


def test_more_iterations_never_make_it_worse() -> None:
    problem = quadratic(100, 100.0)
    errors = [
        relative_error(
            conjugate_gradient(
                problem.inner, problem.outer, problem.params, problem.hparams, iterations
            ),
            problem.hypergradient,
        )
        for iterations in (5, 20, 100)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


@pytest.mark.parametrize("num_iters", [0, 1, 5, 50])
def test_neumann_sums_one_term_more_than_it_says(num_iters: int) -> None:
    problem, lr = ridge(), 0.2
    theta = problem.params.clone()
    H = torch.func.hessian(problem.inner)(theta, problem.hparams)
    J = torch.func.jacrev(torch.func.grad(problem.inner), argnums=1)(theta, problem.hparams)
    b = torch.func.grad(problem.outer)(theta, problem.hparams)
    M = torch.eye(len(H)) - lr * H
    v = lr * sum(torch.linalg.matrix_power(M, k) @ b for k in range(num_iters + 1))
    (grads,) = neumann(*as_tuples(), num_iters, lr)
    torch.testing.assert_close(grads, -J.T @ v)


def test_nystrom_as_on_the_home_page() -> None:
    f, g, theta, phi = as_tuples()
    assert nystrom(f, g, theta, phi, rank=5, rho=0.1)[0].shape == phi[0].shape
    full = nystrom(f, g, theta, phi, 10, 1e-10)
    assert relative_error(full[0], ridge().hypergradient) < 1e-6
    torch.manual_seed(0)
    first = nystrom(f, g, theta, phi, rank=3, rho=0.1)
    torch.manual_seed(0)
    assert torch.equal(first[0], nystrom(f, g, theta, phi, rank=3, rho=0.1)[0])


def test_a_failure_still_warns() -> None:
    with pytest.warns(hg.LinearSolveWarning, match="DIVERGED"):
        neumann(*as_tuples(), 50, 100.0)
    with pytest.raises(ValueError, match="num_iters must be at least 0, got -1"):
        neumann(*as_tuples(), -1, 1.0)


@pytest.mark.parametrize("rev_only", [False, True])
def test_hvp(rev_only: bool) -> None:
    primal = (torch.tensor([1.0, 2.0]), torch.tensor(3.0))
    tangent = (torch.tensor([1.0, -1.0]), torch.tensor(2.0))

    def f(p: tuple[Tensor, Tensor]) -> Tensor:
        return (p[0] ** 3).sum() * p[1]

    product = utils.hvp(f, primal, tangent, rev_only=rev_only)
    assert isinstance(product, tuple)
    torch.testing.assert_close(product[0], 18 * primal[0] * tangent[0] + 6 * primal[0] ** 2)
    torch.testing.assert_close(product[1], (3 * primal[0] ** 2 * tangent[0]).sum())


def test_foreach_and_vector_to_params() -> None:
    p1, p2 = (torch.ones(2), torch.zeros(1)), (torch.ones(2), torch.ones(1))
    summed = utils.foreach(p1, p2, torch.add, alpha=3)
    assert torch.equal(summed[0], torch.full((2,), 4.0))
    with pytest.raises(ValueError, match="same length, got 2 and 1"):
        utils.foreach(p1, p2[:1], torch.add)
    parts = utils.vector_to_params(torch.arange(3.0), p1)
    assert torch.equal(parts[1], torch.tensor([2.0]))
    assert utils.vector_to_tree is utils.vector_to_params
    with pytest.raises(ValueError, match=r"vec must have shape \(3,\)"):
        utils.vector_to_params(torch.arange(4.0), p1)
    assert utils.Params is not None
    assert utils.Objective is not None
