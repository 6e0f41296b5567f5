"""What ``check`` reports: measurements, findings, a recommendation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from hypergrad.linsolve import Extremes, Status
from hypergrad.verification.verification import Verification


class Finding(Enum):
    """What ``check`` found wrong. The value is a sentence that says what to do."""

    NOT_STATIONARY = (
        "params are not at a stationary point of the inner objective: train it longer, or expect "
        "the hypergradient of a different point"
    )
    NEGATIVE_CURVATURE = (
        "the inner objective curves downwards along some direction, so that params are no minimum: "
        "leave damping='auto', or use curvature= a GaussNewton operator, or train longer"
    )
    SINGULAR = (
        "the inner objective is flat along some direction, so that its minimiser is not unique: "
        "regularise it, or use damping"
    )
    ILL_CONDITIONED = (
        "the curvature differs by more than 1e5 between directions: expect many iterations; use a "
        "NystromPreconditioner, or damping, or float64"
    )
    SOLVERS_DISAGREE = (
        "solvers that claim convergence give different hypergradients: tighten rtol, or use float64"
    )
    FINITE_DIFFERENCES_DISAGREE = (
        "the hypergradient is not the slope of the outer objective along re-solved inner problems: "
        "params are not the minimiser, or an objective is not smooth or detaches something"
    )
    UNROLLED_DISAGREES = (
        "the unrolled hypergradient is not the slope of the outer objective along whole runs: the "
        "steps are chaotic (lower the rate, or fewer steps), an objective is not smooth or "
        "detaches something, or the method is an estimate by choice"
    )
    FINITE_DIFFERENCES_FAILED = (
        "the inner problem could not be solved again next to hparams, so that the hypergradient "
        "was not compared with finite differences"
    )
    DERIVATIVE_WRONG = (
        "a derivative of an objective is not what differences of a lower one say: see verification "
        "for which, and mend it, or use mode='finite-difference' if second derivatives alone are "
        "wrong"
    )
    UNUSED_HPARAMS = (
        "no gradient of either objective reaches some of hparams: compute with the argument, "
        "without detach(), .item() or float(), or leave them out"
    )
    CLOSED_OVER = (
        "an objective computes with a tensor of params or hparams that it closes over, which is a "
        "constant to every derivative: use its arguments"
    )
    SWAPPED = (
        "params are at a stationary point of the outer objective and not of the inner one: "
        "are the two in the right order, check(inner, outer, ...)?"
    )
    ZERO_HYPERGRADIENT = (
        "the hypergradient is zero: neither objective depends on hparams, or something detaches"
    )


@dataclass(frozen=True)
class Trial:
    """One solver on the problem.

    Attributes:
        difference: of its hypergradient to the reference's, relative.
        status: how its solve ended.
        iterations: how many it took.
        matvecs: how many products it took.
    """

    difference: float
    status: Status
    iterations: int
    matvecs: int


@dataclass(frozen=True)
class Report:
    """What ``check`` measured, and what it makes of it; prints as a table.

    Attributes:
        size: the number of inner parameters.
        outer_size: the number of outer parameters.
        inner_grad_norm: ``‖∇_θ f‖``.
        newton_step: ``‖H⁻¹ ∇_θ f‖ / ‖θ‖``: how far from stationary, as a part of θ.
        eigenvalues: the ends of the spectrum of H, by Lanczos.
        damping: what the reference solve needed.
        gradient_seconds: one value and gradient of the inner objective.
        matvec_seconds: one product with H.
        reference: the solver that the others are compared with.
        trials: the solvers by name.
        slope: the derivative along a random direction in φ by the reference hypergradient.
        slope_by_differences: the same by central differences of ``g(θ*(φ), φ)``; NaN if the inner
            problem could not be solved again.
        verification: whether the derivatives agree with differences, the worst of four directions.
        findings: what is wrong; empty if nothing is.
        recommendation: a sentence: which method and settings to use.
        unused: the outer parameters that no gradient reaches.
        closed_over: tensors of the caller's that an objective uses in place of its arguments.
    """

    size: int
    outer_size: int
    inner_grad_norm: float
    newton_step: float
    eigenvalues: Extremes
    damping: float
    gradient_seconds: float
    matvec_seconds: float
    reference: str
    trials: dict[str, Trial]
    slope: float
    slope_by_differences: float
    verification: Verification
    findings: tuple[Finding, ...]
    recommendation: str
    unused: tuple[str, ...] = ()
    closed_over: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def condition(self) -> float:
        """``max|λ| / |λ_min|``, as far as Lanczos saw."""
        smallest = abs(self.eigenvalues.smallest)
        return self.eigenvalues.magnitude / smallest if smallest > 0.0 else math.inf

    def __str__(self) -> str:
        ends = self.eigenvalues
        rows = [
            ("inner / outer parameters", f"{self.size} / {self.outer_size}"),
            ("inner gradient norm", f"{self.inner_grad_norm:.2e}"),
            ("Newton step, part of params", f"{self.newton_step:.2e}"),
            ("eigenvalues of H", f"{ends.smallest:.3g} … {ends.largest:.3g}"),
            ("condition number", f"{self.condition:.3g}"),
            ("damping of the reference", f"{self.damping:.3g}"),
            ("gradient", f"{1e3 * self.gradient_seconds:.3g} ms"),
            (
                "Hessian product",
                f"{1e3 * self.matvec_seconds:.3g} ms, "
                f"{self.matvec_seconds / self.gradient_seconds:.2f} gradients",
            ),
            ("slope by hypergradient", f"{self.slope:.6g}"),
            ("slope by differences", f"{self.slope_by_differences:.6g}"),
            ("derivatives", str(self.verification)),
        ]
        if self.unused:
            rows.append(("unused", ", ".join(self.unused)))
        if self.closed_over:
            rows.append(("closed over", ", ".join(self.closed_over)))
        for name, trial in self.trials.items():
            rows.append(
                (
                    name,
                    f"{trial.difference:.1e} from {self.reference}, {trial.iterations} iterations, "
                    f"{trial.matvecs} products, {trial.status.name}",
                )
            )
        return _table(rows, self.findings, self.recommendation)


@dataclass(frozen=True)
class UnrolledReport:
    """What ``check`` measured of an unrolled hypergradient; prints as a table.

    Attributes:
        outer_size: the number of outer parameters.
        steps: how many were differentiated.
        outer_value: g after them.
        slope: the derivative along a random direction in φ by the hypergradient.
        slope_by_differences: the same by central differences of whole runs of the optimiser.
        verification: whether the derivatives agree with differences where the steps begin.
        findings: what is wrong; empty if nothing is.
        recommendation: a sentence: what to do.
    """

    outer_size: int
    steps: int
    outer_value: float
    slope: float
    slope_by_differences: float
    verification: Verification
    findings: tuple[Finding, ...]
    recommendation: str

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        rows = [
            ("outer parameters", f"{self.outer_size}"),
            ("steps", f"{self.steps}"),
            ("outer value after them", f"{self.outer_value:.6g}"),
            ("slope by hypergradient", f"{self.slope:.6g}"),
            ("slope by differences of runs", f"{self.slope_by_differences:.6g}"),
            ("derivatives", str(self.verification)),
        ]
        return _table(rows, self.findings, self.recommendation)


def _table(
    rows: Sequence[tuple[str, str]], findings: Sequence[Finding], recommendation: str
) -> str:
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += [f"! {finding.name}: {finding.value}" for finding in findings]
    return "\n".join([*lines, f"> {recommendation}"])
