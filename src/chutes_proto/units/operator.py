"""An operator's commands on rows, each one transaction with its audit row.

Rules kept here:

* no command here but `PurgeKeys` deletes a passphrase, none but `PurgeAudits` an audit row, and neither before its
  retention is over; ``erasure.py`` has the other one;
* a command that changes which key a VM is handed, or whose a name is, says so in the audit row, with the operator's
  reason;
* no passphrase leaves: the results of these units may be shown.

A command that cannot be carried out raises `Refused` and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from attrs import evolve, frozen

from chutes_proto.errors import Refused, RowNotAuthentic, SealBroken
from chutes_proto.keys import generations
from chutes_proto.keys.vault import NONCE_SIZE, Address, FreshKey, Vault
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store import _rows as store
from chutes_proto.store._custody import ROWS_KEY
from chutes_proto.store._run import Script, Unit
from chutes_proto.tlog.tiles import WIDTH
from chutes_proto.units.keys import VmKeys, by_volume, disk_of
from chutes_proto.units.log import LOG, purged_text, require_entries
from chutes_proto.units.nonces import SKEW
from chutes_proto.units.records import legible
from chutes_proto.wire import json
from chutes_proto.wire.codes import Code

KEPT = 3
"""The number of a volume's newest generations that no purge takes."""


# --- reading ---


@frozen
class History(Unit[tuple[tuple[store.GenerationRow, ...], tuple[store.VolumeRow, ...]]]):
    """Read all generations of a VM's keys and the rows of its disks."""

    vm: store.Vm

    def script(self) -> Script[tuple[tuple[store.GenerationRow, ...], tuple[store.VolumeRow, ...]]]:
        keys = yield from store.ReadAll(store.GenerationRow, self.vm)
        return keys, (yield from store.ReadAll(store.VolumeRow, self.vm))


@frozen
class AuditPage:
    """Audit rows, and the number to go on from; None after the last page."""

    rows: tuple[store.AuditRow, ...]
    beyond: int | None


@frozen
class ReadAuditPage(Unit[AuditPage]):
    """Choose among the audit rows after the number ``beyond`` (``backwards``: before it), up to ``limit`` of them.

    The VM need not exist: one that was only ever refused has audit rows too. There may be any number of rows, so they
    are read in pages, each a transaction of its own, and none that no index finds looks at more than ``span`` numbers.
    """

    wanted: store.AuditWanted = store.AuditWanted()
    beyond: int | None = None
    backwards: bool = False
    limit: int = 1000
    span: int = 100_000

    def script(self) -> Script[AuditPage]:
        begin = (1 << 62 if self.backwards else 0) if self.beyond is None else self.beyond
        wanted = self.wanted
        if wanted.name or wanted.request_id or (wanted.refused and wanted.hotkey):  # an index finds them
            read = yield from store.ReadAudit(begin, self.limit, self.backwards, None, self.wanted)
            return self._page(read, None)
        first = yield from store.ReadAudit(begin, 1, self.backwards)
        if not first:
            return AuditPage((), None)
        through = first[0][0] + (1 - self.span if self.backwards else self.span - 1)
        read = yield from store.ReadAudit(begin, self.limit, self.backwards, through, self.wanted)
        return self._page(read, through)

    def _page(self, read: tuple[tuple[int, store.AuditRow], ...], through: int | None) -> AuditPage:
        rows = tuple(row for _, row in read)
        return AuditPage(rows, read[-1][0] if len(read) == self.limit else through)


@frozen
class Purged:
    """The count of rows deleted, or that would be, and where to go on; ``beyond`` is None after the last page."""

    count: int
    beyond: int | None


