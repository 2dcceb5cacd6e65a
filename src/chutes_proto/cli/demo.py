"""``chutes-proto demo``: a VM boots against a key server, and six that must not."""

from __future__ import annotations

import argparse

from chutes_proto.cli import console

NAME = "demo"


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "see a VM boot and receive its keys, end to end on this machine",
        """
        Start a key server (trio, mutual TLS on a loopback port, SQLite in a temporary directory) and boot a VM against
        it: nonce, TDX quote of a simulated platform, verification, root passphrase, the passphrases of two volumes.
        With cryptsetup, real LUKS2 images are formatted, and opened again after a reboot. Then show what is refused,
        with the reason as the operator reads it. Needs no network and leaves nothing behind.

        exit code: 0 everything went as it should; 1 something did not
        """,
        "chutes-proto demo\nchutes-proto demo --plain",
    )
    console.add(parser, "--plain", action="store_true", help="no colour, and only ASCII characters")
    return parser


def run(options: argparse.Namespace) -> int:
    import tempfile
    from pathlib import Path

    import trio

    from chutes_proto.cli.page import Page, make_console
    from chutes_proto.cli.show import show

    with tempfile.TemporaryDirectory(prefix="chutes-proto-demo-") as directory:
        page = Page(make_console(plain=options.plain), plain=options.plain)
        return console.GRANTED if trio.run(show, Path(directory), page) else console.REFUSED
