"""A receipt for the operator: do the derivatives that made a hypergradient agree with differences?

A linear solve can be exact and its operator wrong, where a function has a wrong derivative. Along
the solution v of the solve

    d/dε ∇_(θ,φ) f(θ + ε v, φ)  =  ( H v,  (∂_φ F)ᵀ v )

so two gradients at ``θ ± ε v`` check the Hessian product and the mixed product together. The values
there check the first gradients, by the trapezoidal rule:

    f(θ + ε v) − f(θ − ε v)            ≈  ε ⟨∇f(θ + ε v) + ∇f(θ − ε v), v⟩
    f(θ + ε v) − 2 f(θ) + f(θ − ε v)   ≈  ε/2 ⟨∇f(θ + ε v) − ∇f(θ − ε v), v⟩

A derivative counts as wrong only where the differences at two steps agree with each other and
disagree with it: kinks and rounding give differences that do not agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import optree
import torch

from hypergrad import tree as tr
from hypergrad.autodiff.evaluation import Objective, fresh_leaves
from hypergrad.autodiff.isolation import RandomState, isolated_buffers
from hypergrad.autodiff.kept_graph import custom_functions
from hypergrad.errors import DoubleBackwardWarning, VerificationError, VerificationWarning, warn
from hypergrad.linsolve.base import OnFailure
from hypergrad.minibatches import Sampled
from hypergrad.operators import Mode
from hypergrad.operators.auto import linearised
from hypergrad.operators.gradients import value_and_gradients
from hypergrad.tree import Tree
from hypergrad.verification.differences import (
    FINE,
    LONGER,
    ORDER,
    Displaced,
    Kinks,
    Line,
    Verdict,
    gradient_errors,
    judged,
    not_failed,
    verifying,
    worst,
)
from hypergrad.verification.fingerprint import Memory, fingerprint
from hypergrad.verification.moving_buffers import FirstRun

Derivative: TypeAlias = Literal["first", "second", "mixed", "outer"]
Verify: TypeAlias = Literal["once", "always", "never"]

# Half-precision differences say nothing.
_COARSEST = 1e-5


@dataclass(frozen=True)
class Verification:
    """Whether the derivatives behind a hypergradient agree with differences.

    Errors are relative, and ``None`` where the derivative was not checked.

    Attributes:
        status: the verdict.
        first: error of ``∇_θ f`` and ``∂_φ f``, by values of f.
        second: error of the Hessian product ``H v``, by differences of ``∇_θ f``.
        mixed: error of the mixed product ``(∂_φ F)ᵀ v``, by differences of ``∂_φ f``.
        outer: error of the gradient of g, by values of g.
        step: the length of the displacement of θ.
        wrong: which derivatives failed.
        suspects: functions in the graph of f (or g) that are not PyTorch's own, where one failed.
    """

    status: Verdict
    first: float | None = None
    second: float | None = None
    mixed: float | None = None
    outer: float | None = None
    step: float = 0.0
    wrong: tuple[Derivative, ...] = ()
    suspects: tuple[str, ...] = ()

    @property
    def second_only(self) -> bool:
        """Whether second derivatives are wrong and first ones are not: differences are a remedy."""
        return bool(self.wrong) and not {"first", "outer"}.intersection(self.wrong)

    def __str__(self) -> str:
        if self.status is not Verdict.FAILED:
            return f"{self.status.name}: {self.status.value}"
        named = " and ".join(_NAMES[name].format(getattr(self, name)) for name in self.wrong)
        suspect = f"; suspect: {', '.join(self.suspects)}" if self.suspects else ""
        return f"{named} by differences{suspect}"


_NAMES: dict[Derivative, str] = {
    "first": "the first derivative of inner is wrong by {:.2g} of its size",
    "second": "the second derivative of inner is wrong by {:.2g} of its size",
    "mixed": "the mixed derivative of inner is wrong by {:.2g} of its size",
    "outer": "the first derivative of outer is wrong by {:.2g} of its size",
}


class Course:
    """Whether one call verifies, and in which mode its products are right, as far as is known.

    A problem is known by its objectives and by the structure, shapes and dtypes of θ and φ. One
    whose second derivatives were found wrong goes to finite differences ever after.

    Args:
        verify: ``"once"``: unless a problem of the kind was verified before.
        mode: what the caller asked for.
        inner: f.
        outer: g.
        trees: θ and φ.
    """

    def __init__(
        self, verify: Verify, mode: Mode, inner: object, outer: object, *trees: Tree
    ) -> None:
        both: Tree = trees
        structure = optree.tree_structure(both)
        kinds = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in tr.leaves(both))
        self._kind = mode, structure, kinds, fingerprint(inner), fingerprint(outer)
        self._asked = mode
        known = _right_modes.get(self._kind)
        self.mode: Mode = known or mode
        # Fresh batches at each evaluation cannot be compared.
        drawn = isinstance(inner, Sampled) or isinstance(outer, Sampled)
        asked = verify == "always" or (verify == "once" and known is None)
        self.verifies = asked and not drawn

    def heard(self, found: Verification) -> bool:
        """Remember a verification; whether to begin again, by finite differences."""
        fails = self._asked == "auto" and self.mode == "auto" and found.second_only
        if fails:
            self.mode = "finite-difference"
            warn(
                f"{found}; going on with finite differences of first gradients "
                "(mode='finite-difference')",
                DoubleBackwardWarning,
            )
        _right_modes.put(self._kind, self.mode)
        return fails


_right_modes = Memory()


def report_verification(found: Verification | None, *, mode: Mode, on_failure: OnFailure) -> None:
    """Warn or raise, as asked, if a derivative is wrong in ``mode``."""
    if found is None or found.status is not Verdict.FAILED or on_failure == "ignore":
        return
    message = f"the hypergradient is wrong: {found}; {_remedy(found, mode)}"
    if on_failure == "raise":
        raise VerificationError(message)
    warn(message, VerificationWarning)


def _remedy(found: Verification, mode: Mode) -> str:
    if found.second_only and mode == "finite-difference":
        return (
            "other steps give other differences: compute in float64 throughout, or use "
            "mode='reverse' if second derivatives are right"
        )
    if found.second_only:
        return (
            "use mode='finite-difference', which needs first derivatives only, or mode='auto', "
            "which changes to it by itself"
        )
    return (
        "its gradient is not the derivative of its value: check it with "
        "torch.autograd.gradcheck, or pass verify='never' if it is meant to differ"
    )


def verify_derivatives(
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    *,
    direction: Tree,
    second: Tree | None,
    mixed: Tree,
    inner_value: float,
    outer_value: float,
    outer_grads: tuple[Tree, Tree],
    random_state: RandomState,
    first_run: FirstRun | None = None,
    rounding: float | None = None,
) -> Verification:
    """Compare what made a hypergradient with differences along the solution of its linear system.

    Costs two gradients of f and a value of f and g each; some five gradients more where the first
    comparison fails.

    Args:
        inner: f.
        outer: g.
        params: θ.
        hparams: φ.
        direction: v.
        second: ``H v``; ``None`` if it took no part.
        mixed: ``(∂_φ F)ᵀ v``.
        inner_value: ``f(θ, φ)``.
        outer_value: ``g(θ, φ)``.
        outer_grads: ``∂_θ g`` and ``∂_φ g``.
        random_state: where the evaluations of f and g started.
        first_run: what looks at the buffers of modules in an evaluation of f.
        rounding: the machine epsilon; ``None``: that of θ and φ.
    """
    theta, phi = tr.detach(params), tr.detach(hparams)
    rounding = rounding or max(tr.epsilon(theta), tr.epsilon(phi))
    length = tr.norm(direction)
    if rounding > _COARSEST or not 0.0 < length < math.inf:
        return Verification(Verdict.INCONCLUSIVE)
    with verifying():
        f = Displaced(inner, "inner", theta, phi, random_state, rounding, first_run)
        g = Displaced(outer, "outer", theta, phi, random_state, rounding)
        kinks = Kinks(f)
        unit = tr.divide(direction, length)
        line = Line(f, unit, inner_value)
        tolerance = 1e-5 if rounding < FINE else 3e-4
        found = {
            "first": worst(
                judged(line.slope_errors(), tolerance, resolve=False),
                judged(line.curvature_errors(), 10.0 * tolerance, resolve=False, hopeless=kinks),
                judged(
                    line.outer_slope_errors(tr.divide(mixed, length)),
                    3.0 * tolerance,
                    hopeless=kinks,
                ),
            ),
            "mixed": judged(
                line.product_errors(tr.divide(mixed, length), "mixed"), tolerance, hopeless=kinks
            ),
            "outer": judged(gradient_errors(g, outer_value, outer_grads, unit), 3.0 * tolerance),
        }
        if second is not None:
            product = tr.divide(second, length)
            found["second"] = judged(
                line.product_errors(product, "second"), tolerance, hopeless=kinks
            )
        verdicts = [verdict for verdict, _ in found.values()]
        open_in_double = rounding < FINE and Verdict.INCONCLUSIVE in verdicts
        looks_coarse = Verdict.FAILED in verdicts or open_in_double
        coarsest = max(f.coarsest(), g.coarsest()) if looks_coarse else rounding
        if rounding < coarsest <= _COARSEST:
            # A model in float64 may compute its norms in float32, whose steps are longer.
            return verify_derivatives(
                inner, outer, params, hparams,
                direction=direction, second=second, mixed=mixed, inner_value=inner_value,
                outer_value=outer_value, outer_grads=outer_grads, random_state=random_state,
                first_run=first_run, rounding=coarsest,
            )  # fmt: skip
        if coarsest > _COARSEST:
            found = {name: (not_failed(verdict), error) for name, (verdict, error) in found.items()}
        if Verdict.FAILED in (found["mixed"][0], found.get("second", found["mixed"])[0]):
            # Whether differences are a remedy hangs on the first gradients, so values have to tell.
            longer = judged(line.curvature_errors(LONGER), tolerance)
            found["first"] = worst(found["first"], longer)
        errors = {name: error for name, (_, error) in found.items()}
        verdicts = [verdict for verdict, _ in found.values()]
        wrong = tuple(name for name in _NAMES if found.get(name, (None,))[0] is Verdict.FAILED)
        status = Verdict.PASSED
        if wrong:
            status = Verdict.FAILED
        elif Verdict.INCONCLUSIVE in verdicts:
            status = Verdict.INCONCLUSIVE
        suspects: tuple[str, ...] = ()
        if wrong:
            suspects = custom_functions((g if wrong == ("outer",) else f).graph())
    return Verification(status, **errors, step=line.step, wrong=wrong, suspects=suspects)


def verify_problem(
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    *,
    mode: Mode,
    direction: Tree | None = None,
) -> Verification:
    """:func:`verify_derivatives` along ``∂_θ g``, or another direction, without a linear system.

    Costs some eight gradients. Nothing of the caller's is changed.
    """
    with verifying(), torch.inference_mode(False), torch.no_grad(), isolated_buffers():
        theta, phi = fresh_leaves(params), fresh_leaves(hparams)
        outer_value, cotangent, direct = value_and_gradients(outer, theta, phi, "outer")
        exact = linearised(inner, params, hparams, mode=mode)
        along = direction
        if along is None:
            # g may be stationary where steps begin, as at θ = 0.
            along = cotangent if tr.norm(cotangent) > 0.0 else exact.gradient
        second, mixed = exact.vjp(along)
        return verify_derivatives(
            inner, outer, params, hparams,
            direction=along, second=second, mixed=mixed, inner_value=exact.value,
            outer_value=outer_value, outer_grads=(cotangent, direct),
            random_state=exact.random_state,
        )  # fmt: skip


def verify_on_course(
    course: Course,
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    on_failure: OnFailure = "warn",
) -> Verification:
    """:func:`verify_problem`, again by differences where the course changes; told if it fails."""
    again = True
    while again:
        found = verify_problem(inner, outer, params, hparams, mode=course.mode)
        again = course.heard(found)
    report_verification(found, mode=course.mode, on_failure=on_failure)
    return found


def verify_further(
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    *,
    mode: Mode,
    directions: Iterable[Tree],
) -> Verification:
    """The worst of :func:`verify_problem` along several directions in θ."""
    found = [
        verify_problem(inner, outer, params, hparams, mode=mode, direction=direction)
        for direction in directions
    ]
    return max(found, key=lambda verification: ORDER.index(verification.status))
