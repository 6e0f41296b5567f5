"""Learn which of 1000 digits are mislabelled: a run with everything that a long one needs.

    inner  f(θ, φ, batch) = mean of sigmoid(φ_i) · cross-entropy of row i, and a little decay
    outer  g(θ, batch)    = mean cross-entropy on 200 rows whose labels are right

The data are scikit-learn's handwritten digits; 40 % of the training labels are wrong. The weight
sigmoid(φ_i) of each row is learned by implicit differentiation through a network with batch-norm
and dropout. In the end the same network is trained anew: on all rows alike, on the 200 clean rows
alone, and on all rows as weighted.

While it runs: a progress bar, a line a step in log.jsonl, a checkpoint every ten steps, and curves
for `tensorboard --logdir examples/runs`. Ctrl-C ends the loop after the present step and saves; a
second one ends the program at once. `--resume` goes on from the newest checkpoint, after Ctrl-C as
after a crash, to the very numbers of a run that nothing stopped; with more `--steps` it makes a
finished run longer. Without it, what an earlier run left in the folder is replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hypergrad as hg

Batch = Sequence[Tensor]  # pixels, shape (m, 64), labels and row numbers, both of shape (m,)

TRAIN, VALIDATION, BATCH = 1000, 200, 100


def load(seed: int) -> tuple[list[TensorDataset], Tensor]:
    """Training, validation and test rows, and which of the first are mislabelled."""
    torch.manual_seed(seed)
    X, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(y))
    X, y = X[order].float() / 16.0, y[order]
    wrong = torch.rand(TRAIN) < 0.4
    y[:TRAIN] = (y[:TRAIN] + wrong * torch.randint(1, 10, (TRAIN,))) % 10
    sizes = [TRAIN, VALIDATION, len(y) - TRAIN - VALIDATION]
    columns = (column.split(sizes) for column in (X, y, torch.arange(len(y))))
    return [TensorDataset(*split) for split in zip(*columns, strict=True)], wrong


def network(seed: int) -> nn.Module:
    """The untrained network."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)
    )


def weighted(model: nn.Module, weights: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy, each row by its weight, and a decay of the parameters."""
    x, y, rows = batch
    losses = F.cross_entropy(model(x), y, reduction="none")
    decay = torch.stack([value.square().sum() for value in model.parameters()]).sum()
    return (weights[rows] * losses).mean() + 1e-3 * decay


def inner(model: nn.Module, phi: Tensor, batch: Batch) -> Tensor:
    """f: the weights are the sigmoids of φ."""
    return weighted(model, phi.sigmoid(), batch)


def outer(model: nn.Module, _: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """g: the mean cross-entropy, and the share of right answers in percent."""
    logits = model(batch[0])
    hits = (logits.argmax(1) == batch[1]).double()
    return F.cross_entropy(logits, batch[1]), {"accuracy": 100.0 * hits.mean()}


def learn(
    data: list[TensorDataset], folder: Path, steps: int, seed: int, fresh: bool
) -> hg.BilevelSolver:
    """What learns the weights, with all that listens, before its first step."""
    train, validation, test = data
    model, phi = network(seed), torch.zeros(TRAIN)

    return hg.BilevelSolver(
        hg.Level(
            inner,
            model,
            torch.optim.Adam(model.parameters(), lr=3e-3),
            DataLoader(train, BATCH, shuffle=True),
            batches=4,
        ),
        hg.Level(
            outer,
            phi,
            torch.optim.Adam([phi], lr=0.2),
            DataLoader(validation, BATCH, shuffle=True),
            batches=2,
        ),
        # The Hessian of a network is indefinite: damping makes it positive, and CG fast.
        method=hg.Implicit(hg.CG(rtol=1e-2, maxiter=20), damping=1.0),
        inner_steps=10,
        outer_steps=steps,
        warmup_steps=100,
        seed=seed,
        callbacks=[
            hg.bilevel.ProgressBar(),
            hg.bilevel.Evaluation(outer, DataLoader(test, len(test)), name="test", every=5),
            hg.bilevel.JSONL(folder / "log.jsonl"),
            hg.bilevel.TensorBoard(folder),
            hg.bilevel.Checkpoint(folder, every=10, overwrite=fresh),
        ],
    )


def trained(rows: TensorDataset, weights: Tensor, test: Batch, seed: int) -> tuple[float, float]:
    """Test loss and accuracy of the network after 600 steps on the rows as weighted."""
    model = network(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = 0
    while steps < 600:
        for batch in DataLoader(rows, BATCH, shuffle=True):
            optimiser.zero_grad()
            weighted(model, weights, batch).backward()
            optimiser.step()
            steps += 1
    with torch.no_grad():
        loss, metrics = outer(model.eval(), weights, test)
    return float(loss), float(metrics["accuracy"])


def main(argv: Sequence[str] | None = None) -> None:
    """Start or resume the run, print what it gained and draw its history."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="outer steps, with those resumed")
    parser.add_argument("--seed", type=int, default=0, help="of data, network and batches")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    default_folder = here / "runs" / "bilevel_training"
    parser.add_argument("--folder", type=Path, default=default_folder, help="what the run writes")
    default_output = here / "figures" / "bilevel_training.png"
    parser.add_argument("--output", type=Path, default=default_output, help="the picture")
    options = parser.parse_args(argv)

    torch.set_num_threads(1)  # faster for operations as small as these
    data, wrong = load(options.seed)
    solver = learn(data, options.folder, options.steps, options.seed, not options.resume)
    if options.resume and solver.resume(options.folder):
        print(f"going on after step {solver.outer_step}")
    history = solver.run()
    if solver.stop_reason is not None:
        print(f"{solver.stop_reason} after step {solver.outer_step}; --resume goes on")
        return

    train, validation, test = data
    weights = solver.hparams.detach().sigmoid()
    alike = torch.ones(TRAIN + VALIDATION)
    cases = {
        "all rows alike": (train, alike),
        "the clean rows alone": (validation, alike),
        "all rows as weighted": (train, weights),
    }
    print(f"\n{'trained on':<22} {'test loss':>10} {'test accuracy':>14}")
    for name, (rows, weight) in cases.items():
        loss, accuracy = trained(rows, weight, test.tensors, options.seed)
        print(f"{name:<22} {loss:>10.4f} {accuracy:>13.1f}%")
    means = [float(weights[rows].mean()) for rows in (~wrong, wrong)]
    print(f"\nmean weight of a row: {means[0]:.2f} if its label is right, {means[1]:.2f} if wrong")
    hg.plot(history, options.output)
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
