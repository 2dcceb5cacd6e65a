"""Revocations: parties that an operator has shut out, until a date or for good.

Rules kept here:

* a VM, a hotkey or a platform that is revoked redeems no nonce and no token, and no attestation of it counts. Nothing
  is deleted: its keys are there when it is allowed again;
* the set is small. A server has it in memory with its version; a unit reads the version in its own transaction, and
  the set too if that is another one. So no unit decides by an old set;
* a change waits until no unit runs (``ALONE``): every grant that is committed later has seen it;
* a party that is allowed again keeps its row, with the time. So each change can be told from an older one, and a store
  that came back from a backup repeats those that it has lost (``io/stores/erasures.py``);
* the refusal is final (403): a VM that is shut out must not try again for ever. It concerns who asks, and ends nothing
  that runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Final

from attrs import evolve, field, frozen

from chutes_proto.errors import Refused
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store import _rows as store
from chutes_proto.store._run import Script, Unit
from chutes_proto.wire.codes import Code

_TEXTS: Final[Mapping[store.Revocable, str]] = {
    "vm": "This VM has been revoked.",
    "hotkey": "The hotkey of this VM has been revoked.",
    "platform": "The platform of this VM has been revoked.",
}


def subject_of(vm: store.Vm) -> str:
    """A VM as a revocation names it."""
    return f"{vm.hotkey}/{vm.name}"


def pins_of(platform: store.Platform) -> tuple[store.Pin, ...]:
    """All names of a platform: a revocation may have either."""
    ppid = store.Pin("ppid", platform.ppid)
    return (ppid,) if platform.instance_id is None else (store.Pin("instance", platform.instance_id), ppid)


def pins_of_boot(boot: store.BootRow) -> Script[tuple[store.Pin, ...]]:
    """All names of the platform of ``boot``, whose row has one; only that one if its VM is another platform's now."""
    claim = yield from store.Read(store.VmRow, boot.vm)
    if claim is None or claim.pin != boot.pin:
        return (boot.pin,)
    return pins_of(store.Platform(claim.instance_id, claim.ppid))


@frozen
class Revocations:
    """All revocations of a store at one version of them; -1 is the version of no store."""

    version: int = -1
    rows: Mapping[tuple[store.Revocable, str], store.RevocationRow] = field(
        factory=dict["tuple[store.Revocable, str]", "store.RevocationRow"]
    )

    @classmethod
    def of(cls, version: int, rows: Iterable[store.RevocationRow]) -> Revocations:
        """The set of these rows."""
        return cls(version, {(row.kind, row.subject): row for row in rows})

    @property
    def names_platforms(self) -> bool:
        """Whether any platform is revoked."""
        return any(kind == "platform" for kind, _ in self.rows)

    def find(self, now: int, vms: Iterable[store.Vm], pins: Iterable[store.Pin] = ()) -> store.RevocationRow | None:
        """The first revocation of these VMs, their hotkeys or these platforms that is in force."""
        if not self.rows:
            return None
        keys: list[tuple[store.Revocable, str]] = []
        for vm in vms:
            keys.append(("vm", subject_of(vm)))
            keys.append(("hotkey", vm.hotkey))
        for pin in pins:
            keys.append(("platform", str(pin)))  # noqa: PERF401 - its type is told
        found = (self.rows.get(key) for key in keys)
        return next((row for row in found if row is not None and is_in_force(row, now)), None)


NO_REVOCATIONS: Final = Revocations()


def is_in_force(row: store.RevocationRow, now: int) -> bool:
    """Return whether a revocation has not ended."""
    return row.allowed_at is None and (row.ends_at is None or now < row.ends_at)


def told_end(row: store.RevocationRow) -> str:
    """The end of a revocation, in words."""
    return "for good" if row.ends_at is None else f"until {rfc3339(row.ends_at)}"


@frozen
class ReadRevocations(Unit[Revocations]):
    """The revocations now: those ``known`` if their version is the store's, else all of them again."""

    known: Revocations = NO_REVOCATIONS

    def script(self) -> Script[Revocations]:
        """Compare versions."""
        times = yield from store.ReadTimes()
        return (yield from current(self.known, times))


def current(known: Revocations, times: store.Times) -> Script[Revocations]:
    """The revocations of this transaction, which has read ``times``."""
    if times.version == known.version:
        return known
    return Revocations.of(times.version, (yield from store.ReadRevoked()))


def check_allowed(
    known: Revocations, times: store.Times, now: int, vms: Iterable[store.Vm], pins: Iterable[store.Pin]
) -> Script[None]:
    """Check that none of these VMs, their hotkeys and these platforms is revoked. Raises `Refused`."""
    row = (yield from current(known, times)).find(now, vms, pins)
    if row is not None:
        raise _revoked(row)


