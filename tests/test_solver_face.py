"""The solver classes of hypergrad 0.0.1: scripts written for them run, and give right numbers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import warnings
from typing import Any

import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.func import grad_and_value
from torch.nn import functional as F

from hypergrad.approx_hypergrad import conjugate_gradient, neumann, nystrom
from hypergrad.optimizers import diff_sgd
from hypergrad.solver import BaseImplicitSolver, BaseSolver, ForwardOutput, Recorder
from hypergrad.utils import Params


class Documented(BaseImplicitSolver):
    """The example of 0.0.1's documentation, word for word but for a recorded loss."""

    def inner_forward(
        self, in_params: Params, out_params: Params, input: Tensor, target: Tensor
    ) -> Tensor:
        output = self.inner_func(in_params, input)
        loss = F.binary_cross_entropy_with_logits(output, target)
        pairs = zip(in_params, out_params, strict=True)
        weight_decay = sum([(_in.pow(2) * _out).sum() for _in, _out in pairs])
        return loss + weight_decay / 2

    def inner_update(self) -> None:
        input, target = next(self.inner_loader)
        grads, loss = grad_and_value(self.inner_forward)(
            self.inner_params, tuple(self.outer.parameters()), input, target
        )
        self.inner_params, self.inner_optim_state = self.inner_optimizer(
            self.inner_params, grads, self.inner_optim_state
        )
        self.recorder.add("inner_loss", loss)

    def outer_forward(
        self, in_params: Params, out_params: Params, input: Tensor, target: Tensor
    ) -> Tensor:
        output = self.inner_func(in_params, input)
        return F.binary_cross_entropy_with_logits(output, target)

    def outer_update(self) -> None:
        in_input, in_target = next(self.inner_loader)
        out_input, out_target = next(self.outer_loader)
        out_params = tuple(p.detach() for p in self.outer.parameters())
        implicit_grads = self.approx_ihvp(
            lambda i, o: self.inner_forward(i, o, in_input, in_target),
            lambda i, o: self.outer_forward(i, o, out_input, out_target),
            self.inner_params,
            out_params,
        )
        self.outer_grad = implicit_grads
        self.outer_optimizer.step()
        self.outer.zero_grad(set_to_none=True)

    def post_outer_update(self) -> None:
        for p in self.outer.parameters():
            p.data.clamp_(min=1e-8)


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    X, y = load_breast_cancer(return_X_y=True)
    X = torch.from_numpy(StandardScaler().fit_transform(X))[:, :6]
    y = torch.from_numpy(y).double()[:, None]
    return (X[:200], y[:200]), (X[200:], y[200:])


def solver(approx_ihvp: Any, **options: Any) -> Documented:
    train, validation = data()
    inner = nn.Linear(6, 1, bias=False).double()
    nn.init.zeros_(inner.weight)
    outer = copy.deepcopy(inner)
    nn.init.ones_(outer.weight)
    arguments: dict[str, Any] = {
        "inner_optimizer": functools.partial(diff_sgd, momentum=0, weight_decay=0, lr=0.1),
        "outer_optimizer": torch.optim.SGD(outer.parameters(), momentum=0.9, lr=1.0),
        "num_iters": 61,
        "unroll_steps": 20,
        "device": "cpu",
    } | options
    return Documented(inner, outer, [train], [validation], approx_ihvp, **arguments)


