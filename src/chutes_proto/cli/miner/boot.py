"""``chutes-proto boot``: the agent without disks, against a running server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

import click

from chutes_proto.auth.hotkey import Hotkey
from chutes_proto.boot._flows import BootGrant, BootSettings, KeyPair, Rotation, VolumeKeys, boot, receive_keys
from chutes_proto.cli import console, output
from chutes_proto.cli.base import answer, one_of, parsed
from chutes_proto.cli.describe import wrong_usage
from chutes_proto.cli.miner.asking import Peer, PeerCommand, new_identity, open_quoter, quoter_options, tell
from chutes_proto.io.files import make_directory, write_file
from chutes_proto.io.hotkey_file import read_hotkey
from chutes_proto.secret import Secret
from chutes_proto.wire.names import ROOT

_VOLUME = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,64}")
_NEXT: Final = ".next"
_ROOT_SECOND: Final = f"{ROOT}.second"
"""The files of --keys for a key that is to replace another (after its name), and for the root disk's third."""


class _BootCommand(PeerCommand):
    exits: Mapping[int, str] = {
        **PeerCommand.exits,
        0: "granted",
        2: wrong_usage("a file that cannot be read", "no answer", "no quote to send"),
    }
    wait: float = 30.0


def _volumes(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if wrong := [name for name in names if not _VOLUME.fullmatch(name) or name == ROOT]:
        raise ValueError(f"{wrong[0]!r} is not a volume's name; give for example storage,tdx-cache")
    return names


def _address(text: str) -> str:
    return Hotkey.parse(text).address


@click.command("boot", cls=_BootCommand)
@click.option("--hotkey", metavar="SS58", callback=parsed(_address), help="the hotkey that owns the VM")
@click.option("--hotkey-file", metavar="FILE", help="that hotkey as wallets write it, to prove it; permissions 0600")
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
    peer: Peer,
    hotkey: str | None,
    hotkey_file: str | None,
    vm: str,
    quoter: str,
    platform: str | None,
    volumes: tuple[str, ...],
    keys: str | None,
) -> int:
    """Boot against a running server, as a VM without disks.

    Does what a VM does when it boots: makes an ephemeral TLS key, gets a nonce, has the platform make a quote of both,
    sends it, and asks for the passphrases of the volumes. It shows none of them; with --keys it writes them into files
    that only you can read, for a program like `cryptsetup --key-file`.

    In the two-phase exchange each volume has two keys when a rotation is due; --keys writes the next one to a second
    file, NAME.next. Nothing is confirmed, because no disk was opened: the server keeps the keys as they are. In the
    provisioned exchange, which needs --hotkey-file, the root disk has two keys as well, and a third, root.second, if
    the last confirmation was lost.

    Examples:
      chutes-proto boot https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey --vm vm-1
      chutes-proto boot https://127.0.0.1:8443 --ca ca.pem --vm vm-1 \\
          --hotkey 5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY
      chutes-proto boot https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey --vm vm-1 \\
          --quoter 'my-quoter {report_data}' --keys keys

    See also: agent, serve, register
    """
    identity = new_identity()
    one_of(hotkey=hotkey, hotkey_file=hotkey_file)
    taken = {_ROOT_SECOND, *(name + _NEXT for name in (ROOT, *volumes))}
    if keys and (twice := sorted(taken.intersection(volumes))):
        raise click.UsageError(f"--keys: {twice[0]} is the file of another key, too, so --volumes cannot have it")
    pair = None if hotkey_file is None else read_hotkey(hotkey_file)
    address = str(hotkey) if pair is None else pair.hotkey.address
    signer = None if pair is None else pair.sign
    settings = BootSettings(address, vm, identity.spki_sha256, signer, peer.retry)
    at_boot, at_runtime = (open_quoter(quoter, platform, stage) for stage in ("boot", "runtime"))
    directory = make_directory(keys, mode=0o700) if keys else None
    with peer.connected(identity, tell) as performer:
        grant = performer(at_boot).run(boot(settings))
        later = performer(at_runtime if grant.boot_token is None else at_boot)
        result = later.run(receive_keys(settings, dict.fromkeys(volumes, False), grant=grant))
    grant = result[0] if isinstance(result, tuple) else result.grant
    later_exchange = "provisioned" if grant.is_provisioned else "two-phase"
    received, exchange = _keys(result), "base" if isinstance(result, tuple) else later_exchange
    if directory is not None:
        following = {name + _NEXT: key.next for name, key in received.items() if key.next}
        current = {name: key.passphrase for name, key in received.items()}
        for name, passphrase in {**_root_keys(grant), **current, **following}.items():
            write_file(directory / name, passphrase.reveal(), mode=0o600)
            console.tell(f"{name}: passphrase written to {directory / name}")
    said = {
        "granted": True,
        "hotkey": grant.miner_hotkey,
        "vm": grant.vm_name,
        "exchange": exchange,
        "root_passphrase_length": len(grant.root_passphrase),
        "volumes": {
            name: {"passphrase_length": len(key.passphrase), "in_use": key.is_in_use} for name, key in received.items()
        },
    }
    return answer(said, lambda: _say(grant, received, exchange))


def _root_keys(grant: BootGrant) -> dict[str, Secret]:
    keys = {ROOT: grant.root_passphrase}
    if grant.root is not None and grant.root.next != grant.root_passphrase:
        keys[ROOT + _NEXT] = grant.root.next
    if grant.root is not None and grant.root.second is not None:
        keys[_ROOT_SECOND] = grant.root.second
    return keys


class _Keys(NamedTuple):
    """The passphrase of a volume, which opens it or formats it, and its next one in the two-phase exchange."""

    passphrase: Secret
    next: Secret | None
    is_in_use: bool


def _keys(result: tuple[BootGrant, VolumeKeys] | Rotation) -> dict[str, _Keys]:
    if isinstance(result, tuple):
        return {key.volume: _Keys(key.passphrase, None, key.is_in_use) for key in result[1]}
    return {
        name: _Keys(pair.current or pair.next, _replacement(pair), pair.is_in_use) for name, pair in result.keys.items()
    }


def _replacement(pair: KeyPair) -> Secret | None:
    """The key that is to replace the current one, if a rotation is due."""
    return None if pair.current in (None, pair.next) else pair.next


def _say(grant: BootGrant, keys: Mapping[str, _Keys], exchange: str) -> None:
    console.say(f"granted: {grant.vm_name} of {grant.miner_hotkey}")
    console.say(f"root passphrase received, {len(grant.root_passphrase)} characters")
    for name, key in keys.items():
        used = "in use: do not format a blank disk" if key.is_in_use else "not known to be in use"
        also = ", and the next one" if key.next else ""
        console.say(f"{name}: passphrase received, {len(key.passphrase)} characters{also}; {used}")
    if exchange != "base":
        output.prose(
            f"{exchange} exchange: nothing is confirmed, because no disk was opened; the keys stay as they are"
        )
