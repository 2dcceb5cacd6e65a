"""``chutes-proto keys``: the key lifecycle, as far as an operator decides it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from operator import attrgetter

import click
from cryptography.fernet import Fernet

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Group, answer, parsed
from chutes_proto.cli.operator import operating
from chutes_proto.cli.operator.operating import DAY, OperatorCommand
from chutes_proto.errors import ConfigurationError, Refused, RowNotAuthentic
from chutes_proto.io.files import read_lines, read_private
from chutes_proto.io.reference_keys import read_row
from chutes_proto.io.server.store_setup import check_keys, count_sealed
from chutes_proto.io.stores.pages import in_pages
from chutes_proto.io.stores.sealing import begin_epoch, end_epoch
from chutes_proto.keys.vault import NONCE_SIZE, Address, FreshKey, Vault
from chutes_proto.store._rows import (
    CountRetired,
    GenerationRow,
    Platform,
    Read,
    ReadAll,
    ReadRetired,
    Vm,
    VmRow,
    VolumeRow,
)
from chutes_proto.store._run import Ask, Store
from chutes_proto.units.operator import AllowFormat, History, ImportKeys, PurgeKeys, RestoreKey, RewrapKeys
from chutes_proto.wire.json import JsonError, decode
from chutes_proto.wire.names import NAME_PATTERN

BATCH = 50
"""VMs whose keys are purged in one transaction."""
_LINE_BYTES = 256 * 1024  # a boot quote, the largest part, takes less than a tenth
_STATES: dict[str, output.State] = {"active": "good", "purged": "bad"}
_COLUMNS: output.Columns = {
    "KEY": lambda row: f"{row['volume']}/{row['generation']}",
    "STATE": lambda row: output.Cell(
        f"{row['state']}{', provisional' if row['provisional'] else ''}", _STATES.get(row["state"], "")
    ),
    "ORIGIN": lambda row: output.short(row["origin"]),
    "MADE": lambda row: output.when(row["created_at"]),
    "HANDED OUT": lambda row: output.when(row["delivered_at"]) if row["delivered_at"] else "never",
    "RETIRED": lambda row: output.when(row["retired_at"], row["retirement"]),
    "KEK": lambda row: output.short(row["kek_id"]),
}
_PURGED: output.Columns = {
    "VM": lambda row: output.vm(row["hotkey"], row["vm"]),
    "KEY": lambda row: f"{row['volume']}/{row['generation']}",
    "RETIRED": lambda row: output.when(row["retired_at"]),
}

command: Group = Group(
    "keys",
    of=OperatorCommand,
    help="""Show, restore, purge, rewrap and import keys.

    A server never deletes a key; old generations stay until an operator purges them. No command shows a passphrase or
    takes one on the command line. Every change writes an audit row.

    Examples:
      chutes-proto keys history vm-1 --config server.toml
      chutes-proto keys restore vm-1 storage 1 --reason 'rekeyed, but not formatted' --config server.toml

    See also: vm, audit, store check
    """,
)


def _volume(text: str) -> str:
    if not re.fullmatch(NAME_PATTERN, text, re.ASCII):
        raise ValueError("a volume's name has letters, digits, _ . and - only; `keys history` shows them")
    return text


_volume_argument = click.argument(
    "volume", cls=Argument, metavar="VOLUME", callback=parsed(_volume), help="the volume's name"
)


def _generation(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,17}", text):
        raise ValueError("a generation is a number from 1 on, as `keys history` shows it")
    return int(text)


@command.command()
@operating.vm_argument()
@operating.shows
def history(vm: str, config: str) -> int:
    """Show all generations of a VM's keys.

    One row for each generation: its state, its origin, when it was made, handed out and retired and why, and the
    KEK that seals it. After the table, one line for each volume: whether it is in use.

    Examples:
      chutes-proto keys history vm-1 --config server.toml

    See also: keys restore, audit list
    """
    with operating.opened(config) as (_, store):
        named = operating.find_vm(store, vm)
        rows, volumes = store.transact(History(named))
    generations = [*map(_members, rows)]
    known = [operating.members(row, "volume in_use format_allowed") for row in volumes]

    def people() -> None:
        output.table(_COLUMNS, generations, empty="no keys")
        for volume in known:
            used = "in use" if volume["in_use"] else "not known to be in use"
            console.say(f"{volume['volume']}: {used}{'; one format is permitted' if volume['format_allowed'] else ''}")

    told = {"hotkey": named.hotkey, "vm": named.name, "generations": generations, "volumes": known}
    return answer({"ok": True, **told}, people)


def _members(row: GenerationRow) -> dict[str, object]:
    names = "volume generation state provisional created_at origin delivered_at retired_at retirement kek_id"
    return operating.members(row, names)


@command.command()
@operating.vm_argument()
@_volume_argument
@click.argument(
    "generation", cls=Argument, metavar="GENERATION", callback=parsed(_generation), help="its number in `keys history`"
)
@operating.changes
def restore(vm: str, volume: str, generation: int, reason: str, config: str) -> int:
    """Make an old generation the active one again.

    Use it after a rekey of a disk that was then not formatted. The generation that is active now is retired. Do it
    while the VM is off: keys that it has received before are void.

    Examples:
      chutes-proto keys restore vm-1 storage 1 --config server.toml
      chutes-proto keys restore vm-1 storage 1 --reason 'rekeyed, but not formatted' --config server.toml

    See also: keys history, keys allow-format
    """
    with operating.opened(config) as (_, store):
        named = operating.find_vm(store, vm)
        row = store.transact(RestoreKey(operating.now(), named, volume, generation, reason))
        operating.require_kept(store, ReadAll(GenerationRow, named), ReadAll(VolumeRow, named))
    return operating.done(f"{row.volume}/{row.generation} of {named.hotkey}/{named.name} is the active key")


@command.command()
@operating.vm_argument(optional=True)
@operating.purges("retention_days", 90, "retired")
@operating.reason_option
@operating.shows
def purge(vm: str | None, older_than: int | None, yes: bool, reason: str, config: str) -> int:
    """Delete passphrases whose retention has ended, for ever.

    Deletes the passphrases that were retired at least retention_days ago, as the configuration says. Each volume's
    three newest generations stay, and so does every key that a VM may still receive. The purge goes VM by VM, and may
    be stopped and begun again. Without --yes nothing is deleted, only shown.

    Examples:
      chutes-proto keys purge --config server.toml
      chutes-proto keys purge vm-1 --older-than 365 --yes --config server.toml

    See also: keys history, audit purge
    """
    with operating.opened(config, in_steps=yes) as (setup, store), output.progress("VMs") as tell:
        days = operating.kept_days(older_than, "retention_days", setup.config.retention_days, "retired keys")
        began = operating.now()
        until = began - days * DAY
        vms = operating.listing(store, lambda after: ReadRetired(until, after, operating.PAGE))
        if vm:
            vms = iter((operating.find_vm(store, vm),))
        found = 0

        def purged() -> Iterator[GenerationRow]:
            nonlocal found
            done, total = 0, 1 if vm else store.transact(Ask(CountRetired(until)))
            while some := tuple(islice(vms, BATCH)):
                rows = store.transact(PurgeKeys(began, days * DAY, reason, some, yes))
                if yes:
                    again = PurgeKeys(began, days * DAY, reason, some)
                    operating.require_gone(store, GenerationRow.TABLE, again, {*rows}.intersection)
                found += len(rows)
                yield from rows
                done += len(some)
                tell(done, total)

        def people() -> None:
            if not found:
                console.say(f"no passphrase that may be deleted was retired {days} days ago or earlier")
            elif yes:
                console.say(f"{found} passphrases deleted that were retired {days} days ago or earlier")
            else:
                console.say(f"{found} passphrases were retired {days} days ago or earlier; with --yes they are deleted")

        members = ({"hotkey": row.vm.hotkey, "vm": row.vm.name, **_members(row)} for row in purged())
        told = {"purged": yes, "older_than_days": days}
        return operating.answer_rows("generations", members, _PURGED, "nothing to purge", before=told, after=people)


@command.command()
@operating.changes
def rewrap(reason: str, config: str) -> int:
    """Wrap all keys under the current key-encryption key (KEK).

    Wraps every key that is still under kek_previous_file under kek_file, up to a thousand at a time, and replaces the
    key of the MACs of the rows, so that who has the older KEK and a copy of the store from its time can make no
    row. Servers may run meanwhile, and it may be stopped and begun again: then it does only what is left. When it says
    that no key is under another KEK, wait 600 seconds, and then remove kek_previous_file from the configuration of all
    servers. A row that is not authentic is left as it is and named; the key of the MACs is replaced when none is left.

    Examples:
      chutes-proto keys rewrap --config server.toml
      chutes-proto keys rewrap --reason 'yearly rotation' --config server.toml

    See also: store check, serve
    """
    faults: tuple[RowNotAuthentic, ...] = ()
    with operating.opened(config, in_steps=True) as (setup, store):
        vault = setup.vault
        # A key under a third KEK would stop it half-way: no two KEKs would then open all that the store has.
        _ = check_keys(store, vault)
        with output.progress("keys wrapped") as tell:
            # Begun first, so that rows which are written below have the new MACs.
            is_begun = begin_epoch(store, vault, reason)
            wrapped, broken = _rewrapped(store, vault, reason, int(is_begun), tell)
        if is_begun:
            with output.progress("rows looked at") as tell:
                faults = end_epoch(store, reason, tell)
        sealed = count_sealed(store)
    left = _left(sealed, vault)
    told = sorted(f"{row.vm.hotkey}/{row.vm.name} {row.volume}/{row.generation}" for row in broken)
    for row in told:
        console.complain(
            f"{row}: it does not open, because its row was altered, set back or is another's; it is left unchanged"
        )
    for fault in faults:
        console.complain(f"{fault}; it is left unchanged, and the older key of the MACs counts until it is mended")
    lines = [f"{wrapped} keys wrapped; no key is under another KEK than {vault.current.kek_id}"]
    if left:
        lines = [f"{wrapped} keys wrapped; {left} are still under another KEK"]
    elif vault.previous is not None:
        lines += [
            f"keep kek_previous_file for 600 seconds, and until {vault.current.kek_id} is kek_file of every server:",
            f"any other server still makes keys under {vault.previous.kek_id}; `chutes-proto store check` shows them",
        ]
    return answer(
        {
            "ok": not left,
            "rewrapped": wrapped,
            "sealed_under": sealed,
            "broken": told,
            "not_authentic": [f"{fault.table} {fault.key}" for fault in faults],
        },
        "\n".join(lines),
        ok=not left,
    )


def _left(sealed: Mapping[str, int], vault: Vault) -> int:
    return sum(sealed.values()) - sealed.get(vault.current.kek_id, 0)


def _rewrapped(
    store: Store, vault: Vault, reason: str, kept: int, tell: Callable[[int, int], object]
) -> tuple[int, set[Address]]:
    """Wrap all keys under the current KEK but ``kept`` of the MACs; returns how many, and those that do not open."""
    wrapped = 0
    broken = set[Address]()

    def page(after: GenerationRow | None, limit: int) -> RewrapKeys:
        return RewrapKeys(operating.now(), os.urandom(NONCE_SIZE * limit), vault, reason, after)

    while True:
        left = _left(count_sealed(store), vault) - kept
        if left <= len(broken):
            return wrapped, broken
        begun = wrapped
        for step, _ in in_pages(store, page, attrgetter("last"), operating.PAGE, None):
            broken |= {*step.broken}
            wrapped += step.count
            _ = tell(wrapped, begun + left)


@command.command("allow-format")
@operating.vm_argument()
@_volume_argument
@operating.changes
def allow_format(vm: str, volume: str, reason: str, config: str) -> int:
    """Permit one format of a volume that is in use.

    The next answer to the VM does not say that the volume is in use, so that its agent formats a blank disk.

    Examples:
      chutes-proto keys allow-format vm-1 storage --config server.toml
      chutes-proto keys allow-format vm-1 storage --reason 'new disk' --config server.toml

    See also: keys history
    """
    with operating.opened(config) as (_, store):
        named = operating.find_vm(store, vm)
        store.transact(AllowFormat(operating.now(), named, volume, reason))
        operating.require_kept(store, ReadAll(VolumeRow, named))
    return operating.done(f"{volume} of {named.hotkey}/{named.name} may be formatted once")


@command.command("import-fernet")
@click.argument("file", cls=Argument, metavar="FILE", help="the rows, one JSON object a line")
@click.option(
    "--fernet-key-file",
    metavar="FILE",
    required=True,
    help="44 characters of urlsafe base64; only you may be able to read it",
)
@operating.changes
def import_fernet(file: str, fernet_key_file: str, reason: str, config: str) -> int:
    """Import the keys of the reference system.

    The file has rows of the reference system's table vm_cache_configs, one JSON object a line:

      psql -tAc "SELECT row_to_json(t) FROM vm_cache_configs t" > rows.jsonl

    Each has miner_hotkey, vm_name and volume_passphrases (volume: Fernet token), and perhaps boot_quote: the VM's last
    verified boot quote in base64, whose platform the name is then bound to. The passphrases are sealed again under the
    server's KEK. The import may be stopped and begun again.

    Examples:
      chutes-proto keys import-fernet rows.jsonl --fernet-key-file fernet.key --config server.toml

    See also: vm bind, keys history
    """
    try:
        fernet = Fernet(read_private(fernet_key_file).strip())
    except ValueError:
        told = f"{fernet_key_file}: not a Fernet key, which is 44 characters of urlsafe base64"
        raise ConfigurationError(told) from None
    made = left = bound = 0
    refused: list[str] = []
    with operating.opened(config, new=True, in_steps=True) as (setup, store), output.progress("VMs imported") as tell:
        rows: list[tuple[Vm, dict[str, FreshKey], Platform | None]] = []
        for number, line in enumerate(read_lines(file, limit=_LINE_BYTES), 1):
            if not line.strip():
                continue
            try:
                rows.append(read_row(decode(line), fernet, setup.root, setup.config.volumes))
            except (JsonError, ValueError) as exc:
                raise ConfigurationError(f"{file}, line {number}: {exc}; nothing was imported") from None
        if not rows:
            raise ConfigurationError(f"{file}: holds no rows; nothing was imported")
        for index, (vm, keys, platform) in enumerate(rows, 1):
            try:
                volumes = store.transact(ImportKeys(operating.now(), vm, keys, platform, setup.vault, reason))
            except Refused as exc:
                refused.append(str(exc.detail))
                continue
            operating.require_kept(store, Read(VmRow, vm), ReadAll(GenerationRow, vm), ReadAll(VolumeRow, vm))
            made, left, bound = made + len(volumes), left + len(keys) - len(volumes), bound + (platform is not None)
            tell(index, len(rows))
    for told in refused:
        console.complain(told)
    return answer(
        {"ok": not refused, "imported": made, "there_already": left, "refused": refused},
        f"{made} keys imported, {left} were there already; {bound} of {len(rows)} VMs came with a platform",
        ok=not refused,
    )
