"""Checkpoint files, written whole or not at all, and read only if their checksum is right.

A file is what ``torch.save`` writes: a ZIP archive. Its comment is the SHA-256 of all before it.
``torch.load`` and other readers of archives can read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import shutil
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hypergrad.errors import CheckpointError

FORMAT = "hypergrad.BilevelSolver"
VERSION = 1
_MARK = b"hypergrad sha256 "
_DIGITS = hashlib.sha256().digest_size * 2
_CHUNK = 2**20


def write(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` so that ``path`` holds either what it held before or all of it.

    It writes a temporary file in the same folder, flushes it to the disk and renames it.

    Raises:
        OSError: the disk is full, or the folder cannot be written; ``path`` is unchanged.
        TypeError: ``state`` holds something that :func:`read` would refuse; ``path`` is unchanged.
    """
    check_plain(state, "the state")
    path.parent.mkdir(parents=True, exist_ok=True)
    # In memory first, because torch.save raises an error of its own for a full disk.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **state}, buffer)
    content = buffer.getbuffer()
    # The last field of an archive is the length of its comment.
    content[-2:] = (len(_MARK) + _DIGITS).to_bytes(2, "little")
    digest = hashlib.sha256(content)
    digest.update(_MARK)
    # Two processes that write one folder must not share a temporary file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.write(_MARK + digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush_folder(path.parent)


def read(path: Path) -> dict[str, Any]:
    """Return the state in a file, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, foreign, or of a later version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with path.open("rb") as file:
            _verify(file, path)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of a hypergrad.BilevelSolver")
    if (version := state.pop("version", None)) != VERSION:
        raise CheckpointError(
            f"{path} has version {version} of the format, this hypergrad reads {VERSION}"
        )
    return state


def sha256(file: BinaryIO, size: int) -> str:
    """The SHA-256 of the next ``size`` bytes of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _verify(file: BinaryIO, path: Path) -> None:
    """Raise ``CheckpointError`` unless the file ends with the checksum of all before it."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(size - _DIGITS - len(_MARK), 0))
    mark, written = file.read(len(_MARK)), file.read()
    if mark != _MARK:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint: it has no checksum at its end ({size} bytes); "
            "write checkpoints with BilevelSolver.save"
        )
    file.seek(0)
    if sha256(file, size - _DIGITS).encode() != written:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint: its content is not the one that was written, by "
            f"the checksum at its end ({size} bytes)"
        )
    file.seek(0)


def check_plain(value: Any, where: str) -> None:
    """Raise ``TypeError`` unless ``torch.load(weights_only=True)`` takes all of ``value``.

    The types must match exactly: a NumPy float is a float, but is not saved as one.
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
    """Remove what killed processes left half written."""
    for leftover in folder.glob("step-*.tmp"):
        with contextlib.suppress(OSError):
            remove(leftover)


def remove(path: Path) -> None:
    """Remove a checkpoint, file or folder, if it exists; of a symbolic link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    # Without it a power cut may lose the rename. Windows cannot open folders.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
