"""``mode="compiled"``: what becomes of an objective that a compiler works on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import flat_hypergradient, relative_error
from torch import Tensor, nn
from torch.func import functional_call

import hypergrad as hg
from hypergrad.operators import hessian
from hypergrad.operators.compiled import program

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
W = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)
P = torch.tensor(0.3, dtype=torch.float64)


def loss(w: Tensor, p: Tensor) -> Tensor:
    return torch.cosh(X @ w).mean() + p.exp() * w.square().sum()


def products(inner: Callable, w: Any = W, p: Any = P, mode: Any = "compiled") -> list[Tensor]:
    A = hessian(inner, w, p, mode=mode)
    v = torch.linspace(1.0, 2.0, len(w), dtype=w.dtype)
    return [A.gradient, A.matvec(v), A.vjp_outer(v), *A.vjp(v)]


def agree(inner: Callable, w: Any = W, p: Any = P) -> None:
    torch.testing.assert_close(products(inner, w, p), products(inner, w, p, mode="reverse"))


@pytest.mark.compiler
def test_the_compiler_gives_the_products_of_the_kept_graph() -> None:
    agree(loss)
    agree(loss, W.float().double(), P + 1)


def masked() -> nn.Module:
    """With dropout and statistics of its batches."""
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 2)
    return nn.Sequential(*layers).double()


def hypergradients(model: nn.Module) -> Callable[[Any], Tensor]:
    """A hypergradient by each mode, of the network as it is then."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def inner(w: Any, p: Tensor) -> Tensor:
        penalty = sum((leaf.square().sum() for leaf in w.values()), torch.zeros(()))
        return functional_call(model, w, (X,)).square().mean() + p.exp() * penalty

    def outer(w: Any, p: Tensor) -> Tensor:
        return w["0.weight"].square().sum()

    def call(mode: Any) -> Tensor:
        torch.manual_seed(3)
        options = {"solver": hg.Dense(), "damping": 2.0, "mode": mode}
        return flat_hypergradient(inner, outer, params, P, **options).grads

    return call


@pytest.mark.compiler
def test_a_network_with_masks_and_statistics_is_compiled_and_left_alone() -> None:
    torch.manual_seed(0)
    call = hypergradients(model := masked())
    before = {name: b.clone() for name, b in model.named_buffers()}
    expected, state = call("reverse"), torch.get_rng_state()
    for _ in range(2):
        torch.testing.assert_close(call("compiled"), expected)
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_a_network_that_is_to_predict_has_other_products() -> None:
    torch.manual_seed(0)
    call = hypergradients(model := masked())
    expected = call("compiled")
    model.eval()
    torch.testing.assert_close(call("compiled"), call("reverse"))
    assert relative_error(call("compiled"), expected) > 1e-3