def test_the_documented_script_gives_the_numbers_of_a_loop_written_out() -> None:
    """By matrix algebra: gradient descent, then a truncated Neumann series of the exact Hessian."""
    ours = solver(functools.partial(neumann, num_iters=30, lr=0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.run()

    (X, y), (X_val, y_val) = data()
    w, c = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    velocity, updates = torch.zeros_like(c), 0
    for i in range(61):
        w = w - 0.1 * (X.T @ (torch.sigmoid(X @ w) - y[:, 0]) / len(y) + c * w)
        if i > 0 and i % 20 == 0:
            s = torch.sigmoid(X @ w)
            H = X.T @ ((s * (1 - s))[:, None] * X) / len(y) + c.diag()
            b = X_val.T @ (torch.sigmoid(X_val @ w) - y_val[:, 0]) / len(y_val)
            v, term = b.clone(), b.clone()
            for _ in range(30):
                term = term - 0.3 * H @ term
                v = v + term
            grad = -w * 0.3 * v
            velocity = grad if updates == 0 else 0.9 * velocity + grad
            c = (c - velocity).clamp(min=1e-8)
            updates += 1
    assert ours.outer_step == updates == 3
    assert ours.inner_step == ours.global_step == 61
    torch.testing.assert_close(ours.inner_params[0][0], w)
    torch.testing.assert_close(next(ours.outer.parameters())[0], c)
    torch.testing.assert_close(next(ours.inner.parameters()).detach(), ours.inner_params[0])
    assert len(ours.recorder.archive["inner_loss"]) == 61


@pytest.mark.parametrize(
    "approx_ihvp",
    [
        functools.partial(conjugate_gradient, num_iters=5, lr=0.1),
        functools.partial(nystrom, rank=5, rho=0.1),
    ],
    ids=["cg", "nystrom"],
)
def test_the_documented_script_lowers_the_validation_loss(approx_ihvp: Any) -> None:
    ours = solver(approx_ihvp, num_iters=201)
    before = solver(approx_ihvp, num_iters=200, outer_patience_iters=1000)
    before.run()
    ours.run()
    _, validation = data()
    losses = [s.outer_forward(s.inner_params, (), *validation) for s in (ours, before)]
    assert losses[0] < losses[1]


def test_outer_updates_come_when_the_documentation_says() -> None:
    class Counting(BaseSolver):
        def inner_update(self) -> None:
            self.calls: list[Any] = [*getattr(self, "calls", []), ("inner", self.inner_step)]

        def outer_update(self) -> None:
            self.calls.append(("outer", self.inner_step - 1))

        def post_outer_update(self) -> None:
            self.calls.append("post")

        def sync_inner(self) -> None:
            self.calls.append("sync")

    model = nn.Linear(1, 1)
    counting = Counting(
        model, model, [], [], 13, 3, None, torch.optim.SGD(model.parameters()),
        outer_patience_iters=5, device="cpu",
    )  # fmt: skip
    counting.run()
    outer = [call[1] for call in counting.calls if call[0] == "outer"]
    assert outer == [6, 9, 12]
    where = counting.calls.index(("outer", 6))
    assert counting.calls[where + 1 : where + 3] == ["post", "sync"]


def test_loaders_give_distinct_batches_round_and_round() -> None:
    """0.0.1 restarted its loader at each access, and trained on the first batch for ever."""
    batches = [(torch.tensor([float(i)]), "name") for i in range(3)]
    model = nn.Linear(1, 1)
    base = BaseSolver(
        model, model, batches, batches[:1], 1, 1, None, torch.optim.SGD(model.parameters()),
        device="cpu",
    )  # fmt: skip
    seen = [next(base.inner_loader) for _ in range(7)]
    assert [int(x) for x, _ in seen] == [0, 1, 2, 0, 1, 2, 0]
    assert seen[0][1] == "name"
    assert int(next(base.outer_loader)[0]) == 0
    empty = BaseSolver(
        model, model, [], [], 1, 1, None, torch.optim.SGD(model.parameters()), device="cpu"
    )
    with pytest.raises(ValueError, match="inner_loader must hold at least one batch"):
        next(empty.inner_loader)


def test_the_wheels_names_are_the_same_things() -> None:
    ours = solver(nystrom)
    assert ours.f_model is ours.inner_func
    ours.f_params, ours.f_optim_state = (torch.ones(1, 6, dtype=torch.float64),), ["state"]
    assert ours.inner_params[0] is ours.f_params[0]
    assert ours.inner_optim_state == ["state"]
    x = torch.arange(6, dtype=torch.float64)
    assert ours.f_model(ours.f_params, x).item() == 15.0
    ours.f_model = lambda params, x: x
    assert ours.inner_func((), x) is x
    ours.set_out_grad((torch.ones(1, 6),))
    ours.outer_grad = (torch.ones(1, 6),)
    assert torch.equal(ours.outer_grad[0], torch.full((1, 6), 2.0, dtype=torch.float64))
    ours.reset_inner_model()
    assert torch.equal(ours.inner_params[0], torch.zeros(1, 6))


def test_the_inner_function_works_apart_from_the_module() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    base = BaseSolver(
        model, nn.Linear(1, 1), [], [], 1, 1, None, None, functorch_requires_grad=True, device="cpu"
    )
    base.inner_func(base.inner_params, torch.randn(5, 3)).sum().backward()
    assert all(p.grad is not None for p in base.inner_params)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model[1].running_mean, torch.zeros(2))


def test_the_recorder_flushes_means_and_archives_all() -> None:
    recorder = Recorder()
    for value in (1.0, torch.tensor(3.0)):
        recorder.add("loss", value)
    assert recorder.flush() == {"loss": 2.0}
    assert recorder.flush() == {}
    recorder.add("loss", 5)
    assert recorder.archive == {"loss": [1.0, 3.0, 5.0]}


def test_means_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        solver(nystrom, num_iters=11, unroll_steps=11, log_freq=5).run()
    assert len(caplog.records) == 2
    assert caplog.records[0].name == "documented"
    assert "inner_loss=" in caplog.text


def test_a_forward_output_unpacks_and_its_fields_can_be_set() -> None:
    out = ForwardOutput(torch.ones(()), "more")
    loss, output = out
    assert loss == 1.0
    assert output == "more"
    out.loss = 2 * out.loss
    out.output = None
    assert tuple(out) == (2.0, None)
    assert dataclasses.is_dataclass(out)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_iters": 0}, ValueError, "num_iters must be at least 1, got 0"),
        ({"unroll_steps": 1.5}, TypeError, "unroll_steps must be an integer"),
        ({"unroll_steps": 0}, ValueError, "unroll_steps must be at least 1, got 0"),
        ({"num_iters": 19}, ValueError, "num_iters must be >= unroll_steps, got 19 < 20"),
        ({"outer_patience_iters": -1}, ValueError, "outer_patience_iters must be at least 0, got"),
        ({"log_freq": 0}, ValueError, "log_freq must be at least 1"),
    ],
)
def test_bad_options_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        solver(nystrom, **change)


