"""What an operator does to rows, each command one transaction with its audit row.

Rules kept here:

* no command but `PurgeKeys` deletes a passphrase, none but `PurgeAudits` an audit row, and neither before its retention
  is over;
* what changes which key a VM is handed, or whose a name is, says so in the audit row, with the operator's reason;
* no passphrase leaves: what these units return may be shown.

What cannot be done as asked is a `Refused`, after which nothing has changed.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import evolve, frozen

from chutes_proto.errors import Refused, SealBroken
from chutes_proto.keys import generations
from chutes_proto.keys.vault import NONCE_SIZE, Address, FreshKey, Vault
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store._run import Script, Unit
from chutes_proto.store.rows import (
    AuditRow,
    CountSealed,
    DeleteServer,
    GenerationRow,
    Insert,
    Platform,
    PurgeAudit,
    PurgeGeneration,
    Put,
    Read,
    ReadAudit,
    ReadGenerations,
    ReadNames,
    ReadOtherwiseSealed,
    ReadTimes,
    ReadVm,
    ReadVolumes,
    RewrapGeneration,
    Scan,
    ServerRow,
    SetHorizon,
    UpdateGeneration,
    Vm,
    VmRow,
    VoidTokens,
    VolumeRow,
)
from chutes_proto.units.keys import Keeper, by_volume
from chutes_proto.units.nonces import SKEW
from chutes_proto.wire.codes import Code

KEPT = 3
"""How many of a volume's newest generations no purge takes."""


# --- what there is ---


@frozen
class Everyone(Unit[tuple[VmRow | Vm, ...]]):
    """All claims, and after them the names that hold keys and are claimed by no one."""

    def script(self) -> Script[tuple[VmRow | Vm, ...]]:
        """Read both."""
        claims = yield from Scan(VmRow)
        claimed = {claim.vm for claim in claims}
        return (*claims, *(vm for vm in (yield from ReadNames()) if vm not in claimed))


@frozen
class FindNames(Unit[tuple[Vm, ...]]):
    """All VMs, claimed or only holding keys; with ``name``, those of any hotkey that are called so."""

    name: str | None = None

    def script(self) -> Script[tuple[Vm, ...]]:
        """Read them."""
        return (yield from ReadNames(self.name))


@frozen
class History(Unit[tuple[tuple[GenerationRow, ...], tuple[VolumeRow, ...]]]):
    """All generations of a VM's keys, and what is known of its disks."""

    vm: Vm

    def script(self) -> Script[tuple[tuple[GenerationRow, ...], tuple[VolumeRow, ...]]]:
        """Read both."""
        return (yield from ReadGenerations(self.vm)), (yield from ReadVolumes(self.vm))


@frozen
class AuditPage:
    """Audit rows, and the number to go on from; None where there are no more."""

    rows: tuple[AuditRow, ...]
    beyond: int | None


@frozen
class ReadAuditPage(Unit[AuditPage]):
    """Of the next ``limit`` audit rows those of this time (``until`` not included), this event, and VMs of this name.

    ``hotkey`` and ``name`` are a VM's, and empty for any. It need not be there: whoever was only ever refused has rows.
    There may be any number of audit rows, so they are read in pages, each a transaction of its own; ``beyond`` and
    ``backwards`` are those of `ReadAudit`.
    """

    since: int = 0
    until: int = 1 << 62
    hotkey: str = ""
    name: str = ""
    event: str | None = None
    beyond: int | None = None
    backwards: bool = False
    limit: int = 1000

    def script(self) -> Script[AuditPage]:
        """Read and choose."""
        begin = (1 << 62 if self.backwards else 0) if self.beyond is None else self.beyond
        read = yield from ReadAudit(begin, self.limit, self.backwards)
        chosen = tuple(row for _, row in read if self._wants(row))
        return AuditPage(chosen, read[-1][0] if len(read) == self.limit else None)

    def _wants(self, row: AuditRow) -> bool:
        if not self.since <= row.at < self.until or self.event not in (None, row.event):
            return False
        hotkey, name = ("", "") if row.vm is None else (row.vm.hotkey, row.vm.name)
        return self.hotkey in ("", hotkey) and self.name in ("", name)


@frozen
class Purged:
    """How many audit rows were deleted, or would be, and the number to go on from; None where there are no more."""

    count: int
    beyond: int | None


