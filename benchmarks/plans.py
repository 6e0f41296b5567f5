"""Every bilevel algorithm, tuned by hand for two problems, with the error that it must reach there.

All bounds leave a factor of about two to what the runs do. ``error`` is the distance to φ*, and
``excess`` the outer loss above g*, both as a part of that at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import hypergrad as hg
from benchmarks.bilevel_problems import BATCHES, Batch, BilevelProblem, Loss
from hypergrad.bilevel import DARTS, T1T2, AmIGO, StocBiO
from hypergrad.bilevel.methods.choices import Method
from hypergrad.single_loop import BOME, F2SA, MEHA, SABA, SOBA, VPBGD


@dataclass(frozen=True)
class Plan:
    """How to run an algorithm on one problem, and what it must reach.

    Attributes:
        method: the value of ``method=``.
        lr: of SGD on θ.
        outer_lr: of SGD on φ.
        outer_steps: the budget.
        error: the largest distance to φ* at the end.
        excess: the largest outer loss above g* at the end.
        inner_steps: per outer step.
        stochastic: whether f is sampled in mini-batches; otherwise one batch holds all rows.
        falling: learning rates are those above by √(1 + k / falling) after k outer steps; ``None``
            leaves them.
    """

    method: Method
    lr: float
    outer_lr: float
    outer_steps: int
    error: float
    excess: float
    inner_steps: int = 1
    stochastic: bool = False
    falling: float | None = None

    def counted(self, problem: BilevelProblem) -> tuple[Counted, Counted]:
        """Both objectives, counting."""
        share = 1.0 / BATCHES if self.stochastic else 1.0
        return Counted(problem.inner, share), Counted(problem.outer, share)

    def solver(self, problem: BilevelProblem, f: Loss, g: Loss) -> hg.BilevelSolver:
        """The loop, at its start."""
        theta, phi = problem.params.clone(), problem.hparams.clone()
        inner = torch.optim.SGD([theta], lr=self.lr)
        outer = torch.optim.SGD([phi], lr=self.outer_lr)
        f_batches: Any = [problem.inner_whole]
        g_batches: Any = [problem.outer_whole]
        if self.stochastic:
            f_batches, g_batches = problem.inner_batches, problem.outer_batches
            if not isinstance(self.method, SABA):
                # In a fixed order some batches would always meet the same factor of the series.
                f_batches = DataLoader(f_batches, batch_size=None, shuffle=True)
                g_batches = DataLoader(g_batches, batch_size=None, shuffle=True)
        return hg.BilevelSolver(
            hg.Level(f, theta, inner, f_batches, scheduler=self._schedule(inner, self.inner_steps)),
            hg.Level(g, phi, outer, g_batches, scheduler=self._schedule(outer, 1)),
            method=self.method,
            inner_steps=self.inner_steps,
            outer_steps=self.outer_steps,
            seed=0,
        )

    def _schedule(
        self, optimizer: torch.optim.Optimizer, every: int
    ) -> torch.optim.lr_scheduler.LambdaLR | None:
        falling = self.falling
        if falling is None:
            return None
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1.0 + step // every / falling) ** -0.5
        )


class Counted:
    """An objective that counts its calls.

    Args:
        loss: the objective.
        share: of all rows in a batch: what a call counts.

    Attributes:
        count: calls up to now, in passes over all rows.
    """

    def __init__(self, loss: Loss, share: float) -> None:
        self._loss = loss
        self.share = share
        self.count = 0.0

    def __call__(self, params: Tensor, hparams: Tensor, batch: Batch) -> Tensor:
        """The value."""
        self.count += self.share
        return self._loss(params, hparams, batch)


PLANS: dict[str, dict[str, Plan]] = {
    "CG": {
        "quadratic": Plan(hg.CG(rtol=1e-6), 0.4, 0.5, 30, 1e-5, 1e-10, inner_steps=10),
        "weight decay": Plan(hg.CG(rtol=1e-6), 1.5, 80.0, 30, 1e-5, 1e-10, inner_steps=10),
    },
    # The spectrum falls slowly, so that the rank is the number of parameters.
    "Nyström": {
        "quadratic": Plan(
            hg.Nystrom(5, rho=1e-4, test="orthonormal"), 0.4, 0.5, 30, 1e-4, 1e-8, inner_steps=10
        ),
        "weight decay": Plan(
            hg.Nystrom(31, rho=1e-4, test="orthonormal"), 1.5, 80.0, 30, 1e-3, 1e-6, inner_steps=10
        ),
    },
    "Neumann": {
        "quadratic": Plan(hg.Neumann(terms=10), 0.4, 0.5, 30, 1e-5, 1e-10, inner_steps=10),
        "weight decay": Plan(hg.Neumann(terms=10), 1.5, 80.0, 30, 2e-4, 1e-8, inner_steps=10),
    },
    # Biased by what the steps leave of the inner problem.
    "Unrolled": {
        "quadratic": Plan(hg.Unrolled(), 0.4, 0.5, 30, 2e-3, 1e-6, inner_steps=10),
        "weight decay": Plan(hg.Unrolled(), 2.0, 80.0, 20, 5e-3, 1e-5, inner_steps=20),
    },
    # One scaled gradient stands for the solve: exact only for a Hessian that is a multiple of I.
    "T1T2": {
        "quadratic": Plan(T1T2(lr=1.0), 0.4, 0.5, 30, 0.2, 0.02, inner_steps=10),
        "weight decay": Plan(T1T2(lr=4.0), 1.5, 50.0, 30, 0.5, 0.2, inner_steps=10),
    },
    "DARTS": {
        "quadratic": Plan(DARTS(lr=1.0), 0.4, 0.5, 30, 0.2, 0.02, inner_steps=10),
        "weight decay": Plan(DARTS(lr=4.0), 1.5, 50.0, 30, 0.5, 0.2, inner_steps=10),
    },
    # Noise of mini-batches, which fades as the steps fall.
    "StocBiO": {
        "quadratic": Plan(
            StocBiO(terms=10, step=0.25), 0.2, 0.2, 60, 0.06, 5e-3, 10, True, falling=10.0
        ),
        "weight decay": Plan(
            StocBiO(terms=20, step=1.0), 1.0, 20.0, 60, 0.08, 5e-3, 10, True, falling=10.0
        ),
    },
    "AmIGO": {
        "quadratic": Plan(
            AmIGO(steps=10, step=0.1), 0.2, 0.2, 60, 0.06, 5e-3, 10, True, falling=10.0
        ),
        "weight decay": Plan(
            AmIGO(steps=10, step=0.5), 1.0, 20.0, 60, 0.06, 5e-3, 10, True, falling=10.0
        ),
    },
    "SOBA": {
        "quadratic": Plan(SOBA(), 0.4, 0.05, 250, 1e-5, 1e-9),
        "weight decay": Plan(SOBA(), 1.5, 8.0, 250, 1e-4, 1e-8),
    },
    "SABA": {
        "quadratic": Plan(SABA(), 0.1, 0.05, 350, 1e-4, 1e-8, stochastic=True),
        "weight decay": Plan(SABA(), 0.5, 8.0, 350, 1e-3, 1e-6, stochastic=True),
    },
    # Penalty methods are biased by the inverse of the last penalty, BOME by its step size.
    "F2SA": {
        "quadratic": Plan(F2SA(), 0.4, 0.05, 300, 0.02, 1e-3),
        "weight decay": Plan(F2SA(), 1.5, 8.0, 300, 0.02, 1e-3),
    },
    "BOME": {
        "quadratic": Plan(BOME(lr=0.4), 0.1, 0.1, 300, 0.03, 1e-3, falling=10.0),
        "weight decay": Plan(BOME(lr=2.0, eta=0.2), 0.4, 40.0, 300, 0.06, 2e-3, falling=20.0),
    },
    "VPBGD": {
        "quadratic": Plan(VPBGD(penalty=20.0, inner_steps=5), 0.4, 0.02, 300, 0.06, 2e-3),
        "weight decay": Plan(VPBGD(penalty=10.0), 2.0, 8.0, 300, 0.06, 2e-3),
    },
    "MEHA": {
        "quadratic": Plan(MEHA(lr=0.2, penalty=2.0), 0.4, 0.5, 400, 0.03, 1e-3),
        "weight decay": Plan(MEHA(lr=0.5, power=0.3), 1.0, 300.0, 400, 0.08, 2e-3),
    },
}
"""By the name of the algorithm, then by that of the problem."""
