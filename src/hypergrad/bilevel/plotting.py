"""A picture of the history of a loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypergrad.bilevel.history import History
from hypergrad.errors import missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# With more lines than this, colours do not distinguish them.
_NAMED = 10


def plot(history: History, path: Path | str | None = None) -> Figure:
    """Draw both losses, the norms, the linear solves, the outer parameters, and the metrics.

    Panels without data are left out. Losses that fall over more than a decade, and norms and
    residuals that are never zero, have logarithmic axes.

    Args:
        history: ``solver.history``.
        path: where to save the picture, its folder made if need be; ``None`` saves nothing.

    Returns:
        The figure, to be changed or shown.

    Raises:
        TypeError, ValueError: no history, or an empty one.
        ImportError: matplotlib is not installed; ``pip install 'hypergrad[plot]'``.
    """
    if not isinstance(history, History):
        raise TypeError(f"history must be solver.history, got {type(history).__name__}")
    if len(history) == 0:
        raise ValueError("history must have at least one row, got none")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise missing_extra("plot", "plot") from error

    panels = [_losses, _norms, _hparams]
    if "iterations" in history.columns:
        panels.insert(2, _solves)
    if _metrics(history):
        panels.append(_others)
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(11, 3.75 * rows), layout="constrained")
    grid = figure.subplots(rows, 2).flatten()
    for axes, draw in zip(grid, panels, strict=False):
        draw(axes, history)
        axes.grid(alpha=0.3)
        axes.set_xlabel("outer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[len(panels) :]:
        axes.remove()
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    return figure


def _losses(axes: Axes, history: History) -> None:
    names = [
        name
        for name in history.columns
        if name in ("inner_loss", "outer_loss") or name.endswith("/loss")
    ]
    drawn = [_line(axes, history, name, label=name.replace("_", " ")) for name in names]
    values = [value for line in drawn for value in line]
    if min(values) > 0.0 and max(values) > 10.0 * min(values):
        axes.set_yscale("log")
    axes.set_title("Losses")
    axes.legend()


def _norms(axes: Axes, history: History) -> None:
    values = _line(axes, history, "hypergradient_norm", label="of the hypergradient")
    if "inner_grad_norm" in history.columns:
        values += _line(axes, history, "inner_grad_norm", label="of the inner gradient")
    if min(values) > 0.0:
        axes.set_yscale("log")
    axes.set_title("Norms")
    axes.legend()


def _solves(axes: Axes, history: History) -> None:
    axes.set_title("Linear solves")
    from matplotlib.ticker import MaxNLocator

    counts = _line(axes, history, "iterations", color="C0")
    axes.set_ylabel("iterations", color="C0")
    axes.set_ylim(0.0, 1.1 * max(*counts, 1.0))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if "relative_residual" not in history.columns:
        return
    residuals = axes.twinx()
    values = _line(residuals, history, "relative_residual", color="C1", linewidth=1, alpha=0.7)
    residuals.set_ylabel("relative residual", color="C1")
    if min(values) > 0.0:
        residuals.set_yscale("log")


def _hparams(axes: Axes, history: History) -> None:
    names = history.hparams
    few = len(names) <= _NAMED
    for i, name in enumerate(names):
        _line(axes, history, name, label=name if few else None, color=None if few else f"C{i % 10}")
    axes.set_title("Outer parameters" if few else f"{len(names)} outer parameters")
    if few:
        axes.legend(fontsize="small")


def _others(axes: Axes, history: History) -> None:
    for name in _metrics(history):
        _line(axes, history, name, label=name)
    axes.set_title("Metrics")
    axes.legend(fontsize="small")


def _metrics(history: History) -> list[str]:
    """The columns that objectives and evaluations have added, without losses."""
    apart = history.hparams
    return [
        name
        for name in history.columns
        if "/" in name and not name.endswith("/loss") and name not in apart
    ]


def _line(axes: Any, history: History, name: str, **look: Any) -> list[float]:
    """Draw the entries of a column, and return them."""
    pairs = zip(history["step"], history[name], strict=True)
    present = [(step, value) for step, value in pairs if value is not None]
    steps, values = map(list, zip(*present, strict=True))
    axes.plot(steps, values, marker="." if len(values) < 3 else None, **look)
    return values
