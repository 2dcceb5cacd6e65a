"""``chutes-proto vm``: which platform each VM's name is bound to."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import click
from attrs import evolve

from chutes_proto.auth.hotkey import Hotkey, HotkeyError
from chutes_proto.cli import console, output
from chutes_proto.cli.base import Group, answer, one_of
from chutes_proto.cli.operator import operating, revoking
from chutes_proto.cli.operator.operating import DAY, OperatorCommand
from chutes_proto.cli.output import Cell
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.server.store_setup import StoreSetup, erasures_file
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.io.stores.erasures import keep_erasures, scrub
from chutes_proto.quote._layout import parse_quote
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store._rows import (
    AttestationRow,
    BootRow,
    CountRows,
    FindLastBoot,
    FleetVm,
    GenerationRow,
    Platform,
    Read,
    ReadAll,
    ReadFleet,
    ReadLiveGenerations,
    ReadOld,
    ReadPage,
    ReadRevoked,
    ReadTimes,
    ReadUnclaimed,
    VmRow,
    VolumeRow,
)
from chutes_proto.store._run import Ask
from chutes_proto.units.erasure import EraseVm
from chutes_proto.units.operator import BindVm, PurgeBoots, RebindVm
from chutes_proto.units.revocations import ReadParty, subject_of

command: Group = Group(
    "vm",
    of=OperatorCommand,
    help="""List, bind, rebind, revoke and erase VMs, and purge their old boots.

    A VM's name is bound to the platform that booted it first. These commands show the platform, and change it. Every
    change writes an audit row.

    Examples:
      chutes-proto vm list --config server.toml
      chutes-proto vm rebind vm-1 --ppid 00112233445566778899aabbccddeeff --keep-keys \\
          --reason 'disk moved' --config server.toml

    See also: keys, audit, registrations
    """,
)


def _bound(member: str, otherwise: str | Cell = "-") -> Callable[[Mapping[str, Any]], str | Cell]:
    """The cell of a member that only a name has which is bound to a platform."""
    return lambda row: row.get(member) or otherwise


_COLUMNS: output.Columns = {
    "VM": lambda row: output.vm(row["hotkey"], row["vm"]),
    "PLATFORM": lambda row: output.short(row["platform"]) if row["platform"] else Cell("not bound, holds keys", "warn"),
    "PROFILE": _bound("profile_name"),
    "VERSION": _bound("profile_version"),
    "TCB STATUS": _bound("tcb_status"),
    "ADVISORIES": lambda row: " ".join(row.get("advisories") or ()) or "-",
    "EXCHANGE": _bound("exchange"),
    "HOTKEY PROVEN": lambda row: "-" if "proven" not in row else Cell("yes", "good") if row["proven"] else "no",
    "LAST BOOT": lambda row: "-" if "last_boot_at" not in row else _last_boot(row["last_boot_at"]),
}


def _last_boot(at: int | None) -> str:
    return output.when(at) if at else "not since it was bound"


@command.command("list")
@operating.shows
def listing(config: str) -> int:
    """List all VMs.

    One row for each VM: hotkey and name, the platform that it is bound to, the exchange that it uses, whether its
    hotkey is proven, and its last boot, with the profile, the status of the platform's TCB and Intel's advisories then.

    Examples:
      chutes-proto vm list --config server.toml

    See also: keys history, audit list
    """
    with operating.opened(config) as (_, store):
        unbound = operating.listing(store, lambda after: ReadUnclaimed(after, operating.PAGE))
        names = ({"hotkey": vm.hotkey, "vm": vm.name, "platform": None} for vm in unbound)
        return operating.answer_rows("vms", chain(_claims(store), names), _COLUMNS, "no VMs")


def _claims(store: DurableStore) -> Iterator[dict[str, Any]]:
    """All names that are bound, and what their last boots ran on, of which a page at a time is in memory."""
    after: VmRow | None = None
    while page := store.transact(Ask(ReadPage(VmRow, after, operating.PAGE))):
        ran = store.transact(Ask(ReadFleet(None if after is None else after.vm, operating.PAGE)))
        found = {each.vm: each for each in ran}
        for row in page:
            yield _claim(row, found.get(row.vm, FleetVm(row.vm, row.last_boot_at)))
        after = page[-1]


def _claim(row: VmRow, ran: FleetVm) -> dict[str, Any]:
    members = operating.members(row, "hotkey vm platform ppid proven exchange created_at last_boot_at")
    members |= {"last_boot_at": row.last_boot_at or None, "tcb_status": ran.tcb_status}
    members |= {"profile_name": ran.profile_name, "profile_version": ran.profile_version}
    return members | {"advisories": None if ran.advisories is None else ran.advisories.split()}


@command.command()
@operating.vm_argument()
@operating.platform_options
@operating.changes
def bind(vm: str, ppid: bytes, instance: bytes | None, reason: str, config: str) -> int:
    """Bind a name that is not bound to a platform, as after an import.

    The next boot on that platform receives the keys that the name holds.

    Examples:
      chutes-proto vm bind 5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY/vm-9 \\
          --ppid 00112233445566778899aabbccddeeff --config server.toml
      chutes-proto vm bind vm-imported --ppid 00112233445566778899aabbccddeeff --reason 'imported' --config server.toml

    See also: vm rebind, keys import-fernet, inspect
    """
    platform = Platform(instance_id=instance, ppid=ppid)
    with operating.opened(config) as (_, store):
        named = operating.find_vm(store, vm, new=True)
        try:
            _ = Hotkey.parse(named.hotkey)
        except HotkeyError as exc:
            raise ConfigurationError(f"{named.hotkey!r} is not a hotkey: {exc}") from None
        store.transact(BindVm(operating.now(), named, platform, reason))
        operating.require_kept(store, Read(VmRow, named))
    return operating.done(f"{named.hotkey}/{named.name} is bound to {platform.pin}")


@command.command()
@operating.vm_argument()
@operating.platform_options
@click.option("--keep-keys", is_flag=True, help="the disk moved to the other machine: keep the keys")
@click.option("--new-keys", is_flag=True, help="somebody else had taken the name: retire all its keys")
@operating.changes
def rebind(
    vm: str, ppid: bytes, instance: bytes | None, keep_keys: bool, new_keys: bool, reason: str, config: str
) -> int:
    """Bind a name to another platform.

    All tokens that were issued to the name become void. Give one of --keep-keys and --new-keys.

    Examples:
      chutes-proto vm rebind vm-1 --ppid 00112233445566778899aabbccddeeff --keep-keys \\
          --reason 'disk moved' --config server.toml
      chutes-proto vm rebind vm-1 --ppid 00112233445566778899aabbccddeeff --new-keys --config server.toml

    See also: vm list, keys history
    """
    one_of(keep_keys=keep_keys, new_keys=new_keys)
    platform = Platform(instance_id=instance, ppid=ppid)
    with operating.opened(config) as (setup, store):
        named = operating.find_vm(store, vm)
        store.transact(RebindVm(operating.now(), named, platform, keep_keys, setup.vault, reason))
        disowned = () if keep_keys else (ReadLiveGenerations(named), ReadAll(VolumeRow, named))
        operating.require_kept(store, Read(VmRow, named), *disowned, FindLastBoot(named))
    how = "with its keys" if keep_keys else "its keys are retired"
    return operating.done(f"{named.hotkey}/{named.name} is bound to {platform.pin}, {how}; its tokens are void")


@command.command("revoke")
@operating.vm_argument()
@revoking.until_option
@operating.changes
def revoke_vm(vm: str, until: int | None, reason: str, config: str) -> int:
    """Shut a VM out, until a time or for good.

    It boots no more, its tokens and nonces are not redeemed, and no attestation of it counts. A VM that runs goes on
    until it is stopped, and powers off at its next boot. Its keys are kept. It is in force when the command ends.

    Examples:
      chutes-proto vm revoke vm-1 --reason 'owner left' --config server.toml
      chutes-proto vm revoke 5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY/vm-9 --until 2126-12-24 \\
          --config server.toml

    See also: vm allow, revocations, hotkey revoke, platform revoke
    """
    with operating.opened(config) as (_, store):
        named = operating.find_vm(store, vm, new=True)
    return revoking.revoke("vm", subject_of(named), ReadParty("vm", vm=named), until, reason, config)


@command.command("allow")
@operating.vm_argument()
@operating.changes
def allow_vm(vm: str, reason: str, config: str) -> int:
    """Undo the revocation of a VM.

    Examples:
      chutes-proto vm allow vm-2 --config server.toml
      chutes-proto vm allow vm-2 --reason 'owner is back' --config server.toml

    See also: vm revoke, revocations
    """
    with operating.opened(config) as (_, store):
        revoked = store.transact(Ask(ReadRevoked()))
        names = {
            row.subject for row in revoked if row.kind == "vm" and vm in (row.subject, row.subject.partition("/")[2])
        }
        named = names.pop() if len(names) == 1 else subject_of(operating.find_vm(store, vm, new=True))
    return revoking.allow("vm", named, reason, config)


@command.command("purge-boots")
@operating.purges("boot_days", 90, "made")
@operating.changes
def purge_boots(older_than: int | None, yes: bool, reason: str, config: str) -> int:
    """Delete boots and verdicts on quotes whose retention has ended, for ever.

    Deletes the rows of boots, and of granted and refused quotes, that are older than boot_days of the configuration.
    Each VM's newest boot stays with its verdict, and so do the boot that a registered server is linked to and the
    newest verdict on a server. Keys and audit rows are not touched. Servers may run meanwhile, and the purge may be
    stopped and begun again. An audit row says who deleted how many. Without --yes nothing is deleted, only counted.

    Examples:
      chutes-proto vm purge-boots --config server.toml
      chutes-proto vm purge-boots --older-than 180 --yes --config server.toml

    See also: audit purge, keys purge
    """
    found = {"boot": 0, "attestation": 0}
    with (
        operating.opened(config, in_steps=yes) as (setup, store),
        output.progress(f"boots and verdicts {'deleted' if yes else 'found'} so far") as tell,
    ):
        days = operating.kept_days(older_than, "boot_days", setup.config.boot_days, "boots")
        began = operating.now()
        before = began - days * DAY
        total = sum(store.transact(Ask(CountRows(kind))) for kind in (BootRow, AttestationRow))
        for kind in (BootRow, AttestationRow):
            unit = PurgeBoots(began, kind, before, reason, carry_out=yes)
            while True:
                step = store.transact(unit)
                found[kind.TABLE] += len(step.rows)
                tell(sum(found.values()), total)
                if yes and step.rows:
                    again = Ask(ReadOld(kind, before, unit.after, len(step.rows)))
                    operating.require_gone(store, kind.TABLE, again, {*step.rows}.intersection)
                if step.last is None:
                    break
                unit = evolve(unit, after=step.last)
    if not yes:
        found["attestation"] += found["boot"]  # each boot keeps its verdict as long as it is there
    if not any(found.values()):
        told = f"nothing to purge: no boot that may be deleted is older than {rfc3339(before)}"
    else:
        counts = f"{found['boot']} boots and {found['attestation']} verdicts older than {rfc3339(before)}"
        told = f"{counts} deleted" if yes else f"{counts}; with --yes they are deleted"
    numbers = {"boots": found["boot"], "verdicts": found["attestation"]}
    return answer({"ok": True, "purged": yes, "older_than_days": days, "before": before, **numbers}, told)


_ERASED: output.Columns = {
    "KEY": lambda row: f"{row['volume']}/{row['generation']}",
    "STATE": lambda row: row["state"],
    "MADE": lambda row: output.when(row["created_at"]),
    "HANDED OUT": lambda row: output.when(row["delivered_at"]) if row["delivered_at"] else "never",
}


@command.command()
@operating.vm_argument()
@click.option("--yes", is_flag=True, help="destroy them")
@operating.changes
def erase(vm: str, yes: bool, reason: str, config: str) -> int:
    """Destroy all keys of a VM at once, for ever, and free its name.

    Its disks can never be opened again with what this server has: active keys go as well, and those that `keys purge`
    would keep. Its tokens are void, its claim and the quotes that are kept of it are gone, and its platform has a place
    more for a name. First stop the VM, and revoke it: one that boots again gets new keys as another VM would. Without
    --yes nothing is destroyed, only shown.

    The command says what may still hold copies of the sealed keys, and how that ends. The erasure is noted beside
    store.mark_file, too: a store that comes back from a backup is erased again before it is served.

    Examples:
      chutes-proto vm erase vm-1 --config server.toml
      chutes-proto vm erase vm-imported --yes --reason 'decommissioned' --config server.toml

    See also: vm revoke, keys history, keys purge
    """
    with operating.opened(config) as (setup, store):
        named = operating.find_vm(store, vm)
        disks = store.transact(Ask(ReadAll(VolumeRow, named)))
        erasure_id, version = secrets.token_hex(16), revoking.new_version()
        done = store.transact(EraseVm(operating.now(), erasure_id, version, named, reason, yes))
        path = erasures_file(setup.config)
        if yes:
            rows = (Read(VmRow, named), ReadAll(GenerationRow, named), ReadAll(VolumeRow, named), FindLastBoot(named))
            operating.require_kept(store, ReadTimes(), *rows)
            with revoking.told_with("its keys are destroyed in the store, and copies are not", "run the command again"):
                _ = keep_erasures(store, path, setup.vault)
    values = [value for row in done.keys for value in (row.sealed, row.wrapped_key) if value]
    values += [half for row in done.evidence for half in _halves(row.quote)]
    left = scrub(setup.store, values) if yes else []
    remain = [f"{file}: it still holds a copy; stop all servers, and run the command again" for file in left]
    remain += _may_remain(setup)
    if path is None:
        remain.append("a restored backup brings the keys back: set store.mark_file, and they are erased again")
    used = [row.volume for row in disks if row.in_use]
    told: dict[str, object] = {"ok": not left, "erased": yes, "hotkey": named.hotkey, "vm": named.name}
    told["platform"] = None if done.claim is None else str(done.claim.pin)
    keys = [operating.members(row, "volume generation state created_at delivered_at") for row in done.keys]
    told |= {
        "keys": keys,
        "quotes": len(done.evidence),
        "in_use": used,
        "recorded_in": str(path) if yes and path else None,
        "may_remain": remain,
    }

    def people() -> None:
        output.table(_ERASED, keys, empty="no keys")
        disks = f"; disks in use: {', '.join(used)}" if used else ""
        if not yes:
            count = f"{len(done.keys)} keys of {named.hotkey}/{named.name}"
            console.say(f"{count}{disks}; with --yes they are destroyed for ever")
            return
        console.say(f"{len(done.keys)} keys of {named.hotkey}/{named.name} are destroyed{disks}; its name is free")
        for line in remain:
            output.prose(f"may still hold a copy: {line}", rest=2)

    return answer(told, people, ok=not left)


def _halves(quote: bytes) -> tuple[bytes, bytes]:
    """The two halves of a quote's signature, which no other quote has. SQLite cuts a long value between two pages."""
    signature = parse_quote(quote).signature
    return signature[:32], signature[32:]


