"""The seal of a store: a new one begins sealed, and an operator seals an older one once; see ``store/_sealing.py``.

Rules kept here:

* an older store is sealed page by page, while servers of this release go on. Its rows are taken for true then,
  once, and recorded: how many rows got MACs, and a digest of the heads of the VMs;
* it may be stopped at any step. Begun again, it passes over what has a MAC or a head;
* only its last step makes a row without a MAC a forgery.

A new epoch of the MACs is made likewise, after a key-encryption key (KEK) was replaced: who has the old one may have
the key of the rows from its time, and that must count no more. That key is never wrapped under the new KEK.

Two units find faults beside servers at work: they read what every other unit adds to.
"""

from __future__ import annotations

import hashlib
from typing import ClassVar

from attrs import frozen

from chutes_proto.errors import RowNotAuthentic
from chutes_proto.keys.vault import KEY_SIZE, NONCE_SIZE, Vault
from chutes_proto.secret import Secret
from chutes_proto.store import rows as store
from chutes_proto.store._custody import ROWS_KEY
from chutes_proto.store._inspection import InspectAudit, InspectLogged
from chutes_proto.store._run import Script, Unit
from chutes_proto.store._sealing import (
    AdoptAudit,
    AdoptRows,
    AdoptVms,
    BeginEpoch,
    BeginSeal,
    EndEpoch,
    EndSeal,
    ReadEpochs,
    ReadSeal,
)

ENTROPY_SIZE = KEY_SIZE + NONCE_SIZE


@frozen
class SealNew(Unit[bool]):
    """Seal a store that has no rows; returns whether it did. ``entropy`` is `ENTROPY_SIZE` random bytes."""

    now: int
    vault: Vault
    entropy: Secret

    def script(self) -> Script[bool]:
        """Look, and seal."""
        has_macs, _ = yield from ReadSeal()
        if has_macs:
            return False
        for kind in store.ROWS:
            if kind.KEY and (yield from store.ReadPage(kind, None, 1)):
                return False
        if (yield from store.ReadAudit(0, 1)):
            return False
        yield from _begin(self.now, self.vault, self.entropy)
        yield from EndSeal()
        return True


@frozen
class BeginSealing(Unit[bool]):
    """Give rows that are written MACs from now on; returns False for a store that is sealed already.

    Servers of a release before, which know no MACs, are refused from then on.
    """

    now: int
    vault: Vault
    entropy: Secret
    reason: str

    ALONE: ClassVar[bool] = True

    def script(self) -> Script[bool]:
        """Make the key."""
        has_macs, is_final = yield from ReadSeal()
        if is_final:
            return False
        if not has_macs:
            yield from _begin(self.now, self.vault, self.entropy)
            yield from _audit(self.now, "seal begun", self.reason)
        return True


@frozen
class SealRows(Unit[tuple[int, store.Row | None]]):
    """Give the next rows of a kind MACs; returns how many got one, and the row to go on after."""

    now: int
    kind: type[store.Row]
    after: store.Row | None
    reason: str
    limit: int

    def script(self) -> Script[tuple[int, store.Row | None]]:
        """One page."""
        count, last = yield from AdoptRows(self.kind, self.after, self.limit)
        if count:
            yield from _audit(self.now, "rows sealed", self.reason, f"{self.kind.TABLE} rows: {count}")
        return count, last


@frozen
class SealWaiting(Unit[tuple[int, int | None]]):
    """Give the next audit rows that are not sequenced MACs; returns how many got one, and the number to go on after."""

    now: int
    after: int
    reason: str
    limit: int

    def script(self) -> Script[tuple[int, int | None]]:
        """One page."""
        count, last = yield from AdoptAudit(self.after, self.limit)
        if count:
            yield from _audit(self.now, "rows sealed", self.reason, f"audit rows: {count}")
        return count, last


@frozen
class SealVms(Unit[tuple[int, store.Vm | None]]):
    """Give the next VMs heads; returns how many got one, and the VM to go on after."""

    now: int
    after: store.Vm | None
    reason: str
    limit: int

    def script(self) -> Script[tuple[int, store.Vm | None]]:
        """One page."""
        vms, last = yield from AdoptVms(self.after, self.limit)
        if vms:
            digest = hashlib.sha256("".join(f"{vm.hotkey}/{vm.name}\n" for vm in vms).encode())
            text = f"VMs: {len(vms)}, SHA-256 of their names {digest.hexdigest()}"
            yield from _audit(self.now, "VMs sealed", self.reason, text)
        return len(vms), last


