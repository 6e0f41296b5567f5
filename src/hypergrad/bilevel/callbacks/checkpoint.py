"""A callback that writes checkpoints while the loop runs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from hypergrad._checks import check_count
from hypergrad.bilevel.callbacks.base import Callback, Solver
from hypergrad.bilevel.checkpoints import files
from hypergrad.bilevel.checkpoints.store import checkpoints, step_of
from hypergrad.bilevel.history import Record
from hypergrad.errors import CheckpointWarning, warn


class Checkpoint(Callback):
    """Save the solver's whole state every so many outer steps, and when the loop ends.

    A file, or with several ranks a folder (``step-00000012.dcp``), appears whole or not at all. It
    carries a checksum of its content, and is not read without it. Where it cannot be written (a
    full disk), a :class:`CheckpointWarning` says why, the earlier checkpoints stay, and the loop
    goes on. A loop that ends with an error saves nothing, so that the newest checkpoint is a good
    state. ``solver.resume(folder)`` continues from it.

    Args:
        folder: where the files go, ``step-00000012.pt`` and so on; made if need be. A relative path
            counts from the directory in which the callback was made.
        every: outer steps between checkpoints.
        keep: how many of the newest to keep.
        overwrite: whether a loop that starts before the newest checkpoint of the folder removes the
            later ones; otherwise it raises ``ValueError``.
    """

    saves: ClassVar[bool] = True

    def __init__(
        self, folder: Path | str, *, every: int = 1, keep: int = 3, overwrite: bool = False
    ) -> None:
        check_count(every, "every")
        check_count(keep, "keep")
        # Absolute: the folder stays the same if the program changes its directory.
        self._folder = Path(folder).absolute()
        self._every = every
        self._keep = keep
        self._overwrite = overwrite
        self._saved: tuple[int, int] | None = None

    def on_start(self, solver: Solver) -> None:
        """Remove what a killed process left half written.

        Raises:
            ValueError: the folder holds later steps than the solver's, of another run or of one
                that was not resumed; the next resumption would take them for this run's.
        """
        if solver.is_first_rank:
            files.remove_leftovers(self._folder)
        self._saved = solver.outer_step, solver.inner_step
        later = [path for path in checkpoints(self._folder) if step_of(path) > solver.outer_step]
        if self._overwrite:
            self._remove(solver, later)
        elif later:
            raise ValueError(
                f"folder must hold no later steps than that of the solver, {solver.outer_step}, "
                f"got {later[0]}; call resume({str(self._folder)!r}) first, take another folder, "
                "or pass overwrite=True"
            )

    def on_step(self, solver: Solver, record: Record) -> None:
        if record.step % self._every == 0:
            self._save(solver)

    def on_end(self, solver: Solver, error: BaseException | None) -> None:
        if error is None and (solver.outer_step, solver.inner_step) != self._saved:
            self._save(solver)

    def _save(self, solver: Solver) -> None:
        path = solver.store.path(self._folder, solver.outer_step)
        try:
            solver.save(path)
        except OSError as error:
            warn(
                f"{path} could not be written ({error}); the checkpoints before it stay",
                CheckpointWarning,
            )
            return
        self._saved = solver.outer_step, solver.inner_step
        self._remove(solver, checkpoints(self._folder)[self._keep :])

    def _remove(self, solver: Solver, paths: list[Path]) -> None:
        if not solver.is_first_rank:
            return
        for path in paths:
            try:
                files.remove(path)
            except FileNotFoundError:
                continue  # Another process removed it first.
            except OSError as error:
                warn(f"{path} could not be removed ({error}); the loop goes on", CheckpointWarning)
