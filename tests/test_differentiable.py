"""Hypergradients that carry a graph, as the functions of 0.0.1 return them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_faces import METHODS, inner, outer, point
from torch import Tensor

import hypergrad as hg
from hypergrad import utils
from hypergrad.approx_hypergrad import neumann
from hypergrad.utils import Params


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_results_carry_a_graph_where_the_parameters_require_gradients(method: Any) -> None:
    """Exactly the derivative of the numbers: of the terms, of the columns, of the solution."""
    theta, phi = point()
    assert not any(grad.requires_grad for grad in method(inner, outer, theta, phi))
    tensors = tuple(tensor.requires_grad_() for tensor in theta + phi)

    def grads(*some: Tensor) -> Params:
        return method(inner, outer, some[:2], some[2:])

    with torch.no_grad():
        plain = grads(*tensors)
        assert not any(grad.requires_grad for grad in plain)
    for got, expected in zip(grads(*tensors), plain, strict=True):
        torch.testing.assert_close(got.detach(), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(grads, tensors)


def test_a_backward_pass_without_second_derivatives_names_the_operation() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    theta, phi = point()
    phi[0].requires_grad_()
    with pytest.warns(hg.DoubleBackwardWarning, match="Square"):
        grads = neumann(
            lambda w, c: inner(w, c) + Square.apply(w[0]).sum(), outer, theta, phi, 5, 0.05
        )
    with pytest.raises(hg.DoubleBackwardError, match="Square"):
        grads[0].sum().backward()


def test_a_backward_pass_sees_the_masks_of_the_call_and_a_call_costs_no_graph() -> None:
    theta, phi = point()
    evaluations = 0

    def masked(w: Params, c: Params) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return inner(w, c) + (torch.rand(2) * c[0] * w[0] ** 2).sum()

    neumann(masked, outer, theta, phi, 3, 0.05)  # verifies, which the next calls do not
    evaluations = 0
    neumann(masked, outer, theta, phi, 3, 0.05)
    alone, evaluations = evaluations, 0
    phi[0].requires_grad_()
    torch.manual_seed(0)
    grads = neumann(masked, outer, theta, phi, 3, 0.05)
    assert evaluations == alone
    torch.rand(5)
    (got,) = torch.autograd.grad(grads[0].sum(), phi[0])
    torch.manual_seed(0)
    mask = torch.rand(2)

    def fixed(c: Tensor) -> Tensor:
        return neumann(
            lambda w, c: inner(w, c) + (mask * c[0] * w[0] ** 2).sum(),
            outer, theta, (c, phi[1]), 3, 0.05,
        )[0].sum()  # fmt: skip

    torch.testing.assert_close(got, torch.func.grad(fixed)(phi[0].detach()))
    assert not got.requires_grad


@pytest.mark.parametrize("name", ["neumann", "cg", "of your own", "nystrom"])
def test_the_transforms_of_torch_func_work_around_them(name: str) -> None:
    theta, phi = point()

    def first(c: Tensor) -> Tensor:
        return METHODS[name](inner, outer, theta, (c, phi[1]))[0]

    c = phi[0].clone().requires_grad_()
    expected = torch.autograd.functional.jacobian(first, c)
    torch.testing.assert_close(torch.func.jacrev(first)(phi[0]), expected)
    torch.testing.assert_close(
        torch.func.grad(lambda c: first(c).sum())(phi[0]), expected.sum(dim=0)
    )
    if name != "nystrom":  # which draws, and a batch of draws is not allowed
        torch.testing.assert_close(torch.func.jacfwd(first)(phi[0]), expected)
        some = torch.stack([phi[0], phi[0] + 0.5])
        batch = torch.func.vmap(first)(some)
        torch.testing.assert_close(batch, torch.stack([first(c) for c in some]))


def test_second_derivatives_of_a_series_are_exact() -> None:
    theta, phi = point()
    tensors = tuple(tensor.requires_grad_() for tensor in theta + phi)
    assert torch.autograd.gradgradcheck(
        lambda *some: neumann(inner, outer, some[:2], some[2:], 2, 0.05), tensors
    )


def test_hvp_carries_a_graph_where_its_arguments_require_gradients() -> None:
    theta, phi = point()
    tensors = tuple(tensor.requires_grad_() for tensor in theta + phi)
    assert torch.autograd.gradcheck(
        lambda *some: utils.hvp(lambda w: inner(w, phi), some[:2], some[2:]), tensors
    )
    assert torch.autograd.gradcheck(
        lambda *some: utils.hvp(lambda w: inner(w, phi), theta, some, rev_only=True), tensors[2:]
    )
