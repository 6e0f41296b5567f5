"""The solver classes of hypergrad 0.0.1, under their names: a loop whose steps a subclass writes.

New code that needs no loop calls :func:`hypergrad.hypergradient`.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import logging
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hypergrad._checks import check_count
from hypergrad.accumulate import add_to_grad
from hypergrad.minibatches import round_and_round
from hypergrad.utils import Params

__all__ = ["BaseImplicitSolver", "BaseSolver", "ForwardOutput", "Recorder"]


def _also(name: str) -> Any:
    """A property for the attribute ``name``."""
    return property(
        lambda self: getattr(self, name), lambda self, value: setattr(self, name, value)
    )


def _left_to_subclass(name: str) -> Any:
    """A method that the subclass must define before it is called."""

    def method(self: BaseSolver, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define {name}")

    return method


class BaseSolver:
    """A bilevel loop: inner updates, and an outer update every ``unroll_steps`` of them.

    A subclass writes ``inner_update`` (one step: set ``inner_params`` and ``inner_optim_state``),
    ``outer_update`` (one step: change ``outer``) and perhaps :meth:`post_outer_update`. The
    objectives are its own: ``inner_obj`` and ``outer_obj`` in 0.0.1, ``inner_forward`` and
    ``outer_forward`` in the main branch; a class that has one of the latter must have all four
    methods of that branch. Inside, it finds ``inner``, ``outer``, ``inner_func(params, *args)`` and
    ``inner_params`` (the inner module as a function of its parameters, and these, a tuple apart
    from the module's own; ``f_model`` and ``f_params`` in 0.0.1), ``inner_optim_state``,
    ``inner_loader`` and ``outer_loader`` (endless iterators of batches on the device),
    ``inner_optimizer``, ``outer_optimizer``, ``inner_step``, ``outer_step`` and ``global_step``
    (how many are done), ``recorder``, ``logger`` and ``device``.

    Args:
        inner: the inner module; it and ``outer`` are moved to ``device``.
        outer: the outer module.
        inner_loader: batches, to be iterated again and again; a batch is a sequence.
        outer_loader: batches of the outer problem.
        num_iters: how many inner updates :meth:`run` makes, at least ``unroll_steps``.
        unroll_steps: inner updates between outer ones.
        inner_optimizer: for the subclass, such as
            ``partial(hypergrad.optimizers.diff_sgd, lr=0.1, momentum=0, weight_decay=0)``.
        outer_optimizer: for the subclass, of ``outer.parameters()``.
        outer_patience_iters: inner updates before the first outer one.
        logger: where means are logged; ``None`` is one named after the class.
        log_freq: inner updates between log lines.
        inner_requires_grad: whether ``inner_params`` require gradients.
        outer_requires_grad: whether the parameters of ``outer`` do. ``None`` is ``False`` for a
            class that is written for the main branch, and leaves them as they are for another.
        skip_sync_inner: whether :meth:`sync_inner` leaves ``inner`` as it was.
        device: ``None`` is CUDA where there is one, or else the CPU. Also taken in the place of
            ``outer_requires_grad``, where 0.0.1 has it.
        functorch_requires_grad: ``inner_requires_grad``, as 0.0.1 calls it.

    Raises:
        TypeError, ValueError: a count is no integer or out of its range, a module is none, or the
            class lacks a method.
    """

    inner_func: Callable[..., Any]
    inner_params: Params
    inner_optim_state: Any
    f_model, f_params = _also("inner_func"), _also("inner_params")
    f_optim_state = _also("inner_optim_state")
    inner_loader, outer_loader = _also("_inner_batches"), _also("_outer_batches")
    inner_step, outer_step = _also("_inner_step"), _also("_outer_step")
    global_step = _also("_global_step")
    inner_forward, outer_forward = map(_left_to_subclass, ("inner_forward", "outer_forward"))
    inner_obj, outer_obj = map(_left_to_subclass, ("inner_obj", "outer_obj"))
    inner_update, outer_update = map(_left_to_subclass, ("inner_update", "outer_update"))

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
        inner_requires_grad: bool = False,
        outer_requires_grad: bool | torch.device | str | None = None,
        skip_sync_inner: bool = False,
        device: torch.device | str | None = None,
        *,
        functorch_requires_grad: bool = False,
    ) -> None:
        for name, module in (("inner", inner), ("outer", outer)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        check_count(num_iters, "num_iters")
        check_count(unroll_steps, "unroll_steps")
        check_count(log_freq, "log_freq")
        if num_iters < unroll_steps:
            raise ValueError(f"num_iters must be >= unroll_steps, got {num_iters} < {unroll_steps}")
        if outer_patience_iters < 0:
            raise ValueError(f"outer_patience_iters must be at least 0, got {outer_patience_iters}")
        if not isinstance(outer_requires_grad, (bool, type(None))):
            device, outer_requires_grad = outer_requires_grad, None
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(default if device is None else device)
        self.inner = inner.to(self.device)
        self.outer = outer.to(self.device)
        if self._is_of_main() or outer_requires_grad is not None:
            self.outer.requires_grad_(outer_requires_grad is True)
        self.inner_optimizer = inner_optimizer
        self.outer_optimizer = outer_optimizer
        self.logger = logger or logging.getLogger(type(self).__name__.lower())
        self.recorder = Recorder()
        self.inner_optim_state = None
        self._num_iters = num_iters
        self._unroll_steps = unroll_steps
        self._patience_iters = outer_patience_iters
        self._log_freq = log_freq
        self._inner_requires_grad = inner_requires_grad or functorch_requires_grad
        self._functorch_requires_grad = self._inner_requires_grad  # an example of 0.0.1 reads it
        self._skip_sync_inner = skip_sync_inner
        # Kept: a new iterator at each access would always give the first batch.
        self._inner_batches = self._endless(inner_loader, "inner_loader")
        self._outer_batches = self._endless(outer_loader, "outer_loader")
        self._global_step = self._inner_step = self._outer_step = 0
        self.reset_inner_model()

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

    def post_outer_update(self) -> None:
        """Called after each outer update, for example to project; does nothing by default."""

    def sync_inner(self) -> None:
        """Copy ``inner_params`` into the inner module, unless ``skip_sync_inner``."""
        if self._skip_sync_inner:
            return
        with torch.no_grad():
            for own, current in zip(self.inner.parameters(), self.inner_params, strict=True):
                own.copy_(current)

    def reset_inner_model(self) -> None:
        """Start again from the inner module's parameters."""
        module = copy.deepcopy(self.inner)
        names = [name for name, _ in module.named_parameters()]
        self.inner_params = tuple(
            parameter.detach().clone().requires_grad_(self._inner_requires_grad)
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

    def _is_of_main(self) -> bool:
        """Whether the class is written for the main branch, where four methods are abstract."""
        names = ("inner_forward", "outer_forward", "inner_update", "outer_update")
        missing = [n for n in names if getattr(type(self), n) is getattr(BaseSolver, n)]
        is_of_main = not set(names[:2]) <= set(missing)
        if is_of_main and missing:
            raise TypeError(f"{type(self).__name__} must define {' and '.join(missing)} as well")
        return is_of_main


class BaseImplicitSolver(BaseSolver):
    """:class:`BaseSolver` with a way to compute implicit hypergradients.

    The parameters of ``outer`` do not require gradients: :attr:`outer_grad` sets theirs.

    Args:
        approx_ihvp: one of :mod:`hypergrad.approx_hypergrad` with its options, such as
            ``functools.partial(nystrom, rank=5, rho=0.1)``; for the others, see
            :class:`BaseSolver`. ``device`` is also taken in the place of ``skip_sync_inner``.
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
        inner_requires_grad: bool = False,
        skip_sync_inner: bool | torch.device | str | None = False,
        device: torch.device | str | None = None,
        *,
        functorch_requires_grad: bool = False,
    ) -> None:
        if not isinstance(skip_sync_inner, bool):
            device, skip_sync_inner = skip_sync_inner, False
        super().__init__(
            inner, outer, inner_loader, outer_loader, num_iters, unroll_steps, inner_optimizer,
            outer_optimizer, outer_patience_iters, logger, log_freq, inner_requires_grad, False,
            skip_sync_inner, device, functorch_requires_grad=functorch_requires_grad,
        )  # fmt: skip
        if not callable(approx_ihvp):
            raise TypeError(
                f"approx_ihvp must be a function (f, g, inner_params, outer_params), got "
                f"{type(approx_ihvp).__name__}"
            )
        self.approx_ihvp = approx_ihvp

    @property
    def outer_grad(self) -> tuple[Tensor | None, ...]:
        """The ``.grad`` of the outer module's parameters; assigning one for each adds to them."""
        return tuple(parameter.grad for parameter in self.outer.parameters())

    @outer_grad.setter
    def outer_grad(self, grads: Iterable[Tensor | None]) -> None:
        parameters, given = list(self.outer.parameters()), list(grads)
        shapes = [None if grad is None else tuple(grad.shape) for grad in given]
        expected = [tuple(parameter.shape) for parameter in parameters]
        if len(shapes) != len(expected) or any(
            shape not in (None, other) for shape, other in zip(shapes, expected, strict=True)
        ):
            raise ValueError(
                "outer_grad must hold one gradient for each parameter of outer, got shapes "
                f"{shapes}, expected {expected}"
            )
        for parameter, grad in zip(parameters, given, strict=True):
            if grad is not None:
                add_to_grad(parameter, grad)

    def set_out_grad(self, grads: Params) -> None:
        """``outer_grad = grads``, the wheel's name for it."""
        self.outer_grad = grads


def _on(device: torch.device, batch: Any) -> Any:
    if isinstance(batch, (list, tuple)):
        return [_on(device, part) if isinstance(part, Tensor) else part for part in batch]
    return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch


@dataclasses.dataclass
class ForwardOutput:
    """A return value of ``inner_forward`` and ``outer_forward``: a loss, and other output."""

    loss: Tensor
    output: Any = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.loss, self.output))


class Recorder:
    """Values by name: means since the last :meth:`flush`, and all values in :attr:`archive`."""

    def __init__(self) -> None:
        self._since_flush: dict[str, list[float]] = collections.defaultdict(list)
        self._archive: dict[str, list[float]] = collections.defaultdict(list)

    def add(self, name: str, value: float | Tensor) -> None:
        """Record one value, a number or a tensor of one element."""
        number = value.item() if isinstance(value, Tensor) else float(value)
        self._since_flush[name].append(number)
        self._archive[name].append(number)

    def flush(self) -> dict[str, float]:
        """The mean of each name since the last flush."""
        means = {name: statistics.fmean(values) for name, values in self._since_flush.items()}
        self._since_flush.clear()
        return means

    @property
    def archive(self) -> dict[str, list[float]]:
        """Every value of each name, as a copy."""
        return copy.deepcopy(self._archive)
