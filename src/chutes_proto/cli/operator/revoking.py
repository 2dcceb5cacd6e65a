"""Shut a VM, a hotkey or a platform out, and allow it again: what `vm`, `hotkey` and `platform` share, and the list."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Group, answer, parsed
from chutes_proto.cli.console import moment
from chutes_proto.cli.operator import operating
from chutes_proto.cli.operator.operating import OperatorCommand
from chutes_proto.cli.output import Cell
from chutes_proto.errors import ConfigurationError, StoreError
from chutes_proto.io.server.store_setup import erasures_file
from chutes_proto.io.stores.erasures import keep_erasures
from chutes_proto.store._rows import Pin, ReadRevocation, ReadRevoked, ReadTimes, Revocable, RevocationRow
from chutes_proto.store._run import Ask
from chutes_proto.units.revocations import Allow, ReadParty, Revoke, is_in_force, told_end

F = TypeVar("F", bound=Callable[..., Any])

_MAY_RUN: output.Columns = {
    "VM": lambda row: output.vm(row["hotkey"], row["vm"]),
    "PLATFORM": lambda row: output.short(row["platform"]),
    "LAST BOOT": lambda row: output.when(row["last_boot_at"]) if row["last_boot_at"] else "not since it was bound",
}


def until_option(function: F) -> F:
    """The end of a revocation."""
    told = "when it ends by itself (default: never)"
    return click.option("--until", metavar="TIME", callback=parsed(moment), help=told)(function)


def new_version() -> int:
    """A version of the revocations that no store ever had."""
    return 1 + secrets.randbits(62)


@contextmanager
def told_with(outcome: str, then: str) -> Generator[None]:
    """Tell of a fault of the file of erasures with what was done before it, and with what mends it."""
    try:
        yield
    except StoreError as exc:
        raise StoreError(f"{outcome}: {exc}; mend that, and {then}") from None


_UNNOTED = "a restored backup will not know it"
_LATER = "the next such command or server notes it"


def revoke(kind: Revocable, subject: str, who: ReadParty, until: int | None, reason: str, config: str) -> int:
    """Revoke a party, and list the VMs that may run; the result is the exit code."""
    now = operating.now()
    if until is not None and until <= now:
        raise ConfigurationError("--until: it is not in the future, so nothing would be revoked; say a later time")
    with operating.opened(config) as (setup, store):
        store.transact(Revoke(now, new_version(), kind, subject, until, reason))
        operating.require_kept(store, ReadTimes(), ReadRevocation(kind, subject))
        running = [operating.members(row, "hotkey vm platform last_boot_at") for row in store.transact(who)]
        file = erasures_file(setup.config)
        with told_with(f"{kind} {subject} is revoked, but {_UNNOTED}", _LATER):
            _ = keep_erasures(store, file, setup.vault)

    def people() -> None:
        row = RevocationRow(kind, subject, reason, now, until)
        console.say(f"{kind} {subject} is revoked {told_end(row)}; a VM of it that runs goes on until it is stopped")
        if file is None:
            output.prose("a restored backup does not know it: set store.mark_file, and it is repeated", "warn")
        output.table(_MAY_RUN, running, empty="no VM of it is bound to a platform")

    told = {"ok": True, "kind": kind, "subject": subject, "ends_at": until}
    told["recorded_in"] = None if file is None else str(file)
    return answer({**told, "vms": running}, people)


def allow(kind: Revocable, subject: str, reason: str, config: str) -> int:
    """Undo a revocation; the result is the exit code."""
    with operating.opened(config) as (setup, store):
        file = erasures_file(setup.config)
        with told_with("nothing was changed", "run the command again"):
            # In a store that was restored it may be what the file alone knows.
            _ = keep_erasures(store, file, setup.vault)
        _ = store.transact(Allow(operating.now(), new_version(), kind, subject, reason))
        operating.require_kept(store, ReadTimes(), ReadRevocation(kind, subject))
        with told_with(f"{kind} {subject} may boot again, but {_UNNOTED}", _LATER):
            _ = keep_erasures(store, file, setup.vault)
    return operating.done(f"{kind} {subject} may boot again; start its VMs that were refused")


# --- platforms, and the list of all ---


platform: Group = Group(
    "platform",
    of=OperatorCommand,
    help="""Shut a platform out, and allow it again.

    A platform is the machine of a VM, by the identifiers in its PCK certificate: its platform instance id, if it has
    one, or its PPID. Either names it.

    Examples:
      chutes-proto platform revoke --ppid 00112233445566778899aabbccddeeff --reason stolen --config server.toml

    See also: revocations, vm revoke, hotkey revoke
    """,
)


def _pin_options(function: F) -> F:
    names: tuple[tuple[str, str], ...] = (
        ("--ppid", "the platform's PPID, 16 bytes"),
        ("--instance", "or its platform instance id, 16 bytes (`inspect` shows both)"),
    )
    for option, told in reversed(names):
        function = click.option(option, metavar="HEX", callback=parsed(operating.identifier), help=told)(function)
    return function


def _pin(ppid: bytes | None, instance: bytes | None) -> Pin:
    if (ppid is None) == (instance is None):
        raise click.UsageError("give one of --ppid and --instance")
    return Pin("ppid", ppid) if ppid is not None else Pin("instance", instance or b"")


@platform.command("revoke")
@_pin_options
@until_option
@operating.changes
def revoke_platform(ppid: bytes | None, instance: bytes | None, until: int | None, reason: str, config: str) -> int:
    """Shut a platform out, until a time or for good.

    No VM on it boots, redeems a token or is attested. VMs that run there go on; those that are bound to the platform
    are listed. The keys are kept. It is in force when the command ends.

    Examples:
      chutes-proto platform revoke --ppid 00112233445566778899aabbccddeeff --reason stolen --config server.toml
      chutes-proto platform revoke --instance 00112233445566778899aabbccddeeff --until 2126-12-24 --config server.toml

    See also: platform allow, revocations, vm revoke
    """
    pin = _pin(ppid, instance)
    return revoke("platform", str(pin), ReadParty("platform", pin=pin), until, reason, config)


@platform.command("allow")
@_pin_options
@operating.changes
def allow_platform(ppid: bytes | None, instance: bytes | None, reason: str, config: str) -> int:
    """Undo the revocation of a platform.

    Examples:
      chutes-proto platform allow --ppid ffeeddccbbaa99887766554433221100 --config server.toml
      chutes-proto platform allow --ppid ffeeddccbbaa99887766554433221100 --reason 'found again' --config server.toml

    See also: platform revoke, revocations
    """
    return allow("platform", str(_pin(ppid, instance)), reason, config)


_COLUMNS: output.Columns = {
    "KIND": lambda row: row["kind"],
    "SUBJECT": lambda row: row["subject"],
    "SINCE": lambda row: output.when(row["created_at"]),
    "ENDS": lambda row: "never" if row["ends_at"] is None else output.when(row["ends_at"]),
    "STATE": lambda row: Cell("in force", "bad") if row["in_force"] else Cell("ended"),
    "REASON": lambda row: row["reason"],
}


@click.command("revocations", cls=OperatorCommand)
@operating.shows
def revocations(config: str) -> int:
    """List what is shut out.

    One row for each VM, hotkey and platform that was revoked and not allowed again: since when, until when, and why.

    Examples:
      chutes-proto revocations --config server.toml

    See also: vm revoke, hotkey revoke, platform revoke
    """
    with operating.opened(config) as (_, store):
        rows = store.transact(Ask(ReadRevoked()))
    return operating.answer_rows("revocations", map(_members, rows), _COLUMNS, "nothing is revoked")


def _members(row: RevocationRow) -> dict[str, object]:
    told = operating.members(row, "kind subject reason created_at ends_at")
    return told | {"in_force": is_in_force(row, operating.now())}
