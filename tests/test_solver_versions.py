"""The solver classes of hypergrad 0.0.1 and of its main branch: what is written for either runs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad_and_value
from torch.nn import functional as F

from hypergrad.approx_hypergrad import neumann, nystrom
from hypergrad.optimizers import diff_sgd
from hypergrad.solver import BaseImplicitSolver, BaseSolver, ForwardOutput
from hypergrad.utils import Params


class OfTheRelease(BaseSolver):
    """Objectives under the names of the wheel, or under none."""

    def inner_update(self) -> None: ...

    def outer_update(self) -> None: ...


class OfMain(OfTheRelease):
    """All four methods of the main branch."""

    def inner_forward(self) -> None: ...

    def outer_forward(self) -> None: ...


def pieces() -> tuple[Any, ...]:
    """The positional arguments of both versions up to ``log_freq``."""
    inner, outer = nn.Linear(2, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.1)
    return inner, outer, [], [], 2, 1, None, optimizer, 0, None, 50


@pytest.mark.parametrize(
    ("kind", "flag", "expected"),
    [
        (OfMain, {}, False),
        (OfMain, {"outer_requires_grad": False}, False),
        (OfMain, {"outer_requires_grad": True}, True),
        (OfTheRelease, {}, True),  # whose own steps may go through the outer module
        (OfTheRelease, {"outer_requires_grad": False}, False),
    ],
)
def test_whether_the_outer_module_is_frozen(
    kind: type[BaseSolver], flag: dict[str, bool], expected: bool
) -> None:
    made = kind(*pieces(), device="cpu", **flag)
    assert {p.requires_grad for p in made.outer.parameters()} == {expected}


@pytest.mark.parametrize(
    "rest",
    [
        {"args": (True, True, True, "cpu")},  # main's order
        {"args": (True, True), "skip_sync_inner": True, "device": torch.device("cpu")},
        {
            "args": (),
            "inner_requires_grad": True,
            "outer_requires_grad": True,
            "skip_sync_inner": True,
            "device": "cpu",
        },
        {"args": (True, "cpu"), "skip_sync_inner": True},  # 0.0.1's order
        {"args": (True, None), "skip_sync_inner": True},
        {"args": (), "functorch_requires_grad": True, "device": "cpu", "skip_sync_inner": True},
    ],
)
def test_the_constructor_takes_both_orders(rest: dict[str, Any]) -> None:
    args = rest.pop("args")
    made = OfTheRelease(*pieces(), *args, **rest)
    assert all(p.requires_grad for p in made.inner_params)
    assert all(p.requires_grad for p in made.outer.parameters())
    assert made._functorch_requires_grad is True
    before = made.inner.weight.clone()
    made.inner_params = tuple(torch.zeros_like(p) for p in made.inner_params)
    made.sync_inner()
    assert torch.equal(made.inner.weight, before)
    assert made.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("args", "options", "skips"),
    [
        ((False, True, "cpu"), {}, True),
        ((), {"inner_requires_grad": False, "skip_sync_inner": True}, True),
        ((False, "cpu"), {}, False),
        ((False, None), {}, False),
        ((), {"functorch_requires_grad": False, "device": "cpu"}, False),
    ],
)
def test_the_implicit_constructor_takes_both_orders(
    args: tuple[Any, ...], options: dict[str, Any], skips: bool
) -> None:
    inner, outer, *rest = pieces()
    made = BaseImplicitSolver(inner, outer, *rest[:2], nystrom, *rest[2:], *args, **options)
    assert made.approx_ihvp is nystrom
    assert not any(p.requires_grad for p in (*outer.parameters(), *made.inner_params))
    made.inner_params = tuple(torch.zeros_like(p) for p in made.inner_params)
    made.sync_inner()
    assert (inner.weight.abs().sum() > 0).item() is skips


def test_gradients_are_assigned_to_a_frozen_module_and_its_optimizer_steps() -> None:
    inner, outer, *rest = pieces()
    made = BaseImplicitSolver(inner, outer, *rest[:2], nystrom, *rest[2:], device="cpu")
    before = [p.clone() for p in outer.parameters()]
    made.outer_grad = (torch.ones_like(p) for p in outer.parameters())
    made.outer_grad = [torch.ones(1, 1), None]
    made.outer_optimizer.step()
    torch.testing.assert_close(outer.weight, before[0] - 0.2)
    torch.testing.assert_close(outer.bias, before[1] - 0.1)


class Distillation(BaseImplicitSolver):
    """Data that teach a softmax regression, in the manner of the main branch.

    Each outer step trains from the same start: ``inner`` is left as it was.
    """

    def inner_forward(self, in_params: Params, out_params: Params) -> ForwardOutput:
        logits = self.inner_func(in_params, out_params[0])
        return ForwardOutput(F.cross_entropy(logits, torch.arange(3)), logits)

    def outer_forward(
        self, in_params: Params, out_params: Params, input: Tensor, target: Tensor
    ) -> ForwardOutput:
        logits = self.inner_func(in_params, input)
        return ForwardOutput(F.cross_entropy(logits, target), logits)

    def inner_update(self) -> None:
        grads, loss = grad_and_value(lambda *args: self.inner_forward(*args).loss)(
            self.inner_params, tuple(self.outer.parameters())
        )
        self.inner_params, self.inner_optim_state = self.inner_optimizer(
            self.inner_params, grads, self.inner_optim_state
        )
        self.recorder.add("inner_loss", loss)

    def outer_update(self) -> None:
        batch = next(self.outer_loader)
        functorch = pytest.importorskip("functorch")
        _, out_params = functorch.make_functional(self.outer, disable_autograd_tracking=True)
        self.outer_grad = self.approx_ihvp(
            lambda i, o: self.inner_forward(i, o).loss,
            lambda i, o: self.outer_forward(i, o, *batch).loss,
            self.inner_params,
            out_params,
        )
        self.outer_optimizer.step()
        self.outer.zero_grad(set_to_none=True)

    def post_outer_update(self) -> None:
        self.reset_inner_model()


class Points(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.data = nn.Parameter(torch.tensor([[1.0, 0.2], [-0.3, 1.0], [0.5, -1.0]]).double())


@pytest.mark.filterwarnings("ignore:We've integrated functorch")
def test_distillation_as_the_main_branch_writes_it_is_a_loop_by_hand() -> None:
    torch.manual_seed(0)
    X, y = torch.randn(12, 2, dtype=torch.float64), torch.arange(12) % 3
    model, points = nn.Linear(2, 3, bias=False).double(), Points()
    start, data = model.weight.detach().clone(), points.data.detach().clone()
    made = Distillation(
        model, points, [], [(X, y)], functools.partial(neumann, num_iters=4, lr=0.5),
        num_iters=7, unroll_steps=3, inner_optimizer=functools.partial(
            diff_sgd, momentum=0, weight_decay=0, lr=0.5
        ),
        outer_optimizer=torch.optim.SGD(points.parameters(), lr=0.1), skip_sync_inner=True,
        device="cpu",
    )  # fmt: skip
    made.run()

    def f(w: Tensor, x: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.reshape(3, 2).T, torch.arange(3))

    def g(w: Tensor) -> Tensor:
        return F.cross_entropy(X @ w.reshape(3, 2).T, y)

    for steps in (4, 3):
        w = start.flatten()
        for _ in range(steps):
            w = w - 0.5 * torch.func.grad(f)(w, data)
        M = torch.eye(6, dtype=w.dtype) - 0.5 * torch.func.hessian(f)(w, data)
        v = 0.5 * sum(torch.linalg.matrix_power(M, k) for k in range(5)) @ torch.func.grad(g)(w)
        mixed = torch.func.jacrev(torch.func.grad(f), argnums=1)(w, data)
        data = data + 0.1 * torch.einsum("i,iab->ab", v, mixed)
    torch.testing.assert_close(points.data.detach(), data)
    assert torch.equal(model.weight.detach(), start)
    assert torch.equal(made.inner_params[0], start)


@pytest.mark.filterwarnings("ignore:We've integrated functorch")
def test_a_script_of_the_release_makes_its_own_functional_model() -> None:
    functorch = pytest.importorskip("functorch")

    class Reset(OfTheRelease):
        def inner_obj(self, params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
            output = self.f_model(params, x)
            return output.square().mean(), output

        def inner_update(self) -> None:
            grads, (_, _) = functorch.grad_and_value(self.inner_obj, has_aux=True)(
                self.f_params, torch.eye(2)
            )
            self.f_params, self.f_optim_state = self.inner_optimizer(
                list(self.f_params), list(grads), self.f_optim_state
            )

        def reset_inner_model(self) -> None:
            self.f_model, self.f_params = functorch.make_functional(
                self.inner, self._functorch_requires_grad
            )

    inner, outer, *rest = pieces()
    rest[4] = functools.partial(diff_sgd, momentum=0, weight_decay=0, lr=0.1)
    before = inner.weight.detach().clone(), inner.bias.detach().clone()
    made = Reset(inner, outer, *rest, device="cpu")
    assert all(p.requires_grad for p in made.f_params), "as its own call has it"
    made.inner_update()
    mean = before[0].mean() + before[1]
    torch.testing.assert_close(made.inner_params[0], before[0] - 0.1 * (before[0] + before[1]))
    torch.testing.assert_close(made.inner_params[1], before[1] - 0.2 * mean)
    assert torch.equal(inner.weight, before[0])
