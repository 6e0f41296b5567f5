"""Options of the loop that are refused where they are of the wrong kind or out of their range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hypergrad._checks import check_count, check_objective, given
from hypergrad._private import inside_a_transform
from hypergrad.bilevel.callbacks import Callback


def check_options(
    counts: Mapping[str, Any],
    warmup_steps: Any,
    project: Any,
    restart: Any,
    autocast: Any,
    callbacks: Sequence[Any],
) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what :class:`BilevelSolver` does not take.

    ``counts`` holds integers from 1 by their names; the others are its arguments.
    """
    if inside_a_transform():
        raise ValueError(
            "inner and outer must be trained outside the transforms of torch.func, such as grad or "
            "vmap, got a BilevelSolver that is made inside one"
        )
    for name, count in counts.items():
        check_count(count, name)
    if warmup_steps != 0:
        check_count(warmup_steps, "warmup_steps")
    if project is not None:
        check_objective(project, "project", "(hparams)")
    if restart not in (None, "initial") and not callable(restart):
        raise ValueError(f"restart must be None, 'initial' or a function, got {restart!r}")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast}")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(
                "callbacks must be instances of hg.bilevel.Callback, got "
                f"{given(callback, 'hg.bilevel')}"
            )
