"""Differentiable optimisers: `torch.optim` step by step, derivatives by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hypergrad import optimizers as opt
from hypergrad.optimizers import diff_sgd, from_torch

SHAPES = {"bias": (3,), "scale": (), "weight": (2, 3)}

unit = st.floats(0.0, 0.99)
rate = st.floats(1e-4, 0.5)
decay = st.sampled_from([0.0, 0.1, 1.3])
flag = st.booleans()


def options(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"lr": rate, "weight_decay": decay, "maximize": flag, **strategies}
    )


sgd = st.one_of(
    options(momentum=st.sampled_from([0.0, 0.5, 0.9]), dampening=st.sampled_from([0.0, 0.3])),
    options(momentum=st.sampled_from([0.5, 0.9]), nesterov=st.just(True)),
)
adam = options(betas=st.tuples(unit, unit), eps=st.sampled_from([1e-8, 1e-3]), amsgrad=flag)
OPTIMIZERS: list[tuple[type, type, st.SearchStrategy[dict[str, Any]]]] = [
    (opt.SGD, torch.optim.SGD, sgd),
    (opt.Adam, torch.optim.Adam, adam),
    (opt.AdamW, torch.optim.AdamW, adam),
    (
        opt.RMSprop,
        torch.optim.RMSprop,
        options(
            # At 0 or 1 a centred variance is a difference of equals, and its root may be NaN.
            alpha=st.floats(0.1, 0.9),
            eps=st.sampled_from([1e-3, 1e-1]),
            momentum=st.sampled_from([0.0, 0.9]),
            centered=flag,
        ),
    ),
    (
        opt.Adagrad,
        torch.optim.Adagrad,
        options(
            lr_decay=st.sampled_from([0.0, 0.2]),
            eps=st.sampled_from([1e-10, 1e-3]),
            initial_accumulator_value=st.sampled_from([0.0, 0.5]),
        ),
    ),
]


def draw(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        key: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for key, shape in SHAPES.items()
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "strategy"), OPTIMIZERS, ids=lambda x: getattr(x, "__name__", "")
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fifty_steps_are_those_of_torch_optim(
    ours: type, theirs: type, strategy: st.SearchStrategy[dict[str, Any]], dtype: torch.dtype
) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(strategy)
    def equal(arguments: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        params = draw(dtype, generator)
        expected = {key: nn.Parameter(value.clone()) for key, value in params.items()}
        torch_optimizer = theirs(list(expected.values()), foreach=False, **arguments)
        optimizer = ours(**arguments)
        state = optimizer.init(params)
        for _ in range(50):
            grads = draw(dtype, generator)
            for key, parameter in expected.items():
                parameter.grad = grads[key].clone()
            torch_optimizer.step()
            params, state = optimizer.update(grads, state, params)
        # Rounding of one step, 50 times, amplified by at most some hundred.
        tolerance = 5e3 * torch.finfo(dtype).eps
        for key, parameter in expected.items():
            torch.testing.assert_close(
                params[key], parameter.detach(), rtol=tolerance, atol=tolerance
            )

    equal()


def test_a_step_changes_nothing_that_it_is_given() -> None:
    for ours, _, _ in OPTIMIZERS:
        optimizer = ours(lr=0.1, weight_decay=0.1)
        params = draw(torch.float64, torch.Generator().manual_seed(0))
        grads = draw(torch.float64, torch.Generator().manual_seed(1))
        _, state = optimizer.update(grads, optimizer.init(params), params)
        remembered = [dict(slot) for slot in state.slots]
        before = [
            t.clone() for slot in remembered for t in slot.values() if isinstance(t, Tensor)
        ] + [t.clone() for t in (*params.values(), *grads.values())]
        optimizer.update(grads, state, params)
        after = [t for slot in remembered for t in slot.values() if isinstance(t, Tensor)] + [
            *params.values(), *grads.values()
        ]  # fmt: skip
        assert all(map(torch.equal, before, after))
        assert state.step == 1


DIFFERENTIABLE: list[tuple[type, dict[str, Any], tuple[str, ...]]] = [
    (opt.SGD, {"momentum": 0.9, "dampening": 0.1}, ("lr", "momentum", "dampening", "weight_decay")),
    (opt.SGD, {"momentum": 0.9, "nesterov": True}, ("lr", "momentum", "weight_decay")),
    (opt.SGD, {"maximize": True}, ("lr", "weight_decay")),
    (opt.Adam, {}, ("lr", "betas", "eps", "weight_decay")),
    (opt.Adam, {"amsgrad": True, "maximize": True}, ("lr", "betas", "eps", "weight_decay")),
    (opt.AdamW, {}, ("lr", "betas", "eps", "weight_decay")),
    (opt.AdamW, {"amsgrad": True}, ("lr", "betas", "eps", "weight_decay")),
    (opt.RMSprop, {"momentum": 0.8}, ("lr", "alpha", "eps", "weight_decay", "momentum")),
    (opt.RMSprop, {"centered": True}, ("lr", "alpha", "eps", "weight_decay")),
    (opt.Adagrad, {"lr_decay": 0.1}, ("lr", "lr_decay", "weight_decay", "eps")),
]
VALUES = {
    "lr": 0.1, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.3, "eps": 0.05,
    "alpha": 0.7, "lr_decay": 0.4,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["one number", "one a leaf", "one an element"])
@pytest.mark.parametrize(
    ("ours", "flags", "names"),
    DIFFERENTIABLE,
    ids=lambda x: getattr(x, "__name__", "-".join(x) if isinstance(x, dict) else "all"),
)
def test_three_steps_are_differentiable_in_everything(
    ours: type, flags: dict[str, Any], names: tuple[str, ...], kind: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    params = draw(torch.float64, generator)
    grads = [draw(torch.float64, generator) for _ in range(3)]

    def hyperparameter(value: float) -> Any:
        made = {
            key: torch.full(shape if kind == "one an element" else (), value, dtype=torch.float64)
            for key, shape in SHAPES.items()
        }
        return made["scale"] if kind == "one number" else made

    values = {
        name: (hyperparameter(0.6), hyperparameter(0.7))
        if name == "betas"
        else hyperparameter(VALUES[name])
        for name in names
    }
    inputs, structure = torch.utils._pytree.tree_flatten((params, grads, values))

    def three_steps(*tensors: Tensor) -> tuple[Tensor, ...]:
        w, gradients, hyperparameters = torch.utils._pytree.tree_unflatten(tensors, structure)
        optimizer = ours(**{**flags, **hyperparameters})
        state = optimizer.init(w)
        for g in gradients:
            w, state = optimizer.update(g, state, w)
        return tuple(w.values())

    leaves = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(three_steps, leaves)


@pytest.mark.parametrize("ours", [opt.Adam, opt.AdamW, opt.RMSprop, opt.Adagrad])
def test_derivatives_are_finite_and_right_at_a_zero_gradient(ours: type) -> None:
    """The first step is `−lr · g / (|g| + ε)` times a constant: its slope at 0 is `−c · lr / ε`."""
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    optimizer = ours(lr=lr, eps=1e-3, weight_decay=0.0)
    params = torch.ones(2, dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def update(g: Tensor) -> Tensor:
        w, state = optimizer.update(g, optimizer.init(params), params)
        return optimizer.update(g, state, w)[0].sum()

    slope = torch.autograd.grad(update(zero), [zero, lr])
    step = 1e-7
    difference = (update(zero.detach() + step) - update(zero.detach() - step)).detach() / (2 * step)
    assert torch.isfinite(torch.cat([part.reshape(-1) for part in slope])).all()
    torch.testing.assert_close(slope[0].sum(), difference, rtol=1e-3, atol=0.0)


def test_a_schedule_is_called_with_the_number_of_updates() -> None:
    rates = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    optimizer = opt.SGD(lr=lambda step: rates[step])
    w = torch.zeros(2)
    state = optimizer.init(w)
    for _ in range(3):
        w, state = optimizer.update(torch.ones(2), state, w)
    torch.testing.assert_close(w, torch.full((2,), -0.6))
    w.sum().backward()
    torch.testing.assert_close(rates.grad, torch.full((3,), -2.0))


def test_a_schedule_may_give_one_value_a_leaf() -> None:
    optimizer = opt.SGD(lr=lambda step: {"a": 0.1 * (step + 1), "b": 0.0})
    params = {"a": torch.zeros(2), "b": torch.zeros(1)}
    state = optimizer.init(params)
    for _ in range(2):
        params, state = optimizer.update({"a": torch.ones(2), "b": torch.ones(1)}, state, params)
    torch.testing.assert_close(params, {"a": torch.full((2,), -0.3), "b": torch.zeros(1)})


def test_hyperparameters_in_float32_update_half_precision_without_losing_beta() -> None:
    beta = torch.tensor(0.999)
    optimizer = opt.Adam(lr=torch.tensor(0.1), betas=(torch.tensor(0.9), beta))
    params = torch.ones(4, dtype=torch.bfloat16)
    expected = opt.Adam(lr=0.1)
    state, other = optimizer.init(params), expected.init(params)
    w, u = params, params
    for _ in range(3):
        w, state = optimizer.update(torch.ones_like(w), state, w)
        u, other = expected.update(torch.ones_like(u), other, u)
    assert w.dtype == torch.bfloat16
    torch.testing.assert_close(w, u, rtol=2**-6, atol=0.0)


MODEL_OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda groups: torch.optim.SGD(groups, lr=0.1),
    lambda groups: torch.optim.Adam(groups, lr=0.1, amsgrad=True),
    lambda groups: torch.optim.Adam(groups, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    lambda groups: torch.optim.AdamW(groups, lr=0.1),
    lambda groups: torch.optim.RMSprop(groups, lr=0.1, momentum=0.5, centered=True, eps=1e-2),
    lambda groups: torch.optim.Adagrad(groups, lr=0.1, lr_decay=0.1),
    lambda groups: torch.optim.Adadelta(groups),
    lambda groups: torch.optim.Adamax(groups),
    lambda groups: torch.optim.ASGD(groups),
    lambda groups: torch.optim.NAdam(groups),
    lambda groups: torch.optim.RAdam(groups),
    lambda groups: torch.optim.Rprop(groups),
]
SCHEDULERS: list[Callable[[Any], Any]] = [
    lambda optimizer: None,
    lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 / (1 + t)),
    lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3),
            torch.optim.lr_scheduler.StepLR(optimizer, 2),
        ],
        [4],
    ),
    lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=30),
]


@pytest.mark.parametrize("make", MODEL_OPTIMIZERS, ids=lambda make: "")
@pytest.mark.parametrize("schedule", SCHEDULERS, ids=lambda make: "")
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_from_torch_goes_on_where_the_optimizer_is(
    make: Callable[[Any], torch.optim.Optimizer], schedule: Callable[[Any], Any]
) -> None:
    model = nn.Linear(3, 2).double()
    frozen = nn.Parameter(torch.ones(1, dtype=torch.float64))
    groups = [{"params": [model.bias], "lr": 0.05}, {"params": [model.weight]}]
    torch_optimizer = make(groups)
    try:
        scheduler = schedule(torch_optimizer)
    except ValueError:
        pytest.skip("a momentum schedule for an optimiser without momentum")
    generator = torch.Generator().manual_seed(0)

    def torch_step() -> None:
        for parameter in (model.weight, model.bias):
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        torch_optimizer.step()
        if scheduler is not None:
            scheduler.step()

    for _ in range(3):
        torch_step()
    twin = from_torch(torch_optimizer, scheduler=scheduler)
    params = {"frozen": frozen, **dict(model.named_parameters())}
    state = twin.init(params)
    rates = [group["lr"] for group in torch_optimizer.param_groups]
    params = {key: value.detach().clone() for key, value in params.items()}
    for _ in range(5):
        torch_step()
        grads = {"frozen": torch.ones(1), "weight": model.weight.grad, "bias": model.bias.grad}
        params, state = twin.update(grads, state, params)
    # The differentiable path of NAdam keeps its momentum schedule in float32.
    tolerance = 1e-6 if isinstance(torch_optimizer, torch.optim.NAdam) else 1e-12
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(params[key], parameter.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(params["frozen"], frozen.detach())
    if scheduler is None:
        assert rates == [group["lr"] for group in torch_optimizer.param_groups]


@pytest.mark.parametrize("make", MODEL_OPTIMIZERS[7:12], ids=lambda make: "")
def test_an_adapted_optimizer_is_differentiable(
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    start = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    twin = from_torch(make([start]))
    state = twin.init(start)

    def two_steps(w: Tensor, g: Tensor) -> Tensor:
        w, after = twin.update(g, state, w)
        return twin.update(2 * g + w, after, w)[0]

    w = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([0.7, -0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(two_steps, (w, g))


def test_diff_sgd_is_that_of_torch_and_its_first_step_carries_its_gradient() -> None:
    decay = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    expected = [nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))]
    sgd = torch.optim.SGD(expected, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
    params, state = [expected[0].detach().clone()], None
    for _ in range(3):
        expected[0].grad = expected[0].detach().square()
        sgd.step()
        params, state = diff_sgd(params, [params[0].square()], state, decay, 0.9, 0.1, 0, True)
    torch.testing.assert_close(params[0], expected[0].detach())

    def first_step(weight_decay: Tensor) -> Tensor:
        w = [torch.tensor([1.0, -2.0], dtype=torch.float64)]
        return diff_sgd(w, [w[0].square()], None, weight_decay, 0.9, 0.1)[0][0]

    torch.testing.assert_close(
        torch.autograd.functional.jacobian(first_step, decay),
        torch.tensor([-0.1, 0.2], dtype=torch.float64),
    )


@pytest.mark.parametrize("lr", [0.1, 0, -0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_diff_sgd_combines_what_torch_refuses_to(momentum: float, lr: Any) -> None:
    """Nesterov with dampening or without momentum, and steps uphill: 0.0.1's formula by hand."""
    w, buffer, state = torch.tensor([1.0, -2.0]), None, None
    params = (w.clone(),)
    for _ in range(3):
        grad = w.square() + 0.01 * w
        buffer = grad if buffer is None else momentum * buffer + 0.7 * grad
        w = w - lr * (grad + momentum * buffer)
        params, state = diff_sgd(
            params, (params[0].square(),), state, 0.01, momentum, lr, dampening=0.3, nesterov=True
        )
    torch.testing.assert_close(params[0], w)


