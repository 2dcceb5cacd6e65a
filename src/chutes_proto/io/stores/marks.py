"""The mark of a store in memory and in a file: compared with the store all the time, written beside the requests.

Rules kept here:

* a store is compared when it is opened, at each new connection, and once a second while it is used; one that is behind
  is refused until it is right again, or an operator has decided;
* only a server writes the file: at most once a second, in a thread of its own, and as a whole or not at all;
* a file that is not a mark, or another store's, is refused and left as it is;
* the newest checkpoint of the audit log belongs to the mark: a store whose log is smaller, or has another root at that
  size, is refused, too. Where a tile is missing, the roots cannot be compared: the sequencer mends it, or tells;
* a checkpoint that is missing beside a mark, or that no key of the log has signed, is told when the store is opened.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any, Final, TypeAlias

from attrs import evolve

from chutes_proto.errors import ConfigurationError, LogError, StoreError
from chutes_proto.io.files import is_there, read_file, reason, write_file
from chutes_proto.store._copies import Copies
from chutes_proto.store._custody import Custody, epoch_of_store
from chutes_proto.store._macs import EpochKey
from chutes_proto.store._mark import COLUMNS, LARGEST, Entry, Mark, View, find_loss
from chutes_proto.store._rows import AuditRow, PurgeAudit
from chutes_proto.store._store_group import check_fact, check_head
from chutes_proto.tlog.merkle import root_hash
from chutes_proto.tlog.notes import LARGEST_NOTE, Checkpoint, Note, Signer, open_checkpoint
from chutes_proto.tlog.tiles import reader

LOOK_SECONDS: Final = 1.0
"""The longest time between two comparisons of a store in use, and the shortest between two writes of the file."""

FIRST_CHECKPOINT_SECONDS: Final = 60
"""How long after the log got its key its first checkpoint may be missing: another worker is about to write it."""
_SAME_SECONDS: Final = 3600
"""How far apart in time rows may be whose order in the log is not that of their numbers. Generous."""
_WATCHED: Final = 100_000
"""The most rows that a process remembers until they are in the log."""
_NOTES: Final = 1000
"""The most findings that are kept, the newest: a fail-over may lose many rows."""
_NEWEST: Final = 32
"""How many rows a server adopts at each comparison."""

NO_FILE: Final = (
    "store.mark_file: not set, so that after a restart this server takes a store that went back, or another one in its"
    " place; name a file that only this server can write"
)
"""The finding about a server that keeps its mark in memory alone."""

_FACTS: Final = (
    "SELECT (SELECT value FROM fact WHERE name = 'store_id'), (SELECT value FROM fact WHERE name = 'loss_decided_at'),"
    " (SELECT value FROM fact WHERE name = 'seal')"
)
_WITH_HEAD: Final = f"{_FACTS}, version, contents, mac FROM store_head WHERE name = 'store'"
"""The same of a store with a key of the rows, and its head as it was at that moment."""
_ROWS: Final = f"SELECT {COLUMNS} FROM audit"  # noqa: S608 - names of ours
_ROW: Final = f"{_ROWS} WHERE id = ?"
"""A row by its number, a parameter: SQLite keeps a statement that has been prepared by its text."""

_NO_NUMBER: Final = -1
"""In place of a number of a store that no release draws: a file with one could not be read again."""
_RIGHT_ONE: Final = "name the right store, or move the file away"
_LOST_ONE: Final = "name the right store, or restore its backup; move the file away only if a new store shall begin"
"""Without the mark a server makes an empty store, and gives each VM new keys, which open no disk."""

Change: TypeAlias = "tuple[int, AuditRow] | PurgeAudit"
"""A change of audit rows: one that was added, with its number, or a purge."""
Copy: TypeAlias = Callable[[Sequence[tuple[int, AuditRow]]], object]
Ask = Callable[[str], Sequence[Sequence[Any]]]
"""Runs a constant statement in a transaction and returns its rows."""
Find = Callable[[str, tuple[int]], Sequence[Sequence[Any]]]
"""Runs a statement with the number of a row likewise."""


class MarkKeeper:
    """The mark of the store ``name``; ``path`` is its file, None to keep it in memory alone.

    ``custody`` tells whether an operator's decision that the store has was made by one who holds its keys, and hears
    here the epoch of the store of the mark.

    May be used from several threads. Raises `StoreError` for a file that is not a mark.
    """

    def __init__(self, name: str, path: Path | None, custody: Custody) -> None:
        self.notes: list[str] = []
        self.warning: str = ""
        """Why the file is not as new as the mark; empty if it is, and without a file."""
        self.audited: threading.Event = threading.Event()
        """Set when this process has added audit rows, and committed that."""
        self.copies: Copies = Copies()
        """The state of these copies."""
        self.copy: Copy | None = None
        """Copies rows that this process has added, once that is committed; whatever it raises, the caller gets."""
        self._name = name
        self._path = path
        self._custody = custody
        self._lock = threading.Lock()
        self._looked_at = -LOOK_SECONDS
        self._is_behind = False
        self._mark = self._read()
        self._written: Mark | None = self._mark
        self._checkpoint = _read_checkpoint(path)
        self._is_checkpoint_looked_at = False
        self._noted: list[tuple[Change, float]] = []  # and when; not yet in the next one, nor in the mark
        self._acknowledged: dict[int, tuple[Entry, float]] = {}
        self._ending = threading.Event()
        self._writer: threading.Thread | None = None
        if self._mark is not None:
            custody.require_epoch(self._mark.epoch)

    @property
    def store_id(self) -> int:
        """The random number of the store that was compared."""
        with self._lock:
            return self._mark.store_id if self._mark is not None else 0

    @property
    def head(self) -> int:
        """The highest version of the store's head that was seen, 0 if none was."""
        with self._lock:
            return 0 if self._mark is None else self._mark.head

    def note_epoch(self, epoch: int) -> None:
        """Note the epoch of the store; one of an older epoch is refused from now on."""
        self._custody.require_epoch(epoch)
        with self._lock:
            if self._mark is not None and self._mark.epoch < epoch:
                self._mark = evolve(self._mark, epoch=epoch)

    def is_due(self) -> bool:
        """Return whether the store must be compared before it is used."""
        with self._lock:
            return self._is_behind or time.monotonic() - self._looked_at > LOOK_SECONDS

    def has_newest(self, find: Find) -> bool:
        """Return whether the store has the newest row of the mark."""
        with self._lock:
            mark = self._present()
        newest = mark.entries[-1] if mark and mark.entries else None
        return newest is None or _entries(find(_ROW, (newest.number,))) == (newest,)

    def note(self, changes: Iterable[Change]) -> None:
        """Note rows that this process has added and purged, once that is committed.

        A caller waits for it, so the mark has them only when somebody asks for it next, once a second at least.
        """
        noted, now = list(changes), time.monotonic()
        if not noted:
            return
        with self._lock:
            self._noted += [(change, now) for change in noted]
        self.audited.set()
        added = [change for change in noted if not isinstance(change, PurgeAudit)]
        if added and self.copy is not None:
            _ = self.copy(added)

    def note_heads(self, heads: Mapping[tuple[str, str], int]) -> None:
        """Note the versions of heads in a transaction that was committed."""
        with self._lock:
            self._custody.seen.note(heads, time.monotonic())

    def _present(self) -> Mark | None:
        """The mark with all that was noted. The caller holds the lock."""
        noted, self._noted = self._noted, []
        added: list[Entry] = []
        for change, at in noted:
            if isinstance(change, PurgeAudit):
                self._mark = self._mark and self._mark.with_entries(added).without(change)
                added.clear()
            else:
                entry = Entry.of(*change)
                added.append(entry)
                if self._writer is not None and len(self._acknowledged) < _WATCHED:
                    self._acknowledged[entry.number] = entry, at
        if added:
            self._mark = self._mark and self._mark.with_entries(added)
        return self._mark

    def hold(self, checkpoint: Checkpoint) -> None:
        """Refuse a store whose audit log does not extend ``checkpoint``, which was signed just now."""
        with self._lock:
            self._checkpoint = checkpoint, int(time.time())

    def take_acknowledged(self, age: float) -> list[tuple[Entry, float]]:
        """Return, once, the rows that this process committed at least ``age`` seconds ago, each with its age now.

        Only a server, which keeps a mark, has any; of very many at a time some are left out.
        """
        now = time.monotonic()
        with self._lock:
            _ = self._present()
            due = [(entry, now - at) for entry, at in self._acknowledged.values() if now - at >= age]
            for entry, _ in due:
                del self._acknowledged[entry.number]
        return due

    def add_note(self, note: str) -> None:
        """Add a finding, once."""
        if note not in self.notes:
            self.notes.append(note)
            del self.notes[:-_NOTES]

    def refuse_new(self, state: str) -> None:
        """Raise `StoreError` if there is a mark: a store that is made now is not the one that it is of."""
        with self._lock:
            mark = self._mark
        if mark is not None:
            raise self._refused(mark, f"{state}, so it is not the store of this mark", _LOST_ONE)

    def compare(self, ask: Ask, timeline: int) -> None:
        """Compare the store, and adopt its newest rows. Raises `StoreError` for one that is behind."""
        with self._lock:
            mark = self._present()
        view = _view(ask, mark, timeline, self._custody)
        now = int(time.time())
        if mark is not None and view.store_id != mark.store_id:
            raise self._refused(mark, "it is not the store of this mark", _RIGHT_ONE)
        if mark is not None and view.epoch < mark.epoch:
            with self._lock:
                self._is_behind = True
            raise self._refused(
                mark,
                f"its rows are of epoch {view.epoch}, and rows of epoch {mark.epoch} were seen: it is from before a"
                " key-encryption key (KEK) was rotated",
                "restore a newer backup, or, if this one is right, as after a fail-over that lost the rotation, stop"
                " all servers, move that file alone away on each, and not those beside it, go on by"
                " `chutes-proto store restored`, start them and rotate again",
            )
        loss = None if mark is None else find_loss(mark, view, now)
        if loss is None:
            self._compare_log(ask, view, mark, now)
        if mark is not None and loss is not None and not loss.is_accepted:
            with self._lock:
                self._is_behind = True
            raise self._refused(
                mark,
                f"{loss.why}; it was restored, or a fail-over lost them",
                "mend the fail-over, or go on without them by `chutes-proto store restored`",
            )
        if loss is not None:
            self._check_decision(ask, view)
            _redate(checkpoint_path(self._path), view.decided_at, now)
        if not self._is_checkpoint_looked_at:
            self._tell_of_checkpoint(ask)
        is_decided = mark is not None and view.head > mark.head and view.decided_at > mark.decided_at
        with self._lock:
            if loss is not None or is_decided:  # then VMs may be older, too
                self._custody.seen.clear()
            if loss is not None:
                self.notes.append(f"store: {loss.why}; an operator has decided to go on")
                self._checkpoint = None
            if mark is None or loss is not None:
                self._mark = view.mark
            elif self._mark is not None:  # others of this process may have noted more meanwhile
                self._mark = view.adopted(mark, self._mark)
            self._is_behind = False
            self._looked_at = time.monotonic()

    def _compare_log(self, ask: Ask, view: View, mark: Mark | None, now: int) -> None:
        """Compare the audit log with the checkpoint. Raises `StoreError`, unless an operator has decided since."""
        with self._lock:
            held = self._checkpoint
        why = "" if held is None else _log_fault(ask, held[0])
        if held is None or not why:
            return
        if view.is_decided_since(held[1], mark, now):
            self._check_decision(ask, view)
            _redate(checkpoint_path(self._path), view.decided_at, now)
            with self._lock:
                self.notes.append(f"store: {why}; an operator has decided to go on")
                self._checkpoint = None
            return
        with self._lock:
            self._is_behind = True
        raise StoreError(
            f"store {self._name}: {why}; find what was changed with `chutes-proto audit verify`, and go on by"
            " `chutes-proto store restored`; nothing was changed"
        )

    def _tell_of_checkpoint(self, ask: Ask) -> None:
        """Note a checkpoint that is missing beside a mark, or that no key of the log has signed: a finding, once.

        While the first one may be missing, this is asked again.
        """
        self._is_checkpoint_looked_at = True
        path = checkpoint_path(self._path)
        if path is None:
            return
        if not is_there(path):
            made = ask("SELECT min(created_at) FROM keyring WHERE kind = 'audit'")[0][0]
            is_new = type(made) is int and abs(time.time() - made) < FIRST_CHECKPOINT_SECONDS
            if self._written is None or made is None:
                return
            self._is_checkpoint_looked_at = not is_new
            if not is_new:
                self.add_note(
                    f"audit log: {path} is missing beside the mark, so the log is not compared with what was signed"
                    " before; see `chutes-proto audit verify` with a checkpoint that is kept elsewhere"
                )
            return
        state = ask("SELECT origin FROM log_state WHERE log = 'audit'")
        faults: list[str] = []
        for seed in self._custody.opened("audit", ask) if state else ():
            try:
                _ = open_checkpoint(read_file(path, limit=LARGEST_NOTE, plain=True), Signer(state[0][0], seed).verifier)
            except (ConfigurationError, LogError, OSError) as exc:
                faults.append(reason(exc, path))
            else:
                return
        if faults:  # the words of the sequencer, which signs nothing then
            advice = _advice(path, "if the log is right, move the file away")
            self.add_note(f"audit log: {path}: {faults[0]}; {advice}")

    def _check_decision(self, ask: Ask, view: View) -> None:
        """Refuse a decision that nobody made who holds the store's keys. Raises `StoreError`."""
        try:
            check_fact(self._custody, "loss_decided_at", view.decided_at, ask)
        except StoreError:
            with self._lock:
                self._is_behind = True
            raise

    def keep(self) -> None:
        """Write the file from now on, until `close`."""
        if self._path is None:
            self.add_note(NO_FILE)
        if self._path is None or self._writer is not None:
            return
        if self._written is None:
            self.notes.append(f"store.mark_file: {self._path} did not exist; a mark of the store begins now")
        self._write()
        writer = threading.Thread(target=self._keep_writing, name="mark of the store", daemon=True)
        writer.start()  # the system may allow none
        self._writer = writer

    def close(self) -> None:
        """Write the file for the last time."""
        self._ending.set()
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _keep_writing(self) -> None:
        while not self._ending.wait(LOOK_SECONDS):
            self._write()
        self._write()

    def _write(self) -> None:
        with self._lock:
            mark = self._present()
        if self._path is None or mark is None or mark == self._written:
            return
        try:
            if mark.store_id == _NO_NUMBER:
                raise ConfigurationError(
                    f"{self._path} is not written: somebody changed the number of the store, which is the fact store_id"
                )
            write_file(self._path, mark.to_bytes(), mode=0o600)
        except (ConfigurationError, OSError) as exc:
            self.warning = f"store.mark_file: {exc}"
        else:
            self._written, self.warning = mark, ""

    def _read(self) -> Mark | None:
        if self._path is None:
            return None
        try:
            if not is_there(self._path):
                return None
            return Mark.from_bytes(read_file(self._path, limit=LARGEST, plain=True))
        except (ConfigurationError, OSError) as exc:
            advice = _advice(self._path, "if the store is right, move the file away, and the server begins another")
            raise StoreError(
                f"store {self._name}: mark_file {self._path}: {reason(exc, self._path)}; {advice}"
            ) from None

    def _refused(self, mark: Mark, why: str, remedy: str) -> StoreError:
        where = f" in {self._path}" if self._path is not None else " in memory"
        seen = f"; the mark{where} is of timeline {mark.timeline}" if mark.timeline else f"; the mark is{where}"
        return StoreError(f"store {self._name}: {why}{seen}; {remedy}; nothing was changed")


