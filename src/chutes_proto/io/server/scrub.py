"""The scrub: a server reads the audit log and the heads of VMs again and again, slowly, and tells each contradiction.

Rules kept here:

* at most 1,000 rows a second, a VM as five, in pages of a tile, of 20 VMs or of 1,000 waiting rows; each is a
  transaction of its own, so a boot waits for one page at most;
* each entry from the lowest that no purge has announced is compared with its tile, each full tile with the hash above
  it. A change that was carried into all tiles is found by the checkpoint beside the mark, with which every look at the
  store compares them;
* the rows of each VM are compared with its head, and its head with the log, and with the audit rows that wait for their
  place in it: who sets a VM back may have stopped the log. A VM of the log of which nothing is left is a finding, too;
* an entry that cannot be read is a finding, and the pass goes on; what a purge deletes meanwhile is none;
* a pass begins an hour after the one before began, or at once if that took longer; the end of the last whole pass, and
  what it found, are metrics.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, TypeAlias

from attrs import define

from chutes_proto.errors import RowNotAuthentic, StoreError
from chutes_proto.io.log_files import purged_below, stored_entries, stored_tiles
from chutes_proto.store._inspection import InspectStore, InspectVms
from chutes_proto.store._rows import LogStateRow, Read, Vm
from chutes_proto.store._run import Ask, Store
from chutes_proto.tlog.merkle import HASH_SIZE, leaf_hash
from chutes_proto.tlog.tiles import WIDTH, fold
from chutes_proto.units.custody import FindGone, FindWaitingFaults
from chutes_proto.units.log import LOG

ROWS_PER_SECOND: Final = 1000
EVERY_SECONDS: Final = 3600.0

Scrub: TypeAlias = Callable[[Store], Iterator[tuple[int, str]]]
"""Reads rows of a store: yields, after each page, how many it has read, and a finding or an empty text."""


def scrub_log(store: Store) -> Iterator[tuple[int, str]]:
    """Compare the entries of the audit log with its tiles; a finding names the first entry of a tile that is wrong."""
    state = store.transact(Ask(Read(LogStateRow, LOG)))
    size = 0 if state is None else state.size
    fetch = stored_tiles(store)
    for number in range(purged_below(store) // WIDTH, -(-size // WIDTH)):
        begin, width = number * WIDTH, min(WIDTH, size - number * WIDTH)
        leaves = {index: leaf_hash(text) for index, text in stored_entries(store, begin, begin + width)}
        hashes = fetch(0, number)
        fault = next((at for at in range(width) if leaves.get(begin + at) != _hash(hashes, at)), None)
        found = "" if fault is None else f"entry {begin + fault} was changed or removed, or its tile was"
        if not found and width == WIDTH and _hash(fetch(1, number // WIDTH), number % WIDTH) != fold(hashes[:_FULL]):
            found = f"entries {begin} to {begin + WIDTH - 1}: their tile contradicts the one above it"
        if found and purged_below(store) > begin:  # a purge has deleted them meanwhile
            found = ""
        yield len(leaves), found and f"audit log: {found}; run `chutes-proto audit verify`"


_FULL: Final = WIDTH * HASH_SIZE


def _hash(hashes: bytes, at: int) -> bytes:
    return hashes[at * HASH_SIZE : (at + 1) * HASH_SIZE]


def scrub_heads(store: Store) -> Iterator[tuple[int, str]]:
    """Compare the rows of each VM, and of the store's own group, with their heads, and these with the log."""
    yield from _faults(store.transact(Ask(InspectStore())), 1)
    number: int | None = _FIRST
    while number is not None:
        waiting, number = store.transact(FindWaitingFaults(number, _WAITING))
        yield 0 if number is None else _WAITING, ""
        yield from ((0, str(each)) for each in waiting)
    after: Vm | None = None
    while True:
        found, after = store.transact(Ask(InspectVms(after, _VMS)))
        yield from _faults(found, _VMS)
        if after is None:
            break
    while True:
        gone, after = store.transact(FindGone(after, _VMS))
        yield from _faults(gone, _VMS)
        if after is None:
            break


def _faults(faults: Iterable[RowNotAuthentic], groups: int) -> Iterator[tuple[int, str]]:
    yield _ROWS_OF_GROUP * groups, ""
    for each in faults:
        yield 0, str(each)


_FIRST: Final = -(1 << 63)
"""A number before that of any audit row: who writes the database can draw one that is negative."""
_WAITING: Final = 1000
"""How many audit rows that wait are looked at in one transaction."""
_VMS: Final = 20
"""How many VMs, or VMs of the log, are looked at in one transaction, beside those of a server."""
_ROWS_OF_GROUP: Final = 5
"""How many rows the look at a VM counts for: a claim, volumes, generations, boots and the head."""

_TOLD: Final = 50
"""The most findings of a pass that are told: a log that is flooded hides what else is in it, and may fill a disk."""
_MORE: Final = (
    f"the scrub of the store found more than {_TOLD} faults and goes on to count them; all are listed by `chutes-proto"
    " store check` and `chutes-proto audit verify`"
)

SCRUBS: Final[tuple[Scrub, ...]] = (scrub_log, scrub_heads)
"""All scrubs, of which each pass has every one."""


@define
class Scrubbed:
    """The last whole pass: when it ended (unix seconds, 0 before the first), the rows it read, and its findings."""

    at: int = 0
    rows: int = 0
    findings: int = 0


class Scrubber:
    """Scrubs a store in a thread; ``tell`` gets the first findings of each pass, and then that there are more."""

    def __init__(self, store: Store, tell: Callable[[str], object]) -> None:
        self._store = store
        self._tell = tell
        self._ending = threading.Event()
        self.last: Scrubbed = Scrubbed()

    def stop(self) -> None:
        """Let `run` end."""
        self._ending.set()

    def run(self) -> None:
        """Scrub until `stop`."""
        while not self._ending.is_set():
            began = time.monotonic()
            with suppress(StoreError):  # `watch_store` tells the operator
                self.scrub()
            _ = self._ending.wait(max(1.0, EVERY_SECONDS - (time.monotonic() - began)))

    def scrub(self) -> None:
        """Make one pass; after `stop` it ends early, and does not count. Raises `StoreError`."""
        passed = Scrubbed()
        for each in SCRUBS:
            for rows, finding in each(self._store):
                passed.rows += rows
                if finding:
                    passed.findings += 1
                    if passed.findings <= _TOLD + 1:
                        _ = self._tell(finding if passed.findings <= _TOLD else _MORE)
                if self._ending.wait(rows / ROWS_PER_SECOND):
                    return
        passed.at = int(time.time())
        self.last = passed


@contextmanager
def scrubbing(scrubber: Scrubber) -> Generator[None]:
    """Scrub in a thread while the block runs."""
    thread = threading.Thread(target=scrubber.run, name="scrub of the store", daemon=True)
    thread.start()
    try:
        yield
    finally:
        scrubber.stop()  # not waited for: its transaction ends by itself, or with the store
