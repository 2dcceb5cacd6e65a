"""The audit log outside the database: checkpoints in files, and a directory of tiles that any tlog client reads."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from attrs import frozen

from chutes_proto.errors import LogError, PurgedMeanwhile, StoreAway, StoreBusy, StoreError
from chutes_proto.io.files import is_there, make_directory, read_file, write_file
from chutes_proto.store._rows import AuditRow, AuditWanted, LogStateRow, Read, ReadAudit, ReadLog, ReadTile
from chutes_proto.store._run import Ask, Store
from chutes_proto.tlog.check import Report, check_log
from chutes_proto.tlog.merkle import HASH_SIZE, leaf_hash
from chutes_proto.tlog.notes import LARGEST_NOTE, Checkpoint, Note, Verifier
from chutes_proto.tlog.tiles import LARGEST_ENTRY, WIDTH, Fetch, Place, bundle, places, unbundle
from chutes_proto.units.log import LOG, VmChains, announced_minimum, entry_text, leaf_of

CHECKPOINT: Final = "checkpoint"
KEY: Final = "key"
"""The files of an exported log beside its tiles: the newest checkpoint, and the verifier key."""

_PAGE: Final = 1000
_LONGEST_SHOWN: Final = 255
_MOST_ABSENT: Final = 1000
"""After so many absent files in a row, the next one that is there is searched for: a log may say any size."""
_LARGEST_BUNDLE: Final = WIDTH * (2 + LARGEST_ENTRY)


def read_checkpoint(path: Path, verifiers: Sequence[Verifier], *, plain: bool = False) -> Checkpoint:
    """Read the checkpoint in a file, which one of the keys has signed; ``plain`` as of `read_file`.

    Raises `LogError` for another log's, and `FileUnavailable`.
    """
    try:
        note = Note.parse(read_file(path, limit=LARGEST_NOTE, plain=plain))
        checkpoint = Checkpoint.of(note)
        of_log = [each for each in verifiers if each.name == checkpoint.origin]
        if not of_log:
            raise LogError(f"it is a checkpoint of another log, {checkpoint.origin[:_LONGEST_SHOWN]}")
        signers = {(each.name, each.identifier) for each in note.signatures}
        known = [each for each in of_log if (each.name, each.identifier) in signers]
        if not known:
            raise LogError("it is not signed by a key of this log")
        for each in known:
            each.verify(note)
    except LogError as exc:
        raise LogError(f"{path}: {exc}") from None
    return checkpoint


# --- in the store ---


def stored_entries(store: Store, first: int, until: int) -> Iterator[tuple[int, bytes]]:
    """The entries of a store from an index on, of which a page at a time is in memory; not those that are damaged.

    An attacker who can write the database can make a row of which no text can be read, and others must be found still.
    """
    while first < until and (page := _page(store, first, min(_PAGE, until - first))):
        for row in page:
            index = row.idx or 0
            if index >= until:
                return
            yield index, entry_text(row).encode()
            first = index + 1


def _page(store: Store, first: int, count: int) -> list[AuditRow]:
    """The next rows that can be read. Raises `StoreError` for a store that is away."""
    try:
        return _placed(store.transact(Ask(ReadLog(first, count))))
    except (StoreAway, StoreBusy):
        raise
    except StoreError:
        state = store.transact(Ask(Read(LogStateRow, LOG)))  # so it is not the store, but one of the rows
    found: dict[int, AuditRow] = {}
    for index in range(first, 0 if state is None else state.size):
        with suppress(StoreError):
            found |= {row.idx or 0: row for row in _placed(store.transact(Ask(ReadLog(index, 1))))}
        if len(found) == count:
            break
    return [*found.values()]


def _placed(rows: Iterable[AuditRow]) -> list[AuditRow]:
    # SQLite has no types: a text as an index comes after all numbers.
    return [row for row in rows if type(row.idx) is int]


def purged_below(store: Store) -> int:
    """The index below which the newest purge deleted entries, as the entry or row says that tells of it; 0 if none."""
    if any(row.idx == 0 for row in _page(store, 0, 1)):
        return 0
    row = _announcement(store)
    return 0 if row is None else announced_minimum(entry_text(row).encode())


def _announcement(store: Store) -> AuditRow | None:
    """The newest audit row that tells of a purge: an entry, or one that will be. A forged one excuses nothing."""
    wanted, number = AuditWanted(event="audit purged"), 1 << 62
    while found := store.transact(Ask(ReadAudit(number, 1, backwards=True, wanted=wanted))):
        ((number, row),) = found
        if row.idx is None:
            return row
        state = store.transact(Ask(Read(LogStateRow, LOG)))
        if type(row.idx) is int and state is not None and 0 <= row.idx < state.size:
            at = row.idx % WIDTH * HASH_SIZE
            if stored_tiles(store)(0, row.idx // WIDTH)[at : at + HASH_SIZE] == leaf_of(row):
                return row
    return None


def stored_tiles(store: Store) -> Fetch:
    """The tiles of a store."""

    def fetch(level: int, number: int) -> bytes:
        row = store.transact(Ask(ReadTile(level, number)))
        return row.hashes if row is not None and type(row.hashes) is bytes else b""  # SQLite takes any type

    return fetch


def check_stored(
    store: Store,
    size: int,
    checkpoints: Iterable[Checkpoint],
    tell: Callable[[int, int], object],
    stated: Checkpoint | None = None,
) -> Report:
    """Check the log of a store; ``tell`` takes how many entries are checked, and of how many.

    ``stated`` is the state that the store itself has of its log.
    """

    def told() -> Iterator[tuple[int, bytes]]:
        for index, text in stored_entries(store, 0, 1 << 62):
            if not index % _PAGE:
                _ = tell(index, size)
            yield index, text

    newest = _announcement(store)
    is_waiting = newest is not None and newest.idx is None
    minimum = announced_minimum(entry_text(newest).encode()) if newest is not None and is_waiting else 0
    follow = VmChains().follow_entry
    return check_log(size, told(), stored_tiles(store), checkpoints, announced_minimum, minimum, follow, stated)


# --- in a directory ---


def export_log(store: Store, directory: Path, checkpoint: Checkpoint, note: Note, verifier: Verifier) -> int:
    """Write the log of a store up to ``checkpoint`` into a directory; returns the number of files that were written.

    Files that are there already are left: what they hold never changes. The checkpoint is replaced last. Raises
    `LogError` for a log that lacks what the checkpoint has, or whose entries contradict their tiles, `PurgedMeanwhile`,
    and `FileUnavailable`.
    """
    fetch, size = stored_tiles(store), checkpoint.size
    page = store.transact(Ask(ReadLog(0, 1)))
    first = page[0].idx or 0 if page else size
    if first:
        told = _announcement(store)
        if told is not None and (told.idx is None or told.idx >= size):
            raise PurgedMeanwhile("audit log: a purge deleted entries after the checkpoint was signed; export again")
    written = 0
    for place in places(size, first):
        hashes = fetch(place.level or 0, place.number)[: place.width * HASH_SIZE]
        if len(hashes) != place.width * HASH_SIZE:
            raise LogError(f"{place} lacks a hash; see `chutes-proto audit verify`")
        if place.level == 0:
            begin = place.number * WIDTH
            texts = [text for _, text in stored_entries(store, begin, begin + place.width)]
            if b"".join(map(leaf_hash, texts)) != hashes:  # what is written once is never replaced
                raise LogError(f"{place} contradicts its entries; see `chutes-proto audit verify`")
            written += _write_new(directory / str(Place(None, place.number, place.width)), bundle(texts))
        written += _write_new(directory / str(place), hashes)
    write_file(directory / KEY, f"{verifier}\n".encode())
    write_file(directory / CHECKPOINT, str(note).encode())
    return written


def _write_new(path: Path, data: bytes) -> int:
    if is_there(path):
        return 0
    _ = make_directory(path.parent)
    write_file(path, data)
    return 1


@frozen
class LogDirectory:
    """An exported log, whose newest checkpoint says how large it is."""

    path: Path
    size: int

    def fetch(self, level: int, number: int) -> bytes:
        """The hashes of a tile; none if it is not there."""
        count = self.size >> 8 * level
        return self._read(Place(level, number, min(WIDTH, max(1, count - number * WIDTH))), WIDTH * HASH_SIZE)

    def entries(self) -> Iterator[tuple[int, bytes]]:
        """The entries that there are. Raises `LogError` for a file that is not a bundle of entries."""
        number, count, absent = 0, -(-self.size // WIDTH), 0
        while number < count:
            place = self._bundle(number)
            data = self._read(place, _LARGEST_BUNDLE)
            try:
                for at, text in enumerate(unbundle(data)):
                    yield number * WIDTH + at, text
            except LogError as exc:
                raise LogError(f"{self.path / str(place)}: {exc}; get this file again") from None
            number, absent = number + 1, 0 if data else absent + 1
            if absent > _MOST_ABSENT:
                rest = range(number, count)
                number += bisect_left(rest, True, key=lambda each: is_there(self.path / str(self._bundle(each))))

    def _bundle(self, number: int) -> Place:
        return Place(None, number, min(WIDTH, self.size - number * WIDTH))

    def check(self, checkpoints: Iterable[Checkpoint]) -> Report:
        """Check it whole."""
        return check_log(
            self.size, self.entries(), self.fetch, checkpoints, announced_minimum, 0, VmChains().follow_entry
        )

    def _read(self, place: Place, limit: int) -> bytes:
        path = self.path / str(place)
        return read_file(path, limit=limit, plain=True) if is_there(path) else b""