@frozen
class PurgeAudits(Unit[Purged]):
    """Of the next ``limit`` audit rows delete those that tell of a time before ``before``, for ever.

    They are the next after the number ``beyond``. It is to be repeated, from where it says, until there are no more:
    each is a transaction of its own, with an audit row of its own. All are looked at, since a clock that was wrong may
    have put an old one behind a new one. Without ``carry_out`` nothing is deleted: what would be is counted.
    """

    now: int
    before: int
    reason: str
    beyond: int = 0
    limit: int = 1000
    carry_out: bool = False

    def script(self) -> Script[Purged]:
        """Read, choose; delete, with an audit row."""
        read = yield from ReadAudit(self.beyond, self.limit)
        count = sum(row.at < self.before for _, row in read)
        if count and self.carry_out:
            told = f"rows of before {rfc3339(self.before)}: {count}"
            # First the row, then the others: a store that has none may begin again with its numbers.
            yield from Insert(_audit(self.now, "audit purged", self.reason, keys=told))
            yield from PurgeAudit(self.beyond, read[-1][0], self.before)
        return Purged(count, read[-1][0] if len(read) == self.limit else None)


# --- keys ---


@frozen
class RestoreKey(Unit[GenerationRow]):
    """Make a generation the active one again, whatever it was retired for; returns it as it is then."""

    now: int
    vm: Vm
    volume: str
    generation: int
    reason: str

    def script(self) -> Script[GenerationRow]:
        """Retire what is active, activate the generation."""
        rows = by_volume((yield from ReadGenerations(self.vm)))[self.volume]
        change = generations.restore(rows, self.generation, self.now)
        if change is None:
            states = {row.generation: row.state for row in rows}
            found = states.get(self.generation, "not there")
            raise _refused(f"{self.volume}/{self.generation} of {_named(self.vm)} cannot be restored: it is {found}")
        for row in change.updated:
            yield from UpdateGeneration(row)
        for known in (yield from ReadVolumes(self.vm)):
            if known.volume == self.volume:
                yield from Put(evolve(known, handed=None))
        told = ", ".join(f"{row.volume}/{row.generation} {row.state}" for row in change.updated)
        yield from Insert(_audit(self.now, "key restored", self.reason, self.vm, keys=told))
        return change.updated[-1]


@frozen
class PurgeKeys(Unit[tuple[GenerationRow, ...]]):
    """Delete a VM's passphrases that were retired ``retention`` seconds ago or earlier, for ever; returns which.

    Kept are the newest three generations of a volume, and whatever the VM may yet be handed. Without ``carry_out``
    nothing is done: what would be is returned.
    """

    now: int
    retention: int
    reason: str
    vm: Vm
    carry_out: bool = False

    def script(self) -> Script[tuple[GenerationRow, ...]]:
        """Choose; delete, with an audit row."""
        volumes = by_volume((yield from ReadGenerations(self.vm))).values()
        gone = [row for rows in volumes for row in generations.purgeable(rows, self.now, self.retention, KEPT)]
        if gone and self.carry_out:
            for row in gone:
                yield from PurgeGeneration(row)
            told = ", ".join(f"{row.volume}/{row.generation} purged" for row in gone)
            yield from Insert(_audit(self.now, "keys purged", self.reason, self.vm, keys=told))
        return tuple(gone)


@frozen
class Rewrapped:
    """How far it is: rows wrapped anew by this unit, and what is sealed under which key-encryption key afterwards.

    ``broken`` are rows that do not open, which were left as they are.
    """

    count: int
    sealed: tuple[tuple[str, int], ...]
    broken: tuple[Address, ...] = ()


@frozen
class RewrapKeys(Unit[Rewrapped]):
    """Wrap some rows under the current key-encryption key that are under another one.

    To be repeated until it counts none: each is a transaction of its own, so that a server goes on meanwhile and what
    was done stays done. ``entropy`` is `NONCE_SIZE` random bytes for each row; ``skip`` are rows that were found
    broken. Raises `KeyUnavailable` where a row is under a key that is not at hand.
    """

    now: int
    entropy: bytes
    vault: Vault
    reason: str
    skip: frozenset[Address] = frozenset()

    def script(self) -> Script[Rewrapped]:
        """Wrap as many as there is entropy for."""
        current = self.vault.current.kek_id
        limit = len(self.entropy) // NONCE_SIZE
        rows = yield from ReadOtherwiseSealed(current, limit + len(self.skip))
        addressed = [(Address(row.vm, row.volume, row.generation), row) for row in rows]
        count, broken = 0, list[Address]()
        for index, (address, row) in enumerate([pair for pair in addressed if pair[0] not in self.skip][:limit]):
            try:
                wrapped = self.vault.rewrap(address, row, self.entropy[NONCE_SIZE * index : NONCE_SIZE * (index + 1)])
            except SealBroken:
                broken.append(address)
                continue
            yield from RewrapGeneration(evolve(row, kek_id=wrapped.kek_id, wrapped_key=wrapped.wrapped_key))
            count += 1
        if count:
            yield from Insert(_audit(self.now, "keys rewrapped", self.reason, keys=f"{count} under {current}"))
        return Rewrapped(count, (yield from CountSealed()), tuple(broken))