@frozen
class EndSealing(Unit[None]):
    """Make a row without a MAC, and a VM without a head, a forgery from now on."""

    now: int
    reason: str

    ALONE: ClassVar[bool] = True

    def script(self) -> Script[None]:
        """One fact."""
        yield from EndSeal()
        yield from _audit(self.now, "store sealed", self.reason)


@frozen
class BeginNewEpoch(Unit[tuple[int, ...]]):
    """Write MACs under a new key, if the present one is not wrapped under the current KEK; returns what counts now.

    These are epochs, the newest first: a second one counts until `EndOldEpochs`. A store that has two gets no third.
    """

    now: int
    vault: Vault
    entropy: Secret
    reason: str

    ALONE: ClassVar[bool] = True

    def script(self) -> Script[tuple[int, ...]]:
        """Make the key."""
        epochs = yield from ReadEpochs()
        if len(epochs) != 1:
            return epochs
        (present,) = [row for row in (yield from store.Scan(store.KeyringRow)) if row.kind == ROWS_KEY]
        if present.kek_id == self.vault.current.kek_id:
            return epochs
        row, random = _drawn(self.now, self.vault, self.entropy, epochs[0] + 1)
        yield from BeginEpoch(row, random)
        yield from _audit(self.now, "MAC key begun", self.reason, f"epoch {row.epoch}")
        return row.epoch, *epochs


@frozen
class EndOldEpochs(Unit[None]):
    """Make every MAC of an older epoch a forgery from now on, and delete the keys of these."""

    now: int
    reason: str

    ALONE: ClassVar[bool] = True

    def script(self) -> Script[None]:
        """Change the keyring, and the head of the store."""
        if len((yield from ReadEpochs())) > 1:
            newest = yield from EndEpoch()
            yield from _audit(self.now, "MAC key replaced", self.reason, f"epoch {newest}")


def _begin(now: int, vault: Vault, entropy: Secret) -> Script[None]:
    yield from BeginSeal(*_drawn(now, vault, entropy, 1))


def _drawn(now: int, vault: Vault, entropy: Secret, epoch: int) -> tuple[store.KeyringRow, Secret]:
    """The key of the MACs of an epoch, wrapped and as it is."""
    drawn = entropy.reveal()
    random = Secret(drawn[:KEY_SIZE])
    kek_id, wrapped = vault.wrap(ROWS_KEY, epoch, random, drawn[KEY_SIZE:])
    return store.KeyringRow(ROWS_KEY, epoch, kek_id, wrapped, now), random


def _audit(now: int, event: str, reason: str, keys: str = "") -> store.Insert:
    return store.Insert(store.AuditRow(now, "operator", event, "done", reason, keys=keys))


# --- finding faults while servers go on ---


@frozen
class FindWaitingFaults(Unit[tuple[tuple[RowNotAuthentic, ...], int | None]]):
    """The faults of the next audit rows without a place in the log, and of VMs whose heads are older than these say.

    Serializable, it would conflict with every unit that adds such a row. It reads the rows first, so the heads that it
    sees are at least as new.
    """

    READS_COMMITTED: ClassVar[bool] = True

    after: int
    limit: int

    def script(self) -> Script[tuple[tuple[RowNotAuthentic, ...], int | None]]:
        """Read a page."""
        return (yield from InspectAudit(self.after, self.limit))


@frozen
class FindGone(Unit[tuple[tuple[RowNotAuthentic, ...], store.Vm | None]]):
    """The next VMs of the log of which neither a row nor a head is left, as faults, and the VM to go on after.

    Serializable, it would conflict with every unit that adds an audit row. One statement reads all of it, so what it
    sees of a VM belongs together.
    """

    READS_COMMITTED: ClassVar[bool] = True

    after: store.Vm | None
    limit: int

    def script(self) -> Script[tuple[tuple[RowNotAuthentic, ...], store.Vm | None]]:
        """Read a page."""
        return (yield from InspectLogged(self.after, self.limit))
