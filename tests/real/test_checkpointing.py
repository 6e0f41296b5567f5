"""``gradient_checkpointing_enable()``: θ is not what the modules hold when activations return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from language import causal, gpt2, llama
from reference import Problem
from torch import nn

import hypergrad as hg


def recomputing(model: nn.Module, *, reentrant: bool = False) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def twins(make: Any) -> list[Problem]:
    """The same problem twice, the second with activation checkpointing."""
    problems = []
    for change in (nn.Module.train, recomputing):
        torch.manual_seed(0)
        problems.append(causal(change(make())))
    return problems


def moved(problem: Problem) -> dict[str, torch.Tensor]:
    """θ away from the values of the module."""
    return {k: p.detach() + 0.02 for k, p in problem.params.items()}


# Differences of float64 are too short for Llama's norms, which are computed in float32.
@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (gpt2, "auto"), (gpt2, "forward"), (gpt2, "finite-difference"), (llama, "auto"),
        (llama, "forward"),
    ],
)  # fmt: skip
def test_recomputed_activations_are_those_of_the_given_parameters(make: Any, mode: Any) -> None:
    plain, recomputed = (
        hg.hypergradient(
            problem.functional(problem.inner), problem.functional(problem.outer), moved(problem),
            problem.hparams, method=hg.Implicit(hg.CG(rtol=1e-4), damping=100.0, mode=mode),
        ).grads
        for problem in twins(make)
    )  # fmt: skip
    rtol = 1e-3 if mode == "finite-difference" or make is llama else 1e-6
    torch.testing.assert_close(recomputed, plain, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("memory", ["recompute", "graph"])
def test_unrolled_steps_recompute_what_they_saw(memory: Any) -> None:
    method = hg.Unrolled(hg.optimizers.SGD(lr=0.1), steps=4, memory=memory)
    answers = []
    for problem in twins(gpt2):
        torch.manual_seed(0)  # the steps draw their dropout masks one after the other
        f, g = problem.functional(problem.inner), problem.functional(problem.outer)
        result = hg.hypergradient(f, g, problem.params, problem.hparams, method=method)
        answers.append(result.grads)
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-9)


def test_reentrant_checkpointing_is_refused_by_name() -> None:
    problem = causal(recomputing(gpt2(), reentrant=True))
    with pytest.raises(ValueError, match="use_reentrant=False"):
        problem.hypergradient()
