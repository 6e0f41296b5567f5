"""Unrolled steps differentiated in forward mode: tangents are carried along, nothing is kept.

With ``θ̇, ṡ, φ̇, η̇`` the derivatives of iterate, state, outer parameters and the optimiser's
hyperparameters along a direction, a step maps them by

    ġ = ∂_θ ⟨∇_(θ,φ) f, (θ̇, φ̇)⟩,   (θ̇', ṡ') = D update · (ġ, θ̇, ṡ, η̇)

the first a product with the joint Hessian of f over a kept graph, since second derivatives commute.
Franceschi et al. 2017 (Forward-HG); Baydin et al. 2022 (random directions).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad.autodiff.evaluation import Objective, evaluate, fresh_leaves
from hypergrad.autodiff.isolation import Buffers, RandomState
from hypergrad.autodiff.kept_graph import pull_back_block
from hypergrad.autodiff.partial import Tensors
from hypergrad.minibatches import with_arguments
from hypergrad.operators.auto import linearised
from hypergrad.operators.gradients import value_and_gradients
from hypergrad.optimizers import Optimizer, State
from hypergrad.tree import Tree
from hypergrad.unrolling.steps import Point, Steps, check_finite, detached, naming_the_step
from hypergrad.verification.moving_buffers import starting_from


def run_forward(
    steps: Steps,
    point: Point,
    hparams: Tree,
    buffers: Buffers,
    *,
    directions: int | None,
    generator: torch.Generator | None,
) -> Point:
    """All steps, differentiable once in every tensor that requires gradients.

    Args:
        steps: the steps.
        point: θ_0 and s_0.
        hparams: φ.
        buffers: of the modules that run.
        directions: how many random directions; ``None`` is one tangent for each input scalar.
        generator: for the directions.
    """
    params, state = point
    tangents = _Tangents(directions, generator)
    start, _ = tr.split((params, state.slots))
    tangents.add([*start, *tr.leaves(hparams)])
    params, fixed = detached(point)
    slots = fixed.slots
    blocks = [tangents.of(tensor) for tensor in start]
    moving = _MovingBuffers(buffers, tangents)
    for i, objective in enumerate(steps.objectives):
        number = state.step + i
        settings = steps.settings_at(i, (params, State(number, slots)))
        hyper, with_values = tr.split(settings)
        tangents.add(hyper)
        blocks = [tangents.widened(block) for block in blocks]
        with naming_the_step(number), torch.no_grad():
            theta = tr.unflatten_like(params, blocks[: len(tr.leaves(params))])
            phi = tr.map_leaves(tangents.of, hparams)
            grads, grad_blocks = _gradient(steps, objective, params, hparams, theta, phi, moving)
            along = [*tr.leaves(grad_blocks), *blocks, *map(tangents.of, hyper)]
            inputs = grads, params, slots, with_values([tensor.detach() for tensor in hyper])
            (params, slots), blocks = _push(_update(steps.optimizer, number), inputs, along)
            check_finite(params)
    originals, values, beta = moving.state()
    ends, rebuild = tr.split((params, slots, values))
    if tangents.inputs:
        blocks = [*blocks, *beta]
        ends = list(_Pushed.apply(tangents, blocks, len(ends), *ends, *tangents.inputs))
    params, slots, values = rebuild(ends)
    buffers.put(originals, values)
    return params, State(state.step + len(steps.objectives), slots)


class _Tangents:
    """The inputs that are differentiated in, and the directions in the space of all of them.

    One for each scalar, so that an input added later makes the blocks wider; or k random ones.
    """

    def __init__(self, directions: int | None, generator: torch.Generator | None) -> None:
        self.inputs: list[Tensor] = []
        self._blocks: dict[int, Tensor] = {}
        self._directions = directions
        self._generator = generator
        self._width = directions or 0

    def add(self, tensors: Tensors) -> None:
        """Make those that require gradients inputs, unless they are."""
        for tensor in tensors:
            if not tensor.requires_grad or id(tensor) in self._blocks:
                continue
            self.inputs.append(tensor)  # which keeps it alive, and its id its own
            if self._directions is None:
                size = tensor.numel()
                rows = torch.eye(size, dtype=tensor.dtype, device=tensor.device)
                before = rows.new_zeros((self._width, size))
                self._blocks[id(tensor)] = torch.cat([before, rows]).reshape(-1, *tensor.shape)
                self._width += size
            else:
                like = tensor.detach().expand(self._directions, *tensor.shape)
                self._blocks[id(tensor)] = tr.random_signs_like(like, self._generator)

    def of(self, tensor: Tensor) -> Tensor:
        """The directions in the space of one tensor; zero if it is no input."""
        block = self._blocks.get(id(tensor))
        if block is None:
            return tensor.detach().new_zeros((self._width, *tensor.shape))
        return self.widened(block)

    def widened(self, block: Tensor) -> Tensor:
        """``block`` with zero rows for the inputs that were added since."""
        missing = self._width - len(block)
        if missing == 0:
            return block
        return torch.cat([block, block.new_zeros((missing, *block.shape[1:]))])

    def gradients(self, slopes: Tensor) -> list[Tensor]:
        """The gradient in each input, from the slopes along the directions."""
        weights = slopes if self._directions is None else slopes / self._directions
        return [bl.combine(self.of(tensor), weights) for tensor in self.inputs]


class _Pushed(torch.autograd.Function):
    """The end of the loop as a function of the inputs, whose Jacobian is known along directions."""

    @staticmethod
    def forward(
        ctx: Any, tangents: _Tangents, blocks: Tensors, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.tangents, ctx.blocks = tangents, list(blocks)
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        slopes = bl.dots(ctx.blocks, list(cotangents))
        return None, None, None, *[None] * len(cotangents), *ctx.tangents.gradients(slopes)


def _update(optimizer: Optimizer, number: int) -> Callable[[Any], Any]:
    """The optimiser's step as a function of one tree."""

    def update(inputs: Any) -> Any:
        grads, params, slots, settings = inputs
        after, state = optimizer.update(grads, State(number, slots), params, settings=settings)
        return after, state.slots

    return update


