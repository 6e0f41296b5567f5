"""The default damping: none where a plain solve goes well, else what the curvature asks for."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import ridge_solver
from problems import mlp, quadratic, ridge
from torch import Tensor, nn

import hypergrad as hg
from hypergrad import Status
from hypergrad import tree as tr
from hypergrad.linsolve import AutoDamping, LinearSolver, sufficient_damping
from hypergrad.linsolve.base import Counted
from hypergrad.operators import Matrix

Params = dict[str, Tensor]
CROSS_ENTROPY = nn.functional.cross_entropy


def symmetric(eigenvalues: list[float], seed: int = 0) -> Tensor:
    """A float64 matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return Q @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ Q.T


INDEFINITE = symmetric([-0.5, -0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0])
B = torch.ones(8, dtype=torch.float64)


def tanh_network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


class Recurrent(nn.Module):
    """An LSTM over three steps of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.reshape(-1, 3, 2))[0][:, -1])  # type: ignore[no-any-return]


class TinyTransformer(nn.Module):
    """Two layers of causal attention over words, as GPT-2 has them, and the next word."""

    def __init__(self, words: int = 7, width: int = 8, length: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        layers: list[nn.Module] = []
        for _ in range(2):
            parts = {
                "first": nn.LayerNorm(width), "second": nn.LayerNorm(width),
                "attend": nn.MultiheadAttention(width, 2, batch_first=True),
                "feed": nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width)),
            }  # fmt: skip
            layers.append(nn.ModuleDict(parts))
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, words)
        self.register_buffer("future", torch.ones(length, length).triu(1).bool())

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words) + self.places
        for layer in self.layers:
            normed = layer["first"](x)  # type: ignore[index]
            x = x + layer["attend"](normed, normed, normed, attn_mask=self.future)[0]  # type: ignore[index]
            x = x + layer["feed"](layer["second"](x))  # type: ignore[index]
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("make", [tanh_network, Recurrent])
def test_a_network_before_its_minimum_has_a_hypergradient(make: Callable[[], nn.Module]) -> None:
    """Of some size at every stage of training, by the default call."""
    torch.manual_seed(0)
    X, y = torch.randn(60, 6), torch.randint(0, 3, (60,))
    model = make()

    def f(model: nn.Module, h: Tensor) -> Tensor:
        each = CROSS_ENTROPY(model(X[:40]), y[:40], reduction="none")
        return (h.sigmoid() * each).mean()

    def g(model: nn.Module, h: Tensor) -> Tensor:
        return CROSS_ENTROPY(model(X[40:]), y[40:])

    h, optimizer = torch.zeros(40), torch.optim.Adam(model.parameters(), 1e-2)
    dampings = []
    for _ in range(4):
        for _ in range(40):
            optimizer.zero_grad()
            f(model, h).backward()
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hg.DampingWarning)
            result = hg.hypergradient(f, g, model, h)
        assert result.solve.converged
        assert result.grads.norm() > 1e-3
        dampings.append(result.damping)
    assert max(dampings) > 0.0


def test_a_loop_over_a_transformer_by_all_defaults_never_has_a_zero_hypergradient() -> None:
    torch.manual_seed(0)
    text = torch.randint(0, 7, (100, 6))
    text[:, 1::2] = text[:, ::2]  # half of it can be learned
    noisy = text[:60].clone()
    noisy[:30, 1::2] = torch.randint(0, 7, (30, 3))
    model = TinyTransformer()
    weights = torch.zeros(60)

    def losses(model: nn.Module, rows: Tensor) -> Tensor:
        logits = model(rows[:, :-1])
        return CROSS_ENTROPY(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)

    def f(model: nn.Module, h: Tensor, _: Any) -> Tensor:
        norm = sum(w.square().sum() for w in model.parameters())
        return (h.sigmoid() * losses(model, noisy)).mean() + 1e-3 * norm

    def g(model: nn.Module, h: Tensor, _: Any) -> Tensor:
        return losses(model, text[60:]).mean()

    solver = hg.BilevelSolver(
        hg.Level(f, model, torch.optim.Adam(model.parameters(), 3e-3)),
        hg.Level(g, weights, torch.optim.Adam([weights], 0.3)),
        inner_steps=5,
        outer_steps=10,
        warmup_steps=80,
        seed=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hg.DampingWarning)
        history = solver.run()
    assert min(history["hypergradient_norm"]) > 1e-4
    assert history["outer_loss"][-1] < 0.95 * history["outer_loss"][0]
    assert set(history["status"]) == {"CONVERGED"}
    assert max(history["damping"]) > 0.0


@pytest.mark.parametrize("problem", [ridge(), quadratic(60, 1e4)], ids=lambda p: p.name)
def test_positive_definite_problems_keep_every_bit_and_product(problem: Any) -> None:
    arguments = (problem.inner, problem.outer, problem.params, problem.hparams)
    plain = hg.hypergradient(*arguments, method=hg.Implicit(damping=0.0), verify="never")
    default = hg.hypergradient(*arguments, verify="never")
    assert default.damping == 0.0
    assert default.solve.matvecs == plain.solve.matvecs
    for one, other in zip(tr.leaves(default.grads), tr.leaves(plain.grads), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "solver",
    [hg.MINRES(), hg.GMRES(), hg.Dense(), hg.Nystrom(8, generator=torch.Generator()),
     hg.Identity(), hg.Neumann(terms=3, step=1e-3)],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_solvers_that_do_not_mind_negative_curvature_are_left_alone(solver: LinearSolver) -> None:
    """A short sum has not grown yet: it is approximate by design."""

    def seeded() -> LinearSolver:
        if isinstance(solver, hg.Nystrom) and solver.generator is not None:
            solver.generator.manual_seed(0)
        return solver

    b = torch.linalg.eigh(INDEFINITE).eigenvectors[:, 4:].sum(1)
    plain = seeded().solve(Matrix(INDEFINITE), b)
    solution, damping = AutoDamping().solve(seeded(), Matrix(INDEFINITE), b)
    assert damping == 0.0
    assert torch.equal(solution.x, plain.x)
    assert solution.matvecs == plain.matvecs


@pytest.mark.parametrize(
    "solver",
    [hg.CG(), hg.BlockCG(), hg.Neumann(terms=2000), hg.CG(preconditioner=lambda r: 0.5 * r)],
    ids=["CG", "BlockCG", "Neumann", "preconditioned"],
)
def test_what_is_added_is_enough_and_every_product_is_counted(solver: LinearSolver) -> None:
    counted = Counted(Matrix(INDEFINITE))
    auto = AutoDamping()
    solution, damping = auto.solve(solver, counted, B)
    assert not solution.status.failed
    assert 0.5 < damping < 2.5
    exact = torch.linalg.solve(INDEFINITE + damping * torch.eye(8, dtype=torch.float64), B)
    assert float((solution.x - exact).norm()) < 1e-3 * float(exact.norm())
    assert solution.matvecs == counted.matvecs
    # The next solve starts from what this one needed.
    again, next_damping = auto.solve(solver, counted, B)
    assert not again.status.failed
    assert 0.5 < next_damping < 2.5
    assert solution.matvecs + again.matvecs == counted.matvecs


def test_cg_has_seen_the_ends_of_the_spectrum() -> None:
    A = symmetric([0.3, 0.7, 1.0, 2.0, 5.0])
    seen = hg.CG(rtol=1e-12).solve(Matrix(A), B[:5]).seen
    assert seen is not None
    assert seen.ends() == pytest.approx((0.3, 5.0), rel=1e-6)
    few = hg.CG(rtol=None, maxiter=3).solve(Matrix(A), B[:5]).seen
    assert few is not None
    T = torch.diag(torch.tensor(few.diagonal))
    T = T + torch.diag(torch.tensor(few.off), 1) + torch.diag(torch.tensor(few.off), -1)
    values = torch.linalg.eigvalsh(T.double())
    assert few.ends() == pytest.approx((float(values[0]), float(values[-1])), rel=1e-5)
    assert few.ends()[0] >= 0.3 - 1e-9
    assert few.ends()[1] <= 5.0 + 1e-9
    # The direction of negative curvature that ends a run is part of it.
    ended = hg.CG().solve(Matrix(INDEFINITE), B)
    assert ended.status is Status.NEGATIVE_CURVATURE
    assert ended.seen is not None
    assert -0.5 <= ended.seen.ends()[0] < 0.0


def test_damping_falls_again_and_ends_at_zero() -> None:
    auto = AutoDamping()
    _, first = auto.solve(hg.CG(), Matrix(INDEFINITE), B)
    better = Matrix(INDEFINITE + 0.6 * torch.eye(8, dtype=torch.float64))
    dampings = [auto.solve(hg.CG(), better, B)[1] for _ in range(80)]
    assert first > 0.0
    assert all(a > b or a == b == 0.0 for a, b in itertools.pairwise(dampings))
    assert dampings[-1] == 0.0
    plain = hg.CG().solve(better, B)
    assert torch.equal(auto.solve(hg.CG(), better, B)[0].x, plain.x)


def test_where_no_damping_helps_the_first_answer_stands() -> None:
    """A step that is too long for the largest eigenvalue diverges the faster with damping."""
    positive = Matrix(symmetric([1.0, 2.0, 30.0]))
    negative = Matrix(symmetric([-1.0, 2.0, 30.0]))
    rotation = Matrix(torch.tensor([[0.0, 3.0], [-3.0, 0.0]], dtype=torch.float64))
    solver = hg.Neumann(terms=500, step=0.5)
    for operator, b in ((positive, B[:3]), (negative, B[:3]), (rotation, B[:2])):
        plain = solver.solve(operator, b)
        solution, damping = AutoDamping().solve(solver, operator, b)
        assert solution.status is plain.status is Status.DIVERGED
        assert torch.equal(solution.x, plain.x)
        assert damping == 0.0


def test_a_matrix_of_zeros_has_no_scale() -> None:
    solution, damping = AutoDamping().solve(hg.CG(), Matrix(torch.zeros(3, 3)), torch.ones(3))
    assert damping == 1.0
    assert torch.allclose(solution.x, torch.ones(3))
    assert sufficient_damping(0.0, 0.0) == 1.0


def test_more_than_the_largest_curvature_is_warned_of() -> None:
    def inner(w: Tensor, c: Tensor) -> Tensor:
        return 0.5 * (scale * w.square()).sum() + c * w.sum()

    w, c = torch.tensor([1.0, 1.0]), torch.tensor(1.0)
    arguments = (inner, lambda w, c: w.square().sum(), w, c)
    scale = torch.tensor([1.0, -0.9])
    words = r"took 1.8\d*, more than the largest curvature .* 1"
    with pytest.warns(hg.DampingWarning, match=words):
        result = hg.hypergradient(*arguments)
    assert result.damping > 1.8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hg.hypergradient(*arguments, on_failure="ignore")
        scale = torch.tensor([1.0, -0.1])
        assert 0.0 < hg.hypergradient(*arguments).damping < 0.3


def test_a_solve_of_nothing_says_so_and_what_to_type() -> None:
    def inner(w: Tensor, c: Tensor) -> Tensor:
        return -0.5 * w.square().sum() + (c * w).sum()

    w = c = torch.ones(2)
    with pytest.warns(hg.LinearSolveWarning) as caught:
        result = hg.hypergradient(
            inner, lambda w, c: w.sum() + c.sum(), w, c, method=hg.Implicit(damping=0.0)
        )
    words = str(caught[0].message)
    assert "damping='auto'" in words
    assert "the hypergradient is ∂g/∂φ alone" in words
    assert torch.equal(result.grads, torch.ones(2))
    with pytest.raises(hg.LinearSolveError, match="nothing was solved"):
        hg.hypergradient(
            inner,
            lambda w, c: w.sum() + c.sum(),
            w,
            c,
            method=hg.Implicit(damping=0.0),
            on_failure="raise",
        )


def saddle_solver(**options: Any) -> hg.BilevelSolver:
    """A quartic well whose top is the start: negative curvature for a while."""

    def inner(w: Tensor, c: Tensor, _: Any) -> Tensor:
        return 0.25 * (w.square() - 1.0).square().sum() + 0.1 * (c * w).sum()

    def outer(w: Tensor, c: Tensor, _: Any) -> Tensor:
        return 0.5 * (w - 1.2).square().sum()

    w, c = torch.full((4,), 0.1).double() * torch.arange(1, 5), torch.zeros(4).double()
    arguments: dict[str, Any] = {
        "inner_optimizer": torch.optim.SGD([w], lr=0.1),
        "outer_optimizer": torch.optim.SGD([c], lr=0.01),
        "inner_steps": 2, "outer_steps": 12, "seed": 0,
    }  # fmt: skip
    return hg.BilevelSolver(inner, outer, w, c, **arguments | options)


def test_a_resumed_loop_remembers_its_damping(tmp_path: Path) -> None:
    whole = saddle_solver()
    with pytest.warns(hg.DampingWarning, match="make more inner_steps or warmup_steps"):
        whole.run()
    assert whole.history["damping"][0] > 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hg.DampingWarning)
        began = saddle_solver(outer_steps=4)
        began.run()
        began.save(tmp_path / "state.pt")
        resumed = saddle_solver()
        resumed.load(tmp_path / "state.pt")
        resumed.run()
    assert resumed.history["damping"] == whole.history["damping"]
    assert resumed.history["matvecs"] == whole.history["matvecs"]
    assert torch.equal(resumed.hparams, whole.hparams)
    assert whole.history["damping"][4] > 0.0
    assert whole.history["damping"][-1] < whole.history["damping"][4]


def test_the_damping_of_a_step_is_in_its_record() -> None:
    solver = ridge_solver()
    assert [record["damping"] for record in solver] == [0.0, 0.0, 0.0]
    fixed = ridge_solver(method=hg.Implicit(damping=0.5))
    assert fixed.step()["damping"] == 0.5


@pytest.mark.parametrize("start", [-1.0, math.inf, math.nan])
def test_a_bad_start_is_refused(start: float) -> None:
    with pytest.raises(ValueError, match="start must be a finite number >= 0"):
        AutoDamping(start)


def test_one_memory_serves_many_calls() -> None:
    problem = mlp()
    arguments = (problem.inner, problem.outer, problem.params, problem.hparams)
    auto = AutoDamping()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hg.DampingWarning)
        first = hg.hypergradient(*arguments, method=hg.Implicit(damping=auto))
        second = hg.hypergradient(*arguments, method=hg.Implicit(damping=auto), x0=first.solve.x)
    assert second.damping > 0.0
    assert second.solve.converged
    assert second.solve.matvecs < first.solve.matvecs
