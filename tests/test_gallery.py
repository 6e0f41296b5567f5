"""The gallery: the files that its examples read and write, and each example on a small problem."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

ROOT = Path(__file__).parent.parent
SIZES = {"train": 1200, "t10k": 597}


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # where dataclasses look for it
    spec.loader.exec_module(loaded)
    return loaded


mnist, report = module("mnist"), module("report")


def idx(data: Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in data.shape)
    return bytes([0, 0, 8, data.ndim]) + sizes + bytes(data.flatten().tolist())


def write(folder: Path, images: dict[str, Tensor], labels: dict[str, Tensor]) -> None:
    for split in images:
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images[split]))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels[split]))


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """A folder like MNIST's with 5 images of 3 × 2 to train on and 4 to test."""
    sizes = {"train": 5, "t10k": 4}
    images = {split: torch.arange(6 * n).view(n, 3, 2) for split, n in sizes.items()}
    write(tmp_path, images, {split: torch.arange(n) for split, n in sizes.items()})
    return tmp_path


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits of 8 × 8 in the files of MNIST."""
    folder = tmp_path_factory.mktemp("digits")
    X, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    images = (X[order] * 255 / 16).round().to(torch.uint8).view(-1, 8, 8)
    splits = (data.split([*SIZES.values()]) for data in (images, y[order]))
    write(folder, *(dict(zip(SIZES, split, strict=True)) for split in splits))
    return folder


def run(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One example in a process of its own, on one thread."""
    command = [
        f"examples/{name}.py", f"--output={folder / 'deep' / 'picture.png'}",
        f"--results={folder / 'deep' / 'results.json'}", *arguments,
    ]  # fmt: skip
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, text=True, capture_output=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_images_and_labels_come_back_as_they_were_written(some: Path, packed: bool) -> None:
    if packed:
        for path in [*some.iterdir()]:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    training, test = mnist.load(some)
    assert training.images.dtype == torch.uint8
    assert torch.equal(training.images, torch.arange(30, dtype=torch.uint8).view(5, 3, 2))
    assert torch.equal(training.labels, torch.arange(5))
    assert torch.equal(test.images, torch.arange(24, dtype=torch.uint8).view(4, 3, 2))
    assert torch.equal(test.labels, torch.arange(4))


@pytest.mark.parametrize("shape", [(0, 3, 2), (4, 0, 2), (1, 1, 1), (300, 1, 1)])
def test_any_shape_comes_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path, data = tmp_path / "some", torch.arange(prod(shape)).to(torch.uint8).view(shape)
    path.write_bytes(idx(data))
    assert torch.equal(mnist.read_idx(path, dimensions=3), data)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (IMAGES, b"", r"no IDX file of bytes: it starts with nothing, not with 00 00 08 03"),
        (IMAGES, b"\x89PNG....", r"it starts with 89 50 4e 47, not with 00 00 08 03"),
        (IMAGES, b"\0\0\x0d\x03", r"it starts with 00 00 0d 03"),
        (IMAGES, idx(torch.arange(5)), r"has 1 dimensions, expected 3"),
        (LABELS, idx(torch.zeros(5, 1, 1).byte()), r"has 3 dimensions, expected 1"),
        (IMAGES, b"\0\0\x08\x03\0\0\0\x05\0\0", r"ends after 10 bytes, within its header of 16"),
        (IMAGES, idx(torch.zeros(5, 3, 2).byte())[:-1], r"29 bytes .* promises 5 × 3 × 2 = 30"),
        (IMAGES, idx(torch.zeros(5, 3, 2).byte()) + b"\0", r"31 bytes .* promises 5 × 3 × 2 = 30"),
        (LABELS, idx(torch.arange(4)), r"has 5 train images, but 4 labels"),
        (LABELS, idx(torch.arange(6, 11)), r"has a train label 10, but digits end at 9"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    some: Path, name: str, content: bytes, words: str
) -> None:
    (some / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        mnist.load(some)
    assert str(some) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, -1])
def test_a_damaged_gzip_file_is_named(some: Path, keep: int) -> None:
    path = some / IMAGES
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    damaged = packed[:keep] if keep else b"no gzip"
    path.with_name(f"{IMAGES}.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{IMAGES}\.gz cannot be unpacked"):
        mnist.load(some)


def test_a_missing_file_is_named_with_how_to_get_it(some: Path) -> None:
    (some / LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{LABELS}\.gz: `make data` .* --data FOLDER"):
        mnist.load(some)


def test_the_check_knows_the_original_files(some: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"has 46 bytes, not the 47040016 of the original"):
        mnist.check(some)
    size, _ = mnist.ORIGINAL[IMAGES]
    (some / IMAGES).write_bytes(bytes(size))
    with pytest.raises(ValueError, match=r"is damaged: its SHA-256 is not that of the original"):
        mnist.check(some)
    with pytest.raises(SystemExit) as caught:
        mnist.main([str(some)])
    assert caught.value.code == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_table(
        [
            {"method": "CG", "F1": 0.93456, "rows": 12, "seconds": None},
            {"method": "Nyström", "F1": 1.0, "rows": 5000, "seconds": 12345.6},
            {"method": "none", "rows": 0, "seconds": 1234.4},
        ]
    )
    assert capsys.readouterr().out.splitlines() == [
        "",
        "method       F1  rows  seconds",
        "CG       0.9346    12        —",
        "Nyström   1.000  5000    12346",
        "none          —     0     1234",
    ]


def test_without_the_data_an_example_says_how_to_get_them(tmp_path: Path) -> None:
    result = run(tmp_path, "hyper_cleaning", f"--data={tmp_path}")
    assert result.returncode == 2
    assert "`make data` fetches MNIST" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train=0"], "rows to train on and to validate, not 0 and 5000"),
        (["--train=700", "--validation=501"], "there are 1200 rows, not 700 + 501"),
        (["--full"], "there are 1200 rows, not 50000 + 10000"),
        (["--steps=0"], "--steps must be at least 1, not 0"),
        (["--noise=1"], "--noise must be between 0 and 1, not 1.0"),
    ],
)
def test_hyper_cleaning_refuses_what_it_cannot_do(
    digits: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    with pytest.raises(SystemExit) as caught:
        module("hyper_cleaning").main([f"--data={digits}", *arguments])
    assert caught.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_hyper_cleaning_finds_wrong_labels_and_helps_on_test_rows(
    digits: Path, tmp_path: Path
) -> None:
    result = run(
        tmp_path, "hyper_cleaning", f"--data={digits}", "--train=700", "--validation=500",
        "--method", "cg", "soba",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "deep" / "picture.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "deep" / "results.json").read_text(encoding="utf-8"))
    assert saved["command"].startswith("python examples/hyper_cleaning.py --output=")
    assert saved["options"]["method"] == ["cg", "soba"]
    assert saved["seed"] == 0
    assert saved["versions"]["torch"] == torch.__version__
    rows: dict[str, dict[str, Any]] = {row["training rows"]: row for row in saved["rows"]}
    assert all(name in result.stdout for name in rows)
    alike, oracle = (rows[name] for name in ("all alike", "the right ones (oracle)"))
    assert "350 of them with a wrong label" in result.stdout
    for name in ("cg", "soba"):
        learned = rows[f"as weighted by {name}"]
        assert learned["F1"] > 0.85
        assert learned["test accuracy, %"] > alike["test accuracy, %"] + 5.0
        assert learned["test accuracy, %"] > oracle["test accuracy, %"] - 5.0
