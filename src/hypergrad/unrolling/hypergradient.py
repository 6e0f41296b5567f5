"""Unrolled hypergradients by the call that makes implicit ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.autodiff.evaluation import Objective, filled, fresh_leaves, gradient
from hypergrad.autodiff.isolation import Buffers
from hypergrad.linsolve.base import OnFailure
from hypergrad.minibatches import check_batches
from hypergrad.operators import Mode
from hypergrad.optimizers import Optimizer, State, check_optimizer
from hypergrad.results import Hypergradient, Trajectory
from hypergrad.tree import Tree
from hypergrad.unrolling.steps import detached
from hypergrad.unrolling.unroll import Memory, objectives_of, run
from hypergrad.verification.moving_buffers import constants, outer_gradients, warn_of_constants
from hypergrad.verification.verification import (
    Course,
    Verify,
    verify_on_course,
)


@dataclass(frozen=True)
class Unrolled:
    """``dg/dφ`` through the steps of an optimiser: a ``method=`` of :func:`hypergradient`.

        dg/dφ = ∂_φ g + (dθ_T/dφ)ᵀ ∂_θ g

    Buffers that the steps change and g reads, such as the running statistics of batch norm in eval
    mode, are part of what is differentiated. A :class:`HypergradWarning` names those that a module
    changes where autograd records nothing.

    Args:
        optimizer: one of :mod:`hypergrad.optimizers`; or a function of ``hparams`` that returns
            one, where its hyperparameters are among them. A :class:`BilevelSolver` brings it.
        steps: T, or one batch for each step, see :func:`unroll` for this and what follows. A
            :class:`BilevelSolver` brings them.
        memory: what is kept of the steps.
        truncate: differentiate the last K steps only.
        first_order: take the inner gradients for constants.
        state: of the optimiser at the start.
        directions: random ones, with ``memory="forward"``.
        generator: for them.
        mode: how Hessian products are computed.

    Raises:
        TypeError: ``steps`` can be iterated only once.

    Examples:
        >>> import torch, hypergrad as hg
        >>> f = lambda w, c: 0.5 * (w - 3.0) ** 2 + 0.5 * c * w**2
        >>> g = lambda w, c: 0.5 * w**2
        >>> method = hg.Unrolled(hg.optimizers.SGD(lr=0.1), steps=200)
        >>> result = hg.hypergradient(f, g, torch.tensor(0.0), torch.tensor(1.0), method=method)
        >>> result.grads, result.params  # as by the implicit function theorem: −9/8 at 3/2
        (tensor(-1.1250), tensor(1.5000))
    """

    optimizer: Optimizer | Callable[[Tree], Optimizer] | None = None
    steps: int | Iterable[Any] | None = None
    memory: Memory = "recompute"
    truncate: int | None = None
    first_order: bool = False
    state: State | None = None
    directions: int | None = None
    generator: torch.Generator | None = None
    mode: Mode = "auto"

    def __post_init__(self) -> None:
        # A generator would be empty at the second call.
        if self.steps is not None and not isinstance(self.steps, int):
            check_batches(self.steps, "steps")


def unrolled_hypergradient(
    method: Unrolled,
    inner: Callable[..., Tensor],
    outer: Objective,
    params: Tree,
    hparams: Tree,
    *,
    verify: Verify,
    on_failure: OnFailure = "warn",
    buffers: Buffers | None = None,
) -> Hypergradient:
    """``dg/dφ`` by :func:`unroll`; of the caller's only buffers and the random state change.

    The derivatives are verified where the steps begin, on the objective of the first one.
    ``buffers`` are those of the modules that run, for a caller who has a use for them.
    """
    steps, optimizer = method.steps, method.optimizer
    if steps is None or optimizer is None:
        raise ValueError(
            "method must have its optimizer and its steps outside a BilevelSolver, got "
            f"optimizer={optimizer!r}, steps={steps!r}"
        )
    objectives = objectives_of(inner, steps)
    course = Course(verify, method.mode, objectives[0], outer, params, hparams)
    verification = None
    if course.verifies and not method.first_order:
        verification = verify_on_course(course, objectives[0], outer, params, hparams, on_failure)
    memory = method.memory
    if memory == "graph" and course.mode == "finite-difference" != method.mode:
        # A graph would carry the wrong second derivatives.
        memory = "recompute"
    buffers = buffers or Buffers(differentiable=True)
    with torch.inference_mode(False), torch.enable_grad():
        phi = fresh_leaves(hparams)
        if not isinstance(optimizer, Optimizer):
            if isinstance(optimizer, type) or not callable(optimizer):
                check_optimizer(optimizer)
            optimizer = optimizer(phi)
        check_optimizer(optimizer)
        # From what the caller gave: an optimiser of torch.optim knows its own tensors only.
        state = optimizer.init(params) if method.state is None else method.state
        theta, state = run(
            objectives,
            optimizer,
            # A tensor of inference mode cannot be kept for a backward pass.
            tr.map_leaves(
                lambda leaf: leaf.clone() if leaf.is_inference() else leaf.detach(), params
            ),
            phi,
            buffers,
            memory=memory,
            truncate=method.truncate,
            first_order=method.first_order,
            state=state,
            directions=method.directions,
            generator=method.generator,
            mode=course.mode,
        )
        end = fresh_leaves(theta)
        value, cotangent, direct, read = outer_gradients(outer, end, phi, buffers)
        fixed = constants(objectives[0], params, hparams, read) if read else []
        warn_of_constants(buffers, fixed)
        leading = [t for t in read if all(t is not constant for constant in fixed)]
        ends = theta, [buffers.value(original) for original in leading]
        cotangents = cotangent, [read[original] for original in leading]
        # From one scalar: from many roots at once the engine holds more of the graph (measured on
        # an MLP with memory="graph": 34 MiB more, of 80).
        through = gradient(tr.pairing(ends, cotangents), phi)
    grads = tr.add(direct, filled(through, phi))
    differentiated = min(len(objectives), method.truncate or len(objectives))
    return Hypergradient(
        grads,
        value,
        Trajectory(*detached((theta, state))),
        verification=verification,
        matvecs=0 if method.first_order else differentiated,
    )
