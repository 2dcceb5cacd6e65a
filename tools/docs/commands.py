"""The commands: a reference for the site, and whether a command line is one.

Both come from the tree of commands in `chutes_proto.cli.tree`, whose descriptions are also the text of ``--help``.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, Final

import click

from chutes_proto.cli import agent
from chutes_proto.cli.describe import Description
from chutes_proto.cli.tree import ROOT

NAME: Final = "chutes-proto"


def command_reference() -> str:
    """A section for each command, in the order of the help."""
    return "\n\n".join(map(_section, all_commands()))


def all_commands() -> list[Description]:
    """The description of every command."""
    return ROOT.descriptions(click.Context(ROOT, info_name=NAME))


def problem_of(words: Sequence[str]) -> str | None:
    """Return the parser's complaint about a command line, without the program's name; None if it accepts the line."""
    if words[:1] != ["agent"]:
        return _problem_of_click(words)
    output = io.StringIO()
    try:
        with redirect_stderr(output), redirect_stdout(output):
            _ = agent.make_parser().parse_args(words[1:])
    except SystemExit as exc:
        return output.getvalue() if exc.code else None
    return None


def _problem_of_click(words: Sequence[str]) -> str | None:
    command: Any = ROOT
    ctx: Any = None
    name: str | None = NAME
    rest = [*words]
    try:
        while True:
            ctx = command.make_context(name, rest, parent=ctx)
            if not isinstance(command, click.Group):
                return None
            name, command, rest = command.resolve_command(ctx, [*ctx._protected_args, *ctx.args])
    except click.exceptions.Exit:
        return None  # such as --version
    except click.ClickException as exc:
        return exc.format_message()


# --- pages ---


def _section(command: Description) -> str:
    anchor = command.words.replace(" ", "-") or NAME
    name = f"{NAME} {command.words}".strip()
    lines = [f"## `{name}` {{#{anchor}}}", _text(command.sentence), f"```text\n{command.usage}\n```"]
    lines += map(_text, command.paragraphs)
    lists = [("Argument", command.arguments), *command.commands]
    for title, pairs in [*lists, ("Option", command.options), ("Exit code", command.exits)]:
        rows = [f"| {_cell(name)} | {_escaped(' '.join(told.split()))} |" for name, told in pairs]
        if rows:
            lines.append("\n".join([f"| {title} | |", "|---|---|", *rows]))
    if command.examples:
        lines.append("```sh\n" + "\n".join(command.examples) + "\n```")
    return "\n\n".join(line for line in lines if line)


def _cell(name: str) -> str:
    return f"`{name}`".replace("|", "\\|")


def _text(text: str) -> str:
    """A paragraph of the help; one that has an indented line keeps its lines."""
    is_verbatim = text.startswith(" ") or "\n " in text
    return f"```text\n{textwrap.dedent(text)}\n```" if is_verbatim else _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    """Text of a terminal as Markdown; what stands in backquotes is code in both."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<>|*_\[\]])", r"\\\1", part) for part in parts)