@frozen
class AllowFormat(Unit[None]):
    """Permit one format of a volume that is in use: the next answer that has it does not name it among those."""

    now: int
    vm: Vm
    volume: str
    reason: str

    def script(self) -> Script[None]:
        """Set the permission."""
        known = {row.volume: row for row in (yield from ReadVolumes(self.vm))}.get(self.volume)
        if known is None:
            raise _refused(
                f"no disk {self.volume!r} of {_named(self.vm)} is known; what is not in use needs no permission"
            )
        if not known.in_use:
            raise _refused(f"{self.volume} of {_named(self.vm)} is not in use, so that a VM may format it as it is")
        yield from Put(evolve(known, format_allowed=True))
        yield from Insert(_audit(self.now, "format allowed", self.reason, self.vm, keys=self.volume))


@frozen
class ImportKeys(Unit[tuple[str, ...]]):
    """Keys of a VM from another server, sealed anew; returns the volumes that had none and have these now.

    A volume that has this very key already is left alone, so that an import can be repeated; one that has another key,
    which its VM is or would be handed, is refused. With ``platform`` the name is bound to it, unless it is bound
    already; without, only a hotkey's signature or an operator's `BindVm` opens it. The volumes are in use.

    Whoever booted under the name before, on another platform and without the hotkey's signature, may be anybody: then
    nothing is imported until an operator's `RebindVm` says whose the name is.
    """

    now: int
    vm: Vm
    keys: Mapping[str, FreshKey]
    platform: Platform | None
    vault: Vault
    reason: str

    def script(self) -> Script[tuple[str, ...]]:
        """Make the generations, bind the name."""
        keeper = Keeper(self.vm, self.vault, self.now, "import")
        stored = by_volume((yield from ReadGenerations(self.vm)))
        known = {row.volume: row for row in (yield from ReadVolumes(self.vm))}
        claim = yield from ReadVm(self.vm)
        made: dict[str, int] = {}
        for volume, fresh in self.keys.items():
            supply = generations.fetch(stored[volume], keeper.sealer(volume, fresh))
            if supply.word == "kept" and keeper.open(supply.current) == fresh.passphrase:
                continue
            if supply.word != "created":
                raise _refused(
                    f"{volume} of {_named(self.vm)} has another key already; nothing of this VM was imported"
                )
            if claim is not None and not self._is_owners(claim):
                raise _refused(
                    f"{_named(self.vm)} was booted on {claim.pin} without the hotkey's signature; nothing of this VM"
                    " was imported. Rebind it to the platform that it belongs to",
                    Code.PLATFORM_MISMATCH,
                )
            yield from Insert(evolve(supply.current, delivered_at=None))
            if volume not in generations.RESERVED_VOLUMES:
                before = known.get(volume) or VolumeRow(self.vm, volume, in_use=True, format_allowed=False)
                yield from Put(evolve(before, in_use=True))
            made[volume] = supply.current.generation
        bound = claim is None and self.platform is not None
        if bound and self.platform is not None:
            yield from Put(_claim(self.vm, self.platform, self.now))
        if made or bound:
            reason = f"{self.reason}; bound to {self.platform.pin}" if bound and self.platform else self.reason
            told = ", ".join(f"{volume}/{generation} created" for volume, generation in made.items())
            yield from Insert(_audit(self.now, "keys imported", reason, self.vm, keys=told))
        return tuple(made)

    def _is_owners(self, claim: VmRow) -> bool:
        is_home = self.platform is not None and claim.pin == self.platform.pin
        return claim.proven or is_home or not claim.last_boot_at


# --- names ---


@frozen
class BindVm(Unit[None]):
    """Bind a name that is bound to no platform; the keys that it holds stay with it."""

    now: int
    vm: Vm
    platform: Platform
    reason: str

    def script(self) -> Script[None]:
        """Write the claim."""
        claim = yield from ReadVm(self.vm)
        if claim is not None:
            raise _refused(f"{_named(self.vm)} is bound to {claim.pin} already; rebind it", Code.PLATFORM_MISMATCH)
        yield from Put(_claim(self.vm, self.platform, self.now))
        yield from Insert(_audit(self.now, "vm bound", self.reason, self.vm, self.platform))


