"""Single loops: known solutions, large penalties, first derivatives where they suffice."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import OnceDifferentiable
from problems import Problem, dense_parts, logistic, newton, relative_error, ridge, spd_matrix
from torch import Tensor
from torch.utils.data import DataLoader

import hypergrad as hg
from hypergrad import tree as tr
from hypergrad.block import from_flat, to_flat
from hypergrad.single_loop import BOME, F2SA, MEHA, SABA, SOBA, VPBGD, LoopState, SingleLoop
from hypergrad.single_loop.saba import Table


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


METHODS: dict[str, tuple[SingleLoop, float, float, int, float]] = {
    # The method, step sizes of θ and φ, steps, and the error that they leave.
    "F2SA": (F2SA(lr=0.2, penalty=5.0, growth=0.1), 0.2, 0.05, 1500, 0.02),
    "V-PBGD": (VPBGD(lr=0.45, penalty=50.0), 0.2, 0.02, 1500, 0.03),
    "BOME": (BOME(lr=0.45), 0.02, 0.02, 800, 0.04),
    "MEHA": (MEHA(lr=0.2), 0.2, 0.5, 3000, 0.01),
    "SOBA": (SOBA(lr=0.2), 0.2, 0.1, 300, 1e-6),
    "SABA": (SABA(lr=0.1, generator=seeded()), 0.1, 0.05, 600, 1e-6),
}


def run(
    method: SingleLoop, f: Any, g: Any, w: Any, p: Any, theta_lr: float, phi_lr: float, steps: int
) -> tuple[Any, Any, LoopState]:
    """θ, φ and the state after some steps of gradient descent along the method's directions."""
    state = method.init(w)
    for _ in range(steps):
        found = method.directions(f, g, w, p, state)
        w, p, state = w - theta_lr * found.params, p - phi_lr * found.hparams, found.state
    return w, p, state


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reaches_the_solution_of_a_quadratic_bilevel_problem(name: str) -> None:
    """θ*(φ) = A⁻¹(Bφ + c), so that φ* is the solution of a least-squares problem."""
    method, theta_lr, phi_lr, steps, bound = METHODS[name]
    generator = torch.Generator().manual_seed(0)
    A = spd_matrix(5, 4.0, 0)
    B, c, t = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 3), 5, 5))
    B = 0.4 * B
    J, offset = torch.linalg.solve(A, B), torch.linalg.solve(A, c)
    expected = torch.linalg.solve(torch.eye(3) + J.T @ J, J.T @ (t - offset))

    def inner(w: Tensor, p: Tensor) -> Tensor:
        return 0.5 * w @ A @ w - w @ (B @ p + c)

    def outer(w: Tensor, p: Tensor) -> Tensor:
        return 0.5 * (w - t).square().sum() + 0.5 * p.square().sum()

    f, g = inner, outer
    if method.over_all_batches:
        f = hg.Averaged(lambda w, p, b: b * inner(w, p), [0.5, 1.5])
        g = hg.Averaged(lambda w, p, b: b * outer(w, p), [0.5, 1.5])
    w, p = torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    w, p, state = run(method, f, g, w, p, theta_lr, phi_lr, steps)
    assert state.step == steps
    # A penalty method is biased by the inverse of its last penalty, BOME by its step size.
    assert relative_error(p, expected) < bound
    assert relative_error(w, J @ expected + offset) < bound


@pytest.mark.parametrize("make", [ridge, logistic], ids=["ridge", "logistic"])
def test_a_large_penalty_gives_the_hypergradient(make: Callable[[], Problem]) -> None:
    """At ω = argmin f and θ = argmin f + g/λ it is off by O(1/λ) (Kwon et al. 2023, Lemma 3.1)."""
    problem = make()
    errors = []
    for penalty in (1e3, 1e4):

        def penalised(w: Any, p: Any, penalty: float = penalty) -> Tensor:
            return problem.inner(w, p) + problem.outer(w, p) / penalty

        theta = newton(penalised, problem.params, problem.hparams)
        state = LoopState(0, problem.params)
        found = F2SA(lr=1e-12, penalty=penalty).directions(
            problem.inner, problem.outer, theta, problem.hparams, state
        )
        errors.append(relative_error(found.hparams, problem.hypergradient))
    assert errors[1] < 1e-2
    assert 8.0 < errors[0] / errors[1] < 12.0


