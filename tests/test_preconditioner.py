"""Preconditioners: what they are, what they save, and when they are made anew."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import spd_matrix
from systems import CountingMatrix, residual, rhs_for

import hypergrad as hg
from hypergrad import Status
from hypergrad import tree as tr
from hypergrad.operators import Damped, Matrix


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decaying(n: int, tail: float) -> torch.Tensor:
    """Eigenvalues 1, 1/2, 1/4, … down to `tail`."""
    return rotated((0.5 ** torch.arange(n, dtype=torch.float64)).clamp(min=tail))


def rotated(values: torch.Tensor) -> torch.Tensor:
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=seeded(), dtype=torch.float64)).Q
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


def dense_map(apply: Callable, n: int) -> torch.Tensor:
    return torch.stack([apply(e) for e in torch.eye(n, dtype=torch.float64)])


@pytest.mark.parametrize(
    ("test", "chunk_size"),
    [
        ("gaussian", None),
        ("gaussian", 4),
        ("coordinates", None),
        ("coordinates", 4),
        ("orthonormal", None),
    ],
)
def test_a_nystrom_preconditioner_is_the_formula_it_says(test: str, chunk_size: int | None) -> None:
    """τ U Λ⁻¹ Uᵀ + I − U Uᵀ, U and Λ from a dense eigendecomposition of the approximation."""
    A, n, k = spd_matrix(30, 100.0, 0), 30, 8
    preconditioner = hg.NystromPreconditioner(
        k,
        test=test,
        chunk_size=chunk_size,
        generator=seeded(),  # type: ignore[arg-type]
    )
    M = dense_map(preconditioner.prepare(Matrix(A)), n)
    assert preconditioner.sketch is not None
    Omega = torch.cat(list(preconditioner.sketch.test.blocks(100)))
    C = A @ Omega.T
    approximation = C @ torch.linalg.inv(Omega @ C) @ C.T
    values, U = torch.linalg.eigh((approximation + approximation.T) / 2)
    values, U = values[-k:], U[:, -k:]
    expected = torch.eye(n) + (U * (values[0] / values - 1.0)) @ U.T
    torch.testing.assert_close(M, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        preconditioner.sketch.eigenvalues, values.flip(0), rtol=1e-8, atol=0.0
    )


@pytest.mark.parametrize("make", [hg.NystromPreconditioner, hg.JacobiPreconditioner])
def test_every_preconditioner_is_symmetric_positive_definite(make: Callable) -> None:
    indefinite = spd_matrix(20, 50.0, 0) - 20 * torch.eye(20, dtype=torch.float64)
    zero = torch.zeros(20, 20, dtype=torch.float64)
    for A in (spd_matrix(20, 50.0, 0), indefinite, zero):
        M = dense_map(make(5, generator=seeded()).prepare(Matrix(A)), 20)
        torch.testing.assert_close(M, M.T)
        assert torch.linalg.eigvalsh(M)[0] > 0.0


def test_the_sketch_takes_the_top_of_the_spectrum_away() -> None:
    values = 1.0 + 1e4 / torch.arange(1, 201, dtype=torch.float64) ** 3
    A, b = rotated(values), rhs_for(200)
    plain = hg.CG(rtol=1e-8).solve(Matrix(A), b)
    assisted = hg.CG(rtol=1e-8, preconditioner=hg.NystromPreconditioner(20)).solve(Matrix(A), b)
    assert assisted.status is Status.CONVERGED
    assert residual(A, assisted, b) <= 1.01e-8
    assert assisted.iterations < plain.iterations / 2
    indefinite = A - 0.1 * torch.eye(200, dtype=torch.float64)
    minres = hg.MINRES(rtol=1e-8)
    helped = hg.MINRES(rtol=1e-8, preconditioner=hg.NystromPreconditioner(20))
    assert helped.solve(Matrix(indefinite), b).status is Status.CONVERGED
    assert minres.solve(Matrix(indefinite), b).status is Status.CONVERGED


def test_gaussian_sketches_are_nearer_than_coordinates_at_the_same_rank() -> None:
    """Where eigenvectors are sparse, most coordinates know nothing of the largest of them."""
    A = torch.diag(1.0 / torch.arange(1, 101, dtype=torch.float64) ** 2)
    errors = {}
    for test in ("gaussian", "coordinates"):
        sketches = [
            hg.Nystrom(rank=10, test=test, generator=seeded(s)).sketch(Matrix(A))  # type: ignore[arg-type]
            for s in range(5)
        ]
        lost = [float(A.trace() - sketch.eigenvalues.sum()) for sketch in sketches]
        errors[test] = sorted(lost)[2]
    assert 0.0 < errors["gaussian"] < 0.5 * errors["coordinates"]


def test_automatic_rank_grows_until_it_is_enough() -> None:
    A = decaying(200, 1e-9)
    counter = CountingMatrix(A)
    sketch = hg.Nystrom(rank="auto", rho=1e-4, test="gaussian", generator=seeded()).sketch(counter)
    rank = len(sketch.eigenvalues)
    assert rank == 16  # 2⁻¹⁶ < 1e-4 < 2⁻⁸
    assert counter.products == rank, "doubling reuses the products it has"
    assert sketch.eigenvalues[-1] <= 1e-4
    limited = hg.Nystrom(rank="auto", rho=1e-4, max_rank=9).sketch(Matrix(A))
    assert len(limited.eigenvalues) == 9
    by_damping = hg.NystromPreconditioner("auto", tolerance=1e-12, generator=seeded())
    by_damping.prepare(Damped(Matrix(A, lower_bound=0.0), 1e-3))
    assert by_damping.sketch is not None
    assert len(by_damping.sketch.test) == 8  # 2⁻⁸ is below ten times the damping
    chunked = hg.NystromPreconditioner("auto", tolerance=1e-3, chunk_size=3, generator=seeded())
    b = rhs_for(200)
    solution = hg.CG(rtol=1e-8, preconditioner=chunked).solve(Damped(Matrix(A), 1e-3), b)
    assert solution.status is Status.CONVERGED
    assert residual(A + 1e-3 * torch.eye(200, dtype=torch.float64), solution, b) <= 1.01e-8


def test_jacobi_estimates_the_diagonal() -> None:
    scales = torch.logspace(0, 5, 100, dtype=torch.float64)
    A = scales.sqrt().diag() @ spd_matrix(100, 3.0, 0) @ scales.sqrt().diag()
    preconditioner = hg.JacobiPreconditioner(200, generator=seeded())
    M = preconditioner.prepare(Matrix(A))(torch.ones(100, dtype=torch.float64))
    # Each estimate has the standard deviation of its row beside the diagonal, by √200.
    deviation = ((A.square().sum(1) - A.diagonal().square()) / 200).sqrt()
    large = A.diagonal() > 1e-2 * A.diagonal().mean()
    assert ((1 / M - A.diagonal()).abs() <= 4 * deviation)[large].all()
    b = rhs_for(100)
    plain = hg.CG(rtol=1e-6).solve(Matrix(A), b)
    assisted = hg.CG(rtol=1e-6, preconditioner=preconditioner).solve(Matrix(A), b)
    assert assisted.status is Status.CONVERGED
    assert assisted.iterations < plain.iterations / 2


def test_a_kept_preconditioner_is_made_anew_only_when_it_stops_helping() -> None:
    A, b = decaying(200, 1e-4), rhs_for(200)
    preconditioner = hg.NystromPreconditioner(20, generator=seeded())
    solver = hg.CG(rtol=1e-6, preconditioner=preconditioner)
    first = solver.solve(Matrix(A), b)
    sketch = preconditioner.sketch
    second = solver.solve(Matrix(1.01 * A), b)
    assert preconditioner.sketch is sketch
    assert second.matvecs <= first.matvecs - 20
    # Another matrix altogether: one slow solve, then a new sketch.
    other = decaying(200, 1e-4).flip(0, 1)
    stale = solver.solve(Matrix(other), b)
    assert preconditioner.sketch is sketch
    fresh = solver.solve(Matrix(other), b)
    assert preconditioner.sketch is not sketch
    assert stale.status is fresh.status is Status.CONVERGED
    assert fresh.iterations < stale.iterations / 1.5


def test_every_product_of_a_preconditioner_is_counted() -> None:
    b = rhs_for(40)
    for preconditioner in (
        hg.NystromPreconditioner(8),
        hg.NystromPreconditioner(8, chunk_size=3),
        hg.NystromPreconditioner(8, refresh="always"),
        hg.JacobiPreconditioner(4),
    ):
        for make in (hg.CG, hg.MINRES, hg.GMRES):
            for seed in (0, 1):
                counter = CountingMatrix(spd_matrix(40, 100.0, seed))
                solution = make(preconditioner=preconditioner).solve(counter, b)
                assert solution.status is Status.CONVERGED
                assert solution.matvecs == counter.products


def test_refresh_may_be_forced_or_forbidden() -> None:
    A, b = Matrix(spd_matrix(40, 100.0, 0)), rhs_for(40)
    other = Matrix(spd_matrix(40, 1e4, 1))
    always = hg.NystromPreconditioner(5, refresh="always")
    never = hg.NystromPreconditioner(5, refresh="never")
    kept = {}
    for name, preconditioner in (("always", always), ("never", never)):
        solver = hg.CG(preconditioner=preconditioner)
        solver.solve(A, b)
        before = preconditioner.sketch
        solver.solve(other, b)
        solver.solve(other, b)
        kept[name] = preconditioner.sketch is before
    assert kept == {"always": False, "never": True}
    # A system of another size needs another map, whatever was said.
    assert hg.CG(preconditioner=never).solve(Matrix(torch.eye(3)), torch.ones(3)).converged


def test_preconditioners_work_on_trees_in_mixed_precision() -> None:
    n = 12
    A, b = spd_matrix(n, 50.0, 0), rhs_for(n)
    like = {"w": b[:8].reshape(2, 4).float(), "b": [b[8:11].float(), b[11].float()]}
    for make in (hg.NystromPreconditioner, hg.JacobiPreconditioner):
        solution = hg.CG(rtol=1e-5, preconditioner=make(4)).solve(
            Matrix(A.float(), like=like), like
        )
        assert solution.status is Status.CONVERGED
        assert all(leaf.dtype == torch.float32 for leaf in tr.leaves(solution.x))


KINDS: dict[str, Callable[..., hg.JacobiPreconditioner | hg.NystromPreconditioner]] = {
    "jacobi": lambda g: hg.JacobiPreconditioner(3, generator=g),
    "gaussian": lambda g: hg.NystromPreconditioner(8, generator=g),
    "coordinates": lambda g: hg.NystromPreconditioner(8, test="coordinates", generator=g),
    "orthonormal": lambda g: hg.NystromPreconditioner(8, test="orthonormal", generator=g),
    "auto": lambda g: hg.NystromPreconditioner("auto", generator=g),
    "always": lambda g: hg.NystromPreconditioner(8, refresh="always", generator=g),
    "chunked": lambda g: hg.NystromPreconditioner(8, chunk_size=3, generator=g),
}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def split_tree(b: torch.Tensor) -> dict[str, Any]:
    return {"w": b[:30].reshape(5, 6), "b": [b[30:]]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_preconditioner_goes_on_bit_for_bit(kind: str) -> None:
    like = split_tree(rhs_for(40))
    first, second = (KINDS[kind](seeded(seed)) for seed in (1, 2))
    hg.CG(preconditioner=first).solve(Matrix(spd_matrix(40, 10.0, 0), like=like), like)
    sketch, drawn = getattr(first, "sketch", None), first.state_dict()["generator"]
    state = through_a_file(first.state_dict())
    second.load_state_dict(state, like)
    assert (state["map"] is None) == (kind in ("always", "chunked"))
    if state["map"] is not None and sketch is not None:
        loaded = second.sketch  # type: ignore[union-attr]
        assert torch.equal(loaded.eigenvalues, sketch.eigenvalues)
        for a, b in zip(loaded.test.blocks(3), sketch.test.blocks(3), strict=True):
            assert all(map(torch.equal, tr.leaves(a), tr.leaves(b)))
    # So much harder that the kept map, once used, is made anew from where the generator is.
    harder = Matrix(spd_matrix(40, 1e4, 1), like=like)
    for _ in range(3):
        going = hg.CG(preconditioner=first).solve(harder, like)
        again = hg.CG(preconditioner=second).solve(harder, like)
        assert going.status is again.status is Status.CONVERGED
        assert (going.iterations, going.matvecs) == (again.iterations, again.matvecs)
        assert all(map(torch.equal, tr.leaves(going.x), tr.leaves(again.x)))
    assert not torch.equal(first.state_dict()["generator"], drawn), "no map was made anew"


def test_a_map_that_no_longer_helps_is_not_saved_and_a_map_of_nothing_is() -> None:
    b = rhs_for(40)
    stale = hg.NystromPreconditioner(8, generator=seeded())
    stale.prepare(Matrix(spd_matrix(40, 100.0, 0)))
    for iterations in (5, 50):
        stale.observe(iterations)
    assert stale.state_dict()["map"] is None
    # The diagonal of zero is no preconditioner: its map is the identity, and stays it.
    empty, loaded = hg.JacobiPreconditioner(), hg.JacobiPreconditioner()
    empty.prepare(Matrix(torch.zeros(40, 40, dtype=torch.float64)))
    loaded.load_state_dict(through_a_file(empty.state_dict()), b)
    assert torch.equal(loaded.prepare(Matrix(spd_matrix(40, 100.0, 0)))(b), b)


@pytest.mark.parametrize("kind", ["jacobi", "gaussian", "orthonormal"])
def test_a_map_for_half_precision_is_saved_in_float32(kind: str) -> None:
    A = decaying(40, 1e-2).bfloat16()
    like = split_tree(rhs_for(40).bfloat16())
    first, second = (KINDS[kind](seeded(seed)) for seed in (1, 2))
    M = first.prepare(Matrix((A + A.T) / 2, like=like))
    second.load_state_dict(through_a_file(first.state_dict()), like)
    vector = tr.at_least_float32(like)
    again = second.prepare(Matrix(A, like=like))
    assert all(map(torch.equal, tr.leaves(M(vector)), tr.leaves(again(vector))))
    assert torch.equal(first.state_dict()["generator"], second.state_dict()["generator"])


def test_a_preconditioner_with_only_build_is_made_anew_after_loading() -> None:
    class Scaled(hg.linsolve.Preconditioner):
        built = 0

        def build(self, operator: Any) -> Callable:
            self.built += 1
            return lambda vector: tr.scale(vector, 2.0)

    A, b = Matrix(spd_matrix(20, 10.0, 0)), rhs_for(20)
    first, second = Scaled(), Scaled()
    for _ in range(2):
        hg.CG(preconditioner=first).solve(A, b)
    second.load_state_dict(through_a_file(first.state_dict()), b)
    solution = hg.CG(preconditioner=second).solve(A, b)
    assert solution.status is Status.CONVERGED
    assert first.built == second.built == 1
    with pytest.raises(ValueError, match="None for Scaled, which saves no map"):
        second.load_state_dict(first.state_dict() | {"map": {}}, b)


@pytest.mark.parametrize("kind", ["jacobi", "gaussian", "coordinates", "orthonormal"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(kind: str) -> None:
    n = 40
    like = split_tree(rhs_for(n))
    A = Matrix(decaying(n, 1e-4), like=like)
    preconditioner, other = KINDS[kind](seeded(1)), KINDS[kind](seeded(2))
    M = preconditioner.prepare(A)
    preconditioner.observe(7)
    other.prepare(A)
    state = other.state_dict()
    foreign = KINDS["gaussian" if kind == "jacobi" else "jacobi"](seeded())
    foreign.prepare(A)
    before = preconditioner.state_dict()
    sketch = getattr(preconditioner, "sketch", None)
    mistakes = [
        (state, {"w": like["w"], "b": [like["b"][0][:4]]}, "must have the shapes of"),
        (state, like["w"], "must be a list of the 1 leaves of"),
        (foreign.state_dict(), like, r"state\['map'\] must be a dict with the keys"),
        ({"map": None}, like, "state must be a dict with the keys"),
        (state | {"generator": torch.ones(5)}, like, r"state\['generator'\] must be the state of"),
        (state, {}, "like must hold at least one tensor"),
    ]
    if kind != "jacobi":
        saved = state["map"]
        mistakes += [
            (state | {"map": saved | {"test": {"dct": []}}}, like, "the vectors of one of"),
            (state | {"map": saved | {"inverse_eigenvalues": 3}}, like, "must be a vector, got 3"),
        ]
    for given, shape, words in mistakes:
        with pytest.raises(ValueError, match=words):
            preconditioner.load_state_dict(given, shape)
        assert preconditioner.prepare(A) is M
        assert getattr(preconditioner, "sketch", None) is sketch
        assert torch.equal(preconditioner.state_dict()["generator"], before["generator"])
        assert preconditioner.state_dict()["first_iterations"] == 7
    with pytest.raises(ValueError, match="there is none to go on with: pass generator="):
        KINDS[kind](None).load_state_dict(state, like)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: hg.NystromPreconditioner(0), ValueError, "rank must be at least 1, got 0"),
        (lambda: hg.NystromPreconditioner("most"), TypeError, "rank must be an integer"),
        (lambda: hg.NystromPreconditioner(test="dct"), ValueError, "test must be one of"),
        (lambda: hg.NystromPreconditioner(refresh="often"), ValueError, "refresh must be one of"),
        (lambda: hg.NystromPreconditioner(growth=0.5), ValueError, "growth must be a finite"),
        (lambda: hg.NystromPreconditioner(tolerance=0.0), ValueError, "tolerance must be"),
        (
            lambda: hg.NystromPreconditioner(chunk_size=5, refresh="never"),
            ValueError,
            "refresh must not be 'never' with a chunk_size",
        ),
        (
            lambda: hg.Nystrom(test="orthonormal", chunk_size=3),
            ValueError,
            "test must not be 'orthonormal' with a chunk_size",
        ),
        (lambda: hg.JacobiPreconditioner(0), ValueError, "samples must be at least 1"),
        (lambda: hg.JacobiPreconditioner(generator=1), TypeError, "generator must be a torch.Gen"),
        (lambda: hg.CG(preconditioner=hg.NystromPreconditioner), TypeError, "preconditioner must"),
        (lambda: hg.MINRES(preconditioner=3), TypeError, "preconditioner must be a Precond"),
    ],
)
def test_bad_options_are_refused(build: Callable, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()
