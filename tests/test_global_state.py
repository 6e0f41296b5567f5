"""What a call changes in PyTorch ends with it, in any number of threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.func import functional_call

import hypergrad as hg


def state() -> tuple[Any, ...]:
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        torch._dynamo.eval_frame._stance.stance,  # type: ignore[attr-defined]
        nn.Module.__call__,
        nn.Module._call_impl,
    )


class Stopped(BaseException):
    """As Ctrl-C: no ``Exception``."""


def test_eight_threads_leave_pytorch_as_it_was() -> None:
    before = state()
    X = torch.randn(8, 3)
    # One for each thread: two calls of one module at a time are not PyTorch's to promise.
    models = [nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)) for _ in range(8)]
    for model in models:
        model.load_state_dict(models[0].state_dict())

    def calls(thread: int) -> list[Tensor]:
        found = []
        model = models[thread]
        params = {name: p.detach() for name, p in model.named_parameters()}
        for k in range(200):
            failure = (None, ValueError, Stopped)[(thread + k) % 3]

            def f(p: Any, h: Tensor, failure: Any = failure) -> Tensor:
                value = functional_call(model, p, (X,)).square().mean()
                if failure is not None:
                    raise failure
                return value + h.exp() * sum(v.square().sum() for v in p.values())

            def g(p: Any, h: Tensor) -> Tensor:
                return functional_call(model, p, (X,)).mean()

            try:
                solver = hg.CG(maxiter=1)
                result = hg.hypergradient(
                    f,
                    g,
                    params,
                    torch.tensor(0.0),
                    method=hg.Implicit(solver, damping=1.0),
                    on_failure="ignore",
                    verify="never",
                )
            except (ValueError, Stopped):
                continue
            found.append(result.grads)
        return found

    with ThreadPoolExecutor(8) as pool:
        results = [grad for found in pool.map(calls, range(8)) for grad in found]
    assert state() == before
    expected = results[0]
    assert all(torch.allclose(grad, expected, rtol=1e-4) for grad in results)
    assert all(model[1].num_batches_tracked == 0 for model in models)


def test_interleaved_calls_of_two_threads_leave_pytorch_as_it_was() -> None:
    before = state()
    inside_a, inside_b = threading.Event(), threading.Event()
    x = torch.ones(2)
    first_thread: list[threading.Thread] = []

    def first(w: Tensor, p: Tensor) -> Tensor:
        inside_a.set()
        inside_b.wait(30)
        return (w - p).square().sum()

    def second(w: Tensor, p: Tensor) -> Tensor:
        inside_b.set()
        first_thread[0].join(30)
        return (w - p).square().sum()

    def g(w: Tensor, p: Tensor) -> Tensor:
        return w.square().sum()

    def late() -> None:
        inside_a.wait(30)
        hg.hypergradient(second, g, x, x)

    threads = [
        threading.Thread(target=lambda: hg.hypergradient(first, g, x, x)),
        threading.Thread(target=late),
    ]
    first_thread.append(threads[0])
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state() == before


def test_a_patch_that_somebody_makes_meanwhile_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Module.__call__
    model = nn.Linear(2, 1)
    seen: list[nn.Module] = []

    def patched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(module)
        return plain(module, *args, **kwargs)

    def f(p: Any, h: Tensor) -> Tensor:
        monkeypatch.setattr(nn.Module, "__call__", patched)
        return functional_call(model, p, (torch.ones(1, 2),)).square().sum() + h * sum(
            v.square().sum() for v in p.values()
        )

    params = dict(model.named_parameters())
    hg.hypergradient(f, lambda p, h: p["weight"].sum(), params, torch.tensor(1.0))
    assert nn.Module.__call__ is patched
    assert model in seen


def test_what_fails_while_unrolling_leaves_the_random_state_as_it_was() -> None:
    drawn = torch.get_rng_state()

    def f(w: Tensor, c: Tensor, k: int) -> Tensor:
        noise = torch.rand(())
        return (w - c).square().sum() * (noise if k < 3 else float("nan"))

    method = hg.Unrolled(hg.optimizers.SGD(lr=0.1), steps=range(5))
    with pytest.raises(hg.NonFiniteError, match="step 3"):
        hg.hypergradient(
            f, lambda w, c: w.sum(), torch.zeros(2), torch.ones(2), method=method, verify="never"
        )
    assert torch.equal(torch.get_rng_state(), drawn)


# Each private name that the package uses, and where it stands.
PRIVATE = (
    ("torch.utils.checkpoint", "_CheckpointFrame"),
    ("torch.nn.Module", "_call_impl"),
    ("torch.nn.Module", "_compiled_call_impl"),
    ("torch._C", "_functorch"),
    ("torch", "_remove_batch_dim"),
    ("torch", "_add_batch_dim"),
    ("torch.distributed.tensor", "_utils"),
    ("torch.fx.experimental", "proxy_tensor"),
    ("torch._subclasses", "functional_tensor"),
    ("torch._dispatch", "python"),
    ("torch", "_dynamo"),
    ("torch", "_inductor"),
)


def test_an_import_needs_no_private_name_of_pytorch() -> None:
    """Each is removed in turn, after PyTorch itself was imported, which may need it."""
    program = f"""
import importlib, sys
import torch, torch.distributed.tensor, torch.utils.checkpoint
for owner, name in {PRIVATE!r}:
    for module in [m for m in sys.modules if m.split(".")[0] == "hypergrad"]:
        del sys.modules[module]
    place = torch
    for part in owner.split(".")[1:]:
        place = getattr(place, part)
    kept = vars(place).get(name)
    whole = f"{{owner}}.{{name}}"
    modules = {{m: sys.modules.pop(m) for m in list(sys.modules) if m.startswith(whole)}}
    if kept is not None:
        delattr(place, name)
    sys.modules[whole] = None
    importlib.import_module("hypergrad")
    del sys.modules[whole]
    sys.modules.update(modules)
    if kept is not None:
        setattr(place, name, kept)
print("imported", len({PRIVATE!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == f"imported {len(PRIVATE)}", done.stderr[-2000:]
