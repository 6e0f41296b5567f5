"""What the ranks run in the tests of ``hypergrad.distributed``, and the problems that they work on.

Whatever is made with one process is made here by the same functions, given other objectives.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad as hg
from hypergrad import _sharding as pl
from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad.distributed import DataParallel
from hypergrad.operators.base import WrappedOperator

Tree = Any
Objective = Callable[[Tree, Tree], Tensor]


@dataclass(frozen=True)
class Learning:
    """A small network on rows of data; φ holds the log-decay of each of its parameters."""

    module: nn.Module
    x: Tensor
    y: Tensor
    params: dict[str, Tensor]
    hparams: Tensor

    def inner(self, rows: slice) -> Objective:
        def f(params: Tree, hparams: Tensor) -> Tensor:
            decays = zip(hparams.exp(), params.values(), strict=True)
            penalty = sum(decay * leaf.square().sum() for decay, leaf in decays)
            return self._loss(params, self.x[rows], self.y[rows]) + 0.5 * penalty

        return f

    def outer(self, rows: slice) -> Objective:
        # Other data: the same, upside down, with the labels moved on.
        x, y = -self.x, (self.y + 1) % 3
        return lambda params, hparams: self._loss(params, x[rows], y[rows])

    def objectives(self) -> tuple[Objective, Objective]:
        """f and g of all rows."""
        return self.inner(slice(None)), self.outer(slice(None))

    def shared(self) -> tuple[Objective, Objective]:
        """The same, of which each rank has some rows, not all of them equally many."""
        rows = slice(dist.get_rank(), None, dist.get_world_size())
        weight = float(len(self.x[rows]))
        return (
            DataParallel(self.inner(rows), weight=weight),
            DataParallel(self.outer(rows), weight=weight),
        )

    def _loss(self, params: Tree, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.module, params, (x,)), y)


@cache
def mlp(rows: int = 25) -> Learning:
    """39 parameters."""
    return _learning(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), (rows, 5))


@cache
def cnn(rows: int = 25) -> Learning:
    """47 parameters, two filters: not one for every rank."""
    return _learning(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        ),
        (rows, 1, 6, 6),
    )  # fmt: skip


MODELS: dict[str, Callable[[], Learning]] = {"mlp": mlp, "cnn": cnn}


def _learning(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Learning:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = make().double()
        x, y = torch.randn(*shape, dtype=torch.float64), torch.randint(3, shape[:1])
    params = {key: p.detach() for key, p in module.named_parameters()}
    return Learning(module, x, y, params, torch.linspace(-2.0, 0.0, 4, dtype=torch.float64))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


Method = Callable[[Objective, Objective, Tree, Tree], Tree]


def _implicit(solver: Callable[[], hg.LinearSolver], **options: Any) -> Method:
    def grads(f: Objective, g: Objective, params: Tree, hparams: Tree) -> Tree:
        method = hg.Implicit(solver(), damping=0.5, **options)
        return hg.hypergradient(f, g, params, hparams, method=method, on_failure="raise").grads

    return grads


def _unrolled(optimizer: hg.optimizers.Optimizer, memory: Any) -> Method:
    method = hg.Unrolled(optimizer, 4, memory=memory)
    return lambda f, g, params, hparams: (
        hg.hypergradient(f, g, params, hparams, method=method).grads
    )


def _rates(f: Objective, g: Objective, params: Tree, hparams: Tree) -> Tree:
    """The derivatives in a learning rate and a momentum as well."""
    rates = [torch.tensor(value, dtype=torch.float64).requires_grad_() for value in (0.3, 0.5)]
    phi = hparams.detach().requires_grad_()
    optimizer = hg.optimizers.SGD(lr=rates[0], momentum=rates[1])
    value = g(hg.unroll(f, optimizer, params, phi, 4), phi)
    return list(torch.autograd.grad(value, [phi, *rates]))


def _argmin(f: Objective, g: Objective, params: Tree, hparams: Tree) -> Tree:
    phi = hparams.detach().requires_grad_()
    fit = hg.argmin(f, solver=hg.CG(rtol=1e-12), damping=0.5)(lambda hparams: params)
    return torch.autograd.grad(g(fit(phi), phi), phi)[0]


METHODS: dict[str, Method] = {
    "cg": _implicit(lambda: hg.CG(rtol=1e-12)),
    "cg-nystrom": _implicit(
        lambda: hg.CG(
            rtol=1e-12, preconditioner=hg.NystromPreconditioner(5, generator=_generator())
        )
    ),
    "cg-jacobi": _implicit(
        lambda: hg.CG(rtol=1e-12, preconditioner=hg.JacobiPreconditioner(5, generator=_generator()))
    ),
    "minres": _implicit(lambda: hg.MINRES(rtol=1e-12)),
    "gmres": _implicit(lambda: hg.GMRES(rtol=1e-12)),
    "normal-cg": _implicit(lambda: hg.NormalCG(rtol=1e-12)),
    "block-cg": _implicit(lambda: hg.BlockCG(rtol=1e-12)),
    "dense": _implicit(hg.Dense),
    "neumann": _implicit(lambda: hg.Neumann(terms=10, step=0.2, rtol=0.0)),
    "nystrom": _implicit(lambda: hg.Nystrom(5, generator=_generator())),
    "nystrom-chunked": _implicit(lambda: hg.Nystrom(5, chunk_size=2, generator=_generator())),
    "nystrom-gaussian": _implicit(lambda: hg.Nystrom(5, test="gaussian", generator=_generator())),
    "nystrom-orthonormal": _implicit(
        lambda: hg.Nystrom(5, test="orthonormal", generator=_generator())
    ),
    "sgd-recompute": _unrolled(hg.optimizers.SGD(lr=0.3, momentum=0.5), "recompute"),
    "sgd-graph": _unrolled(hg.optimizers.SGD(lr=0.3, momentum=0.5), "graph"),
    "adam-recompute": _unrolled(hg.optimizers.Adam(lr=0.05), "recompute"),
    "adam-graph": _unrolled(hg.optimizers.Adam(lr=0.05), "graph"),
    "adam-checkpoint": _unrolled(hg.optimizers.Adam(lr=0.05), "checkpoint"),
    "rates": _rates,
    "argmin": _argmin,
    "finite-difference": _implicit(lambda: hg.CG(rtol=1e-6), mode="finite-difference"),
}

FEW = ("cg", "cg-nystrom", "neumann", "nystrom", "sgd-recompute", "adam-graph")
"""Of each kind one: for the larger numbers of ranks, which share two cores."""

TOLERANCES = {"finite-difference": 1e-5}
"""Of those that have no 1e-10: the rtol of their solver, times ten."""


def placed(tree: Tree, shape: tuple[int, ...], *placements: Any) -> Tree:
    """``tree`` as ``DTensor`` objects on a mesh of all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", shape)

    def place(leaf: Tensor) -> Tensor:
        fitting = [
            Shard(min(p.dim, leaf.ndim - 1)) if isinstance(p, Shard) else p for p in placements
        ]
        return distribute_tensor(leaf, mesh, fitting)

    return tr.map_leaves(place, tree)


