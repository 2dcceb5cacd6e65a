"""The quoter that a command is told to use: the simulated platform, or a program."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from chutes_proto.cli import console

if TYPE_CHECKING:
    from chutes_proto.blocking.quoting import Quoter
    from chutes_proto.quote.measurements import Stage


def add_quoter(parser: argparse.ArgumentParser) -> None:
    """The options that `open_quoter` reads."""
    console.add(
        parser,
        "--quoter",
        metavar="COMMAND",
        default="simulated",
        help="'simulated' (default), or a command that gets 64 bytes of report data in hex, on standard input and in"
        " place of {report_data}, and writes the quote to standard output; no shell runs",
    )
    console.add_platform(parser)


def open_quoter(options: argparse.Namespace, now: int, stage: Stage = "boot") -> Quoter:
    """The quoter; a simulated TD measures as it does at ``stage``."""
    import os
    from functools import partial

    from chutes_proto.blocking.platform import open_platform, platform_directory
    from chutes_proto.blocking.quoting import CommandQuoter

    if options.quoter != "simulated":
        return CommandQuoter(options.quoter)
    platform = open_platform(options.platform or platform_directory(os.environ), now).platform
    return partial(platform.quote, stage=stage)
