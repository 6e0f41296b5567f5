"""Forward mode on linear algebra and products: as reverse mode, as differences, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import hypergrad as hg
from hypergrad.operators import hessian

L = torch.linalg
N = 4


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def drawn(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def definite(W: Tensor) -> Tensor:
    return W @ W.T + N * torch.eye(N)


def symmetric(W: Tensor) -> Tensor:
    return (W + W.T) / 2 + 3 * torch.diag(torch.arange(1.0, N + 1))


def regular(W: Tensor) -> Tensor:
    return W + 3 * torch.diag(torch.arange(1.0, N + 1))


def tall(W: Tensor) -> Tensor:
    return torch.cat([regular(W), W[:2]])


def reflectors(W: Tensor) -> tuple[Tensor, Tensor]:
    below = torch.tril(W[:, :2], -1)
    return below + torch.eye(N)[:, :2], 2 / (1 + below.square().sum(0))


def with_zeros(W: Tensor) -> Tensor:
    return W * (1 - torch.eye(N))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "logdet": lambda W: torch.logdet(definite(W)),
    "det": lambda W: L.det(regular(W)),
    "slogdet": lambda W: L.slogdet(regular(W))[1],
    "inv": lambda W: L.inv(regular(W)),
    "inv_ex": lambda W: L.inv_ex(regular(W))[0],
    "pinv": lambda W: L.pinv(tall(W)),
    "pinv-hermitian": lambda W: L.pinv(symmetric(W), hermitian=True),
    "cholesky": lambda W: L.cholesky(definite(W)),
    "cholesky_ex": lambda W: L.cholesky_ex(definite(W), upper=True)[0],
    "cholesky_solve": lambda W: torch.cholesky_solve(drawn(N, N) + W, L.cholesky(definite(W))),
    "qr": lambda W: torch.cat([*L.qr(tall(W))]),
    "eigh": lambda W: torch.cat([L.eigh(symmetric(W))[0][None], L.eigh(symmetric(W))[1].square()]),
    "eigvalsh": lambda W: L.eigvalsh(symmetric(W)),
    "eig": lambda W: torch.cat([L.eig(regular(W))[0].abs()[None], L.eig(regular(W))[1].abs()]),
    "eigvals": lambda W: L.eigvals(regular(W)).abs(),
    "svd": lambda W: torch.cat(
        [part.square() for part in L.svd(tall(W), full_matrices=False)[::2]]
    ),
    "svdvals": lambda W: L.svdvals(regular(W)),
    "solve": lambda W: L.solve(regular(W), drawn(N, N) + W),
    "solve-right": lambda W: L.solve(regular(W), drawn(N, N), left=False),
    "solve-vector": lambda W: L.solve(regular(W), W[0]),
    "solve_ex": lambda W: L.solve_ex(regular(W), W)[0],
    "solve_triangular": lambda W: L.solve_triangular(regular(W), W, upper=True),
    "lstsq": lambda W: L.lstsq(tall(W), torch.cat([W, drawn(2, N)]))[0],
    "lu": lambda W: L.lu(regular(W))[2],
    "lu_factor": lambda W: L.lu_factor(regular(W))[0],
    "lu_solve": lambda W: L.lu_solve(*L.lu_factor(regular(W)), W),
    "matrix_exp": lambda W: L.matrix_exp(W / 3),
    "matrix_power": lambda W: L.matrix_power(regular(W), -2),
    "nuclear-norm": lambda W: L.matrix_norm(regular(W), "nuc"),
    "spectral-norm": lambda W: L.matrix_norm(regular(W), 2),
    "vector_norm": lambda W: L.vector_norm(W, 3),
    "cond": lambda W: L.cond(regular(W)),
    "multi_dot": lambda W: L.multi_dot([W, drawn(N, N), W]),
    "householder_product": lambda W: L.householder_product(*reflectors(W)),
    "tensorinv": lambda W: L.tensorinv(regular(W).reshape(2, 2, N), ind=2),
    "tensorsolve": lambda W: L.tensorsolve(regular(W).reshape(2, 2, N), drawn(2, 2)),
    "vander": lambda W: L.vander(W[0]),
    "cross": lambda W: L.cross(W[:, :3], W[:, 1:]),
    "prod": lambda W: W.prod(),
    "prod-zeros": lambda W: with_zeros(W).prod(0),
    "cumprod": lambda W: W.cumprod(0),
    "cumprod-zeros": lambda W: with_zeros(W).cumprod(1),
    "logcumsumexp": lambda W: W.logcumsumexp(0),
    "silu": nn.functional.silu,
    "mish": nn.functional.mish,
    "group_norm": lambda W: nn.functional.group_norm(W, 2),
}


def products(
    of: Callable[[Tensor], Tensor], W: Tensor
) -> tuple[Callable[[str], tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """``(H v, (∂_φ F)ᵀ v)`` by each mode, and by central differences of plain gradients."""
    weights = drawn(*of(W).shape)
    phi, v, epsilon = torch.tensor(0.3), drawn(*W.shape, seed=8), 1e-5

    def inner(W: Tensor, phi: Tensor) -> Tensor:
        value = of(W)
        return phi.exp() * (value * weights).sum() + phi * value.square().sum()

    def gradients(W: Tensor) -> tuple[Tensor, Tensor]:
        leaves = W.clone().requires_grad_(), phi.clone().requires_grad_()
        return torch.autograd.grad(inner(*leaves), leaves)

    def by(mode: str) -> tuple[Tensor, Tensor]:
        H = hessian(inner, W, phi, mode=mode)  # type: ignore[arg-type]
        return H.matvec(v), H.vjp_outer(v)

    pairs = zip(gradients(W + epsilon * v), gradients(W - epsilon * v), strict=True)
    inner_side, outer_side = ((ahead - behind) / (2 * epsilon) for ahead, behind in pairs)
    return by, (inner_side, outer_side)


def agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.norm()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_is_right_through(name: str) -> None:
    by, differences = products(FUNCTIONS[name], drawn(N, N, seed=3) / 2)
    forward = by("forward")
    agree(forward, by("reverse"), 1e-8)
    agree(forward, differences, 1e-5)


def orthogonal(map_: str) -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(N, N), orthogonal_map=map_)


@pytest.mark.parametrize(
    "make",
    [
        lambda: orthogonal("cayley"),
        lambda: orthogonal("matrix_exp"),
        lambda: parametrizations.spectral_norm(nn.Linear(N, N)).eval(),
    ],
    ids=["cayley", "matrix_exp", "spectral_norm"],
)
def test_forward_mode_is_right_through_parametrizations(make: Callable[[], nn.Module]) -> None:
    model = make()
    weight = next(name for name, _ in model.named_parameters() if "original" in name)

    def of(W: Tensor) -> Tensor:
        return functional_call(model, {weight: W}, (drawn(5, N),)).tanh()

    by, differences = products(of, drawn(N, N, seed=3))
    agree(by("forward"), by("reverse"), 1e-8)
    agree(by("forward"), differences, 1e-5)


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (lambda W: torch.cholesky_inverse(L.cholesky(definite(W))), "torch.cholesky_inverse"),
        (lambda W: torch.triangular_solve(W, regular(W))[0], "torch.triangular_solve"),
        (
            lambda W: W.scatter_reduce(0, torch.zeros(2, N, dtype=torch.long), W[:2], "prod"),
            "scatter_reduce with reduce='prod'",
        ),
        (lambda W: torch.cdist(W, W + 1.0), "_cdist_forward"),
        (lambda W: torch.ormqr(*reflectors(W), drawn(N, N)), "ormqr"),
        (lambda W: nn.functional.huber_loss(W, drawn(N, N), delta=0.1), "huber_loss_backward"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_forward_mode_lacks_is_named_with_another_mode(
    of: Callable[[Tensor], Tensor], name: str
) -> None:
    by, differences = products(of, drawn(N, N, seed=3) / 2)
    with pytest.raises(hg.ForwardModeError, match="use mode='reverse', or mode='finite-diff") as e:
        by("forward")
    assert e.value.operation == name
    agree(by("finite-difference"), differences, 1e-6)


def test_errors_of_the_objectives_own_stay_as_they_are() -> None:
    calls = []

    def inner(w: Tensor, p: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise NotImplementedError("my own")
        return (w - p).square().sum()

    H = hessian(inner, torch.ones(2), torch.ones(2), mode="forward")
    with pytest.raises(NotImplementedError, match="my own") as caught:
        H.matvec(torch.ones(2))
    assert not isinstance(caught.value, hg.ForwardModeError)


@pytest.mark.parametrize("memory", ["recompute", "forward"])
def test_unrolled_steps_through_linear_algebra_in_forward_mode(memory: str) -> None:
    S = definite(drawn(N, N)) / N

    def inner(W: Tensor, c: Tensor) -> Tensor:
        return -torch.logdet(symmetric(W)) + (W * S).sum() + c.exp() * L.solve(S, W).square().sum()

    def outer(W: Tensor, c: Tensor) -> Tensor:
        return W.square().sum()

    def slope(**options: object) -> Tensor:
        method = hg.Unrolled(hg.optimizers.SGD(lr=0.02), steps=6, **options)  # type: ignore[arg-type]
        return hg.hypergradient(inner, outer, torch.eye(N), torch.tensor(-2.0), method=method).grads

    torch.testing.assert_close(slope(memory=memory, mode="forward"), slope(memory="graph"))
