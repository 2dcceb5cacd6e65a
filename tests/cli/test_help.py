"""The help of every command: as wide as the terminal, its text in one column, with examples."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from chutes_proto.cli.main import COMMANDS
from tests.cli.conftest import Ended

Command = Callable[..., Ended]


def texts(command: Command, *words: str) -> dict[str, str]:
    """The help of a command and those of its actions."""
    ended = command(*words, "--help")
    assert ended.code == 0
    found = {" ".join(words): ended.out}
    actions = ended.out.partition("\n  ACTION\n")[2].partition("\n\n")[0]
    for action in re.findall(r"^    ([a-z-]+)", actions, re.MULTILINE):
        found |= texts(command, *words, action)
    return found


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_help(command: Command, name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words, text in texts(command, name).items():
        described, _, examples = text.partition("\nexamples:\n")
        assert f"chutes-proto {words}" in examples
        assert not [line for line in described.splitlines() if len(line) > columns]
        prose = re.split(r"\n(?:positional arguments|options):\n", described)[0].split("\n\n")[1:]
        assert not [line for line in "\n".join(prose).splitlines() if line.startswith(" ")], words
