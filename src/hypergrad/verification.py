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
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeAlias

import optree
import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.errors import DoubleBackwardWarning, VerificationError, VerificationWarning
from hypergrad.evaluation import Objective, evaluate, fresh_leaves
from hypergrad.fingerprint import Memory, fingerprint
from hypergrad.isolation import RandomState, isolated_buffers
from hypergrad.minibatch import Averaged, Sampled, value, value_and_gradients
from hypergrad.operators import Mode, hessian
from hypergrad.operators.kept_graph import custom_functions, has_kinks
from hypergrad.tree import Tree

Derivative: TypeAlias = Literal["first", "second", "mixed", "outer"]
Verify: TypeAlias = Literal["once", "always", "never"]

# The rounding of a value or a gradient, in units of the machine epsilon.
_ROUNDINGS = 8.0
# A difference whose rounding is a larger part than this of what it measures settles nothing.
_RESOLVED = 0.05
# float64, whose steps cross next to no kink.
_FINE = 1e-10
# Half-precision differences say nothing.
_COARSEST = 1e-5
# The second and third step, as parts of the first; and longer ones, which values need.
_SHORTER = (0.25, 0.0625)
_LONGER = (4.0, 16.0, 64.0)
# Two differences agree if they lie so much closer to each other than to the product.
_CLOSER = 0.1
# An error that is not so many tolerances is no failure.
_MATERIAL = 3.0
# Differences that do not agree with each other pass all the same at so many tolerances.
_CLOSE_ENOUGH = 20.0


class Verdict(Enum):
    """What a verification found. The value is a sentence that says it."""

    PASSED = "first, second and mixed derivatives agree with differences"
    FAILED = "a derivative is not what differences of a lower one say"
    INCONCLUSIVE = "differences do not settle whether the derivatives are right"


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


def is_verifying() -> bool:
    """Whether an objective is evaluated for a verification, where its metrics mean nothing."""
    return _this_thread.verifying


@contextmanager
def _verifying() -> Iterator[None]:
    """Mark evaluations, and put the random states of Python and NumPy back after them."""
    outside, python, numpy = _this_thread.verifying, random.getstate(), sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()
    _this_thread.verifying = True
    try:
        yield
    finally:
        _this_thread.verifying = outside
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(drawn)


class _ThreadState(threading.local):
    verifying = False


_this_thread = _ThreadState()


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
            warnings.warn(
                f"{found}; going on with finite differences of first gradients "
                "(mode='finite-difference')",
                DoubleBackwardWarning,
                stacklevel=3,
            )
        _right_modes.put(self._kind, self.mode)
        return fails


_right_modes = Memory()


def report_verification(found: Verification | None, *, on_failure: str) -> None:
    """Warn or raise, as asked, if a derivative is wrong."""
    if found is None or found.status is not Verdict.FAILED or on_failure == "ignore":
        return
    message = f"the hypergradient is wrong: {found}; {_remedy(found)}"
    if on_failure == "raise":
        raise VerificationError(message)
    warnings.warn(message, VerificationWarning, stacklevel=3)


