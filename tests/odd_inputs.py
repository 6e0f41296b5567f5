"""Odd trees, odd contexts, and every call that takes them: what is fine, told, or obscure.

An error is obscure if it is none of hypergrad's and no ``ValueError`` or ``TypeError``, or if it
names no argument of the call.
"""

from __future__ import annotations

import random
import re
import threading
import warnings
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor, nn

import hypergrad as hg
from hypergrad._private import inside_a_transform

Pair = namedtuple("Pair", ["first", "second"])


def three(**options: Any) -> Tensor:
    return torch.linspace(0.5, 1.5, 3, **options)


def inference() -> Tensor:
    with torch.inference_mode():
        return three()


def shared() -> list[Tensor]:
    one = three()
    return [one, one]


def cyclic() -> list[Any]:
    tree: list[Any] = [three()]
    tree.append(tree)
    return tree


TREES: dict[str, Callable[[], Any]] = {
    "tensor": three,
    "double": lambda: three(dtype=torch.float64),
    "scalar": lambda: torch.tensor(0.5),
    "one": lambda: torch.tensor([0.5]),
    "dict": lambda: {"a": three(), "b": torch.ones(2, 2)},
    "ordered dict": lambda: OrderedDict(b=three(), a=torch.ones(2)),
    "named tuple": lambda: Pair(three(), torch.ones(2)),
    "deep": lambda: {"a": [three(), (torch.ones(2), {"b": torch.ones(1)})]},
    "very deep": lambda: _nested(40),
    "mixed dtypes": lambda: [three(), three(dtype=torch.float64)],
    "mixed keys": lambda: {"a": three(), 1: torch.ones(2)},
    "parameter": lambda: nn.Parameter(three()),
    "bfloat16": lambda: three(dtype=torch.bfloat16),
    "half": lambda: three().half(),
    "int": lambda: torch.arange(3),
    "bool": lambda: torch.tensor([True, False]),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "empty list": list,
    "empty dict": dict,
    "nested empties": lambda: {"a": [], "b": ()},
    "no elements": lambda: torch.ones(0),
    "some without elements": lambda: [three(), torch.ones(0)],
    "None": lambda: None,
    "None leaf": lambda: {"a": three(), "b": None},
    "number": lambda: 0.5,
    "number leaf": lambda: {"a": three(), "b": 0.5},
    "string leaf": lambda: {"a": three(), "b": "text"},
    "set": lambda: {1, 2},
    "generator": lambda: (t for t in [three()]),
    "array": lambda: three().numpy(),
    "module": lambda: nn.Linear(2, 1),
    "sparse": lambda: three().to_sparse(),
    "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: three(device="meta"),
    "some meta": lambda: [three(), three(device="meta")],
    "nested tensor": lambda: torch.nested.nested_tensor([three(), torch.ones(2)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [three(), torch.ones(2)], layout=torch.jagged, requires_grad=True
    ),
    "transposed": lambda: torch.ones(2, 3).t(),
    "strided": lambda: torch.ones(6)[::2],
    "expanded": lambda: torch.tensor([0.5]).expand(3),
    "overlapping": lambda: torch.ones(4).as_strided((2, 2), (1, 1)),
    "channels last": lambda: torch.ones(1, 2, 2, 2).to(memory_format=torch.channels_last),
    "inference": inference,
    "view": lambda: torch.ones(6)[1:4],
    "twice the same": shared,
    "views of one": lambda: list(torch.ones(4).view(2, 2)),
    "computed": lambda: three(requires_grad=True) * 2.0,
    "computed leaf": lambda: {"a": three(), "b": three(requires_grad=True).exp()},
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj().real,
    "quantized": lambda: torch.quantize_per_tensor(three(), 0.1, 0, torch.qint8),
    "subclass": lambda: three().as_subclass(Own),
    "NaN": lambda: torch.tensor([1.0, float("nan")]),
    "infinite": lambda: torch.tensor([1.0, float("inf")]),
    "huge": lambda: torch.full((3,), 1e30),
    "cyclic": cyclic,
}


class Own(Tensor):
    """A subclass that adds nothing."""


def _nested(depth: int) -> Any:
    tree: Any = three()
    for _ in range(depth):
        tree = [tree]
    return tree


def size(tree: Any) -> Any:
    """A sum over whatever tensors there are."""
    leaves = [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum(leaf.real.to(torch.float32).sum() if leaf.is_complex() else leaf.float().sum()
               for leaf in leaves)  # fmt: skip


def squares(tree: Any) -> Any:
    leaves = [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum((leaf * leaf).sum().float() for leaf in leaves)


def inner(params: Any, hparams: Any, batch: Any = None) -> Any:
    return squares(params) + 0.1 * size(params) * size(hparams)


def outer(params: Any, hparams: Any, batch: Any = None) -> Any:
    return 0.5 * squares(params) + size(params) + 0.1 * squares(hparams)


def _solver(params: Any, hparams: Any) -> Any:
    # PyTorch's optimisers have words of their own for what they do not take.
    optimizers = [
        torch.optim.SGD([leaf for leaf in _flat(tree) if _optimisable(leaf)] or [three()])
        for tree in (params, hparams)
    ]
    loop = hg.BilevelSolver(
        hg.Level(inner, params, optimizers[0]),
        hg.Level(outer, hparams, optimizers[1]),
        outer_steps=1,
    )
    return loop.run()


def _flat(tree: Any) -> list[Any]:
    try:
        return optree.tree_leaves(tree)
    except RecursionError:
        return []


def _optimisable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_leaf


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "hypergradient": lambda p, h: hg.hypergradient(inner, outer, p, h),
    "unrolled": lambda p, h: hg.hypergradient(
        inner, outer, p, h, method=hg.Unrolled(hg.optimizers.SGD(0.01), 2)
    ),
    "unroll": lambda p, h: hg.unroll(inner, hg.optimizers.SGD(0.01), p, h, 2),
    "argmin": lambda p, h: _backward(hg.argmin(inner)(_fit(p))(h)),
    "BilevelSolver": _solver,
    "check": lambda p, h: hg.check(inner, outer, p, h),
}


def _backward(params: Any) -> None:
    value = size(params)
    # Inside a transform, the backward pass is the transform's.
    if isinstance(value, Tensor) and value.requires_grad and not inside_a_transform():
        value.backward()


def _fit(params: Any) -> Callable[[Any], Any]:
    def fit(hparams: Any) -> Any:
        return params

    return fit


def _in_thread(call: Callable[[], Any]) -> Any:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def _under(context: Callable[[], Any]) -> Callable[[Callable[[], Any]], Any]:
    def run(call: Callable[[], Any]) -> Any:
        with context():
            return call()

    return run


def _transformed(transform: Callable[..., Any]) -> Callable[[Callable[[], Any]], Any]:
    def run(call: Callable[[], Any]) -> Any:
        def function(x: Tensor) -> Tensor:
            call()
            return x.square().sum()

        return transform(function)(torch.ones(2, 2))

    return run


CONTEXTS: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "no_grad": _under(torch.no_grad),
    "inference_mode": _under(torch.inference_mode),
    "autocast": _under(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "anomaly": _under(lambda: torch.autograd.set_detect_anomaly(True)),
    "saved tensors": _under(lambda: torch.autograd.graph.saved_tensors_hooks(_same, _same)),
    "default device": _under(lambda: torch.device("meta")),
    "thread": _in_thread,
    "grad": _transformed(torch.func.grad),
    "vmap": _transformed(torch.func.vmap),
    "jacfwd": _transformed(torch.func.jacfwd),
}
USUAL = ("tensor", "dict", "mixed dtypes", "parameter", "inference", "transposed")


def _same(tensor: Tensor) -> Tensor:
    return tensor


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every case with its name; a call makes its inputs itself, in its context."""

    def case(call: str, params: str, hparams: str) -> Callable[[], Any]:
        return lambda: CALLS[call](TREES[params](), TREES[hparams]())

    for call in CALLS:
        for odd in TREES:
            yield f"{call}, params {odd}", case(call, odd, "tensor")
            if odd not in ("tensor", "double"):
                yield f"{call}, hparams {odd}", case(call, "tensor", odd)
        for context, run in CONTEXTS.items():
            for tree in USUAL:
                work = case(call, tree, tree)
                yield f"{call}, {tree}, in {context}", lambda run=run, work=work: run(work)


NAMES = (
    "inner", "outer", "params", "hparams", "hypergradient", "method", "memory", "function",
    "value of fit", "inner_optimizer", "outer_optimizer",
)  # fmt: skip


def verdict(call: Callable[[], Any]) -> str:
    """``"fine"``, ``"told"``, or what is obscure about the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except Exception as error:
            text = str(error)
            ours = type(error).__module__.startswith("hypergrad")
            named = re.search(rf"\b({'|'.join(NAMES)})\b", text) is not None
            if ours or (isinstance(error, (TypeError, ValueError)) and named):
                return "told"
            return f"{type(error).__name__}: {text.splitlines()[0][:150] if text else ''}"
    return "fine"


def states() -> dict[str, Any]:
    """What of PyTorch's global state a call could leave behind."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "anomaly": torch.is_anomaly_enabled(),
        "attention": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "call": nn.Module.__call__,
        "checkpoint": torch.utils.checkpoint.checkpoint,
        "transforms": torch._C._functorch.peek_interpreter_stack(),
        "modes": torch._C._len_torch_function_stack(),
        "dispatch": torch._C._len_torch_dispatch_stack(),
    }


def run(most: int | None = None) -> tuple[Counter[str], list[str], list[str]]:
    """How many cases were fine, told and obscure; the obscure ones; states that were changed."""
    every = list(cases())
    ends, obscure, changed = Counter[str](), [], []
    for name, call in every if most is None else random.Random(0).sample(every, most):
        before = states()
        end = verdict(call)
        after = states()
        changed += [f"{name}: {key}" for key, value in before.items() if after[key] != value]
        if end not in ("fine", "told"):
            obscure.append(f"{name}: {end}")
            end = "obscure"
        ends[end] += 1
    return ends, obscure, changed
