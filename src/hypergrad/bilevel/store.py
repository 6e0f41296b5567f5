"""Where the checkpoints of a loop are: files of one process, or folders of several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypergrad.bilevel import files, folders
from hypergrad.distributed.ranks import Ranks
from hypergrad.tree import Tree


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
        return folders.read(path, params, self.ranks) if path.is_dir() else files.read(path)

    def found(self, folder: Path) -> list[Path]:
        """:func:`checkpoints`, as the first rank sees them."""
        here = checkpoints(folder)
        return here if self.ranks is None else self.ranks.gathered(here)[0]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    every = [*folder.glob("step-*.pt"), *folder.glob("step-*.dcp")]
    found = [path for path in every if path.stem[len("step-") :].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The outer step after which a checkpoint was written."""
    return int(path.stem[len("step-") :])