def sharded(tree: Tree, dim: int = 0) -> Tree:
    """``tree`` sharded over all ranks on one dimension."""
    from torch.distributed.tensor import Shard

    return placed(tree, (dist.get_world_size(),), Shard(dim))


def _partly_replicated(tree: Tree) -> Tree:
    from torch.distributed.tensor import Replicate, Shard

    return placed(tree, (2, 2), Replicate(), Shard(0))


def _sharded_twice(tree: Tree) -> Tree:
    from torch.distributed.tensor import Shard

    return placed(tree, (2, 2), Shard(0), Shard(1))


PLACEMENTS: dict[str, tuple[Callable[[Tree], Tree], Callable[[Tree], Tree]]] = {
    "replicated": (lambda tree: tree, lambda tree: tree),
    "sharded-params": (sharded, lambda tree: tree),
    "sharded-both": (sharded, sharded),
    "sharded-columns": (lambda tree: sharded(tree, 1), lambda tree: tree),
    "replicas-of-shards": (_partly_replicated, _partly_replicated),
    "shards-of-shards": (_sharded_twice, lambda tree: tree),
}


def full(tree: Tree) -> Tree:
    return tr.map_leaves(lambda leaf: pl.full(leaf).detach(), tree)


def hypergradients(model: str, placement: str, methods: Sequence[str]) -> dict[str, Tree]:
    """By some methods, of data that the ranks share."""
    problem = MODELS[model]()
    f, g = problem.shared()
    of_params, of_hparams = PLACEMENTS[placement]
    params, hparams = of_params(problem.params), of_hparams(problem.hparams)
    return {name: full(METHODS[name](f, g, params, hparams)) for name in methods}


