"""What the tests of the gallery share: its scripts as programs, and small images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

ROOT = Path(__file__).parent.parent
SIZES = {"train": 1200, "t10k": 597}

Tables = dict[str, list[dict[str, Any]]]


def idx(data: Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in data.shape)
    return bytes([0, 0, 8, data.ndim]) + sizes + bytes(data.flatten().tolist())


def write(folder: Path, images: dict[str, Tensor], labels: dict[str, Tensor]) -> None:
    for split in images:
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images[split]))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels[split]))


def write_digits(folder: Path) -> Path:
    """scikit-learn's digits of 8 × 8 in the files of MNIST."""
    X, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    images = (X[order] * 255 / 16).round().to(torch.uint8).view(-1, 8, 8)
    splits = (data.split([*SIZES.values()]) for data in (images, y[order]))
    write(folder, *(dict(zip(SIZES, split, strict=True)) for split in splits))
    return folder


def start(folder: Path, name: str, *arguments: str) -> subprocess.Popen[str]:
    """One example in a process of its own, on one thread; it writes to ``folder/deep``."""
    command = [
        f"examples/{name}.py", f"--output={folder / 'deep' / 'picture.png'}",
        f"--results={folder / 'deep' / 'results.json'}", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], folder: Path) -> tuple[str, Tables]:
    """What a process printed and the tables that it saved, when it has also drawn a picture."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "Warning" not in errors, errors
    assert (folder / "deep" / "picture.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "deep" / "results.json").read_text(encoding="utf-8"))
    return out, record["tables"]


def run(folder: Path, name: str, *arguments: str) -> tuple[str, Tables]:
    """What one example prints, and its tables."""
    return finish(start(folder, name, *arguments), folder)


def refuses(
    main: Callable[[Sequence[str]], None],
    arguments: Sequence[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Assert that a program ends with an error of its command line that has these words."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
