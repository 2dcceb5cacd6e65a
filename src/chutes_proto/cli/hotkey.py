"""``chutes-proto hotkey``: look at an address, check a signature."""

from __future__ import annotations

import argparse

from chutes_proto.cli import console

NAME = "hotkey"


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "look at a hotkey's address, check a signature",
        "Commands for hotkeys: SS58 addresses of sr25519 keys, network prefix 42.",
        """
        chutes-proto hotkey inspect 5Grw...
        chutes-proto hotkey check 5Grw... --message '5Grw...:1767225600:tee' --signature cc12...
        """,
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    inspect = console.command(
        actions,
        "inspect",
        "the public key of an address, or why it is none",
        "exit code: 0 it is a hotkey's address as a server takes it; 1 it is not",
        "chutes-proto hotkey inspect 5Grw...",
    )
    check = console.command(
        actions,
        "check",
        "whether a signature over a message is a hotkey's",
        "exit code: 0 it is; 1 it is not; 2 usage, or a file that cannot be read",
        """
        chutes-proto hotkey check 5Grw... --message '5Grw...:1767225600:tee' --signature cc12...
        chutes-proto hotkey check 5Grw... --message-file message.bin --signature cc12...
        """,
    )
    for action in (inspect, check):
        console.add(action, "address", metavar="SS58", help="the address")
        console.add_json(action)
    message = check.add_mutually_exclusive_group(required=True)
    _ = message.add_argument("--message", metavar="TEXT", help="what was signed")
    _ = message.add_argument("--message-file", metavar="FILE", help="a file of what was signed")
    console.add(check, "--signature", metavar="HEX", required=True, help="the signature, 128 hex digits without 0x")
    return parser


def run(options: argparse.Namespace) -> int:
    from chutes_proto.auth.hotkey import PREFIX, Hotkey, HotkeyError
    from chutes_proto.auth.signing import check_signature
    from chutes_proto.errors import Refused

    try:
        hotkey = Hotkey.parse(options.address)
    except HotkeyError as exc:
        return _not(options, f"not a hotkey's address: {exc}")
    told: dict[str, object] = {"address": hotkey.address, "public_key": hotkey.public_key.hex(), "prefix": PREFIX}
    if options.action == "check":
        try:
            check_signature(hotkey, (_message(options),), options.signature)
        except Refused as exc:
            return _not(options, exc.reason)
        told = {"address": hotkey.address}
    if options.json:
        console.say_json({"valid": True, **told})
    elif options.action == "check":
        console.say(f"valid: the signature is {hotkey.address}'s over this message")
    else:
        console.say_table(("ADDRESS", "PUBLIC KEY", "PREFIX"), [[str(value) for value in told.values()]])
    return console.GRANTED


def _message(options: argparse.Namespace) -> bytes:
    from chutes_proto.io.files import read_file

    if options.message_file is not None:
        return read_file(options.message_file)
    text: str = options.message
    return text.encode("utf-8", "surrogateescape")


def _not(options: argparse.Namespace, why: str) -> int:
    if options.json:
        console.say_json({"valid": False, "reason": why})
    else:
        console.say(f"invalid: {why}")
    return console.REFUSED
