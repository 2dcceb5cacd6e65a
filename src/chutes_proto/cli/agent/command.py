"""The agent in the tree of commands. `chutes_proto.cli.main` runs it without click, as an initramfs does."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import CompletionItem

from chutes_proto.cli.agent import main, make_parser
from chutes_proto.cli.base import Command
from chutes_proto.cli.describe import Description


class _Agent(Command):
    """A command whose words another parser reads."""

    def descriptions(self, ctx: click.Context) -> list[Description]:
        del ctx
        return make_parser().descriptions()


def _complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    found = ((one.words.split()[-1], one.sentence) for one in make_parser().descriptions()[1:])
    return [CompletionItem(name, help=told) for name, told in found if name.startswith(incomplete)]


def _run(words: tuple[str, ...]) -> int:
    return main(words)


command: Final = _Agent(
    "agent",
    params=[click.Argument(["words"], nargs=-1, type=click.UNPROCESSED, shell_complete=_complete)],
    context_settings={"ignore_unknown_options": True},
    callback=_run,
    add_help_option=False,
)
