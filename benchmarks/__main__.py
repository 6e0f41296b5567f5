"""What hypergrad costs on this machine: ``make bench``, or ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from benchmarks.algorithms import measure as measure_algorithms
from benchmarks.algorithms import print_courses
from benchmarks.convergence import MOST, RANKS, TARGETS, Convergence
from benchmarks.convergence import measure as measure_convergence
from benchmarks.cost import CG_ITERATIONS, MODES, Cost, measure
from benchmarks.digits import Problem, network
from benchmarks.digits import logistic as digits_logistic
from benchmarks.loop import REPEATS, print_overhead
from benchmarks.loop import measure as measure_loop
from benchmarks.processes import Memory, import_ratio, nystrom_memory
from benchmarks.ranks import REPEATS as RANK_REPEATS
from benchmarks.ranks import measure as measure_ranks
from benchmarks.ranks import print_cost
from benchmarks.timing import machine
from benchmarks.unrolling import COUNTS, PEERS, Unrolling, copies_a_step
from benchmarks.unrolling import measure as measure_unrolling
from benchmarks.workloads import cnn, logistic, mlp

MATVEC_GOAL = 1.6
HYPERGRADIENT_GOAL = 1.15
VERIFIED_GOAL = 1.10
IMPORT_GOAL = 1.10
WORK_GOAL = 0.5
TIME_GOAL = 1.2
CHUNK_SIZE = 5
GROWTH_GOAL = 1.2
RECOMPUTE_GOAL = 1.6
PEER_MEMORY_GOAL = 0.2


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything and print it as Markdown tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, few repeats")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args(argv)
    repeats = 3 if options.quick else 15

    print(f"{machine()}\n\nMedians of {repeats} alternating runs; a unit is one gradient of f.")
    progress = tqdm([mlp, cnn, logistic], desc="products", leave=False)
    costs = [measure(make(options.quick), repeats) for make in progress]
    print_costs(costs)
    extent = (1, (10,), 32) if options.quick else (9, RANKS, MOST)
    convergences = [
        measure_convergence(problem, *extent)
        for problem in tqdm(_problems(options.quick), desc="convergence", leave=False)
    ]
    print_convergence(convergences)
    counts = (2, 4) if options.quick else COUNTS
    unrollings = measure_unrolling(counts, repeats, options.quick)
    print_unrolling(unrollings, options.quick)
    seconds, ratio = import_ratio(3 if options.quick else 9)
    print("\n## Import\n")
    print(f"`import torch` {seconds:.2f} s; with `import hypergrad` × {ratio:.3f}", end="")
    print(f" (goal ≤ {IMPORT_GOAL}: {verdict(ratio, IMPORT_GOAL)})")
    ranks = (2, 4) if options.quick else (5, 20, 50)
    memory = nystrom_memory(ranks, CHUNK_SIZE, options.quick)
    print_memory(memory)
    overhead = measure_loop(3 if options.quick else REPEATS, options.quick)
    print_overhead(overhead)
    rank_cost = measure_ranks(3 if options.quick else RANK_REPEATS, options.quick)
    print_cost(rank_cost)
    courses = measure_algorithms(options.quick)
    print_courses(courses)
    if options.json is not None:
        figures = {
            "machine": machine(),
            "costs": [asdict(cost) for cost in costs],
            "convergence": [asdict(convergence) for convergence in convergences],
            "unrolling": [asdict(row) for row in unrollings],
            "import_ratio": ratio,
            "memory": [asdict(row) for row in memory],
            "loop": asdict(overhead),
            "ranks": asdict(rank_cost),
            "algorithms": {name: [asdict(row) for row in rows] for name, rows in courses.items()},
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def print_costs(costs: list[Cost]) -> None:
    """Print the tables of products, blocks and whole hypergradients."""
    names = [*MODES, "jvp(grad), afresh"]
    print("\n## One Hessian product, in gradients\n")
    print(f"| workload | gradient, ms | {' | '.join(names)} | goal for reverse ≤ {MATVEC_GOAL} |")
    print(f"| --- | ---: | {'---: | ' * len(names)}--- |")
    for cost in costs:
        figures = " | ".join(f"{cost.products[name]:.2f}" for name in names)
        met = verdict(cost.products["reverse"], MATVEC_GOAL)
        print(f"| {cost.name} | {cost.gradient_ms:.1f} | {figures} | {met} |")

    print("\n## A block of 10 products (reverse), in gradients a vector\n")
    print("| workload | default chunk size | one at a time | all at once |")
    print("| --- | ---: | ---: | ---: |")
    for cost in costs:
        figures = " | ".join(f"{cost.block[size]:.2f}" for size in ("default", "1", "10"))
        print(f"| {cost.name} | {figures} |")

    print(f"\n## A hypergradient with {CG_ITERATIONS} iterations of CG\n")
    budget = f"{1 + CG_ITERATIONS} products + 3 gradients"
    print(
        f"| workload | damping | ms | by {budget} | goal ≤ {HYPERGRADIENT_GOAL} "
        f"| with verification | goal ≤ {VERIFIED_GOAL} |"
    )
    print("| --- | ---: | ---: | ---: | --- | ---: | --- |")
    for cost in costs:
        met = verdict(cost.hypergradient_ratio, HYPERGRADIENT_GOAL)
        print(
            f"| {cost.name} | {cost.damping} | {cost.hypergradient_ms:.0f} "
            f"| {cost.hypergradient_ratio:.3f} | {met} "
            f"| × {cost.verified_ratio:.3f} | {verdict(cost.verified_ratio, VERIFIED_GOAL)} |"
        )


def print_convergence(convergences: list[Convergence]) -> None:
    """Print the tables of work and time to an error, and what became of the goals."""
    print("\n## Work and time to a relative error of the hypergradient, on the digits\n")
    print("Products with the operator and milliseconds, at the smallest budget that reaches it.")
    print("The reference is Dense, for as many products as there are parameters.")
    for convergence in convergences:
        print(f"\n{convergence.name}:\n")
        print(f"| solver | {' | '.join(f'{target:g}' for target in TARGETS)} |")
        print(f"| --- |{' ---: |' * len(TARGETS)}")
        for name, efforts in convergence.efforts.items():
            cells = [
                "not reached"
                if efforts[target].matvecs is None
                else f"{efforts[target].matvecs}, {efforts[target].milliseconds:.1f} ms"
                for target in TARGETS
            ]
            print(f"| {name} | {' | '.join(cells)} |")
        work, duration = convergence.work_ratio(), convergence.time_ratio()
        print(
            f"\n{convergence.best_kept()} by CG at 1e-2: products × {work:.2f} "
            f"(goal ≤ {WORK_GOAL} for L2 ≤ 1e-3: {verdict(work, WORK_GOAL)}), "
            f"time × {duration:.2f} (goal ≤ {TIME_GOAL}: {verdict(duration, TIME_GOAL)})"
        )


def _problems(quick: bool) -> list[Problem]:
    if quick:
        return [digits_logistic(1e-2), network(2)]
    return [*map(digits_logistic, (1e-2, 1e-3, 1e-4)), network(32)]


def print_unrolling(rows: list[Unrolling], quick: bool) -> None:
    """Print time and peak memory by method and number of steps, and what became of the goals."""
    counts = list(rows[0].seconds)
    print("\n## Unrolled SGD with momentum: 64-256-256-10, batch 2048, seconds and peak MiB\n")
    heads = [f"{steps} steps, s" for steps in counts] + [f"{steps}, MiB" for steps in counts]
    print(f"| method | {' | '.join(heads)} |")
    print(f"| --- |{' ---: |' * len(heads)}")
    for row in rows:
        times = [f"{row.seconds[n]:.2f}" if n in row.seconds else "not run" for n in counts]
        peaks = [f"{row.mebibytes[n]:.0f}" if row.mebibytes else "not measured" for n in counts]
        print(f"| {row.method} | {' | '.join(times + peaks)} |")
    by_name = {row.method: row for row in rows}
    graph, recompute = by_name["graph"], by_name["recompute"]
    peers = [row for row in rows if row.method in PEERS]
    last = counts[-1]
    ratio, checkpoint = (
        by_name[mode].seconds[last] / graph.seconds[last] for mode in ("recompute", "checkpoint")
    )
    print(
        f"\nrecompute by graph at {last} steps: time × {ratio:.2f} "
        f"(goal ≤ {RECOMPUTE_GOAL}: {verdict(ratio, RECOMPUTE_GOAL)}); "
        f"checkpoint by graph: time × {checkpoint:.2f}"
    )
    if recompute.mebibytes:
        growth = copies_a_step(recompute, quick)
        print(
            f"recompute grows by {growth:.2f} copies of parameters and momentum a step "
            f"(goal ≤ {GROWTH_GOAL}: {verdict(growth, GROWTH_GOAL)})"
        )
    if not peers:
        print(f"Peers that are not installed: {', '.join(PEERS)} (pip install '.[peers]')")
        return
    for steps in counts:
        fastest = min(peers, key=lambda row, n=steps: row.seconds[n])  # type: ignore[misc]
        against = graph.seconds[steps] / fastest.seconds[steps]
        print(
            f"graph by the fastest peer at {steps} steps, {fastest.method}: time × {against:.2f} "
            f"(goal ≤ 1: {verdict(against, 1.0)})"
        )
    if recompute.mebibytes:
        least = min(row.mebibytes[last] for row in peers)
        part = recompute.mebibytes[last] / least
        print(
            f"recompute by the least memory of a peer at {last} steps: × {part:.2f} "
            f"(goal ≤ {PEER_MEMORY_GOAL}: {verdict(part, PEER_MEMORY_GOAL)})"
        )


def print_memory(rows: list[Memory]) -> None:
    """Print the table of peaks."""
    print("\n## Peak memory of a Nyström hypergradient of the MLP, above the process before it\n")
    if not rows:
        print("Not measured: it takes Linux's /proc.")
        return
    print("| rank | chunk size | MiB | copies of the parameters |")
    print("| ---: | ---: | ---: | ---: |")
    for row in rows:
        chunk = "all" if row.chunk_size is None else row.chunk_size
        print(
            f"| {row.rank} | {chunk} | {row.mebibytes:.0f} | {row.copies_of_the_parameters:.1f} |"
        )


def verdict(figure: float, goal: float) -> str:
    """Whether a figure meets its goal, in a word."""
    return "met" if figure <= goal else "missed"


if __name__ == "__main__":
    main()
