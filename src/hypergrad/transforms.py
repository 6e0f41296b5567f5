"""Whether the transforms of ``torch.func`` are at work."""

from __future__ import annotations

import torch


def inside_a_transform() -> bool:
    """Whether ``torch.func`` is at work: vmap, grad and the like."""
    return torch._C._functorch.maybe_current_level() is not None
