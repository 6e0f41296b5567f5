"""Where ``torch.distributed.checkpoint`` put the parts of each tensor, in plain containers.

PyTorch writes that into a pickle, ``.metadata``, which can run any code when it is read. We keep
the same numbers in our own file and never read the pickle.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Part = list[Any]
"""Offsets and sizes of a part of a tensor; the file that has it, where it starts, its length."""


def parts_of(metadata: Metadata) -> dict[str, list[Part]]:
    """Return the parts of each tensor, from the result of ``torch.distributed.checkpoint.save``."""
    found: dict[str, list[Part]] = {}
    for place, stored in metadata.storage_data.items():
        entry = metadata.state_dict_metadata[place.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        chunk = next(chunk for chunk in entry.chunks if chunk.offsets == place.offset)
        found.setdefault(place.fqn, []).append(
            [
                list(chunk.offsets),
                list(chunk.sizes),
                stored.relative_path,
                stored.offset,
                stored.length,
            ]
        )
    return found


class Reader(FileSystemReader):
    """Reads tensors from a folder by the result of :func:`parts_of`.

    Args:
        path: the folder.
        parts: of each tensor.
        tensors: to be filled; they have the shapes and dtypes that were saved.
        files: the files in the folder that may be read.

    Raises:
        ValueError: ``parts`` are not those of ``tensors``, or are in other files.
    """

    def __init__(
        self, path: Path, parts: Any, tensors: dict[str, Tensor], files: Collection[str]
    ) -> None:
        super().__init__(path)
        self._known = Metadata({}, storage_data={})
        for key, tensor in tensors.items():
            chunks: list[ChunkStorageMetadata] = []
            for offsets, sizes, name, start, length in parts[key]:
                if name not in files or not _inside(offsets, sizes, tensor):
                    raise ValueError(f"tensor {key} has no part at {offsets} in {name}")
                index = MetadataIndex(key, torch.Size(offsets), len(chunks))
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                self._known.storage_data[index] = SimpleNamespace(
                    relative_path=name,
                    offset=int(start),
                    length=int(length),
                    transform_descriptors=None,
                )
            self._known.state_dict_metadata[key] = TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), tensor.size(), chunks
            )
            if sum(chunk.sizes.numel() for chunk in chunks) != tensor.numel():
                raise ValueError(f"tensor {key} must have parts of {tensor.numel()} elements")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the known metadata, where the base class would read a pickle."""
        return self._known


def _inside(offsets: Any, sizes: Any, tensor: Tensor) -> bool:
    bounds = zip(offsets, sizes, tensor.shape, strict=True)
    return all(min(at, size) >= 0 and at + size <= most for at, size, most in bounds)


def plain_name(name: Any) -> bool:
    """Whether ``name`` is a file in the folder itself, not a path to elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and os.path.basename(name) == name
