"""The commands, from their parsers: a reference for the site, and whether a command line is one.

A command is a click command or, for ``agent``, which runs in an initramfs, an argparse parser. Both are read as they
are when the program runs.
"""

from __future__ import annotations

import argparse
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout

from attrs import frozen

from chutes_proto.cli import main as program


@frozen
class Option:
    """One argument of a command."""

    names: str
    help: str


@frozen
class Command:
    """One command with its whole name, such as ``chutes-proto keys history``."""

    name: str
    summary: str
    description: str
    options: tuple[Option, ...]
    examples: str


def command_reference() -> str:
    """A section for each command."""
    return "\n\n".join(map(_section, all_commands()))


def all_commands() -> Iterator[Command]:
    """Every command that does something, in the order of the help."""
    yield from _of_argparse("chutes-proto", program._parser((), program.COMMANDS), "")


def _section(command: Command) -> str:
    anchor = command.name.removeprefix("chutes-proto ").replace(" ", "-")
    lines = [f"## `{command.name}` {{#{anchor}}}", _markdown(command.description)]
    if command.options:
        rows = [f"| {option.names} | {_markdown(option.help)} |" for option in command.options]
        lines.append("\n".join(["| argument | |", "|---|---|", *rows]))
    if command.examples:
        lines.append(f"```text\n{command.examples}\n```")
    return "\n\n".join(lines)


def _of_argparse(name: str, parser: argparse.ArgumentParser, summary: str) -> Iterator[Command]:
    options: list[Option] = []
    inner: argparse._SubParsersAction[argparse.ArgumentParser] | None = None
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            inner = action
        elif not isinstance(action, argparse._HelpAction) and action.help is not argparse.SUPPRESS:
            options.append(Option(_names(action), (action.help or "") % {"default": action.default, "prog": name}))
    if inner is not None:
        summaries = {choice.dest: choice.help or "" for choice in inner._choices_actions}
        for word, each in inner.choices.items():
            yield from _of_argparse(f"{name} {word}", each, summaries.get(word, ""))
        return
    examples = textwrap.dedent((parser.epilog or "").removeprefix("examples:\n")).strip()
    yield Command(name, summary, parser.description or "", tuple(options), examples)


def _names(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices is not None and not action.metavar:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    takes = "" if action.nargs == 0 else f" {value}"
    if not action.option_strings:
        return f"`{value}`"
    return ", ".join(f"`{flag}{takes}`" for flag in action.option_strings)


def _markdown(text: str) -> str:
    """Help as Markdown: angle brackets and pipes mean themselves, paragraphs with indented lines keep their form."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(
        f"```text\n{textwrap.dedent(each)}\n```"
        if "\n " in each
        else re.sub(r"([<>|*_])", r"\\\1", " ".join(each.split()))
        for each in paragraphs
    )


def problem_of(words: Sequence[str]) -> str | None:
    """What the parser says against a command line, without the program's name; None if it takes it."""
    told = io.StringIO()
    try:
        with redirect_stderr(told), redirect_stdout(told):
            _ = program._parser(words, program.COMMANDS).parse_args(words)
    except SystemExit as exc:
        return told.getvalue() if exc.code else None
    return None


__all__ = ["Command", "Option", "all_commands", "command_reference", "problem_of"]
