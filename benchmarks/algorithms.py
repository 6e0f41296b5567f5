"""Outer loss against time and gradients for every bilevel algorithm, on two known problems.

``python -m benchmarks.algorithms`` prints a table for each problem and saves a picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.bilevel_problems import BilevelProblem, quadratic, weight_decay
from benchmarks.plans import PLANS, Plan
from benchmarks.timing import machine, one_thread

PROBLEMS = {"quadratic": quadratic, "weight decay": weight_decay}
LEVELS = (0.1, 0.01)
COLOURS = 7
"""Of the picture; the rest of the algorithms has them again, dashed."""


@dataclass(frozen=True)
class Course:
    """One run, outer step by outer step.

    Attributes:
        algorithm: its name.
        seconds: up to each step, without what is measured here.
        gradients: calls of f and g and products with second derivatives up to each step, in passes
            over all rows.
        excess: ``g(θ*(φ_k), φ_k) − g*`` after each, as a part of that at φ_0.
        error: distance of the last φ to φ*, as a part of that at φ_0.
        met: whether both are within the bounds of the plan.
    """

    algorithm: str
    seconds: list[float]
    gradients: list[float]
    excess: list[float]
    error: float
    met: bool

    def first(self, level: float) -> int | None:
        """The first step that ends with at most this excess."""
        reached = (k for k, excess in enumerate(self.excess) if excess <= level)
        return next(reached, None)


@one_thread()
def run(algorithm: str, plan: Plan, problem: BilevelProblem) -> Course:
    """Follow a plan to its end."""
    f, g = plan.counted(problem)
    solver = plan.solver(problem, f, g)
    seconds, gradients, hparams, products = [], [], [], 0.0
    for record in solver:
        products += f.share * record.matvecs
        seconds.append(record.seconds)
        gradients.append(f.count + g.count + products)
        hparams.append(solver.hparams.clone())
    excess: list[float] = problem.excess(torch.stack(hparams)).tolist()
    error = problem.error(hparams[-1])
    return Course(
        algorithm,
        list(accumulate(seconds)),
        gradients,
        excess,
        error,
        met=error <= plan.error and excess[-1] <= plan.excess,
    )


def measure(quick: bool = False) -> dict[str, list[Course]]:
    """All algorithms on all problems; ``quick`` makes a few outer steps of each."""
    courses: dict[str, list[Course]] = {name: [] for name in PROBLEMS}
    pairs = [(name, algorithm) for name in PROBLEMS for algorithm in PLANS]
    # What is built at first use is no algorithm's fault.
    for name, make in PROBLEMS.items():
        run("CG", replace(PLANS["CG"][name], outer_steps=3), make())
    for name, algorithm in tqdm(pairs, desc="algorithms", leave=False):
        plan = PLANS[algorithm][name]
        if quick:
            plan = replace(plan, outer_steps=5)
        courses[name].append(run(algorithm, plan, PROBLEMS[name]()))
    return courses


def print_courses(courses: dict[str, list[Course]]) -> None:
    """Print a table for each problem."""
    print("\n## Bilevel algorithms: seconds and gradients to a share of the first excess of g\n")
    print("The excess is g(θ*(φ), φ) − g*; the error is ‖φ − φ*‖ by that at the start.")
    print("Gradients: calls of f and g and products with second derivatives, a mini-batch in part.")
    for name, rows in courses.items():
        heads = [f"{level:.0%}, s | {level:.0%}, gradients" for level in LEVELS]
        print(f"\n{name}:\n")
        print(f"| algorithm | {' | '.join(heads)} | outer steps | error of φ | bound | met |")
        print(f"| --- |{' ---: |' * (2 * len(LEVELS) + 3)} --- |")
        for course in rows:
            cells = []
            for level in LEVELS:
                k = course.first(level)
                cells += ["—"] * 2 if k is None else [
                    f"{course.seconds[k]:.3f}", f"{course.gradients[k]:.0f}"
                ]  # fmt: skip
            bound = PLANS[course.algorithm][name].error
            print(
                f"| {course.algorithm} | {' | '.join(cells)} | {len(course.excess)} "
                f"| {course.error:.1e} | {bound:.0e} | {'yes' if course.met else 'no'} |"
            )


def draw(courses: dict[str, list[Course]], path: Path) -> None:
    """Save the excess against seconds and against gradients, a row of axes for each problem."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    axes = figure.subplots(len(courses), 2, squeeze=False, sharey=True)
    for row, (name, runs) in zip(axes, courses.items(), strict=True):
        for number, course in enumerate(runs):
            style = {
                "color": f"C{number % COLOURS}",
                "linestyle": "-" if number < COLOURS else "--",
                "label": course.algorithm,
                "linewidth": 0.7 if PLANS[course.algorithm][name].stochastic else 1.5,
            }
            row[0].plot(course.seconds, course.excess, **style)
            row[1].plot(course.gradients, course.excess, **style)
        for ax, unit in zip(row, ("seconds", "gradients and products"), strict=True):
            ax.set(xscale="log", yscale="log", ylim=(1e-8, 5.0), xlabel=unit, title=name)
            ax.set_ylabel("excess of g, of that at the start")
            ax.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\npicture: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run every algorithm, print the tables and draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.algorithms", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="five outer steps of each")
    default = Path(__file__).parent.parent / "examples" / "figures" / "algorithms.png"
    parser.add_argument("--output", type=Path, default=default, help="the picture")
    options = parser.parse_args(argv)
    print(machine())
    courses = measure(options.quick)
    print_courses(courses)
    draw(courses, options.output)


if __name__ == "__main__":
    main()
