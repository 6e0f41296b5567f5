"""On which outer parameters the objectives of a call depend, and which tensors they close over.

An objective computes with its arguments. What it takes from elsewhere, such as the very tensor that
was passed as ``hparams``, is a constant to every derivative.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import optree
from torch import Tensor

from hypergrad import _sharding as pl
from hypergrad import tree as tr
from hypergrad.autodiff.evaluation import Objective, evaluate, fresh_leaves, gradient
from hypergrad.autodiff.isolation import RandomState
from hypergrad.autodiff.kept_graph import reachable
from hypergrad.errors import HypergradWarning, warn
from hypergrad.minibatches import Averaged, Sampled
from hypergrad.operators.gradients import Shared
from hypergrad.tree import Tree


@contextmanager
def told_by_the_caller() -> Iterator[None]:
    """:func:`warn_of_unused` is silent inside: a loop knows its objectives and tells once."""
    outside, _this_thread.told = _this_thread.told, True
    try:
        yield
    finally:
        _this_thread.told = outside


class _ThreadState(threading.local):
    told = False


_this_thread = _ThreadState()


def warn_of_unused(
    inner: Objective, outer: Objective, params: Tree, hparams: Tree, grads: Tree
) -> None:
    """Warn of leaves of φ that no gradient reaches, if ``grads`` has a leaf of zeros.

    It costs nothing otherwise, and one evaluation of each objective there.
    """
    leaves = tr.leaves(grads)
    if _this_thread.told or pl.any_distributed(leaves):
        return
    if all(bool(leaf.any()) for leaf in leaves):
        return
    unused, closed_over = examine(inner, outer, params, hparams)
    if unused:
        hint = f"; got {', '.join(closed_over)} from outside of the arguments"
        warn(
            f"neither inner nor outer uses {', '.join(unused)}: the hypergradient there is 0; "
            "compute with the hparams argument, without detach(), .item() or float()"
            + (hint if closed_over else ""),
            HypergradWarning,
        )


def examine(
    inner: Objective, outer: Objective, params: Tree, hparams: Tree
) -> tuple[list[str], list[str]]:
    """Leaves of φ that neither objective uses, and tensors of the caller's that they close over.

    Returns:
        Names such as ``hparams['decay']``, and words such as ``hparams['decay'] in inner``. Of an
        average the first batch is looked at; nothing is found of streams and of other ranks.
    """
    names = _names(hparams, "hparams")
    own = dict(zip(names, tr.leaves(hparams), strict=True))
    own |= dict(zip(_names(params, "params"), tr.leaves(params), strict=True))
    used: set[str] = set()
    closed_over = []
    for title, objective in (("inner", inner), ("outer", outer)):
        part = _first_part(objective)
        if part is None:
            return [], []
        theta, phi = fresh_leaves(params), fresh_leaves(hparams)
        value = evaluate(part, theta, phi, RandomState(params, hparams), title)
        found = zip(names, gradient(value, phi), strict=True)
        used |= {name for name, grad in found if grad is not None}
        fresh = {id(leaf) for leaf in tr.leaves((theta, phi))}
        others = [leaf for leaf in _variables(value) if id(leaf) not in fresh]
        closed_over += [
            f"{name} in {title}"
            for name, leaf in own.items()
            if any(_same(leaf, other) for other in others)
        ]
    return [name for name in names if name not in used], closed_over


def _first_part(objective: Objective) -> Objective | None:
    if isinstance(objective, (Sampled, Shared)):
        return None
    if isinstance(objective, Averaged):
        return next(objective.parts())[1]
    return objective


def _variables(value: Tensor) -> list[Tensor]:
    nodes = [] if value.grad_fn is None else reachable([value.grad_fn])
    found = [getattr(node, "variable", None) for node in nodes]
    return [variable for variable in found if variable is not None]


def _same(leaf: Tensor, other: Tensor) -> bool:
    return leaf is other or (
        leaf.shape == other.shape
        and leaf.device == other.device
        and leaf.data_ptr() == other.data_ptr() != 0
    )


def _names(tree: Tree, name: str) -> list[str]:
    paths, _, _ = optree.tree_flatten_with_path(tree)
    return [name + "".join(f"[{key!r}]" for key in path) for path in paths]