def test_diff_sgd_replaces_the_entries_of_lists_and_leaves_tuples_alone() -> None:
    w, buffer = torch.tensor([1.0], requires_grad=True), torch.tensor([2.0])
    params, state = [w], [buffer]
    out = diff_sgd(params, (torch.tensor([4.0]),), state, 0, 0.5, 0.1)
    assert out[0] is params
    assert out[1] is state
    torch.testing.assert_close(params[0].detach(), torch.tensor([0.5]))
    torch.testing.assert_close(state[0], torch.tensor([5.0]))
    params[0].backward()
    assert w.grad == 1.0
    state = [buffer]
    after = diff_sgd((w,), (torch.tensor([4.0]),), state, 0, 0.5, 0.1)
    assert isinstance(after[0], tuple)
    assert isinstance(after[1], tuple)
    assert state[0] is buffer
    assert diff_sgd([w], [buffer], (buffer,), 0, 0.5, 0.1)[1] == [torch.tensor([3.0])]
    with pytest.raises(ValueError, match="grads must have the structure of params"):
        diff_sgd([w], [], None, 0, 0.5, 0.1)
    with pytest.raises(TypeError):
        diff_sgd([w], [buffer], None, 0, 0.5, "fast")


MISTAKES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: opt.SGD(lr=-1.0), ValueError, r"lr must be a finite number >= 0, got -1"),
    (lambda: opt.SGD(lr="fast"), TypeError, r"lr must be a real number, got str"),
    (lambda: opt.SGD(lr=None), TypeError, r"lr must be a real number, got NoneType"),
    (lambda: opt.SGD(lr=torch.tensor(1)), TypeError, r"lr must be a floating-point tensor"),
    (lambda: opt.SGD(nesterov=True), ValueError, r"nesterov must come with a momentum"),
    (lambda: opt.SGD(nesterov=1), TypeError, r"nesterov must be True or False, got int"),
    (lambda: opt.Adam(betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be a number < 1, got 1"),
    (lambda: opt.Adam(betas=0.9), TypeError, r"betas must be a pair"),
    (lambda: opt.AdamW(eps=-1e-8), ValueError, r"eps must be"),
    (lambda: opt.RMSprop(alpha=-0.1), ValueError, r"alpha must be"),
    (lambda: opt.Adagrad(initial_accumulator_value=-1.0), ValueError, r"initial_accumulator"),
    (lambda: opt.SGD().init(()), ValueError, r"params must hold at least one tensor"),
    (lambda: opt.SGD().init(nn.Linear(1, 1)), TypeError, r"got the module Linear"),
    (lambda: from_torch(nn.Linear(1, 1)), TypeError, r"optimizer must be a torch.optim.Optim"),
    (
        lambda: from_torch(torch.optim.LBFGS(nn.Linear(1, 1).parameters())),
        TypeError,
        r"optimizer must be of a class with differentiable=True, got LBFGS",
    ),
    (
        lambda: from_torch(torch.optim.SGD(nn.Linear(1, 1).parameters())).init(torch.ones(1)),
        ValueError,
        r"params must hold the very tensors",
    ),
]


@pytest.mark.parametrize(("mistake", "error", "message"), MISTAKES, ids=lambda x: "")
def test_bad_hyperparameters_are_named(
    mistake: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        mistake()


def test_bad_updates_are_named() -> None:
    w = {"a": torch.ones(2), "b": torch.ones(3)}
    state = opt.SGD().init(w)
    with pytest.raises(ValueError, match="grads must have the structure of params"):
        opt.SGD().update(torch.ones(2), state, w)
    with pytest.raises(ValueError, match="state must have one slot for each leaf"):
        opt.SGD().update(w, replace(state, slots=state.slots[:1]), w)
    with pytest.raises(ValueError, match=r"lr must be a number, a tensor or a tree in the struct"):
        opt.SGD(lr={"a": 0.1}).update(w, state, w)
    with pytest.raises(ValueError, match=r"lr must have one element or broadcast .* shape \(2,\)"):
        opt.SGD(lr=torch.ones(2)).update(w, state, w)
    with pytest.raises(TypeError, match="lr at step 0 must be a real number, got str"):
        opt.SGD(lr=lambda step: "slow").update(w, state, w)


def test_a_scheduler_must_know_its_future_and_its_optimizer() -> None:
    mine, other = (torch.optim.SGD(nn.Linear(1, 1).parameters()) for _ in range(2))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(mine)
    with pytest.raises(TypeError, match="got ReduceLROnPlateau, which waits for a metric"):
        from_torch(mine, scheduler=plateau)
    with pytest.raises(ValueError, match="scheduler must belong to optimizer"):
        from_torch(mine, scheduler=torch.optim.lr_scheduler.StepLR(other, 1))