def all_hypergradients(
    model: str, placements: Sequence[str], methods: Sequence[str]
) -> list[dict[str, Tree]]:
    return [hypergradients(model, placement, methods) for placement in placements]


NATIVE = ("cg", "nystrom", "adam-recompute", "sgd-graph")


def native_hypergradients() -> dict[str, Tree]:
    """Of objectives that are written on DTensors, the rows sharded."""
    problem = mlp(24)
    params = sharded(problem.params)
    hparams = placed(problem.hparams, (dist.get_world_size(),), _replicate())

    def loss(params: Tree, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(x, params["0.weight"], params["0.bias"]))
        return F.cross_entropy(F.linear(hidden, params["2.weight"], params["2.bias"]), y)

    x, y = sharded(problem.x), sharded(problem.y)
    x_val, y_val = sharded(-problem.x), sharded((problem.y + 1) % 3)

    def f(params: Tree, hparams: Tensor) -> Tensor:
        decays = zip(hparams.exp().unbind(), params.values(), strict=True)
        return loss(params, x, y) + 0.5 * sum(d * leaf.square().sum() for d, leaf in decays)

    def g(params: Tree, hparams: Tensor) -> Tensor:
        return loss(params, x_val, y_val)

    return {name: full(METHODS[name](f, g, params, hparams)) for name in NATIVE}


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


class Messages:
    """Notes every collective that is called inside."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def __enter__(self) -> Messages:
        import hypergrad.distributed.packed as packed

        self._originals = dist.all_reduce, packed._all_gather, packed._reduce_scatter, pl._reduced
        all_reduce, gather, scatter, reduced = self._originals

        def note(name: str, original: Callable[..., Any], which: int) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                self.seen.append((name, args[which].numel()))
                return original(*args, **kwargs)

            return noted

        dist.all_reduce = note("all_reduce", all_reduce, 0)
        packed._all_gather = note("all_gather", gather, 0)
        packed._reduce_scatter = note("reduce_scatter", scatter, 1)
        pl._reduced = note("sum", reduced, 0)
        return self

    def __exit__(self, *_: object) -> None:
        import hypergrad.distributed.packed as packed

        dist.all_reduce, packed._all_gather, packed._reduce_scatter, pl._reduced = self._originals


def messages(placement: str) -> dict[str, Any]:
    """What a product, a block of three and the iterations of CG send."""
    problem = mlp()
    f, _ = problem.shared()
    of_params, _ = PLACEMENTS[placement]
    params = of_params(problem.params)
    operator = hg.operators.Damped(hg.operators.hessian(f, params, problem.hparams), 0.5)
    vector = tr.random_normal_like(params, _generator())
    found: dict[str, Any] = {}
    operator.matvec(vector)  # whether the first one is finite is one number more
    with Messages() as noted:
        operator.matvec(vector)
    found["product"] = noted.seen
    block = bl.stack([vector] * 3)
    with Messages() as noted:
        operator.matmat(block, chunk_size=3)
    found["block"] = noted.seen
    products = 0
    dot, norm, finite = tr.dot, tr.norm, tr.is_finite

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            nonlocal products
            products += 1
            return original(*args)

        return counted

    tr.dot, tr.norm, tr.is_finite = counting(dot), counting(norm), counting(finite)
    try:
        with Messages() as noted:
            solution = hg.CG(rtol=1e-8).solve(operator, vector)
    finally:
        tr.dot, tr.norm, tr.is_finite = dot, norm, finite
    assert solution.converged
    return {
        **found, "solve": noted.seen, "matvecs": solution.matvecs, "inner_products": products,
    }  # fmt: skip


def _in_batches(count: int) -> tuple[Objective, Objective]:
    """f and g, of which each rank has several batches, not all of them equally large."""
    problem = mlp()
    own = list(range(25))[dist.get_rank() :: dist.get_world_size()]
    batches = [own[k::count] for k in range(count)]

    def mean(of_rows: Callable[[Any], Objective]) -> Objective:
        over = hg.Averaged(lambda w, h, rows: of_rows(rows)(w, h), batches, weight=len)
        return DataParallel(over, weight=float(len(own)))

    return mean(problem.inner), mean(problem.outer)


def averaged_hypergradients(placements: Sequence[str]) -> list[dict[str, Tree]]:
    f, g = _in_batches(3)
    problem = mlp()
    found = []
    for placement in placements:
        of_params, of_hparams = PLACEMENTS[placement]
        trees = of_params(problem.params), of_hparams(problem.hparams)
        found.append({name: full(METHODS[name](f, g, *trees)) for name in AVERAGED})
    return found


AVERAGED = ("cg", "nystrom-chunked", "sgd-graph", "argmin")


def averaged_messages(placement: str) -> dict[str, Any]:
    """What a product of the mean over three batches of each rank sends, and a block of three."""
    of_params, _ = PLACEMENTS[placement]
    params = of_params(mlp().params)
    operator = hg.operators.hessian(_in_batches(3)[0], params, mlp().hparams)
    vector = tr.random_normal_like(params, _generator())
    found = {}
    block = bl.stack([vector] * 3)
    for name, work in (
        ("product", lambda: operator.matvec(vector)),
        ("block", lambda: operator.matmat(block)),
    ):
        with Messages() as noted:
            work()
        found[name] = noted.seen
    return found


def loop_messages() -> list[tuple[str, int]]:
    """Of a loop's step over two batches, those that are as large as θ."""
    solver, _ = loop_solver(dist.group.WORLD, "cg-plain", 1, start(), [], inner_batches=2)
    with Messages() as noted:
        (record,) = solver
    size = tr.size(solver.params)
    return [record.matvecs, sum(elements == size for _, elements in noted.seen)]


