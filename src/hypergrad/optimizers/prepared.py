"""Remove the wrappers of Accelerate and Fabric from optimisers and schedulers.

Such a wrapper steps when its own training loop does. It must not accumulate, scale or synchronise
gradients that hypergrad has already set. A wrapper is recognised by what it holds, not by its
class, so neither library is needed.
"""

from __future__ import annotations

from typing import Any

import torch


def unprepared_optimizer(optimizer: Any) -> Any:
    """The optimiser of ``torch.optim`` inside ``optimizer``; anything else as it is."""
    return _unwrapped(optimizer, "optimizer", torch.optim.Optimizer)


def unprepared_scheduler(scheduler: Any) -> Any:
    """The scheduler of ``torch.optim`` inside ``scheduler``; anything else as it is."""
    return _unwrapped(scheduler, "scheduler", torch.optim.lr_scheduler.LRScheduler)


def _unwrapped(wrapper: Any, name: str, kind: type) -> Any:
    if isinstance(wrapper, type):
        return wrapper
    inside = getattr(wrapper, name, None)
    while isinstance(inside, kind) and inside is not wrapper:
        wrapper = inside
        inside = getattr(wrapper, name, None)
    return wrapper
