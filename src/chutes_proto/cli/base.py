"""How a command for people is written: click, and one description that help, manual page and site are made from.

A command is a function with click's own decorators; ``cls=Command`` takes the rest of its description:

    @click.command("inspect", cls=Command)
    @click.argument("quote", cls=Argument, metavar="QUOTE", help="a file with the quote's bytes")
    @click.option("--at", metavar="TIME", callback=parsed(moment), help="the time to verify at (default: now)")
    @json_option
    def command(quote: str, at: int | None) -> int:
        \"\"\"Show the content of a quote without verifying it.

        More paragraphs of the help. One that has an indented line is printed as it stands.

        Examples:
          chutes-proto inspect quote.bin
          chutes-proto inspect quote.bin --json

        See also: verify
        \"\"\"

* The function returns the exit code. It lives in a module that `chutes_proto.cli.tree` names, as ``command``; there the
  first sentence of the docstring is repeated without its full stop, so that the top help imports no command.
* Several commands under one name: ``command = Group("vm", help=...)``, then ``@command.command("list")``, which makes a
  `Command`, or a command of the class ``of``. Every command that
  talks to the same kind of thing shares a subclass of `Command` whose ``invoke`` turns that thing's exceptions into an
  exit code, and whose ``exits`` says what the codes mean.
* A shell completes the names of files where a metavar is of those words that stand for one.
* Options: ``parsed(convert)`` makes a callback of a function that raises `ValueError` with a text for people.
  `json_option` and `full_option` are not passed to the function: ask `wants`, for example `wants("json")`; `answer`
  prints a result as JSON or for people. `table_options` is both.
* Examples are complete command lines; tests/cli/test_help.py runs each in a folder that has the files they name.
* Import what needs an extra inside the function, everything else at the top: a command's module is imported for its
  help. A missing extra needs no code: `chutes_proto.cli.main` names it.
* Output: `chutes_proto.cli.console` for lines, `chutes_proto.cli.output` for tables, times, digests, progress.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

import click
from click.types import StringParamType

from chutes_proto.cli import console
from chutes_proto.cli.describe import (
    EXITS,
    Description,
    Pairs,
    as_help,
    examples_of,
    paragraphs_of,
    related_of,
    sentence_of,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMPLETE = "_CHUTES_PROTO_COMPLETE"
"""The environment variable by which a shell asks for completions."""

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Decorator(Protocol):
    """Adds an option or an argument to a function or a command."""

    def __call__(self, function: F, /) -> F: ...


class _FileName(StringParamType):
    """A text that a shell completes as the name of a file or of a directory."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        del ctx, param
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type=self.kind)]


_FILES: Final = frozenset("DER EVIDENCE FILE GOOD LOG PATH PEM QUOTE RIM RUNTIME".split())
"""The words that stand for the name of a file in the usage of a command."""


def _file_name(param: click.Parameter) -> _FileName | None:
    """The type of a parameter that names a file or a directory, by the words that stand for its value."""
    words = {*re.findall("[A-Z]+", param.metavar or "")} if param.type is click.STRING else set[str]()
    return _FileName("file") if words & _FILES else _FileName("dir") if "DIR" in words else None


class Argument(click.Argument):
    """An argument with a help text."""

    def __init__(self, *args: Any, help: str, **kwargs: Any) -> None:  # noqa: A002 - as click's options have it
        super().__init__(*args, **kwargs)
        self.told = help


