"""The solver classes of hypergrad 0.0.1, under their names: a loop whose steps a subclass writes.

New code that needs no loop calls :func:`hypergrad.hypergradient`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hypergrad.accumulate import add_to_grad
from hypergrad.checks import check_count
from hypergrad.minibatch import round_and_round
from hypergrad.recorder import ForwardOutput, Recorder
from hypergrad.utils import Params

__all__ = ["BaseImplicitSolver", "BaseSolver", "ForwardOutput", "Recorder"]


class BaseSolver:
    """A bilevel loop: inner updates, and an outer update every ``unroll_steps`` of them.

    A subclass writes :meth:`inner_update` and :meth:`outer_update`, and perhaps
    :meth:`post_outer_update`. Inside, it finds ``inner``, ``outer``, ``inner_func(params, *args)``
    and ``inner_params`` (the inner module as a function of its parameters, and these, a tuple
    apart from the module's own), ``inner_optim_state``, ``inner_loader`` and ``outer_loader``
    (endless iterators of batches on the device), ``inner_optimizer``, ``outer_optimizer``,
    ``recorder``, ``logger`` and ``device``.

    Args:
        inner: the inner module; it is moved to ``device``.
        outer: the outer module, likewise.
        inner_loader: batches, to be iterated again and again; a batch is a sequence.
        outer_loader: likewise.
        num_iters: how many inner updates :meth:`run` makes.
        unroll_steps: inner updates between outer ones.
        inner_optimizer: for the subclass, such as
            ``partial(hypergrad.optimizers.diff_sgd, lr=0.1, momentum=0, weight_decay=0)``.
        outer_optimizer: for the subclass, of ``outer.parameters()``.
        outer_patience_iters: inner updates before the first outer one.
        logger: where means are logged; ``None`` is one named after the class.
        log_freq: inner updates between log lines.
        functorch_requires_grad: whether ``inner_params`` require gradients.
        device: ``None`` is CUDA where there is one, or else the CPU.

    Raises:
        TypeError, ValueError: a count is no integer or out of its range, or a module is none.
    """

    inner_func: Callable[..., Any]
    inner_params: Params
    inner_optim_state: Any

    def __init__(
        self,
        inner: nn.Module,
        outer: nn.Module,
        inner_loader: Iterable[Any],
        outer_loader: Iterable[Any],
        num_iters: int,
        unroll_steps: int,
        inner_optimizer: Any,
        outer_optimizer: torch.optim.Optimizer,
        outer_patience_iters: int = 0,
        logger: logging.Logger | None = None,
        log_freq: int = 100,
        functorch_requires_grad: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        for name, module in (("inner", inner), ("outer", outer)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        check_count(num_iters, "num_iters")
        check_count(unroll_steps, "unroll_steps")
        check_count(log_freq, "log_freq")
        if outer_patience_iters != 0:
            check_count(outer_patience_iters, "outer_patience_iters")
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(default if device is None else device)
        self.inner = inner.to(self.device)
        self.outer = outer.to(self.device)
        self.inner_optimizer = inner_optimizer
        self.outer_optimizer = outer_optimizer
        self.logger = logger or logging.getLogger(type(self).__name__.lower())
        self.recorder = Recorder()
        self.inner_optim_state = None
        self._num_iters = num_iters
        self._unroll_steps = unroll_steps
        self._patience_iters = outer_patience_iters
        self._log_freq = log_freq
        self._functorch_requires_grad = functorch_requires_grad
        # Held: a new iterator at each access would give the first batch for ever.
        self._inner_batches = self._endless(inner_loader, "inner_loader")
        self._outer_batches = self._endless(outer_loader, "outer_loader")
        self._global_step = self._inner_step = self._outer_step = 0
        self.reset_inner_model()

    @property
    def inner_loader(self) -> Iterator[Any]:
        """The batches of the inner problem, round and round."""
        return self._inner_batches

    @property
    def outer_loader(self) -> Iterator[Any]:
        """The batches of the outer problem, round and round."""
        return self._outer_batches

    @property
    def global_step(self) -> int:
        """How many turns of the loop are done."""
        return self._global_step

    @property
    def inner_step(self) -> int:
        """How many inner updates are done."""
        return self._inner_step

    @property
    def outer_step(self) -> int:
        """How many outer updates are done."""
        return self._outer_step

    def run(self) -> None:
        """Make ``num_iters`` inner updates, and the outer ones between them."""
        for i in range(self._num_iters):
            self.inner_update()
            self._inner_step += 1
            if i > 0 and i >= self._patience_iters and i % self._unroll_steps == 0:
                self.outer_update()
                self.post_outer_update()
                self.sync_inner()
                self._outer_step += 1
            if i > 0 and i % self._log_freq == 0:
                self.stdout_results(self.recorder.flush())
            self._global_step += 1

    def inner_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inner objective, for the subclass's own use."""
        raise NotImplementedError(f"{type(self).__name__} must define inner_forward to call it")

    def outer_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outer objective, for the subclass's own use."""
        raise NotImplementedError(f"{type(self).__name__} must define outer_forward to call it")

    def inner_update(self) -> None:
        """One step of the inner problem: set ``inner_params`` and ``inner_optim_state``."""
        raise NotImplementedError(f"{type(self).__name__} must define inner_update")

    def outer_update(self) -> None:
        """One step of the outer problem: change ``outer``."""
        raise NotImplementedError(f"{type(self).__name__} must define outer_update")

    def post_outer_update(self) -> None:
        """What follows each outer update, such as a projection; nothing unless overridden."""

    def sync_inner(self) -> None:
        """Copy ``inner_params`` into the inner module."""
        with torch.no_grad():
            for own, current in zip(self.inner.parameters(), self.inner_params, strict=True):
                own.copy_(current)

    def reset_inner_model(self) -> None:
        """Start again from the inner module's parameters."""
        module = copy.deepcopy(self.inner)
        names = [name for name, _ in module.named_parameters()]
        self.inner_params = tuple(
            parameter.detach().clone().requires_grad_(self._functorch_requires_grad)
            for parameter in module.parameters()
        )

        def inner_func(params: Params, *args: Any, **kwargs: Any) -> Any:
            return functional_call(module, dict(zip(names, params, strict=True)), args, kwargs)

        self.inner_func = inner_func

    def stdout_results(self, results: dict[str, float]) -> None:
        """Log means on one line."""
        values = " / ".join(f"{name}={value:.4f}" for name, value in results.items())
        self.logger.info(
            "[inner step %d] (outer step %d) %s", self.inner_step - 1, self.outer_step, values
        )

    def _endless(self, loader: Iterable[Any], name: str) -> Iterator[Any]:
        return (_on(self.device, batch) for batch in round_and_round(loader, name))

    # The names of the wheel, where the documentation has those above.
    @property
    def f_model(self) -> Callable[..., Any]:
        """``inner_func``."""
        return self.inner_func

    @f_model.setter
    def f_model(self, function: Callable[..., Any]) -> None:
        self.inner_func = function

    @property
    def f_params(self) -> Params:
        """``inner_params``."""
        return self.inner_params

    @f_params.setter
    def f_params(self, params: Params) -> None:
        self.inner_params = params

    @property
    def f_optim_state(self) -> Any:
        """``inner_optim_state``."""
        return self.inner_optim_state

    @f_optim_state.setter
    def f_optim_state(self, state: Any) -> None:
        self.inner_optim_state = state


class BaseImplicitSolver(BaseSolver):
    """:class:`BaseSolver` with a way to compute implicit hypergradients.

    The parameters of ``outer`` do not require gradients: :attr:`outer_grad` sets theirs.

    Args:
        inner: see :class:`BaseSolver`, as for the others.
        outer: the outer module.
        inner_loader: batches.
        outer_loader: batches.
        approx_ihvp: one of :mod:`hypergrad.approx_hypergrad` with its options, such as
            ``functools.partial(nystrom, rank=5, rho=0.1)``.
        num_iters: inner updates.
        unroll_steps: inner updates between outer ones.
        inner_optimizer: for the subclass.
        outer_optimizer: for the subclass.
        outer_patience_iters: inner updates before the first outer one.
        logger: where means are logged.
        log_freq: inner updates between log lines.
        functorch_requires_grad: whether ``inner_params`` require gradients.
        device: where to compute.
    """

    def __init__(
        self,
        inner: nn.Module,
        outer: nn.Module,
        inner_loader: Iterable[Any],
        outer_loader: Iterable[Any],
        approx_ihvp: Callable[..., Params],
        num_iters: int,
        unroll_steps: int,
        inner_optimizer: Any,
        outer_optimizer: torch.optim.Optimizer,
        outer_patience_iters: int = 0,
        logger: logging.Logger | None = None,
        log_freq: int = 100,
        functorch_requires_grad: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            inner, outer, inner_loader, outer_loader, num_iters, unroll_steps, inner_optimizer,
            outer_optimizer, outer_patience_iters, logger, log_freq, functorch_requires_grad,
            device,
        )  # fmt: skip
        if not callable(approx_ihvp):
            raise TypeError(
                f"approx_ihvp must be a function (f, g, inner_params, outer_params), got "
                f"{type(approx_ihvp).__name__}"
            )
        self.outer.requires_grad_(False)
        self.approx_ihvp = approx_ihvp

    @property
    def outer_grad(self) -> tuple[Tensor | None, ...]:
        """The ``.grad`` of the outer module's parameters; assigning adds to them.

        Raises:
            ValueError: not one gradient of the right shape for each parameter.
        """
        return tuple(parameter.grad for parameter in self.outer.parameters())

    @outer_grad.setter
    def outer_grad(self, grads: Params) -> None:
        parameters = list(self.outer.parameters())
        given = [tuple(grad.shape) for grad in grads]
        expected = [tuple(parameter.shape) for parameter in parameters]
        if given != expected:
            raise ValueError(
                "outer_grad must hold one gradient for each parameter of outer, got shapes "
                f"{given}, expected {expected}"
            )
        for parameter, grad in zip(parameters, grads, strict=True):
            add_to_grad(parameter, grad)

    def set_out_grad(self, grads: Params) -> None:
        """``outer_grad = grads``, the wheel's name for it."""
        self.outer_grad = grads


def _on(device: torch.device, batch: Any) -> Any:
    if isinstance(batch, (list, tuple)):
        return [_on(device, part) if isinstance(part, Tensor) else part for part in batch]
    return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch
