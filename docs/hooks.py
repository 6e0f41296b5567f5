"""What mkdocs does beside its own work: all pictures into the site, and formulas as MathML.

Browsers draw MathML themselves: no script, and nothing is fetched from elsewhere.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL
)


ROLE = re.compile(r":(?:class|func|meth|mod):(?=<code>|<a |<autoref )")  # of docstrings


def on_files(files: Files, config: Any) -> Files:
    """Bring the pictures of the examples and the benchmarks into the site."""
    every = [*ROOT.glob("examples/figures/*.png"), *ROOT.glob("benchmarks/figures/*.png")]
    for path in sorted(every):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point to where they are then."""
    return re.sub(
        r"\]\(((?:\.\./)+)(?:examples|benchmarks)/figures/",
        lambda m: f"]({m[1][3:]}figures/",
        markdown,
    )


def on_page_content(content: str, **_: Any) -> str:
    """Write each formula as MathML; roles of Sphinx are no words."""

    def formula(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]), display=display)

    return FORMULA.sub(formula, ROLE.sub("", content))
