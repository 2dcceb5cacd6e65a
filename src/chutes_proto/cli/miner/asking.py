"""What the commands of a miner share: whose servers, at which key server, and how a flow is run there."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from chutes_proto.cli import console, sending

if TYPE_CHECKING:
    from chutes_proto.auth.client_identity import ClientIdentity
    from chutes_proto.effects import Flow
    from chutes_proto.io.quoters.choose import Quoter
    from chutes_proto.log import Record
    from chutes_proto.miner._flows import Miner

T = TypeVar("T")

EXIT_CODES = """
        No answer, or one that says "not now", is waited for until the end of --wait.

        exit code: 0 done; 1 the server refused, or was not available; 2 usage, a file that cannot be read, or no answer
"""
"""The end of each one's help, indented as what comes before it."""


def add_miner(parser: argparse.ArgumentParser) -> None:
    """The options that `ask` reads."""
    console.add(parser, "url", metavar="URL", help="the server, https://host:port")
    console.add(
        parser,
        "--hotkey-file",
        metavar="FILE",
        required=True,
        help="the hotkey as wallets write it, JSON with secretSeed and ss58Address; only you may read it",
    )
    console.add(parser, "--ca", metavar="FILE", help="PEM certificates to trust (default: the system's)")
    console.add(
        parser,
        "--signatures",
        choices=("compatible", "request"),
        default="compatible",
        help="sign as deployed servers want it (default), or the whole request, so that a captured signature is good"
        " for nothing else",
    )
    sending.add_wait(parser, 10.0)
    console.add_json(parser)


def ask(
    options: argparse.Namespace,
    flow: Callable[[Miner, ClientIdentity], Flow[T]],
    *,
    quoter: Callable[[], Quoter] | None = None,
) -> T:
    """Run a flow against the server. Raises `Refusal`, and `ConfigurationError` where there is no answer."""
    import os
    import time

    from chutes_proto.auth.client_identity import ENTROPY_SIZE, make_client_identity
    from chutes_proto.errors import ConfigurationError, TransportError
    from chutes_proto.io.drivers.sync import Performer
    from chutes_proto.io.hotkey_file import read_hotkey
    from chutes_proto.io.http.https import HttpsSender
    from chutes_proto.io.http.tls import context_trusting
    from chutes_proto.miner._flows import Miner

    pair = read_hotkey(options.hotkey_file)
    now = int(time.time())
    identity = make_client_identity(now, os.urandom(ENTROPY_SIZE))
    miner = Miner(pair.hotkey.address, pair.sign, options.signatures, sending.retry_policy(options))
    context = context_trusting(options.ca, identity)
    with HttpsSender(context, options.url) as sender:
        send = sending.verified(sender, options.url)
        performer = Performer(send=send, quoter=None if quoter is None else quoter(), log=_tell)
        try:
            return performer.run(flow(miner, identity))
        except TransportError as exc:
            raise ConfigurationError(
                f"no answer from {options.url}: {exc}; is the server running there, and its CA in --ca?"
            ) from None


def _tell(record: Record) -> None:
    """Only what keeps one waiting."""
    if record.event == "request_delayed":
        sending.tell(record)
