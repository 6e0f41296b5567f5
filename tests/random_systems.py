"""Random linear systems of every kind, and what a solver's receipt claims that is not so.

python tests/random_systems.py [how many]
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import hypergrad as hg
from hypergrad import Status
from hypergrad.linsolve import AutoDamping
from hypergrad.operators import Matrix

KINDS = (
    "definite", "indefinite", "semidefinite", "singular", "nonsymmetric", "skew", "contraction",
    "graded", "zero",
)  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# As powers of ten, of the matrix and of b; the last few near the ends of float32, and of float64.
SCALES = (0, 0, 0, 3, -3, 15, -15, 30, -30, 37, -37, 150, -150, 300, -300)

RTOL = 1e-5
# Each for a system of n unknowns.
SOLVERS: dict[str, Callable[[int], hg.LinearSolver]] = {
    "cg": lambda n: hg.CG(),
    "cg-cut": lambda n: hg.CG(rtol=None, maxiter=5),
    "cg-nystrom": lambda n: hg.CG(preconditioner=hg.NystromPreconditioner(4)),
    "cg-nystrom-auto": lambda n: hg.CG(preconditioner=hg.NystromPreconditioner("auto")),
    "cg-nystrom-chunked": lambda n: hg.CG(preconditioner=hg.NystromPreconditioner(4, chunk_size=2)),
    "cg-jacobi": lambda n: hg.CG(preconditioner=hg.JacobiPreconditioner(4)),
    "block-cg": lambda n: hg.BlockCG(),
    "minres": lambda n: hg.MINRES(),
    "minres-nystrom": lambda n: hg.MINRES(preconditioner=hg.NystromPreconditioner(4)),
    "minres-jacobi": lambda n: hg.MINRES(preconditioner=hg.JacobiPreconditioner(4)),
    "gmres": lambda n: hg.GMRES(),
    "gmres-restarted": lambda n: hg.GMRES(restart=3),
    "gmres-nystrom": lambda n: hg.GMRES(preconditioner=hg.NystromPreconditioner(4)),
    "normal-cg": lambda n: hg.NormalCG(),
    "fixed-point": lambda n: hg.FixedPoint(maxiter=200),
    "fixed-point-plain": lambda n: hg.FixedPoint(memory=0, maxiter=200),
    "neumann": lambda n: hg.Neumann(),
    "nystrom": lambda n: hg.Nystrom(min(4, n), measure_residual=True),
    "nystrom-auto": lambda n: hg.Nystrom("auto", measure_residual=True),
    "nystrom-chunked": lambda n: hg.Nystrom(min(4, n), chunk_size=2, measure_residual=True),
    "nystrom-gaussian": lambda n: hg.Nystrom(min(4, n), test="gaussian", measure_residual=True),
    "stochastic-neumann": lambda n: hg.StochasticNeumann(measure_residual=True),
    "sgd": lambda n: hg.SGDSolve(measure_residual=True),
    "identity": lambda n: hg.Identity(measure_residual=True),
    "dense": hg.Dense,
}


@dataclass(frozen=True)
class System:
    """``A x = b`` in some dtype, drawn from a seed."""

    kind: str
    matrix: Tensor
    b: Tensor
    seed: int

    def __str__(self) -> str:
        peak = float(self.matrix.abs().max()), float(self.b.abs().max())
        size = len(self.b)
        return (
            f"{self.kind} {size} {self.matrix.dtype} A {peak[0]:.1e} b {peak[1]:.1e} #{self.seed}"
        )


def system(seed: int) -> System:
    """The system of a seed."""
    generator = torch.Generator().manual_seed(seed)

    def choice(options: tuple) -> object:
        return options[int(torch.randint(len(options), (), generator=generator))]

    kind, dtype, n = choice(KINDS), choice(DTYPES), choice((1, 2, 3, 5, 8, 12, 20))
    assert isinstance(kind, str)
    assert isinstance(dtype, torch.dtype)
    assert isinstance(n, int)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    condition = float(torch.rand((), generator=generator)) * choice((1, 4, 9, 14))  # type: ignore[operator]
    values = torch.logspace(-condition, 0, n, dtype=torch.float64)
    Q, P = torch.linalg.qr(draw(n, n))[0], torch.linalg.qr(draw(n, n))[0]
    b = draw(n)
    if kind == "indefinite":
        values[::2] *= -1
    if kind == "semidefinite":
        values[: (n + 1) // 2] = 0.0
    if kind in ("definite", "indefinite", "semidefinite"):
        A = (Q * values) @ Q.T
    elif kind == "singular":
        values[: (n + 1) // 2] = 0.0
        A = (Q * values) @ P.T
    elif kind == "nonsymmetric":
        A = (Q * values) @ P.T
    elif kind == "skew":
        A = draw(n, n)
        A = A - A.T
    elif kind == "contraction":
        M = draw(n, n)
        A = torch.eye(n, dtype=torch.float64) - 0.9 * M / torch.linalg.matrix_norm(M, 2)
    elif kind == "graded":
        rows = 10.0 ** (choice((1, 4, 9)) * torch.rand(n, generator=generator, dtype=torch.float64))  # type: ignore[operator]
        A = (Q * values) @ Q.T * rows[:, None] * rows
    else:
        A = torch.zeros(n, n, dtype=torch.float64)
    if kind in ("definite", "indefinite", "semidefinite", "graded"):
        A = (A + A.T) / 2
    if int(torch.randint(3, (), generator=generator)) == 0:
        b = A @ b  # inside the range of a singular one
    largest = math.log10(torch.finfo(dtype).max)
    scales = tuple(s for s in SCALES if abs(s) < largest + 1)
    A, b = A * 10.0 ** choice(scales), b * 10.0 ** choice(scales)  # type: ignore[operator]
    return System(kind, A.to(dtype), b.to(dtype), seed)


def objections(system: System, name: str) -> list[str]:
    """What is wrong with a solver's answer: an exception, or a claim that is not so."""
    b = system.b.float() if system.b.dtype.itemsize < 4 else system.b
    torch.manual_seed(system.seed)
    solver = SOLVERS[name](len(b))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            operator = Matrix(system.matrix)
            solution = solver.solve(operator, system.b)
            if name in ("cg", "cg-jacobi", "minres", "neumann"):
                auto = AutoDamping()
                for _ in range(2):
                    auto.solve(solver, operator, system.b)
    except Exception as error:
        return [f"{type(error).__name__}: {str(error)[:90]}"]
    wrong = []
    x = solution.x
    if not torch.isfinite(x).all():
        wrong.append(f"{solution.status.name} with an x that is not finite")
    if not bool(torch.isfinite(system.matrix).all() and torch.isfinite(b).all()):
        if solution.status is Status.CONVERGED:
            wrong.append("CONVERGED on a system that is not finite")
        return wrong
    residual, rounding = true_residual(system, x)
    tolerance = RTOL
    if name == "dense":
        tolerance = math.sqrt(torch.finfo(system.b.dtype).eps)
    if solution.status is Status.CONVERGED and residual > 1.01 * tolerance + rounding:
        wrong.append(f"CONVERGED with a residual of {residual:.2e} (rounding {rounding:.1e})")
    said = solution.relative_residual
    if said is not None and abs(residual - said) > 0.1 * residual + rounding:
        wrong.append(f"{solution.status.name} said {said:.2e}, is {residual:.2e} ({rounding:.1e})")
    if solution.status is Status.NEGATIVE_CURVATURE:
        A = system.matrix.double()
        values = torch.linalg.eigvalsh((A + A.T) / 2 / A.abs().max())
        if values[0] > 10 * len(b) * torch.finfo(system.matrix.dtype).eps:
            wrong.append(f"NEGATIVE_CURVATURE with a smallest eigenvalue of {values[0]:.2e}")
    return wrong


