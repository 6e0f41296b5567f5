"""The gallery's pages are what its results say, and its examples are as short as they claim."""

from __future__ import annotations

import ast
import json
import re

import pytest
from gallery import ROOT

import pages
from benchmarks.lines import PEERS, code_lines, part

RESULTS = sorted(pages.RESULTS.glob("*.json"))


def test_the_pages_are_what_the_results_say() -> None:
    pages.main(["--check"])


def test_a_stale_page_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "pages", lambda: iter([(ROOT / "README.md", "something else")]))
    with pytest.raises(SystemExit, match=r"not what `python examples/pages.py` writes: README.md"):
        pages.main(["--check"])


@pytest.mark.parametrize("name", pages.EXAMPLES)
def test_every_example_has_a_page_a_picture_and_a_paper(name: str) -> None:
    page = (pages.GALLERY / f"{name}.md").read_text(encoding="utf-8")
    assert f"<!-- results: {name} -->" in page
    assert pages.PAPER.search(page)
    pictures = re.findall(r"!\[.+\]\((.+?)\)", page)
    assert pictures
    for picture in pictures:
        assert (pages.GALLERY / picture).exists()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_say_how_to_get_them(path: pages.Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    if path.stem == "lines":
        return
    assert record["name"] == path.stem
    stem = path.stem.removesuffix("_full")
    assert record["command"].startswith(f"python examples/{stem}.py")
    assert ("--full" in record["command"]) == path.stem.endswith("_full")
    assert all(rows for rows in record["tables"].values())


def test_lines_are_counted_without_imports_docstrings_and_arguments() -> None:
    source = '''"""Doc."""
import sys

parser = argparse.ArgumentParser()
parser.add_argument(
    "--n"
)

def f(x):
    """Doc."""
    # why
    return g(
        x,
    )
'''
    assert code_lines(source) == 2
    assert code_lines("def f():\n    '''Doc.'''") == 2


@pytest.mark.parametrize("name", PEERS)
def test_what_a_user_writes_is_shorter_than_for_any_peer(name: str) -> None:
    counted = json.loads((pages.RESULTS / "lines.json").read_text(encoding="utf-8"))["rows"]
    theirs = [row["its lines"] for row in counted if row["example"] == name and "its lines" in row]
    assert len(theirs) == len(PEERS[name])
    assert all(code_lines(part(name)) < lines for lines in theirs)


@pytest.mark.parametrize("name", pages.EXAMPLES)
def test_examples_use_the_public_interface_only(name: str) -> None:
    tree = ast.parse((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = [module, *(alias.name for alias in node.names)]
            ours = [each for each in names if each.split(".")[0] == "hypergrad"]
            assert all(each in ("hypergrad", "hypergrad.bilevel") for each in ours), names
        if isinstance(node, ast.Attribute):
            assert not (node.attr.startswith("_") and not node.attr.startswith("__")), node.attr
