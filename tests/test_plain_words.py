"""The language of docstrings, comments, messages and documents: no word of ``plain_words.txt``."""

import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
DOCUMENTS = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PROSE = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.COMMENT))


@functools.cache
def rules() -> tuple[re.Pattern[str], list[tuple[re.Pattern[str], str]]]:
    """One expression for all words, and each word with what to write in its place."""
    lines = (ROOT / "tests" / "plain_words.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" | ") for line in lines if not line.startswith("#")]
    spaced = [(words.replace(" ", r"\s+"), instead) for words, instead in pairs]
    every = re.compile(rf"\b({'|'.join(words for words, _ in spaced)})\b", re.IGNORECASE)
    return every, [(re.compile(words, re.IGNORECASE), instead) for words, instead in spaced]


def prose(path: Path) -> list[tuple[int, str]]:
    """The texts of a file with their lines: comments and strings of a program, else all of it."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [(1, text)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(token.start[0], token.string) for token in tokens if token.type in PROSE]


def found(path: Path) -> list[str]:
    every, each = rules()
    hits = []
    for line, text in prose(path):
        for match in every.finditer(text):
            place = f"{path}:{line + text[: match.start()].count(chr(10))}"
            instead = next(instead for words, instead in each if words.fullmatch(match[0]))
            hits.append(f"{place}: '{' '.join(match[0].split())}': write {instead}")
    return hits


@pytest.mark.parametrize("room", ["src", "docs"])
def test_every_sentence_uses_plain_words(room: str) -> None:
    paths = SOURCES if room == "src" else DOCUMENTS
    hits = [hit for path in paths for hit in found(path)]
    assert not hits, "\n".join(hits)


def test_words_are_found_in_docstrings_comments_and_messages_not_in_names(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        'beside = 1  # Made anew.\n"""For\never."""\nraise ValueError("likewise")\n',
        encoding="utf-8",
    )
    assert [hit.split(":")[1] for hit in found(program)] == ["1", "2", "4"]