def _remedy(found: Verification) -> str:
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
    """
    theta, phi = tr.detach(params), tr.detach(hparams)
    rounding = max(tr.epsilon(theta), tr.epsilon(phi))
    length = tr.norm(direction)
    if rounding > _COARSEST or not 0.0 < length < math.inf:
        return Verification(Verdict.INCONCLUSIVE)
    with _verifying():
        f = _Displaced(inner, "inner", theta, phi, random_state, rounding)
        g = _Displaced(outer, "outer", theta, phi, random_state, rounding)
        line = _Line(f, tr.divide(direction, length), inner_value)
        tolerance = 1e-5 if rounding < _FINE else 3e-4
        found = {
            "first": _worst(
                _judged(line.slope_errors(), tolerance, resolve=False),
                _judged(line.curvature_errors(), tolerance, resolve=False),
                _judged(line.outer_slope_errors(tr.divide(mixed, length)), tolerance),
            ),
            "mixed": _judged(line.product_errors(tr.divide(mixed, length), "mixed"), tolerance),
            "outer": _judged(_gradient_errors(g, outer_value, outer_grads), tolerance),
        }
        if second is not None:
            product = tr.divide(second, length)
            found["second"] = _judged(line.product_errors(product, "second"), tolerance)
        failed = [name for name, (verdict, _) in found.items() if verdict is Verdict.FAILED]
        if failed and (f.is_coarse() or g.is_coarse() or _only_kinks(failed, f)):
            found = {
                name: (_not_failed(verdict), error) for name, (verdict, error) in found.items()
            }
        if Verdict.FAILED in (found["mixed"][0], found.get("second", found["mixed"])[0]):
            # Whether differences are a remedy hangs on the first gradients, so values have to tell.
            longer = _judged(line.curvature_errors(_LONGER), tolerance)
            found["first"] = _worst(found["first"], longer)
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
    with _verifying(), torch.inference_mode(False), torch.no_grad(), isolated_buffers():
        theta, phi = fresh_leaves(params), fresh_leaves(hparams)
        outer_value, cotangent, direct = value_and_gradients(outer, theta, phi, "outer")
        exact = hessian(inner, params, hparams, mode=mode)
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
    course: Course, inner: Objective, outer: Objective, params: Tree, hparams: Tree
) -> Verification:
    """:func:`verify_problem`, again by differences where the course changes; told if it fails."""
    again = True
    while again:
        found = verify_problem(inner, outer, params, hparams, mode=course.mode)
        again = course.heard(found)
    report_verification(found, on_failure="warn")
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
    worst = None
    for direction in directions:
        found = verify_problem(inner, outer, params, hparams, mode=mode, direction=direction)
        if worst is None or _ORDER.index(found.status) > _ORDER.index(worst.status):
            worst = found
    assert worst is not None
    return worst


class _Displaced:
    """An objective at other parameters, always from one random state."""

    def __init__(
        self,
        objective: Objective,
        name: str,
        theta: Tree,
        phi: Tree,
        random_state: RandomState,
        rounding: float,
    ) -> None:
        self._objective = objective
        self._name = name
        self._random_state = random_state
        self.theta = theta
        self.phi = phi
        self.rounding = rounding

    def gradients(self, theta: Tree) -> tuple[float, Tree, Tree]:
        """The value, and the gradients in θ and φ."""
        return self._evaluated(value_and_gradients, theta, self.phi)

    def value(self, theta: Tree, phi: Tree) -> float:
        """The value alone."""
        found: float = self._evaluated(value, theta, phi)
        return found

    def _evaluated(
        self, how: Callable[..., Any], theta: Tree, phi: Tree, objective: Objective | None = None
    ) -> Any:
        leaves = fresh_leaves(theta), fresh_leaves(phi)
        try:
            return how(objective or self._objective, *leaves, self._name, self._random_state)
        except Exception as error:
            # The objective is the caller's: next to θ it may raise anything, such as for a value
            # that is not finite or a matrix that is not positive definite there.
            raise _OutsideDomainError from error

    def graph(self) -> Tensor:
        """The value, or that of the first batch, with its graph."""
        objective = self._objective
        if isinstance(objective, Averaged):
            _, objective = next(objective.parts())
        found: Tensor = self._evaluated(
            lambda f, theta, phi, name, state: evaluate(f, theta, phi, state, name),
            self.theta,
            self.phi,
            objective,
        )
        return found

    def is_coarse(self) -> bool:
        """Whether a part is computed in half precision, which has no value next to another."""
        coarse = []

        def note(tensor: Tensor) -> Tensor:
            coarse.append(tensor.is_floating_point() and tensor.element_size() < 4)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.graph()
        return any(coarse)


class _OutsideDomainError(Exception):
    """An objective cannot be evaluated next to where the hypergradient was taken."""


@dataclass(frozen=True)
class _Error:
    """How far a difference is from what it should be, at one of several steps.

    Attributes:
        gap: the difference less what it should be, a vector.
        scale: the size of both.
        rounding: how long the gap may be by rounding alone.
    """

    gap: Tree
    scale: float
    rounding: float


class _Line:
    """f along ``θ + ε u`` for a unit vector u."""

    def __init__(self, f: _Displaced, unit: Tree, value: float) -> None:
        self._f = f
        self._unit = unit
        self._value = value
        self._ends: dict[float, tuple[tuple[float, Tree, Tree], tuple[float, Tree, Tree]]] = {}
        self.step = f.rounding ** (1 / 3) * (1.0 + tr.largest(f.theta))

    def product_errors(self, product: Tree, which: Literal["second", "mixed"]) -> Iterator[_Error]:
        index = 1 if which == "second" else 2
        for step in self._steps():
            ahead, behind = (end[index] for end in self._at(step))
            difference = tr.divide(tr.subtract(tr.at_least_float32(ahead), behind), 2.0 * step)
            sizes = tr.norm(ahead) + tr.norm(behind)
            yield _Error(
                tr.subtract(difference, product),
                max(tr.norm(difference), tr.norm(product)),
                _ROUNDINGS * self._f.rounding * sizes / (2.0 * step),
            )

    def slope_errors(self) -> Iterator[_Error]:
        for step in self._steps():
            (high, *_), (low, *_) = self._at(step)
            before, after = self._slopes(step)
            norms = [tr.norm(grad) for _, grad, _ in self._at(step)]
            yield _Error(
                _scalar((high - low) / (2.0 * step) - (before + after) / 2.0),
                sum(norms) / 2.0,
                self._value_rounding(high, low) / (2.0 * step),
            )

    def curvature_errors(self, parts: tuple[float, ...] = (1.0, *_SHORTER)) -> Iterator[_Error]:
        for step in self._steps(parts):
            (high, *_), (low, *_) = self._at(step)
            before, after = self._slopes(step)
            bend = (after - before) / (2.0 * step)
            yield _Error(
                _scalar((high - 2.0 * self._value + low) / step**2 - bend),
                abs(bend),
                2.0 * self._value_rounding(high, low) / step**2,
            )

    def outer_slope_errors(self, mixed: Tree) -> Iterator[_Error]:
        """Of ``∂_φ f`` along the mixed product, by values."""
        length = tr.norm(mixed)
        if length == 0.0:
            return
        f, along = self._f, tr.cast_like(tr.divide(mixed, length), self._f.phi)
        # Their mean is the gradient at θ but for the square of the step: good enough at first.
        grads = tr.scale(tr.add(*(tr.at_least_float32(end[2]) for end in self._at(self.step))), 0.5)
        for turn, (step, central) in enumerate(_value_steps(f)):
            if turn == 1:
                grads = tr.at_least_float32(f.gradients(f.theta)[2])
            high = f.value(f.theta, tr.add(f.phi, along, step))
            low = f.value(f.theta, tr.add(f.phi, along, -step)) if central else self._value
            width = 2.0 * step if central else step
            yield _Error(
                _scalar((high - low) / width - float(tr.dot(grads, along))),
                tr.norm(grads),
                self._value_rounding(high, low) / width,
            )

    def _steps(self, parts: tuple[float, ...] = (1.0, *_SHORTER)) -> Iterator[float]:
        return (part * self.step for part in parts)

    def _at(self, step: float) -> tuple[tuple[float, Tree, Tree], tuple[float, Tree, Tree]]:
        if step not in self._ends:
            places = (self._moved(step), self._moved(-step))
            ahead, behind = map(self._f.gradients, places)
            self._ends[step] = ahead, behind
        return self._ends[step]

    def _moved(self, step: float) -> Tree:
        theta = self._f.theta
        return tr.add(theta, tr.cast_like(self._unit, theta), step)

    def _slopes(self, step: float) -> tuple[float, float]:
        ahead, behind = self._at(step)
        return float(tr.dot(behind[1], self._unit)), float(tr.dot(ahead[1], self._unit))

    def _value_rounding(self, *values: float) -> float:
        largest = max(abs(self._value), *map(abs, values))
        return _ROUNDINGS * self._f.rounding * largest


def _gradient_errors(g: _Displaced, start: float, grads: tuple[Tree, Tree]) -> Iterator[_Error]:
    """Of the gradient of g along itself."""
    length = tr.norm(grads)
    if length == 0.0:
        return
    theta, phi = tr.cast_like(tr.divide(grads, length), (g.theta, g.phi))
    for step, central in _value_steps(g):
        high = g.value(tr.add(g.theta, theta, step), tr.add(g.phi, phi, step))
        low = start
        if central:
            low = g.value(tr.add(g.theta, theta, -step), tr.add(g.phi, phi, -step))
        width = 2.0 * step if central else step
        noise = _ROUNDINGS * g.rounding * max(abs(high), abs(low))
        yield _Error(_scalar((high - low) / width - length), length, noise / width)


def _value_steps(f: _Displaced) -> Iterator[tuple[float, bool]]:
    """Steps for differences of values, and whether they are central.

    Longer and longer, since values lose more to rounding than gradients do.
    """
    size = 1.0 + tr.largest((f.theta, f.phi))
    if f.rounding < _FINE:
        yield math.sqrt(f.rounding) * size, False
    for part in (1.0, *_LONGER, *_SHORTER):
        yield part * f.rounding ** (1 / 3) * size, True


def _judged(
    errors: Iterator[_Error], tolerance: float, *, resolve: bool = True
) -> tuple[Verdict, float | None]:
    """The verdict on one derivative, and its relative error.

    The first error within the tolerance passes. Two in a row that agree outside of it fail.

    Args:
        errors: at several steps; no more of them are computed than the verdict takes.
        tolerance: of the relative error.
        resolve: whether to go on where rounding hides the derivative; else it passes unmeasured.
    """
    last: Tree = None
    smallest: float | None = None
    try:
        for error in errors:
            gap = tr.norm(error.gap)
            relative = gap / error.scale if error.scale else math.inf
            resolved = error.rounding <= _RESOLVED * error.scale
            if gap <= tolerance * error.scale + error.rounding:
                if resolved or gap == 0.0:
                    return Verdict.PASSED, relative if gap else 0.0
                if not resolve:
                    return Verdict.PASSED, None
            material = gap > 2.0 * error.rounding and relative > _MATERIAL * tolerance
            agree = last is not None and tr.norm(tr.subtract(last, error.gap)) <= _CLOSER * gap
            if agree and material:
                return Verdict.FAILED, relative
            last = error.gap
            if resolved:
                smallest = relative if smallest is None else min(smallest, relative)
    except _OutsideDomainError:
        return Verdict.INCONCLUSIVE, None
    if last is None:
        return Verdict.PASSED, None
    close = smallest is not None and smallest <= _CLOSE_ENOUGH * tolerance
    return (Verdict.PASSED if close else Verdict.INCONCLUSIVE), smallest


def _only_kinks(failed: list[str], f: _Displaced) -> bool:
    """Whether kinks explain wrong second derivatives.

    The steps of float32 cross so many kinks that the differences may agree with each other: they
    are then the curvature of the mean over the data, which second derivatives leave out.
    """
    if not {"second", "mixed"}.issuperset(failed) or f.rounding < _FINE:
        return False
    value = f.graph()
    return has_kinks(value) and not custom_functions(value)


def _not_failed(verdict: Verdict) -> Verdict:
    return Verdict.INCONCLUSIVE if verdict is Verdict.FAILED else verdict


_ORDER = [Verdict.PASSED, Verdict.INCONCLUSIVE, Verdict.FAILED]


def _worst(*judged: tuple[Verdict, float | None]) -> tuple[Verdict, float | None]:
    """The worst verdict, and its largest error."""
    worst = max((verdict for verdict, _ in judged), key=_ORDER.index)
    return worst, max(
        (e for verdict, e in judged if verdict is worst and e is not None), default=None
    )


def _scalar(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)
