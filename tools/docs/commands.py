"""The commands: a reference for the site, and whether a command line is one.

Both come from the tree of commands in ``chutes_proto.cli.tree``, whose descriptions are also the text of ``--help``;
without that module, from the parsers of argparse.
"""

from __future__ import annotations

import argparse
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from attrs import frozen

Pairs = tuple[tuple[str, str], ...]
NAME: Final = "chutes-proto"


@frozen
class Command:
    """Everything that a reader is told about one command; ``words`` follow the program's name."""

    words: str
    usage: str
    sentence: str
    paragraphs: tuple[str, ...] = ()
    lists: tuple[tuple[str, Pairs], ...] = ()
    examples: tuple[str, ...] = ()


def command_reference() -> str:
    """A section for each command."""
    return "\n\n".join(map(_section, all_commands()))


def all_commands() -> list[Command]:
    """Every command, in the order of the help."""
    if find_spec("chutes_proto.cli.tree") is None:
        main: Any = import_module("chutes_proto.cli.main")
        return [*_of_argparse("", main._parser((), main.COMMANDS), "")]
    import click

    root: Any = import_module("chutes_proto.cli.tree").ROOT
    return [*map(_of_description, root.descriptions(click.Context(root, info_name=NAME)))]


def problem_of(words: Sequence[str]) -> str | None:
    """What the parser says against a command line, without the program's name; None if it takes it."""
    told = io.StringIO()
    try:
        with redirect_stderr(told), redirect_stdout(told):
            if find_spec("chutes_proto.cli.tree") is None:
                main: Any = import_module("chutes_proto.cli.main")
                _ = main._parser(words, main.COMMANDS).parse_args(words)
            elif words[:1] == ["agent"]:
                agent: Any = import_module("chutes_proto.cli.agent")
                _ = agent.make_parser().parse_args(words[1:])
            else:
                return _problem_of_click(words)
    except SystemExit as exc:
        return told.getvalue() if exc.code else None
    return None


def _problem_of_click(words: Sequence[str]) -> str | None:
    import click

    command: Any = import_module("chutes_proto.cli.tree").ROOT
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


def _section(command: Command) -> str:
    anchor = command.words.replace(" ", "-") or NAME
    name = f"{NAME} {command.words}".strip()
    lines = [f"## `{name}` {{#{anchor}}}", _text(command.sentence), f"```text\n{command.usage}\n```"]
    lines += map(_text, command.paragraphs)
    for title, pairs in command.lists:
        rows = [f"| {_cell(name)} | {_escaped(' '.join(told.split()))} |" for name, told in pairs]
        if rows:
            lines.append("\n".join([f"| {title.lower()} | |", "|---|---|", *rows]))
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


# --- where they come from ---


def _of_description(told: Any) -> Command:
    lists = [("Argument", told.arguments), *told.commands, ("Option", told.options), ("Exit code", told.exits)]
    return Command(told.words, told.usage, told.sentence, told.paragraphs, tuple(lists), told.examples)


def _of_argparse(words: str, parser: argparse.ArgumentParser, summary: str) -> Iterator[Command]:
    options: list[tuple[str, str]] = []
    inner: argparse._SubParsersAction[argparse.ArgumentParser] | None = None
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            inner = action
        elif not isinstance(action, argparse._HelpAction) and action.help is not argparse.SUPPRESS:
            options.append((_names(action), (action.help or "") % {"default": action.default, "prog": NAME}))
    summaries = {choice.dest: choice.help or "" for choice in inner._choices_actions} if inner else {}
    yield Command(
        words,
        " ".join(parser.format_usage().removeprefix("usage: ").split()),
        summary,
        tuple(re.split(r"\n\s*\n", (parser.description or "").strip())),
        (("Command", tuple(summaries.items())), ("Argument", tuple(options))),
        tuple(textwrap.dedent((parser.epilog or "").removeprefix("examples:\n")).strip().splitlines()),
    )
    if inner is not None:
        for word, each in inner.choices.items():
            yield from _of_argparse(f"{words} {word}".strip(), each, summaries.get(word, ""))


def _names(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices is not None and not action.metavar:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    takes = "" if action.nargs == 0 else f" {value}"
    return ", ".join(f"{flag}{takes}" for flag in action.option_strings) or value
