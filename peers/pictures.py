"""Three pictures: time against error, memory against steps, growth with its exponents."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peers.environments import BY_NAME, OURS, PEERS

COLOURS = {peer.name: f"C{number}" for number, peer in enumerate(PEERS)}
MARKERS = {
    "cg": "o",
    "compiled cg": "D",
    "neumann": "s",
    "nystrom": "^",
    "minres": "v",
    "dense": "*",
}
STYLES = ("-", "--", ":", "-.")


def draw(curves: dict[str, Any], folder: Path) -> list[Path]:
    """Save a picture of each kind of curve that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for key, name, make in (
        ("time against error", "peers_error", time_against_error),
        ("memory", "peers_memory", memory_against_steps),
        ("growth", "peers_growth", growth),
        ("whole run", "peers_whole_run", whole_run),
    ):
        if curves.get(key):
            paths.append(folder / f"{name}.png")
            make(curves[key]).savefig(paths[-1], dpi=120)
    return paths


def time_against_error(points: dict[str, list[dict[str, Any]]]) -> Figure:
    """The grid of (c): a line a method of a peer, a point a budget."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, found in points.items():
        families = dict.fromkeys(point["family"] for point in found)
        for number, family in enumerate(families):
            line = [p for p in found if p["family"] == family and p["error"] is not None]
            axes.plot(
                [1e3 * p["seconds"] for p in line], [min(p["error"], 10.0) for p in line],
                color=COLOURS[name], marker=MARKERS.get(family, "."), markersize=5,
                linestyle=STYLES[number % len(STYLES)], linewidth=1,
                label=f"{BY_NAME[name].title}: {family}",
            )  # fmt: skip
    axes.axhline(1e-2, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="milliseconds of a hypergradient")
    axes.set_ylabel("relative error (above 10: drawn at 10)")
    axes.set_title("Logistic regression on the digits: up to the target of 0.01")
    _legend(figure)
    return figure


def memory_against_steps(found: dict[str, Any]) -> Figure:
    """A panel a batch size."""
    batches = found["batches"]
    figure = Figure(figsize=(3.2 * len(batches) + 2, 4.5), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        for number, (title, columns) in enumerate(found["peaks"].items()):
            known = [
                (n, peak)
                for n, peak in zip(found["steps"], columns[str(batch)], strict=True)
                if peak is not None
            ]
            # A peer keeps what graph mode keeps: dashed, so that both are seen.
            style = "-" if title.startswith(BY_NAME[OURS].title) else "--"
            axes.plot(
                *zip(*known, strict=True), marker="o", color=f"C{number}", label=title, ls=style
            )
        axes.set(xscale="log", yscale="log", xlabel="steps", title=f"batch {batch}")
    panels[0].set_ylabel("peak memory above idle, MiB")
    _legend(figure, panels[:1])
    return figure


def growth(found: dict[str, Any]) -> Figure:
    """A panel a quantity that grows."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for axes, (quantity, curves) in zip(panels, found.items(), strict=False):
        for name, curve in curves.items():
            slope = curve["exponent"]
            fitted = f", exponent {slope:.2f}" if slope is not None else ""
            axes.plot(
                curve["sizes"], curve["seconds"], marker="o", color=COLOURS[name],
                label=f"{BY_NAME[name].title}{fitted}",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=quantity, ylabel="seconds")
        axes.legend(fontsize=9)
    return figure


def whole_run(found: dict[str, list[tuple[float, float]]]) -> Figure:
    """The validation loss of the best run of each peer."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in found.items():
        seconds, losses = zip(*curve, strict=True)
        axes.plot(seconds, losses, color=COLOURS[name], marker=".", label=BY_NAME[name].title)
    axes.set(xscale="log", xlabel="seconds", ylabel="validation loss")
    axes.set_title("Hyper-cleaning: the best run of each")
    axes.legend(fontsize=9)
    return figure


def _legend(figure: Figure, panels: Iterable[Axes] | None = None) -> None:
    """Beside the panels, each name once."""
    named: dict[str, Any] = {}
    for axes in figure.axes if panels is None else panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(list(named.values()), list(named), loc="outside right upper", fontsize=8)
