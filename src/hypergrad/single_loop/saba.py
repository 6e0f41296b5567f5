"""SABA: SOBA with variance reduction, one batch of each objective per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast, get_args

import torch
from torch import Tensor

from hypergrad import _saving as sv
from hypergrad import tree as tr
from hypergrad._checks import check_choice, check_structure
from hypergrad.autodiff.evaluation import Objective
from hypergrad.minibatches import Averaged, bind
from hypergrad.operators import Mode
from hypergrad.single_loop.base import Directions, LoopState, SingleLoop
from hypergrad.single_loop.problem import Problem
from hypergrad.tree import Tree


@dataclass(frozen=True)
class Memory:
    """What SABA remembers of all batches."""

    inner: Table  # ∂_θ f_i, H_i v and (∂_φ F_i)ᵀ v of each inner batch
    outer: Table  # ∂_θ g_j and ∂_φ g_j of each outer batch


@dataclass(frozen=True)
class SABA(SingleLoop):
    """The directions of :class:`SOBA`, each derivative estimated from one batch and a memory.

        N p_i (new_i − old_i) + Σ_k p_k old_k,   then old_i ← new_i

    for a uniform batch i of N with the share p_i of all weight, as in SAGA. The noise vanishes with
    the changes, so constant step sizes reach the solution, which SOBA on single batches does not.
    The first step fills the memory by a pass over all batches; later steps cost one batch of each
    objective. The memory holds two vectors like θ and one like φ per inner batch, and one of each
    per outer batch. Dagréou et al. 2022, *A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms*, Algorithm SABA.

    Step sizes: the paper takes one ρ for v and θ, and a fixed share of it for φ, all constant.

    ``inner`` and ``outer`` must be :class:`hypergrad.Averaged` over lists of batches, the same in
    every step; ``directions`` raises ``TypeError`` or ``ValueError`` for others.

    Args:
        lr: step size of v. ``None``: that of the inner optimiser, in a ``BilevelSolver``.
        mode: how the Hessian product is computed, see :func:`hypergrad.operators.hessian`.
        generator: for the batches; ``None`` is PyTorch's default CPU generator. Each step but the
            first draws the inner batch, then the outer one. Its state is packed with the memory.
    """

    over_all_batches: ClassVar[bool] = True

    mode: Mode = "auto"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.mode, "mode", get_args(Mode))
        sv.check_generator(self.generator)

    def first_companion(self, params: Tree) -> Tree:
        return tr.zeros_like(params)

    def follow(self, problem: Problem, params: Tree, state: LoopState) -> Directions:
        v, hparams = state.companion, problem.hparams
        inner, outer = _all_batches(problem.f, "inner"), _all_batches(problem.g, "outer")
        memory = state.memory
        if memory is not None:
            _check_table(memory.inner, inner, (params, params, hparams), "inner")
            _check_table(memory.outer, outer, (params, hparams), "outer")

        def system(f: Objective) -> tuple[float, Tree]:
            value, *derivatives = replace(problem, f=f).system(params, v, self.mode)
            return value, tuple(derivatives)

        def slopes(g: Objective) -> tuple[float, Tree]:
            value, *derivatives = replace(problem, g=g).outer(params)
            return value, tuple(derivatives)

        inner_value, (gradient, product, mixed), inner_table = self._estimate(
            inner, system, memory and memory.inner
        )
        outer_value, (pull, direct), outer_table = self._estimate(
            outer, slopes, memory and memory.outer
        )
        residual = tr.cast_like(tr.subtract(product, pull), v)
        return Directions(
            params=tr.cast_like(gradient, params),
            hparams=tr.cast_like(tr.subtract(direct, mixed), hparams),
            state=LoopState(
                state.step + 1,
                tr.add(v, residual, -self.step_size),
                Memory(inner_table, outer_table),
            ),
            inner_value=inner_value,
            outer_value=outer_value,
            matvecs=1 if memory is not None else len(inner_table.entries),
        )

    def pack_memory(self, memory: Any) -> Any:
        return {
            "inner": memory.inner.to_lists(),
            "outer": memory.outer.to_lists(),
            "generator": sv.generator_state(self.generator),
        }

    def unpack_memory(self, packed: Any, params: Tree, hparams: Tree) -> Any:
        """Return the tables; a generator continues from the state packed with them."""
        name = "packed['memory']"
        sv.check_keys(packed, ("inner", "outer", "generator"), name)
        sv.check_generator_state(self.generator, packed["generator"], f"{name}['generator']")
        memory = Memory(
            Table.from_lists(packed["inner"], (params, params, hparams), f"{name}['inner']"),
            Table.from_lists(packed["outer"], (params, hparams), f"{name}['outer']"),
        )
        sv.set_generator_state(self.generator, packed["generator"])
        return memory

    def _estimate(
        self,
        objective: Averaged,
        evaluate: Callable[[Objective], tuple[float, Tree]],
        table: Table | None,
    ) -> tuple[float, Tree, Table]:
        """Return value, derivatives (exact where there is no table yet) and the new table."""
        if table is None:
            weights, parts = zip(*objective.parts(), strict=True)
            values, entries = zip(*map(evaluate, parts), strict=True)
            table = Table.of(entries, weights)
            value = sum(p * f for p, f in zip(table.shares, values, strict=True))
            return value, table.mean, table
        i = self._draw(len(table.entries))
        value, entry = evaluate(bind(objective.objective, _batches(objective)[i]))
        return value, *table.replace(i, entry)

    def _draw(self, count: int) -> int:
        device = "cpu" if self.generator is None else self.generator.device
        return int(torch.randint(count, (), generator=self.generator, device=device))


def _all_batches(objective: Objective, name: str) -> Averaged:
    if not isinstance(objective, Averaged):
        raise TypeError(
            f"{name} must be a hypergrad.Averaged for SABA, which remembers something of each "
            f"batch, got {type(objective).__name__}; pass Averaged(objective, list_of_batches)"
        )
    if not isinstance(objective.batches, Sequence):
        raise TypeError(
            f"{name} must be averaged over a list of batches for SABA, the same in every step, "
            f"got a {type(objective.batches).__name__}; pass list(batches)"
        )
    return objective


def _check_table(table: Table, objective: Averaged, like: Tree, name: str) -> None:
    count = len(_batches(objective))
    if len(table.entries) != count:
        raise ValueError(
            f"{name} must have the batches that state.memory was made of, {len(table.entries)} of "
            f"them, got {count}; start afresh with init"
        )
    check_structure(table.mean, like, f"state.memory.{name}", "params and hparams")


def _batches(objective: Averaged) -> Sequence[Any]:
    return cast("Sequence[Any]", objective.batches)


@dataclass(frozen=True)
class Table:
    """The last derivative of each of N batches, and their weighted mean ``Σ_i p_i entry_i``.

    The mean is kept in float64 (float32 on MPS), whatever the entries are, because each step rounds
    it once and the error stays. In float32 the errors of the first steps, where derivatives are
    large, would limit all later ones. In float64, T steps leave about ``√T · 1e-16`` of the largest
    entry, less than the rounding of the entries.
    """

    entries: tuple[Tree, ...]  # one per batch
    shares: tuple[float, ...]  # p_i = w_i / Σ_j w_j
    mean: Tree

    @classmethod
    def of(cls, entries: Sequence[Tree], weights: Sequence[float]) -> Table:
        """Make the table of the given entries."""
        total = sum(weights)
        shares = tuple(weight / total for weight in weights)
        mean = tr.zeros_like(_wide(entries[0]))
        for entry, share in zip(entries, shares, strict=True):
            mean = tr.add(mean, _wide(entry), share)
        return cls(tuple(entries), shares, mean)

    def replace(self, i: int, entry: Tree) -> tuple[Tree, Table]:
        """Return ``N p_i (entry − entry_i) + mean``, and the table with ``entry`` at i.

        The estimate is unbiased for a uniform i. The new table shares all other entries with this
        one, which does not change.
        """
        change = tr.subtract(_wide(entry), _wide(self.entries[i]))
        estimate = tr.add(self.mean, change, len(self.entries) * self.shares[i])
        mean = tr.add(self.mean, change, self.shares[i])
        entries = (*self.entries[:i], entry, *self.entries[i + 1 :])
        return estimate, Table(entries, self.shares, mean)

    def to_lists(self) -> list[list[Tensor]]:
        """The shares as one tensor, the leaves of the mean, and the leaves of each entry."""
        shares = torch.tensor(self.shares, dtype=torch.float64)
        return [[shares], tr.leaves(self.mean), *map(tr.leaves, self.entries)]

    @classmethod
    def from_lists(cls, lists: Any, like: Tree, name: str) -> Table:
        """Return the table that :meth:`to_lists` wrote, or raise ``ValueError``.

        Args:
            lists: what it returned.
            like: a tree of the structure, shapes and dtypes of an entry, on the devices to use.
            name: what to call ``lists`` in errors.
        """
        if not isinstance(lists, list) or len(lists) < 3:
            raise ValueError(f"{name} must be a list of shares, mean and entries, got {lists!r}")
        count = torch.empty(len(lists) - 2, dtype=torch.float64)
        shares = sv.from_leaves(lists[0], count, f"the shares in {name}", "one number a batch")
        mean, *entries = (sv.from_leaves(row, like, name, "an entry") for row in lists[1:])
        return cls(tuple(entries), tuple(shares.tolist()), _wide(mean))


def _wide(tree: Tree) -> Tree:
    return tr.map_leaves(lambda leaf: leaf if leaf.device.type == "mps" else leaf.double(), tree)
