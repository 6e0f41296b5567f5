"""Real models in every mode, against their twins; and that a call leaves no trace in them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optree
import pytest
import torch
from models import CASES, Case, FusedAttention, OnceDifferentiable, bilevel, convolution, reference
from problems import relative_error
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradgradcheck
from torch.func import functional_call

import hypergrad as hg


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("mode", ["auto", "reverse", "forward", "finite-difference", "compiled"])
def test_every_model_in_every_mode_agrees_with_its_twin(case: Case, mode: str) -> None:
    torch.manual_seed(0)
    model = case.make()
    inner, outer, params, phi = bilevel(model)
    expected = reference(case.twin(model), damping=2.0)

    def call(mode: Any) -> hg.Hypergradient:
        torch.manual_seed(5)
        return hg.hypergradient(
            inner,
            outer,
            params,
            phi,
            method=hg.Implicit(hg.Dense(), damping=2.0, mode=mode),
            verify="never" if case.stops_gradients else "always",
        )

    if mode in ("reverse", "compiled") and not case.double_backward:
        with pytest.raises(hg.DoubleBackwardError, match="embedding_bag"):
            call(mode)
    elif mode == "forward" and not case.forward_mode:
        with pytest.raises(hg.ForwardModeError, match="mode; use mode='reverse'"):
            call(mode)
    elif mode == "compiled" and case.rebinds_buffers:
        with pytest.raises(hg.CompilationError, match="leave nothing behind but its value"):
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
@pytest.mark.parametrize("mode", ["auto", "forward", "finite-difference", "compiled"])
@pytest.mark.parametrize("solver", [hg.CG(maxiter=3), hg.Nystrom(rank=3), hg.Neumann(terms=3)])
def test_nothing_of_the_callers_changes(case: Case, mode: Any, solver: hg.LinearSolver) -> None:
    if mode == "forward" and not case.forward_mode:
        mode = "reverse" if case.double_backward else "finite-difference"
    if mode == "compiled" and (case.rebinds_buffers or not case.double_backward):
        mode = "finite-difference"
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
        hg.hypergradient(
            inner, outer, params, phi, method=hg.Implicit(solver, damping=1.0, mode=mode)
        )

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
    expected = hg.hypergradient(
        expected_inner, expected_outer, expected_params, phi, method=hg.Implicit(damping=1.0)
    )
    for mode in ("auto", "reverse", "forward"):
        result = hg.hypergradient(
            inner, outer, params, phi, method=hg.Implicit(damping=1.0, mode=mode)
        )  # type: ignore[arg-type]
        assert relative_error(result.grads, expected.grads) < 1e-5
    rough = hg.hypergradient(
        inner,
        outer,
        params,
        phi,
        method=hg.Implicit(hg.CG(rtol=1e-3), damping=1.0, mode="finite-difference"),
    )
    assert relative_error(rough.grads, expected.grads) < 1e-2
    frames = dict(torch._dynamo.utils.counters["frames"])
    assert torch.equal(compiled(x), before)
    hg.hypergradient(
        inner,
        outer,
        params,
        phi,
        method=hg.Implicit(hg.CG(rtol=1e-3), damping=1.0, mode="finite-difference"),
    )
    assert dict(torch._dynamo.utils.counters["frames"]) == frames, "nothing is compiled again"


def test_the_attention_back_end_is_restored() -> None:
    torch.manual_seed(0)
    before = torch.backends.cuda.flash_sdp_enabled()
    inner, outer, params, phi = bilevel(FusedAttention())
    hg.hypergradient(inner, outer, params, phi, method=hg.Implicit(damping=1.0))
    assert torch.backends.cuda.flash_sdp_enabled() is before
    assert torch.backends.cuda.math_sdp_enabled()


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


def test_an_operation_whose_second_derivative_is_wrong_is_not_trusted() -> None:
    """If gradgradcheck passes one day, ``_WRONG`` in kept_graph.py has an entry too many."""
    length = torch.tensor([[1.5], [0.5]], dtype=torch.float64)
    v = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    leaves = (v.clone().requires_grad_(), length.clone().requires_grad_())
    with pytest.raises(GradcheckError):
        gradgradcheck(lambda v, length: torch._weight_norm(v, length, 0), leaves)

    def native(w: tuple[Tensor, Tensor], p: Tensor) -> Tensor:
        return torch._weight_norm(w[0], w[1], 0).tanh().square().sum() * p.sum()

    def written_out(w: tuple[Tensor, Tensor], p: Tensor) -> Tensor:
        weight = w[1] * w[0] / w[0].norm(dim=1, keepdim=True)
        return weight.tanh().square().sum() * p.sum()

    params, phi = (v, length), torch.ones(1, dtype=torch.float64)
    ones = tuple(torch.ones_like(leaf) for leaf in params)
    expected = hg.operators.hessian(written_out, params, phi).matvec(ones)
    with pytest.raises(hg.DoubleBackwardError, match=r"torch\._weight_norm has no correct second"):
        hg.operators.hessian(native, params, phi, mode="reverse")
    with pytest.warns(hg.DoubleBackwardWarning, match=r"torch\._weight_norm"):
        found = hg.operators.hessian(native, params, phi).matvec(ones)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


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
                objective(recompute), objective(False), params, phi, method=hg.Dense()
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
            hg.hypergradient(inner, outer, params, phi, method=hg.Implicit(damping=5.0))
            return outer(w, p)

        for _ in range(5):
            result = hg.hypergradient(
                inner, outer_with_another_inside, params, phi, method=hg.Implicit(damping=5.0)
            )
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