class MarkedStore:
    """The part of a durable store that its mark does for it."""

    custody: Custody
    audit_waits: float = 0.0
    """See `DurableStore.audit_waits`."""
    log_warning: str = ""
    """See `DurableStore.log_warning`."""
    _marks: MarkKeeper

    def _committed(self, changes: Iterable[Change], heads: Mapping[tuple[str, str], int], key: EpochKey | None) -> None:
        """Note that a transaction was committed, whose rows had MACs under this key; None if nobody has it here."""
        self._marks.note_heads(heads)
        self._marks.note(changes)
        if key is not None:
            self._marks.note_epoch(key.epoch)

    def keep_mark(self) -> None:
        """Write the file of the mark from now on, as a server does."""
        self._marks.keep()

    @property
    def mark_warning(self) -> str:
        """Why the file of the mark cannot be written now; empty while it can."""
        return self._marks.warning

    @property
    def store_id(self) -> int:
        """The random number of this store, which a restored backup of it has, too, and no copy."""
        return self._marks.store_id

    @property
    def audited(self) -> threading.Event:
        """Set when this process has added audit rows, and committed that."""
        return self._marks.audited

    def hold_checkpoint(self, checkpoint: Checkpoint) -> None:
        """See `DurableStore.hold_checkpoint`."""
        self._marks.hold(checkpoint)

    def take_acknowledged(self, age: float) -> list[tuple[Entry, float]]:
        """See `DurableStore.take_acknowledged`."""
        return self._marks.take_acknowledged(age)

    def copy_rows(self, copy: Copy) -> None:
        """See `DurableStore.copy_rows`."""
        self._marks.copy = copy

    @property
    def copies(self) -> Copies:
        """See `DurableStore.copies`."""
        return self._marks.copies

    def add_note(self, note: str) -> None:
        """Add a finding that an operator should know, once."""
        self._marks.add_note(note)


