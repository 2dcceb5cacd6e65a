"""``chutes-proto demo``: a VM boots against a key server, is registered with its GPUs, and attacks are refused."""

from __future__ import annotations

import click

from chutes_proto.cli import console
from chutes_proto.cli.base import Command
from chutes_proto.cli.describe import wrong_usage


@click.command("demo", cls=Command, exits={0: "everything went as it should", 1: "something did not", 2: wrong_usage()})
@click.option("--plain", is_flag=True, help="print no colour, and only ASCII characters")
def command(plain: bool) -> int:
    """Show a VM that boots and receives its keys, end to end on this machine.

    Starts a key server (trio, mutual TLS on a loopback port, SQLite in a temporary directory) and boots a VM against
    it: nonce, TDX quote of a simulated platform, verification, root passphrase, the passphrases of two volumes. With
    cryptsetup it formats real LUKS2 images, and opens them again after a reboot. Then its owner registers the machine
    and attests it with the evidence of eight simulated GPUs, which the server verifies. Last it shows what a server
    refuses, with the reason as the operator reads it. It needs no network and leaves nothing behind.

    Examples:
      chutes-proto demo
      chutes-proto demo --plain

    See also: serve, boot, simulate
    """
    import trio

    from chutes_proto.cli.page import Page, make_console
    from chutes_proto.io.demonstration import show
    from chutes_proto.io.server.development import folder_of_this_run

    with folder_of_this_run("chutes-proto-demo-") as directory:
        page = Page(make_console(plain=plain), plain=plain)
        return console.GRANTED if trio.run(show, directory, page) else console.REFUSED
