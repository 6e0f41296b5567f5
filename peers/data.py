"""The problems of the workloads: digits, or random rows, and a θ trained to its minimum."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from peers import truth
from peers.cleaning import Cleaning
from peers.problems import Params, Problem

Sizes = tuple[int, ...]


def digits_network(sizes: Sizes = (64, 256, 256, 10), rows: int = 512, l2: float = 0.1) -> Problem:
    """A tanh network at a minimum of f, with one L2 for each tensor; tanh, so that H is smooth.

    Raises:
        RuntimeError: H is not positive definite there, so that it is no minimum.
    """
    X, y = _digits()
    train, validation = (X[:rows], y[:rows]), (X[rows : 2 * rows], y[rows : 2 * rows])
    start = _start(sizes)
    hparams = torch.full((len(start),), math.log(l2), dtype=torch.float64)
    problem = _trained(Problem(sizes, "tanh", train, validation, start, hparams))
    return _judged(problem, truth.implicit(problem))


def digits_logistic(rows: int = 1000, l2: float = 1e-3) -> Problem:
    """Multinomial logistic regression at its minimum, with one L2 for each weight."""
    X, y = _digits()
    start = {k: torch.zeros_like(t) for k, t in _start((64, 10)).items()}
    size = sum(tensor.numel() for tensor in start.values())
    hparams = torch.full((size,), math.log(l2), dtype=torch.float64)
    problem = Problem((64, 10), "tanh", (X[:rows], y[:rows]), (X[rows:], y[rows:]), start, hparams)
    problem = _trained(problem)
    return _judged(problem, truth.dense(problem))


def random_network(sizes: Sizes, rows: int, activation: str = "relu") -> Problem:
    """A network at its initial θ on random rows, with one L2 for each tensor; float32."""
    generator = torch.Generator().manual_seed(0)
    classes = sizes[-1]
    x, x_val = (torch.randn(rows, sizes[0], generator=generator) for _ in range(2))
    y, y_val = (torch.randint(classes, (rows,), generator=generator) for _ in range(2))
    start = {k: t.float() for k, t in _start(sizes).items()}
    hparams = torch.full((len(start),), -4.0)
    return Problem(sizes, activation, (x, y), (x_val, y_val), start, hparams)


def gradient_norm(problem: Problem) -> float:
    """``‖∇_θ f‖``."""
    return float(truth.Linearised(problem).gradient.detach().norm())


def _judged(problem: Problem, exact: Tensor) -> Problem:
    smallest, largest = truth.curvatures(problem)
    if not smallest > 0.0:
        raise RuntimeError(f"the Hessian has an eigenvalue of {smallest:.2e}: θ is no minimum")
    facts = {
        "gradient norm": gradient_norm(problem),
        "smallest curvature": smallest,
        "largest curvature": largest,
    }
    return replace(problem.to(torch.float32), exact=exact.detach(), facts=facts)


def _trained(problem: Problem) -> Problem:
    """θ by L-BFGS in float64."""
    params = {k: t.clone().requires_grad_() for k, t in problem.params.items()}
    optimizer = torch.optim.LBFGS(
        list(params.values()), max_iter=1000, max_eval=2000, history_size=50,
        tolerance_grad=1e-8, tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = problem.inner(params, problem.hparams)
        value.backward()
        return value

    optimizer.step(closure)
    return replace(problem, params={k: t.detach() for k, t in params.items()})


def _start(sizes: Sizes) -> Params:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Identity()]
    network = nn.Sequential(*layers[:-1])
    return {k: t.detach().double() for k, t in network.named_parameters()}


def _digits() -> tuple[Tensor, Tensor]:
    X, y = load_digits(return_X_y=True)
    return torch.from_numpy(X / 16.0), torch.from_numpy(y)


def cleaning(folder: Path, target: float, rows: int = 5000) -> Cleaning:
    """5,000 images of MNIST from ``make data``, or the digits where it is not there."""
    torch.manual_seed(0)
    try:
        X, y = _mnist(folder)
        name = "MNIST"
    except FileNotFoundError:
        X, y = _digits()
        name = "digits"
    rows = min(rows, len(y) // 2)
    order = torch.randperm(len(y))
    chosen, clean = order[:rows], order[rows : 2 * rows]
    wrong = torch.rand(rows) < 0.5
    given = torch.where(wrong, (y[chosen] + torch.randint(1, 10, (rows,))) % 10, y[chosen])
    return Cleaning((X[chosen].float(), given), (X[clean].float(), y[clean]), target, name)


def _mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """The training images; format: four-byte header fields, then bytes (IDX, LeCun's page)."""
    files = [folder / f"train-{name}-ubyte" for name in ("images-idx3", "labels-idx1")]
    images, labels = (bytearray(file.read_bytes()) for file in files)
    y = torch.frombuffer(labels, dtype=torch.uint8, offset=8).long()
    return torch.frombuffer(images, dtype=torch.uint8, offset=16).view(len(y), -1) / 255.0, y
