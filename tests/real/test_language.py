"""Language models of transformers and peft, in training mode with their dropout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from language import (
    FLOAT32_INSIDE,
    bert,
    causal,
    classification,
    gpt2,
    llama,
    mamba,
    mixtral,
    t5,
    tokens,
    translation,
    wav2vec2,
)
from reference import Problem, certify

import hypergrad as hg

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "GPT-2": lambda: causal(gpt2(), step=1e-4),
    "GPT-2, eager attention": lambda: causal(gpt2(attn_implementation="eager"), step=1e-4),
    "Llama, sdpa": lambda: causal(llama(attn_implementation="sdpa"), **FLOAT32_INSIDE),
    "Llama, eager": lambda: causal(llama(attn_implementation="eager"), **FLOAT32_INSIDE),
    "Llama, tied": lambda: causal(llama(tie_word_embeddings=True), **FLOAT32_INSIDE),
    "Mixtral": lambda: causal(mixtral(), **FLOAT32_INSIDE),
    "Mamba": lambda: causal(mamba(), **FLOAT32_INSIDE),
    "T5": lambda: translation(t5(), **FLOAT32_INSIDE),
    "BERT, LoRA": lambda: classification(bert(), tokens(), tokens()),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_language_models_agree_with_first_derivatives(name: str) -> None:
    certify(PROBLEMS[name]().trained())


def test_tied_embeddings_are_one_parameter() -> None:
    for model in (gpt2(), llama(tie_word_embeddings=True)):
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert "lm_head.weight" not in causal(model).params


@pytest.mark.filterwarnings("ignore::hypergrad.DoubleBackwardWarning")
def test_a_weight_norm_goes_on_with_finite_differences() -> None:
    problem = classification(wav2vec2(), torch.randn(4, 200), torch.randn(4, 200))
    certify(problem.trained())


def test_an_adapter_that_detaches_a_norm_is_told() -> None:
    """What PyTorch computes of DoRA is not the gradient of the loss."""
    problem = classification(bert(use_dora=True), tokens(), tokens()).trained()
    with pytest.raises(hg.VerificationError, match="first derivative of inner"):
        problem.hypergradient()