@frozen
class PurgeAudits(Unit[Purged]):
    """Delete the log's next entries, as long as they record a time before ``before``, up to ``span``, for ever.

    They are those from the index ``beyond`` on, in whole tiles of 256; the higher tiles stay, so what is left is proven
    as before. Repeat it from `Purged.beyond` until that is None: each is a transaction of its own, with an audit row of
    its own. Rows that are not sequenced stay. Without ``carry_out`` rows are counted and not deleted.

    Entries are deleted as they were written, or not at all (`LogError`): who dates recent ones back, or removes them,
    would have the purge excuse that.
    """

    now: int
    before: int
    reason: str
    beyond: int = 0
    span: int = 32 * WIDTH
    carry_out: bool = False

    def script(self) -> Script[Purged]:
        state = yield from store.Read(store.LogStateRow, LOG)
        first = yield from store.ReadLog(self.beyond, 1)
        if state is None or not first or first[0].idx is None:
            return Purged(0, None)
        begin = first[0].idx
        recent = yield from store.FindRecent(begin, self.before)
        end = min(begin + self.span, state.size if recent is None else recent) // WIDTH * WIDTH
        if end <= begin:
            return Purged(0, None)
        if self.carry_out:
            for tile in range(begin // WIDTH, end // WIDTH):
                yield from require_entries(state, tile)
            yield from _audit(self.now, "audit purged", self.reason, keys=purged_text(end, end - begin))
            yield from store.PurgeAudit(end, self.before)
            yield from store.PurgeTiles(end // WIDTH)
        return Purged(end - begin, end if end // WIDTH == (begin + self.span) // WIDTH else None)


# --- keys ---


@frozen
class RestoreKey(Unit[store.GenerationRow]):
    """Make a generation the active one again, whatever it was retired for; returns its new row."""

    now: int
    vm: store.Vm
    volume: str
    generation: int
    reason: str

    def script(self) -> Script[store.GenerationRow]:
        """Retire the active generation, activate this one."""
        rows = by_volume((yield from store.ReadAll(store.GenerationRow, self.vm)))[self.volume]
        change = generations.restore(rows, self.generation, self.now)
        if change is None:
            states = {row.generation: row.state for row in rows}
            found = states.get(self.generation, "not there")
            raise _refused(
                f"{self.volume}/{self.generation} of {_named(self.vm)} cannot be restored: it is {found};"
                " `chutes-proto keys history` shows its generations"
            )
        for row in change.updated:
            yield from store.UpdateGeneration(row)
        for known in (yield from store.ReadAll(store.VolumeRow, self.vm)):
            if known.volume == self.volume:
                yield from store.Put(evolve(known, handed=None))
        changes = ", ".join(f"{row.volume}/{row.generation} {row.state}" for row in change.updated)
        yield from _audit(self.now, "key restored", self.reason, self.vm, keys=changes)
        return change.updated[-1]


@frozen
class PurgeKeys(Unit[tuple[store.GenerationRow, ...]]):
    """Delete VMs' passphrases that were retired ``retention`` seconds ago or earlier, for ever; returns their rows.

    The newest three generations of a volume are kept, and those that the VM may yet be handed: a disk whose rotation
    was not confirmed needs one of them. Without ``carry_out`` the rows are returned and nothing is deleted.
    """

    now: int
    retention: int
    reason: str
    vms: tuple[store.Vm, ...]
    carry_out: bool = False

    def script(self) -> Script[tuple[store.GenerationRow, ...]]:
        """One VM after the other."""
        gone: list[store.GenerationRow] = []
        for vm in self.vms:
            gone += yield from self._purge(vm)
        return tuple(gone)

    def _purge(self, vm: store.Vm) -> Script[list[store.GenerationRow]]:
        volumes = by_volume((yield from store.ReadAll(store.GenerationRow, vm))).values()
        gone = [row for rows in volumes for row in generations.purgeable(rows, self.now, self.retention, KEPT)]
        if gone and self.carry_out:
            for row in gone:
                yield from store.PurgeGeneration(row)
            deleted = ", ".join(f"{row.volume}/{row.generation} purged" for row in gone)
            yield from _audit(self.now, "keys purged", self.reason, vm, keys=deleted)
        return gone


@frozen
class Rewrapped:
    """The progress of a rewrap: the number of rows wrapped by this unit, and the row to go on after.

    ``broken`` are rows that do not open, which were left as they are. ``last`` is None after the last page.
    """

    count: int
    broken: tuple[Address, ...]
    last: store.GenerationRow | None


@frozen
class RewrapKeys(Unit[Rewrapped]):
    """Wrap the next rows under the current KEK that are under another one, as many as there is entropy for.

    Repeat it after `Rewrapped.last` until that is None: each is a transaction of its own, so servers go on meanwhile.
    An interrupted rewrap begins again, and finds only the rows that are left. ``entropy`` is `NONCE_SIZE` random bytes
    for each row. Raises `KeyUnavailable` for a row under a KEK that is not available.
    """

    now: int
    entropy: bytes
    vault: Vault
    reason: str
    after: store.GenerationRow | None = None

    def script(self) -> Script[Rewrapped]:
        current = self.vault.current.kek_id
        limit = len(self.entropy) // NONCE_SIZE
        rows = yield from store.ReadOtherwiseSealed(current, limit, self.after)
        fresh, broken = list[store.GenerationRow](), list[Address]()
        for index, row in enumerate(rows):
            address = Address(row.vm, row.volume, row.generation)
            try:
                wrapped = self.vault.rewrap(address, row, self.entropy[NONCE_SIZE * index : NONCE_SIZE * (index + 1)])
            except SealBroken:
                broken.append(address)
                continue
            fresh.append(evolve(row, kek_id=wrapped.kek_id, wrapped_key=wrapped.wrapped_key))
        if fresh:
            yield from store.RewrapGenerations(tuple(fresh))
        count = len(fresh) + (yield from self._rewrap_keyring(limit - len(rows)))
        if count:
            yield from _audit(self.now, "keys rewrapped", self.reason, keys=f"{count} under {current}")
        return Rewrapped(count, tuple(broken), rows[-1] if len(rows) == limit else None)

    def _rewrap_keyring(self, limit: int) -> Script[int]:
        """Wrap the store's own keys, which are few, with what is left of the entropy after the last page."""
        keys = yield from store.Scan(store.KeyringRow)
        # An older key of the rows goes when its epoch ends (`BeginNewEpoch`): under this KEK it would open for ever.
        newest = max((row.epoch for row in keys if row.kind == ROWS_KEY), default=0)
        keys = tuple(row for row in keys if row.kind != ROWS_KEY or row.epoch == newest)
        stale = [row for row in keys if row.kek_id != self.vault.current.kek_id]
        for index, row in enumerate(stale[:limit], 1):
            nonce = self.entropy[len(self.entropy) - NONCE_SIZE * index :][:NONCE_SIZE]
            kek_id, wrapped = self.vault.wrap(row.kind, row.epoch, self.vault.unwrap(row), nonce)
            yield from store.Put(evolve(row, kek_id=kek_id, wrapped=wrapped))
        return len(stale[:limit])


@frozen
class AllowFormat(Unit[None]):
    """Permit one format of a volume that is in use: the next answer does not list it as in use."""

    now: int
    vm: store.Vm
    volume: str
    reason: str

    def script(self) -> Script[None]:
        known = disk_of((yield from store.ReadAll(store.VolumeRow, self.vm)), self.vm, self.volume)
        if not known.in_use:
            raise _refused(
                f"no disk {self.volume!r} of {_named(self.vm)} is known to be in use, and only one that is needs this"
                " permission; `chutes-proto keys history` shows them"
            )
        yield from store.Put(evolve(known, format_allowed=True))
        yield from _audit(self.now, "format allowed", self.reason, self.vm, keys=self.volume)


@frozen
class ImportKeys(Unit[tuple[str, ...]]):
    """Import a VM's keys from another server, sealed under the current KEK; returns the volumes that had no key before.

    A volume that has this very key already is left alone, so an import can be repeated; a volume with another active
    key, or one that would be revived, is refused. With ``platform`` the name is bound to it, unless it is bound
    already; without, only a hotkey's signature or an operator's `BindVm` opens it. The volumes are in use.

    A boot of the name on another platform without the hotkey's signature may have been an attacker's: then nothing is
    imported until an operator's `RebindVm` says whose the name is.
    """

    now: int
    vm: store.Vm
    keys: Mapping[str, FreshKey]
    platform: store.Platform | None
    vault: Vault
    reason: str

    def script(self) -> Script[tuple[str, ...]]:
        keys = VmKeys(self.vm, self.vault, self.now, "import")
        stored = by_volume((yield from store.ReadAll(store.GenerationRow, self.vm)))
        known = yield from store.ReadAll(store.VolumeRow, self.vm)
        claim = yield from store.Read(store.VmRow, self.vm)
        made: dict[str, int] = {}
        for volume, fresh in self.keys.items():
            supply = generations.fetch(stored[volume], keys.sealer(volume, fresh))
            if supply.word == "kept" and keys.open(supply.current) == fresh.passphrase:
                continue
            if supply.word != "created":
                text = f"{volume} of {_named(self.vm)} has another key already; nothing of this VM was imported"
                raise _refused(text)
            if claim is not None and not self._is_owners(claim):
                raise _refused(
                    f"{_named(self.vm)} was booted on {claim.pin} without the hotkey's signature; nothing of this VM"
                    " was imported. Rebind it to the platform that it belongs to",
                    Code.PLATFORM_MISMATCH,
                )
            yield from store.Insert(evolve(supply.current, delivered_at=None))
            if volume not in generations.RESERVED_VOLUMES:
                yield from store.Put(evolve(disk_of(known, self.vm, volume), in_use=True))
            made[volume] = supply.current.generation
        bound = self.platform if claim is None else None
        if bound is not None:
            yield from store.Put(store.VmRow.of(self.vm, bound, self.now))
        if made or bound is not None:
            reason = self.reason if bound is None else f"{self.reason}; bound to {bound.pin}"
            created = ", ".join(f"{volume}/{generation} created" for volume, generation in made.items())
            yield from _audit(self.now, "keys imported", reason, self.vm, keys=created)
        return tuple(made)

    def _is_owners(self, claim: store.VmRow) -> bool:
        is_home = self.platform is not None and claim.pin == self.platform.pin
        return claim.proven or is_home or not claim.last_boot_at


# --- names ---


@frozen
class BindVm(Unit[None]):
    """Bind a name that no platform is bound to; it keeps its keys."""

    now: int
    vm: store.Vm
    platform: store.Platform
    reason: str

    def script(self) -> Script[None]:
        claim = yield from store.Read(store.VmRow, self.vm)
        if claim is not None:
            raise _refused(f"{_named(self.vm)} is bound to {claim.pin} already; rebind it", Code.PLATFORM_MISMATCH)
        yield from store.Put(store.VmRow.of(self.vm, self.platform, self.now))
        yield from _audit(self.now, "vm bound", self.reason, self.vm, self.platform.pin)


@frozen
class RebindVm(Unit[None]):
    """Bind a name to another platform and void all its tokens.

    With ``keep_keys`` the disk moved, and its keys stay with the name, and with the hotkey that proved itself: no other
    platform takes it over. Without, the name was another's: all generations are retired, none is revived by itself, and
    the state of its disks and its exchange is forgotten.
    """

    now: int
    vm: store.Vm
    platform: store.Platform
    keep_keys: bool
    vault: Vault
    reason: str

    def script(self) -> Script[None]:
        claim = yield from store.Read(store.VmRow, self.vm)
        if claim is None:
            raise _refused(f"{_named(self.vm)} is bound to no platform; bind it", Code.PLATFORM_MISMATCH)
        keys = VmKeys(self.vm, self.vault, self.now, "rebind")
        moved = store.VmRow.of(self.vm, self.platform, self.now)
        if self.keep_keys:
            yield from store.VoidTokens(self.vm, self.now)
            kept = {name: getattr(claim, name) for name in ("created_at", "exchange", "proven", "nonce_at")}
            moved = evolve(moved, **kept)
        else:
            yield from keys.disown()
        yield from store.Put(moved)
        how = "with its keys" if self.keep_keys else "with new keys"
        reason = f"{self.reason}; from {claim.pin}, {how}"
        yield from _audit(self.now, "vm rebound", reason, self.vm, self.platform.pin, keys=keys.changes)


@frozen
class Restored:
    """The nonce horizon before, and the new one, in unix seconds: boots are granted when it has passed.

    ``faults`` are the candidates that were not made provisional, as they are not authentic: nobody is handed them.
    """

    before: int
    horizon: int
    faults: tuple[RowNotAuthentic, ...] = ()


@frozen
class StoreRestored(Unit[Restored]):
    """Void all nonces and tokens of a store that lacks rows: those consumed since then are unknown. Servers go on.

    Rows are lost by a restore from a backup, or by a fail-over.

    So are the rotations since then. Each candidate is now provisional: a disk may have no other key.

    No boot is rewritten: what was issued to one that was granted at or before the horizon is void. The horizon is set
    by the store's own clock, or by ``now`` in a store without one. A later horizon is set back: a clock that was ahead
    has moved it there, and no boot would be granted until that time.
    """

    now: int
    reason: str = ""

    def script(self) -> Script[Restored]:
        times = yield from store.ReadTimes()
        before, clock = times.horizon, times.clock
        # A lost redemption is of a nonce issued at most SKEW later than this clock (see `redeem_nonce`).
        # A later horizon also covers nonces that a clock which was ahead has dated into the future. If their redemption
        # is still stored, they stay refused. If it was swept or lost, they cannot be told from nonces yet to be issued:
        # they are valid once more when their time comes, for a VM that has the quote and the TLS key of then. A store
        # with a clock of its own has none, unless that clock was ahead; elsewhere a new KEK voids them.
        horizon = (self.now if clock is None else clock) + SKEW
        yield from store.SetHorizon(horizon)
        faults = yield from store.DoubtCandidates()
        moved = f"nonce horizon from {rfc3339(before)} to {rfc3339(horizon)}"
        yield from store.DecideLoss(self.now)
        yield from _audit(self.now, "store restored", self.reason, keys=moved)
        return Restored(before, horizon, faults)


@frozen
class PurgedBoots:
    """The rows deleted, or that would be, and the row to go on after; ``last`` is None after the last page."""

    rows: tuple[store.BootRow | store.AttestationRow, ...]
    last: store.BootRow | store.AttestationRow | None


@frozen
class PurgeBoots(Unit[PurgedBoots]):
    """Delete the next ``limit`` boots, or verdicts, that are older than ``before`` and that nothing needs, for ever.

    See `ReadOld` for what is needed. Repeat it after `PurgedBoots.last` until that is None: each is a transaction of
    its own, with an audit row of its own; boots first, since a verdict stays with its boot. Without ``carry_out`` rows
    are counted and not deleted.
    """

    now: int
    kind: type[store.BootRow | store.AttestationRow]
    before: int
    reason: str
    after: store.BootRow | store.AttestationRow | None = None
    limit: int = 1000
    carry_out: bool = False

    def script(self) -> Script[PurgedBoots]:
        old: tuple[store.BootRow | store.AttestationRow, ...]
        old = yield from store.ReadOld(self.kind, self.before, self.after, self.limit)
        if old and self.carry_out:
            keys = tuple(row.boot_id if isinstance(row, store.BootRow) else row.attestation_id for row in old)
            if self.kind is store.BootRow:
                yield from store.Delete(store.BootVolumeRow, keys)
            yield from store.Delete(self.kind, keys)
            deleted = f"{self.kind.TABLE} rows of before {rfc3339(self.before)}: {len(old)}"
            yield from _audit(self.now, "boots purged", self.reason, keys=deleted)
        return PurgedBoots(old, old[-1] if len(old) == self.limit else None)


# --- refusals ---


@frozen
class FindVerdict(Unit[store.AttestationRow | None]):
    """The verdict beside an audit row that records a refusal; None where there is none, or none any more."""

    row: store.AuditRow

    def script(self) -> Script[store.AttestationRow | None]:
        name = self.row.request_id
        return (yield from store.Read(store.AttestationRow, name)) if name else None


# --- registrations ---


@frozen
class RemoveRegistration(Unit[store.ServerRow]):
    """Remove a server of any miner: its id, address and GPUs are free again. The keys of its VM are kept."""

    now: int
    server_id: str
    reason: str

    def script(self) -> Script[store.ServerRow]:
        server = yield from store.Read(store.ServerRow, self.server_id)
        if server is None:
            text = f"no server {self.server_id!r} is registered; `chutes-proto registrations list` shows those that are"
            raise _refused(text, Code.SERVER_NOT_FOUND)
        yield from store.DeleteServer(server.server_id)
        reason = f"{self.reason}; server {server.server_id} at {server.address}"
        yield from _audit(self.now, "registration removed", reason, server.vm)
        return server


def _named(vm: store.Vm) -> str:
    return f"{vm.name!r} of {vm.hotkey}"


def _refused(text: str, code: Code = Code.KEY_NOT_FOUND) -> Refused:
    return Refused(code, text)


def _audit(
    now: int, event: str, reason: str, vm: store.Vm | None = None, pin: store.Pin | None = None, keys: str = ""
) -> store.Insert:
    return store.Insert(store.AuditRow(now, "operator", event, "done", reason, vm, pin=pin, keys=keys))


@frozen
class RecordReload(Unit[None]):
    """Record that a server is about to read its files again; ``reason`` has who asked, and both digests.

    ``evidence`` is a JSON object with the digests of policy and reference values, before and after.
    """

    now: int
    reason: str
    evidence: str | None = None
    server: str = ""

    def script(self) -> Script[None]:
        yield from _files_audit(self.now, "reloaded", self.reason, self.server, self.evidence)


@frozen
class RecordStart(Unit[bool]):
    """Record that ``server`` starts, if it judges evidence by other files than its newest row has, or by the first.

    ``digests`` has the SHA-256 of each, by name. Returns whether it was recorded: of several processes, one does.
    """

    now: int
    server: str
    digests: Mapping[str, str]

    def script(self) -> Script[bool]:
        """Compare with the newest row of this server alone: others may have other files, and keep them."""
        wanted = store.AuditWanted(request_id=files_of(self.server))
        rows = yield from store.ReadAudit(1 << 62, 100, backwards=True, wanted=wanted)
        before = next((_after(row.evidence) for _, row in rows if not row.is_forged), None)
        if before == dict(self.digests):
            return False
        documents = json.encode({"after": dict(self.digests), "before": before}).decode()
        known = before or {}
        changed = [name for name in sorted({*known, *self.digests}) if known.get(name) != self.digests.get(name)]
        how = "the first start" if before is None else f"changed: {', '.join(changed)}"
        reason = f"{self.server}: {how}"
        yield from _files_audit(self.now, "started", reason, self.server, documents)
        return True


def files_of(server: str) -> str:
    """The request id of the audit rows about the files of a server, by which they are found."""
    return legible(f"files of {server}", 1000)


def _after(evidence: str | None) -> dict[str, object] | None:
    """The digests that a row says a server goes on with; None if it says nothing of them."""
    try:
        found = json.decode((evidence or "").encode())
    except json.JsonError:
        return None
    after = cast("dict[str, object]", found).get("after") if isinstance(found, dict) else None
    return cast("dict[str, object]", after) if isinstance(after, dict) else None


def _files_audit(now: int, event: str, reason: str, server: str, evidence: str | None) -> store.Insert:
    row = store.AuditRow(now, "operator", event, "done", legible(reason, 2000))
    return store.Insert(evolve(row, request_id=files_of(server) if server else None, evidence=evidence))
