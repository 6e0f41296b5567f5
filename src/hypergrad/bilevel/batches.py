"""Endless batches from a loader, at a position from which a loop can resume.

A pass over the loader has its own seed and its own random state. Which batch comes n-th depends
on the seed and n alone, not on what the objectives draw in between. To return to a position, the
stream starts that pass again and skips.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad._saving import check_form
from hypergrad.errors import CheckpointError, LoaderError
from hypergrad.minibatches import check_batches


@dataclass(frozen=True)
class Failed:
    """Stands for a batch that could not be drawn, with its error."""

    error: Exception


class Stream:
    """The batches of a loader, endlessly, moved to a device.

    Before each pass it seeds the generators of the loader and its samplers, and tells a sampler
    with ``set_epoch`` the number of the pass. It also restores what the workers of a ``DataLoader``
    draw, unless they are persistent, since their random states live on from pass to pass.

    Args:
        loader: anything that can be iterated again and again; ``None`` is one batch, ``None``.
        name: what to call it in errors.
        seed: of all passes.
        device: where to move the tensors of a batch.
        postpones: whether a batch that cannot be drawn comes as a :class:`Failed` one. Other ranks
            wait in the objective then, and must learn of the error there.
    """

    def __init__(
        self,
        loader: Iterable[Any] | None,
        name: str,
        seed: int,
        device: torch.device,
        postpones: bool = False,
    ) -> None:
        self.loader: Iterable[Any] = [None] if loader is None else loader
        check_batches(self.loader, name)
        self.name = name
        self.epoch = -1
        self.position = 0
        self._seed = seed
        self.device = device
        self._postpones = postpones
        self._iterator: Iterator[Any] | None = None
        self._random = torch.get_rng_state()
        # The first pass of persistent workers draws a seed for them, later ones do not.
        self._unstarted = bool(getattr(self.loader, "persistent_workers", False))

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.next()

    def next(self) -> Any:
        """The next batch.

        Raises:
            ValueError: a whole pass holds no batch.
            LoaderError: the loader raised.
        """
        try:
            return to_device(self._draw(), self.device)
        except Exception as error:
            if self._postpones:
                return Failed(error)
            raise

    def __str__(self) -> str:
        return f"{self.name}, pass {self.epoch}, batch {self.position - 1}"

    def close(self) -> None:
        """Discard the present pass, and the workers that serve it; the position stays."""
        self.return_to(self.state_dict())

    def state_dict(self) -> dict[str, int]:
        """The seed, the pass and the position in it."""
        return {"seed": self._seed, "epoch": self.epoch, "position": self.position}

    def check_state(self, state: Any) -> None:
        """Raise ``ValueError`` unless ``state`` is a position."""
        name = f"the position of {self.name}"
        check_form(state, self.state_dict(), name)
        if state["epoch"] < -1 or state["position"] < 0:
            raise ValueError(f"{name} must be a pass and a batch of it, got {state}")

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the pass again, and skip to the position.

        It raises ``CheckpointError`` if the pass is now shorter.
        """
        self._seed = state["seed"]
        self._seek(state["epoch"], state["position"])

    def return_to(self, state: dict[str, int]) -> None:
        """Do :meth:`load_state_dict` when the next batch is needed."""
        self._iterator = None
        self._seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]

    def _seek(self, epoch: int, position: int) -> None:
        self._iterator, self.epoch, self.position = None, epoch, 0
        if epoch < 0:
            return
        self._begin(epoch)
        while self.position < position:
            try:
                self._next_of_pass()
            except StopIteration:
                raise CheckpointError(
                    f"{self.name} must be the loader that was saved: batch {position - 1} of its "
                    f"pass {epoch} was drawn then, and it has {self.position} now"
                ) from None

    def _draw(self) -> Any:
        if self._iterator is None:
            if self.position:
                self._seek(self.epoch, self.position)
            else:
                self._begin(max(self.epoch, 0))
        try:
            return self._next_of_pass()
        except StopIteration:
            self._begin(self.epoch + 1)
        try:
            return self._next_of_pass()
        except StopIteration:
            self._iterator = None
            raise ValueError(f"{self.name} must hold at least one batch, got none") from None

    def _begin(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0
        if self._unstarted:
            self._random = self._seeded("workers").get_state()
            self._with_own_random_state(lambda: iter(self.loader))
            self._unstarted = False
        seed = self._seeded(epoch).initial_seed()
        for sampler in _samplers(self.loader):
            if isinstance(generator := getattr(sampler, "generator", None), torch.Generator):
                generator.manual_seed(seed)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        self._random = self._seeded(epoch).get_state()
        self._iterator = self._with_own_random_state(lambda: iter(self.loader))

    def _seeded(self, what: int | str) -> torch.Generator:
        text = f"{self._seed} {self.name} {what}"
        return torch.Generator().manual_seed(zlib.crc32(text.encode()))

    def _next_of_pass(self) -> Any:
        iterator = self._iterator
        assert iterator is not None
        batch = self._with_own_random_state(lambda: next(iterator))
        self.position += 1
        return batch

    def _with_own_random_state(self, draw: Any) -> Any:
        if isinstance(self.loader, (list, tuple)):
            return draw()
        # A shuffling sampler draws its seed from the default generator, at a time of its choosing.
        callers = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            return draw()
        except StopIteration:
            raise
        except Exception as error:
            self._iterator = None
            raise LoaderError(
                f"{self.name} raised {type(error).__name__} at batch {self.position} of pass "
                f"{self.epoch}: {error}"
            ) from error
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(callers)


def _samplers(loader: Any) -> list[Any]:
    """The loader and all that draws its indices, each once."""
    batches = getattr(loader, "batch_sampler", None)
    parts = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    return list({id(part): part for part in parts if part is not None}.values())


def to_device(batch: Any, device: torch.device) -> Any:
    """``batch``, any tree, with its tensors on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to"):
        return batch.to(device)
    tensors, rebuild = tr.split(batch)
    if all(tensor.device == device for tensor in tensors):
        return batch
    return rebuild([tensor.to(device, non_blocking=True) for tensor in tensors])
