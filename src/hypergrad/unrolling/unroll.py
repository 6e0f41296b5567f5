"""Differentiation through the steps of an optimiser.

dg/dφ = ∂_φ g + (dθ_T/dφ)ᵀ ∂_θ g,   θ_{t+1}, s_{t+1} = update(∇_θ f_t(θ_t, φ), s_t, θ_t)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from hypergrad import _sharding as pl
from hypergrad import tree as tr
from hypergrad._checks import check_choice, check_count, check_objective, check_tree
from hypergrad._private import inside_a_transform
from hypergrad.autodiff.evaluation import Objective, evaluate
from hypergrad.autodiff.isolation import Buffers, RandomState, isolated_buffers
from hypergrad.autodiff.kept_graph import leaves_of
from hypergrad.autodiff.modules import modes_put_back, parameters_of
from hypergrad.errors import HypergradWarning, warn
from hypergrad.minibatches import Averaged, Sampled, bind, objective_on_modules, with_arguments
from hypergrad.operators import Mode
from hypergrad.optimizers import Optimizer, State, check_optimizer
from hypergrad.tree import Tree
from hypergrad.unrolling.forward import run_forward
from hypergrad.unrolling.steps import Point, Steps, detached, naming_the_step

Memory: TypeAlias = Literal["recompute", "graph", "checkpoint", "forward"]
"""What is kept of the steps until they are differentiated."""


def unroll(
    inner: Callable[..., Tensor],
    optimizer: Optimizer,
    params: Tree | nn.Module,
    hparams: Tree | nn.Module,
    steps: int | Iterable[Any],
    *,
    memory: Memory = "recompute",
    truncate: int | None = None,
    first_order: bool = False,
    state: State | None = None,
    return_state: bool = False,
    directions: int | None = None,
    generator: torch.Generator | None = None,
    mode: Mode = "auto",
) -> Any:
    """``θ_T``: the parameters after T steps of an optimiser, differentiable in what they came from.

        θ_{t+1}, s_{t+1} = update(∇_θ f(θ_t, φ), s_t, θ_t),   t = 0, …, T − 1

    Gradients flow to ``hparams``, to the initial ``params`` and ``state``, and to every tensor
    among the hyperparameters of the optimiser; they are zero, never ``None``, where nothing depends
    on an input. All memory modes give the same derivatives:

    ================  ============================  ================================  ==============
    ``memory=``       kept of T steps               time of a backward pass           derivatives
    ================  ============================  ================================  ==============
    ``"recompute"``   T iterates and states         T gradients and products          any order
    ``"graph"``       T graphs                      T products                        any order
    ``"checkpoint"``  2√T iterates and states       2T gradients, T products          any order
    ``"forward"``     a tangent for each input      none; each step costs a product   first order
                      scalar, or ``directions``     for each tangent
    ================  ============================  ================================  ==============

    Each step moves on the random state and the buffers of modules (batch-norm statistics) as a step
    of training does, once: backward passes see the same dropout masks and buffers again and leave
    both alone. The buffers are written to the modules when the last step is done. Gradients use
    batch statistics where a module is in training mode. The buffers themselves are constants here;
    ``hypergradient(..., method=Unrolled(...))`` differentiates those that g reads.

    What ``inner`` closes over is a constant to all modes but ``"graph"``; a
    :class:`HypergradWarning` says so if it requires gradients.

    Under ``torch.func.vmap`` (a batch of tasks) and the other transforms of ``torch.func``,
    ``memory="graph"`` is the one that works, and values are not checked.

    Args:
        inner: ``f(params, hparams)``, a scalar, or ``f(params, hparams, batch)`` where ``steps``
            are batches. With a number of steps also :class:`Averaged`, whose gradient is made batch
            by batch unless graphs are kept, or :class:`Sampled`, which takes its next batch each
            step.
        optimizer: one of :mod:`hypergrad.optimizers`.
        params: θ_0, a tree of floating-point tensors, or a module: f then gets the module with the
            parameters of the moment. A parameter that f leaves out has a zero gradient.
        hparams: φ, of the same kinds; ``()`` where there is none.
        steps: T, or one batch for each step, all of which are kept until the backward pass.
        memory: see above.
        truncate: differentiate the last K steps only, a biased but cheap gradient whose error falls
            geometrically with K where the inner problem is strongly convex (Shaban et al. 2019).
        first_order: take the inner gradients for constants (Finn et al. 2017, first-order MAML).
            With ``memory="graph"`` this costs no second derivative and no second gradient.
        state: s_0, such as that of the last call; ``None``: ``optimizer.init(params)``.
        return_state: return ``(params, state)``.
        directions: with ``memory="forward"``, this many directions of random signs in place of one
            for each input scalar: an unbiased estimate of the gradient, whose variance is
            ``(n − 1) / directions`` times the gradient's square norm for n input scalars.
        generator: for the directions; ``None`` is PyTorch's default.
        mode: how products with the Hessian of a step are computed where its graph is not kept, see
            :func:`hypergrad.operators.hessian`. Reverse over reverse is the default, since it was
            measured faster (forward over reverse: 1.4 times the time on an MLP, two CPU cores).

    Returns:
        θ_T, in the structure of ``params``; or the pair of it and the state.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its range.
        NonFiniteError: a value, a gradient or a parameter became infinite or NaN; it says in which
            step. Nothing of the caller's has changed then.
        DoubleBackwardError: ``memory="graph"``, and an operation of ``inner`` has no second
            derivative; the other modes go on with finite differences there.

    Examples:
        One step of gradient descent on ½(w − φ)² moves w by lr · (φ − w):

        >>> import torch, hypergrad as hg
        >>> f = lambda w, c: 0.5 * (w - c) ** 2
        >>> c = torch.tensor(3.0, requires_grad=True)
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> w = hg.unroll(f, hg.optimizers.SGD(lr=lr), torch.tensor(0.0), c, 2)
        >>> w.backward()
        >>> w.detach(), c.grad, lr.grad  # (1 − 0.9²) · 3, 1 − 0.9², 2 · 0.9 · 3
        (tensor(0.5700), tensor(0.1900), tensor(5.4000))
    """
    inner = objective_on_modules(inner, params, hparams)
    with modes_put_back(params, hparams):
        point = run(
            objectives_of(inner, steps), optimizer, parameters_of(params, "params"),
            parameters_of(hparams, "hparams"), Buffers(), memory=memory, truncate=truncate,
            first_order=first_order, state=state, directions=directions, generator=generator,
            mode=mode,
        )  # fmt: skip
    return point if return_state else point[0]


def run(
    objectives: Sequence[Objective],
    optimizer: Optimizer,
    params: Tree,
    hparams: Tree,
    buffers: Buffers,
    *,
    memory: Memory,
    truncate: int | None,
    first_order: bool,
    state: State | None,
    directions: int | None,
    generator: torch.Generator | None,
    mode: Mode,
) -> Point:
    """``θ_T`` and ``s_T`` as :func:`unroll` finds them; ``buffers`` end as those of modules."""
    check_optimizer(optimizer)
    check_tree(params, "params")
    check_tree(hparams, "hparams", empty=True)
    check_choice(memory, "memory", get_args(Memory))
    check_choice(mode, "mode", get_args(Mode))
    check_count(truncate, "truncate", optional=True)
    check_count(directions, "directions", optional=True)
    if directions is not None and memory != "forward":
        raise ValueError(f"directions must come with memory='forward', got memory={memory!r}")
    if inside_a_transform() and memory != "graph":
        raise ValueError(
            "memory must be 'graph' inside the transforms of torch.func, which hide what requires "
            f"gradients, got {memory!r}"
        )
    # Autograd can save no inference tensor; from here on they are copies.
    params, hparams = tr.map_leaves(_savable, params), tr.map_leaves(_savable, hparams)
    if state is None:
        state = optimizer.init(params)

    point: Point = (params, state)
    if not tr.leaves(hparams):
        objectives = [_ignoring_hparams(objective, hparams) for objective in objectives]
        hparams = torch.zeros(1)
    # One isolation for all steps: each costs as much as a few kernels.
    with isolated_buffers(), _random_state_put_back_on_failure(generator, params, hparams):
        skipped = 0 if truncate is None else max(0, len(objectives) - truncate)
        if skipped:
            head = Steps(optimizer, objectives[:skipped], first_order, mode)
            with torch.no_grad():
                point = head.run(detached(point), tr.detach(hparams), buffers, twice=False)
        tail = Steps(optimizer, objectives[skipped:], first_order, mode)
        if memory == "graph" or not torch.is_grad_enabled():
            point = tail.run(point, hparams, buffers, twice=torch.is_grad_enabled())
        elif memory == "forward":
            _warn_of_constants(tail, point, hparams, memory)
            point = run_forward(
                tail, point, hparams, buffers, directions=directions, generator=generator
            )
        else:
            _warn_of_constants(tail, point, hparams, memory)
            root = math.isqrt(len(tail.objectives) - 1) + 1
            segment = root if memory == "checkpoint" else 1
            point = tail.run_recomputed(point, hparams, buffers, segment=segment)
    point = _connected(point, tr.split((params, state.slots, hparams))[0])
    buffers.give_back()
    return point


@contextmanager
def _random_state_put_back_on_failure(
    generator: torch.Generator | None, *trees: Tree
) -> Iterator[None]:
    start = RandomState(*trees)
    own = None if generator is None else generator.get_state()
    try:
        yield
    except BaseException:
        start.put_back()
        if generator is not None and own is not None:
            generator.set_state(own)
        raise


def _savable(leaf: Tensor) -> Tensor:
    if not leaf.is_inference() or torch.is_inference_mode_enabled():
        return leaf
    return leaf.clone()


def objectives_of(inner: Any, steps: int | Iterable[Any]) -> Sequence[Objective]:
    """f_t for each step."""
    check_objective(inner, "inner", "(params, hparams) or (params, hparams, batch)")
    if isinstance(steps, Iterable) and not isinstance(steps, Tensor):
        if isinstance(inner, (Averaged, Sampled)):
            raise TypeError(
                f"steps must be a number where inner is {type(inner).__name__}, which brings its "
                f"batches, got {type(steps).__name__}"
            )
        found = [bind(inner, batch) for batch in steps]
        if not found:
            raise ValueError("steps must hold at least one batch, got none")
        return found
    check_count(steps, "steps")
    return [inner.part() if isinstance(inner, Sampled) else inner for _ in range(steps)]


def _ignoring_hparams(objective: Objective, hparams: Tree) -> Objective:
    """``objective`` at the empty tree that the caller gave, whatever is passed in its place."""
    return with_arguments(objective, lambda params, _: (params, hparams))


def _warn_of_constants(steps: Steps, point: Point, hparams: Tree, memory: Memory) -> None:
    """Warn if the first objective uses tensors whose gradients would be missing in silence."""
    objective = steps.objectives[0]
    if isinstance(objective, Averaged):
        _, objective = next(objective.parts())
    params = tr.detach(point[0])
    state = RandomState(params, hparams)
    with naming_the_step(point[1].step):
        value = evaluate(objective, params, tr.detach(hparams), state, "inner")
    if not value.requires_grad:
        return
    # A leaf that each call makes for itself is no constant of the caller's, such as the embeddings
    # that Hugging Face's gradient_checkpointing_enable() marks.
    again = evaluate(objective, params, tr.detach(hparams), state, "inner")
    if leaves_of(value) & leaves_of(again):
        warn(
            "inner uses tensors that require gradients and are neither in params nor in hparams: "
            f"with memory={memory!r} they count as constants; put them into hparams, or detach "
            "them, or use memory='graph'",
            HypergradWarning,
        )


def _connected(point: Point, inputs: Sequence[Tensor]) -> Point:
    """``point``, with a zero gradient to the inputs that it does not depend on."""
    moving = [t for t in inputs if t.requires_grad or inside_a_transform()]
    if not (moving and torch.is_grad_enabled()):
        return point
    # Sums over no element: zero whatever the values, with zero derivatives.
    first = pl.local(tr.leaves(point[0])[0])
    zero = torch.stack([pl.local(t).unsqueeze(0)[:0].sum().to(first) for t in moving]).sum()

    def connected(part: Tensor) -> Tensor:
        return part + zero.to(part)

    return tr.map_leaves(lambda leaf: pl.through(connected, leaf), point[0]), point[1]