def checkpoint_path(mark_file: Path | None) -> Path | None:
    """The file of the checkpoint that belongs to a mark."""
    return None if mark_file is None else mark_file.with_name(f"{mark_file.name}.checkpoint")


def _read_checkpoint(mark_file: Path | None) -> tuple[Checkpoint, int] | None:
    """The checkpoint beside a mark, and when it was written; None if there is none that can be read."""
    path = checkpoint_path(mark_file)
    try:
        if path is None or not is_there(path):
            return None
        return Checkpoint.of(Note.parse(read_file(path, limit=LARGEST_NOTE, plain=True))), int(path.stat().st_mtime)
    except (ConfigurationError, LogError, OSError):
        return None  # the sequencer, which needs it, tells the operator


def _redate(checkpoint: Path | None, decided_at: int, now: int) -> None:
    """Let a decision count for a checkpoint that a clock which was ahead has dated into the future."""
    with suppress(OSError):  # the sequencer, which needs the file, tells the operator
        if checkpoint is not None and checkpoint.stat().st_mtime > now + 1:
            os.utime(checkpoint, (decided_at, decided_at))


def _log_fault(ask: Ask, held: Checkpoint) -> str:
    """Why the audit log of a store does not extend a checkpoint; empty if it does, or if a tile is missing."""
    rows = ask("SELECT size FROM log_state WHERE log = 'audit'")
    size: int = rows[0][0] if rows and type(rows[0][0]) is int else 0
    if size < held.size:
        return (
            f"its audit log has {size} entries, and a checkpoint of {held.size} was signed: {held.size - size} are lost"
        )

    def fetch(level: int, number: int) -> bytes:
        found = ask(f"SELECT hashes FROM log_tile WHERE level = {level:d} AND tile = {number:d}")  # noqa: S608 - numbers
        return found[0][0] if found and type(found[0][0]) is bytes else b""

    try:
        is_same = root_hash(reader(fetch), held.size) == held.root
    except LogError:
        return ""
    return "" if is_same else f"its audit log was rewritten: it is not as the checkpoint of {held.size} entries has it"


