"""The tests in environments of the oldest and the newest versions that ``pyproject.toml`` names.

Run it as a program: ``python tests/versions.py run oldest newest``, as ``make test-versions`` does.
An environment is made at the first run, in ``.venv-versions``. A plain PyTorch from PyPI is a build
for CUDA, 5 GB with what it needs; where there is an environment with a PyTorch already, of whatever
build, it is kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Versions:
    """What an environment has.

    Attributes:
        python: its version.
        torch: that of PyTorch.
        optree: that of optree.
    """

    python: str
    torch: str
    optree: str


ENVIRONMENTS = {
    "oldest": Versions("3.10", "2.7.0", "0.16.0"),
    "newest": Versions("3.13", "2.13.0", "0.20.0"),
}


def interpreter(version: str) -> str:
    """A Python of this version: on the path, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    every = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for found in every:
        # What pyenv puts on the path only works for versions that are switched on.
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return str(found)
    raise SystemExit(
        f"there is no Python {version}; install one, or put python{version} on the path"
    )


def environment(name: str) -> Path:
    """The Python of the environment, made if need be."""
    versions, folder = ENVIRONMENTS[name], ROOT / ".venv-versions" / name
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter(versions.python), "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*install, f"torch=={versions.torch}", f"optree=={versions.optree}",
         "-e", f"{ROOT}[test,examples,optuna]"],
        check=True,
    )  # fmt: skip
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["run", "torch"])
    parser.add_argument("names", nargs="+", choices=ENVIRONMENTS)
    options, pytest = parser.parse_known_args()
    if options.action == "torch":
        print(*(f"torch=={ENVIRONMENTS[name].torch}" for name in options.names))
        return
    failed = []
    for name in options.names:
        versions = ENVIRONMENTS[name]
        print(f"--- {name}: Python {versions.python}, PyTorch {versions.torch}", flush=True)
        command = [environment(name), "-m", "pytest", "-n", "auto", "-m", "not long", *pytest]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"the tests failed with the {' and the '.join(failed)} versions")


if __name__ == "__main__":
    sys.exit(main())