def test_the_multiplier_of_bome_closes_the_gap_at_its_rate() -> None:
    """``⟨∇q, ∇g + λ∇q⟩ ≥ η ‖∇q‖²``, with equality wherever λ > 0."""
    problem, method = ridge(), BOME(lr=0.1, eta=0.7, inner_steps=4)
    generator = torch.Generator().manual_seed(0)
    multipliers = []
    for scale in (1e-3, 1e-1, 1.0):
        noise = torch.randn(problem.params.shape, generator=generator, dtype=torch.float64)
        theta = problem.params + scale * noise
        found = method.directions(
            problem.inner, problem.outer, theta, problem.hparams, method.init(theta)
        )

        def gap(w: Tensor, p: Tensor, omega: Tensor = found.state.companion) -> Tensor:
            return problem.inner(w, p) - problem.inner(omega, p)

        q_theta, q_phi = torch.func.grad(gap, argnums=(0, 1))(theta, problem.hparams)
        square = q_theta.square().sum() + q_phi.square().sum()
        rate = ((found.params * q_theta).sum() + (found.hparams * q_phi).sum()) / square
        assert rate > 0.7 * (1 - 1e-9)
        if found.multiplier > 0.0:
            torch.testing.assert_close(rate, torch.tensor(0.7, dtype=torch.float64))
        multipliers.append(found.multiplier)
    assert max(multipliers) > 0.0


FIRST_ORDER = [name for name in METHODS if name not in ("SOBA", "SABA")]


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_derivatives_are_enough_and_nothing_is_changed(name: str) -> None:
    method, *_ = METHODS[name]
    w = torch.tensor([0.5, -0.3], requires_grad=True)
    p = torch.tensor(0.7, requires_grad=True)
    before = torch.get_rng_state()

    def inner(w: Tensor, p: Tensor) -> Tensor:
        return (OnceDifferentiable.apply(w) * p).sum() + w.square().sum() + 0 * torch.rand(()).sum()

    state = method.init(w)
    kept = state.companion.clone()
    found = method.directions(inner, lambda w, p: w.sum() + p, w, p, state)
    assert found.params.shape == w.shape
    assert found.hparams.shape == p.shape
    assert w.grad is None
    assert p.grad is None
    assert torch.equal(state.companion, kept)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.inner_value == pytest.approx(float(inner(w, p)))


@pytest.mark.parametrize("make", [ridge, logistic], ids=["ridge", "logistic"])
def test_soba_at_the_solution_of_both_systems_gives_the_hypergradient(
    make: Callable[[], Problem],
) -> None:
    problem = make()
    H, _, g_theta, _ = dense_parts(problem)
    flat = torch.linalg.solve(H, g_theta)
    v = from_flat(flat, problem.params)
    found = SOBA(lr=0.1).directions(
        problem.inner, problem.outer, problem.params, problem.hparams, LoopState(7, v)
    )
    assert relative_error(found.hparams, problem.hypergradient) < 1e-9
    assert relative_error(found.state.companion, v) < 1e-9
    assert found.state.step == 8
    assert float(to_flat(found.params).norm()) < 1e-9


@pytest.mark.parametrize("method", [F2SA(lr=0.1), SOBA(lr=0.1)], ids=["F2SA", "SOBA"])
def test_averaged_objectives_are_taken_batch_by_batch(method: SingleLoop) -> None:
    problem = ridge()
    halves = hg.Averaged(lambda w, p, b: b * problem.inner(w, p), [0.5, 1.5])
    state = method.init(problem.params)
    at = problem.params + 0.1, problem.hparams, state
    whole = method.directions(problem.inner, problem.outer, *at)
    parts = method.directions(halves, problem.outer, *at)
    torch.testing.assert_close(parts.params, whole.params)
    torch.testing.assert_close(parts.hparams, whole.hparams)


