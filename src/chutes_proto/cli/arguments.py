"""Commands that argparse reads: the agent, which runs where there is no click."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from chutes_proto import __version__
from chutes_proto.cli import console


def run_argparse(words: Sequence[str], commands: Sequence[str]) -> int:
    """Run one of ``commands`` that is written with argparse."""
    try:
        options = _parser(commands).parse_args(words)
    except SystemExit as exc:  # argparse has said what there is to say
        return exc.code if isinstance(exc.code, int) else console.USAGE
    code: int = options.run(options)
    return code


def _parser(commands: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chutes-proto",
        description="The boot agent of a confidential VM.",
        formatter_class=console.Help,
        allow_abbrev=False,
    )
    console.add(parser, "--version", action="version", version=f"chutes-proto {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in commands:
        module = import_module(f"chutes_proto.cli.{name}")
        module.add(subparsers).set_defaults(run=module.run)
    return parser
