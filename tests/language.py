"""Finds phrases that the project does not use in texts that people read; see CONTRIBUTING and the glossary.

As a program, ``python -m tests.language PATH...``, it prints each place; ``tests/test_language.py`` asserts that there
is none.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PHRASES: Final = (
    r"what becomes of",
    r"what is promised",
    r"three doors",
    r"of no use",
    r"at hand\b",
    r"anew\b",
    r"throw-?away",
    r"has it quoted",
    r"by turns",
    r"good for [0-9{]",
    r"lets others at",
    r"who can read the",
    r"whence|whither|wherein",
    r"knows every",
    r"not now\b",
    r"\bspent\b",
    r"its time has ended",
    r"whoever",
    r"that which",
    r"\bis to be (?:changed|judged)",
    r"\bhas? no say\b",
    r"without a word",
    r"\bis no (?!longer|more\b)[a-z]+",
    r"\b(?:shelf|keeper|patience|handover)\b",
)
"""Regular expressions, in any case: the left side of the glossary, without its ordinary words."""

_PHRASE = re.compile("|".join(PHRASES), re.IGNORECASE)
_OPENING = re.compile(r"(?:^|(?<=[.!:] )|(?<=\n\n))\s*(?:What|Who|Whoever|Where there is|That which)\b(?![^.]*\?)")
"""A sentence that begins with one of these, other than a question."""


def hits(text: str) -> Iterator[str]:
    """Every phrase of ``text`` that is not used here."""
    for pattern in (_PHRASE, _OPENING):
        for match in pattern.finditer(text):
            yield match.group().strip()


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of a file, each with its line: strings, docstrings and comments of Python, lines of everything else."""
    source = path.read_text("utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for number, line in enumerate(source.splitlines(), 1):
        before, mark, comment = line.partition("# ")
        if mark and before.count('"') % 2 == 0:
            yield number, comment


def files(paths: Iterator[Path] | list[Path]) -> Iterator[Path]:
    """Every file under ``paths`` whose texts people read."""
    for path in paths:
        below = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (one for one in below if one.suffix in {".py", ".md", ".toml", ".conf", ".service"})


def main(arguments: list[str]) -> int:
    found = 0
    for path in files([Path(argument) for argument in arguments]):
        for line, text in texts(path):
            for hit in hits(text):
                found += 1
                print(f"{path}:{line}: {hit}")
    print(f"{found} found", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
