"""The private names of PyTorch that this package uses outside ``operators/``, each looked up late.

``import hypergrad`` works without any of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHECKPOINT_FRAME = "_CheckpointFrame"
"""In ``torch.utils.checkpoint``: made for each checkpoint, with the function of the second run as
its first argument. ``context_fn=`` of ``checkpoint`` would replace it if it could be set for
checkpoints that others call, such as Hugging Face, which keeps the function itself."""

MODULE_CALL = "_call_impl"
"""Of ``nn.Module``: what ``__call__`` calls. Replacing the public ``__call__`` works too, but it
empties the method caches of every module class, for 60 to 280 µs each time. The public global
forward hooks would replace it if compiled modules did not warn of them and trace into them."""

COMPILED_MODULE_CALL = "_compiled_call_impl"
"""Of ``nn.Module``: what ``__call__`` calls in its place after ``module.compile()``."""


def inside_a_transform() -> bool:
    """Whether a transform of ``torch.func`` is active: vmap, grad and the like.

    ``torch.func`` has no public way to ask.
    """
    return torch._C._functorch.maybe_current_level() is not None


def is_batch_of_cotangents(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a batch of ``torch.autograd.grad(..., is_grads_batched=True)``.

    There is no public way to ask.
    """
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def whole_batch(tensor: Tensor) -> Tensor:
    """All of a batch of cotangents as a plain tensor, which ``torch.vmap`` cannot give here."""
    return torch._remove_batch_dim(tensor, 1, 0, 0)


def as_batch(tensor: Tensor) -> Tensor:
    """The inverse of :func:`whole_batch`."""
    return torch._add_batch_dim(tensor, 0, 1)


def local_part(leaf: Any) -> tuple[Any, Any]:
    """Shape and offset of this rank's part of a ``DTensor``.

    ``DTensor.__create_chunk_list__`` has them too, under another private name.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(leaf.shape, leaf.device_mesh, leaf.placements)
