"""The names and signatures of hypergrad 0.0.1, as its home page and its wheel have them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import quadratic, relative_error, ridge
from torch import Tensor

import hypergrad as hg
from hypergrad import utils
from hypergrad.approx_hypergrad import conjugate_gradient, implicit_grad, neumann, nystrom
from hypergrad.utils import Params

D = torch.float64


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


def test_nystrom_takes_the_columns_of_0_0_1() -> None:
    """By Woodbury with dense matrices, at ``torch.randperm(n)[:rank]``."""
    problem, rank, rho = ridge(), 4, 0.1
    theta = problem.params.clone()
    H = torch.func.hessian(problem.inner)(theta, problem.hparams)
    J = torch.func.jacrev(torch.func.grad(problem.inner), argnums=1)(theta, problem.hparams)
    b = torch.func.grad(problem.outer)(theta, problem.hparams)
    torch.manual_seed(7)
    columns = torch.randperm(len(H))[:rank]
    C, W = H[columns], H[columns][:, columns]
    v = b / rho - C.T @ torch.linalg.solve(W + C @ C.T / rho, C @ b) / rho**2
    state = torch.get_rng_state()
    torch.manual_seed(7)
    (grads,) = nystrom(*as_tuples(), rank, rho)
    torch.testing.assert_close(grads, -J.T @ v, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state), "and draws nothing else"
    generator = torch.Generator().manual_seed(7)
    (again,) = nystrom(*as_tuples(), rank, torch.tensor(rho, dtype=D), generator=generator)
    assert torch.equal(again, grads)


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
    for method in (neumann, conjugate_gradient):
        with pytest.raises(ValueError, match="num_iters must be at least 0, got -1"):
            method(*as_tuples(), -1, 1.0)
    with pytest.raises(ValueError, match="rank must be at most the number of parameters"):
        nystrom(*as_tuples(), 11, 0.1)
    with pytest.raises(ValueError, match="rank must be at least 1, got -1"):
        nystrom(*as_tuples(), -1, 0.1)


METHODS = {
    "neumann": lambda *problem: neumann(*problem, 3, 0.05),
    "neumann of one term": lambda *problem: neumann(*problem, 0, torch.tensor(0.05)),
    "nystrom": lambda *problem: seeded(nystrom, *problem, 2, 0.5),
    "cg": lambda *problem: conjugate_gradient(*problem, 20, 1.0),
    "of your own": lambda *problem: scaled(*problem, factor=0.3),
}


def seeded(method: Callable[..., Params], *args: Any) -> Params:
    torch.manual_seed(0)
    return method(*args)


@implicit_grad
def scaled(inner: Any, outer: Any, theta: Params, phi: Params, factor: float) -> Any:
    """An approximation of one's own: ``H⁻¹ ≈ factor · I``."""
    in_grads, out_grads = torch.func.grad(outer, argnums=(0, 1))(theta, phi)
    return tuple(factor * grad for grad in in_grads), out_grads


def inner(w: Params, c: Params) -> Tensor:
    return (w[0].sin() * w[1]).sum() + 3 * (c[0].exp() * w[0].square()).sum() + 2 * w[1] ** 2


def outer(w: Params, c: Params) -> Tensor:
    return (w[0] * c[0]).square().sum() + w[1].cos() * c[1]


def point() -> tuple[Params, Params]:
    theta = (torch.tensor([0.3, -0.2]), torch.tensor(0.5))
    phi = (torch.tensor([0.1, 0.4]), torch.tensor(-1.2))
    return tuple(t.double() for t in theta), tuple(t.double() for t in phi)


def test_an_approximation_of_your_own_by_position_and_by_name() -> None:
    theta, phi = point()
    H_mixed = torch.func.jacrev(torch.func.grad(inner), argnums=1)(theta, phi)
    in_grads, out_grads = torch.func.grad(outer, argnums=(0, 1))(theta, phi)
    expected = out_grads[0] - 0.3 * H_mixed[0][0].T @ in_grads[0]
    by_position = scaled(inner, outer, theta, phi, factor=0.3)
    torch.testing.assert_close(by_position[0], expected)
    torch.testing.assert_close(by_position[1], out_grads[1])

    @implicit_grad
    def named(inner_obj: Any, outer_obj: Any, in_params: Params, out_params: Params) -> Any:
        in_grads, out_grads = torch.func.grad(outer_obj, argnums=(0, 1))(in_params, out_params)
        return tuple(0.3 * grad for grad in in_grads), out_grads

    by_name = named(out_params=phi, in_params=theta, outer_obj=outer, inner_obj=inner)
    assert torch.equal(by_name[0], by_position[0])
    assert named.__name__ == "named"


