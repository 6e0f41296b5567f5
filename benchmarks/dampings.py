"""Fixed dampings and the default one, in loops over networks with negative curvature.

``python -m benchmarks.dampings`` prints the table of ``docs/how_to/damping.md``, and with
``--write`` puts it there. A quarter of an hour.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

import hypergrad as hg
from benchmarks.blocks import ROOT, fill, table
from benchmarks.damping_problems import OUTER_STEPS, PROBLEMS
from benchmarks.timing import one_thread

COMMAND = "python -m benchmarks.dampings"
PAGE = ROOT / "docs" / "how_to" / "damping.md"
GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0)
SEEDS = 2
SOLVER = hg.CG(rtol=1e-2)
LAST = 5
"""Steps of which the outer loss is the mean."""


@dataclass(frozen=True)
class Course:
    """One loop.

    Attributes:
        loss: the outer loss of its last steps.
        products: with second derivatives, in all steps.
        dampings: λ of each step.
        failed: how many solves ended at negative curvature or at none.
        zero: how many hypergradients were zero.
    """

    loss: float
    products: int
    dampings: list[float]
    failed: int
    zero: int


@one_thread()
def run(problem: str, damping: float | Literal["auto"], seed: int) -> Course:
    """Follow a loop to its end."""
    method = hg.Implicit(SOLVER, damping=damping)
    history = PROBLEMS[problem](method, seed).run()
    return Course(
        statistics.fmean(history["outer_loss"][-LAST:]),
        sum(history["matvecs"]),
        history["damping"],
        sum(status in ("NEGATIVE_CURVATURE", "BREAKDOWN") for status in history["status"]),
        sum(norm == 0.0 for norm in history["hypergradient_norm"]),
    )


def text(problems: Sequence[str], grid: Sequence[float], seeds: int) -> str:
    """The table."""
    choices: list[float | Literal["auto"]] = [*grid, "auto"]
    pairs = [(problem, choice) for problem in problems for choice in choices]
    courses = {
        (problem, choice): [run(problem, choice, seed) for seed in range(seeds)]
        for problem, choice in tqdm(pairs, desc="dampings", leave=False)
    }
    rows = []
    for problem in problems:
        loss = {c: statistics.fmean(x.loss for x in courses[problem, c]) for c in choices}
        products = {c: statistics.fmean(x.products for x in courses[problem, c]) for c in choices}
        best = min(grid, key=lambda c: loss[c])
        for choice in choices:
            runs = courses[problem, choice]
            taken = [damping for course in runs for damping in course.dampings]
            rows.append([
                problem,
                f"**{choice}**" if choice in (best, "auto") else f"{choice}",
                f"{loss[choice]:.3f}",
                f"{loss[choice] / loss[best]:.2f}",
                f"{products[choice]:.0f}",
                f"{products[choice] / products[best]:.2f}",
                f"{sum(course.failed for course in runs) / len(taken):.0%}",
                f"{sum(course.zero for course in runs)}",
                f"{min(taken):.2g} … {max(taken):.2g}" if choice == "auto" else "",
            ])  # fmt: skip
    heads = [
        "loop", "damping", "outer loss", "of the best", "products", "of the best's", "failed",
        "zero", "taken",
    ]  # fmt: skip
    return (
        f"{table(heads, rows)}\n\nMeans over {seeds} seeds; outer loss: of the last {LAST} of "
        f"{OUTER_STEPS} outer steps; bold: the best of the fixed ones, and the default; failed: "
        "solves that ended at negative curvature, whose best iterate was used; "
        f"zero: hypergradients that were; solver: `hg.CG(rtol={SOLVER.rtol:g})`; torch "
        f"{torch.__version__}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print, and write if asked."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    parser.add_argument("--quick", action="store_true", help="one loop, one damping, one seed")
    options = parser.parse_args(argv)
    problems = [*PROBLEMS]
    found = text(problems[:1], GRID[2:3], 1) if options.quick else text(problems, GRID, SEEDS)
    print(found)
    if options.write and not options.quick:
        fill(PAGE, COMMAND, found)


if __name__ == "__main__":
    main()
