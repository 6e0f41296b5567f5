"""The peers, each in a virtual environment of its own: what is installed into which, and why.

All environments get the PyTorch, NumPy and SciPy of ``constraints.txt`` first. A peer itself comes
with ``--no-deps``, so that none of its own pins can bring another PyTorch; what it imports besides
is in the table. hypergrad runs in the environment of the project, with the same constraints.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-peers"
CONSTRAINTS = ROOT / "constraints.txt"

OURS = "ours"
FLOOR = "floor"


@dataclass(frozen=True)
class Peer:
    """One library, pinned.

    Attributes:
        name: of its adapter, its environment and its option.
        title: in tables.
        requirement: as pip takes it; ``None`` is what the project's own environment has.
        needs: what it imports besides PyTorch and NumPy.
        why: how the installation differs from a plain one, and the reason.
        options: of pip, for the peer itself.
    """

    name: str
    title: str
    requirement: str | None
    needs: tuple[str, ...] = ()
    why: str = ""
    options: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        if self.requirement is None:
            return Path(sys.executable)
        return FOLDER / self.name / "bin" / "python"


PEERS = (
    Peer(OURS, "hypergrad (here)", None),
    Peer(
        FLOOR,
        "PyTorch, by hand",
        None,
        why="no library but a loop for this one problem, the least that any can cost; no peer",
    ),
    Peer(
        "v001",
        "hypergrad 0.0.1",
        "hypergrad==0.0.1",
        why="an environment of its own: it has our import name; torchvision is declared, unused",
    ),
    Peer(
        "betty",
        "Betty",
        "betty-ml==0.2.1",
        options=("--ignore-requires-python",),
        why="it declares Python < 3.11, and is installed all the same",
    ),
    Peer("torchopt", "TorchOpt", "torchopt==0.7.3", ("graphviz", "optree", "typing-extensions")),
    Peer("higher", "higher", "higher==0.2.1"),
    Peer(
        "boat",
        "BOAT",
        "boat-torch==1.1.1",
        ("higher==0.2.1", "matplotlib", "setuptools"),
        why="it pins NumPy ≤ 1.26.4; torchvision is declared, unused",
    ),
    Peer(
        "curvlinops",
        "curvlinops",
        "curvlinops-for-pytorch==3.0.1",
        (
            "backpack-for-pytorch>=1.6",
            "einconv>=0.1",
            "einops>=0.3",
            "linear_operator>=0.2",
            "opt-einsum>=3.4",
            "scipy",
            "tqdm",
        ),
    ),
)
"""In the order of the tables."""

BY_NAME = {peer.name: peer for peer in PEERS}


def ready(peer: Peer) -> bool:
    """Whether its environment is there, and as the table wants it."""
    if peer.requirement is None:
        return True
    stamp = FOLDER / peer.name / ".installed"
    return stamp.exists() and stamp.read_text(encoding="utf-8") == _fingerprint(peer)


def install(peer: Peer) -> str | None:
    """Make its environment if it is not there; the first line of pip's complaint where it fails."""
    if ready(peer) or peer.requirement is None:
        return None
    home = FOLDER / peer.name
    pip = [str(peer.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pinned = [*pip, "-c", str(CONSTRAINTS)]
    # PyTorch alone and first: its pin has a CPU build, a requirement of "torch" may mean CUDA.
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(home)],
        [*pinned, "torch"],
        [*pinned, "numpy", *peer.needs],
        [*pip, "--no-deps", *peer.options, peer.requirement],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return first_error(done.stderr) or f"{command[1]} failed"
    (home / ".installed").write_text(_fingerprint(peer), encoding="utf-8")
    return None


def first_error(text: str) -> str:
    """The line of pip's or Python's output that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines[-1:] or [""])[0]


def _fingerprint(peer: Peer) -> str:
    content = f"{peer}{CONSTRAINTS.read_text(encoding='utf-8')}{sys.version}"
    return hashlib.sha256(content.encode()).hexdigest()