@pytest.mark.parametrize("lr", [0, 0.0, torch.tensor(0.0)])
def test_no_step_leaves_the_direct_gradient(lr: Any) -> None:
    theta, phi = point()
    direct = torch.func.grad(outer, argnums=1)(theta, phi)
    for grads in (
        neumann(inner, outer, theta, phi, 5, lr),
        conjugate_gradient(inner, outer, theta, phi, 0, 1.0),
    ):
        assert all(torch.equal(grad, b) for grad, b in zip(grads, direct, strict=True))
    # Conjugate gradient finds its own step, whatever it is told.
    told = conjugate_gradient(inner, outer, theta, phi, 5, lr)
    assert torch.equal(told[0], conjugate_gradient(inner, outer, theta, phi, 5)[0])


@pytest.mark.parametrize("name", ["neumann", "nystrom", "cg"])
def test_an_outer_objective_of_the_outer_parameters_alone_has_its_own_gradient(name: str) -> None:
    theta, phi = point()
    grads = METHODS[name](inner, lambda w, c: c[0].pow(3).sum() - 2 * c[1], theta, phi)
    torch.testing.assert_close(grads[0], 3 * phi[0].square())
    torch.testing.assert_close(grads[1], torch.tensor(-2.0).double())
    grads = METHODS[name](inner, lambda w, c: torch.ones(()).double(), theta, phi)
    assert torch.equal(torch.cat([grad.reshape(-1) for grad in grads]), torch.zeros(3).double())


def test_an_outer_objective_that_is_none_is_named() -> None:
    theta, phi = point()
    for outer_obj, got in ((7, "a function of"), (lambda w, c: 1.0, "a scalar tensor, got float")):
        with pytest.raises(TypeError, match=f"outer must .*{got}"):
            neumann(inner, outer_obj, theta, phi, 3, 0.05)
    batches = [torch.tensor(1.0), torch.tensor(3.0)]
    averaged = hg.Averaged(lambda w, c, scale: scale * outer(w, c), batches)
    for grad, double in zip(
        neumann(inner, averaged, theta, phi, 3, 0.05),
        neumann(inner, lambda w, c: 2 * outer(w, c), theta, phi, 3, 0.05),
        strict=True,
    ):
        torch.testing.assert_close(grad, double)


def test_a_tensor_as_the_step_is_its_number() -> None:
    as_number = neumann(*as_tuples(), 5, 0.25)
    as_tensor = neumann(*as_tuples(), 5, torch.tensor(0.25, requires_grad=True))
    assert torch.equal(as_number[0], as_tensor[0])


def test_the_version_is_where_0_0_1_has_it() -> None:
    assert importlib.import_module("hypergrad.__about__").__version__ == hg.__version__


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


def test_foreach() -> None:
    p1, p2 = (torch.ones(2), torch.zeros(1)), (torch.ones(2), torch.ones(1))
    summed = utils.foreach(p1, p2, torch.add, alpha=3)
    assert torch.equal(summed[0], torch.full((2,), 4.0))
    with pytest.raises(ValueError, match="same length, got 2 and 1"):
        utils.foreach(p1, p2[:1], torch.add)
    assert utils.Params is not None
    assert utils.Objective is not None


def test_a_vector_is_cut_into_tensors() -> None:
    tree = (torch.ones(2, 2), torch.zeros(()), torch.ones(1))
    for cut in (
        utils.vector_to_tree(torch.arange(6.0), tree=tree),
        utils.vector_to_tree(vec=torch.arange(9.0), tree=list(tree)),  # its front, if it is longer
        utils.vector_to_params(torch.arange(6.0), (leaf for leaf in tree)),
    ):
        assert isinstance(cut, tuple)
        assert [leaf.tolist() for leaf in cut] == [[[0.0, 1.0], [2.0, 3.0]], 4.0, [5.0]]
    wide = utils.vector_to_tree(torch.arange(6).double(), tree)
    assert wide[0].dtype == torch.float64
    with pytest.raises(ValueError, match="vec must hold 6 elements, as many as the tensors, got 4"):
        utils.vector_to_params(torch.arange(4.0), tree)
