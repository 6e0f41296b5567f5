"""The package as a newcomer meets it: the import, the README, the version."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import hypergrad as hg

ROOT = Path(__file__).parent.parent


def test_the_import_brings_nothing_heavy_beside_torch() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import hypergrad; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(out) - set(sys.stdlib_module_names) <= {"hypergrad", "optree", "typing_extensions"}
    dynamo = "import sys, hypergrad; print('torch._dynamo' in sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", dynamo], capture_output=True, text=True, check=True
    ).stdout
    assert loaded.strip() == "False"


def test_every_python_block_of_the_readme_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_the_version_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(hg.__version__)}\b", changelog, flags=re.MULTILINE)


def test_every_public_name_has_a_docstring() -> None:
    for name in hg.__all__:
        assert getattr(hg, name).__doc__, name
