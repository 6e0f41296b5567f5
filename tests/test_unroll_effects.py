"""What unrolling does to modules, random states and memory, and what bad loops are told."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import OnceDifferentiable
from problems import relative_error
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from unrolled import MEMORIES, REVERSE, cnn, fresh, leaf, logistic, mlp, outer_value

import hypergrad as hg
from hypergrad import optimizers as opt


def train_plainly(model: nn.Module, loss: Callable[[Any, Any], Tensor], batches: list[Any]) -> None:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in batches:
        sgd.zero_grad()
        loss(dict(model.named_parameters()), batch).backward()
        sgd.step()


@pytest.mark.parametrize("memory", MEMORIES)
def test_buffers_and_random_state_end_as_after_train_plainly(memory: Any) -> None:
    """Once for each step: not again by backward passes, which are run twice here."""
    loop, twin = cnn(), cnn()
    torch.manual_seed(3)
    hparams = fresh(loop.hparams)
    end = hg.unroll(
        loop.inner, opt.SGD(lr=0.1, momentum=0.9), loop.params, hparams, loop.batches, memory=memory
    )
    after = torch.get_rng_state()
    state = copy.deepcopy(loop.module.state_dict())
    loss = sum(t.square().sum() for t in end.values())
    torch.autograd.grad(loss, list(hparams.values()), retain_graph=memory != "forward")
    if memory != "forward":
        torch.autograd.grad(loss, list(hparams.values()))
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(loop.module.state_dict(), state, rtol=0, atol=0)

    torch.manual_seed(3)
    train_plainly(twin.module, lambda w, b: twin.inner(w, twin.hparams, b), twin.batches)
    assert torch.equal(torch.get_rng_state(), after)
    for key, value in twin.module.named_buffers():
        torch.testing.assert_close(state[key], value.to(state[key].dtype), rtol=1e-12, atol=1e-12)
    for key, value in twin.module.named_parameters():
        torch.testing.assert_close(end[key].detach(), value.detach(), rtol=1e-12, atol=1e-12)


def test_a_buffer_that_changes_the_gradient_is_the_same_in_the_recomputation() -> None:
    """Spectral norm: each step's power iteration starts where the last one ended."""

    def hypergradient(memory: Any) -> Tensor:
        torch.manual_seed(0)
        model = nn.utils.spectral_norm(nn.Linear(4, 3)).double()
        X = torch.randn(20, 4, dtype=torch.float64)
        params = {key: value.detach() for key, value in model.named_parameters()}

        def inner(w: Any, c: Tensor) -> Tensor:
            return (functional_call(model, w, (X,)) - c * X[:, :3]).square().mean()

        scale = leaf(1.5)
        end = hg.unroll(inner, opt.SGD(lr=0.5), params, scale, 6, memory=memory)
        end["weight_orig"].square().sum().backward()
        return scale.grad

    expected = hypergradient("graph")
    assert relative_error(hypergradient("recompute"), expected) < 1e-12
    assert relative_error(hypergradient("checkpoint"), expected) < 1e-12


