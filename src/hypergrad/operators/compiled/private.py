"""The private modules of PyTorch that ``mode="compiled"`` needs, imported when it is first used.

| here | of PyTorch | what would replace it |
| --- | --- | --- |
| `make_fx` | `torch.fx.experimental.proxy_tensor.make_fx` | `torch.export` of functions that call `torch.autograd.grad` |
| `functionalized` | `torch._subclasses.functional_tensor` | `torch.func.functionalize`, which does not run under `make_fx` with fake tensors |
| `python_dispatcher` | `torch._dispatch.python` | nothing public |
| `dynamo` | `torch._dynamo`: `config`, `exc` | `torch.compiler.config` |
| `inductor` | `torch._inductor.compile` | `torch.compile(graph, fullgraph=True)`, which captures once more |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


def make_fx(function: Callable[..., Any]) -> Callable[..., Any]:
    """Trace ``function`` with fake tensors: a function of example inputs that returns a graph."""
    from torch.fx.experimental.proxy_tensor import make_fx as trace

    return trace(function, tracing_mode="fake")


def functionalized(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` without changes in place."""
    from torch._subclasses.functional_tensor import dispatch_functionalize

    return dispatch_functionalize(function)


def python_dispatcher() -> AbstractContextManager[Any]:
    """A context in which operations are decomposed as a trace needs them."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def dynamo() -> Any:
    """PyTorch's module that captures."""
    import torch._dynamo

    return torch._dynamo


def inductor() -> Any:
    """PyTorch's module that compiles."""
    import torch._inductor

    return torch._inductor
