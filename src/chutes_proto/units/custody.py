"""The seal of a store: it is made before the store has a row; see ``store/_sealing.py``.

A new epoch of the MACs is made after a key-encryption key (KEK) was replaced: who has the old one may have the key of
the rows from its time, and that must count no more. That key is never wrapped under the new KEK.

Two units find faults beside servers at work: they read what every other unit adds to.
"""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from chutes_proto.errors import RowNotAuthentic, StoreError
from chutes_proto.keys.vault import KEY_SIZE, NONCE_SIZE, Vault
from chutes_proto.secret import Secret
from chutes_proto.store import _rows as store
from chutes_proto.store._custody import ROWS_KEY
from chutes_proto.store._inspection import InspectAudit, InspectLogged
from chutes_proto.store._run import Script, Unit
from chutes_proto.store._sealing import (
    BeginEpoch,
    BeginSeal,
    EndEpoch,
    ReadEpochs,
    ReadSeal,
)

ENTROPY_SIZE = KEY_SIZE + NONCE_SIZE


@frozen
class SealNew(Unit[None]):
    """Seal a store that has no rows, unless it is sealed. ``entropy`` is `ENTROPY_SIZE` random bytes.

    Raises `StoreError` for one that has rows: a store is sealed before it has any.
    """

    now: int
    vault: Vault
    entropy: Secret

    def script(self) -> Script[None]:
        """Look, and seal."""
        if (yield from ReadSeal()):
            return
        for kind in store.ROWS:
            some = (yield from store.ReadPage(kind, None, 1)) if kind.KEY else (yield from store.ReadAudit(0, 1))
            if some:
                raise StoreError(
                    f"it says that it is not sealed, and its table {kind.TABLE} has rows: somebody changed it; restore"
                    " a backup"
                )
        yield from BeginSeal(*_drawn(self.now, self.vault, self.entropy, 1))


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
