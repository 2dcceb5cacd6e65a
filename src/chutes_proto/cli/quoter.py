"""The quoter that a command is told to use."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from chutes_proto.cli import console

if TYPE_CHECKING:
    from chutes_proto.io.quoters.choose import Quoter
    from chutes_proto.quote._measurements import Stage

HELP = (
    "where quotes come from: 'tsm' (the kernel's configfs-TSM), 'vsock' or 'vsock:CID:PORT' (the TDX guest device and"
    " the host's quote generation service), 'unix:PATH' (that service at a Unix socket), 'auto' (the first of tsm and"
    " vsock that gives one), 'simulated' (for trials), or a command that gets 64 bytes of report data in hex, on"
    " standard input and in place of {report_data}, and writes the quote to standard output or to the file {output};"
    " no shell runs"
)


def add_quoter(parser: argparse.ArgumentParser) -> None:
    """The options that `open_quoter` reads."""
    console.add(parser, "--quoter", metavar="QUOTER", default="simulated", help=f"{HELP} (default: simulated)")
    console.add_platform(parser)


def open_quoter(options: argparse.Namespace, stage: Stage = "boot") -> Quoter:
    """The quoter; a simulated TD measures as it does at ``stage``. Raises `ConfigurationError`."""
    from chutes_proto.io.quoters.choose import make_quoter

    return make_quoter(options.quoter, tell=console.tell, platform=options.platform, stage=stage)