def test_bad_pieces_are_named() -> None:
    with pytest.raises(TypeError, match="approx_ihvp must be a function"):
        solver("nystrom")
    with pytest.raises(TypeError, match=r"outer must be a torch\.nn\.Module, got str"):
        BaseSolver(nn.Linear(1, 1), "outer", [], [], 1, 1, None, None)
    ours = solver(nystrom)
    with pytest.raises(ValueError, match="outer_grad must hold one gradient for each parameter"):
        ours.outer_grad = (torch.ones(2),)
    unwritten = BaseSolver(nn.Linear(1, 1), nn.Linear(1, 1), [], [], 1, 1, None, None)
    for name in ("inner_obj", "outer_obj", "inner_forward", "outer_forward", "outer_update"):
        with pytest.raises(NotImplementedError, match=f"BaseSolver must define {name}"):
            getattr(unwritten, name)()
    with pytest.raises(NotImplementedError, match="BaseSolver must define inner_update"):
        unwritten.run()

    class HalfOfMain(BaseSolver):
        def inner_forward(self) -> None: ...

        def inner_update(self) -> None: ...

    missing = "HalfOfMain must define outer_forward and outer_update as well"
    with pytest.raises(TypeError, match=missing):
        HalfOfMain(nn.Linear(1, 1), nn.Linear(1, 1), [], [], 1, 1, None, None)
