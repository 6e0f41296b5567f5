"""The Hessian in a mode that suits the inner objective."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn

from hypergrad import tree as tr
from hypergrad._checks import check_choice
from hypergrad._private import inside_a_transform, is_batch_of_cotangents
from hypergrad.autodiff.evaluation import Objective
from hypergrad.errors import DoubleBackwardError, DoubleBackwardWarning, warn
from hypergrad.minibatches import Averaged, Sampled, on_trees
from hypergrad.operators.averaged import AveragedHessian, SampledHessian
from hypergrad.operators.compiled.hessian import CompiledHessian
from hypergrad.operators.gradients import Shared
from hypergrad.operators.hessians import Hessian, Side
from hypergrad.operators.modes import FiniteDifferenceHessian, ForwardHessian, ReverseHessian
from hypergrad.tree import Tree

Mode: TypeAlias = Literal["auto", "reverse", "forward", "finite-difference", "compiled"]


def hessian(
    inner: Objective, params: Tree | nn.Module, hparams: Tree | nn.Module, *, mode: Mode = "auto"
) -> Hessian:
    """Return the Hessian ``∂²f/∂θ²`` of an inner objective, with its outer side.

    Args:
        inner: ``f(params, hparams)``, returns a scalar tensor; or mini-batches of it,
            :class:`hypergrad.Averaged` or :class:`hypergrad.Sampled`.
        params: θ, a tree of floating-point tensors or a module, as for
            :func:`hypergrad.hypergradient`.
        hparams: φ, of the same kinds.
        mode: how products are computed. ``"reverse"``: over a kept graph, the fastest for few
            products. ``"forward"``: forward over reverse, with nothing kept between products.
            ``"finite-difference"``: central differences of first gradients, for models without
            second derivatives. ``"compiled"``: over a graph that ``torch.compile`` captures once,
            the fastest for many products; its first call takes seconds. ``"auto"``: reverse, or
            finite differences where that fails or gives a NaN at the first product, with one
            :class:`DoubleBackwardWarning` that says why.

    Raises:
        TypeError, ValueError: bad trees, an unknown mode, or an ``inner`` that is not a finite
            scalar function of ``params``.
        DoubleBackwardError: ``mode="reverse"`` or ``"compiled"``, and an operation has no second
            derivative.
        ForwardModeError: ``mode="forward"``, and an operation has no forward derivative.
        CompilationError: ``mode="compiled"``, and ``inner`` cannot be compiled.

    Examples:
        >>> import torch, hypergrad as hg
        >>> H = hg.operators.hessian(lambda w, c: (c * w**3).sum(), torch.ones(2), torch.ones(2))
        >>> H.matvec(torch.tensor([1.0, 2.0]))
        tensor([ 6., 12.])
    """
    check_choice(mode, "mode", get_args(Mode))
    return linearised(*on_trees(params, hparams, inner=inner), mode=mode)


def linearised(inner: Objective, params: Tree, hparams: Tree, *, mode: Mode) -> Hessian:
    """:func:`hessian` of arguments that are checked already."""
    if isinstance(inner, Averaged):
        return AveragedHessian(inner, params, hparams, _MODES[mode])
    if isinstance(inner, Sampled):
        return SampledHessian(inner, params, hparams, _MODES[mode])
    if isinstance(inner, Shared) and inner.batch_by_batch:
        return inner.hessian(params, hparams, _MODES[mode])
    return _MODES[mode](inner, params, hparams)


class AutoHessian(ReverseHessian):
    """Reverse mode; finite differences once a second derivative is missing or NaN."""

    def linearise(self) -> tuple[float, Tree]:
        self._instead: FiniteDifferenceHessian | None = None
        self._seen = False
        try:
            return super().linearise()
        except DoubleBackwardError as error:
            self._fall_back(error)
        assert self._instead is not None
        return self._instead.value, self._instead.gradient

    @property
    def default_chunk_size(self) -> int:
        if self._instead is not None:
            return self._instead.default_chunk_size
        return super().default_chunk_size

    def differentiate_gradient(self, vector: list[Tensor], side: Side) -> list[Tensor]:
        if self._instead is None:
            try:
                product = super().differentiate_gradient(vector, side)
            except DoubleBackwardError as error:
                self._fall_back(error)
            else:
                if self._usable(product, vector):
                    return product
        assert self._instead is not None
        return self._instead.differentiate_gradient(vector, side)

    def multiply_chunk(self, block: Tree) -> Tree:
        if self._instead is None:
            try:
                products = super().multiply_chunk(block)
            except DoubleBackwardError as error:
                self._fall_back(error)
            else:
                if self._usable(products, block):
                    return products
        assert self._instead is not None
        return self._instead.multiply_chunk(block)

    def repeated(self) -> AbstractContextManager[None]:
        return super().repeated() if self._instead is None else self._instead.repeated()

    def _usable(self, product: Tree, vector: Tree) -> bool:
        """Whether the second derivative behind the first product is not NaN.

        A norm, a root or a distance at zero has a gradient in PyTorch, but its second derivative is
        NaN for every vector. An infinity comes from overflow, which may leave NaNs, too.
        """
        leaves = tr.leaves(vector)
        if self._seen or inside_a_transform() or any(map(is_batch_of_cotangents, leaves)):
            return True
        self._seen = True
        if not math.isnan(tr.dot(product, product).item()):
            return True
        overflown = any(bool(leaf.isinf().any()) for leaf in tr.leaves(product))
        if overflown or not tr.is_finite([*leaves, *tr.leaves(self.gradient)]):
            return True
        self._change("the second derivative of inner is NaN where its gradient is finite")
        return False

    def _fall_back(self, error: DoubleBackwardError) -> None:
        self._change(f"{error.operation} has no correct second derivative in PyTorch")

    def _change(self, reason: str) -> None:
        warn(
            f"{reason}: going on with finite differences of first gradients "
            "(mode='finite-difference')",
            DoubleBackwardWarning,
        )
        self._seen = True
        self._graph = []
        self._instead = FiniteDifferenceHessian(
            self._inner, self._params, self._hparams, self.random_state
        )


_MODES: dict[str, type[Hessian]] = {
    "auto": AutoHessian,
    "reverse": ReverseHessian,
    "forward": ForwardHessian,
    "finite-difference": FiniteDifferenceHessian,
    "compiled": CompiledHessian,
}
