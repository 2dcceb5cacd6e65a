"""A store that keeps nothing when the process ends: for tests, and to read what each operation means.

Rules kept here:

* a transaction works on a copy, which takes the place of the rows when the script returns: what raises leaves no trace;
* what the SQL schema refuses by keys and unique indexes is refused here too, with a `StoreError`;
* one transaction at a time; callers from several threads bring a lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from operator import itemgetter
from typing import Any, TypeVar, cast

from attrs import define, evolve, field

from chutes_proto.errors import LocalProtocolError, StoreError
from chutes_proto.store._run import Unit, run_script
from chutes_proto.store.rows import (
    ROWS,
    AttestationRow,
    AuditRow,
    BootRow,
    BootVolumeRow,
    Claim,
    CountClaims,
    CountRefusals,
    CountSealed,
    CountServerRefusals,
    DeleteServer,
    FindBoot,
    FindConfirm,
    FindLastBoot,
    FindLastBootFrom,
    FindServer,
    GenerationRow,
    GpuRow,
    Insert,
    IsRedeemed,
    NonceRow,
    PurgeAudit,
    PurgeGeneration,
    Put,
    R,
    RaiseHorizon,
    ReadAttestation,
    ReadAudit,
    ReadBoot,
    ReadBootVolumes,
    ReadGenerations,
    ReadGpu,
    ReadLiveGenerations,
    ReadNames,
    ReadOtherwiseSealed,
    ReadServer,
    ReadServers,
    ReadTimes,
    ReadVm,
    ReadVolumes,
    RedeemNonce,
    RewrapGeneration,
    Row,
    Scan,
    ServerRow,
    SetHorizon,
    SpendToken,
    StoreOp,
    SweepNonces,
    Times,
    UpdateGeneration,
    Vm,
    VmRow,
    VoidTokens,
    VolumeRow,
)
from chutes_proto.store.sql import key_of

T = TypeVar("T")
Key = tuple[Any, ...]


@define
class Tables:
    """All rows, by kind and key."""

    horizon: int = 0
    rows: dict[type[Any], dict[Key, Row]] = field(factory=lambda: {kind: {} for kind in ROWS})

    def copy(self) -> Tables:
        """The same rows; a change of one is none of the other. Rows are frozen, so they are shared."""
        return Tables(self.horizon, {kind: dict(rows) for kind, rows in self.rows.items()})

    def perform(self, op: StoreOp[Any]) -> object:
        """Carry out one operation."""
        match op:
            case Insert(row):
                self._insert(row)
            case Put(row):
                if isinstance(row, ServerRow) and self._conflicts(row):
                    raise StoreError("two servers would have the same address or name")
                self._set(row)
            case RedeemNonce(row):
                return self._redeem(row)
            case IsRedeemed(value):
                return (value,) in self.rows[NonceRow]
            case SweepNonces(until, limit):
                return self._sweep(until, limit)
            case ReadTimes():
                return Times(self.horizon, None)
            case RaiseHorizon(to):
                self.horizon = max(self.horizon, to)
            case SetHorizon(to):
                self.horizon = to
            case ReadVm(vm):
                return _first(self._where(VmRow, lambda row: row.vm == vm))
            case ReadNames(name):
                rows: list[VmRow | GenerationRow] = [*self._where(VmRow, lambda _: True)]
                rows += self._where(GenerationRow, lambda _: True)
                return tuple(sorted({row.vm for row in rows if name in (None, row.vm.name)}))
            case CountClaims(pin):
                return len(self._where(VmRow, lambda row: row.pin == pin))
            case FindBoot(digest):
                return _first(self._where(BootRow, lambda row: row.token_digest == digest))
            case FindConfirm(digest):
                return _first(self._where(BootRow, lambda row: row.confirm_digest == digest))
            case SpendToken(boot_id, at, body_digest):
                unspent = self._where(BootRow, lambda row: row.boot_id == boot_id and row.spent_at is None)
                for boot in unspent:
                    self._set(evolve(boot, spent_at=at, body_digest=body_digest))
                return bool(unspent)
            case VoidTokens(vm, at):
                for boot in self._where(BootRow, lambda row: vm in (None, row.vm) and row.voided_at is None):
                    self._set(evolve(boot, voided_at=at))
            case ReadBootVolumes(boot_id):
                given = self._where(BootVolumeRow, lambda row: row.boot_id == boot_id)
                return tuple(sorted(given, key=lambda row: row.position))
            case ReadGenerations(vm):
                return self._where(GenerationRow, lambda row: row.vm == vm)
            case ReadLiveGenerations(vm, boot_id):
                return self._live(vm, boot_id)
            case UpdateGeneration(row):
                self._update(row)
            case RewrapGeneration(row):
                for kept in self._where(GenerationRow, lambda other: key_of(other) == key_of(row)):
                    if kept.sealed is not None:
                        self._set(evolve(kept, kek_id=row.kek_id, wrapped_key=row.wrapped_key))
            case PurgeGeneration(row):
                for kept in self._where(GenerationRow, lambda other: key_of(other) == key_of(row)):
                    if kept.state == "retired":
                        gone = evolve(kept, sealed=None, kek_id=None, wrapped_key=None)
                        self._set(evolve(gone, state="purged", provisional=False))
            case CountSealed():
                sealed = self._where(GenerationRow, lambda row: row.kek_id is not None)
                return tuple(sorted(Counter(row.kek_id for row in sealed).items()))
            case ReadOtherwiseSealed(kek_id, limit):
                return self._where(GenerationRow, lambda row: row.kek_id not in (None, kek_id))[:limit]
            case ReadVolumes(vm):
                return self._where(VolumeRow, lambda row: row.vm == vm)
            case CountRefusals(pin, since):
                verdicts = self._where(AttestationRow, lambda row: row.pin == pin and row.created_at >= since)
                return sum(row.code is not None for row in verdicts)
            case Claim(row):
                return self._claim(row)
            case ReadServer(server_id):
                return _first(self._where(ServerRow, lambda row: row.server_id == server_id))
            case FindServer(address):
                return _first(self._where(ServerRow, lambda row: row.address == address))
            case ReadServers(hotkey):
                return self._where(ServerRow, lambda row: row.hotkey == hotkey)
            case DeleteServer(server_id):
                for gpu in self._where(GpuRow, lambda row: row.server_id == server_id):
                    del self.rows[GpuRow][key_of(gpu)]
                _ = self.rows[ServerRow].pop((server_id,), None)
            case ReadGpu(uuid):
                return _first(self._where(GpuRow, lambda row: row.uuid == uuid))
            case ReadBoot(boot_id):
                return _first(self._where(BootRow, lambda row: row.boot_id == boot_id))
            case FindLastBoot(vm):
                return _newest(self._where(BootRow, lambda row: row.vm == vm))
            case FindLastBootFrom(hotkey, address):
                return _newest(
                    self._where(BootRow, lambda row: row.vm.hotkey == hotkey and row.peer_address == address)
                )
            case ReadAttestation(attestation_id):
                return _first(self._where(AttestationRow, lambda row: row.attestation_id == attestation_id))
            case CountServerRefusals(registration, since):
                verdicts = self._where(AttestationRow, lambda row: row.registration == registration)
                return sum(row.code is not None and row.created_at >= since for row in verdicts)
            case ReadAudit(beyond, limit, backwards):
                numbered = [(key[0], row) for key, row in self.rows[AuditRow].items()]
                after = [item for item in numbered if item[0] > beyond]
                before = [item for item in reversed(numbered) if item[0] < beyond]
                return tuple((before if backwards else after)[:limit])
            case PurgeAudit(beyond, through, before):
                for key, row in [*self.rows[AuditRow].items()]:
                    if beyond < key[0] <= through and cast("AuditRow", row).at < before:
                        del self.rows[AuditRow][key]
            case Scan(kind):
                return self._where(kind, lambda _: True)
            case _:
                raise TypeError(f"{type(op).__name__} is not a row operation")
        return None

    def _insert(self, row: Row) -> None:
        rows = self.rows[type(row)]
        key = key_of(row) or (next(reversed(rows), (0,))[0] + 1,)
        if key in rows:
            raise StoreError(f"a {row.TABLE} row with this key is there already")
        match row:
            case BootRow() if self._where(BootRow, lambda other: other.token_digest == row.token_digest):
                raise StoreError("two boots would have the same token")
            case BootRow() if row.confirm_digest and self._where(
                BootRow, lambda other: other.confirm_digest == row.confirm_digest
            ):
                raise StoreError("two boots would have the same confirm nonce")
            case BootVolumeRow() if (row.boot_id,) not in self.rows[BootRow]:
                raise StoreError("a boot_volume row would be of no boot")
            case GenerationRow():
                self._check_states(row)
            case _:
                pass
        rows[key] = row

    def _claim(self, row: ServerRow | GpuRow) -> bool:
        if isinstance(row, GpuRow) and (row.server_id,) not in self.rows[ServerRow]:
            raise StoreError("a gpu row would be of no server")
        if key_of(row) in self.rows[type(row)] or (isinstance(row, ServerRow) and self._conflicts(row)):
            return False
        self._set(row)
        return True

    def _conflicts(self, new: ServerRow) -> bool:
        """The unique constraints of the ``server`` table, beside its key."""
        others = self._where(ServerRow, lambda row: row.server_id != new.server_id)
        return any(
            row.address == new.address
            or row.registration == new.registration
            or (row.hotkey, row.name) == (new.hotkey, new.name)
            for row in others
        )

    def _redeem(self, row: NonceRow) -> bool:
        if key_of(row) in self.rows[NonceRow]:
            return False
        self._set(row)
        return True

    def _sweep(self, until: int, limit: int) -> tuple[NonceRow, ...]:
        old = self._where(NonceRow, lambda row: max(row.issued_at, row.redeemed_at) <= until)
        swept = sorted(old, key=lambda row: row.redeemed_at)[:limit]
        for row in swept:
            del self.rows[NonceRow][key_of(row)]
        return tuple(sorted(swept, key=key_of))

    def _live(self, vm: Vm, boot_id: str | None) -> tuple[GenerationRow, ...]:
        rows = self._where(GenerationRow, lambda row: row.vm == vm)
        needed: set[tuple[str, int | None]] = set({row.volume: row.generation for row in rows}.items())
        for item in self._where(BootVolumeRow, lambda row: row.boot_id == boot_id):
            needed |= {(item.volume, item.current_generation), (item.volume, item.next_generation)}
        return tuple(
            row
            for row in rows
            if row.state in ("active", "candidate")
            or row.provisional
            or row.retirement == "prune"
            or (row.volume, row.generation) in needed
        )

    def _update(self, row: GenerationRow) -> None:
        kept = _first(self._where(GenerationRow, lambda other: key_of(other) == key_of(row)))
        if kept is None:
            return
        self._check_states(row)
        self._set(evolve(row, sealed=kept.sealed, kek_id=kept.kek_id, wrapped_key=kept.wrapped_key))

    def _check_states(self, new: GenerationRow) -> None:
        """The unique indexes of the ``generation`` table."""
        if new.state not in ("active", "candidate"):
            return
        of_volume = self._where(GenerationRow, lambda row: (row.vm, row.volume) == (new.vm, new.volume))
        if any(row.state == new.state and row.generation != new.generation for row in of_volume):
            raise StoreError(f"a volume would have two keys in state {new.state}")

    def _set(self, row: Row) -> None:
        self.rows[type(row)][key_of(row)] = row

    def _where(self, kind: type[R], holds: Callable[[R], bool]) -> tuple[R, ...]:
        rows = cast("dict[Key, R]", self.rows[kind])
        found = [(key, row) for key, row in rows.items() if holds(row)]
        return tuple(row for _, row in sorted(found, key=itemgetter(0)))


class MemoryStore:
    """A store in memory; see `chutes_proto.store._run.Store` for what `transact` guarantees."""

    def __init__(self) -> None:
        self._tables = Tables()
        self._busy = False

    def transact(self, unit: Unit[T]) -> T:
        """Run ``unit``. Raises what its script raises, and `LocalProtocolError` where another one is running."""
        if self._busy:
            raise LocalProtocolError("a memory store runs one transaction at a time")
        self._busy = True
        try:
            tables = self._tables.copy()
            result = run_script(unit.script(), tables.perform)
        finally:
            self._busy = False
        self._tables = tables
        return result


def _first(rows: tuple[R, ...]) -> R | None:
    return rows[0] if rows else None


def _newest(rows: tuple[BootRow, ...]) -> BootRow | None:
    return max(rows, key=lambda row: row.created_at, default=None)