@pytest.mark.parametrize("memory", REVERSE)
def test_autocast_is_that_of_the_forward_pass(memory: Any) -> None:
    """The backward pass runs outside the context, as PyTorch advises."""
    torch.manual_seed(0)
    X, y = torch.randn(16, 4), torch.randn(16, 1)

    def inner(w: Tensor, c: Tensor) -> Tensor:
        product = F.linear(X, w)
        assert product.dtype == torch.bfloat16
        return (product.float() - y).square().mean() + c * w.square().sum()

    decay = torch.tensor(0.1, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        end = hg.unroll(inner, opt.SGD(lr=0.1), torch.ones(1, 4), decay, 4, memory=memory)
    end.sum().backward()
    assert torch.isfinite(decay.grad)


def kept_vectors(memory: Any, steps: int) -> int:
    """How many different tensors of five elements are saved for a backward pass."""
    loop = logistic()
    saved: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        end = hg.unroll(
            lambda w, c: loop.inner(w, c, loop.batches[0]), opt.SGD(lr=0.1, momentum=0.9),
            loop.params, loop.hparams.clone().requires_grad_(), steps, memory=memory,
        )  # fmt: skip
    alive = [tensor for ref in saved if (tensor := ref()) is not None and tensor.shape == (5,)]
    assert end["weight"].requires_grad
    return len({tensor.untyped_storage().data_ptr() for tensor in alive})


def test_recomputation_keeps_iterates_and_checkpoints_their_root() -> None:
    # θ_0 … θ_15, b_1 … b_15 and φ; of four segments θ_0, θ_4, θ_8, θ_12, b_4, b_8, b_12 and φ.
    assert kept_vectors("recompute", 16) == 16 + 15 + 1
    assert kept_vectors("checkpoint", 16) == 4 + 3 + 1
    assert kept_vectors("graph", 16) > 16 + 15 + 1


@pytest.mark.parametrize("memory", MEMORIES)
def test_nothing_stays_behind_once_the_result_is_gone(memory: Any) -> None:
    loop = mlp()
    counts = []
    for _ in range(3):
        hparams = fresh(loop.hparams)
        outer_value(loop, hparams, opt.Adam(lr=0.1), memory=memory).backward()
        del hparams
        gc.collect()
        counts.append(sum(isinstance(x, Tensor) for x in gc.get_objects()))
    assert counts[1] == counts[2]


def test_first_order_maml_over_a_batch_of_tasks() -> None:
    check_maml(first_order=True)


def test_maml_over_a_batch_of_tasks_is_that_of_each_task_alone() -> None:
    check_maml(first_order=False)


def check_maml(first_order: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(5, 12, 3, generator=generator, dtype=torch.float64)
    Y = torch.sin(X).sum(-1)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    start = {
        key: value.detach().clone().requires_grad_() for key, value in model.named_parameters()
    }
    lr = leaf(0.1)

    def loss(w: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, w, (x,))[:, 0], y)

    def adapted(x: Tensor, y: Tensor, memory: Any) -> Tensor:
        end = hg.unroll(
            lambda w, _: loss(w, x[:6], y[:6]), opt.SGD(lr=lr, momentum=0.5), start, (), 3,
            memory=memory, first_order=first_order,
        )  # fmt: skip
        return loss(end, x[6:], y[6:])

    inputs = [*start.values(), lr]
    together = vmap(lambda x, y: adapted(x, y, "graph"))(X, Y).mean()
    alone = torch.stack([adapted(x, y, "recompute") for x, y in zip(X, Y, strict=True)]).mean()
    torch.testing.assert_close(together, alone)
    for a, b in zip(
        torch.autograd.grad(together, inputs), torch.autograd.grad(alone, inputs), strict=True
    ):
        assert relative_error(a, b) < 1e-12


def test_imaml_is_an_argmin_with_a_proximal_term() -> None:
    """`(I + H/λ)⁻¹ ∇g` (Rajeswaran et al. 2019, Lemma 1), by argmin over a batch of tasks."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4, 10, 3, generator=generator, dtype=torch.float64)
    Y = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    strength = 2.0

    def inner(w: Tensor, prior: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (x @ w - y).square().sum() + 0.5 * strength * (w - prior).square().sum()

    @hg.argmin(inner, solver=hg.CG(rtol=1e-12))
    def adapt(prior: Tensor, x: Tensor, y: Tensor) -> Tensor:
        A = x.mT @ x + strength * torch.eye(3, dtype=x.dtype)
        return torch.linalg.solve(A, x.mT @ y + strength * prior)

    prior = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    ends = vmap(adapt, in_dims=(None, 0, 0))(prior, X, Y)
    ends.square().sum().backward()
    expected = sum(
        torch.linalg.solve(torch.eye(3) + x.T @ x / strength, 2 * end)
        for x, end in zip(X, ends.detach(), strict=True)
    )
    assert relative_error(prior.grad, expected) < 1e-8


@pytest.mark.parametrize("memory", REVERSE)
def test_a_jacobian_may_be_pulled_back_in_one_batch(memory: Any) -> None:
    loop = logistic()
    decay = loop.hparams.clone().requires_grad_()
    end = hg.unroll(
        loop.inner, opt.Adam(lr=0.1), loop.params, decay, loop.batches, memory=memory
    )["weight"]  # fmt: skip
    rows = [torch.autograd.grad(end, decay, e, retain_graph=True)[0] for e in torch.eye(5).double()]
    (together,) = torch.autograd.grad(end, decay, torch.eye(5).double(), is_grads_batched=True)
    torch.testing.assert_close(together, torch.stack(rows))


@pytest.mark.parametrize("memory", ["recompute", "checkpoint", "forward"])
def test_a_tensor_that_inner_closes_over_is_not_a_constant_in_silence(memory: Any) -> None:
    hidden, start = leaf(2.0), torch.ones(2, dtype=torch.float64)
    inner = lambda w, c: hidden * c * w.square().sum()  # noqa: E731
    with pytest.warns(hg.HypergradWarning, match="neither in params nor in hparams"):
        hg.unroll(inner, opt.SGD(lr=0.1), start, leaf(1.0), 2, memory=memory)
    averaged = hg.Averaged(lambda w, c, b: b * inner(w, c), [1.0, 2.0])
    with pytest.warns(hg.HypergradWarning, match="neither in params nor in hparams"):
        hg.unroll(averaged, opt.SGD(lr=0.1), start, leaf(1.0), 2, memory=memory)
    end = hg.unroll(inner, opt.SGD(lr=0.1), start, leaf(1.0), 2, memory="graph")
    assert torch.autograd.grad(end.sum(), hidden)[0] != 0.0


def test_a_leaf_that_inner_makes_for_itself_is_no_constant_of_the_callers() -> None:
    """As embeddings that are marked as requiring gradients on their way into a checkpoint."""
    start = torch.ones(2, dtype=torch.float64)
    marked = lambda w, c: (w * start.clone().requires_grad_() * c).square().sum()  # noqa: E731
    plain = lambda w, c: (w * c).square().sum()  # noqa: E731
    grads = []
    for inner in (marked, plain):
        c = leaf(0.7)
        grads.append(
            torch.autograd.grad(hg.unroll(inner, opt.SGD(lr=0.1), start, c, 3).sum(), c)[0]
        )
    torch.testing.assert_close(*grads)


def test_an_operation_without_second_derivative_is_named_or_replaced() -> None:
    def inner(w: Tensor, c: Tensor) -> Tensor:
        return (OnceDifferentiable.apply(w) * c).sum()

    def end(c: Tensor, function: Any, **options: Any) -> Tensor:
        start = torch.tensor([0.5, -0.3], dtype=torch.float64)
        return hg.unroll(function, opt.SGD(lr=0.1), start, c, 3, **options).sum()

    c = leaf(0.7)
    with pytest.raises(hg.DoubleBackwardError, match="OnceDifferentiable"):
        end(c, inner, memory="graph")
    (exact,) = torch.autograd.grad(end(c, lambda w, c: (w**3 * c).sum()), c)
    for memory in ("recompute", "checkpoint", "forward"):
        with pytest.warns(hg.DoubleBackwardWarning, match="OnceDifferentiable"):
            (found,) = torch.autograd.grad(end(c, inner, memory=memory), c)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("memory", MEMORIES)
def test_the_step_where_a_value_stops_being_finite_is_named(memory: Any) -> None:
    """lr · curvature = 1e30 a step: parameters overflow float32 in the second."""
    model = nn.BatchNorm1d(2, affine=False)
    before = copy.deepcopy(model.state_dict())
    X = torch.randn(8, 2)

    def inner(w: Tensor, c: Tensor) -> Tensor:
        return 0.5e15 * (c * w).square().sum() + 0.0 * model(X).sum()

    c = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(hg.NonFiniteError, match="step 1 of the inner loop"):
        hg.unroll(inner, opt.SGD(lr=1e10), torch.ones(2), c, 5, memory=memory)
    torch.testing.assert_close(model.state_dict(), before)
    with pytest.raises(hg.NonFiniteError, match=r"step 0 .*inner must return a finite value, got"):
        hg.unroll(lambda w, c: w.log() * c, opt.SGD(), torch.zeros(()), c, 5, memory=memory)
    with pytest.raises(hg.NonFiniteError, match=r"step 0 of the inner loop: params\['b'\] must"):
        hg.unroll(
            lambda w, c: w["a"] + c * w["b"].sqrt(), opt.SGD(),
            {"a": torch.zeros(()), "b": torch.zeros(())}, c, 5, memory=memory,
        )  # fmt: skip


def test_a_gradient_that_overflows_on_its_way_back_is_named() -> None:
    """dθ_{t+1}/dθ_t = 1e20 at a stationary point: the second step back overflows float32."""
    c = torch.tensor(1.0, requires_grad=True)
    end = hg.unroll(
        lambda w, c: -0.5e20 * (w - 0 * c).square(), opt.SGD(lr=1.0), torch.zeros(()), c, 4,
    )  # fmt: skip
    with pytest.raises(hg.NonFiniteError, match="back through step 2 of the inner loop"):
        end.backward()


MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"inner": 3}, TypeError, "inner must be a function"),
    ({"optimizer": torch.optim.SGD}, TypeError, "optimizer must be one of hypergrad.optimizers"),
    ({"params": {}}, ValueError, "params must hold at least one tensor"),
    ({"hparams": torch.tensor(1)}, TypeError, "hparams must be a floating-point tensor"),
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"steps": 2.0}, TypeError, "steps must be an integer"),
    ({"steps": []}, ValueError, "steps must hold at least one batch"),
    ({"memory": "disk"}, ValueError, "memory must be one of 'recompute', 'graph'"),
    ({"mode": "sideways"}, ValueError, "mode must be one of"),
    ({"truncate": 0}, ValueError, "truncate must be at least 1"),
    ({"directions": 3}, ValueError, "directions must come with memory='forward'"),
    ({"inner": lambda w, c: w}, ValueError, "inner must return a scalar, got shape"),
    ({"inner": lambda w, c: c.sum()}, ValueError, "inner must depend on the inner parameters"),
    (
        {"inner": hg.Sampled(lambda w, c, b: w.sum(), [1]), "steps": [1, 2]},
        TypeError,
        "steps must be a number where inner is Sampled",
    ),
    (
        {"state": opt.SGD().init((torch.ones(1), torch.ones(1)))},
        ValueError,
        "state must have one slot for each leaf",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), MISTAKES, ids=lambda x: "")
def test_bad_loops_are_told_what_is_wrong(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {
        "inner": lambda w, c: (w * c).square().sum(),
        "optimizer": opt.SGD(),
        "params": torch.ones(2),
        "hparams": torch.ones((), requires_grad=True),
        "steps": 2,
    } | change
    first = [arguments.pop(name) for name in ("inner", "optimizer", "params", "hparams", "steps")]
    with pytest.raises(error, match=message):
        hg.unroll(*first, **arguments)


def test_other_modes_than_graph_are_refused_inside_transforms() -> None:
    with pytest.raises(ValueError, match="memory must be 'graph' inside the transforms"):
        vmap(lambda c: hg.unroll(lambda w, c: w * c, opt.SGD(), torch.ones(()), c, 2))(
            torch.ones(3)
        )


@pytest.mark.parametrize("memory", MEMORIES)
def test_hypergradient_takes_the_method_as_one_argument(memory: Any) -> None:
    loop = logistic()
    inner = lambda w, c: loop.inner(w, c, slice(0, 300))  # noqa: E731
    method = hg.Unrolled(opt.SGD(lr=0.5, momentum=0.9), steps=700, memory=memory)
    unrolled = hg.hypergradient(inner, loop.outer, loop.params, loop.hparams, method=method)
    implicit = hg.hypergradient(
        inner, loop.outer, unrolled.params, loop.hparams, method=hg.CG(rtol=1e-12)
    )
    assert implicit.inner_grad_norm < 1e-10
    assert relative_error(unrolled.grads, implicit.grads) < 1e-8
    assert unrolled.outer_value == implicit.outer_value
    assert unrolled.state.step == 700


def test_the_method_may_learn_the_optimizer_and_leaves_the_caller_alone() -> None:
    loop = mlp()
    hparams = {**loop.hparams, "log_lr": leaf(-2.0)}
    method = hg.Unrolled(lambda h: opt.SGD(lr=h["log_lr"].exp()), loop.batches, truncate=3)
    torch.manual_seed(3)
    result = hg.hypergradient(loop.inner, loop.outer, loop.params, hparams, method=method)
    assert hparams["log_lr"].grad is None
    assert result.grads.keys() == hparams.keys()
    assert not any(t.requires_grad for t in (*result.params.values(), *result.grads.values()))
    torch.manual_seed(3)
    end = hg.unroll(
        loop.inner, opt.SGD(lr=hparams["log_lr"].exp()), loop.params, loop.hparams, loop.batches,
        truncate=3,
    )  # fmt: skip
    loop.outer(end, loop.hparams).backward()
    torch.testing.assert_close(result.grads["log_lr"], hparams["log_lr"].grad)


def test_the_method_is_checked_and_its_receipt_is_of_its_kind() -> None:
    f = lambda w, c: 0.5 * (w - c) ** 2  # noqa: E731
    at = torch.zeros(()), torch.zeros(())
    with pytest.raises(ValueError, match=r"x0 must be None with hg\.Unrolled"):
        hg.hypergradient(f, f, *at, method=hg.Unrolled(opt.SGD(), 3), x0=at[0])
    result = hg.hypergradient(f, f, *at, method=hg.Unrolled(opt.SGD(), 3))
    with pytest.raises(AttributeError, match="no linear solve"):
        _ = result.solve
    with pytest.raises(AttributeError, match="no unrolled steps"):
        _ = hg.hypergradient(f, f, *at).state
    with pytest.raises(TypeError, match="steps must be iterable again and again"):
        hg.Unrolled(opt.SGD(), iter([1, 2]))
    with pytest.raises(TypeError, match="method must be a linear solver such as"):
        hg.hypergradient(f, f, *at, method="unrolled")
    with pytest.raises(TypeError, match=r"optimizer must be one of hypergrad\.optimizers"):
        hg.hypergradient(f, f, *at, method=hg.Unrolled("sgd", 3))
