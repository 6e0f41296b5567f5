"""The package as a newcomer meets it: the import, the README, the version."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import versions

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


def test_the_versions_that_are_tested_are_those_that_are_declared() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest, newest = versions.ENVIRONMENTS["oldest"], versions.ENVIRONMENTS["newest"]
    assert f'requires-python = ">={oldest.python}"' in project
    for name, version in (("torch", oldest.torch), ("optree", oldest.optree)):
        (floor,) = re.findall(rf'"{name}>=([0-9.]+)"', project)
        assert version == f"{floor}.0"
    claimed = re.findall(r"Python :: (3\.\d+)", project)
    assert [claimed[0], claimed[-1]] == [oldest.python, newest.python]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"torch=={newest.torch}\n" in constraints


def test_the_citation_has_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {hg.__version__}\n" in citation


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("tqdm", "hg.bilevel.ProgressBar()", "progress"),
        ("tensorboard", "hg.bilevel.TensorBoard('runs')", "tensorboard"),
        ("pandas", "hg.bilevel.History().to_pandas()", "pandas"),
        ("matplotlib", "hg.plot(solver.run())", "plot"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_installs_it(
    module: str, call: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loops import ridge_solver

    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard.writer", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'hypergrad\[{extra}\]'"):
        eval(call, {"hg": hg, "solver": ridge_solver(outer_steps=1)})


def test_a_newcomer_finds_what_contributing_names() -> None:
    """Each row of its tables names files and folders that exist."""

    tables = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add a linear solver")[0]
    )
    rows = [line for line in tables.splitlines() if line.startswith("| ") and "`" in line]
    names = [name for row in rows for name in re.findall(r"`([a-z_]+/?[a-z_/]*(?:\.py|/))`", row)]
    assert len(names) >= 40
    missing = [name for name in names if not (ROOT / "src" / "hypergrad" / name).exists()]
    assert not missing


def test_no_name_of_a_package_hides_one_of_its_modules() -> None:
    """``import hypergrad.operators.hessian`` would give a function if there were such a module."""
    packages = [hg, *(getattr(hg, name) for name in ("bilevel", "linsolve", "operators"))]
    packages += [hg.optimizers, hg.single_loop, hg.distributed]
    for package in packages:
        for _, name, _ in pkgutil.iter_modules(package.__path__):
            found = getattr(package, name, None)
            assert found is None or isinstance(found, types.ModuleType), name
