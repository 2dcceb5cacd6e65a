"""The commands and files of a page: the fences of its Markdown, with their titles and the heading above them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r'^( *)```(\w+)(?: title="([^"]+)")?\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)
_CONTINUED = re.compile(r"((?:.*\\\n)*.*)\n?((?:.*\n)*)")
"""A command, which a backslash at the end of a line continues, and the lines that it prints."""
_HEADING = re.compile(r"^#{1,6} (.+?)(?: \{#\w+\})?$", re.MULTILINE)


@frozen
class Fence:
    """One fence: its language, its title if it has one, the text in it, and the heading that it is under."""

    language: str
    title: str
    text: str
    heading: str


@frozen
class Step:
    """A command, and what it prints: None if the page does not say. A script of ``sh`` is one command."""

    command: str
    output: str | None


def fences(page: Path) -> Iterator[Fence]:
    """Every fence of a page, in order."""
    text = page.read_text("utf-8")
    for match in _FENCE.finditer(text):
        indent, language, title, body = match.groups()
        lines = (line.removeprefix(indent) for line in body.splitlines(keepends=True))
        above = _HEADING.findall(re.sub(r"^ *```.*?^ *```$", "", text[: match.start()], flags=re.MULTILINE | re.DOTALL))
        yield Fence(language, title or "", "".join(lines), above[-1] if above else "")


def steps(fence: Fence) -> Iterator[Step]:
    """The commands of a fence: of ``console`` with what each prints, of ``sh`` as a script."""
    if fence.language == "sh":
        yield Step(fence.text, None)
    elif fence.language == "console":
        for part in re.split(r"^\$ ", fence.text, flags=re.MULTILINE)[1:]:
            continued = _CONTINUED.match(part)
            assert continued is not None
            yield Step(continued[1], continued[2])


def command_lines(page: Path) -> Iterator[str]:
    """Every command line in the page's shell fences that begins with ``chutes-proto``."""
    for fence in fences(page):
        for step in steps(fence):
            for line in step.command.replace("\\\n", " ").splitlines():
                parts = re.split(r"&&|\|\||;|(?<!\$)\(|\|", re.sub(r"\s+# .*$", "", line))
                yield from (part.strip(" )") for part in parts if part.strip().startswith("chutes-proto "))
