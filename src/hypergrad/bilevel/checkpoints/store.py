"""The checkpoints of a loop: files of one process, or folders of several ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hypergrad.bilevel.checkpoints import files, folders
from hypergrad.distributed.ranks import Ranks
from hypergrad.errors import CheckpointError, CheckpointWarning, warn
from hypergrad.tree import Tree

Result = TypeVar("Result")


@dataclass(frozen=True)
class Store:
    """Writes, finds and reads checkpoints: files, or folders that ``ranks`` write together."""

    ranks: Ranks | None

    def path(self, folder: Path, step: int) -> Path:
        """The path of the checkpoint after an outer step."""
        return folder / f"step-{step:08d}.{'pt' if self.ranks is None else 'dcp'}"

    def write(self, state: dict[str, Any], path: Path) -> None:
        """Write ``state`` whole, or leave ``path`` and raise ``OSError`` or ``TypeError``."""
        if self.ranks is None:
            files.write(state, path)
        else:
            folders.write(state, path, self.ranks)

    def read(self, path: Path, params: Tree) -> dict[str, Any]:
        """Return the state in a file or folder, sharded like ``params`` where it was sharded.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            CheckpointError: it is damaged, foreign, or of a later version.
        """
        if self.ranks is None:
            return folders.read(path, params, None) if path.is_dir() else files.read(path)
        # As the first rank sees it: ranks that branch differently would wait for each other.
        there, folder = self.ranks.gathered((path.exists(), path.is_dir()))[0]
        if not there:
            raise FileNotFoundError(f"there is no checkpoint {path}")
        if folder:
            return folders.read(path, params, self.ranks)
        return self.together(lambda: files.read(path))

    def together(self, work: Callable[[], Result]) -> Result:
        """Return ``work()``; if it fails on one rank, raise ``CheckpointError`` on all."""
        try:
            return work() if self.ranks is None else self.ranks.together(work)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(str(error) or type(error).__name__) from error

    def load_newest(
        self, folder: Path, params: Tree, restore: Callable[[dict[str, Any], Path], None]
    ) -> bool:
        """Pass the newest checkpoint that loads to ``restore``; return whether there was one.

        Those that cannot be loaded are renamed, with a warning. If none can be loaded, it raises
        the ``CheckpointError`` of the newest.
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
                warn(f"{why}; {path} is used", CheckpointWarning)
                if self.ranks is None or self.ranks.rank == 0:
                    _set_aside(bad, suffix)
            return True
        if failed:
            _, why, _ = failed[0]
            raise why if isinstance(why, CheckpointError) else CheckpointError(str(why)) from why
        return False

    def found(self, folder: Path) -> list[Path]:
        """The result of :func:`checkpoints` on the first rank."""
        here = checkpoints(folder)
        return here if self.ranks is None else self.ranks.gathered(here)[0]


def _set_aside(path: Path, suffix: str) -> None:
    aside = path.with_name(path.name + suffix)
    try:
        # One of an earlier time may be in the way.
        files.remove(aside)
        path.replace(aside)
    except OSError as error:
        warn(f"{path} could not be renamed ({error})", CheckpointWarning)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    every = [*folder.glob("step-*.pt"), *folder.glob("step-*.dcp")]
    found = [path for path in every if path.stem[len("step-") :].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The outer step after which a checkpoint was written."""
    return int(path.stem[len("step-") :])