def check_boot_allowed(known: Revocations, times: store.Times, now: int, boot: store.BootRow) -> Script[None]:
    """Check the same for a later request of ``boot``. Raises `Refused`."""
    known = yield from current(known, times)
    pins = (yield from pins_of_boot(boot)) if known.names_platforms else (boot.pin,)
    row = known.find(now, (boot.vm,), pins)
    if row is not None:
        raise _revoked(row)


def _revoked(row: store.RevocationRow) -> Refused:
    reason = f"{row.kind} {row.subject} is revoked {told_end(row)}, since {rfc3339(row.created_at)}: {row.reason}"
    return Refused(Code.REVOKED, _TEXTS[row.kind], reason=reason)


# --- an operator's commands ---


@frozen
class Revoke(Unit[None]):
    """Revoke a party. Another revocation of it is replaced. ``version`` is random: a number of 62 bits."""

    now: int
    version: int
    kind: store.Revocable
    subject: str
    ends_at: int | None
    reason: str

    ALONE: ClassVar[bool] = True

    def script(self) -> Script[None]:
        """Write row, version and audit."""
        at = yield from _change_at(self.now, self.kind, self.subject)
        row = store.RevocationRow(self.kind, self.subject, self.reason, at, self.ends_at)
        yield from store.Put(row)
        yield from store.SetVersion(self.version)
        yield from _audit(self.now, f"{self.kind} revoked", f"{self.reason}; {told_end(row)}", self.subject)


@frozen
class Allow(Unit[store.RevocationRow]):
    """Undo a revocation; returns it. Raises `Refused` if there is none."""

    now: int
    version: int
    kind: store.Revocable
    subject: str
    reason: str

    def script(self) -> Script[store.RevocationRow]:
        """Note it in the row; write version and audit."""
        row = yield from store.ReadRevocation(self.kind, self.subject)
        if row is None or row.allowed_at is not None:
            text = f"{self.kind} {self.subject} is not revoked; `chutes-proto revocations` shows what is"
            raise Refused(Code.KEY_NOT_FOUND, text)
        at = yield from _change_at(self.now, self.kind, self.subject)
        yield from store.Put(evolve(row, allowed_at=at))
        yield from store.SetVersion(self.version)
        yield from _audit(self.now, f"{self.kind} allowed", self.reason, self.subject)
        return row


@frozen
class RepeatRevocation(Unit[bool]):
    """Do a revocation, or the end of one, again, unless the store has that change or a later one of the party.

    Returns whether it was repeated.
    """

    now: int
    version: int
    row: store.RevocationRow

    ALONE: ClassVar[bool] = True

    def script(self) -> Script[bool]:
        """Compare the times; write row, version and audit."""
        row = self.row
        there = yield from store.ReadRevocation(row.kind, row.subject)
        if there is not None and there.changed_at >= row.changed_at:
            return False
        yield from store.Put(row)
        yield from store.SetVersion(self.version)
        done = f"{row.kind} {'revoked' if row.allowed_at is None else 'allowed'} again"
        reason = f"since {rfc3339(row.changed_at)}; repeated, because the store had lost that: {row.reason}"
        yield from _audit(self.now, done, reason, row.subject)
        return True


def _change_at(now: int, kind: store.Revocable, subject: str) -> Script[int]:
    """The time of a change, later than that of the one before: operators' clocks differ."""
    there = yield from store.ReadRevocation(kind, subject)
    return now if there is None else max(now, there.changed_at + 1)


@frozen
class ReadParty(Unit[tuple[store.VmRow, ...]]):
    """The VMs that are bound to a platform and that a revocation concerns: they may run."""

    kind: store.Revocable
    vm: store.Vm | None = None
    hotkey: str = ""
    pin: store.Pin | None = None

    def script(self) -> Script[tuple[store.VmRow, ...]]:
        """Read the claims."""
        if self.pin is not None:
            return (yield from store.ReadClaims(self.pin))
        if self.vm is not None:
            claim = yield from store.Read(store.VmRow, self.vm)
            return () if claim is None else (claim,)
        return (yield from store.ReadAll(store.VmRow, self.hotkey))


def _audit(now: int, event: str, reason: str, subject: str) -> store.Insert:
    hotkey, _, name = subject.partition("/")
    vm = store.Vm(hotkey, name) if name else None
    text = reason if vm else f"{subject}: {reason}"
    return store.Insert(store.AuditRow(now, "operator", event, "done", text, vm))
