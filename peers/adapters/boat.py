"""BOAT: a problem is a dictionary of configuration, and ``run_iter`` one outer step of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boat_torch
import torch
from torch import Tensor, nn

from peers.adapters import NoSuchMethod, Vector, plain_optimizer
from peers.cleaning import INNER_LR, Cleaning, Watch
from peers.problems import Problem

DISTRIBUTION = "boat-torch"
MODULE = "peers.adapters.boat_losses"


def implicit(problem: Problem, method: str, **settings: Any) -> Callable[[], Tensor]:
    """``["CG"]`` or ``["NS"]`` after one step of SGD from θ, the fewest that it allows.

    The rate of that step scales the fixed-point map whose Jacobian is solved with. At the minimum
    the step itself changes nothing.
    """
    operation = {"cg": "CG", "neumann": "NS"}.get(method)
    if operation is None:
        raise NoSuchMethod
    network = problem.network()
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.get("alpha", 0.1))
    return _outer_step(problem, network, optimizer, operation, 1, settings["iterations"])


def unrolled(problem: Problem, optimizer: str, steps: int, lr: float) -> Callable[[], Tensor]:
    """``["RAD"]``."""
    network = problem.network()
    plain = plain_optimizer(optimizer, network.parameters(), lr)
    return _outer_step(problem, network, plain, "RAD", steps, 1)


def cleaning(
    data: Cleaning, method: str, lr: float, inner_steps: int, iterations: int = 1
) -> Callable[[], dict[str, Any]]:
    """``run_iter`` after ``run_iter``, each from where the last one ended."""
    operation = {"cg": "CG", "neumann": "NS", "unrolled": "RAD"}.get(method)
    if operation is None:
        raise NoSuchMethod

    def run() -> dict[str, Any]:
        network, upper = data.network(), Vector(data.hparams())
        watch = Watch(data)
        boat = _problem(
            network, torch.optim.SGD(network.parameters(), lr=INNER_LR, momentum=0.9),
            upper, torch.optim.Adam(upper.parameters(), lr=lr),
            operation, inner_steps, iterations, ("weighted", "upper"), whole=True,
        )  # fmt: skip
        feeds = [{"x": x, "y": y} for x, y in (data.train, data.validation)]
        while True:
            boat.run_iter(*feeds, 0)
            boat.loss_history.clear()
            if watch.look(network.parameters()):
                return watch.result()

    return run


def _outer_step(
    problem: Problem,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    operation: str,
    steps: int,
    iterations: int,
) -> Callable[[], Tensor]:
    upper = Vector(problem.hparams)
    boat = _problem(
        network, optimizer, upper, torch.optim.SGD(upper.parameters(), lr=0.0),
        operation, steps, iterations, ("lower", "upper"), whole=False,
    )  # fmt: skip
    feeds = [{"x": x, "y": y} for x, y in (problem.train, problem.validation)]

    def run() -> Tensor:
        upper.value.grad = None
        boat.loss_history.clear()  # it is written to a file anew at each step
        (grads,), _ = boat.run_iter(*feeds, 0)
        return grads.clone()

    return run


def _problem(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    upper: nn.Module,
    outer_optimizer: torch.optim.Optimizer,
    operation: str,
    steps: int,
    iterations: int,
    losses: tuple[str, str],
    whole: bool,
) -> Any:
    config = {
        "fo_op": None,
        "gm_op": ["NGD"],
        "na_op": [operation],
        "lower_iters": steps,
        "lower_level_model": network,
        "lower_level_var": list(network.parameters()),
        "lower_level_opt": optimizer,
        "upper_level_model": upper,
        "upper_level_var": list(upper.parameters()),
        "upper_level_opt": outer_optimizer,
        "return_grad": not whole,
        "copy_last_param": whole,
        "accumulate_grad": False,
        "fo_ol_batch_input": False,
        "device": "cpu",
        "loss_log_path": str(Path(tempfile.mkdtemp()) / "losses.json"),
        "CG": {"k": iterations, "tolerance": 0.0},
        "NS": {"k": iterations, "tolerance": 0.0},
        "DI": {"lr": 0.0},
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.9},
        "RGT": {"truncate_iter": 0},
        "FD": {"r": 1e-2},
    }
    levels = zip(("lower_level_loss", "upper_level_loss"), losses, strict=True)
    boat = boat_torch.Problem(
        config, {level: {"function": f"{MODULE}.{name}", "params": {}} for level, name in levels}
    )
    boat.build_ll_solver()
    boat.build_ul_solver()
    return boat
