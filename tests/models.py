"""Models as they come, each with a twin that plain autograd differentiates twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


class OnceDifferentiable(torch.autograd.Function):
    """A cube whose backward pass PyTorch cannot differentiate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


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
    rebinds_buffers: bool = False  # which a captured graph cannot undo
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
    "spectral-norm": Case(spectral, forward_mode=False, rebinds_buffers=True, stops_gradients=True),
}


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