class _MovingBuffers:
    """The buffers of modules and their derivatives along the directions, where they are followed.

    Attributes:
        buffers: the values.
    """

    def __init__(self, buffers: Buffers, tangents: _Tangents) -> None:
        self.buffers = buffers
        self._tangents = tangents
        self._blocks: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()

    def state(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The modules' tensors, their values, and the derivatives of these; none if unfollowed."""
        if not self.buffers.differentiable:
            return [], [], []
        originals, values = self.buffers.floating()
        known = self._blocks
        blocks = [
            self._tangents.widened(known[t]) if t in known else self._tangents.of(value.detach())
            for t, value in zip(originals, values, strict=True)
        ]
        return originals, values, blocks

    def move(self, objective: Objective, joint: Tree, along: Tree, state: RandomState) -> None:
        """One evaluation at ``joint``, θ and φ, as a function of the buffers too."""
        originals, values, blocks = self.state()
        after: list[Tensor] = []

        def run(inputs: Any) -> Any:
            (params, hparams), start = inputs
            self.buffers.put(originals, start)
            with self.buffers.carried():
                evaluate(objective, params, hparams, state, "inner", twice=True)
            pairs = zip(*self.buffers.floating(), strict=True)
            ends = {t: value for t, value in pairs if value.requires_grad}
            after.extend(ends)
            return list(ends.values())

        ends, pushed = _push(run, (joint, values), [*tr.leaves(along), *blocks])
        self.buffers.put(after, ends)
        self._blocks.update(zip(after, pushed, strict=True))


def _gradient(
    steps: Steps,
    objective: Objective,
    params: Tree,
    hparams: Tree,
    theta: Tree,
    phi: Tree,
    moving: _MovingBuffers,
) -> tuple[Tree, Tree]:
    """``∇_θ f`` and its derivatives along ``(theta, phi)`` and those of the buffers, a block."""
    buffers = moving.buffers
    scratch = buffers.copy() if buffers.differentiable else buffers
    with scratch.carried():
        if steps.first_order or bl.width(theta) == 0:
            state = RandomState(params, hparams)
            leaves = fresh_leaves(params), tr.detach(hparams)
            _, grads, _ = value_and_gradients(objective, *leaves, "inner", state)
            products = tr.zeros_like(theta)
        else:
            originals, values, blocks = moving.state()
            # Copies, since θ and φ may be the same tensors.
            joint, none = (tr.detach(params), tr.detach(hparams), values), torch.zeros(1)
            if values:
                of_all = starting_from(objective, buffers, originals, lambda joint, _: joint)
            else:
                of_all = with_arguments(objective, lambda joint, _: joint[:2])
            operator = linearised(of_all, joint, none, mode=steps.mode)
            state = operator.random_state
            grads, *_ = operator.gradient
            products, *_ = operator.matmat((theta, phi, blocks))
    if scratch is not buffers and scratch.any:
        both = tr.detach(params), tr.detach(hparams)
        moving.move(objective, both, (theta, phi), state)
    state.advance()
    return grads, products


def _push(function: Callable[[Any], Any], inputs: Any, blocks: Tensors) -> tuple[Any, list[Tensor]]:
    """``function(inputs)``, and the derivatives of its tensors along ``blocks`` of its inputs'.

    ``w ↦ Jᵀ w`` is linear, and the transpose of its Jacobian is J: two reverse passes make a
    forward one.
    """
    tensors, rebuild = tr.split(inputs)
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        ends, rebuild_outputs = tr.split(function(rebuild(leaves)))
        outputs = rebuild_outputs([end.detach() for end in ends])
        if not ends or len(blocks[0]) == 0:
            return outputs, [end.new_zeros((0, *end.shape)) for end in ends]
        weights = [torch.zeros_like(end, requires_grad=True) for end in ends]
        pulled = torch.autograd.grad(ends, leaves, weights, create_graph=True, allow_unused=True)
    pairs = [(z, block) for z, block in zip(pulled, blocks, strict=True) if z is not None]
    pushed = pull_back_block([z for z, _ in pairs], weights, [block for _, block in pairs])
    return outputs, pushed