class Batches:
    """A quadratic bilevel problem whose batches differ in all coefficients and weigh differently.

        f_i = wᵀA_i w / 2 − wᵀ(B_i p + c_i),   g_j = s_j |w − t_j|² / 2 + |p − u_j|² / 2

    Attributes:
        inner, outer: the averages.
        solution: φ*, from the normal equations of the averaged coefficients.
    """

    def __init__(self, n_inner: int = 6, n_outer: int = 4) -> None:
        generator = seeded()

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        A = torch.stack([spd_matrix(5, 4.0, i) for i in range(n_inner)])
        B, c, weights = (
            0.4 * draw(n_inner, 5, 3),
            draw(n_inner, 5),
            1.0 + torch.arange(n_inner).double(),
        )
        s, t, u = draw(n_outer).exp(), draw(n_outer, 5), draw(n_outer, 3)
        shares = weights / weights.sum()
        A_mean, B_mean, c_mean = (torch.einsum("i,i...->...", shares, x) for x in (A, B, c))
        J, offset = torch.linalg.solve(A_mean, B_mean), torch.linalg.solve(A_mean, c_mean)
        self.solution = torch.linalg.solve(
            torch.eye(3) + s.mean() * J.T @ J,
            J.T @ ((s[:, None] * t).mean(0) - s.mean() * offset) + u.mean(0),
        )

        def f(w: Tensor, p: Tensor, i: int) -> Tensor:
            return 0.5 * w @ A[i] @ w - w @ (B[i] @ p + c[i])

        def g(w: Tensor, p: Tensor, j: int) -> Tensor:
            return 0.5 * s[j] * (w - t[j]).square().sum() + 0.5 * (p - u[j]).square().sum()

        self.inner = hg.Averaged(f, list(range(n_inner)), weight=lambda i: float(weights[i]))
        self.outer = hg.Averaged(g, tuple(range(n_outer)))
        self.start = torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)


def test_saba_reaches_the_solution_with_constant_steps_where_sampled_soba_stalls() -> None:
    problem = Batches()
    steps = 0.1, 0.02, 1200
    _, exact, _ = run(
        SABA(lr=0.1, generator=seeded()), problem.inner, problem.outer, *problem.start, *steps
    )
    assert relative_error(exact, problem.solution) < 1e-6
    # Each batch as often as it weighs, in random order.
    inner = [i for i in problem.inner.batches for _ in range(1 + i)]
    sampled = [
        hg.Sampled(average.objective, DataLoader(batches, None, shuffle=True, generator=seeded()))
        for average, batches in ((problem.inner, inner), (problem.outer, problem.outer.batches))
    ]
    _, noisy, _ = run(SOBA(lr=0.1), *sampled, *problem.start, *steps)
    assert 1e-3 < relative_error(noisy, problem.solution) < 1.0


def test_the_first_step_of_saba_is_that_of_soba_on_all_batches() -> None:
    problem = Batches()
    w, p = problem.start[0] + 0.3, problem.start[1] - 0.2
    state = LoopState(3, w.sin())
    before = torch.get_rng_state()
    found = SABA(lr=0.1).directions(problem.inner, problem.outer, w, p, state)
    full = SOBA(lr=0.1).directions(problem.inner, problem.outer, w, p, state)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(
        [found.params, found.hparams, found.state.companion],
        [full.params, full.hparams, full.state.companion],
    )
    assert found.inner_value == pytest.approx(full.inner_value)
    assert found.outer_value == pytest.approx(full.outer_value)
    assert found.state.step == 4


def test_the_estimates_of_saba_are_unbiased() -> None:
    """Their mean over all pairs of batches is the direction of SOBA on all of them."""
    problem = Batches(4, 3)
    w, p = problem.start
    state = SABA(lr=0.1).directions(problem.inner, problem.outer, w, p, SABA().init(w)).state
    w, p = w + 0.3, p - 0.2
    full = SOBA(lr=0.1).directions(problem.inner, problem.outer, w, p, state)
    # The values tell which batches were drawn.
    pairs: dict[tuple[float, float], Any] = {}
    for seed in range(100):
        method = SABA(lr=0.1, generator=seeded(seed))
        found = method.directions(problem.inner, problem.outer, w, p, state)
        pairs[found.inner_value, found.outer_value] = found
    assert len(pairs) == 12
    values = {problem.inner.objective(w, p, i).item() for i in range(4)}
    assert {value for value, _ in pairs} == values
    for get in (lambda x: x.params, lambda x: x.hparams, lambda x: x.state.companion):
        every = torch.stack([get(found) for found in pairs.values()])
        assert every.std(0).max() > 1e-2
        torch.testing.assert_close(every.mean(0), get(full))


