"""Write the tables of the gallery's pages, and the page of all results, from the examples' JSON.

    python examples/pages.py            # writes
    python examples/pages.py --check    # fails where a page is not what it would write

A page docs/gallery/<name>.md says where the tables of a run belong by two lines, and all between
them is written anew:

    <!-- results: <name of the run> -->
    <!-- end -->

docs/gallery/results.md is written whole: for each example the picture, the tables and where they
come from, and the section "What the paper reports" of its page.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from report import ROOT, columns, shown

GALLERY = ROOT / "docs" / "gallery"
RESULTS = ROOT / "examples" / "results"
FIGURES = ROOT / "examples" / "figures"

# In the order of the page of results.
EXAMPLES = (
    "weight_decay",
    "decay_budget",
    "distillation",
    "hyper_cleaning",
    "long_tail",
    "few_shot_sinusoid",
    "few_shot_images",
    "learned_schedule",
    "tune_script",
    "sklearn_penalties",
    "equilibrium",
    "influence",
)

BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAPER = re.compile(r"^## What the paper.*? reports?\n+(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)


def pages() -> Iterator[tuple[Path, str]]:
    """Each page, and what should be in it."""
    for name in EXAMPLES:
        path = GALLERY / f"{name}.md"
        yield path, filled(path.read_text(encoding="utf-8"))
    yield GALLERY / "results.md", all_results()


def filled(page: str) -> str:
    """The page with the tables of its runs."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{run(found[2])}\n{found[3]}", page)


def all_results() -> str:
    """The page of all results."""
    parts = [
        "# Results\n",
        "Every number on this page was written by `python examples/pages.py` from the files in "
        "`examples/results`,\nwhich the examples wrote themselves: `make examples` runs them all. "
        "Runs of one example on another\nmachine differ by its rounding, and their seconds by its "
        "speed.\n",
    ]
    for name in EXAMPLES:
        page = (GALLERY / f"{name}.md").read_text(encoding="utf-8")
        paper = PAPER.search(page)
        parts.append(f"## [{title(page)}]({name}.md)\n")
        for stem in (name, f"{name}_full"):
            if (RESULTS / f"{stem}.json").exists():
                parts += [f"![{title(page)}](../../examples/figures/{stem}.png)\n", run(stem)]
        if paper is not None:
            parts.append(f"**What the paper reports.** {paper[1].strip()}\n")
    lines = json.loads((RESULTS / "lines.json").read_text(encoding="utf-8"))
    parts.append(
        "## Lines of code\n\nStatements, one a line however they were laid out, without imports, "
        f"docstrings and parsing of\narguments; `{lines['command']}` counted them on "
        f'{lines["date"]}. Ours are those between the marks\n"your part": what a user '
        f"writes.\n\n{table(lines['rows'])}\n"
    )
    return "\n".join(parts)


def title(page: str) -> str:
    """The first heading."""
    return page.split("\n", 1)[0].removeprefix("# ")


def run(name: str) -> str:
    """The tables of a run, and where they come from."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        full = " --full" if name.endswith("_full") else ""
        raise SystemExit(
            f"{path} is missing: python examples/{name.removesuffix('_full')}.py{full}"
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    parts = [f"{heading}:\n\n{table(rows)}\n" for heading, rows in record["tables"].items()]
    versions = record["versions"]
    return "\n".join(
        [
            *parts,
            f"`{record['command']}` printed this on {record['date']} in {record['seconds']:.0f} "
            f"seconds:\nseed {record['seed']}, {record['cores']} cores, {record['threads']} "
            f"thread{'s' * (record['threads'] > 1)}, {record['machine']}, "
            f"torch {versions['torch']}, Python {versions['python']}, "
            f"hypergrad {versions['hypergrad']}.\n",
        ]
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown: numbers to the right."""
    names = columns(rows)
    words = [any(isinstance(row.get(name), str) for row in rows) for name in names]
    lines = [
        names,
        ["---" if word else "---:" for word in words],
        *([shown(row.get(name)).replace("|", r"\|") for name in names] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    options = parser.parse_args(argv)
    stale = []
    for path, page in pages():
        if path.exists() and path.read_text(encoding="utf-8") == page:
            continue
        stale.append(path.relative_to(ROOT).as_posix())
        if not options.check:
            path.write_text(page, encoding="utf-8")
    if options.check and stale:
        raise SystemExit(f"not what `python examples/pages.py` writes: {', '.join(stale)}")
    print("\n".join(stale) or "all pages are as they should be")


if __name__ == "__main__":
    main()
