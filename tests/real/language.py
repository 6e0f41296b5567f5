"""Tiny language models of transformers with random weights, and their losses."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers as tf
from reference import Call, Problem
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, LENGTH = 13, 6
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip

# Their norms and rotations are computed in float32, whatever the dtype of the model.
FLOAT32_INSIDE: dict[str, Any] = {"rtol": 1e-5, "step": 3e-3, "tolerance": 5e-3}


def gpt2(**options: Any) -> nn.Module:
    config = tf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=1,
        eos_token_id=2, loss_type="ForCausalLM", **options,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


def llama(**options: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=1, **options))


def mixtral() -> nn.Module:
    config = tf.MixtralConfig(
        **SIZES, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
        output_router_logits=True, experts_implementation="eager",
    )  # fmt: skip
    return tf.MixtralForCausalLM(config)


def mamba() -> nn.Module:
    config = tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=8, state_size=4, num_hidden_layers=2)
    return tf.MambaForCausalLM(config)


def t5() -> nn.Module:
    config = tf.T5Config(
        vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def bert(**options: Any) -> nn.Module:
    """BERT with adapters of peft, which are all that is trained, with the head."""
    model = tf.BertForSequenceClassification(tf.BertConfig(**SIZES, num_labels=2))
    lora = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"], **options)
    return peft.get_peft_model(model, lora)


def wav2vec2() -> nn.Module:
    """Its embedding of positions is a convolution with ``weight_norm``."""
    config = tf.Wav2Vec2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        conv_dim=(6, 6), conv_stride=(4, 2), conv_kernel=(8, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=6,
        num_labels=2, apply_spec_augment=False, layerdrop=0.0,
    )  # fmt: skip
    return tf.Wav2Vec2ForSequenceClassification(config)


def causal(model: nn.Module, **options: Any) -> Problem:
    """Next tokens: φ are the weights of the training sequences."""
    rows, val = torch.randint(3, VOCABULARY, (2, 5, LENGTH))

    def inner(call: Call, hparams: Tensor) -> Tensor:
        logits = call(input_ids=rows).logits
        losses = F.cross_entropy(logits[:, :-1].mT, rows[:, 1:], reduction="none").mean(1)
        return (hparams.softmax(0) * losses).sum()

    def outer(call: Call, hparams: Tensor) -> Tensor:
        return call(input_ids=val, labels=val).loss

    return Problem(model, inner, outer, torch.randn(5), **options)


def translation(model: nn.Module, **options: Any) -> Problem:
    """Sequences to sequences: φ are the weights of the pairs."""
    source, target, source_val, target_val = torch.randint(3, VOCABULARY, (4, 5, LENGTH))

    def inner(call: Call, hparams: Tensor) -> Tensor:
        logits = call(input_ids=source, labels=target).logits
        losses = F.cross_entropy(logits.mT, target, reduction="none").mean(1)
        return (hparams.softmax(0) * losses).sum()

    def outer(call: Call, hparams: Tensor) -> Tensor:
        return call(input_ids=source_val, labels=target_val).loss

    return Problem(model, inner, outer, torch.randn(5), **options)


def classification(model: nn.Module, x: Tensor, x_val: Tensor, **options: Any) -> Problem:
    """Two classes of rows: φ are the labels of the training rows, as logits."""
    labels = torch.randint(0, 2, (len(x_val),))

    def inner(call: Call, hparams: Tensor) -> Tensor:
        soft = torch.stack([hparams.sigmoid(), 1 - hparams.sigmoid()], dim=1)
        return F.cross_entropy(call(x).logits, soft)

    def outer(call: Call, hparams: Tensor) -> Tensor:
        return F.cross_entropy(call(x_val).logits, labels)

    return Problem(model, inner, outer, torch.randn(len(x)), **options)


def tokens(rows: int = 6) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, LENGTH))
