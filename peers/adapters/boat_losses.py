"""The losses that BOAT imports by their paths."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from peers import cleaning
from peers.problems import penalty


def lower(feed: dict[str, Tensor], upper: nn.Module, network: nn.Module, **options: Any) -> Tensor:
    """``f``; ``params`` among the options are the parameters to use."""
    params = options.get("params", list(network.parameters()))
    return F.cross_entropy(network(feed["x"], **options), feed["y"]) + penalty(params, upper())


def upper(feed: dict[str, Tensor], upper: nn.Module, network: nn.Module, **options: Any) -> Tensor:
    """``g``."""
    return F.cross_entropy(network(feed["x"], **options), feed["y"])


def weighted(
    feed: dict[str, Tensor], upper: nn.Module, network: nn.Module, **options: Any
) -> Tensor:
    """``f`` of hyper-cleaning."""
    params = options.get("params", list(network.parameters()))
    return cleaning.weighted(network(feed["x"], **options), feed["y"], upper(), params)