@frozen
class RebindVm(Unit[None]):
    """Bind a name to another platform. All its tokens are void.

    With ``keep_keys`` the disk moved, and its keys go along. Without, the name was another's: all generations are
    retired, none comes back by itself, and what was known of its disks and its exchange is forgotten.
    """

    now: int
    vm: Vm
    platform: Platform
    keep_keys: bool
    vault: Vault
    reason: str

    def script(self) -> Script[None]:
        """Write the claim, void the tokens, retire the keys."""
        claim = yield from ReadVm(self.vm)
        if claim is None:
            raise _refused(f"{_named(self.vm)} is bound to no platform; bind it", Code.PLATFORM_MISMATCH)
        keeper = Keeper(self.vm, self.vault, self.now, "rebind")
        moved = _claim(self.vm, self.platform, self.now)
        if self.keep_keys:
            yield from VoidTokens(self.vm, self.now)
            moved = evolve(moved, created_at=claim.created_at, exchange=claim.exchange)
        else:
            yield from keeper.disown()
        yield from Put(moved)
        how = "with its keys" if self.keep_keys else "with new keys"
        reason = f"{self.reason}; from {claim.pin}, {how}"
        yield from Insert(_audit(self.now, "vm rebound", reason, self.vm, self.platform, keys=keeper.told))


@frozen
class Restored:
    """The nonce horizon before, and the one in force now, in unix seconds: later than it, boots are granted."""

    before: int
    horizon: int


@frozen
class StoreRestored(Unit[Restored]):
    """The store came back from a backup: what was spent since is unknown, so no nonce and no token of before counts.

    The horizon is set by the store's own clock, by ``now`` where it has none. One that lies beyond is set back: a clock
    that was ahead has moved it there, and no boot would be granted until that time.
    """

    now: int
    reason: str = ""

    def script(self) -> Script[Restored]:
        """Set the horizon, void all tokens."""
        times = yield from ReadTimes()
        before, clock = times.horizon, times.clock
        # A redemption that was lost is of a nonce issued at most SKEW later than this clock (see `redeem_nonce`).
        # A horizon beyond this one also covers nonces that a clock which was ahead has dated into the future. If their
        # redemption is still here, they stay refused. If it was swept or lost, they cannot be told from nonces that are
        # yet to be issued: they count once more when their time comes, for a VM that has the quote and the TLS key of
        # then. In a store with a clock of its own there are none, unless that clock itself was ahead or an older
        # release swept; elsewhere a new key-encryption key voids them.
        horizon = (self.now if clock is None else clock) + SKEW
        yield from SetHorizon(horizon)
        yield from VoidTokens(None, self.now)
        told = f"nonce horizon from {rfc3339(before)} to {rfc3339(horizon)}"
        yield from Insert(_audit(self.now, "store restored", self.reason, keys=told))
        return Restored(before, horizon)


# --- what miners registered ---


@frozen
class Registrations(Unit[tuple[ServerRow, ...]]):
    """The servers of all miners."""

    def script(self) -> Script[tuple[ServerRow, ...]]:
        """Read."""
        return (yield from Scan(ServerRow))


@frozen
class RemoveRegistration(Unit[ServerRow]):
    """Remove a server, whoever registered it: what it held is free. The keys of its VM are kept."""

    now: int
    server_id: str
    reason: str

    def script(self) -> Script[ServerRow]:
        """Delete."""
        server = yield from Read(ServerRow, self.server_id)
        if server is None:
            text = f"no server {self.server_id!r} is registered; `chutes-proto registrations list` shows those that are"
            raise _refused(text, Code.SERVER_NOT_FOUND)
        yield from DeleteServer(server.server_id)
        reason = f"{self.reason}; server {server.server_id} at {server.address}"
        yield from Insert(_audit(self.now, "registration removed", reason, server.vm))
        return server


def _claim(vm: Vm, platform: Platform, now: int) -> VmRow:
    return VmRow(
        vm=vm,
        pin=platform.pin,
        instance_id=platform.instance_id,
        ppid=platform.ppid,
        proven=False,
        exchange="base",
        created_at=now,
        last_boot_at=0,
    )


def _named(vm: Vm) -> str:
    return f"{vm.name!r} of {vm.hotkey}"


def _refused(text: str, code: Code = Code.KEY_NOT_FOUND) -> Refused:
    return Refused(code, text)


def _audit(
    now: int, event: str, reason: str, vm: Vm | None = None, platform: Platform | None = None, keys: str = ""
) -> AuditRow:
    return AuditRow(
        at=now,
        actor="operator",
        event=event,
        decision="done",
        reason=reason,
        vm=vm,
        pin=None if platform is None else platform.pin,
        keys=keys,
    )
