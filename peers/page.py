"""The tables of docs/benchmarks.md, from the JSON that a run left.

    python -m peers.page            # writes
    python -m peers.page --check    # fails where the page is not what it would write

As in the gallery, all between two such lines is written anew:

    <!-- peers: <name of the table> -->
    <!-- end -->
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.environments import PEERS, ROOT
from peers.record import RESULTS, Table, markdown

PAGE = ROOT / "docs" / "benchmarks.md"
BLOCK = re.compile(r"(<!-- peers: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, content: dict[str, Any]) -> str:
    """The page with the tables of a run."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{block(found[2], content)}\n\n{found[3]}", page)


def block(name: str, content: dict[str, Any]) -> str:
    """One table, or what is to be known of the run."""
    if name == "run":
        return run(content)
    if name == "environments":
        return markdown(content["environments"])
    table = content["tables"].get(name)
    return "Not run." if table is None else markdown(table)


def run(content: dict[str, Any]) -> str:
    """Where and when, in a sentence."""
    return (
        f"`{content['command']}` printed this on {content['date']} in "
        f"{content['seconds'] / 60:.0f} minutes: {content['cores']} cores, "
        f"{content['threads']} threads, {content['machine']}, torch {content['torch']}, "
        f"Python {content['python']}."
    )


def environments(versions: dict[str, dict[str, Any]], failures: dict[str, str]) -> Table:
    """What was installed, and how."""
    rows = [
        {
            "": peer.title,
            "requirement": peer.requirement or "—",
            "version": versions.get(peer.name, {}).get("peer", "—"),
            "torch": versions.get(peer.name, {}).get("torch", "—"),
            "installed with": ", ".join(peer.needs) or "—",
            "and": peer.why or "—",
            "remark": failures.get(peer.name, ""),
        }
        for peer in PEERS
        if peer.name in versions or peer.name in failures
    ]
    note = "Each has an environment of its own, with this PyTorch before all else; the peer comes "
    return Table(
        "Environments", f"{note}without its dependencies, and what it imports with it.", rows
    )


def whole(content: dict[str, Any]) -> str:
    """All tables, as they are printed and put into the Markdown file."""
    names = ["goals", *(name for name in content["tables"] if name != "goals")]
    titles = {name: content["tables"][name]["title"] for name in names}
    parts = [
        f"# Side by side\n\n{run(content)}",
        f"## Environments\n\n{block('environments', content)}",
    ]
    parts += [f"## {heading(name)}{titles[name]}\n\n{block(name, content)}" for name in names]
    return "\n\n".join(parts) + "\n"


def heading(name: str) -> str:
    """The letter of a workload."""
    letter = name.split("_")[0]
    return f"({letter}) " if len(letter) == 1 else ""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    options = parser.parse_args(argv)
    results: Path = RESULTS / "peers.json"
    content = json.loads(results.read_text(encoding="utf-8"))
    old = PAGE.read_text(encoding="utf-8")
    new = filled(old, content)
    if options.check and new != old:
        raise SystemExit(f"{PAGE.relative_to(ROOT)} is not what `python -m peers.page` writes")
    PAGE.write_text(new, encoding="utf-8")
    print("the page is as it should be" if new == old else f"{PAGE.relative_to(ROOT)} is new")


if __name__ == "__main__":
    main()
