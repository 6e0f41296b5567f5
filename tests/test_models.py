"""Real models as they come, each against a twin that plain autograd differentiates twice."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import optree
import pytest
import torch
from problems import relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad as hg


class FusedAttention(nn.Module):
    """Self-attention through `F.scaled_dot_product_attention`, or written out."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.fused:
            q, k, v = q[:, None], k[:, None], v[:, None]
            return F.scaled_dot_product_attention(q, k, v)[:, 0]
        return torch.softmax(q @ k.mT / 2.0, dim=-1) @ v


class Bag(nn.Module):
    """A mean of embeddings, by `EmbeddingBag` or by `Embedding`."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 4))
        self.head = nn.Linear(4, 4)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        index = (x.abs() * 3).long().clamp(max=9)[..., 0]
        if self.fused:
            embedded = F.embedding_bag(index, self.weight, mode="mean")
        else:
            embedded = F.embedding(index, self.weight).mean(1)
        return self.head(torch.tanh(embedded))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


class PartlyUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(6, 5, 3, padding=1), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(20, 4),
    )  # fmt: skip


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh())


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True, activation="gelu")


def itself(model: nn.Module) -> nn.Module:
    return model


def unfused(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.fused = False  # type: ignore[assignment]
    return twin


@dataclass(frozen=True)
class Case:
    """A model and the twin whose double backward plain autograd can do."""

    make: Callable[[], nn.Module]
    twin: Callable[[nn.Module], nn.Module] = itself
    double_backward: bool = True
    forward_mode: bool = True
    stops_gradients: bool = False  # differences see what no_grad hides from derivatives


CASES = {
    "linear": Case(lambda: nn.Linear(4, 4)),
    "conv-batchnorm-dropout": Case(convolution),
    "lstm": Case(lambda: Recurrent(nn.LSTM)),
    "gru": Case(lambda: Recurrent(nn.GRU)),
    "multihead-attention": Case(Attention),
    "transformer-layer": Case(transformer),
    "fused-attention": Case(FusedAttention, unfused),
    "embedding-bag": Case(Bag, unfused, double_backward=False, forward_mode=False),
    "tied": Case(Tied),
    "partly-unused": Case(PartlyUnused),
    "spectral-norm": Case(spectral, forward_mode=False, stops_gradients=True),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def bilevel(model: nn.Module) -> tuple[Any, Any, dict[str, Tensor], Tensor]:
    """`f`, `g`, θ and φ (one log-decay a tensor) for a regression with this model."""
    generator = torch.Generator().manual_seed(1)
    x, x_val = torch.randn(2, 8, 6, 4, generator=generator, dtype=torch.get_default_dtype())
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    phi = torch.linspace(-1.0, 0.0, len(params))

    def inner(w: dict[str, Tensor], decay: Tensor) -> Tensor:
        penalty = sum(c.exp() * p.square().sum() for c, p in zip(decay, w.values(), strict=True))
        return functional_call(model, w, (x,)).square().mean() + penalty

    def outer(w: dict[str, Tensor], decay: Tensor) -> Tensor:
        return functional_call(model, w, (x_val,)).sin().mean()

    return inner, outer, params, phi


def reference(model: nn.Module, damping: float) -> Tensor:
    """The hypergradient by plain double backward, row by row, and a dense solve."""
    _, _, params, phi = bilevel(model)
    theta = {name: p.clone().requires_grad_() for name, p in params.items()}
    phi = phi.clone().requires_grad_()
    leaves = list(theta.values())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.manual_seed(5)
        F_tree = torch.autograd.grad(
            bilevel(copy.deepcopy(model))[0](theta, phi),
            leaves,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        torch.manual_seed(5)
        b = torch.autograd.grad(
            bilevel(copy.deepcopy(model))[1](theta, phi),
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
    flat_F, flat_b = (torch.cat([t.reshape(-1) for t in tree]) for tree in (F_tree, b))
    rows = [
        torch.autograd.grad(
            entry, [*leaves, phi], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for entry in flat_F
    ]
    H = torch.stack([torch.cat([t.reshape(-1) for t in row[:-1]]) for row in rows])
    J = torch.stack([row[-1] for row in rows])
    return -J.T @ torch.linalg.solve(H + damping * torch.eye(len(H)), flat_b)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("mode", ["auto", "reverse", "forward", "finite-difference"])
def test_every_model_in_every_mode_agrees_with_its_twin(case: Case, mode: str) -> None:
    torch.manual_seed(0)
    model = case.make()
    inner, outer, params, phi = bilevel(model)
    expected = reference(case.twin(model), damping=2.0)

    def call(mode: Any) -> hg.Hypergradient:
        torch.manual_seed(5)
        return hg.hypergradient(
            inner, outer, params, phi, solver=hg.Dense(), damping=2.0, mode=mode
        )  # fmt: skip

    if mode == "reverse" and not case.double_backward:
        with pytest.raises(hg.DoubleBackwardError, match="embedding_bag"):
            call(mode)
    elif mode == "forward" and not case.forward_mode:
        with pytest.raises(NotImplementedError, match="forward"):
            call(mode)
    elif mode == "auto" and not case.double_backward:
        with pytest.warns(hg.DoubleBackwardWarning, match="_embedding_bag_backward") as caught:
            result = call(mode)
        assert len(caught) == 1
        assert relative_error(result.grads, expected) < 1e-5
    else:
        tolerance = 1e-5 if mode == "finite-difference" else 1e-8
        if mode == "finite-difference" and case.stops_gradients:
            tolerance = 0.1
        assert relative_error(call(mode).grads, expected) < tolerance


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("mode", ["auto", "forward", "finite-difference"])
@pytest.mark.parametrize("solver", [hg.CG(maxiter=3), hg.Nystrom(rank=3), hg.Neumann(terms=3)])
def test_nothing_of_the_callers_changes(case: Case, mode: Any, solver: hg.LinearSolver) -> None:
    if mode == "forward" and not case.forward_mode:
        mode = "reverse" if case.double_backward else "finite-difference"
    torch.manual_seed(0)
    model = case.make()
    inner, outer, _, phi = bilevel(model)
    params = dict(model.named_parameters())
    phi.requires_grad_()
    phi.grad = torch.ones_like(phi)
    state = copy.deepcopy(model.state_dict())
    buffers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    if isinstance(solver, hg.Nystrom):
        solver = hg.Nystrom(rank=3, generator=torch.Generator().manual_seed(0))
    random_state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hg.HypergradWarning)
        hg.hypergradient(inner, outer, params, phi, solver=solver, damping=1.0, mode=mode)

    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == buffers
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(phi.grad, torch.ones_like(phi))
    assert model.training


def test_dropout_masks_are_one_for_all_products() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    inner, _, params, phi = bilevel(model)
    for mode in ("reverse", "forward", "finite-difference"):
        H = hg.operators.hessian(inner, params, phi, mode=mode).dense()  # type: ignore[arg-type]
        asymmetry = float((H - H.T).norm() / H.norm())
        assert asymmetry < (1e-2 if mode == "finite-difference" else 1e-5), mode


@pytest.mark.filterwarnings("error::UserWarning:torch")
def test_compiled_modules_agree_with_their_eager_twin() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    compiled = torch.compile(eager, backend="aot_eager")
    x = torch.ones(3, 6, 4)
    before = compiled(x)
    inner, outer, params, phi = bilevel(compiled)
    assert next(iter(params)).startswith("_orig_mod.")
    expected_inner, expected_outer, expected_params, _ = bilevel(eager)
    expected = hg.hypergradient(expected_inner, expected_outer, expected_params, phi, damping=1.0)
    for mode in ("auto", "reverse", "forward"):
        result = hg.hypergradient(inner, outer, params, phi, damping=1.0, mode=mode)  # type: ignore[arg-type]
        assert relative_error(result.grads, expected.grads) < 1e-5
    rough = hg.hypergradient(
        inner, outer, params, phi, solver=hg.CG(rtol=1e-3), damping=1.0, mode="finite-difference"
    )
    assert relative_error(rough.grads, expected.grads) < 1e-2
    frames = dict(torch._dynamo.utils.counters["frames"])
    assert torch.equal(compiled(x), before)
    hg.hypergradient(
        inner, outer, params, phi, solver=hg.CG(rtol=1e-3), damping=1.0, mode="finite-difference"
    )
    assert dict(torch._dynamo.utils.counters["frames"]) == frames, "nothing is compiled again"


def test_the_attention_back_end_is_restored() -> None:
    torch.manual_seed(0)
    before = torch.backends.cuda.flash_sdp_enabled()
    inner, outer, params, phi = bilevel(FusedAttention())
    hg.hypergradient(inner, outer, params, phi, damping=1.0)
    assert torch.backends.cuda.flash_sdp_enabled() is before
    assert torch.backends.cuda.math_sdp_enabled()


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def test_a_once_differentiable_function_is_never_a_silent_zero() -> None:
    """With allow_unused, autograd answers None through it; the Hessian would lack its part."""
    w, phi = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def inner(w: Tensor, p: Tensor) -> Tensor:
        return (OnceDifferentiable.apply(w) * p).sum() + w.square().sum()

    with pytest.raises(hg.DoubleBackwardError, match="OnceDifferentiableBackward"):
        hg.operators.hessian(inner, w, phi, mode="reverse")
    with pytest.warns(hg.DoubleBackwardWarning, match="once_differentiable"):
        H = hg.operators.hessian(inner, w, phi)
    torch.testing.assert_close(H.matvec(torch.ones(2)).double(), 6 * w + 2, rtol=1e-5, atol=0.0)


def test_checkpointed_models_recompute_without_a_trace() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    body = convolution().double()
    x = torch.randn(8, 6, 4, dtype=torch.float64)
    params = {name: p.detach() for name, p in body.named_parameters()}
    phi = torch.zeros(1, dtype=torch.float64)

    def objective(recompute: bool) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        def run(w: dict[str, Tensor], p: Tensor) -> Tensor:
            def forward(inputs: Tensor) -> Tensor:
                return functional_call(body, w, (inputs,))

            out = checkpoint(forward, x, use_reentrant=False) if recompute else forward(x)
            return out.square().mean() + (p.exp() * sum(t.square().sum() for t in w.values())).sum()

        return run

    state = copy.deepcopy(body.state_dict())
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        results.append(
            hg.hypergradient(
                objective(recompute), objective(False), params, phi, solver=hg.Dense()
            ).grads
        )
    torch.testing.assert_close(results[0], results[1])
    assert all(torch.equal(state[k], v) for k, v in body.state_dict().items())


def test_a_module_that_raises_leaves_its_buffers_in_place() -> None:
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            raise KeyError("broken")

    model, plain_call = Raises(), nn.Module.__call__
    mean = model.norm.running_mean
    with pytest.raises(KeyError, match="broken"):
        hg.hypergradient(
            lambda w, p: model(torch.randn(5, 4)).sum() * w,
            lambda w, p: w.square(),
            torch.tensor(1.0),
            torch.tensor(1.0),
        )
    assert model.norm.running_mean is mean
    assert torch.equal(mean, torch.zeros(4))
    assert nn.Module.__call__ is plain_call


def test_threads_and_nested_calls_keep_their_buffers_apart() -> None:
    torch.manual_seed(0)
    plain_call = nn.Module.__call__
    models = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(6)) for _ in range(4)]

    def nested(model: nn.Module) -> Tensor:
        inner, outer, params, phi = bilevel(model)

        def outer_with_another_inside(w: dict[str, Tensor], p: Tensor) -> Tensor:
            hg.hypergradient(inner, outer, params, phi, damping=5.0)
            return outer(w, p)

        for _ in range(5):
            result = hg.hypergradient(inner, outer_with_another_inside, params, phi, damping=5.0)
        return result.grads

    alone = [nested(model) for model in models]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(nested, models))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(model[1].num_batches_tracked == 0 for model in models)
    assert nn.Module.__call__ is plain_call


def test_outer_parameters_may_stand_in_for_buffers() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self) -> Tensor:
            return 0.5 * (self.weight * self.scale - 1.0).square().sum()

    model = Scaled()
    phi = torch.tensor(2.0, dtype=torch.float64)
    theta = torch.full((3,), 0.5, dtype=torch.float64)
    result = hg.hypergradient(
        lambda w, p: functional_call(model, {"weight": w, "scale": p}, ()),
        lambda w, p: w.sum(),
        theta,
        phi,
    )
    # θ* = 1/φ, so d(Σ θ*)/dφ = −3/φ².
    assert result.grads.item() == pytest.approx(-0.75)
    assert optree.tree_leaves(dict(model.named_buffers()))[0].item() == 2.0
