"""The scrub: a server reads the whole audit log again and again, slowly, and tells each contradiction.

Rules kept here:

* at most 1,000 rows a second, in pages of a tile, each a transaction of its own: nothing waits for it;
* each entry is compared with its tile, each full tile with the hash above it. A change that was carried into all tiles
  is found by the checkpoint beside the mark, with which every look at the store compares them;
* a pass begins an hour after the one before began, or at once if that took longer; the end of the last whole pass, and
  what it found, are metrics. Other tables may have scrubs of their own: see `SCRUBS`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Final, TypeAlias

from attrs import define

from chutes_proto.errors import StoreError
from chutes_proto.io.log_files import stored_tiles
from chutes_proto.store._run import Ask, Store
from chutes_proto.store.rows import AuditRow, LogStateRow, Read, ReadLog
from chutes_proto.tlog.merkle import HASH_SIZE
from chutes_proto.tlog.tiles import WIDTH, fold
from chutes_proto.units.log import LOG, leaf_of

ROWS_PER_SECOND: Final = 1000
EVERY_SECONDS: Final = 3600.0

Scrub: TypeAlias = Callable[[Store], Iterator[tuple[int, str]]]
"""Reads rows of a store: yields, after each page, how many it has read, and a finding or an empty text."""


def scrub_log(store: Store) -> Iterator[tuple[int, str]]:
    """Compare the entries of the audit log with its tiles; a finding names the first entry of a tile that is wrong."""
    state = store.transact(Ask(Read(LogStateRow, LOG)))
    size = 0 if state is None else state.size
    page = store.transact(Ask(ReadLog(0, 1)))
    first = size if not page or page[0].idx is None else page[0].idx
    fetch = stored_tiles(store)
    for number in range(first // WIDTH, -(-size // WIDTH)):
        begin, width = number * WIDTH, min(WIDTH, size - number * WIDTH)
        rows = store.transact(Ask(ReadLog(begin, width)))
        hashes = fetch(0, number)
        fault = next((at for at in range(width) if not _fits(rows, hashes, begin, at)), None)
        found = "" if fault is None else f"entry {begin + fault} was changed or removed, or its tile was"
        if not found and width == WIDTH:
            above = fetch(1, number // WIDTH)
            at = number % WIDTH * HASH_SIZE
            if above[at : at + HASH_SIZE] != fold(hashes[: WIDTH * HASH_SIZE]):
                found = f"entries {begin} to {begin + WIDTH - 1}: their tile contradicts the one above it"
        if found:  # not one that a purge has deleted meanwhile
            page = store.transact(Ask(ReadLog(0, 1)))
            if page and page[0].idx is not None and page[0].idx > begin:
                found = ""
        yield len(rows), found and f"audit log: {found}; run `chutes-proto audit verify`"


def _fits(rows: tuple[AuditRow, ...], hashes: bytes, begin: int, at: int) -> bool:
    leaf = hashes[at * HASH_SIZE : (at + 1) * HASH_SIZE]
    return at < len(rows) and rows[at].idx == begin + at and leaf_of(rows[at]) == leaf


SCRUBS: Final[tuple[Scrub, ...]] = (scrub_log,)
"""All scrubs, of which each pass has every one."""


@define
class Scrubbed:
    """The last whole pass: when it ended (unix seconds, 0 before the first), the rows it read, and its findings."""

    at: int = 0
    rows: int = 0
    findings: int = 0


class Scrubber:
    """Scrubs a store in a thread; ``tell`` gets each finding."""

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
                    _ = self._tell(finding)
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
