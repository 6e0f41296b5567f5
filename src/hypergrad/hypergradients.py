"""One call for every method: ``hypergradient(inner, outer, params, hparams, method=...)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias, get_args

from torch import Tensor, nn

from hypergrad._checks import check_choice, given
from hypergrad.autodiff.evaluation import Objective
from hypergrad.autodiff.modules import modes_put_back
from hypergrad.implicit.hypergradient import Implicit, implicit_hypergradient
from hypergrad.linsolve import CG, LinearSolver
from hypergrad.linsolve.base import OnFailure
from hypergrad.minibatches import on_trees
from hypergrad.results import Hypergradient
from hypergrad.tree import Tree
from hypergrad.unrolling.hypergradient import Unrolled, unrolled_hypergradient
from hypergrad.verification.verification import Verify

Method: TypeAlias = LinearSolver | Implicit | Unrolled
"""Where ``dg/dφ`` comes from."""


def hypergradient(
    inner: Callable[..., Tensor],
    outer: Objective,
    params: Tree | nn.Module,
    hparams: Tree | nn.Module,
    *,
    method: Method = CG(),
    x0: Tree | None = None,
    on_failure: OnFailure = "warn",
    verify: Verify = "once",
) -> Hypergradient:
    """``dg/dφ`` of ``g(θ*(φ), φ)`` where ``θ*(φ) = argmin_θ f(θ, φ)``.

    Nothing of the caller's is changed: no ``.grad``, no ``requires_grad``, no module buffer, no
    random state (but for a solver that draws from PyTorch's default generator because it was given
    none). Graphs that ``params`` or ``hparams`` carry are ignored. Both objectives start from the
    current random state, so dropout masks are fixed for the whole call. With half-precision
    parameters the solver's vectors and inner products are float32; the products are computed in the
    precision of the model.

    Args:
        inner: f, a scalar function of ``(params, hparams)``. It gets trees like those given here,
            of new leaf tensors; in the place of a module it gets the module, with such tensors as
            its parameters. Over mini-batches: :class:`Averaged` or :class:`Sampled`.
        outer: g, a scalar function of the same.
        params: θ, a tree of floating-point tensors, or a module, whose parameters that require
            gradients are meant. With :class:`Unrolled` it is where the steps start.
        hparams: φ, of the same kinds.
        method: a linear solver, or :class:`Implicit` with one and its options, for implicit
            differentiation; :class:`Unrolled` to differentiate the steps of an optimiser.
        x0: where a linear solver starts, such as ``solve.x`` of the last outer step.
        on_failure: what a failed solve or verification does: ``"warn"``, ``"raise"`` or
            ``"ignore"``. The answer from its best iterate is returned in the first and the last
            case. The last one is also silent about outer parameters that neither objective uses.
        verify: whether to compare the derivatives with differences along the solution, see
            :class:`Verification`: ``"once"`` for each pair of objectives and each kind of
            ``params`` and ``hparams`` in a process, ``"always"`` or ``"never"``. It costs two
            gradients and two values. Where only second derivatives are wrong, ``mode="auto"`` goes
            on with finite differences and warns once.

    Returns:
        The gradients in the structure and dtypes of ``hparams`` (zero for an outer parameter that
        neither objective uses), and the receipt.

    Raises:
        TypeError: an argument is of the wrong kind, or a leaf is no floating-point tensor.
        ValueError: an argument is out of its range, a tree is empty or does not match, or an
            objective is not a finite scalar that depends on ``params``.
        LinearSolveError: the solve failed and ``on_failure="raise"``.
        VerificationError: a derivative is wrong and ``on_failure="raise"``.
        DoubleBackwardError: ``mode="reverse"`` or ``"compiled"``, and an operation has no second
            derivative.
        ForwardModeError: ``mode="forward"``, and an operation has no forward derivative.
        CompilationError: ``mode="compiled"``, and ``inner`` cannot be compiled.

    Examples:
        Ridge regression on one number: θ* = 3 / (1 + φ), so dg/dφ = −θ* · 3 / (1 + φ)² = −9/8.

        >>> import torch, hypergrad as hg
        >>> f = lambda w, c: 0.5 * (w - 3.0) ** 2 + 0.5 * c * w**2
        >>> g = lambda w, c: 0.5 * w**2
        >>> hg.hypergradient(f, g, torch.tensor(1.5), torch.tensor(1.0)).grads
        tensor(-1.1250)
    """
    chosen: Implicit | Unrolled = with_modules(as_method(method), params, hparams)
    modules = params, hparams
    inner, outer, params, hparams = on_trees(params, hparams, inner=inner, outer=outer)
    check_choice(on_failure, "on_failure", get_args(OnFailure))
    check_choice(verify, "verify", get_args(Verify))
    if x0 is not None and isinstance(chosen, Unrolled):
        raise ValueError("x0 must be None with hg.Unrolled, which solves no linear system")
    with modes_put_back(*modules):
        if isinstance(chosen, Unrolled):
            return unrolled_hypergradient(
                chosen, inner, outer, params, hparams, on_failure=on_failure, verify=verify
            )
        return implicit_hypergradient(
            chosen, inner, outer, params, hparams, x0=x0, on_failure=on_failure, verify=verify
        )


def as_method(method: Any) -> Implicit | Unrolled:
    """What ``method=`` stands for.

    Raises:
        TypeError: it is none of the three kinds.
    """
    if isinstance(method, LinearSolver):
        return Implicit(method)
    if not isinstance(method, (Implicit, Unrolled)):
        raise TypeError(
            "method must be a linear solver such as hg.CG(), hg.Implicit(...) or hg.Unrolled(...), "
            f"got {given(method)}"
        )
    return method


def with_modules(method: Any, params: Tree | nn.Module, hparams: Tree | nn.Module) -> Any:
    """A method whose curvature, if it has one, gets modules in the place of their parameters."""
    curvature = getattr(method, "curvature", None)
    if curvature is None or not any(isinstance(given, nn.Module) for given in (params, hparams)):
        return method

    def of_modules(w: Tree, h: Tree, *batch: Any) -> Any:
        first = params if isinstance(params, nn.Module) else w
        return curvature(first, hparams if isinstance(hparams, nn.Module) else h, *batch)

    return replace(method, curvature=of_modules)
