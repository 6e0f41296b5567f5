"""An objective of a module that only runs with its own parameters: models of ``fully_shard``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hypergrad import _sharding as pl
from hypergrad import tree as tr
from hypergrad._checks import check_objective, check_structure
from hypergrad.autodiff.evaluation import fresh_leaves
from hypergrad.autodiff.isolation import own_parameters_meant
from hypergrad.distributed.ranks import ranks_of
from hypergrad.tree import Tree


class WholeModule:
    """``f(params, hparams)`` of a module that ``torch.func.functional_call`` cannot run.

    A module wrapped by ``torch.distributed.fsdp.fully_shard`` gathers and frees its own parameters
    layer by layer. Its hooks know no other parameters and allow no second derivative. So the module
    gets the values of ``params`` for one forward and one backward pass, and its own back
    afterwards: first derivatives only. Hessian products are finite differences of them, with
    ``mode="auto"`` (and a warning) or ``mode="finite-difference"``; ``mode="reverse"`` raises.

    An objective that calls ``functional_call`` on such a module raises ``ValueError``: the hooks
    replace the parameters that are passed by the module's own, which would lose the gradient. In
    other objectives such a module may run with frozen parameters of its own, for example to compute
    features.

    Args:
        module: its parameters that require gradients are θ, by their names:
            ``{name: p for name, p in module.named_parameters() if p.requires_grad}``.
        loss: ``loss(module, hparams, ...)``, a scalar on this rank's batch, from calls of the
            module. With ``fully_shard`` the mean over the ranks is differentiated, as it is in
            training. For φ and the value, the ranks are averaged here.
        group: the process group; ``None`` is the default group.

    Raises:
        TypeError, ValueError: ``module`` is no module, ``loss`` cannot be called, or there is no
            process group; in a call, ``params`` are not those of the module.
    """

    def __init__(
        self, module: nn.Module, loss: Callable[..., Tensor], *, group: Any = None
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        check_objective(loss, "loss", "(module, hparams, ...)")
        self._module = module
        self._loss = loss
        self.ranks = ranks_of(group)

    @property
    def params(self) -> dict[str, Tensor]:
        """θ: the parameters of the module that require gradients."""
        return {k: p for k, p in self._module.named_parameters() if p.requires_grad}

    def __call__(self, params: Tree, hparams: Tree, *arguments: Any) -> Tensor:
        """The mean over the ranks, once differentiable."""
        check_structure(params, self.params, "params", "the parameters of the module")
        leaves = [*tr.leaves(params), *tr.leaves(hparams)]
        return _Once.apply(self, params, hparams, arguments, *leaves)

    def derive(
        self, params: Tree, hparams: Tree, arguments: tuple[Any, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the value, and the gradients in the leaves of both trees."""
        own = self.params
        before = {key: (p.detach().clone(), p.grad) for key, p in own.items()}
        phi = fresh_leaves(hparams)
        try:
            with torch.enable_grad(), own_parameters_meant():
                self._write(params)
                for p in own.values():
                    p.grad = None
                value = self._loss(self._module, phi, *arguments)
                value.backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in tr.leaves(own)]
        finally:
            self._write({key: value for key, (value, _) in before.items()})
            for key, p in own.items():
                p.grad = before[key][1]
        return self._averaged(value.detach()), grads + [
            self._averaged(torch.zeros_like(p) if p.grad is None else p.grad)
            for p in tr.leaves(phi)
        ]

    def _write(self, values: Tree) -> None:
        with torch.no_grad():
            for key, p in self.params.items():
                pl.local(p).copy_(pl.local(values[key]))

    def _averaged(self, tensor: Tensor) -> Tensor:
        return self.ranks.summed(tensor.clone()) / self.ranks.size


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        whole: WholeModule,
        params: Tree,
        hparams: Tree,
        arguments: tuple[Any, ...],
        *leaves: Tensor,
    ) -> Tensor:
        value, grads = whole.derive(tr.detach(params), tr.detach(hparams), arguments)
        ctx.save_for_backward(*grads)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        return None, None, None, None, *tr.leaves(tr.scale(ctx.saved_tensors, float(cotangent)))
