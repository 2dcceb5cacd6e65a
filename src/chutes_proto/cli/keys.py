"""``chutes-proto keys``: the life of the keys, where an operator has a say in it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, cast

from chutes_proto.cli import console, operating

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

    from chutes_proto.keys.vault import FreshKey
    from chutes_proto.quote._roots import TrustedRoot
    from chutes_proto.store.rows import GenerationRow, Platform

NAME = "keys"
BATCH = 200
_LINE_BYTES = 256 * 1024  # a boot quote, the largest part, takes less than a tenth


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "history, restore, purge, rewrap, import of keys",
        """
        A server deletes no key by itself; old generations stay until an operator purges them. No command shows a
        passphrase, or takes one on the command line. Every change is kept in the audit rows.

        exit code: 0 done; 1 not possible as asked, and nothing was changed; 2 usage, or a file that cannot be read
        """,
        "chutes-proto keys history vm-1 --config /etc/chutes/server.toml\n"
        "chutes-proto keys restore vm-1 storage 3 --reason 'rekeyed, but not formatted' --config server.toml",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    history = console.command(
        actions,
        "history",
        "show all generations of a VM's keys",
        "Show each generation: its state, when and by what it was made, handed out and retired, and why.",
        "chutes-proto keys history 5Grw.../vm-1 --config /etc/chutes/server.toml --json",
    )
    restore = console.command(
        actions,
        "restore",
        "make an old generation the active one again",
        """
        Make a generation the active one, as after a rekey of a disk that was then not formatted. What is active now is
        retired. Do it while the VM is off: what it was handed before no longer holds.
        """,
        "chutes-proto keys restore vm-1 storage 3 --config /etc/chutes/server.toml",
    )
    purge = console.command(
        actions,
        "purge",
        "delete passphrases whose retention is over, for ever",
        """
        Delete the passphrases that were retired at least retention_days ago, as the configuration says. Kept are each
        volume's three newest generations and whatever a VM may yet be handed. It goes VM by VM, and can be stopped and
        begun again. Without --yes nothing is deleted: what would be is shown.
        """,
        "chutes-proto keys purge --config /etc/chutes/server.toml\n"
        "chutes-proto keys purge vm-1 --older-than 365 --yes --config /etc/chutes/server.toml",
    )
    rewrap = console.command(
        actions,
        "rewrap",
        "wrap all keys under the current key-encryption key",
        """
        Wrap every key under kek_file that is still under kek_previous_file, some at a time, while servers go on. It may
        be stopped and begun again. When it says that no key is under another one, and 600 s later, kek_previous_file
        can be removed from the configuration of all servers.
        """,
        "chutes-proto keys rewrap --config /etc/chutes/server.toml",
    )
    allow = console.command(
        actions,
        "allow-format",
        "permit one format of a volume that is in use",
        "Permit one format: the next answer to the VM does not say that the volume is in use.",
        "chutes-proto keys allow-format vm-1 storage --config /etc/chutes/server.toml",
    )
    fernet = console.command(
        actions,
        "import-fernet",
        "import the keys of the reference system",
        """
        Import rows of the reference system's table vm_cache_configs: a file of JSON objects, one a line, each with
        miner_hotkey, vm_name and volume_passphrases (volume: Fernet token), and, where there is one, boot_quote: the
        VM's last verified boot quote in base64, whose platform the name is then bound to. The passphrases are sealed
        anew. The Fernet key comes from a file that only you can read. It may be stopped and begun again.
        """,
        'psql --tuples-only --no-align -c "SELECT row_to_json(t) FROM vm_cache_configs t" > rows.jsonl\n'
        "chutes-proto keys import-fernet rows.jsonl --fernet-key-file fernet.key --config /etc/chutes/server.toml",
    )
    for action in (history, restore, allow):
        operating.add_vm(action)
    operating.add_vm(purge, optional=True)
    for action in (restore, allow):
        console.add(action, "volume", metavar="VOLUME", help="the volume's name")
    console.add(
        restore, "generation", metavar="GENERATION", type=operating.generation, help="its number, as `history` shows it"
    )
    console.add(
        purge,
        "--older-than",
        metavar="DAYS",
        type=operating.count,
        help="retired so long ago; retention_days of the configuration (90 by default) or more",
    )
    console.add(purge, "--yes", action="store_true", help="delete them")
    console.add(fernet, "file", metavar="FILE", help="the rows, one JSON object a line")
    console.add(fernet, "--fernet-key-file", metavar="FILE", required=True, help="44 characters of urlsafe base64")
    for action in (restore, purge, rewrap, allow, fernet):
        operating.add_reason(action)
    for action in (history, restore, purge, rewrap, allow, fernet):
        operating.add_config(action)
    return parser


def run(options: argparse.Namespace) -> int:
    work = {
        "history": _history,
        "restore": _restore,
        "purge": _purge,
        "rewrap": _rewrap,
        "allow-format": _allow_format,
        "import-fernet": _import_fernet,
    }
    return operating.refusing(work[options.action], options)


def _history(options: argparse.Namespace) -> int:
    from chutes_proto.units.operator import History

    with operating.opened(options) as (_, store):
        vm = operating.find_vm(store, options.vm)
        rows, volumes = store.transact(History(vm))
    if options.json:
        known = [{"volume": row.volume, "in_use": row.in_use, "format_allowed": row.format_allowed} for row in volumes]
        told = {"hotkey": vm.hotkey, "vm": vm.name, "generations": [_members(row) for row in rows], "volumes": known}
        console.say_json({"ok": True, **told})
        return console.GRANTED
    for row in rows:
        handed = f"handed out {operating.shown(row.delivered_at)}" if row.delivered_at else "never handed out"
        retired = f"retired {operating.shown(row.retired_at)} ({row.retirement})" if row.retired_at else ""
        state = f"{row.state}{', provisional' if row.provisional else ''}"
        made = f"made {operating.shown(row.created_at)} by {row.origin}"
        sealed = f"under {row.kek_id}" if row.kek_id else ""
        parts = (f"{row.volume}/{row.generation}", state, made, handed, retired, sealed)
        console.say("  ".join(part for part in parts if part))
    for volume in volumes:
        used = "in use" if volume.in_use else "not known to be in use"
        console.say(f"{volume.volume}: {used}{'; one format is permitted' if volume.format_allowed else ''}")
    return console.GRANTED


def _members(row: GenerationRow) -> dict[str, object]:
    names = "volume generation state provisional created_at origin delivered_at retired_at retirement kek_id"
    return operating.members(row, names)


def _restore(options: argparse.Namespace) -> int:
    from chutes_proto.units.operator import RestoreKey

    with operating.opened(options) as (_, store):
        vm = operating.find_vm(store, options.vm)
        unit = RestoreKey(operating.now(), vm, options.volume, options.generation, operating.reason(options))
        row = store.transact(unit)
    return operating.done(options, f"{row.volume}/{row.generation} of {vm.hotkey}/{vm.name} is the active key")


def _purge(options: argparse.Namespace) -> int:
    from chutes_proto.units.operator import FindNames, PurgeKeys

    count, named = 0, list[dict[str, object]]()
    with operating.opened(options) as (setup, store):
        vms = (operating.find_vm(store, options.vm),) if options.vm else store.transact(FindNames())
        days = operating.kept_days(options, "retention_days", setup.config.retention_days, "retired keys")
        now, reason = operating.now(), operating.reason(options)
        for vm in vms:
            for row in store.transact(PurgeKeys(now, days * operating.DAY, reason, vm, options.yes)):
                count += 1
                if options.json:
                    named.append({"hotkey": vm.hotkey, "vm": vm.name, **_members(row)})
                else:
                    retired = operating.shown(row.retired_at)
                    console.say(f"{vm.hotkey}/{vm.name}  {row.volume}/{row.generation}  {retired}")
    if options.json:
        console.say_json({"ok": True, "purged": options.yes, "older_than_days": days, "generations": named})
        return console.GRANTED
    if not count:
        console.say(f"nothing to purge: no passphrase that may go was retired {days} days ago or earlier")
    elif options.yes:
        console.say(f"{count} passphrases deleted that were retired {days} days ago or earlier")
    else:
        console.say(f"{count} passphrases were retired {days} days ago or earlier; with --yes they are deleted")
    return console.GRANTED


def _rewrap(options: argparse.Namespace) -> int:
    import os

    from chutes_proto.keys.vault import NONCE_SIZE, Address
    from chutes_proto.units.operator import RewrapKeys

    done = 0
    broken = frozenset[Address]()
    with operating.opened(options) as (setup, store):
        vault = setup.service.vault
        while True:
            entropy = os.urandom(NONCE_SIZE * BATCH)
            step = store.transact(RewrapKeys(operating.now(), entropy, vault, operating.reason(options), broken))
            broken |= frozenset(step.broken)
            if not step.count and not step.broken:
                break
            done += step.count
            left = sum(count for kek_id, count in step.sealed if kek_id != vault.current.kek_id)
            console.tell(f"{done} keys wrapped under {vault.current.kek_id}, {left} to do")
    told = sorted(f"{row.vm.hotkey}/{row.vm.name} {row.volume}/{row.generation}" for row in broken)
    for row in told:
        console.tell(f"chutes-proto: {row} does not open: its row was altered or is another's; it was left as it is")
    if options.json:
        members = {"rewrapped": done, "sealed_under": dict(step.sealed), "broken": told}
        console.say_json({"ok": not broken, **members})
        return console.REFUSED if broken else console.GRANTED
    if broken:
        console.say(f"{done} keys wrapped; {len(broken)} are under another key-encryption key still")
        return console.REFUSED
    console.say(f"{done} keys wrapped; no key is under another key-encryption key than {vault.current.kek_id}")
    if vault.previous is not None:
        old = vault.previous.kek_id
        console.say(f"keep kek_previous_file for 600 s yet, and until every server has {vault.current.kek_id} as its")
        console.say(f"kek_file: one that has not makes keys under {old}; `chutes-proto store check` shows them")
    return console.GRANTED


def _allow_format(options: argparse.Namespace) -> int:
    from chutes_proto.units.operator import AllowFormat

    with operating.opened(options) as (_, store):
        vm = operating.find_vm(store, options.vm)
        store.transact(AllowFormat(operating.now(), vm, options.volume, operating.reason(options)))
    return operating.done(options, f"{options.volume} of {vm.hotkey}/{vm.name} may be formatted once")


def _import_fernet(options: argparse.Namespace) -> int:
    from cryptography.fernet import Fernet

    from chutes_proto.errors import ConfigurationError, Refused
    from chutes_proto.io.files import read_lines, read_private
    from chutes_proto.store.rows import Vm
    from chutes_proto.units.operator import ImportKeys
    from chutes_proto.wire.json import JsonError, decode

    try:
        fernet = Fernet(read_private(options.fernet_key_file).strip())
    except ValueError:
        told = f"{options.fernet_key_file}: not a Fernet key, which is 44 characters of urlsafe base64"
        raise ConfigurationError(told) from None
    made = left = bound = 0
    refused: list[str] = []
    with operating.opened(options, new=True) as (setup, store):
        rows: list[tuple[Vm, dict[str, FreshKey], Platform | None]] = []
        for number, line in enumerate(read_lines(options.file, limit=_LINE_BYTES), 1):
            if not line.strip():
                continue
            try:
                rows.append(_row(decode(line), fernet, setup.service.root, setup.service.volumes))
            except (JsonError, ValueError) as exc:
                raise ConfigurationError(f"{options.file}, line {number}: {exc}; nothing was imported") from None
        if not rows:
            raise ConfigurationError(f"{options.file} holds no rows; nothing was imported")
        for vm, keys, platform in rows:
            unit = ImportKeys(operating.now(), vm, keys, platform, setup.service.vault, operating.reason(options))
            try:
                volumes = store.transact(unit)
            except Refused as exc:
                refused.append(str(exc.detail))
                continue
            made, left, bound = made + len(volumes), left + len(keys) - len(volumes), bound + (platform is not None)
            console.tell(f"{vm.hotkey}/{vm.name}: {', '.join(volumes) or 'all there already'}")
    for told in refused:
        console.tell(f"chutes-proto: {told}")
    if options.json:
        console.say_json({"ok": not refused, "imported": made, "there_already": left, "refused": refused})
    else:
        console.say(f"{made} keys imported, {left} there already; {bound} of {len(rows)} VMs came with a platform")
    return console.REFUSED if refused else console.GRANTED


def _row(
    content: Any, fernet: Fernet, root: TrustedRoot, served: tuple[str, ...]
) -> tuple[Any, dict[str, FreshKey], Platform | None]:
    """One VM of the reference system. Raises `ValueError`, whose text repeats no secret."""
    import os
    import re

    from cryptography.fernet import InvalidToken

    from chutes_proto.auth.hotkey import Hotkey, HotkeyError
    from chutes_proto.keys.vault import FreshKey
    from chutes_proto.secret import Secret
    from chutes_proto.store.rows import Vm
    from chutes_proto.wire.names import NAME_PATTERN, NAME_RULE

    if not isinstance(content, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - what a line holds is a value
    members = cast("dict[str, Any]", content)
    hotkey, name, tokens = (members.get(key) for key in ("miner_hotkey", "vm_name", "volume_passphrases"))
    if not isinstance(hotkey, str) or not isinstance(name, str) or not isinstance(tokens, dict):
        raise ValueError(  # noqa: TRY004
            "it takes the texts miner_hotkey and vm_name, and the object volume_passphrases"
        )
    if not re.fullmatch(NAME_PATTERN, name, re.ASCII):
        raise ValueError(f"vm_name {name[:200]!r}: no boot can be of this name; a VM's name is {NAME_RULE}")
    try:
        _ = Hotkey.parse(hotkey)
    except HotkeyError as exc:
        raise ValueError(f"miner_hotkey {hotkey[:200]!r} is no hotkey: {exc}") from None
    keys: dict[str, FreshKey] = {}
    for volume, token in cast("dict[str, object]", tokens).items():
        if volume not in served:
            raise ValueError(f"volume {volume[:200]!r} is not among the server's volumes: {', '.join(served)}")
        try:
            passphrase = fernet.decrypt(str(token).encode("ascii", "replace"))
        except InvalidToken:
            raise ValueError(f"the token of volume {volume!r} does not open under this Fernet key") from None
        if not passphrase or not passphrase.isascii() or not passphrase.decode("ascii").isprintable():
            raise ValueError(f"the passphrase of volume {volume!r} is not printable ASCII")
        keys[volume] = FreshKey.of_passphrase(Secret(passphrase), os.urandom(FreshKey.SIZE))
    return Vm(hotkey, name), keys, _platform(members.get("boot_quote"), root)


def _platform(quote: object, root: TrustedRoot) -> Platform | None:
    """The platform of a boot quote, whose PCK certificate must lead to the server's root."""
    import base64
    import binascii

    from chutes_proto.errors import QuoteError
    from chutes_proto.quote._verify import open_quote
    from chutes_proto.store.rows import Platform

    if quote is None:
        return None
    try:
        pck = open_quote(base64.b64decode(str(quote), validate=True), now=operating.now(), root=root).pck
    except (binascii.Error, QuoteError) as exc:
        raise ValueError(f"boot_quote: {exc}") from None
    return Platform(instance_id=pck.platform_instance_id, ppid=pck.ppid)
