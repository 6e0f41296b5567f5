"""Where the checkpoints of a loop are: files of one process, or folders of several ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hypergrad.bilevel.checkpoints import files, folders
from hypergrad.distributed.ranks import Ranks
from hypergrad.errors import CheckpointError, CheckpointWarning
from hypergrad.tree import Tree

Result = TypeVar("Result")


@dataclass(frozen=True)
class Store:
    """Writes, finds and reads checkpoints.

    Attributes:
        ranks: that write a folder together; ``None`` writes a file.
    """

    ranks: Ranks | None

    def path(self, folder: Path, step: int) -> Path:
        """Where the checkpoint after an outer step goes."""
        return folder / f"step-{step:08d}.{'pt' if self.ranks is None else 'dcp'}"

    def write(self, state: dict[str, Any], path: Path) -> None:
        """Write ``state`` whole, or leave ``path`` as it was.

        Raises:
            OSError: it cannot be written.
            TypeError: ``state`` holds something that a checkpoint cannot hold.
        """
        if self.ranks is None:
            files.write(state, path)
        else:
            folders.write(state, path, self.ranks)

    def read(self, path: Path, params: Tree) -> dict[str, Any]:
        """What either of them wrote, sharded like ``params`` where it was sharded.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            CheckpointError: it is damaged, foreign, or of a later version.
        """
        if self.ranks is None:
            return folders.read(path, params, None) if path.is_dir() else files.read(path)
        # As the first rank sees it: ranks that took different ways would wait for each other.
        there, folder = self.ranks.gathered((path.exists(), path.is_dir()))[0]
        if not there:
            raise FileNotFoundError(f"there is no checkpoint {path}")
        if folder:
            return folders.read(path, params, self.ranks)
        return self.together(lambda: files.read(path))

    def together(self, work: Callable[[], Result]) -> Result:
        """``work()``; if it raises on one rank, all raise.

        Raises:
            CheckpointError: it failed.
        """
        try:
            return work() if self.ranks is None else self.ranks.together(work)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(str(error) or type(error).__name__) from error

    def load_newest(
        self, folder: Path, params: Tree, restore: Callable[[dict[str, Any], Path], None]
    ) -> bool:
        """Hand the newest checkpoint that can be loaded to ``restore``; whether there was one.

        Those that cannot are set aside under another name, with a warning.

        Raises:
            CheckpointError: none of them can be loaded; why not the newest.
        """
        failed: list[tuple[Path, Exception, str]] = []
        for path in self.found(folder):
            aside = ".damaged"
            try:
                saved = self.read(path, params)
                aside = ".refused"
                restore(saved, path)
            except (CheckpointError, OSError) as error:
                failed.append((path, error, aside))
                continue
            for bad, why, suffix in failed:
                warnings.warn(f"{why}; {path} is used", CheckpointWarning, stacklevel=3)
                if self.ranks is None or self.ranks.rank == 0:
                    _set_aside(bad, suffix)
            return True
        if failed:
            _, why, _ = failed[0]
            raise why if isinstance(why, CheckpointError) else CheckpointError(str(why)) from why
        return False

    def found(self, folder: Path) -> list[Path]:
        """:func:`checkpoints`, as the first rank sees them."""
        here = checkpoints(folder)
        return here if self.ranks is None else self.ranks.gathered(here)[0]


def _set_aside(path: Path, suffix: str) -> None:
    aside = path.with_name(path.name + suffix)
    try:
        # One of an earlier time may be in the way.
        files.remove(aside)
        path.replace(aside)
    except OSError as error:
        warnings.warn(f"{path} could not be renamed ({error})", CheckpointWarning, stacklevel=4)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    every = [*folder.glob("step-*.pt"), *folder.glob("step-*.dcp")]
    found = [path for path in every if path.stem[len("step-") :].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The outer step after which a checkpoint was written."""
    return int(path.stem[len("step-") :])
