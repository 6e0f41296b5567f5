"""What a hypergradient of a large model holds, by how the inner objective is given.

    python -m benchmarks.large_models            # prints
    python -m benchmarks.large_models --write    # and puts it into docs/how_to/large_models.md

Counted are the bytes of all tensors alive at once, at the worst moment: exact, and the same on
every machine, where the resident memory of a process has the holes of its heap as well.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import hypergrad as hg
from benchmarks.blocks import ROOT, fill, table
from hypergrad.operators import Mode

COMMAND = "python -m benchmarks.large_models"
PAGE = ROOT / "docs" / "how_to" / "large_models.md"
WIDTH, LAYERS, ROWS, BATCHES, PRODUCTS = 128, 6, 8192, 16, 4


class Live(TorchDispatchMode):
    """The bytes of the storages made inside that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run it, and look at what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._seen:
                    self._seen[key] = size
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.now -= size


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        title: of the inner objective.
        mode: of the products; ``None`` is one gradient and nothing else.
        batches: into which the rows are cut.
        keep_graphs: of ``hg.Averaged``.
        checkpointed: whether each layer recomputes its activations.
    """

    title: str
    mode: Mode | None
    batches: int = 1
    keep_graphs: bool = False
    checkpointed: bool = False

    @property
    def cells(self) -> list[str]:
        """What the table says of it."""
        default = ", the default" if self.mode == "reverse" and self.batches == 1 else ""
        shown = "" if self.mode is None else f'`"{self.mode}"`'
        return [self.title, shown + ("" if self.checkpointed else default)]


SETTINGS = (
    Setting("(one gradient, nothing else)", None),
    Setting("all rows", "reverse"),
    Setting("all rows", "forward"),
    Setting("all rows", "finite-difference"),
    Setting("all rows, `torch.utils.checkpoint` in each layer", "reverse", checkpointed=True),
    Setting(f"`hg.Averaged` over {BATCHES} batches", "reverse", BATCHES),
    Setting(f"`hg.Averaged` over {BATCHES} batches, `keep_graphs=True`", "reverse", BATCHES, True),
)


class Network(nn.Module):
    """Layers of one width, and an activation after each but the last."""

    def __init__(self, activation: Callable[[Tensor], Tensor], checkpointed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
        self.last = nn.Linear(WIDTH, 10)
        self._activation, self._checkpointed = activation, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for layer in self.layers:
            if self._checkpointed:
                x = checkpoint(lambda x, of=layer: self._activation(of(x)), x, use_reentrant=False)
            else:
                x = self._activation(layer(x))
        return self.last(x)


def peak(
    setting: Setting, rows: int = ROWS, activation: Callable[[Tensor], Tensor] = F.gelu
) -> float:
    """MiB at the worst moment of a hypergradient with four products."""
    torch.manual_seed(0)
    network = Network(activation, setting.checkpointed)
    params = {k: p.detach() for k, p in network.named_parameters()}
    hparams = torch.full((len(params),), -3.0)
    X, y = torch.randn(rows, WIDTH), torch.randint(10, (rows,))
    size = rows // setting.batches
    batches = [*zip(X.split(size), y.split(size), strict=True)]

    def outer(w: dict[str, Tensor], h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(network, w, (batch[0],)), batch[1])

    def inner(w: dict[str, Tensor], h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        squares = torch.stack([p.square().sum() for p in w.values()])
        return outer(w, h, batch) + torch.dot(h.exp(), squares)

    with Live() as live:
        if setting.mode is None:
            theta = {k: p.requires_grad_() for k, p in params.items()}
            torch.autograd.grad(inner(theta, hparams, batches[0]), list(theta.values()))
        else:
            f: Any = hg.Averaged(inner, batches, keep_graphs=setting.keep_graphs)
            if setting.batches == 1:
                f = lambda w, h: inner(w, h, batches[0])  # noqa: E731
            solver = hg.CG(rtol=None, maxiter=PRODUCTS)
            hg.hypergradient(
                f,
                lambda w, h: outer(w, h, (X[:size], y[:size])),
                params,
                hparams,
                method=hg.Implicit(solver, damping=1.0, mode=setting.mode),
                on_failure="ignore",
            )
    return live.peak / 2**20


def text(settings: Sequence[Setting] = SETTINGS, rows: int = ROWS) -> str:
    """The table, and the peaks of other activations under it."""
    peaks = [[*setting.cells, f"{peak(setting, rows):.0f}"] for setting in settings]
    body = table(["inner objective", "`mode=`", "peak, MiB"], peaks)
    others = [
        f"with {name} in place of GELU {peak(SETTINGS[2], rows, activation):.0f} MiB in forward "
        f"mode against {peak(SETTINGS[1], rows, activation):.0f}"
        for name, activation in (("ReLU", torch.relu), ("Tanh", torch.tanh))
    ]
    count = sum(p.numel() for p in Network(F.gelu, False).parameters())
    return (
        f"{body}\n\n{LAYERS} layers of width {WIDTH} with GELU, {count:,} parameters, {rows:,} "
        f"rows, {PRODUCTS} products, torch {torch.__version__}; {'; '.join(others)}."
    )


def main() -> None:
    """Print, and write if asked."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    found = text()
    print(found)
    if options.write:
        fill(PAGE, COMMAND, found)


if __name__ == "__main__":
    main()
