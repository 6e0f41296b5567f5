"""Hessians over mini-batches: of their mean, or of another batch per product."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing

from torch import Tensor

from hypergrad import tree as tr
from hypergrad.autodiff.isolation import RandomState
from hypergrad.minibatches import Averaged, Sampled
from hypergrad.operators.hessians import Hessian, Side
from hypergrad.tree import Tree


class AveragedHessian(Hessian):
    """``H = Σ_i w_i H_i / Σ_i w_i`` over the mini-batches of an :class:`hypergrad.Averaged`.

    Args:
        inner: the mean.
        params: θ.
        hparams: φ.
        part: the class of the Hessian of one batch.
    """

    def __init__(self, inner: Averaged, params: Tree, hparams: Tree, part: type[Hessian]) -> None:
        self._mean = inner
        self._part = part
        self._kept: list[tuple[float, Hessian]] = []
        super().__init__(inner, params, hparams)

    def linearise(self) -> tuple[float, Tree]:
        value = total = 0.0
        gradient: Tree = None
        kept = []
        with closing(self._parts()) as parts:
            for weight, part in parts:
                total += weight
                value += weight * part.value
                gradient = _accumulate(gradient, part.gradient, weight)
                if self._mean.keep_graphs:
                    kept.append((weight, part))
        self._kept = kept
        self._total = total
        return value / total, tr.cast_like(tr.divide(gradient, total), self._params)

    @property
    def default_chunk_size(self) -> int:
        # A block saves passes over the data, whatever the size of the model.
        return 16

    def differentiate_gradient(self, vector: list[Tensor], side: Side) -> list[Tensor]:
        mean: list[Tensor] = self._mean_of(lambda part: part.differentiate_gradient(vector, side))
        return mean

    def multiply_chunk(self, block: Tree) -> Tree:
        return tr.cast_like(self._mean_of(lambda part: part.matmat(block)), block)

    def _mean_of(self, product: Callable[[Hessian], Tree]) -> Tree:
        products: Tree = None
        with closing(self._parts()) as parts:
            for weight, part in parts:
                products = _accumulate(products, product(part), weight)
        return tr.divide(products, self._total)

    # A caller that may stop early must close it: it holds the random state of the loop outside.
    def _parts(self) -> Generator[tuple[float, Hessian]]:
        if self._kept:
            yield from self._kept
            return
        trees = self._params, self._hparams
        with closing(self._mean.replayed_parts(self.random_state, *trees)) as parts:
            for weight, objective, here in parts:
                yield weight, self._part(objective, *trees, here)


class SampledHessian(Hessian):
    """The Hessian of the next mini-batch of an :class:`hypergrad.Sampled`, another one per product.

    ``value`` and ``gradient`` are those of one batch. The arguments are those of
    :class:`AveragedHessian`.
    """

    def __init__(self, inner: Sampled, params: Tree, hparams: Tree, part: type[Hessian]) -> None:
        self._sampled = inner
        self._part = part
        super().__init__(inner, params, hparams)

    def linearise(self) -> tuple[float, Tree]:
        part = self._next()
        return part.value, part.gradient

    @property
    def default_chunk_size(self) -> int:
        return 16

    def differentiate_gradient(self, vector: list[Tensor], side: Side) -> list[Tensor]:
        return self._next().differentiate_gradient(vector, side)

    def multiply_chunk(self, block: Tree) -> Tree:
        return self._next().matmat(block)

    def _next(self) -> Hessian:
        objective = self._sampled.part()
        with self.random_state.replayed():
            here = RandomState(self._params, self._hparams)
            part = self._part(objective, self._params, self._hparams, here)
            here.advance()
            self.random_state = RandomState(self._params, self._hparams)
        return part


def _accumulate(total: Tree, addend: Tree, weight: float) -> Tree:
    wide = tr.scale(tr.at_least_float32(addend), weight)
    return wide if total is None else tr.add(total, wide)
