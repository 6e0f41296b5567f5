"""Find wrong labels among handwritten digits, over as many processes as torchrun starts.

    inner  f(θ, φ) = mean of sigmoid(φ_i) · cross-entropy of training row i, + decay · ‖θ‖²
    outer  g(θ)    = mean cross-entropy on validation rows, whose labels are right

The training rows are scikit-learn's digits, two in five with a wrong label; θ is a small network, φ
a number for each row. Every process draws its part of each batch, and all of them make the steps
that one process makes on the whole batch: the tables of any number of processes are the same.

    python examples/distributed_cleaning.py
    torchrun --standalone --nproc-per-node 2 examples/distributed_cleaning.py
    torchrun --standalone --nproc-per-node 2 examples/distributed_cleaning.py \
        --sharded --checkpoints runs/cleaning
    torchrun --standalone --nproc-per-node 3 --max-restarts 3 \
        examples/distributed_cleaning.py --checkpoints runs/cleaning

With `--sharded` each process holds its part of θ and of the optimiser's state alone. With
`--checkpoints` a run that was cut off goes on where it was when it is started again, also with
another number of processes; with `--max-restarts` torchrun does that by itself when a process dies.
"""

from __future__ import annotations

import os
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import hypergrad as hg

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor, Tensor]  # pixels, labels, and which rows they are
TRAIN, VALIDATION, WRONG = 960, 400, 0.4
BATCH = 240  # of all processes together
DECAY = 1e-3


def rows(seed: int) -> tuple[TensorDataset, TensorDataset, TensorDataset, Tensor]:
    """Training, validation and test rows, and which training labels are wrong."""
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=generator)
    pixels, labels = (pixels / 16.0)[order].float(), labels[order]
    wrong = torch.rand(TRAIN, generator=generator) < WRONG
    shift = torch.randint(1, 10, (TRAIN,), generator=generator)
    given = labels.clone()
    given[:TRAIN] = torch.where(wrong, (labels[:TRAIN] + shift) % 10, labels[:TRAIN])
    parts = (slice(TRAIN), slice(TRAIN, TRAIN + VALIDATION), slice(TRAIN + VALIDATION, None))
    train, validation, test = (
        TensorDataset(pixels[part], given[part], torch.arange(len(pixels))[part]) for part in parts
    )
    return train, validation, test, wrong


def join() -> None:
    """Join the processes that torchrun started, or started again."""
    run, size = os.environ.get("TORCHELASTIC_RUN_ID", "none"), os.environ["WORLD_SIZE"]
    if run == "none" or os.environ["LOCAL_WORLD_SIZE"] != size:
        dist.init_process_group("gloo")
        return
    # With --standalone. The store of torchrun keeps after a restart what the attempt before it put
    # there (pytorch/pytorch#135712), and the next one often cannot start: each has a file instead.
    attempt = f"{run}-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    store = Path(tempfile.gettempdir(), f"distributed-cleaning-{attempt}")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(os.environ["RANK"]),
        world_size=int(size),
    )


def loader(data: TensorDataset) -> DataLoader[tuple[Tensor, ...]]:
    """This process's part of each batch of all."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    sampler: DistributedSampler[Any] = DistributedSampler(data, ranks, rank)
    return DataLoader(data, batch_size=BATCH // ranks, sampler=sampler, drop_last=True)


def clean(options: Namespace) -> tuple[Params, Tensor, nn.Module]:
    """θ and φ at the end, and the network that θ belongs to."""
    train, validation, _, _ = rows(options.seed)
    torch.manual_seed(options.seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    theta = {key: value.detach() for key, value in model.named_parameters()}
    if options.sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        theta = {k: distribute_tensor(t, mesh, [Shard(0)]) for k, t in theta.items()}
    phi = torch.zeros(TRAIN)

    def inner(theta: Params, phi: Tensor, batch: Batch) -> Tensor:
        x, y, which = batch
        losses = F.cross_entropy(functional_call(model, theta, (x,)), y, reduction="none")
        decay = torch.stack([tensor.square().sum() for tensor in theta.values()]).sum()
        return (phi[which].sigmoid() * losses).mean() + DECAY * decay

    def outer(theta: Params, phi: Tensor, batch: Batch) -> Tensor:
        x, y, _ = batch
        return F.cross_entropy(functional_call(model, theta, (x,)), y)

    callbacks: list[hg.bilevel.Callback] = [hg.bilevel.ProgressBar(leave=False)]
    if options.checkpoints is not None:
        callbacks.append(hg.bilevel.Checkpoint(options.checkpoints, every=10))
    solver = hg.BilevelSolver(
        hg.Level(
            inner,
            theta,
            torch.optim.Adam(theta.values(), lr=0.01),
            loader(train),
            batches=TRAIN // BATCH,
        ),
        hg.Level(outer, phi, torch.optim.Adam([phi], lr=0.1), loader(validation)),
        method=hg.Implicit(hg.CG(rtol=1e-2, maxiter=20), damping=0.1),
        inner_steps=8,
        outer_steps=options.steps,
        warmup_steps=50,
        seed=options.seed,
        process_group=dist.group.WORLD if dist.is_initialized() else None,
        callbacks=callbacks,
    )
    if options.checkpoints is not None:
        solver.resume(options.checkpoints)
    solver.run()
    whole = {k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in theta.items()}
    return whole, phi, model


def main(argv: Sequence[str] | None = None) -> None:
    """Clean, and say on the first process what came of it."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=80, help="outer steps; 80")
    parser.add_argument("--sharded", action="store_true", help="θ in parts; with torchrun only")
    parser.add_argument("--checkpoints", type=Path, help="a folder to save to, and to resume from")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn; 0")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    started = "RANK" in os.environ
    if options.sharded and not started:
        parser.error("--sharded needs the processes of torchrun")
    if started:
        join()
        if BATCH % dist.get_world_size():
            parser.error(f"the processes must divide {BATCH}, got {dist.get_world_size()}")
    torch.set_num_threads(1)
    theta, phi, model = clean(options)
    if not started or dist.get_rank() == 0:
        _, _, test, wrong = rows(options.seed)
        found = phi.sigmoid() < 0.5
        right = (found & wrong).sum().item()
        x, y, _ = test.tensors
        accuracy = (functional_call(model, theta, (x,)).argmax(1) == y).double().mean().item()
        print(f"wrong labels: {int(wrong.sum())} of {TRAIN}, called wrong: {int(found.sum())}")
        precision, recall = right / max(1, int(found.sum())), right / int(wrong.sum())
        print(f"precision {precision:.3f}, recall {recall:.3f}")
        print(f"test accuracy {accuracy:.3f}, ‖φ‖ = {float(phi.norm()):.6f}")
    if started:
        # A process that ends while another still talks to it may abort instead.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
