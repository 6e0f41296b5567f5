"""Running statistics of normalisation layers as differentiable functions.

PyTorch's kernels change ``running_mean`` and ``running_var`` without a graph, and do not
differentiate with respect to them. Here both are plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class DifferentiableStatistics(TorchFunctionMode):
    """Inside, batch and instance norm are differentiable in and through their statistics."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        replacement = _REPLACEMENTS.get(func, func)
        return replacement(*args, **(kwargs or {}))


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm``, differentiable in the statistics too."""
    if running_mean is None or running_var is None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        return _normalised(x, running_mean, running_var, weight, bias, eps)
    wide = x.to(running_mean.dtype)
    dims = [0, *range(2, x.ndim)]
    _move(running_mean, wide.mean(dims), momentum)
    _move(running_var, wide.var(dims), momentum)
    return F.batch_norm(x, None, None, weight, bias, True, momentum, eps)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.instance_norm``, differentiable in the statistics too."""
    if running_mean is not None and running_var is not None:
        if not use_input_stats:
            return _normalised(x, running_mean, running_var, weight, bias, eps)
        wide = x.to(running_mean.dtype)
        dims = list(range(2, x.ndim))
        _move(running_mean, wide.mean(dims).mean(0), momentum)
        _move(running_var, wide.var(dims).mean(0), momentum)
    return F.instance_norm(x, None, None, weight, bias, True, momentum, eps)


def _move(statistic: Tensor, value: Tensor, momentum: float) -> None:
    statistic.mul_(1 - momentum).add_(value, alpha=momentum)


def _normalised(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = [1, -1, *[1] * (x.ndim - 2)]
    return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)


def _builtin_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


_REPLACEMENTS: dict[Any, Any] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    torch.batch_norm: _builtin_batch_norm,
}
