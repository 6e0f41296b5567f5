"""Checkpoint files: written whole or not at all, and refused in words when they are not ours."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch

from hypergrad.errors import CheckpointError

FORMAT = "hypergrad.BilevelSolver"
VERSION = 1


def write(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` so that ``path`` holds either what it held before or all of it.

    A temporary file beside it is written, flushed to the disk and renamed.

    Raises:
        OSError: the disk is full, or the folder cannot be written; ``path`` is as it was.
        TypeError: ``state`` holds something that :func:`read` would refuse; likewise.
    """
    check_plain(state, "the state")
    path.parent.mkdir(parents=True, exist_ok=True)
    # In memory first: torch.save reports a full disk in words of its own.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **state}, buffer)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush_folder(path.parent)


def read(path: Path) -> dict[str, Any]:
    """The state in a file, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, foreign, or of a later version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({path.stat().st_size} bytes): "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of a hypergrad.BilevelSolver")
    if state["version"] != VERSION:
        raise CheckpointError(
            f"{path} has version {state['version']} of the format, this hypergrad reads {VERSION}"
        )
    return state


def check_plain(value: Any, where: str) -> None:
    """Raise unless ``torch.load(weights_only=True)`` takes all of ``value``.

    Exactly these types: a NumPy float is a float, but is not saved as one.
    """
    kind = type(value)
    if kind in (dict, OrderedDict, Counter):
        for key, entry in value.items():
            check_plain(entry, f"{where}[{key!r}]")
    elif kind in (list, tuple):
        for i, entry in enumerate(value):
            check_plain(entry, f"{where}[{i}]")
    elif kind not in _PLAIN:
        raise TypeError(
            "a checkpoint can hold tensors, numbers, strings, lists and dictionaries, got "
            f"{kind.__module__}.{kind.__qualname__} at {where}"
        )


_PLAIN = (type(None), bool, int, float, str, torch.Tensor, torch.nn.Parameter)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left half written."""
    for leftover in folder.glob("step-*.tmp"):
        with contextlib.suppress(OSError):
            remove(leftover)


def remove(path: Path) -> None:
    """Remove a checkpoint, file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Have what was renamed in it on the disk."""
    # Without this the rename itself may be lost with the power. Windows cannot open folders.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
