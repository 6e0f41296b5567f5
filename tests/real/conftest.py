"""The suite against real libraries: in float64 and without a network."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

try:
    import torchvision  # noqa: F401 (timm imports it)
except RuntimeError:
    # Its compiled operators need a CUDA build of PyTorch. Its Python part, which is all that timm
    # uses, registers something for two of them, and wants them to be declared.
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