def later_batch_fails() -> None:
    """The second pass over a rank's batches fails: while products are made."""
    passes = 0

    def f(params: Tree, hparams: Tree, rows: slice) -> Tensor:
        nonlocal passes
        passes += 1
        if _on(1) and passes > 5:
            raise KeyError("no such column")
        return mlp().inner(rows)(params, hparams)

    _solved(DataParallel(hg.Averaged(f, [slice(0, 10), slice(10, 25)])))


def averaged_dropout() -> tuple[float, bool]:
    """How symmetric the mean of two batches with masks is, and whether its value repeats."""
    problem = mlp()

    def own(params: Tree, hparams: Tensor, rows: slice) -> Tensor:
        x = F.dropout(problem.x[rows], 0.5)
        return F.cross_entropy(functional_call(problem.module, params, (x,)), problem.y[rows])

    f = DataParallel(hg.Averaged(own, [slice(0, 10), slice(10, 25)]))
    operator = hg.operators.hessian(f, problem.params, problem.hparams)
    u, v = (tr.random_normal_like(problem.params, _generator()) for _ in range(2))
    v = operator.matvec(v)
    a, b = (float(tr.dot(x, operator.matvec(y))) for x, y in ((u, v), (v, u)))
    as_one = float(f(problem.params, problem.hparams))
    return abs(a - b) / abs(a), abs(as_one - operator.value) < 1e-12


def wide() -> dict[str, Tensor]:
    return {"W": torch.zeros(64, 8), "b": torch.zeros(30)}


def elements_of_a_sketch() -> int:
    """What a rank holds of five vectors."""
    params = sharded(wide())

    def f(params: Tree, hparams: Tensor) -> Tensor:
        return hparams * sum(leaf.square().sum() for leaf in params.values())

    operator = hg.operators.hessian(DataParallel(f), params, torch.tensor(1.0))
    sketch = hg.Nystrom(5, rho=0.1, generator=_generator()).sketch(operator)
    return sum(pl.local(leaf).numel() for leaf in tr.leaves(sketch.sketch.basis.block))


