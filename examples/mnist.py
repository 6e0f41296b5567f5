"""MNIST from its four IDX files, wherever they are: 60,000 images to train on and 10,000 to test.

`make data` fetches them into examples/data/mnist. A copy that is there already, such as
torchvision's folder MNIST/raw, serves as well, plain or gzipped. As a program it checks a folder
against the sizes and checksums of the original files:

    python examples/mnist.py examples/data/mnist
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "data" / "mnist"

# Of the files when unpacked: bytes, and SHA-256.
ORIGINAL = {
    "train-images-idx3-ubyte": (
        47_040_016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": (
        60_008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte": (
        7_840_016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte": (
        10_008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}


class Split(NamedTuple):
    """Images, uint8 of shape (n, height, width), and labels from 0 to 9, int64 of shape (n,)."""

    images: Tensor
    labels: Tensor


def load(folder: Path = FOLDER) -> tuple[Split, Split]:
    """The images to train on, and those to test.

    Raises:
        FileNotFoundError: a file is not there; the message says how to get it.
        ValueError: a file is damaged or none of MNIST's; the message says what is wrong with it.
    """
    training, test = (_load_split(folder, name) for name in ("train", "t10k"))
    return training, test


def _load_split(folder: Path, name: str) -> Split:
    images = read_idx(find(folder, f"{name}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(find(folder, f"{name}-labels-idx1-ubyte"), dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} {name} images, but {len(labels)} labels")
    if len(labels) and int(labels.max()) > 9:
        raise ValueError(f"{folder} has a {name} label {int(labels.max())}, but digits end at 9")
    return Split(images, labels.long())


def find(folder: Path, name: str) -> Path:
    """The file of this name, or its gzipped form."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder} has neither {name} nor {name}.gz: `make data` fetches MNIST into "
        "examples/data/mnist; if you have it, say where: --data FOLDER"
    )


def read_idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file of bytes: 0, 0, 8, how many dimensions, their sizes in four bytes each, data.

    Raises:
        ValueError: it is none, or one of other dimensions, or not as long as it says.
    """
    data = read(path)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path} is no IDX file of bytes: it starts with {data[:4].hex(' ') or 'nothing'}, not "
            f"with 00 00 08 {dimensions:02x}"
        )
    if data[3] != dimensions:
        raise ValueError(f"{path} has {data[3]} dimensions, expected {dimensions}")
    begin = 4 + 4 * dimensions
    if len(data) < begin:
        raise ValueError(f"{path} ends after {len(data)} bytes, within its header of {begin}")
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, begin, 4)]
    if len(data) - begin != prod(shape):
        raise ValueError(
            f"{path} has {len(data) - begin} bytes of data, but its header promises "
            f"{' × '.join(map(str, shape))} = {prod(shape)}"
        )
    if prod(shape) == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=begin).view(shape)


def read(path: Path) -> bytes:
    """What the file holds, unpacked."""
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from error


def check(folder: Path) -> None:
    """Compare the four files with the original ones.

    Raises:
        FileNotFoundError, ValueError: one is missing, or differs.
    """
    for name, (size, checksum) in ORIGINAL.items():
        path = find(folder, name)
        data = read(path)
        if len(data) != size:
            raise ValueError(f"{path} has {len(data)} bytes, not the {size} of the original")
        if hashlib.sha256(data).hexdigest() != checksum:
            raise ValueError(f"{path} is damaged: its SHA-256 is not that of the original")


def main(argv: Sequence[str] | None = None) -> None:
    """Check a folder."""
    parser = argparse.ArgumentParser(
        description="Compare a folder with the original files of MNIST."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    options = parser.parse_args(argv)
    try:
        check(options.folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{options.folder} has the four files of MNIST, bit for bit")


if __name__ == "__main__":
    main()
