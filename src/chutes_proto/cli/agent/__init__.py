"""``chutes-proto agent``: the options of the boot agent, read by argparse; an initramfs has no click."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from chutes_proto import __version__
from chutes_proto.cli import console
from chutes_proto.cli.describe import Description, as_help, examples_of, paragraphs_of, related_of, sentence_of

_EXITS = {
    0: "done",
    1: "refused by a server (a last answer of 408, 429 or 5xx counts, also a proxy's), or by this agent because of the"
    " content of a disk",
    2: "wrong usage, a file that cannot be read, no answer, or no quote",
    130: "ended by SIGINT, once the current step on a disk is done",
    143: "ended by SIGTERM, likewise; 129 by SIGHUP, 131 by SIGQUIT",
}


def _formatter(prog: str) -> argparse.HelpFormatter:
    """A formatter that does not ask `shutil` for a width, which would import every compressor."""
    return argparse.HelpFormatter(prog, width=80)


class Parser(argparse.ArgumentParser):
    """A parser with a description like that of every other command, from which it prints its help."""

    def __init__(self, *, text: str, **kwargs: Any) -> None:
        self._options: list[argparse.Action] = []
        self._actions_by_name: dict[str, Parser] = {}
        self._text = text
        super().__init__(add_help=False, allow_abbrev=False, formatter_class=_formatter, **kwargs)
        _ = self.add_argument("--help", action="help", help="show this help")

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        """As `argparse` has it; the help lists it."""
        self._options.append(super().add_argument(*args, **kwargs))
        return self._options[-1]

    def add_actions(self, texts: Mapping[str, str]) -> Iterator[Parser]:
        """Add a parser for each word that must follow."""
        found = self.add_subparsers(metavar="ACTION", dest="action", required=True, parser_class=Parser)
        for name, text in texts.items():
            self._actions_by_name[name] = found.add_parser(name, text=text)
            yield self._actions_by_name[name]

    def describe(self) -> Description:
        """The description, with commands where a word must follow."""
        pairs = [
            (" ".join(filter(None, (one.option_strings[0], str(one.metavar or "")))), str(one.help))
            for one in self._options
        ]
        commands = tuple((name, one.describe().sentence) for name, one in self._actions_by_name.items())
        return Description(
            words=self.prog.partition(" ")[2],
            usage=f"{self.prog} {'ACTION ...' if commands else '[OPTIONS]'}",
            sentence=sentence_of(self._text),
            paragraphs=paragraphs_of(self._text, described=False),
            options=tuple(pairs),
            commands=(("Actions", commands),) if commands else (),
            examples=examples_of(self._text),
            exits=tuple((str(code), meaning) for code, meaning in _EXITS.items()),
            related=related_of(self._text),
        )

    def descriptions(self) -> list[Description]:
        """This description and those of all actions."""
        return [self.describe(), *(found for one in self._actions_by_name.values() for found in one.descriptions())]

    def format_help(self) -> str:
        """The help."""
        return as_help(self.describe(), console.help_width()) + "\n"

    def error(self, message: str) -> NoReturn:
        """End with the words of every other command."""
        console.complain(f"{message}; see {self.prog} --help")
        raise SystemExit(console.USAGE)


def make_parser() -> Parser:
    """The parser of everything after ``chutes-proto agent``."""
    parser = Parser(
        prog="chutes-proto agent",
        text="""Attest a VM at boot, open its disks and rotate their keys.

        A VM runs the boot agent when it boots, as its settings file says (examples/agent.toml has every key). The agent
        looks at the disks, has the platform quote an ephemeral TLS key, gets the passphrases from the first of its
        servers that answers, and opens the disks. It formats a disk only if the disk is blank and the server does not
        know that it holds data. After a failure it does what on_failure of the settings says, and then ends.

        Examples:
          chutes-proto agent run --config agent.toml --dry-run
          chutes-proto agent run --config agent.toml
          chutes-proto agent resume --config agent.toml

        See also: boot, serve, doctor
        """,
    )
    actions = {
        "run": """Boot: open the root disk and the volumes.

        With volumes_at = "resume" in the settings it opens the root disk only, and leaves a file in memory with which
        `agent resume` opens the volumes.

        Examples:
          chutes-proto agent run --config agent.toml --images --dry-run
          chutes-proto agent run --config agent.toml --images --json

        See also: agent resume
        """,
        "resume": """Go on after `run`: open the volumes.

        Opens the volumes that `agent run` left, within ten minutes and in the same boot of the machine. Removes the
        file that it left once they are open.

        Examples:
          chutes-proto agent resume --config agent.toml
          chutes-proto agent resume --config agent.toml --images --json

        See also: agent run
        """,
    }
    for action in parser.add_actions(actions):
        _ = action.add_argument("--config", metavar="FILE", required=True, help="the agent's settings, TOML")
        if action.prog.endswith("run"):
            told = "look at settings, config volume and disks, and say what would be done; ask no server, write nothing"
            _ = action.add_argument("--dry-run", action="store_true", help=told)
        told = "for trials: disks may be image files; keys are tried, nothing is mapped"
        _ = action.add_argument("--images", action="store_true", help=told)
        _ = action.add_argument(
            "--json", action="store_true", help="print JSON objects, one a line, not lines for people"
        )
    return parser


def main(words: Sequence[str]) -> int:
    """Run ``chutes-proto agent`` with more words; the result is the exit code."""
    try:
        options = make_parser().parse_args(words)
    except SystemExit as exc:  # argparse has said what there is to say
        return exc.code if isinstance(exc.code, int) else console.USAGE
    from chutes_proto.cli.agent.running import run

    return run(options)


def main_of_file(words: Sequence[str]) -> int:
    """Run the agent as one file, which has no other command than ``agent``."""
    if words[:1] == ["agent"]:
        return main(words[1:])
    if words == ["--version"]:
        console.say(f"chutes-proto {__version__}")
        return console.GRANTED
    told = "this file has one command: chutes-proto agent"
    if words[:1] in (["--help"], []):
        console.say(told)
        return console.GRANTED if words else console.USAGE
    console.complain(f"invalid choice: {words[0]!r}; {told}")
    return console.USAGE
