"""The same work by hypergrad and by its peers, in turn: ``make bench-peers``.

    python -m peers --only a,d --peers ours,higher --repeats 5

(a) CG, (b) Neumann and Nyström, which come with (a), (c) to an error, (d) unrolled steps, (e) a
whole run, (f) growth.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from peers import accuracy, growth, page, whole_run, workloads
from peers.environments import BY_NAME, OURS, PEERS, install, ready
from peers.pictures import draw
from peers.record import FIGURES, RESULTS, Record
from peers.session import Session
from peers.workloads import Size

Part = Callable[[Session, Record, Size], None]
PARTS: dict[str, tuple[Part, ...]] = {
    "a": (workloads.implicit,),
    "b": (workloads.implicit,),
    "c": (accuracy.to_an_error,),
    "d": (workloads.unrolled,),
    "e": (whole_run.run,),
    "f": (growth.time, growth.memory),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and save what was printed."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m peers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--quick", action="store_true",
        help="tiny sizes, one repeat, the environments that there are; saves nothing by itself",
    )  # fmt: skip
    parser.add_argument("--only", default=",".join(PARTS), help="workloads, such as a,d; all")
    parser.add_argument("--peers", default=",".join(BY_NAME), help="such as ours,higher; all")
    parser.add_argument("--repeats", type=int, help="of what is short; 11, or 1 if quick")
    parser.add_argument("--install", action="store_true", help="make the environments, and end")
    parser.add_argument("--output", type=Path, help="a folder for JSON, Markdown and pictures")
    options = parser.parse_args(argv)
    parts = _named(parser, "--only", options.only, list(PARTS))
    names = _named(parser, "--peers", options.peers, list(BY_NAME))
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {options.repeats}")
    repeats = options.repeats or (1 if options.quick else 11)

    failures = {}
    if options.quick:
        names = [name for name in names if ready(BY_NAME[name])]
    else:
        for name in tqdm([n for n in names if not ready(BY_NAME[n])], desc="installing"):
            complaint = install(BY_NAME[name])
            if complaint is not None:
                failures[name] = complaint
    if options.install:
        for name in names:
            print(f"{BY_NAME[name].title}: {failures.get(name, 'ready')}")
        return

    record = Record({})
    with Session(names, failures) as session:
        functions = dict.fromkeys(function for part in parts for function in PARTS[part])
        for function in tqdm(functions, desc="workloads"):
            function(session, record, Size(repeats, options.quick))
        record.about = {
            "command": shlex.join(["python", "-m", "peers", *(argv or sys.argv[1:])]),
            "date": date.today().isoformat(),
            "seconds": time.perf_counter() - began,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": session.versions.get(OURS, {}).get("threads", torch.get_num_threads()),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "repeats": repeats,
            "parts": parts,
            "versions": session.versions,
            "failures": session.failures,
            "environments": asdict(page.environments(session.versions, session.failures)),
        }
    _finish(
        record, options.output, options.quick, set(parts) == set(PARTS) and len(names) == len(PEERS)
    )


def _finish(record: Record, output: Path | None, quick: bool, whole: bool) -> None:
    """Print, and save: in place only what is a whole run, so that nothing is mixed of two."""
    in_place = output is None and whole and not quick
    folder = output or (RESULTS if in_place else Path("/tmp") / "peers-of-a-part")
    record.save(folder / "peers.json")
    content = json.loads((folder / "peers.json").read_text(encoding="utf-8"))
    text = page.whole(content)
    (folder / "peers.md").write_text(text, encoding="utf-8")
    print(text)
    figures = FIGURES if in_place else folder
    pictures = draw(content["curves"], figures)
    if in_place and page.PAGE.exists():
        page.main([])
    print("\n".join(str(path) for path in (folder / "peers.json", folder / "peers.md", *pictures)))


def _named(
    parser: argparse.ArgumentParser, option: str, given: str, known: Sequence[str]
) -> list[str]:
    """The names in a list with commas, in the order of the known ones."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            parser.error(f"{option} must be of {', '.join(known)}, not {name!r}")
    if not names:
        parser.error(f"{option} names nothing: {', '.join(known)} are there")
    return [name for name in known if name in names]


if __name__ == "__main__":
    main()