@pytest.mark.compiler
def test_a_failing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise OSError("no g++ here")

    monkeypatch.setattr("torch._inductor.compile", failing)
    with pytest.raises(hg.CompilationError, match=r"the compiler failed: no g\+\+ here"):
        hessian(lambda w, p: p * w.pow(3).sum(), W, P, mode="compiled")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs of the programs that were made, which run as they are."""
    graphs: list[Any] = []

    def keeping(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(program, "_compiled", keeping)
    return graphs


def test_programs_are_made_once_for_all_calls(made: list[Any]) -> None:
    data = X

    def inner(w: Tensor, p: Tensor) -> Tensor:
        return (torch.sinh(data @ w)).square().mean() + p * w.pow(4).sum()

    for shift in range(3):
        agree(inner, W + shift, P - shift)
    assert len(made) == 4  # where products start, and three kinds of them
    data = 2 * X
    agree(inner)
    assert len(made) == 4


def test_what_an_objective_holds_on_to_is_seen_anew() -> None:
    """New data, numbers, shapes and flags; and more objectives than torch.compile has patience."""
    data, factor, log = X, 1.0, False

    def inner(w: Tensor, p: Tensor) -> Tensor:
        value = factor * torch.cosh(data[:, : len(w)] @ w).mean() + p.exp() * w.square().sum()
        return value.log() if log else value

    agree(inner)
    data = X + 1
    agree(inner)
    data = X[:5]
    agree(inner)
    for number in range(2, 14):
        factor = number
        agree(inner)
    log = True
    agree(inner)
    agree(inner, W[:3].clone())
    agree(inner, W.float().double()[::2], P)
    for power in range(2, 14):
        agree(lambda w, p, power=power: p * w.pow(power).sum())


def test_a_change_in_place_is_not_passed_over() -> None:
    data = X.clone()
    A = hessian(lambda w, p: p * (data @ w).square().sum(), W, P, mode="compiled")
    A.matvec(W)
    data.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        A.matvec(W)
    with pytest.raises(RuntimeError, match="changed in place"):
        A.matmat(torch.stack([W, W]))


def test_vectors_may_have_any_strides_and_wider_types() -> None:
    narrow = X.float()

    def inner(w: Tensor, p: Tensor) -> Tensor:
        return torch.cosh(narrow @ w).mean() + p.exp() * w.square().sum()

    A, B = (hessian(inner, W.float(), P.float(), mode=m) for m in ("compiled", "reverse"))
    apart = torch.linspace(1.0, 2.0, 8)[::2]
    torch.testing.assert_close(A.matvec(apart), B.matvec(apart))
    wide = apart.double()
    assert A.matvec(wide).dtype == torch.float64
    torch.testing.assert_close(A.matvec(wide), B.matvec(wide))


def test_parameters_that_are_not_used_get_zero() -> None:
    trees = {"a": W, "b": torch.ones(2)}, (P, torch.ones(3))
    for inner in (
        lambda w, p: w["a"].pow(4).sum(),
        lambda w, p: w["a"].pow(4).sum() * p[1].sum(),
        lambda w, p: w["a"].sum() * p[0] + w["b"].detach().sum(),
    ):
        A, B = (hessian(inner, *trees, mode=m) for m in ("compiled", "reverse"))  # type: ignore[arg-type]
        v = {"a": torch.ones(4, dtype=torch.float64), "b": torch.ones(2)}
        assert A.value == pytest.approx(B.value)
        torch.testing.assert_close(A.gradient, B.gradient)
        torch.testing.assert_close(A.vjp(v), B.vjp(v))


def test_a_compiled_objective_and_other_threads_will_do() -> None:
    compiled = torch.compile(loss, backend="eager")
    agree(compiled)
    failures = []

    def work() -> None:
        try:
            agree(lambda w, p: loss(w, p).exp())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with torch.inference_mode():
        inside = products(loss, W.clone(), P.clone())
    torch.testing.assert_close(inside, products(loss))


def test_argmin_and_sharded_parameters_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="mode must not be 'compiled' for argmin"):
        hg.argmin(loss, mode="compiled")
    monkeypatch.setattr("hypergrad._sharding.any_distributed", lambda values: True)
    with pytest.raises(ValueError, match="mode must not be 'compiled' for DTensors"):
        hessian(loss, W, P, mode="compiled")


def test_what_cannot_be_captured_is_told() -> None:
    kept = []

    def breaking(w: Tensor, p: Tensor) -> Tensor:
        return w.square().sum() * (2.0 if w.sum().item() > 0 else p)

    def keeping(w: Tensor, p: Tensor) -> Tensor:
        kept.append(w * p)
        return w.square().sum()

    with pytest.raises(hg.CompilationError, match="cannot take it as one graph"):
        hessian(breaking, W, P, mode="compiled")
    with pytest.raises(hg.CompilationError, match="leave nothing behind but its value, got 2"):
        hessian(keeping, W, P, mode="compiled")
    assert products(loss)  # and it goes on


def loop(method: Any) -> Tensor:
    """Where φ ends."""
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    phi = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    hg.BilevelSolver(
        hg.Level(
            lambda w, p, _: (X @ w - 1.0).square().mean() + p.exp() * w.square().sum(),
            w,
            torch.optim.SGD([w], lr=0.05)
            if isinstance(method, hg.Implicit)
            else hg.optimizers.SGD(lr=0.05),
        ),
        hg.Level(
            lambda w, p, _: (X[:6] @ w - 0.5).square().mean(), phi, torch.optim.SGD([phi], lr=0.5)
        ),
        method=method,
        inner_steps=4,
        outer_steps=3,
    ).run()
    return phi.detach()


def test_the_loop_takes_it_and_makes_its_programs_once(made: list[Any]) -> None:
    implicit = hg.Implicit
    torch.testing.assert_close(loop(implicit(mode="compiled")), loop(implicit(mode="auto")))
    assert len(made) == 3
    with pytest.raises(ValueError, match="mode must not be 'compiled' for Unrolled inside a Bil"):
        loop(hg.Unrolled(mode="compiled"))


@pytest.mark.parametrize(
    "of",
    [
        lambda W: torch.logdet(W @ W.T + 3 * torch.eye(3)),
        lambda W: torch.linalg.solve(W + 3 * torch.eye(3), W),
        lambda W: torch.linalg.eigvals(W + torch.diag(torch.arange(3.0))).abs(),
        lambda W: torch.unique(W),
    ],
    ids=["logdet", "solve", "eigvals", "unique"],
)
def test_whatever_the_compiler_raises_is_a_compilation_error(
    of: Callable[[Tensor], Tensor],
) -> None:
    # Versions of PyTorch differ in which of these they can compile.
    def inner(W: Tensor, p: Tensor) -> Tensor:
        return of(W).square().sum() + p * W.square().sum()

    W = torch.arange(9.0).reshape(3, 3) / 9
    p, told = torch.tensor(1.0), "mode='compiled' failed for inner: "
    try:
        product = hessian(inner, W, p, mode="compiled").matvec(W)
    except hg.CompilationError as error:
        told = str(error)
    else:
        expected = hessian(inner, W, p, mode="reverse").matvec(W)
        torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)
    assert "mode='compiled' failed for inner: " in told


def test_sparse_gradients_have_no_second_derivative_here_either() -> None:
    def inner(W: Tensor, p: Tensor) -> Tensor:
        rows = nn.functional.embedding(torch.arange(2), W, sparse=True)
        return rows.square().sum() + p * W.square().sum()

    with pytest.raises(hg.DoubleBackwardError, match=r"sparse=True.*mode='finite-difference'"):
        hessian(inner, torch.ones(3, 3), torch.tensor(1.0), mode="compiled")


def test_errors_without_words_and_at_the_first_run_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(program, "_compiled", lambda graph, inputs: failing)
    with pytest.raises(hg.CompilationError, match="compiled program failed: AssertionError"):
        hessian(lambda w, p: (p * torch.sinh(w)).sum(), W, P, mode="compiled")
