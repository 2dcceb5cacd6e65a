"""The audit log of a store, beside the requests: audit rows are sequenced, and checkpoints signed into a file.

Rules kept here:

* every process of every server tries, within a second of a commit; the store lets one of them in at a time;
* a checkpoint is signed only if the log extends the one in the file, which is outside the database. Otherwise nothing
  is signed any more, and the operator is told, until the file is moved away;
* after an operator's decision on a loss, a log that lost entries goes on under another key: the old one has signed
  what is not in it. The old checkpoint is kept beside the new one. All servers sign with the newest key;
* what this process has committed must be in the log soon: an entry that is not there within 10 s, or is another one, is
  told. It was deleted or changed before it got its place, or a fail-over lost it. This is looked for whatever becomes
  of the sequencing, which an attacker can stop;
* while rows wait for longer than that, the log is late, which is told: what it does not have yet convicts nobody;
* a VM whose versions do not grow from entry to entry has two histories, and is told; so are rows that no unit wrote;
* a store that fails is asked again later: nothing waits for the log.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

from chutes_proto.errors import (
    ConfigurationError,
    KeyUnavailable,
    LogError,
    RowNotAuthentic,
    SealBroken,
    StoreError,
    where_raised,
)
from chutes_proto.io.files import is_there, read_file, write_file
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.keys.vault import NONCE_SIZE, Vault
from chutes_proto.quote._terms import rfc3339
from chutes_proto.secret import Secret
from chutes_proto.store._mark import Entry
from chutes_proto.store._rows import ReadAudit, ReadLossDecided
from chutes_proto.store._run import Ask, Unit
from chutes_proto.tlog.notes import LARGEST_NOTE, Checkpoint, Note, Signer, open_checkpoint
from chutes_proto.units.log import (
    SALT_SIZE,
    SEED_SIZE,
    FindNewest,
    FindWaiting,
    MendTiles,
    OpenLogKey,
    ReadCheckpoint,
    ReadLogKeys,
    SequenceLog,
)

T = TypeVar("T")

LOOK_SECONDS: Final = 0.7
"""How long a process waits for audit rows of its own before it looks for those of others, which may have died."""
GATHER_SECONDS: Final = 0.2
"""How long it waits for more, so that they share a transaction. With the wait before, less than a second."""
BATCH: Final = 1000
"""Rows that are sequenced in one transaction."""
COVERED_SECONDS: Final = 10.0
"""How long a committed audit row may take to get its place in the log."""
LATE_LOG: Final = (
    f"the audit log is late: rows wait for more than {COVERED_SECONDS:.0f} s for their place, because it is stopped"
    " or too slow; find the cause: `chutes-proto audit verify` and `chutes-proto store check`"
)
"""The finding about a log that is late."""
MOST_AWAITED: Final = 100_000
"""Committed rows that are looked for again, as the log is late; of more, some are not."""
LATE: Final = 10_000
"""How many rows others may write between the first row of a transaction and its commit, without losing its turn."""
PAUSE_SECONDS: Final = 0.05
"""How long an SQLite file is left to other processes between two full batches, of which an old store has many."""


class Sequencer:
    """Sequences the audit rows of ``store``; ``file`` gets its newest checkpoint, unless it is None, then ``signed``.

    ``vault`` returns the present one: a new key of the log must not be sealed under a KEK that a reload has removed.
    """

    def __init__(
        self,
        store: DurableStore,
        vault: Callable[[], Vault],
        origin: str | None,
        file: Path | None,
        signed: Callable[[Note], object] = lambda _: None,
    ) -> None:
        self._store = store
        self._vault = vault
        self._origin = origin or ""
        self._file = file
        self._signed = signed
        self._signer: Signer | None = None
        self._awaited: list[tuple[Entry, float]] = []
        self._watch_at = 0.0
        self._late: tuple[int, float] | None = None
        self._told: dict[str, type[Exception]] = {}
        self._ending = threading.Event()

    def run(self) -> None:
        """Sequence until `stop`, and then one batch of what is left."""
        audited = self._store.audited
        ends = False
        while not ends:
            _ = audited.wait(LOOK_SECONDS)
            audited.clear()
            ends = self._ending.wait(GATHER_SECONDS)  # before rows are read: what is committed until `stop` is read
            self._attempt("sequence", self._sequence_and_sign)
            self._attempt("late", self.look)
            self._attempt("watch", self.watch)

    def _sequence_and_sign(self) -> None:
        self.sequence()
        if self._file is not None:
            _ = self.checkpoint()

    def _attempt(self, what: str, act: Callable[[], None]) -> None:
        """Do one thing, which may fail, and note why: nothing that is in the database ends the others."""
        try:
            act()
        except (ConfigurationError, KeyUnavailable, LogError, RowNotAuthentic, SealBroken, OSError) as exc:
            self._tell(what, exc, str(exc))
        except StoreError:  # `watch_store` tells the operator, and `look`
            pass
        except Exception as exc:  # noqa: BLE001 - rows that were changed may be anything
            why = "a defect, or the database was changed: `chutes-proto audit verify`"
            self._tell(what, exc, f"{where_raised(exc)}: {why}")
        else:
            _ = self._told.pop(what, None)

    def _tell(self, what: str, exc: Exception, why: str) -> None:
        if type(exc) is not self._told.get(what):  # once, not for each size of a log that grows
            self._store.add_note(f"audit log: {why}")
        self._told[what] = type(exc)

    def stop(self) -> None:
        """Let `run` end."""
        self._ending.set()
        self._store.audited.set()

    def sequence(self) -> None:
        """Sequence all audit rows that are committed now; after `stop`, one batch.

        Raises `LogError` for a damaged log, and `StoreError`.
        """
        beyond = 0
        while self._batch(beyond) == BATCH:
            if self._ending.wait(PAUSE_SECONDS):
                return
            # Not from the start: a long snapshot, as a backup takes it, keeps all that was sequenced in the index. But
            # not past a row of a transaction that drew its number early: of its VM, a later one may be there already.
            beyond = max(0, self._transact(FindNewest()) - LATE)

    def _batch(self, beyond: int) -> int:
        unit = SequenceLog(os.urandom(SALT_SIZE * BATCH), self._origin, beyond, self._found, int(time.time()))
        try:
            return self._transact(unit)
        except LogError:
            if not self._mend():
                raise
        return self._transact(unit)

    def _found(self, finding: str, rows: int) -> None:
        self._store.custody.faults["audit"] += rows
        self._store.add_note(
            f"audit log: {finding}; the database was changed, or set back: `chutes-proto audit verify`"
        )

    def _mend(self) -> bool:
        """Make damaged tiles at the log's end again, if the checkpoint in the file vouches for them."""
        signer = self._signer or self._key()
        held = None if signer is None else self._held(signer)[0]
        mended = () if held is None else self._transact(MendTiles(held))
        if mended:
            self._store.add_note(f"audit log: {', '.join(mended)} was damaged, and was made again from its entries")
        return bool(mended)

    def look(self) -> None:
        """Look for how long rows have waited for their place, and note that the log is late. Raises `StoreError`.

        By this process' clock, not by the rows' times: an attacker writes these, and the clocks of others may differ.
        """
        waiting, now = self._transact(FindWaiting()), time.monotonic()
        if waiting is None:
            self._late = None
        elif self._late is None or waiting.first > self._late[0]:  # all that waited then have their places
            self._late = waiting.newest, now
        waits = 0.0 if self._late is None else now - self._late[1]
        self._store.audit_waits = waits
        self._store.log_warning = LATE_LOG if self._late is not None and waits >= COVERED_SECONDS else ""

    def watch(self) -> None:
        """Look for the entries that this process has committed, and note those that are not in the log in time.

        Those that wait unchanged are looked for again. Raises `StoreError`.
        """
        now = time.monotonic()
        if now < self._watch_at:
            return
        self._awaited += self._store.take_acknowledged(COVERED_SECONDS)
        del self._awaited[MOST_AWAITED:]
        if not self._awaited:
            return
        numbers = [each.number for each, _ in self._awaited]
        found = self._read(min(numbers), max(numbers))
        awaited, self._awaited = self._awaited, []  # only now: a store that fails is asked again
        for entry, age in awaited:
            there, is_placed = found.get(entry.number, (None, False))
            if there == entry and not is_placed:
                self._awaited.append((entry, age))
            elif there != entry:
                self._store.add_note(
                    f"audit log: row {entry.number} of {rfc3339(entry.at)} was committed, and is not in the log, or is"
                    " another one: it was deleted or changed, or a fail-over lost it"
                )
        self._watch_at = now + COVERED_SECONDS if self._awaited else 0.0

    def _read(self, first: int, last: int) -> dict[int, tuple[Entry, bool]]:
        """The rows with numbers from ``first`` to ``last`` as they are, and whether each has its place in the log."""
        found: dict[int, tuple[Entry, bool]] = {}
        beyond = first - 1
        while rows := self._transact(Ask(ReadAudit(beyond, BATCH, through=last))):
            found.update(
                (number, (Entry.of(number, row), row.idx is not None))
                for number, row in rows
                if row.idx is None or row.idx >= 0
            )
            beyond = rows[-1][0]
        return found

    def checkpoint(self, *, writes: bool = True) -> Note | None:
        """Sign the present state of the log, if it is new, into the file; None before the log has begun.

        Without ``writes`` the file is only read.

        Raises `LogError` if the log does not extend the checkpoint in the file, `StoreError`, and `KeyUnavailable`,
        `SealBroken` or `ConfigurationError` for a key or file that cannot be used.
        """
        signer = self._signer = self._signer or self._key()
        if signer is None:
            return None
        written_at = _written_at(self._file)  # before it is read: another worker may replace it
        held, note, signed_by = self._held(signer)
        try:
            found = self._transact(ReadCheckpoint(held))
        except LogError:
            if held is None or not writes:
                raise
            lost_at = self._transact(Ask(ReadLossDecided()))
            other = self._key(lost_at) if lost_at >= written_at else None  # what was signed later was not lost then
            if other is None or other == signed_by:
                raise
            self._put_aside(held, note)
            found, held = self._transact(ReadCheckpoint()), None
        if found is None or (held is not None and held.size >= found.size):
            return note
        signer = self._signer = self._key() or signer  # another server may have made one after a loss
        note = signer.sign(found.text)
        if self._file is not None and writes:
            write_file(self._file, str(note).encode(), mode=0o644)
            _ = self._signed(note)
        return note

    def _held(self, signer: Signer) -> tuple[Checkpoint | None, Note | None, Signer]:
        """The checkpoint in the file, and the key that signed it: ``signer``, or another one of the log."""
        if self._file is None or not is_there(self._file):
            return None, None, signer
        data = read_file(self._file, limit=LARGEST_NOTE, plain=True)
        try:
            return (*open_checkpoint(data, signer.verifier), signer)
        except LogError as exc:
            fault = LogError(f"{self._file}: {exc}; if the log is right, move the file away")
        for other in self._transact(ReadLogKeys(self._vault())):
            with suppress(LogError):
                return (*open_checkpoint(data, other.verifier), other)
        raise fault

    def _put_aside(self, held: Checkpoint, note: Note | None) -> None:
        if self._file is not None:  # not renamed: another worker may have replaced it
            write_file(self._file.with_name(f"{self._file.name}.{held.size}"), str(note).encode(), mode=0o644)
        self._store.add_note(
            f"audit log: of {held.size} entries some were lost, as an operator decided; it goes on under a new key"
        )

    def _key(self, lost_at: int = 0) -> Signer | None:
        entropy = Secret(os.urandom(SEED_SIZE + NONCE_SIZE))
        return self._transact(OpenLogKey(int(time.time()), self._vault(), entropy, lost_at))

    def _transact(self, unit: Unit[T]) -> T:
        return self._store.transact(unit)


def _written_at(file: Path | None) -> int:
    """When a file was written (unix seconds); 0 if there is none."""
    try:
        return 0 if file is None else int(file.stat().st_mtime)
    except FileNotFoundError:
        return 0


@contextmanager
def sequencing(
    store: DurableStore,
    vault: Callable[[], Vault],
    origin: str | None,
    file: Path | None,
    signed: Callable[[Note], object] = lambda _: None,
) -> Generator[None]:
    """Sequence in a thread while the block runs; see `Sequencer`."""
    sequencer = Sequencer(store, vault, origin, file, signed)
    thread = threading.Thread(target=sequencer.run, name="sequencer of the audit log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sequencer.stop()
        thread.join()