def test_a_table_shares_what_it_keeps_and_its_mean_does_not_drift() -> None:
    """Float32 entries fall from 1 to 1e-6: the roundings of a float32 mean would stay at 1e-8."""
    generator, n = seeded(), 8
    entries = [{"a": torch.randn(7, generator=generator)} for _ in range(n)]
    first = table = Table.of(entries, [1.0, 2.0] * (n // 2))
    kept = table.mean["a"].clone()
    for step in range(2000):
        entry = {"a": 10 ** (-6 * step / 2000) * torch.randn(7, generator=generator)}
        before, i = table, step % n
        _, table = table.replace(i, entry)
        assert all((table.entries[k] is before.entries[k]) == (k != i) for k in range(n))
    assert torch.equal(first.mean["a"], kept)
    assert first.entries[0] is entries[0]
    exact = sum(
        share * entry["a"].double()
        for share, entry in zip(table.shares, table.entries, strict=True)
    )
    assert 0.0 < float(exact.abs().max()) < 1e-5
    assert float((table.mean["a"] - exact).abs().max()) < 1e-14


@pytest.mark.parametrize("name", METHODS)
def test_a_packed_state_goes_on_as_if_it_had_not_been(name: str) -> None:
    problem = Batches(4, 3)
    method, *_ = METHODS[name]
    resumed = method
    if isinstance(method, SABA):
        method, resumed = (SABA(lr=0.1, generator=seeded(seed)) for seed in (1, 2))
    # Trees of several leaves, in another dtype than the memory's mean.
    inner, outer = (
        hg.Averaged(
            lambda w, p, b, f=f: f(torch.cat([w["a"], w["b"]]).double(), p[0].double(), b),
            average.batches,
            average.weight,
        )
        for average, f in ((a, a.objective) for a in (problem.inner, problem.outer))
    )
    w, p = {"a": torch.ones(2), "b": torch.ones(3)}, (torch.ones(3),)

    def step(method: SingleLoop, w: Any, p: Any, state: LoopState) -> tuple[Any, Any, LoopState]:
        found = method.directions(inner, outer, w, p, state)
        return tr.add(w, found.params, -0.1), tr.add(p, found.hparams, -0.02), found.state

    state = method.init(w)
    state = method.unpack(method.pack(state), w, p)
    for _ in range(5):
        w, p, state = step(method, w, p, state)
    file = io.BytesIO()
    torch.save(method.pack(state), file)
    file.seek(0)
    loaded = resumed.unpack(torch.load(file, weights_only=True), w, p)
    assert loaded.step == state.step == 5
    going = w, p, state
    again = w, p, loaded
    for _ in range(20):
        going, again = step(method, *going), step(resumed, *again)
    for a, b in zip(tr.leaves(going[:2]), tr.leaves(again[:2]), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(tr.leaves(going[2].companion), tr.leaves(again[2].companion), strict=True):
        assert torch.equal(a, b)


def test_averages_and_packed_states_that_do_not_fit_are_named() -> None:
    problem = Batches(4, 3)
    w, p = problem.start
    method = SABA(lr=0.1, generator=seeded())
    state = method.directions(problem.inner, problem.outer, w, p, method.init(w)).state

    def refused(error: type[Exception], words: str, call: Callable[[], Any]) -> None:
        with pytest.raises(error, match=words):
            call()

    f, g = problem.inner, problem.outer
    loader = hg.Averaged(f.objective, DataLoader(f.batches, None))
    shorter = hg.Averaged(f.objective, [0, 1, 2])
    none = hg.Averaged(f.objective, [])
    for inner, outer, error, words in (
        (lambda w, p: w.sum(), g, TypeError, "inner must be a hypergrad.Averaged for SABA"),
        (hg.Sampled(f.objective, [0]), g, TypeError, "got Sampled; pass Averaged"),
        (f, lambda w, p: w.sum(), TypeError, "outer must be a hypergrad.Averaged for SABA"),
        (loader, g, TypeError, "got a DataLoader; pass list"),
        (shorter, g, ValueError, "made of, 4 of them, got 3; start afresh"),
    ):
        refused(error, words, lambda f=inner, g=outer: method.directions(f, g, w, p, state))
    refused(
        ValueError, "at least one batch", lambda: method.directions(none, g, w, p, method.init(w))
    )
    refused(
        ValueError,
        r"state\.memory\.inner must have the shapes",
        lambda: method.directions(f, g, w, p[:2], state),
    )

    packed = method.pack(state)
    memory = packed["memory"]
    for changed, words in (
        ({"step": 3}, "packed must be a dict with the keys"),
        (packed | {"companion": [w[:4]]}, r"packed\['companion'\] must have the shapes of params"),
        (packed | {"companion": [w, w]}, "a list of the 1 leaves of params, got 2"),
        (packed | {"companion": [w.float()]}, "its dtypes or wider ones"),
        (packed | {"memory": [1]}, r"packed\['memory'\] must be a dict"),
        (packed | {"memory": memory | {"inner": memory["outer"]}}, "3 leaves of an entry, got 2"),
        (packed | {"memory": memory | {"outer": []}}, "a list of shares, mean and entries"),
        (packed | {"memory": memory | {"generator": torch.ones(3)}}, "the state of a generator"),
    ):
        before = method.generator.get_state()  # type: ignore[union-attr]
        refused(ValueError, words, lambda changed=changed: method.unpack(changed, w, p))
        assert torch.equal(method.generator.get_state(), before)  # type: ignore[union-attr]
    refused(ValueError, "there is none to go on with", lambda: SABA().unpack(packed, w, p))
    refused(ValueError, "None for SOBA, which has no mem", lambda: SOBA().unpack(packed, w, p))


@pytest.mark.parametrize("make", [BOME, F2SA, MEHA, SABA, SOBA, VPBGD])
def test_a_step_size_may_be_left_open_until_the_first_step(make: Callable[..., Any]) -> None:
    problem = ridge()
    state = make().init(problem.params)
    with pytest.raises(ValueError, match=f"lr must be given to {make.__name__} outside a Bilevel"):
        make().directions(problem.inner, problem.outer, problem.params, problem.hparams, state)
    with pytest.raises(ValueError, match="lr must be a finite number > 0"):
        make(lr=-1.0)


MISTAKES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: F2SA(lr=0.0), ValueError, "lr must be a finite number > 0"),
    (lambda: F2SA(lr=0.1, growth=-1.0), ValueError, "growth must be a finite number >= 0"),
    (lambda: VPBGD(lr=0.1, penalty=0.0), ValueError, "penalty must be"),
    (lambda: VPBGD(lr=0.1, inner_steps=0), ValueError, "inner_steps must be at least 1"),
    (lambda: BOME(lr=0.1, eta=0.0), ValueError, "eta must be"),
    (lambda: MEHA(lr=0.1, power=0.5), ValueError, "power must be a number < 0.5"),
    (lambda: SOBA(lr=-1.0), ValueError, "lr must be"),
    (lambda: SOBA(lr=1.0, mode="sideways"), ValueError, "mode must be one of"),
    (lambda: MEHA(lr=0.1, gamma=-1.0), ValueError, "gamma must be"),
    (lambda: SABA(mode="sideways"), ValueError, "mode must be one of"),
    (lambda: SABA(generator=3), TypeError, "generator must be a torch.Generator or None, got int"),
    (lambda: F2SA(lr=0.1).init({}), ValueError, "params must hold at least one tensor"),
    (
        lambda: F2SA(lr=0.1).directions(
            ridge().inner, ridge().outer, ridge().params, ridge().hparams,
            LoopState(0, torch.ones(2)),
        ),
        ValueError,
        r"state\.companion must have the shapes of params",
    ),
    (
        lambda: F2SA(lr=0.1).directions(
            3, ridge().outer, ridge().params, ridge().hparams, LoopState(0, ridge().params)
        ),
        TypeError,
        "inner must be a function",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "error", "message"), MISTAKES, ids=lambda x: "")
def test_mistakes_are_named(
    mistake: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        mistake()
