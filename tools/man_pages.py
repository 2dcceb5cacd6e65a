"""The manual pages of all commands, from the descriptions that ``--help`` prints: ``python -m tools.man_pages OUT``.

Each command has a page of section 1, ``chutes-proto-vm-list.1`` for `chutes-proto vm list`; `man chutes-proto vm list`
finds it too. Read one with ``man -l build/man/chutes-proto.1``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import click

from chutes_proto import __version__
from chutes_proto.cli.describe import Description, folded, is_verbatim
from chutes_proto.cli.tree import ROOT

_WIDTH = 70
_ESCAPES = str.maketrans({"\\": "\\e", "-": "\\-", "~": "\\(ti", "^": "\\(ha", "`": "\\(ga", "'": "\\(aq"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.man_pages", description="Write all manual pages.")
    _ = parser.add_argument("out", type=Path, help="the directory for them")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    pages = ROOT.descriptions(click.Context(ROOT, info_name="chutes-proto"))
    for told in pages:
        _ = (out / f"{name_of(told.words)}.1").write_text(page(told), "utf-8")
    print(f"{out}: {len(pages)} manual pages")


def name_of(words: str) -> str:
    """The name of a command's page."""
    return "-".join(["chutes-proto", *words.split()])


def page(told: Description) -> str:
    """One page, for man(7)."""
    return "\n".join(_lines(told)) + "\n"


def _lines(told: Description) -> Iterator[str]:
    name = name_of(told.words)
    yield f'.TH "{name.upper()}" 1 "" "chutes-proto {__version__}" "chutes-proto"'
    yield from (".nh", ".ad l", ".SH NAME", f"{_escaped(name)} \\- {_escaped(told.sentence.rstrip('.'))}")
    yield from (".SH SYNOPSIS", f".B {_escaped(told.usage)}")
    if told.paragraphs:
        yield ".SH DESCRIPTION"
    for text in told.paragraphs:
        yield from ([".PP", *_verbatim(text)] if is_verbatim(text) else [".PP", _escaped(text)])
    lists = [("Arguments", told.arguments), *told.commands, ("Options", told.options), ("Exit status", told.exits)]
    for title, pairs in lists:
        if pairs:
            yield f'.SH "{_escaped(title).upper()}"'
        for term, text in pairs:
            yield from (".TP", f".B {_escaped(term)}", _escaped(text))
    if told.examples:
        yield ".SH EXAMPLES"
    for example in told.examples:
        yield from (".PP", *_verbatim(folded(example, _WIDTH)))
    if told.related:
        yield ".SH SEE ALSO"
        yield ", ".join(f"\\fB{_escaped(name_of(words))}\\fR(1)" for words in told.related)


def _verbatim(text: str) -> Iterator[str]:
    yield from (".nf", *map(_escaped, text.splitlines()), ".fi")


def _escaped(text: str) -> str:
    """``text`` as characters of ASCII alone: a hyphen is one, and no line is a request."""
    escaped = "".join(one if one.isascii() else f"\\[u{ord(one):04X}]" for one in text.translate(_ESCAPES))
    return re.sub(r"^(?=\.)", r"\\&", escaped, flags=re.MULTILINE)


if __name__ == "__main__":
    main()
