"""How long the gallery's examples are, beside the same thing written for a peer.

``python -m benchmarks.lines`` prints lines of code, as :func:`code_lines` counts them, and saves
them for the page of results: of ours what lies between the marks "your part", which is what a user
writes; of a peer's its own example for the same task, pictures left out, with the files beside it.
Betty's are counted in its source distribution, which this downloads from PyPI. Those of hypergrad
0.0.1 and TorchOpt are on no registry: their counts are of the files at the commits that are named.
"""

from __future__ import annotations

import ast
import io
import json
import tarfile
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"
RESULTS = EXAMPLES / "results" / "lines.json"
BETTY = (
    "https://files.pythonhosted.org/packages/6b/44/04f11d18f451b16b323a25403fd056bb8d0b621d2ea1332e44"
    "34749e81ee/betty_ml-0.2.1.tar.gz"
)
MOSKOMULE = "moskomule/hypergrad at 11283fe"


@dataclass(frozen=True)
class Peer:
    """An example of a peer: where it is, and its lines, if they cannot be counted here."""

    name: str
    files: tuple[str, ...]
    lines: int | None = None
    source: str = "betty-ml 0.2.1 on PyPI"

    @property
    def files_to_count(self) -> tuple[str, ...]:
        """Those that are not counted yet."""
        return self.files if self.lines is None else ()


WEIGHT_DECAY = (
    Peer("hypergrad 0.0.1", ("examples/logistic_regression.py",), 58, MOSKOMULE),
    Peer("Betty", ("examples/logistic_regression_hpo/logistic_regression_implicit.py",)),
)
REWEIGHTING = (
    Peer("Betty", tuple(f"examples/learning_to_reweight/{name}.py"
                        for name in ("main", "data", "model", "utils"))),
)  # fmt: skip
FEW_SHOT = (
    Peer("Betty", ("examples/implicit_maml/main.py",)),
    Peer("TorchOpt", ("examples/FuncTorch/maml_omniglot_vmap.py",), 88,
         "metaopt/torchopt at 05cc649, without its loader"),
)  # fmt: skip
PEERS: dict[str, tuple[Peer, ...]] = {
    "weight_decay": WEIGHT_DECAY,
    "decay_budget": WEIGHT_DECAY,
    "distillation": (
        Peer("hypergrad 0.0.1", ("examples/dataset_distillation.py",), 93, MOSKOMULE),
    ),
    "hyper_cleaning": REWEIGHTING,
    "long_tail": REWEIGHTING,
    "few_shot_sinusoid": (),
    "few_shot_images": FEW_SHOT,
    "learned_schedule": (),
    "tune_script": (),
    "sklearn_penalties": (),
    "equilibrium": (),
    "influence": (),
}


def code_lines(source: str) -> int:
    """Lines as ``ast.unparse`` writes them: a statement is one, however it was laid out.

    Docstrings, imports and statements that parse arguments do not count.
    """
    kept = Code().visit(ast.parse(source))
    return sum(line.strip() != "" for line in ast.unparse(kept).split("\n"))


class Code(ast.NodeTransformer):
    """What is left of a program without docstrings, imports and its parser of arguments."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Strip each block of statements."""
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block:
                left = [statement for statement in block if not _left_out(statement)]
                if name == "body" and not left and not isinstance(node, ast.Module):
                    left = [ast.Pass()]
                setattr(node, name, left)
        return node


def _left_out(node: ast.stmt) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    words = ("ArgumentParser(", ".add_argument(", ".parse_args(")
    simple = isinstance(node, (ast.Expr, ast.Assign))
    return simple and any(word in ast.unparse(node) for word in words)


def part(name: str) -> str:
    """What a user would write of an example of ours."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    begin = source.index("\n", source.index("# --- your part"))
    return source[begin : source.index("# --- the end of your part")]


def betty(files: Iterable[str]) -> dict[str, str]:
    """Files of Betty's source distribution."""
    with urllib.request.urlopen(BETTY) as answer:
        data = io.BytesIO(answer.read())
    with tarfile.open(fileobj=data) as archive:
        texts = {name: archive.extractfile(f"betty_ml-0.2.1/{name}") for name in files}
        return {name: file.read().decode() for name, file in texts.items() if file is not None}


def measure() -> list[dict[str, Any]]:
    """A row for each pair."""
    files = {file for peers in PEERS.values() for peer in peers for file in peer.files_to_count}
    texts = betty(sorted(files))
    rows = []
    for name, peers in PEERS.items():
        ours: dict[str, Any] = {"example": name, "your part, lines": code_lines(part(name))}
        for peer in peers:
            lines = peer.lines or sum(code_lines(texts[file]) for file in peer.files)
            where = {"peer": peer.name, "its files": ", ".join(peer.files), "its lines": lines}
            rows.append({**ours, **where, "source": peer.source})
        if not peers:
            rows.append({**ours, "peer": "none has this example"})
    return rows


def main() -> None:
    """Count, print and save."""
    rows = measure()
    for row in rows:
        print(f"{row['example']:<18} {row['your part, lines']:>4}   {row['peer']:<22} "
              f"{row.get('its lines', '—'):>4}")  # fmt: skip
    record = {"command": "python -m benchmarks.lines", "date": date.today().isoformat()}
    RESULTS.write_text(json.dumps({**record, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"\nresults: {RESULTS}")


if __name__ == "__main__":
    main()
