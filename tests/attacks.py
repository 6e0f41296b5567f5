"""What an attacker or a bad disk can do to checkpoints and inputs, counted.

Run it as a program: ``python tests/attacks.py`` prints how many damaged files were loaded, how much
foreign code ran, and how many odd inputs ended in an error that names no argument.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import random
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import odd_inputs
import torch
import torch.distributed as dist
from loops import TRAIN, ridge_solver
from torch import Tensor

import hypergrad as hg
from hypergrad.bilevel.checkpoints import files

MARK = b"hypergrad sha256 "


def sealed(content: bytes) -> bytes:
    """``content`` as an attacker who knows the format would end it."""
    content = content + MARK
    return content + hashlib.sha256(content).hexdigest().encode()


def loop(kind: str = "cg", **options: Any) -> hg.BilevelSolver:
    """A loop of some steps, whose checkpoints have much in them."""
    if kind == "saba":
        parts = [tuple(part[k::3] for part in TRAIN) for k in range(3)]
        method = hg.single_loop.SABA(generator=torch.Generator().manual_seed(1))
        options = {"method": method, "inner_loader": parts} | options
    optimizers: dict[str, Any] = {
        "inner_optimizer": lambda w: torch.optim.Adam([w], lr=0.1),
        "outer_optimizer": lambda c: torch.optim.Adam([c], lr=0.1),
    }
    return ridge_solver(
        **({"callbacks": [hg.bilevel.EarlyStopping(patience=50)]} | optimizers | options)
    )


def whole_state(solver: hg.BilevelSolver) -> Any:
    """All that a load may change, to compare before and after."""
    buffer = io.BytesIO()
    torch.save(solver._state(), buffer)
    return buffer.getvalue(), torch.get_rng_state().tolist()


def outcome(solver: hg.BilevelSolver, path: Path) -> str:
    """How loading a file ends that should be refused."""
    before = whole_state(solver)
    try:
        solver.load(path)
    except hg.CheckpointError:
        return "refused" if whole_state(solver) == before else "refused, but changed"
    except Exception as error:
        return f"obscure: {type(error).__name__}"
    return "loaded"


def damaged(path: Path, flips: int, truncations: int, chance: random.Random) -> Counter[str]:
    """Random bit flips and truncations of a file, or of the files in a folder of ranks."""
    found: Counter[str] = Counter()
    solver = loop()
    targets = sorted(path.iterdir()) if path.is_dir() else [path]
    contents = {target: target.read_bytes() for target in targets}
    sizes = [len(contents[target]) for target in targets]
    for i in range(flips + truncations):
        (target,) = chance.choices(targets, sizes)
        content = contents[target]
        at = chance.randrange(len(content))
        if i < flips:
            bit = 1 << chance.randrange(8)
            target.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        else:
            target.write_bytes(content[:at])
        found[outcome(solver, path)] += 1
        target.write_bytes(content)
    solver.load(path)
    return found


def written(folder: Path) -> list[Path]:
    """A checkpoint of one process, and one of a rank of ``torch.distributed``."""
    solver = loop()
    solver.run()
    solver.save(folder / "one.pt")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        ranks = loop(process_group=dist.group.WORLD)
        ranks.run()
        ranks.save(folder / "ranks.dcp")
    finally:
        dist.destroy_process_group()
    return [folder / "one.pt", folder / "ranks.dcp"]


class Payload:
    """Writes a file when it is unpickled: the sign that foreign code ran."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.sign, "ran"))


def planted(files_of: list[Path], sign: Path) -> Iterator[tuple[str, Path]]:
    """Places where a pickle can be planted, each with the checkpoint to load."""
    one, folder = files_of
    payload = Payload(sign)
    whole, archive = one.read_bytes(), io.BytesIO()
    torch.save({"format": files.FORMAT, "version": files.VERSION, "loop": payload}, archive)
    old = io.BytesIO()
    torch.save({"loop": payload}, old, _use_new_zipfile_serialization=False)
    plain = pickle.dumps(payload)
    for name, content in {
        "archive": archive.getvalue(),
        "old": old.getvalue(),
        "pickle": plain,
    }.items():
        for how, change in {"bare": bytes, "sealed": sealed}.items():
            one.write_bytes(change(content))
            yield f"file, {name}, {how}", one
    one.write_bytes(sealed(repacked(whole, plain)))
    yield "file, record replaced", one
    one.write_bytes(whole)

    for target in sorted(folder.iterdir()):
        kept = target.read_bytes()
        state = (folder / "state.pt").read_bytes()
        for content in (plain, archive.getvalue()):
            target.write_bytes(content if target.name != "state.pt" else sealed(content))
            yield f"folder, {target.name}, bare", folder
            if target.name != "state.pt":
                rest = files.read(folder / "state.pt")
                rest["files"][target.name] = hashlib.sha256(content).hexdigest()
                files.write(rest, folder / "state.pt")
                yield f"folder, {target.name}, sealed", folder
            (folder / "state.pt").write_bytes(state)
            target.write_bytes(kept)


