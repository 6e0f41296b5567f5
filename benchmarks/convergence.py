"""How much work, and how much time, a hypergradient takes to an accuracy, solver by solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import hypergrad as hg
from benchmarks.digits import Problem
from benchmarks.timing import median_seconds

TARGETS = (1e-1, 1e-2, 1e-4)
RANKS = (25, 50, 100)
MOST = 512
"""The largest budget that is tried."""
_SKETCHED, _KEPT = "CG + Nyström", ", kept"

Make = Callable[[int], hg.LinearSolver]
"""A solver for a budget of iterations."""


@dataclass(frozen=True)
class Effort:
    """What a solver takes to reach a relative error of the hypergradient.

    Attributes:
        matvecs: products, a block of k counting k; ``None`` if the error was not reached.
        milliseconds: of the whole hypergradient.
    """

    matvecs: int | None
    milliseconds: float | None


@dataclass(frozen=True)
class Convergence:
    """One problem: the effort of every solver, by target."""

    name: str
    efforts: dict[str, dict[float, Effort]]

    def best_kept(self) -> str:
        """The kept Nyström sketch with the fewest products to 1e-2."""
        sketches = [n for n in self.efforts if n.startswith(_SKETCHED) and n.endswith(_KEPT)]
        return min(sketches, key=lambda name: self.efforts[name][1e-2].matvecs or MOST)

    def work_ratio(self) -> float:
        """Products to 1e-2 with the best kept sketch, by those of plain CG."""
        return _ratio(*(self.efforts[n][1e-2].matvecs for n in (self.best_kept(), "CG")))

    def time_ratio(self) -> float:
        """Time to 1e-2 with the best kept sketch, by that of plain CG."""
        return _ratio(*(self.efforts[n][1e-2].milliseconds for n in (self.best_kept(), "CG")))


def kept(rank: int) -> str:
    """The name of CG with a sketch that an earlier outer step left."""
    return f"{_SKETCHED} {rank}{_KEPT}"


def measure(
    problem: Problem, repeats: int, ranks: tuple[int, ...] = RANKS, most: int = MOST
) -> Convergence:
    """Find each solver's smallest budget for each target, then time them all alternately."""
    makers = _makers(problem, ranks)
    budgets = {
        name: {target: _smallest_budget(problem, make, target, most) for target in TARGETS}
        for name, make in makers.items()
    }
    efforts: dict[str, dict[float, Effort]] = {name: {} for name in makers}
    for target in TARGETS:
        reached = {n: b[target] for n, b in budgets.items() if b[target] is not None}
        work = {
            name: partial(problem.solve, makers[name](budget))
            for name, budget in reached.items()
            if budget is not None
        }
        seconds = median_seconds(work, repeats) if work else {}
        for name in makers:
            if name in seconds:
                matvecs = work[name]().solve.matvecs
                efforts[name][target] = Effort(matvecs, 1e3 * seconds[name])
            else:
                efforts[name][target] = Effort(None, None)
    return Convergence(problem.name, efforts)


def _makers(problem: Problem, ranks: tuple[int, ...]) -> dict[str, Make]:
    largest = hg.linsolve.extreme_eigenvalues(problem.operator(), maxiter=50).largest
    # What the last outer step leaves behind: a sketch at slightly other outer parameters.
    earlier = {k: t + 0.1 for k, t in problem.hparams.items()}
    makers: dict[str, Make] = {"CG": lambda k: hg.CG(rtol=0.0, maxiter=k)}
    for rank in ranks:
        makers[kept(rank)] = _preconditioned(
            problem, earlier, hg.NystromPreconditioner(rank, refresh="never", generator=_seeded())
        )
    fresh = ranks[0]
    makers[f"{_SKETCHED} {fresh}, fresh"] = lambda k: hg.CG(
        rtol=0.0,
        maxiter=k,
        preconditioner=hg.NystromPreconditioner(fresh, refresh="always", generator=_seeded()),
    )
    makers[f"CG + Jacobi 10{_KEPT}"] = _preconditioned(
        problem, earlier, hg.JacobiPreconditioner(10, refresh="never", generator=_seeded())
    )
    makers["MINRES"] = lambda k: hg.MINRES(rtol=0.0, maxiter=k)
    makers["BlockCG"] = lambda k: hg.BlockCG(rtol=0.0, maxiter=k)
    makers["NormalCG"] = lambda k: hg.NormalCG(rtol=0.0, maxiter=k)
    makers["GMRES(100)"] = lambda k: hg.GMRES(rtol=0.0, maxiter=k, restart=100)
    makers["FixedPoint (Anderson 5)"] = lambda k: hg.FixedPoint(
        rtol=0.0, maxiter=k, step=1.0 / largest
    )
    makers["Neumann"] = lambda k: hg.Neumann(terms=k, step=1.0 / largest, rtol=0.0)
    makers["StochasticNeumann"] = lambda k: hg.StochasticNeumann(terms=k, step=1.0 / largest)
    makers["SGDSolve"] = lambda k: hg.SGDSolve(steps=k, step=1.0 / largest, average=False)
    makers["Identity"] = lambda k: hg.Identity(1.0 / largest)
    # Its budget is the rank, and its ρ the smallest curvature there can be.
    lowest = problem.damping + min(float(t.exp().min()) for t in problem.hparams.values())
    size = sum(t.numel() for t in problem.params.values())
    makers["Nyström, ρ = L2"] = lambda k: hg.Nystrom(
        rank=min(k, size), rho=lowest, test="gaussian", generator=_seeded()
    )
    return makers


def _preconditioned(
    problem: Problem, earlier: dict[str, torch.Tensor], preconditioner: hg.Preconditioner
) -> Make:
    problem.solve(hg.CG(maxiter=1, preconditioner=preconditioner), earlier)
    return lambda k: hg.CG(rtol=0.0, maxiter=k, preconditioner=preconditioner)


def _smallest_budget(problem: Problem, make: Make, target: float, most: int) -> int | None:
    """By doubling, then bisection: the error falls with the budget, but for ripples."""

    def reached(budget: int) -> bool:
        return problem.error(problem.solve(make(budget)).grads) <= target

    high = 1
    while not reached(high):
        if high >= most:
            return None
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _ratio(a: float | None, b: float | None) -> float:
    return float("inf") if a is None or b is None else a / b
