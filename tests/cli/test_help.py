"""The help of every command: complete, as wide as the terminal, with examples that run."""

from __future__ import annotations

import click
import pytest

from chutes_proto.cli.base import Command, Described
from chutes_proto.cli.describe import as_help
from chutes_proto.cli.tree import COMMANDS, _Bridge, walk

WALK = [(ctx, command) for ctx, command in walk() if not isinstance(command, _Bridge)]


@pytest.mark.parametrize(("ctx", "command"), WALK, ids=lambda one: getattr(one, "command_path", ""))
def test_a_description_is_complete(ctx: click.Context, command: Described) -> None:
    told = command.describe(ctx)
    assert told.sentence.endswith(".")
    assert all(one.startswith("chutes-proto ") or " | chutes-proto " in one for one in told.examples)
    if isinstance(command, Command):
        assert len(told.examples) >= 2
        assert told.exits
    for words in told.related:
        named = ctx.find_root().command
        for word in words.split():
            if isinstance(named, _Bridge):
                break
            assert isinstance(named, click.Group)
            found = named.get_command(ctx, word)
            assert found is not None, words
            named = found
    for width in (78, 100):
        described = as_help(told, width).partition("\nExamples:\n")[0]
        assert not [line for line in described.splitlines() if len(line) > width]


def test_the_top_help_has_the_first_sentence_of_each_command() -> None:
    said = {
        ctx.command.name: command.describe(ctx).sentence
        for ctx, command in WALK
        if ctx.parent and not ctx.parent.parent
    }
    assert said == {name: f"{COMMANDS[str(name)][1]}." for name in said}
