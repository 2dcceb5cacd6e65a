"""``chutes-proto boot``: the agent without disks, against a running server."""

from __future__ import annotations

import re
from collections.abc import Mapping

import click
from attrs import field, frozen

from chutes_proto.boot._flows import BootGrant, BootSettings, Rotation, VolumeKeys, boot, receive_keys
from chutes_proto.cli import console
from chutes_proto.cli.base import answer, parsed
from chutes_proto.cli.miner.asking import Peer, PeerCommand, new_identity, open_quoter, quoter_options, tell
from chutes_proto.io.files import make_directory, write_file
from chutes_proto.secret import Secret

_AT = "https://127.0.0.1:8443 --ca ca.pem --hotkey 5Grw... --vm vm-1"
_VOLUME = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,64}")


class _BootCommand(PeerCommand):
    exits: Mapping[int, str] = {**PeerCommand.exits, 0: "granted", 2: "wrong usage, no answer, or no quote to send"}
    wait = 30.0


def _volumes(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if wrong := [name for name in names if not _VOLUME.fullmatch(name) or name == "root"]:
        raise ValueError(f"{wrong[0]!r} is not a volume's name; give for example storage,tdx-cache")
    return names


@click.command("boot", cls=_BootCommand)
@click.option("--hotkey", metavar="SS58", required=True, help="the hotkey that owns the VM")
@click.option("--vm", metavar="NAME", required=True, help="the VM's name")
@quoter_options
@click.option(
    "--volumes",
    metavar="A,B",
    default="storage,tdx-cache",
    show_default=True,
    callback=parsed(_volumes),
    help="all volumes of the VM; the server retires the keys of others",
)
@click.option("--keys", metavar="DIR", help="write the passphrases into this directory, made if missing")
@click.pass_obj
def command(
    peer: Peer, hotkey: str, vm: str, quoter: str, platform: str | None, volumes: tuple[str, ...], keys: str | None
) -> int:
    """Boot against a running server, as a VM without disks.

    Does what a VM does when it boots: makes an ephemeral TLS key, gets a nonce, has the platform make a quote of both,
    sends it, and asks for the passphrases of the volumes. It shows none of them; with --keys it writes them into files
    that only you can read, for a program like `cryptsetup --key-file`.

    In the two-phase exchange each volume has two keys; --keys writes the next one to a second file, NAME.next. Nothing
    is confirmed, because no disk was opened: the server keeps the keys as they are.

    Examples:
      chutes-proto boot https://127.0.0.1:8443 --ca ca.pem --hotkey 5Grw... --vm vm-1
      chutes-proto boot https://127.0.0.1:8443 --ca ca.pem --hotkey 5Grw... --vm vm-1 \\
          --quoter 'my-quoter {report_data}' --keys keys

    See also: agent, serve, register
    """
    identity = new_identity()
    settings = BootSettings(hotkey, vm, identity.spki_sha256, retry=peer.retry)
    at_boot, at_runtime = (open_quoter(quoter, platform, stage) for stage in ("boot", "runtime"))
    directory = make_directory(keys, mode=0o700) if keys else None
    with peer.connected(identity, tell) as performer:
        grant = performer(at_boot).run(boot(settings))
        later = performer(at_runtime if grant.boot_token is None else at_boot)
        received = _received(later.run(receive_keys(settings, dict.fromkeys(volumes, False), grant=grant)))
    if directory is not None:
        following = {f"{name}.next": passphrase for name, passphrase in received.next.items()}
        for name, passphrase in {"root": grant.root_passphrase, **received.passphrases, **following}.items():
            write_file(directory / name, passphrase.reveal(), mode=0o600)
            console.tell(f"{name}: passphrase written to {directory / name}")
    said = {
        "granted": True,
        "hotkey": grant.miner_hotkey,
        "vm": grant.vm_name,
        "exchange": received.exchange,
        "root_passphrase_length": len(grant.root_passphrase),
        "volumes": {
            name: {"passphrase_length": len(passphrase), "in_use": name in received.in_use}
            for name, passphrase in received.passphrases.items()
        },
    }
    answer(said, lambda: _say(received))
    return console.GRANTED


@frozen
class _Received:
    """The passphrase of each volume, which opens it or formats it, and its next one in the two-phase exchange."""

    exchange: str
    grant: BootGrant
    passphrases: Mapping[str, Secret]
    in_use: frozenset[str]
    next: Mapping[str, Secret] = field(factory=dict[str, Secret])


def _received(result: tuple[BootGrant, VolumeKeys] | Rotation) -> _Received:
    if isinstance(result, tuple):
        grant, keys = result
        opening = {key.volume: key.passphrase for key in keys}
        return _Received("base", grant, opening, frozenset(key.volume for key in keys if key.is_in_use))
    in_use = frozenset(name for name, pair in result.keys.items() if pair.is_in_use)
    opening = {name: pair.current or pair.next for name, pair in result.keys.items()}
    following = {name: pair.next for name, pair in result.keys.items() if pair.current is not None}
    return _Received("two-phase", result.grant, opening, in_use, following)


def _say(received: _Received) -> None:
    grant = received.grant
    console.say(f"granted: {grant.vm_name} of {grant.miner_hotkey}")
    console.say(f"root passphrase received, {len(grant.root_passphrase)} characters")
    for name, passphrase in received.passphrases.items():
        used = "in use: do not format a blank disk" if name in received.in_use else "not known to be in use"
        also = ", and the next one" if name in received.next else ""
        console.say(f"{name}: passphrase received, {len(passphrase)} characters{also}; {used}")
    if received.exchange == "two-phase":
        console.say("two-phase exchange: nothing is confirmed, because no disk was opened; the keys stay as they are")
