"""Image models of timm and transformers, batch norms in training mode and out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from reference import Call, Problem, certify
from torch import Tensor, nn
from torch.nn import functional as F


def vit() -> nn.Module:
    config = tf.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    return tf.ViTForImageClassification(config)


def timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, img_size=8, patch_size=4, embed_dim=12, depth=2,
        num_heads=2,
    )  # fmt: skip


def resnet() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=3, channels=(4, 8, 8, 16), stem_width=4)


def efficientnet() -> nn.Module:
    return timm.create_model("test_efficientnet", num_classes=3)


def images(model: nn.Module, size: int, **options: Any) -> Problem:
    """Three classes: φ are offsets of their logits, as for long tails."""
    x, x_val = torch.randn(2, 8, 3, size, size)
    y, y_val = torch.randint(0, 3, (2, 8))

    def logits(call: Call, x: Tensor) -> Tensor:
        out = call(x)
        return out if isinstance(out, Tensor) else out.logits

    def inner(call: Call, hparams: Tensor) -> Tensor:
        return F.cross_entropy(logits(call, x) + hparams, y, label_smoothing=0.1)

    def outer(call: Call, hparams: Tensor) -> Tensor:
        return F.cross_entropy(logits(call, x_val), y_val)

    return Problem(model, inner, outer, torch.randn(3), **options)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "ViT of transformers": lambda: images(vit(), 8),
    "ViT of timm": lambda: images(timm_vit(), 8),
    "EfficientNet": lambda: images(efficientnet(), 32, rtol=1e-6),
    # A ReLU's kink is closer than 1e-4, where its batch norms divide by little.
    "ResNet": lambda: images(resnet(), 32, step=1e-6),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_image_models_agree_with_first_derivatives(name: str) -> None:
    problem = PROBLEMS[name]().trained(20)
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}
    certify(problem)
    for key, value in problem.model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0.0, atol=0.0, msg=key)


def test_a_batch_norm_with_running_statistics_agrees_with_first_derivatives() -> None:
    problem = images(resnet(), 32, step=1e-6).trained(20)
    problem.model.eval()
    certify(problem)
