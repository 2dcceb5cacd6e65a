"""``chutes-proto status``: what came of a server's newest runtime attestation."""

from __future__ import annotations

import argparse

from chutes_proto.cli import console
from chutes_proto.cli.miner import asking as miner

NAME = "status"


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "what came of a server's newest runtime attestation",
        f"""
        Tell the newest verdict on a runtime quote of the server, how old it is, and whether it still counts.
        {miner.EXIT_CODES}
        """,
        """
        chutes-proto status https://keys.example:8443 n1 --hotkey-file h
        chutes-proto status https://keys.example:8443 n1 --hotkey-file h --json
        """,
    )
    miner.add_miner(parser)
    console.add(parser, "id", metavar="ID", help="the server's id")
    return parser


def run(options: argparse.Namespace) -> int:
    from chutes_proto.errors import Refusal
    from chutes_proto.miner._flows import read_status

    try:
        answer = miner.ask(options, lambda who, _: read_status(who, options.id))
    except Refusal as exc:
        return console.refused(options, exc)
    if options.json:
        console.say_json({"granted": True, **console.plain(answer)})
        return console.GRANTED
    last = answer.last
    words = "never attested" if last is None else "verified" if last.error is None else "failed"
    if answer.age_seconds is not None:
        words += f" {answer.age_seconds} s ago, {'fresh' if answer.is_fresh else 'not fresh'}"
    console.say(f"{answer.server_id} ({answer.name}): {words}")
    if last is not None and last.error is not None:
        console.say(f"reason: {last.error}")
    return console.GRANTED