class _Watching(WrappedOperator):
    """Notes how much memory x, r and p of the solver take on this rank, at each product."""

    def __init__(self, operator: Any) -> None:
        super().__init__(operator)
        self.elements: list[int] = []

    @property
    def lower_bound(self) -> float:
        return self._operator.lower_bound

    def matvec(self, vector: Tree) -> Tree:
        frame = inspect.currentframe()
        while frame.f_code is not hg.CG.solve_scaled.__code__:
            frame = frame.f_back
        vectors = [frame.f_locals[name] for name in ("x", "r", "p")]
        leaves = [pl.local(leaf) for leaf in tr.leaves(vectors)]
        # Storages, since a part may be a view of the whole.
        sizes = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage() for leaf in leaves}
        self.elements.append(sum(s.nbytes() for s in sizes.values()) // leaves[0].element_size())
        return self._operator.matvec(vector)

    def rmatvec(self, vector: Tree) -> Tree:
        return self.matvec(vector)

    def multiply_chunk(self, block: Tree) -> Tree:
        return self._operator.multiply_chunk(block)


def elements_of_cg() -> int:
    """The most that a rank holds of x, r and p, while CG runs."""
    params = sharded(wide())

    def f(params: Tree, hparams: Tensor) -> Tensor:
        scales = torch.linspace(1.0, 2.0, 8)
        parts = [(scales * params["W"].square()).sum(), (params["b"] ** 2).sum()]
        return hparams * torch.stack(parts).sum()

    operator = hg.operators.hessian(DataParallel(f), params, torch.tensor(1.0))
    watched = _Watching(operator)
    solution = hg.CG(rtol=1e-3).solve(watched, tr.random_normal_like(params, _generator()))
    assert solution.converged
    assert solution.iterations > 2
    return max(watched.elements)


def both_averages() -> tuple[Tree, Tree]:
    """Ours; and the mean of what each rank gets from the Hessian of its own rows."""
    problem = mlp()
    ours = METHODS["dense"](*problem.shared(), problem.params, problem.hparams)
    rows = slice(dist.get_rank(), None, dist.get_world_size())
    own = problem.inner(rows), problem.outer(rows)
    average = METHODS["dense"](*own, problem.params, problem.hparams) * len(problem.x[rows])
    dist.all_reduce(average)
    return ours, average / len(problem.x)


def _on(rank: int) -> bool:
    return dist.get_rank() == rank


def _solved(inner: Any, params: Tree | None = None, hparams: Tree | None = None) -> Tree:
    problem = mlp()
    return hg.hypergradient(
        inner,
        problem.shared()[1],
        problem.params if params is None else params,
        problem.hparams if hparams is None else hparams,
        method=hg.Implicit(damping=0.5),
    ).grads


def nan_on_one() -> Tree:
    scale = torch.nan if _on(1) else 1.0
    own = mlp().inner(slice(None))
    return _solved(DataParallel(lambda w, h: scale * own(w, h)))


def raise_on_one() -> Tree:
    own = mlp().inner(slice(None))

    def f(params: Tree, hparams: Tree) -> Tensor:
        if _on(1):
            raise KeyError("no such column")
        return own(params, hparams)

    return _solved(DataParallel(f))


def unlike_params() -> Tree:
    params = {key: value.clone() for key, value in mlp().params.items()}
    params["0.bias"][0] += 1e-12 if _on(1) else 0.0
    return _solved(mlp().shared()[0], params)


def unlike_hparams() -> Tree:
    return _solved(mlp().shared()[0], hparams=mlp().hparams + 1e-12 * dist.get_rank())


def unlike_seeds() -> Tree:
    torch.manual_seed(dist.get_rank())
    return _solved(mlp().shared()[0])


def bad_weight() -> Tree:
    weight = 0.0 if _on(1) else 1.0
    return _solved(DataParallel(mlp().inner(slice(None)), weight=lambda: weight))


def no_scalar() -> Tree:
    own = mlp().inner(slice(None))
    return _solved(DataParallel(lambda w, h: own(w, h).expand(3) if _on(1) else own(w, h)))


def half_a_mesh() -> Tree:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    first, second = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])
    mesh = first if dist.get_rank() < 2 else second
    params = tr.map_leaves(lambda leaf: distribute_tensor(leaf, mesh, [Shard(0)]), mlp().params)
    return _solved(mlp().shared()[0], params)


