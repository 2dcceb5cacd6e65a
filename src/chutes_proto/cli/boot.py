"""``chutes-proto boot``: the agent without disks, against a running server."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import field, frozen

from chutes_proto.cli import console, quoter, sending

if TYPE_CHECKING:
    from pathlib import Path

    from chutes_proto.boot._flows import BootGrant, Rotation, VolumeKeys
    from chutes_proto.secret import Secret

NAME = "boot"
_VOLUME = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,64}")


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "boot against a running server, as a VM without disks",
        """
        Do what a VM does when it boots: make a throw-away client key, get a nonce, have the platform quote both, hand
        the quote in, and ask for the passphrases of the volumes. The passphrases are shown nowhere; with --keys they
        go into files that only you can read, for a program like `cryptsetup --key-file`.

        In the two-phase exchange each volume has two keys; with --keys the next one goes into a second file, NAME.next.
        Nothing is confirmed, because no disk was opened: the server keeps the keys as they are.

        No answer, or one that says "not now", is waited for until the end of --wait; a refusal ends it, and so does a
        server whose certificate does not verify.

        exit code: 0 granted; 1 the server answered, and refused or was still not available at the end of --wait;
        2 nothing was answered: wrong usage, no server there, a certificate that does not verify, or no quote to send
        """,
        """
        chutes-proto serve --dev                       # in another terminal; prints URL and CA file
        chutes-proto boot https://127.0.0.1:8443 --ca /tmp/.../ca.pem --hotkey 5Grw... --vm vm-1
        chutes-proto boot https://keys.example:8443 --hotkey 5Grw... --vm vm-1 --quoter 'my-quoter {report_data}'
        """,
    )
    console.add(parser, "url", metavar="URL", help="the server, https://host:port")
    console.add(parser, "--ca", metavar="FILE", help="PEM certificates to trust (default: the system's)")
    console.add(parser, "--hotkey", metavar="SS58", required=True, help="the hotkey that owns the VM")
    console.add(parser, "--vm", metavar="NAME", required=True, help="the VM's name")
    quoter.add_quoter(parser)
    console.add(
        parser,
        "--volumes",
        metavar="A,B",
        type=_volumes,
        default=("storage", "tdx-cache"),
        help="all volumes of the VM (default: storage,tdx-cache); the server retires the keys of others",
    )
    console.add(parser, "--keys", metavar="DIR", help="write the passphrases into this directory, made if missing")
    sending.add_wait(parser, 30.0)
    console.add_json(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    import os
    import time

    from chutes_proto.auth.client_identity import ENTROPY_SIZE, make_client_identity
    from chutes_proto.boot._flows import BootSettings, boot, receive_keys
    from chutes_proto.errors import ConfigurationError, Refusal, TransportError
    from chutes_proto.io.drivers.sync import Performer
    from chutes_proto.io.files import make_directory
    from chutes_proto.io.http.https import HttpsSender
    from chutes_proto.io.http.tls import context_trusting

    retry = sending.retry_policy(options)
    now = int(time.time())
    identity = make_client_identity(now, os.urandom(ENTROPY_SIZE))
    settings = BootSettings(options.hotkey, options.vm, identity.spki_sha256, retry=retry)
    quote, quote_again = quoter.open_quoter(options), quoter.open_quoter(options, stage="runtime")
    keys_directory = make_directory(options.keys, mode=0o700) if options.keys else None
    context = context_trusting(options.ca, identity)
    with HttpsSender(context, options.url) as sender:
        send = sending.verified(sender, options.url)
        performer = Performer(send=send, quoter=quote, log=sending.tell)
        try:
            grant = performer.run(boot(settings))
            if grant.boot_token is None:
                performer = Performer(send=send, quoter=quote_again, log=sending.tell)
            received = performer.run(receive_keys(settings, dict.fromkeys(options.volumes, False), grant=grant))
        except Refusal as exc:
            return console.refused(options, exc)
        except TransportError as exc:
            raise ConfigurationError(
                f"no answer from {options.url}: {exc}; is the server running there, and its CA in --ca?"
            ) from None
    handed = _handed(received)
    if keys_directory is not None:
        _write_keys(keys_directory, handed)
    return _granted(options, handed)


@frozen
class _Handed:
    """The passphrase of each volume, which opens it or formats it, and its next one in the two-phase exchange."""

    exchange: str
    grant: BootGrant
    passphrases: Mapping[str, Secret]
    in_use: frozenset[str]
    next: Mapping[str, Secret] = field(factory=dict[str, "Secret"])


def _handed(received: tuple[BootGrant, VolumeKeys] | Rotation) -> _Handed:
    if isinstance(received, tuple):
        grant, keys = received
        opening = {key.volume: key.passphrase for key in keys}
        return _Handed("base", grant, opening, frozenset(key.volume for key in keys if key.is_in_use))
    in_use = frozenset(name for name, pair in received.keys.items() if pair.is_in_use)
    opening = {name: pair.current or pair.next for name, pair in received.keys.items()}
    following = {name: pair.next for name, pair in received.keys.items() if pair.current is not None}
    return _Handed("two-phase", received.grant, opening, in_use, following)


def _granted(options: argparse.Namespace, handed: _Handed) -> int:
    grant = handed.grant
    volumes = {
        name: {"passphrase_length": len(passphrase), "in_use": name in handed.in_use}
        for name, passphrase in handed.passphrases.items()
    }
    if options.json:
        console.say_json(
            {
                "granted": True,
                "hotkey": grant.miner_hotkey,
                "vm": grant.vm_name,
                "exchange": handed.exchange,
                "root_passphrase_length": len(grant.root_passphrase),
                "volumes": volumes,
            }
        )
        return console.GRANTED
    console.say(f"granted: {grant.vm_name} of {grant.miner_hotkey}")
    console.say(f"root passphrase received, {len(grant.root_passphrase)} characters")
    for name, volume in volumes.items():
        used = "in use: do not format a blank disk" if volume["in_use"] else "not known to be in use"
        also = ", and the next one" if name in handed.next else ""
        console.say(f"{name}: passphrase received, {volume['passphrase_length']} characters{also}; {used}")
    if handed.exchange == "two-phase":
        console.say("two-phase exchange: nothing is confirmed, because no disk was opened; the keys stay as they are")
    return console.GRANTED


def _write_keys(directory: Path, handed: _Handed) -> None:
    from chutes_proto.io.files import write_file

    following = {f"{name}.next": passphrase for name, passphrase in handed.next.items()}
    for name, passphrase in {"root": handed.grant.root_passphrase, **handed.passphrases, **following}.items():
        write_file(directory / name, passphrase.reveal(), mode=0o600)
        console.tell(f"{name}: passphrase written to {directory / name}")


def _volumes(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if wrong := [name for name in names if not _VOLUME.fullmatch(name) or name == "root"]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not a volume's name; say for example storage,tdx-cache")
    return names
