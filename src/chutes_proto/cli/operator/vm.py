"""``chutes-proto vm``: which platform each VM's name is bound to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import click
from attrs import evolve

from chutes_proto.auth.hotkey import Hotkey, HotkeyError
from chutes_proto.cli import output
from chutes_proto.cli.base import Group, answer, one_of, watch_option
from chutes_proto.cli.operator import operating, revoking
from chutes_proto.cli.operator.operating import DAY, OperatorCommand
from chutes_proto.cli.output import Cell
from chutes_proto.errors import ConfigurationError
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store._run import Ask
from chutes_proto.store.rows import (
    AttestationRow,
    BootRow,
    CountRows,
    FindLastBoot,
    Platform,
    ReadPage,
    ReadUnclaimed,
    RevocationRow,
    Scan,
    Vm,
    VmRow,
)
from chutes_proto.units.operator import BindVm, PurgeBoots, RebindVm
from chutes_proto.units.revocations import ReadRevoked, subject_of

command: Group = Group(
    "vm",
    of=OperatorCommand,
    help="""List, bind, rebind and revoke VMs, and purge their old boots.

    A VM's name is bound to the platform that booted it first. These commands show the platform, and change it. Every
    change writes an audit row.

    Examples:
      chutes-proto vm list --config server.toml
      chutes-proto vm rebind vm-1 --ppid 00112233445566778899aabbccddeeff --keep-keys \\
          --reason 'disk moved' --config server.toml

    See also: keys, audit, registrations
    """,
)


def _bound(cell: Callable[[VmRow], str | Cell], otherwise: str | Cell = "-") -> Callable[[VmRow | Vm], str | Cell]:
    """The cell of a name that is bound to a platform, and ``otherwise`` of one that only holds keys."""
    return lambda row: cell(row) if isinstance(row, VmRow) else otherwise


_COLUMNS: output.Columns = {
    "VM": lambda row: output.vm(row.vm if isinstance(row, VmRow) else row),
    "PLATFORM": _bound(lambda row: output.short(str(row.pin)), Cell("not bound, holds keys", "warn")),
    "EXCHANGE": _bound(lambda row: row.exchange),
    "HOTKEY PROVEN": _bound(lambda row: Cell("yes", "good") if row.proven else "no"),
    "LAST BOOT": _bound(lambda row: output.when(row.last_boot_at) if row.last_boot_at else "not since it was bound"),
}


@command.command("list")
@watch_option
@operating.shows
def listing(config: str) -> int:
    """List all VMs.

    One row for each VM: hotkey and name, the platform that it is bound to, the exchange that it uses, whether its
    hotkey is proven, and its last boot.

    Examples:
      chutes-proto vm list --config server.toml
      chutes-proto vm list --config server.toml --json

    See also: keys history, audit list
    """
    return output.watching(lambda: _list(config))


def _list(config: str) -> int:
    with operating.opened(config) as (_, store):
        claims = operating.listing(store, lambda after: ReadPage(VmRow, after, operating.PAGE))
        unbound = operating.listing(store, lambda after: ReadUnclaimed(after, operating.PAGE))
        everyone: Iterator[VmRow | Vm] = chain(claims, unbound)
        return operating.answer_rows("vms", everyone, _members, _COLUMNS, "no VMs")


def _members(row: VmRow | Vm) -> dict[str, object]:
    if isinstance(row, Vm):
        return {"hotkey": row.hotkey, "vm": row.name, "platform": None}
    names = "hotkey vm platform proven exchange created_at last_boot_at"
    return operating.members(row, names) | {"last_boot_at": row.last_boot_at or None}


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
    return revoking.revoke("vm", subject_of(named), ReadRevoked("vm", vm=named), until, reason, config)


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
        revoked = store.transact(Ask(Scan(RevocationRow)))
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
        operating.opened(config) as (setup, store),
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
                found[kind.TABLE] += step.count
                tell(sum(found.values()), total)
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


@command.command("root-ca")
@operating.vm_argument()
@operating.shows
def root_ca(vm: str, config: str) -> int:
    """Print the root CA with which a VM provisioned.

    A VM of image 1.4.0 or newer makes it at each boot, shows it as its client certificate, and signs its own TLS
    certificates with it. Prints nothing if its last boot has not provisioned.

    Examples:
      chutes-proto vm root-ca vm-1 --config server.toml
      chutes-proto vm root-ca vm-1 --config server.toml --json

    See also: vm list, audit list
    """
    with operating.opened(config) as (_, store):
        boot = store.transact(Ask(FindLastBoot(operating.find_vm(store, vm))))
    found = None if boot is None else boot.root_ca
    boot_id = None if boot is None else boot.boot_id
    return answer({"ok": True, "boot_id": boot_id, "root_ca": found}, found or "")