def forward_mode() -> Tree:
    f, g = mlp().shared()
    return hg.hypergradient(
        f, g, sharded(mlp().params), mlp().hparams, method=hg.Implicit(mode="forward")
    )


def die_on_one() -> Tree:
    if _on(1):
        os._exit(3)
    return _solved(mlp().shared()[0])


def linear_on_one() -> tuple[Tree, Tree]:
    """Rank 0 has no use for θ, rank 1 a linear one, rank 2 all the curvature."""
    params, hparams = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, 1.5]).double()
    parts: list[Objective] = [
        lambda w, h: h.square().sum(),
        lambda w, h: (h * w).sum(),
        lambda w, h: (h.exp() * w**4).sum(),
    ]

    def g(params: Tree, hparams: Tree) -> Tensor:
        return params.prod()

    def solve(f: Objective, g: Objective) -> Tree:
        return hg.hypergradient(f, g, params, hparams, method=hg.CG(rtol=1e-12)).grads

    def mean(w: Tree, h: Tree) -> Tensor:
        return torch.stack([part(w, h) for part in parts]).mean()

    return solve(mean, g), solve(DataParallel(parts[dist.get_rank()]), DataParallel(g))


def squares(count: int) -> list[int]:
    return hg.distributed.map_tasks(lambda k: k**2, range(count))


def failing_task() -> list[float]:
    return hg.distributed.map_tasks(lambda k: 1 / (k - 1), range(4))


def maml() -> tuple[Tree, Tree]:
    """The gradient of the mean loss of six tasks after three steps, here and over the ranks."""
    problem = mlp()

    def adapted_loss(prior: Tree, task: int) -> Tensor:
        rows = slice(task, None, 6)
        end = hg.unroll(problem.inner(rows), hg.optimizers.SGD(lr=0.3), prior, problem.hparams, 3)
        return problem.outer(rows)(end, problem.hparams)

    def grads(meta: Objective) -> Tree:
        prior = {key: value.clone().requires_grad_() for key, value in problem.params.items()}
        value = meta(prior, torch.zeros(1).double())
        return dict(zip(prior, torch.autograd.grad(value, list(prior.values())), strict=True))

    def over(tasks: range) -> Objective:
        return lambda prior, _: torch.stack([adapted_loss(prior, task) for task in tasks]).mean()

    own = range(dist.get_rank(), 6, dist.get_world_size())
    return grads(over(range(6))), grads(DataParallel(over(own)))


def _fully_sharded() -> tuple[Any, Learning, Callable[[], Objective]]:
    import copy

    from torch.distributed.fsdp import fully_shard

    problem = mlp(24)
    module = copy.deepcopy(problem.module)
    for layer in (module[0], module[2]):
        fully_shard(layer, mesh=_mesh())
    fully_shard(module, mesh=_mesh())
    rows = slice(dist.get_rank(), None, dist.get_world_size())

    def loss(module: nn.Module, hparams: Tensor) -> Tensor:
        return F.cross_entropy(hparams.exp()[0] * module(problem.x[rows]), problem.y[rows])

    return module, problem, lambda: hg.distributed.WholeModule(module, loss)


def _mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def _of_module(f: Any, params: Tree, problem: Learning, mode: Any) -> Tree:
    def g(params: Tree, hparams: Tree) -> Tensor:
        return sum(leaf.square().sum() for leaf in params.values())

    return hg.hypergradient(
        f,
        DataParallel(g),
        params,
        problem.hparams,
        method=hg.Implicit(hg.CG(rtol=1e-8), damping=0.5, mode=mode),
        on_failure="ignore",
    ).grads


