"""The cost of Hessian products, of blocks of them and of a whole hypergradient, in gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, jvp

import hypergrad as hg
from benchmarks.timing import median_seconds
from benchmarks.workloads import Params, Workload
from hypergrad.verification.verification import Verify

MODES: tuple[hg.operators.Mode, ...] = ("reverse", "forward", "finite-difference")
CG_ITERATIONS = 20
BLOCK = 10


@dataclass(frozen=True)
class Cost:
    """What one workload costs.

    Attributes:
        name: of the workload.
        gradient_ms: one value and gradient of the inner objective.
        products: gradients a Hessian product, by mode, and for ``jvp(grad)`` traced afresh.
        block: gradients a vector of a block of 10, by chunk size.
        hypergradient_ms: one with 20 iterations of CG.
        hypergradient_ratio: its time by that of 21 products and 3 gradients.
        verified_ratio: the time of one that verifies its derivatives by that of one that does not.
        damping: used for it.
    """

    name: str
    gradient_ms: float
    products: dict[str, float]
    block: dict[str, float]
    hypergradient_ms: float
    hypergradient_ratio: float
    verified_ratio: float
    damping: float


def measure(workload: Workload, repeats: int) -> Cost:
    """Measure one workload, all pieces of work alternately."""
    theta = {key: value.clone().requires_grad_() for key, value in workload.params.items()}
    phi = workload.hparams
    generator = torch.Generator().manual_seed(1)
    v = {key: torch.randn(t.shape, generator=generator) for key, t in workload.params.items()}
    block = {key: torch.stack([t] * BLOCK) for key, t in v.items()}
    operators = {
        mode: hg.operators.hessian(workload.inner, workload.params, phi, mode=mode)
        for mode in MODES
    }
    reverse = operators["reverse"]
    solver = hg.CG(rtol=0.0, maxiter=CG_ITERATIONS)

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(workload.inner(theta, phi), list(theta.values()))

    def traced_afresh() -> Params:
        inner_gradient = grad(lambda w: workload.inner(w, phi))
        return jvp(inner_gradient, (workload.params,), (v,))[1]

    def hypergradient(verify: Verify) -> hg.Hypergradient:
        return hg.hypergradient(
            workload.inner,
            workload.outer,
            workload.params,
            phi,
            method=hg.Implicit(solver, damping=workload.damping),
            on_failure="ignore",
            verify=verify,
        )

    solve = hypergradient("always").solve
    if solve.iterations != CG_ITERATIONS:
        raise RuntimeError(f"{workload.name}: CG stopped before its budget: {solve}")
    seconds = median_seconds(
        {
            "gradient": gradient,
            **{mode: partial(A.matvec, v) for mode, A in operators.items()},
            "jvp(grad), afresh": traced_afresh,
            "default": lambda: reverse.matmat(block),
            "1": lambda: reverse.matmat(block, chunk_size=1),
            "10": lambda: reverse.matmat(block, chunk_size=10),
            "hypergradient": partial(hypergradient, "never"),
            "verified": partial(hypergradient, "always"),
        },
        repeats,
    )
    unit = seconds["gradient"]
    budget = (1 + CG_ITERATIONS) * seconds["reverse"] + 3 * unit
    return Cost(
        name=workload.name,
        gradient_ms=1e3 * unit,
        products={name: seconds[name] / unit for name in (*MODES, "jvp(grad), afresh")},
        block={size: seconds[size] / BLOCK / unit for size in ("default", "1", "10")},
        hypergradient_ms=1e3 * seconds["hypergradient"],
        hypergradient_ratio=seconds["hypergradient"] / budget,
        verified_ratio=seconds["verified"] / seconds["hypergradient"],
        damping=workload.damping,
    )
