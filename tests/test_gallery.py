"""The gallery: the files that its examples read and write, and each example on a small problem."""

from __future__ import annotations

import gzip
import json
from math import prod
from pathlib import Path

import pytest
import torch
from gallery import ROOT, idx, refuses, run, start, write
from matplotlib.figure import Figure

import hyper_cleaning
import hypergrad as hg
import mnist
import report
import weight_decay


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """A folder like MNIST's with 5 images of 3 × 2 to train on and 4 to test."""
    sizes = {"train": 5, "t10k": 4}
    images = {split: torch.arange(6 * n).view(n, 3, 2) for split, n in sizes.items()}
    write(tmp_path, images, {split: torch.arange(n) for split, n in sizes.items()})
    return tmp_path


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
    refuses(mnist.main, [str(some)], "is damaged", capsys)


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
    process = start(tmp_path, "hyper_cleaning", f"--data={tmp_path}")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "`make data` fetches MNIST" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "deep").exists()


def test_results_can_be_got_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(ROOT / "examples" / "some.py"), "--full", "--seed=3"])
    options = report.arguments("Some example.", full="large").parse_args()
    options.results, options.output = tmp_path / "deep" / "a.json", tmp_path / "deep" / "a.png"
    report.finish("some", options, {"losses": [{"at": 1, "loss": float("nan")}]}, Figure())
    saved = json.loads(options.results.read_text(encoding="utf-8"))
    assert saved["command"] == "python examples/some.py --full --seed=3"
    assert (saved["name"], saved["seed"], saved["options"]["full"]) == ("some_full", 3, True)
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["tables"] == {"losses": [{"at": 1, "loss": None}]}
    assert options.output.read_bytes().startswith(b"\x89PNG")


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
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuses(hyper_cleaning.main, [f"--data={digits}", *arguments], words, capsys)


def test_hyper_cleaning_finds_wrong_labels_and_helps_on_test_rows(
    digits: Path, tmp_path: Path
) -> None:
    out, tables = run(
        tmp_path, "hyper_cleaning", f"--data={digits}", "--train=700", "--validation=500",
        "--method", "cg", "soba",
    )  # fmt: skip
    rows = {row["training rows"]: row for row in tables["700 training rows"]}
    alike, oracle = (rows[name] for name in ("all alike", "the right ones (oracle)"))
    assert "350 of them with a wrong label" in out
    for name in ("cg", "soba"):
        learned = rows[f"as weighted by {name}"]
        assert learned["F1"] > 0.85
        assert learned["test accuracy, %"] > alike["test accuracy, %"] + 5.0
        assert learned["test accuracy, %"] > oracle["test accuracy, %"] - 5.0


def test_weight_decays_apart_are_worth_more_than_one(capsys: pytest.CaptureFixture[str]) -> None:
    data = weight_decay.load(seed=0)
    methods = weight_decay.compare_methods(data, repeats=1)
    cg = next(row for row in methods if row["method"] == "CG")
    assert cg["status"] == "CONVERGED"
    assert cg["relative error"] < 1e-5
    assert "What hg.check says of the problem" in capsys.readouterr().out
    learned = weight_decay.tune(data, hg.CG(rtol=1e-6), 40).hparams
    single, before = weight_decay.best_single_decay(data), weight_decay.start()[2]
    losses = [weight_decay.loss(data, decay) for decay in (learned, single, before)]
    assert losses == sorted(losses)
    assert len(set(losses)) == 3


@pytest.mark.long
def test_every_exact_method_finds_weight_decays_worth_more_than_one(tmp_path: Path) -> None:
    out, tables = run(tmp_path, "weight_decay", "--repeats=1")
    assert "What hg.check says of the problem" in out
    methods, splits = tables.values()
    cg = next(row for row in methods if row["method"] == "CG")
    assert cg["status"] == "CONVERGED"
    assert cg["relative error"] < 1e-5
    losses = {row["decays"]: row["validation loss"] for row in splits}
    for name in ("Dense", "CG", "Neumann, 100 terms"):
        assert losses[name] < losses["best single decay"] < losses["before"]
