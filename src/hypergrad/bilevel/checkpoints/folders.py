"""Checkpoints of several ranks: a folder that ``torch.distributed.checkpoint`` writes.

Each rank writes its parts of the tensors, and any number of ranks can read them. One small file
in the same folder holds the rest of the state, with a number for each tensor, and the SHA-256 of
every other file.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypergrad import _sharding as pl
from hypergrad import tree as tr
from hypergrad.bilevel.checkpoints import files
from hypergrad.distributed.ranks import Ranks
from hypergrad.errors import CheckpointError, DistributedError
from hypergrad.tree import Tree

REST = "state.pt"
_TENSOR = "hypergrad tensor"


def write(state: dict[str, Any], path: Path, ranks: Ranks) -> None:
    """Write ``state`` on all ranks so that ``path`` holds either what it held before or all of it.

    It raises as :func:`hypergrad.bilevel.checkpoints.files.write` does.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    from hypergrad.bilevel.checkpoints.parts import parts_of

    tensors: dict[str, Tensor] = {}
    rest = _without_tensors(state, tensors)
    files.check_plain(rest, "the state")
    token = ranks.gathered(secrets.token_hex(4))[0]
    temporary = path.with_name(f"{path.name}.{token}.tmp")

    def names() -> list[str]:
        return sorted(file.name for file in temporary.iterdir())

    def finish(digests: dict[str, str], parts: dict[str, Any]) -> None:
        files.write({"state": rest, "files": digests, "parts": parts}, temporary / REST)
        files.remove(path)
        temporary.replace(path)
        files.flush_folder(path.parent)

    try:
        ranks.first(lambda: temporary.mkdir(parents=True))
        metadata = save(tensors, checkpoint_id=temporary, process_group=ranks.group)
        every = ranks.gathered(ranks.together(names))[0]
        shares = ranks.gathered(
            ranks.together(lambda: _digests(temporary, every[ranks.rank :: ranks.size]))
        )
        digests = {name: digest for share in shares for name, digest in share.items()}
        ranks.first(lambda: finish(digests, parts_of(metadata)))
    except (DistributedError, CheckpointException) as error:
        if ranks.rank == 0:
            with contextlib.suppress(OSError):
                files.remove(temporary)
        raise OSError(str(error)) from error


def read(path: Path, params: Tree, ranks: Ranks | None) -> dict[str, Any]:
    """Return the state in a folder, sharded like ``params`` where it was sharded before.

    It raises ``CheckpointError`` if the folder is damaged, foreign, or of a later version.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    from hypergrad.bilevel.checkpoints.parts import Reader, plain_name

    sharded = next((leaf for leaf in tr.leaves(params) if pl.is_distributed(leaf)), None)

    def begin() -> tuple[Callable[[], Any], dict[str, Tensor], Reader]:
        saved = files.read(path / REST)
        digests = saved["files"]
        for name in digests:
            if not plain_name(name):
                raise ValueError(f"{REST} must name files in its own folder, got {name!r}")
        mine = sorted(digests)
        if ranks is not None:
            mine = mine[ranks.rank :: ranks.size]
        for name, digest in _digests(path, mine).items():
            if digest != digests[name]:
                raise ValueError(f"{name} is not the file that was written, by its checksum")
        tensors: dict[str, Tensor] = {}
        build = _with_tensors(saved["state"], tensors, sharded)
        return build, tensors, Reader(path, saved["parts"], tensors, digests)

    try:
        build, tensors, reader = begin() if ranks is None else ranks.together(begin)
        group = None if ranks is None else ranks.group
        load(tensors, storage_reader=reader, process_group=group, no_dist=ranks is None)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return build()


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    """The SHA-256 of the named files."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            found[name] = files.sha256(file, (folder / name).stat().st_size)
    return found


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` with a description in place of each tensor."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach()
        placements = _placements(value)
        return {_TENSOR: key, "shape": list(value.shape), "dtype": str(value.dtype)[6:],
                "placements": placements}  # fmt: skip
    if isinstance(value, dict):
        return {key: _without_tensors(entry, tensors) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_tensors(entry, tensors) for entry in value)
    return value


def _placements(tensor: Tensor) -> list[int | None] | None:
    """The dimension that each dimension of the mesh shards, ``None`` where it replicates."""
    if not pl.is_distributed(tensor):
        return None
    return [getattr(placement, "dim", None) for placement in tensor.placements]


def _with_tensors(value: Any, tensors: dict[str, Tensor], sharded: Any) -> Callable[[], Any]:
    """Put empty tensors into ``tensors``, and return a function that builds the state from them."""
    if isinstance(value, dict) and _TENSOR in value:
        key = value[_TENSOR]
        tensors[key] = _empty(value, sharded)
        return lambda: tensors[key]
    if isinstance(value, dict):
        entries = {k: _with_tensors(entry, tensors, sharded) for k, entry in value.items()}
        return lambda: {k: build() for k, build in entries.items()}
    if type(value) in (list, tuple):
        kind, parts = type(value), [_with_tensors(entry, tensors, sharded) for entry in value]
        return lambda: kind(build() for build in parts)
    return lambda: value


def _empty(description: dict[str, Any], sharded: Any) -> Tensor:
    shape, dtype = description["shape"], getattr(torch, description["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a dtype must be one of PyTorch's, got {description['dtype']!r}")
    placements = description["placements"]
    if placements is None or sharded is None:
        return torch.empty(shape, dtype=dtype)
    from torch.distributed.tensor import Replicate, Shard, empty

    here = [Replicate() if dim is None else Shard(dim) for dim in placements]
    mesh = sharded.device_mesh
    if len(here) != mesh.ndim:
        here = list(sharded.placements)
    return empty(*shape, dtype=dtype, device_mesh=mesh, placements=here)