def true_residual(system: System, x: Tensor) -> tuple[float, float]:
    """``‖b − A x‖ / ‖b‖`` in float64, and what rounding of one product in A's dtype makes of it."""
    # Units in which nothing over- or underflows.
    A, b = system.matrix.double(), system.b.double()
    unit = b.abs().max().clamp(min=1e-320)
    peak = A.abs().max().clamp(min=1e-320)
    b = b / unit
    if not b.any():
        return float(x.abs().max()), 0.0
    scaled = x.double() / unit * peak if float(peak) >= 1 else x.double() * peak / unit
    norm = torch.linalg.vector_norm(b)
    residual = torch.linalg.vector_norm(b - A / peak @ scaled) / norm
    longest = torch.linalg.vector_norm((A / peak).abs() @ scaled.abs()) / norm
    epsilon = torch.finfo(system.matrix.dtype).eps
    return float(residual), 2 * len(b) * epsilon * (1 + float(longest))


def main(count: int) -> int:
    """Print what is wrong over the first ``count`` systems, by solver."""
    tally: Counter[str] = Counter()
    wrong = 0
    for seed in range(count):
        one = system(seed)
        for name in SOLVERS:
            for words in objections(one, name):
                wrong += 1
                tally[f"{name}: {words.split(' with')[0][:60]}"] += 1
                if wrong <= 400:
                    print(f"{name:20s} {one}: {words}", flush=True)
    for what, times in tally.most_common(40):
        print(f"{times:6d}  {what}")
    print(f"{count} systems, {len(SOLVERS)} solvers: {wrong} objections")
    return wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200) > 0)
