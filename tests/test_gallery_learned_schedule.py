"""The gallery's learned schedules: hypergradients of rates, and a small run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gallery import refuses, run

import hypergrad as hg
import learned_schedule as example


def test_a_stack_of_networks_trains_as_each_does_by_torch() -> None:
    rows = (torch.rand(50, 64), torch.arange(50) % 10)
    start = params, batches = example.draw(rows, 3, 20, seed=0)
    rates = torch.linspace(-5.0, -3.0, 20)[:, None]
    together = example.train(rates, start)
    for network in range(3):
        leaves = {name: leaf[network].clone().requires_grad_() for name, leaf in params.items()}
        optimiser = torch.optim.Adam(leaves.values())
        for rate, (x, y) in zip(rates.exp().flatten().tolist(), batches, strict=True):
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad()
            logits = example.predict(leaves, x[network])
            torch.nn.functional.cross_entropy(logits, y[network]).backward()
            optimiser.step()
        for name, leaf in leaves.items():
            torch.testing.assert_close(together[name][network], leaf.detach())


def test_the_hypergradient_of_a_rate_is_the_slope_of_the_loss() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        rows = (torch.rand(50, 64), torch.arange(50) % 10)
        start = params, batches = example.draw(rows, 2, 20, seed=0)
        rates = torch.full((20, len(example.SHAPES)), -8.0)
        result = hg.hypergradient(
            lambda params, _, batch: example.losses(params, batch).sum(),
            lambda params, _: example.losses(params, rows).mean(),
            params,
            rates,
            method=hg.Unrolled(example.adam, batches),
        )

        def loss(rates: torch.Tensor) -> torch.Tensor:
            return example.losses(example.train(rates, start), rows).mean()

        along = torch.randn_like(rates)
        slope = (loss(rates + 1e-6 * along) - loss(rates - 1e-6 * along)) / 2e-6
        torch.testing.assert_close((result.grads * along).sum(), slope, rtol=1e-4, atol=0.0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_rates_learned_on_many_draws_are_better_on_others_and_those_of_one_draw_are_not(
    tmp_path: Path,
) -> None:
    _, tables = run(tmp_path, "learned_schedule", "--steps=20", "--length=30")
    several, single = ({row["rates"]: row for row in rows} for rows in tables.values())
    assert [row["numbers"] for row in several.values()] == [1, 1, 1, 4, 30, 120]
    constant, learned = (several[name] for name in (example.CONSTANT, example.BOTH))
    assert learned[example.LOSS] < 0.97 * constant[example.LOSS]
    assert learned["test loss"] < 0.97 * constant["test loss"]
    constant, overfitted = (single[name] for name in (example.CONSTANT, example.BOTH))
    assert overfitted[example.SEEN] < constant[example.SEEN]
    assert overfitted[f"{example.LOSS}, fresh draws"] > 1.1 * overfitted[example.SEEN]
    assert overfitted[f"{example.LOSS}, fresh draws"] > learned[example.LOSS]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--steps=0", "--steps must be at least 2, not 0"),
        ("--length=1", "--length must be at least 2, not 1"),
    ],
)
def test_it_refuses_what_it_cannot_do(
    argument: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses(example.main, [argument], words, capsys)