def fully_sharded() -> tuple[Tree, Tree, list[str], bool]:
    _, problem, make = _fully_sharded()
    whole = make()
    before = full(whole.params)

    def f(params: Tree, hparams: Tensor) -> Tensor:
        logits = functional_call(problem.module, params, (problem.x,))
        return F.cross_entropy(hparams.exp()[0] * logits, problem.y)

    expected = _of_module(f, problem.params, problem, "reverse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _of_module(whole, dict(whole.params), problem, "auto")
    ours = [w.category.__name__ for w in caught if issubclass(w.category, hg.HypergradWarning)]
    after = full(whole.params)
    kept = all(torch.equal(before[key], after[key]) for key in before)
    return expected, found, ours, kept


def fully_sharded_in_reverse() -> Tree:
    _, problem, make = _fully_sharded()
    whole = make()
    return _of_module(whole, dict(whole.params), problem, "reverse")


def _penalised(module: nn.Module) -> Objective:
    """What a user writes who does not know that ``functional_call`` cannot do it."""
    x, y = mlp(24).x, mlp(24).y

    def f(params: Tree, hparams: Tensor) -> Tensor:
        params = {key: pl.full(leaf) for key, leaf in params.items()}
        penalty = sum(leaf.square().sum() for leaf in params.values())
        return F.cross_entropy(functional_call(module, params, (x,)), y) + hparams.sum() * penalty

    return f


def functional_call_of_fully_sharded(how: str) -> None:
    module, problem, _ = _fully_sharded()
    f = _penalised(module)
    params = {key: p.detach() for key, p in module.named_parameters()}
    g = DataParallel(lambda params, hparams: sum(p.square().sum() for p in params.values()))
    if how == "unrolled":
        method = hg.Unrolled(hg.optimizers.SGD(lr=0.1), 2)
        hg.hypergradient(f, g, params, problem.hparams, method=method)
    elif how == "shared":
        hg.hypergradient(DataParallel(f), g, params, problem.hparams)
    elif how == "alone":
        DataParallel(f)(params, problem.hparams)
    elif how == "loop":
        hparams = problem.hparams.clone()
        hg.BilevelSolver(
            hg.Level(
                lambda params, hparams, batch: f(params, hparams),
                dict(module.named_parameters()),
                torch.optim.SGD(module.parameters(), lr=0.1),
            ),
            hg.Level(
                lambda params, hparams, batch: g(params, hparams),
                hparams,
                torch.optim.SGD([hparams], lr=0.1),
            ),
        ).run()
    else:
        hg.hypergradient(f, g, params, problem.hparams)


def fully_sharded_features() -> tuple[Tree, Tree]:
    """A head on what a frozen module makes, which is sharded, and which is not."""
    module, problem, _ = _fully_sharded()
    module.requires_grad_(False)

    def solve(features: nn.Module) -> Tree:
        def f(params: Tensor, hparams: Tensor) -> Tensor:
            logits = features(problem.x) @ params
            return F.cross_entropy(logits, problem.y) + hparams.exp()[0] * params.square().sum()

        def g(params: Tensor, hparams: Tensor) -> Tensor:
            return F.cross_entropy(features(-problem.x) @ params, problem.y)

        return hg.hypergradient(f, g, torch.eye(3).double(), problem.hparams).grads

    return solve(problem.module), solve(module)


def _dropping() -> tuple[Objective, Objective, dict[str, Tensor]]:
    problem = mlp()

    def own(params: Tree, hparams: Tensor) -> Tensor:
        x = F.dropout(problem.x, 0.5)
        return F.cross_entropy(functional_call(problem.module, params, (x,)), problem.y)

    return DataParallel(own), own, problem.params


def dropout() -> tuple[float, bool, bool, bool]:
    """How symmetric H is; whether values repeat; whether they move on; whether ranks part."""
    f, _, params = _dropping()
    hparams = mlp().hparams
    operator = hg.operators.hessian(f, params, hparams)
    u, v = (tr.random_normal_like(params, _generator()) for _ in range(2))
    v = operator.matvec(v)
    a, b = (float(tr.dot(x, operator.matvec(y))) for x, y in ((u, v), (v, u)))
    again = hg.operators.hessian(f, params, hparams).value == operator.value
    with torch.no_grad():
        moved = float(f(params, hparams)) != float(f(params, hparams))
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, torch.get_rng_state().sum().item())
    return abs(a - b) / abs(a), again, moved, len(set(states)) > 1


def own_masks() -> float:
    found = []

    def own(params: Tree, hparams: Tensor) -> Tensor:
        found.append(float(F.dropout(torch.arange(1.0, 50.0)).sum()))
        return params.sum() * hparams.sum()

    DataParallel(own)(torch.ones(2), torch.ones(2))
    return found[0]


