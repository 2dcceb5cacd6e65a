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

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return _complete(ctx, None, incomplete)


def _complete(ctx: click.Context, _: click.Parameter | None, incomplete: str) -> list[CompletionItem]:
    """The actions, or the options of the action that is given; the only value of an option is a file."""
    own, *actions = make_parser().descriptions()
    words: tuple[str, ...] = ctx.params.get("words") or ()
    if words[-1:] == ("--config",):
        return [CompletionItem(incomplete, type="file")]
    action = next((one for one in actions if one.words.split()[-1] in words), None)
    if incomplete.startswith("-"):
        found = [(name.split()[0], told) for name, told in (action or own).options]
    else:
        found = [] if action else [(one.words.split()[-1], one.sentence) for one in actions]
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
