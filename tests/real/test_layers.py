"""Layers that need care in any library: packed sequences and sparse gradients."""

from __future__ import annotations

import pytest
import torch
from reference import Call, Problem, certify
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import hypergrad as hg


class Packed(nn.Module):
    """A bidirectional LSTM over sequences of many lengths, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(3, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        return self.head(outputs.sum(1) / lengths[:, None])


def weighted_rows(model: nn.Module, data: list[tuple[Tensor, ...]]) -> Problem:
    """Two classes of rows: φ are the weights of the training rows."""
    rows, rows_val = data
    y, y_val = torch.randint(0, 2, (2, 6))

    def inner(call: Call, hparams: Tensor) -> Tensor:
        losses = F.cross_entropy(call(*rows), y, reduction="none")
        return (hparams.sigmoid() * losses).mean()

    def outer(call: Call, hparams: Tensor) -> Tensor:
        return F.cross_entropy(call(*rows_val), y_val)

    return Problem(model, inner, outer, torch.randn(6))


def test_packed_sequences_agree_with_first_derivatives() -> None:
    lengths = torch.tensor([7, 2, 5, 7, 3, 4])
    data = [(torch.randn(6, 7, 3), lengths), (torch.randn(6, 7, 3), lengths.flip(0))]
    certify(weighted_rows(Packed(), data).trained())


class Bag(nn.Module):
    """Embeddings whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4, sparse=True)
        self.head = nn.Linear(4, 2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.embedding(rows).mean(1).tanh())


def test_sparse_gradients_agree_with_first_derivatives() -> None:
    data = [(torch.randint(0, 9, (6, 3)),), (torch.randint(0, 9, (6, 3)),)]
    with pytest.warns(hg.DoubleBackwardWarning, match="sparse"):
        certify(weighted_rows(Bag(), data))
