"""Checkpoints of several ranks: a folder that ``torch.distributed.checkpoint`` writes.

Each rank writes what it has of the tensors, and any number of ranks reads them again. The rest of
the state is one small file beside them, in which a tensor is a number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypergrad import placement as pl
from hypergrad import tree as tr
from hypergrad.bilevel import files
from hypergrad.distributed.ranks import Ranks
from hypergrad.errors import CheckpointError, DistributedError
from hypergrad.tree import Tree

REST = "state.pt"
_TENSOR = "tensor"


def write(state: dict[str, Any], path: Path, ranks: Ranks) -> None:
    """Write ``state`` so that ``path`` holds either what it held before or all of it; on all ranks.

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
        TypeError: ``state`` holds something that :func:`read` would refuse; likewise.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors: dict[str, Tensor] = {}
    rest = _without_tensors(state, tensors)
    files.check_plain(rest, "the state")
    temporary = path.with_name(f"{path.name}.tmp")

    def begin() -> None:
        files.remove(temporary)
        temporary.mkdir(parents=True)

    def finish() -> None:
        files.write(rest, temporary / REST)
        files.remove(path)
        temporary.replace(path)
        files.flush_folder(path.parent)

    try:
        ranks.first(begin)
        save(tensors, checkpoint_id=temporary, process_group=ranks.group)
        ranks.first(finish)
    except (DistributedError, CheckpointException) as error:
        if ranks.rank == 0:
            with contextlib.suppress(OSError):
                files.remove(temporary)
        raise OSError(str(error)) from error


def read(path: Path, params: Tree, ranks: Ranks | None) -> dict[str, Any]:
    """The state in a folder, sharded like ``params`` where it was sharded when it was written.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged, foreign, or of a later version.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    rest = files.read(path / REST)
    sharded = next((leaf for leaf in tr.leaves(params) if pl.is_distributed(leaf)), None)
    tensors: dict[str, Tensor] = {}
    build = _with_tensors(rest, tensors, sharded)
    try:
        group = None if ranks is None else ranks.group
        load(tensors, checkpoint_id=path, process_group=group, no_dist=ranks is None)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return build()


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` with a description in the place of each tensor."""
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
    """How to build the state once empty tensors, which are put into ``tensors``, are filled."""
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
    shape, dtype = description["shape"], getattr(torch, description["dtype"])
    placements = description["placements"]
    if placements is None or sharded is None:
        return torch.empty(shape, dtype=dtype)
    from torch.distributed.tensor import Replicate, Shard, empty

    here = [Replicate() if dim is None else Shard(dim) for dim in placements]
    mesh = sharded.device_mesh
    if len(here) != mesh.ndim:
        here = list(sharded.placements)
    return empty(*shape, dtype=dtype, device_mesh=mesh, placements=here)