class Described(click.Command):
    """A command with a description."""

    exits: Mapping[int, str] = EXITS

    def __init__(self, *args: Any, exits: Mapping[int, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exits = exits or self.exits
        for param in self.params:
            param.type = _file_name(param) or param.type

    def describe(self, ctx: click.Context) -> Description:
        """The description, of the command as it is called in ``ctx``."""
        params = [one for one in self.get_params(ctx) if not getattr(one, "hidden", False)]
        text = self.help or ""
        return Description(
            words=ctx.command_path.partition(" ")[2],
            usage=" ".join([ctx.command_path, *self.collect_usage_pieces(ctx)]),
            sentence=sentence_of(text),
            paragraphs=paragraphs_of(text, described=False),
            arguments=tuple((one.make_metavar(ctx), one.told) for one in params if isinstance(one, Argument)),
            options=tuple(one.get_help_record(ctx) or ("", "") for one in params if isinstance(one, click.Option)),
            commands=self.sections(ctx),
            examples=examples_of(text),
            exits=tuple((str(code), meaning) for code, meaning in self.exits.items()),
            related=related_of(text),
        )

    def sections(self, ctx: click.Context) -> tuple[tuple[str, Pairs], ...]:
        """The commands of a group, under headings."""
        del ctx
        return ()

    def descriptions(self, ctx: click.Context) -> list[Description]:
        """This description, and those of all commands below it."""
        return [self.describe(ctx)]

    def get_help(self, ctx: click.Context) -> str:
        return as_help(self.describe(ctx), console.help_width())

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        del ctx
        return _HELP if self.add_help_option else None


class Command(Described):
    """A command that does something."""


class Group(Described, click.Group):
    """Commands under one name, each of class ``of``."""

    exits: Mapping[int, str] = {}
    command_class: type[click.Command] | None = Command

    def __init__(self, *args: Any, of: type[Command] = Command, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.command_class = of

    def sections(self, ctx: click.Context) -> tuple[tuple[str, Pairs], ...]:
        found = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        return (("Commands", tuple((name, one.get_short_help_str(200)) for name, one in found if one)),)

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return [*self.commands]  # as they are written, not by the alphabet

    def descriptions(self, ctx: click.Context) -> list[Description]:
        found = [self.describe(ctx)]
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if isinstance(command, Described):
                found += command.descriptions(click.Context(command, ctx, name))
        return found


def _show_help(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        console.out(ctx.get_help())
        ctx.exit()


_HELP = click.Option(
    ["--help"], is_flag=True, is_eager=True, expose_value=False, callback=_show_help, help="show this help"
)


# --- options ---


def wants(what: str) -> bool:
    """Whether the command line has the flag ``--what`` of those that are not passed to functions."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and bool(ctx.meta.get(f"chutes_proto.{what}"))


def _flag(what: str, told: str) -> Decorator:
    def keep(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[f"chutes_proto.{what}"] = value

    return click.option(f"--{what}", is_flag=True, expose_value=False, callback=keep, help=told)


json_option: Decorator = _flag("json", "print one JSON object instead of lines for people")
full_option: Decorator = _flag("full", "print digests, keys and names whole")


def table_options(function: F) -> F:
    """The options of a command that prints a table."""
    return json_option(full_option(function))


def parsed(convert: Callable[[str], T]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback that converts a value, or each of several; a `ValueError` says what is wrong with it."""

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            if isinstance(value, tuple):
                return tuple(convert(one) for one in cast("tuple[str, ...]", value))
            return convert(value) if isinstance(value, str) else value
        except ValueError as exc:
            raise click.BadParameter(str(exc), ctx, param) from None

    return callback


def at_option(told: str) -> Decorator:
    forms = "YYYY-MM-DD, YYYY-MM-DDThh:mm:ssZ or unix seconds"
    return click.option("--at", metavar="TIME", callback=parsed(console.moment), help=f"{told}: {forms} (default: now)")


platform_option: Decorator = click.option(
    "--platform",
    metavar="DIR",
    help="the directory of the simulated platform (default: $XDG_STATE_HOME/chutes-proto/platform, which is"
    " ~/.local/state/chutes-proto/platform where that is not set); made if missing",
)


def one_of(**named: object) -> None:
    """Raise `click.UsageError` unless exactly one of these options is given."""
    names = " or ".join(f"--{name.replace('_', '-')}" for name in named)
    given = [value for value in named.values() if value not in (None, False)]
    if len(given) != 1:
        raise click.UsageError(f"{'give' if not given else 'give only'} one of {names}")


# --- results ---


def answer(value: Mapping[str, object], people: Callable[[], object] | str, *, ok: bool = True) -> int:
    """Print the result: ``value`` with ``--json``, else lines, or what ``people`` prints. Returns the exit code."""
    if wants("json"):
        console.say_json(value)
    elif isinstance(people, str):
        for line in people.splitlines():
            console.say(line)
    else:
        _ = people()
    return console.GRANTED if ok else console.REFUSED