def loop_solver(
    group: Any, method: str, steps: int, params: Tree, callbacks: list[Any], **options: Any
) -> tuple[hg.BilevelSolver, Tensor]:
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    problem = mlp(24)
    size, rank = (1, 0) if group is None else (dist.get_world_size(), dist.get_rank())
    hparams = problem.hparams.clone()

    def loader(y: Tensor) -> Any:
        data = TensorDataset(problem.x, y)
        return DataLoader(data, batch_size=12 // size, sampler=DistributedSampler(data, size, rank))

    def f(params: Tree, hparams: Tensor, batch: Any) -> Any:
        decays = zip(hparams.exp(), params.values(), strict=True)
        loss = g(params, hparams, batch)
        penalty = 0.5 * sum(decay * leaf.square().sum() for decay, leaf in decays)
        return loss + penalty, {"fit": loss}

    def g(params: Tree, hparams: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(functional_call(problem.module, params, (batch[0],)), batch[1])

    methods: dict[str, Any] = {
        "cg": hg.Implicit(
            hg.CG(rtol=1e-12, preconditioner=hg.NystromPreconditioner(4)), damping=0.5
        ),
        "cg-plain": hg.CG(rtol=1e-12),
        "unrolled": hg.Unrolled(),
        "soba": hg.single_loop.SOBA(),
    }
    solver = hg.BilevelSolver(
        f,
        g,
        params,
        hparams,
        inner_optimizer=torch.optim.Adam(params.values(), lr=0.05),
        outer_optimizer=torch.optim.Adam([hparams], lr=0.05),
        inner_loader=loader(problem.y),
        outer_loader=loader((problem.y + 1) % 3),
        method=methods[method],
        inner_steps=1 if method == "soba" else 3,
        outer_steps=steps,
        seed=3,
        process_group=group,
        callbacks=callbacks,
        **options,
    )
    return solver, hparams


def _run(
    group: Any, method: str, steps: int, params: Tree, callbacks: list[Any], folder: Any
) -> tuple[Tree, Tree, list[float]]:
    solver, hparams = loop_solver(group, method, steps, params, callbacks)
    if folder is not None:
        solver.resume(folder)
    history = solver.run()
    return full(params), hparams.detach(), [*history["outer_loss"], *history["inner/fit"]]


def start() -> Tree:
    return {key: value.clone() for key, value in mlp(24).params.items()}


def loop_alone(method: str, steps: int, folder: Any = None) -> tuple[Tree, Tree, list[float]]:
    return _run(None, method, steps, start(), [], folder)


def loop(kind: str, method: str, steps: int, folder: str) -> tuple[Tree, Tree, list[float]]:
    params = PLACEMENTS[kind][0](start())
    callbacks = [
        hg.bilevel.Checkpoint(folder, every=2),
        hg.bilevel.CSV(Path(folder, "history.csv")),
    ]
    return _run(dist.group.WORLD, method, steps, params, callbacks, folder)


def loader_fails() -> None:
    class Rows:
        def __iter__(self) -> Any:
            for k in range(3):
                if k == 1 and _on(1):
                    raise OSError("the disk is gone")
                yield torch.ones(2).double()

    theta, phi = torch.ones(2).double(), torch.ones(2).double()
    hg.BilevelSolver(
        hg.Level(
            lambda w, h, x: (h.exp() * w.square() - w * x).sum(),
            theta,
            torch.optim.SGD([theta], lr=0.1),
            Rows(),
        ),
        hg.Level(lambda w, h, x: w.square().sum(), phi, torch.optim.SGD([phi], lr=0.1)),
        process_group=dist.group.WORLD,
    ).run()


def stop_on_one() -> tuple[int, str | None]:
    class Enough(hg.bilevel.Callback):
        def on_step(self, solver: Any, record: Any) -> None:
            if record.step == 2 and _on(1):
                solver.stop("enough")

    solver, _ = loop_solver(dist.group.WORLD, "cg", 9, start(), [Enough()])
    solver.run()
    return solver.outer_step, solver.stop_reason