def _view(ask: Ask, mark: Mark | None, timeline: int, custody: Custody) -> View:
    (facts,) = ask(_FACTS)
    with_head = ask(_WITH_HEAD) if epoch_of_store(facts[2]) else ()
    store_id, decided_at, seal, *stored = with_head[0] if with_head else facts
    head, head_mac = 0, ""
    try:
        if stored and type(stored[0]) is int and type(stored[2]) is bytes:
            check_head(custody, seal, stored, decided_at, ask)
            head, head_mac = stored[0], stored[2].hex()
    except StoreError:  # every unit that reads it is refused; a mark must not have what nobody authenticated
        head, head_mac = (0, "") if mark is None else (mark.head, mark.head_mac)
    entries = _entries(ask(f"{_ROWS} ORDER BY id DESC LIMIT {_NEWEST}"))
    has_older = False
    if mark is not None and mark.entries:
        read = {entry.number for entry in entries}
        numbers = ", ".join(str(entry.number) for entry in mark.entries if entry.number not in read)
        entries += _entries(ask(f"{_ROWS} WHERE id IN ({numbers})")) if numbers else ()
        if missing := mark.missing(entries):
            # A purge goes by the log, and rows of transactions at the same time are there in another order.
            last, before = missing[-1], missing[-1].at - _SAME_SECONDS
            has_older = bool(ask(f"SELECT 1 FROM audit WHERE id < {last.number} AND at < {before} LIMIT 1"))  # noqa: S608
    epoch = epoch_of_store(seal)
    if store_id is not None and not (type(store_id) is int and store_id >= 0):
        store_id = _NO_NUMBER
    return View(store_id or 0, timeline, decided_at or 0, entries, has_older, head, head_mac, epoch)


def _entries(rows: Sequence[Sequence[Any]]) -> tuple[Entry, ...]:
    """The entries of rows. A row that no server can have written has none: a mark with it could not be read again."""
    return tuple([Entry.of_columns(*row) for row in rows if _is_possible(row)])


def _advice(path: Path, otherwise: str) -> str:
    """Advise on a file that cannot be used. One that may not be read may well be whole."""
    is_readable = os.access(path, os.R_OK, effective_ids=True)
    return otherwise if is_readable else "give it, and its folder, to the user of the server"


def _is_possible(row: Sequence[Any]) -> bool:
    """Whether number and time are natural numbers, and all else is text or NULL: who writes the database may differ."""
    number, at, *texts = row
    return type(number) is type(at) is int and min(number, at) >= 0 and {*map(type, texts)} <= {str, NoneType}