def repacked(archive: bytes, pickled: bytes) -> bytes:
    """The archive with another pickle in it."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(new, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))
    return new.getvalue()


def run_planted(folder: Path) -> tuple[int, int, Counter[str]]:
    """How many pickles were planted, how many ran, and how the loads ended."""
    sign, count, ran, ends = folder / "sign", 0, 0, Counter[str]()
    solver = loop()
    for _, path in planted(written(folder), sign):
        end = outcome(solver, path)
        count += 1
        ran += sign.exists()
        # A pickle that is never read does no harm: the tensors are those of the checkpoint.
        ends["refused or unread" if end in ("refused", "loaded") else end] += 1
        sign.unlink(missing_ok=True)
    return count, ran, ends


def mutations(state: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """The state with one entry taken out, or replaced by something of another kind."""
    entries = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in list(entries):
        place = f"{where}[{key!r}]"
        for other in _REPLACEMENTS:
            if type(other) is not type(value) and not {int, float} >= {type(other), type(value)}:
                yield place, _with(state, key, other)
        yield place, _without(state, key)
        if isinstance(value, Tensor) and value.numel():
            yield place, _with(state, key, torch.cat([value.flatten(), value.flatten()[:1]]))
        if isinstance(value, (dict, list, tuple)) and len(value) <= _LONG:
            for inner, changed in mutations(value, place):
                yield inner, _with(state, key, changed)


_REPLACEMENTS: list[Any] = ["text", 7, {"a": 1}, [torch.zeros(2)]]
_LONG = 30  # The random states are lists of numbers.


def _with(container: Any, key: Any, value: Any) -> Any:
    if isinstance(container, dict):
        return {**container, key: value}
    return type(container)([*container[:key], value, *container[key + 1 :]])


def _without(container: Any, key: Any) -> Any:
    if isinstance(container, dict):
        return {k: v for k, v in container.items() if k != key}
    return type(container)([*container[:key], *container[key + 1 :]])


def run_mutations(
    folder: Path, kind: str, most: int | None = None
) -> tuple[Counter[str], list[str]]:
    """How loads of states ended of which one part is missing or another; what is odd.

    Args:
        folder: for the files.
        kind: of loop.
        most: so many mutations, drawn with a seed; ``None`` is all of them.
    """
    solver = loop(kind)
    solver.run()
    path = folder / "mutated.pt"
    solver.save(path)
    ends, odd = Counter[str](), []
    fresh = loop(kind)
    every = list(mutations(files.read(path)))
    for where, state in every if most is None else random.Random(0).sample(every, most):
        files.write(state, path)
        end = outcome(fresh, path)
        if end == "loaded":
            # What does not matter may be another: the loop must go on with it.
            try:
                fresh.step()
                end = "loaded, and went on"
            except Exception as error:
                end = f"loaded, then {type(error).__name__}"
                odd.append(f"{where}: {error}")
            fresh = loop(kind)
        elif end != "refused":
            odd.append(where)
        ends[end] += 1
    return ends, odd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--truncations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: list[tuple[str, int, str, int]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, chance = Path(name), random.Random(options.seed)
        ends = Counter[str]()
        for path in written(folder):
            ends += damaged(path, options.flips // 2, options.truncations // 2, chance)
    rows.append(("bit flips and truncations", ends.total(), "loaded", ends["loaded"]))
    rows.append(("", ends.total(), "not refused whole", ends.total() - ends["refused"]))
    with tempfile.TemporaryDirectory() as name:
        count, ran, ends = run_planted(Path(name))
    rows.append(("planted pickles", count, "ran", ran))
    for kind in ("cg", "saba"):
        with tempfile.TemporaryDirectory() as name:
            ends, odd = run_mutations(Path(name), kind)
        rows.append((f"states with another part ({kind})", ends.total(), "odd ends", len(odd)))
    ends, obscure, changed = odd_inputs.run()
    rows.append(("odd trees and contexts", ends.total(), "obscure errors", len(obscure)))
    rows.append(("", ends.total(), "states left changed", len(changed)))
    for what, count, bad, number in rows:
        print(f"{what:32s} {count:6d}   {bad:20s} {number:4d}")
    for line in [*odd, *obscure, *changed]:
        print(line)
    sys.exit(any(number for *_, number in rows))


if __name__ == "__main__":
    main()
