"""The command ``chutes-proto``: which command, and what becomes of every way to end.

Rules kept here:

* exit code 0: done, granted, accepted; 1: refused; 2: usage, or a file that cannot be opened; a command's help says
  what else it means by them;
* an error is a readable line that says what to do, never a traceback; an interruption ends quietly;
* a command is imported where it is asked for, and the rooms by the command that needs them, so that each is quick.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from chutes_proto import __version__
from chutes_proto._error import ChutesError
from chutes_proto.cli import console

COMMANDS: Final = (
    "demo",
    "serve",
    "boot",
    "agent",
    "register",
    "servers",
    "attest",
    "status",
    "hotkey",
    "verify",
    "inspect",
    "profile",
    "replay",
    "collateral",
    "simulate",
    "keys",
    "vm",
    "registrations",
    "audit",
    "store",
    "openapi",
)
"""Each is a module beside this one, in the order of the help."""


def main(argv: Sequence[str] | None = None, *, commands: Sequence[str] = COMMANDS) -> int:
    """Run one of ``commands``; the result is the exit code of the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(sys.argv[1:] if argv is None else argv, commands)
        console.out("", end="")
    except OSError as exc:
        # What is still buffered for standard output would fail again when Python ends.
        _ = os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(exc, BrokenPipeError):  # who reads has seen enough
            return console.BROKEN_PIPE
        console.tell(f"chutes-proto: {exc}")
        return console.USAGE
    except KeyboardInterrupt:
        return console.INTERRUPTED
    except ChutesError as exc:
        console.tell(f"chutes-proto: {exc}")
        return console.USAGE
    return code


def _run(argv: Sequence[str], commands: Sequence[str]) -> int:
    try:
        options = _parser(argv, commands).parse_args(argv)
    except SystemExit as exc:  # argparse has said what there is to say
        return exc.code if isinstance(exc.code, int) else console.USAGE
    code: int = options.run(options)
    return code


def _parser(argv: Sequence[str], commands: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chutes-proto",
        description="A VM boots: it proves with a TDX quote what it is, and receives the passphrases of its disks.",
        epilog=f"`chutes-proto COMMAND --help` has examples. Start with: chutes-proto {commands[0]}",
        formatter_class=console.Help,
        allow_abbrev=False,
    )
    console.add(parser, "--version", action="version", version=f"chutes-proto {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in argv[:1] if argv and argv[0] in commands else commands:
        module = import_module(f"chutes_proto.cli.{name}")
        module.add(subparsers).set_defaults(run=module.run)
    return parser
