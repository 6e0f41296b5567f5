"""Endless batches: distinct, in an order that a seed fixes, at a position to come back to."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from hypergrad.bilevel.batches import Stream, to_device
from hypergrad.errors import CheckpointError, LoaderError

CPU = torch.device("cpu")


def stream(loader: Any, seed: int = 0) -> Stream:
    return Stream(loader, "inner.loader", seed, CPU)


def numbers(batches: Iterator[Any], count: int) -> list[list[int]]:
    return [batch[0].tolist() for batch in islice(batches, count)]


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(12)), 3, shuffle=True, **options)


def own_sampler() -> DataLoader[Any]:
    data = TensorDataset(torch.arange(12))
    return DataLoader(data, 3, sampler=RandomSampler(data, generator=torch.Generator()))


LOADERS = {
    "list": lambda: [(torch.tensor([k]),) for k in range(4)],
    "shuffled": loader,
    "workers": lambda: loader(num_workers=2),
    "persistent": lambda: loader(num_workers=1, persistent_workers=True),
    "own generator": lambda: loader(generator=torch.Generator()),
    "own sampler": own_sampler,
}


@pytest.mark.parametrize("name", LOADERS)
def test_each_pass_holds_each_sample_once_and_passes_differ(name: str) -> None:
    """The loop of 0.0.1 gave the first batch for ever."""
    drawn = numbers(iter(stream(LOADERS[name]())), 12)
    passes = [drawn[k : k + 4] for k in (0, 4, 8)]
    samples = [sorted(number for batch in batches for number in batch) for batches in passes]
    assert samples[0] == samples[1] == samples[2] == sorted(set(samples[0]))
    assert name == "list" or passes[0] != passes[1]


@pytest.mark.parametrize("name", LOADERS)
def test_the_order_depends_on_the_seed_alone(name: str) -> None:
    first = numbers(iter(stream(LOADERS[name]())), 10)
    again = stream(LOADERS[name]())
    torch.rand(3)
    drawn = []
    for _ in range(10):
        before = torch.get_rng_state()
        drawn.append(again.next()[0].tolist())
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)
    assert drawn == first
    assert name == "list" or numbers(iter(stream(LOADERS[name](), seed=1)), 10) != first


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("position", [0, 1, 4, 6])
def test_a_position_is_found_again(name: str, position: int) -> None:
    began = stream(LOADERS[name]())
    numbers(iter(began), position)
    state = began.state_dict()
    expected = numbers(iter(began), 7)
    resumed = stream(LOADERS[name](), seed=5)
    resumed.load_state_dict(state)
    assert numbers(iter(resumed), 7) == expected
    began.close()
    assert len(numbers(iter(began), 1)) == 1


def test_what_a_transform_draws_in_this_process_is_found_again() -> None:
    class Augmented(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> torch.Tensor:
            return index + torch.rand(())

    def make() -> Stream:
        return stream(DataLoader(Augmented(), 2, shuffle=True))

    began = make()
    for _ in range(4):
        began.next()
    resumed = make()
    resumed.load_state_dict(began.state_dict())
    for _ in range(4):
        assert torch.equal(resumed.next(), began.next())


def test_persistent_workers_are_kept() -> None:
    class Workers(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            return os.getpid()

    batches = iter(stream(DataLoader(Workers(), 2, num_workers=1, persistent_workers=True)))
    workers = {pid for batch in islice(batches, 6) for pid in batch.tolist()}
    assert len(workers) == 1
    assert workers != {os.getpid()}


def test_a_sampler_hears_the_number_of_the_pass() -> None:
    class Sampler:
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

        def __len__(self) -> int:
            return 4

    sampler = Sampler()
    data = DataLoader(TensorDataset(torch.arange(4)), 2, sampler=sampler)  # type: ignore[arg-type]
    numbers(iter(stream(data)), 5)
    assert sampler.epochs == [0, 1, 2]


@pytest.mark.parametrize("empty", [[], DataLoader(TensorDataset(torch.zeros(0)), 1)])
def test_a_loader_without_batches_is_an_error(empty: Any) -> None:
    with pytest.raises(ValueError, match=r"inner\.loader must hold at least one batch, got none"):
        stream(empty).next()


def test_a_generator_is_refused() -> None:
    with pytest.raises(TypeError, match=r"inner\.loader must be iterable again and again"):
        stream(iter([1, 2]))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_loader_says_where(workers: int) -> None:
    class Broken(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> int:
            if index == 4:
                raise OSError("no such image")
            return index

    batches = stream(DataLoader(Broken(), 2, num_workers=workers))
    batches.next()
    batches.next()
    with pytest.raises(
        LoaderError, match=r"inner.loader raised OSError at batch 2 of pass 0: (.|\n)*no such image"
    ) as caught:
        batches.next()
    assert isinstance(caught.value.__cause__, OSError)
    assert batches.state_dict()["position"] == 2


def test_a_loader_that_has_become_shorter_is_refused() -> None:
    with pytest.raises(CheckpointError, match="batch 6 of its pass 0 was drawn then"):
        stream([1, 2, 3]).load_state_dict({"seed": 0, "epoch": 0, "position": 7})


def test_any_tree_of_tensors_is_moved() -> None:
    meta = torch.device("meta")
    batch = {"x": torch.zeros(2), "more": [torch.zeros(1), ("label", 3)], "none": None}
    moved = to_device(batch, meta)
    assert moved["x"].device == meta
    assert moved["more"][0].device == meta
    assert moved["more"][1] == ("label", 3)
    assert to_device(batch, CPU) is batch

    class Movable:
        def to(self, device: torch.device) -> str:
            return f"on {device}"

    assert to_device(Movable(), meta) == "on meta"


def test_python_and_numpy_draws_are_left_alone() -> None:
    random.seed(0)
    before = random.getstate()
    numbers(iter(stream(loader())), 5)
    assert random.getstate() == before
