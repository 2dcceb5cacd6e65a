"""The description of a command: the one text that its help, its manual page and the site are made from."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import Final, NamedTuple

EXAMPLES: Final = "Examples:\n"
RELATED: Final = "See also:"
Pairs = tuple[tuple[str, str], ...]


def wrong_usage(*more: str) -> str:
    """The meaning of exit code 2, of which a part holds for every command that prints a result."""
    return f"{', '.join(('wrong usage', *more))}, or a result that cannot be written"


EXITS: Final = {0: "done", 1: "refused", 2: wrong_usage("a file that cannot be read")}
"""Exit codes of a command that says nothing else; it never uses another number for the same thing."""


def exits(done: str, refused: str = "", wrong: str = EXITS[2]) -> dict[int, str]:
    """The exit codes of a command in its own words, without 1 where it cannot refuse."""
    return {0: done, **({1: refused} if refused else {}), 2: wrong}


class Description(NamedTuple):
    """Everything that a reader is told about one command; ``commands`` are those of a group, by name."""

    words: str
    usage: str
    sentence: str
    paragraphs: tuple[str, ...] = ()
    arguments: Pairs = ()
    options: Pairs = ()
    commands: tuple[tuple[str, Pairs], ...] = ()
    examples: tuple[str, ...] = ()
    exits: Pairs = ()
    related: tuple[str, ...] = ()


def sentence_of(text: str) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(textwrap.dedent(text).strip().partition("\n\n")[0].split())


def paragraphs_of(text: str, *, described: bool = True) -> tuple[str, ...]:
    """All other paragraphs; without ``described`` neither the examples nor the related commands.

    One that has an indented line keeps its lines, and the indent.
    """
    lines = text.strip().splitlines()
    whole = "\n".join([lines[0].strip(), textwrap.dedent("\n".join(lines[1:]))]) if lines else ""
    rest = [part.strip("\n").rstrip() for part in whole.split("\n\n")[1:]]
    wanted = [part for part in rest if part.strip() and (described or not part.startswith((EXAMPLES, RELATED)))]
    return tuple(part if is_verbatim(part) else " ".join(part.split()) for part in wanted)


def examples_of(text: str) -> tuple[str, ...]:
    """The command lines of the paragraph ``Examples:``, of which one may go on after a backslash."""
    found = [part.removeprefix(EXAMPLES) for part in paragraphs_of(text) if part.startswith(EXAMPLES)]
    return tuple(line.strip() for part in found for line in re.sub(r" *\\\n *", " ", part).splitlines())


def related_of(text: str) -> tuple[str, ...]:
    """The commands of the paragraph ``See also:``."""
    found = [part.removeprefix(RELATED) for part in paragraphs_of(text) if part.startswith(RELATED)]
    return tuple(one.strip(" .") for part in found for one in part.split(","))


def is_verbatim(text: str) -> bool:
    """Whether a paragraph keeps its lines."""
    return text.startswith(" ") or "\n " in text


def as_help(told: Description, width: int) -> str:
    """The text of ``--help``, as wide as that where words fit; an example goes on after a backslash."""
    parts = [filled(f"Usage: {told.usage}", width, rest="  "), filled(told.sentence, width)]
    parts += [part if is_verbatim(part) else filled(part, width) for part in told.paragraphs]
    lists = [("Arguments", told.arguments), *told.commands, ("Options", told.options), ("Exit codes", told.exits)]
    parts += [f"{title}:\n{_pairs(pairs, width)}" for title, pairs in lists if pairs]
    if told.examples:
        parts.append("Examples:\n" + "\n".join(f"  {folded(one, width)}" for one in told.examples))
    if told.related:
        parts.append(filled("See also: " + ", ".join(f"`chutes-proto {words}`" for words in told.related), width))
    return "\n\n".join(parts)


def filled(text: str, width: int, first: str = "", rest: str = "") -> str:
    """``text`` in lines of at most ``width`` where words fit, the first and the later ones after an indent."""
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def folded(command: str, width: int) -> str:
    """A command line that a shell takes as it stands: one that is too wide goes on, at an option, after a backslash."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) + 5 > width:
            lines.append(part)
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n      ".join(lines)


def _pairs(pairs: Iterable[tuple[str, str]], width: int) -> str:
    """Names and their texts in two columns; a name that is too long has a line of its own."""
    found = [*pairs]
    column = min(max(len(name) for name, _ in found) + 4, 26)
    lines: list[str] = []
    for name, text in found:
        head = f"  {name}".ljust(column)
        if len(head) > column or head[-1] != " ":
            lines.append(head.rstrip())
            head = " " * column
        lines.append(filled(text, width, head, " " * column))
    return "\n".join(lines)
