"""Graph networks of torch_geometric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import Call, Problem, certify, certify_densely
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import nn as gnn

import hypergrad as hg

NODES, EDGES = 12, 40


class Graph(nn.Module):
    """Two convolutions of a kind."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, *edges: Any) -> Tensor:
        return self.second(F.elu(self.first(x, *edges)), *edges)


def distinct_edges() -> Tensor:
    pairs = torch.cartesian_prod(torch.arange(NODES), torch.arange(NODES))
    return pairs[torch.randperm(len(pairs))[:EDGES]].T


def nodes(
    model: nn.Module, *, learned_edges: bool, edges: Tensor | None = None, **options: Any
) -> Problem:
    """Classes of nodes: φ are the weights of the edges, or of the training nodes."""
    x, y = torch.randn(NODES, 4), torch.randint(0, 3, (NODES,))
    edges = distinct_edges() if edges is None else edges

    def losses(call: Call, hparams: Tensor) -> Tensor:
        logits = call(x, edges, hparams.sigmoid()) if learned_edges else call(x, edges)
        return F.cross_entropy(logits, y, reduction="none")

    def inner(call: Call, hparams: Tensor) -> Tensor:
        training = losses(call, hparams)[:8]
        return training.mean() if learned_edges else (hparams.sigmoid() * training).mean()

    def outer(call: Call, hparams: Tensor) -> Tensor:
        return losses(call, hparams)[8:].mean()

    return Problem(model, inner, outer, torch.randn(EDGES if learned_edges else 8), **options)


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "GAT": lambda: Graph(gnn.GATConv(4, 3, heads=2), gnn.GATConv(6, 3)),
    "GATv2": lambda: Graph(gnn.GATv2Conv(4, 3, heads=2), gnn.GATv2Conv(6, 3)),
    "SAGE, max": lambda: Graph(gnn.SAGEConv(4, 5, aggr="max"), gnn.SAGEConv(5, 3, aggr="max")),
}


def test_the_weights_of_edges_agree_with_a_dense_hessian() -> None:
    model = Graph(gnn.GCNConv(4, 5), gnn.GCNConv(5, 3))
    certify_densely(nodes(model, learned_edges=True).trained())


def test_a_self_loop_that_is_listed_twice_is_told() -> None:
    """The later one overwrites the first, whose weight has a gradient all the same."""
    edges = torch.cat([distinct_edges()[:, :-2], torch.full((2, 2), 3)], dim=1)
    model = Graph(gnn.GCNConv(4, 5), gnn.GCNConv(5, 3))
    problem = nodes(model, learned_edges=True, edges=edges).trained()
    with pytest.raises(hg.VerificationError, match="first derivative of inner"):
        problem.hypergradient()


@pytest.mark.parametrize("name", ATTENTION)
def test_messages_agree_with_first_derivatives(name: str) -> None:
    certify(nodes(ATTENTION[name](), learned_edges=False).trained())