def _may_remain(setup: StoreSetup) -> list[str]:
    """Places that this command cannot reach, and how what they hold ends."""
    backups = (
        "backups, and stores that were copied: delete them, or make them useless: wrap all keys under a new KEK"
        " (`chutes-proto keys rewrap`), and destroy the old one"
    )
    if setup.store.path is not None:
        return [backups, "the file system: freed blocks and snapshots, until they are overwritten or deleted"]
    return [
        "dead rows of PostgreSQL, here and on standbys: run VACUUM FULL generation, evidence",
        "archived WAL, and the WAL of base backups: until both are deleted or recycled",
        backups,
    ]


@command.command("root-ca")
@operating.vm_argument()
@operating.shows
def root_ca(vm: str, config: str) -> int:
    """Print the root CA with which a VM provisioned.

    A VM of image 1.4.0 or newer makes it at each boot, shows it as its client certificate, and signs its own TLS
    certificates with it. Prints nothing if its last boot has not provisioned.

    Examples:
      chutes-proto vm root-ca vm-1 --config server.toml

    See also: vm list, audit list
    """
    with operating.opened(config) as (_, store):
        boot = store.transact(Ask(FindLastBoot(operating.find_vm(store, vm))))
    found = None if boot is None else boot.root_ca
    boot_id = None if boot is None else boot.boot_id
    return answer({"ok": True, "boot_id": boot_id, "root_ca": found}, found or "")
