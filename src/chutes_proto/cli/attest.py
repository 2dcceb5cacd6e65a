"""``chutes-proto attest``: a server proves at runtime what it is."""

from __future__ import annotations

import argparse

from chutes_proto.cli import console, quoter
from chutes_proto.cli.miner import asking as miner

NAME = "attest"


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "attest a registered server at runtime",
        f"""
        Get a nonce for the server, have the platform quote it with a throw-away client key, and hand the quote in. It
        shows that an approved TD on the server's platform holds that key, not that it is the TD that booted.
        {miner.EXIT_CODES}
        """,
        """
        chutes-proto attest https://keys.example:8443 n1 --hotkey-file h --quoter 'my-quoter {report_data}'
        """,
    )
    miner.add_miner(parser)
    console.add(parser, "id", metavar="ID", help="the server's id")
    quoter.add_quoter(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    from chutes_proto.errors import Refusal
    from chutes_proto.miner._flows import attest_server

    try:
        answer = miner.ask(
            options,
            lambda who, identity: attest_server(who, options.id, identity.spki_sha256),
            quoter=lambda: quoter.open_quoter(options, "runtime"),
        )
    except Refusal as exc:
        return console.refused(options, exc)
    if options.json:
        console.say_json({"granted": True, **console.plain(answer)})
    else:
        console.say(f"verified: {options.id} at {console.plain(answer)['verified_at']}, record {answer.attestation_id}")
    return console.GRANTED
