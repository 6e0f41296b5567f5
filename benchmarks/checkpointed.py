"""What a Hessian product of a transformer costs, with and without activation checkpointing.

    python -m benchmarks.checkpointed            # prints
    python -m benchmarks.checkpointed --write    # and puts it into docs/how_to/large_models.md

Memory is counted as in ``benchmarks.large_models``: the bytes of all tensors alive at once. Time is
that of a first product: the operator made, one product.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hypergrad as hg
from benchmarks.blocks import fill, table
from benchmarks.large_models import PAGE, Live
from benchmarks.timing import median_seconds, one_thread
from hypergrad import tree as tr
from hypergrad.operators import Mode, hessian

COMMAND = "python -m benchmarks.checkpointed"
LAYERS, WIDTH, HEADS, WORDS, ROWS, LENGTH, ROUNDS = 8, 128, 4, 64, 16, 64, 5


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        mode: of the product; ``None`` is one gradient and nothing else.
        checkpointed: whether each layer recomputes its activations.
        batches: into which the rows are cut.
    """

    mode: Mode | None
    checkpointed: bool = False
    batches: int = 1

    @property
    def cells(self) -> list[str]:
        """What the table says of it."""
        what = "gradient" if self.mode is None else f'product, `mode="{self.mode}"`'
        cut = "" if self.batches == 1 else f", `hg.Averaged` over {self.batches} batches"
        return [what + cut, "yes" if self.checkpointed else "no"]


SETTINGS = (
    Setting(None),
    Setting(None, True),
    Setting("reverse"),
    Setting("reverse", True),
    Setting("forward", True),
    Setting("finite-difference", True),
    Setting("reverse", False, 4),
)


class Layer(nn.Module):
    """Causal attention and an MLP, each after a norm and around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        q, k, v = self.mix(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """Logits of the next word."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.last = nn.Linear(WIDTH, WORDS)
        self._checkpointed = checkpointed

    def forward(self, words: Tensor) -> Tensor:
        """Of shape (rows, length, words)."""
        x = self.embed(words)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self._checkpointed else layer(x)
        return self.last(x)


def work(setting: Setting) -> Callable[[], dict[str, Tensor]]:
    """What is measured: a gradient, or a product with a fixed vector."""
    torch.manual_seed(0)
    model = Transformer(setting.checkpointed)
    theta = {k: p.detach().requires_grad_() for k, p in model.named_parameters()}
    vector = {k: torch.randn_like(p) for k, p in theta.items()}
    words, phi = torch.randint(WORDS, (ROWS, LENGTH + 1)), torch.tensor(-3.0)

    def inner(w: dict[str, Tensor], h: Tensor, rows: Tensor) -> Tensor:
        logits = functional_call(model, w, (rows[:, :-1],))
        misfit = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        return misfit + h.exp() * torch.stack([p.square().sum() for p in w.values()]).sum()

    def gradient() -> dict[str, Tensor]:
        grads = torch.autograd.grad(inner(theta, phi, words), [*theta.values()])
        return dict(zip(theta, grads, strict=True))

    def product() -> dict[str, Tensor]:
        f: Any = lambda w, h: inner(w, h, words)  # noqa: E731
        if setting.batches > 1:
            f = hg.Averaged(inner, words.chunk(setting.batches))
        assert setting.mode is not None
        found: dict[str, Tensor] = hessian(f, theta, phi, mode=setting.mode).matvec(vector)
        return found

    return gradient if setting.mode is None else product


def peak(setting: Setting) -> float:
    """MiB at the worst moment."""
    run = work(setting)
    with Live() as live:
        run()
    return live.peak / 2**20


def text(settings: Sequence[Setting] = SETTINGS) -> str:
    """The table."""
    runs = {str(i): work(setting) for i, setting in enumerate(settings)}
    with one_thread():
        seconds = median_seconds(runs, ROUNDS)
        exact = work(Setting("reverse"))()
    peaks = [peak(setting) for setting in settings]
    plain = seconds[str(settings.index(Setting("reverse")))]
    rows = []
    for i, setting in enumerate(settings):
        cells = [*setting.cells, f"{peaks[i]:.0f}", f"{peaks[i] / peaks[0]:.1f}"]
        cells.append(f"{seconds[str(i)] / plain:.1f}")
        if setting.mode is None:
            rows.append([*cells, ""])
            continue
        error = tr.norm(tr.subtract(runs[str(i)](), exact)) / tr.norm(exact)
        rows.append([*cells, f"{error:.0e}"])
    heads = ["what", "checkpointed", "peak, MiB", "of a gradient's", "time", "relative error"]
    count = sum(p.numel() for p in Transformer(False).parameters())
    return (
        f"{table(heads, rows)}\n\n{LAYERS} layers of width {WIDTH}, {count:,} parameters, {ROWS} "
        f'rows of {LENGTH} words; time: of a first product, by that of `mode="reverse"` without '
        f"checkpoints ({plain:.2f} s), one thread; error: in float32, from that product; torch "
        f"{torch.__version__}."
    )


def main() -> None:
    """Print, and write if asked."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    options = parser.parse_args()
    found = text()
    print(found)
    if options.write:
        fill(PAGE, COMMAND, found)


if __name__ == "__main__":
    main()
