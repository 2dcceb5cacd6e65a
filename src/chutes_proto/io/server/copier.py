"""Copies of a server's audit rows: each sink has a thread and a queue of its own, and lacks nothing after a failure.

Rules kept here:

* a row is queued when its transaction is committed. A sink that fails, a disk that hangs and a queue that is full are
  told and counted, and hold up no commit, no other sink and no end of the process. With ``audit.required`` nothing is
  queued: the answer waits for the sinks;
* what a sink did not take is read from the store, a page at a time, when it works again, and copied then. A row that is
  committed meanwhile is in a page and in the queue, and is copied once. One that was forged or changed in the database
  is left out, and told;
* up to its position, a number, all rows of this process were copied. A file keeps it, written at most once a second;
  the next process copies all rows beyond it, those of other servers too. A row may be copied twice; none is left out;
* numbers are drawn before the commit, so the position is a minute behind: no unit of a server takes so long;
* each process keeps a lock of its file. One that begins goes on from the lowest position of those that
  have ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from attrs import define, field

from chutes_proto.errors import StoreError
from chutes_proto.io.server.sinks import Sink, Sinks, checkpoint_line, row_line
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.store._run import Ask
from chutes_proto.store.rows import AuditRow, ReadAudit
from chutes_proto.units.log import Written

QUEUED: Final = 10_000
"""The most lines that wait for a sink."""
HANGS_SECONDS: Final = 10.0
"""A write that takes longer is a failure."""
RETRY_SECONDS: Final = 1.0
"""How long a sink that failed is left alone, and the shortest time between two writes of a position."""
SETTLED_SECONDS: Final = 60.0
"""So long after its number was drawn, a row is committed or never will be."""
STOP_SECONDS: Final = 5.0
"""How long the end of a process waits for all sinks; the next process copies what is left."""
PAGE: Final = 1000
_LARGEST: Final = 4096
_NEWEST: Final = 1 << 62


class PositionFile:
    """The file of a process's position in the store ``store_id``, in ``folder``, with a name that begins with ``stem``.

    ``found`` has the lowest position of all processes that have ended; None without one. Raises `OSError`.
    """

    def __init__(self, folder: Path, stem: str, store_id: int) -> None:
        self._store_id = store_id
        self.found: int | None = None
        self._own = _own(folder, stem)
        with ExitStack() as opened:
            ended: list[Path] = []
            positions: list[int | None] = []
            for path in folder.glob(f"{stem}.*"):
                if (descriptor := _locked(path)) is not None:  # its process has ended
                    _ = opened.callback(os.close, descriptor)
                    ended.append(path)
                    positions.append(self._read(descriptor))
            self.found = min((each for each in positions if each is not None), default=None)
            if self.found is not None:
                self.write(self.found)
            for path in ended:
                path.unlink()

    def write(self, position: int) -> None:
        """Keep a position. In one write over the old one: it is as long."""
        line = f'{{"store":{self._store_id:20d},"copied":{position:20d}}}\n'.encode()
        if os.pwrite(self._own, line, 0) != len(line):
            raise OSError("the disk is full")

    def close(self) -> None:
        """Let another process go on from here."""
        os.close(self._own)

    def _read(self, descriptor: int) -> int | None:
        try:
            members = json.loads(os.pread(descriptor, _LARGEST, 0))
            store, copied = int(members["store"]), int(members["copied"])
        except (ValueError, KeyError, TypeError):
            return None
        return copied if store == self._store_id else None


def _own(folder: Path, stem: str) -> int:
    """A new file, opened and locked. Another process may take it before it is locked, as if it had been left behind."""
    while True:
        if (descriptor := _locked(folder / f"{stem}.{os.urandom(4).hex()}", os.O_CREAT)) is not None:
            return descriptor


def _locked(path: Path, flags: int = 0) -> int | None:
    """A file that no other process has locked, opened and locked; None if one has, or has removed it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    except FileNotFoundError:
        if flags & os.O_CREAT:  # the folder is missing
            raise
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    if not os.fstat(descriptor).st_nlink:
        os.close(descriptor)
        return None
    return descriptor


class Copier:
    """Copies the rows of ``store`` to one sink. Its position is kept beside ``mark_file``, or else in memory alone.

    Raises `StoreError`.
    """

    def __init__(self, store: DurableStore, sink: Sink, mark_file: Path | None) -> None:
        self.sinks: Sinks = Sinks([sink], required=False, tell=store.add_note, copies=store.copies, is_caught_up=True)
        self._store = store
        self._name = sink.name
        self._lock = threading.Lock()
        self._queue: list[str] = []
        self._waiting: list[float] = []
        self._is_behind = False
        self._caught_up: deque[set[str]] = deque(maxlen=QUEUED // PAGE)
        self._writes_since: float | None = None
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._newest: deque[tuple[float, int]] = deque()
        self._position: int = self._last()
        self._written_at = 0.0
        self._file: PositionFile | None = None
        if mark_file is None:
            return
        stem = f"{mark_file.name}.copied.{sink.name.partition(':')[0].removeprefix('audit.')}"
        try:
            self._file = PositionFile(mark_file.parent, stem, store.store_id)
        except OSError as exc:
            store.add_note(f"{self._name}: its position is not kept: {mark_file.parent}/{stem}: {exc.strerror or exc}")
            return
        if self._file.found is not None:
            self._position = min(self._position, self._file.found)
        self._keep()

    def put(self, lines: Sequence[str]) -> None:
        """Queue lines; waits for nothing. Those that find no place are read from the store later."""
        with self._lock:
            hangs = self._writes_since is not None and time.monotonic() - self._writes_since > HANGS_SECONDS
            if is_missed := self._is_behind or hangs or len(self._queue) + len(lines) > QUEUED:
                self._is_behind = True
                self._queue.clear()
            else:
                self._queue.extend(lines)
        if is_missed:
            self.sinks.missed(self._name, f"{self._name}: it takes too long", len(lines))
        self._wake.set()

    def write_now(self, lines: Sequence[str]) -> list[str]:
        """Write lines; returns why the sink did not take them, which is copied later then."""
        entered = time.monotonic()
        with self._lock:
            self._waiting.append(entered)
        try:
            if failed := self.sinks.write(lines):
                self._is_behind = True
            return failed
        finally:
            with self._lock:
                self._waiting.remove(entered)

    def run(self) -> None:
        """Copy until `stop`, and then what is queued."""
        with suppress(StoreError):
            _ = self._catch_up()
        while not self._ending.is_set():
            with suppress(StoreError):  # `watch_store` tells the operator
                self._copy()
            if self._is_behind:
                _ = self._ending.wait(RETRY_SECONDS)
            else:
                _ = self._wake.wait(RETRY_SECONDS)
                self._wake.clear()
        with suppress(StoreError):
            self._copy()

    def stop(self) -> None:
        """Let `run` end."""
        self._ending.set()
        self._wake.set()

    def _copy(self) -> None:
        if self._is_behind and not self._catch_up():
            return
        settled = self._settled()
        with self._lock:
            queued, self._queue = self._queue, []
        # Lines and not numbers: a store that went back gives a number to another row, which must be copied.
        lines = [line for line in queued if not any(line in page for page in self._caught_up)]
        if lines and not self._write(lines):
            self._is_behind = True
        if not self._is_behind:
            self._move(settled)

    def _catch_up(self) -> bool:
        """Copy all rows beyond the position, of all servers; returns whether all were copied."""
        with self._lock:
            self._is_behind, self._queue = False, []  # new rows are queued from here on: none falls between
        beyond, is_whole = self._position, False
        try:
            while not self._is_behind and not is_whole:
                settled = self._settled()
                page = self._store.transact(Written(beyond, PAGE))
                lines = [row_line(*each) for each in page.rows]
                if lines and not self._write(lines):
                    break
                for number in page.others:
                    self._store.add_note(f"{self._name}: audit row {number} is not as a unit wrote it, and is left out")
                self._caught_up.append({*lines})
                is_whole = page.last is None
                beyond = beyond if page.last is None else page.last
                self._move(min(beyond, settled))
        finally:
            if not is_whole:
                self._is_behind = True
        return is_whole

    def _write(self, lines: Sequence[str]) -> bool:
        self._writes_since = time.monotonic()
        try:
            return not self.sinks.write(lines)
        finally:
            self._writes_since = None

    # --- the position ---

    def _settled(self) -> int:
        """A number up to which this process has queued, or copied, all rows that it ever will."""
        now = time.monotonic()
        if not self._newest or now - self._newest[-1][0] >= RETRY_SECONDS:
            self._newest.append((now, self._last()))
        while len(self._newest) > 1 and now - self._newest[1][0] >= SETTLED_SECONDS:
            _ = self._newest.popleft()
        at, number = self._newest[0]
        with self._lock:
            hangs = any(now - entered > HANGS_SECONDS for entered in self._waiting)
        return number if now - at >= SETTLED_SECONDS and not hangs else 0

    def _last(self) -> int:
        return max(
            (number for number, _ in self._store.transact(Ask(ReadAudit(_NEWEST, 1, backwards=True)))), default=0
        )

    def _move(self, number: int) -> None:
        if number > self._position:
            self._position = number
            if time.monotonic() - self._written_at >= RETRY_SECONDS:
                self._keep()

    def _keep(self) -> None:
        self._written_at = time.monotonic()
        try:
            if self._file is not None:
                self._file.write(self._position)
        except OSError as exc:
            self._store.add_note(f"{self._name}: its position is not kept: {exc.strerror or exc}")

    def close(self) -> None:
        """Let another process go on from here."""
        self._keep()
        if self._file is not None:
            self._file.close()
            self._file = None


@define
class Copying:
    """All copiers of a process; ``required``: an answer leaves only when every sink has its rows."""

    copiers: Sequence[Copier]
    required: bool
    _threads: list[threading.Thread] = field(init=False, factory=list)

    def rows(self, rows: Sequence[tuple[int, AuditRow]]) -> None:
        """Copy rows that are committed. Raises `StoreError` if they must be, and are not."""
        lines = [row_line(*each) for each in rows]
        if not self.required:
            for copier in self.copiers:
                copier.put(lines)
            return
        failed: list[str] = []
        for copier in self.copiers:
            failed += copier.write_now(lines)
        if failed:
            raise StoreError(f"{failed[0]}; audit.required is set, so the answer does not leave")

    def checkpoint(self, note: str) -> None:
        """Copy a checkpoint; one that a sink does not take is not copied later, as the next one has all that it had."""
        for copier in self.copiers:
            copier.put([checkpoint_line(note)])

    def start(self) -> None:
        """Copy in threads until `stop`."""
        for copier in self.copiers:
            thread = threading.Thread(target=copier.run, name="copies of audit rows", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Copy what is queued. A sink that hangs is left after `STOP_SECONDS`, and locked until the process ends."""
        for copier in self.copiers:
            copier.stop()
        until = time.monotonic() + STOP_SECONDS
        for thread, copier in zip(self._threads, self.copiers, strict=True):
            thread.join(max(0.0, until - time.monotonic()))
            if not thread.is_alive():
                copier.close()


@contextmanager
def copying(
    store: DurableStore, sinks: Sequence[Sink], *, required: bool, mark_file: Path | None
) -> Generator[Copying | None]:
    """Copy the rows of ``store`` to ``sinks`` while the block runs; None without sinks."""
    if not sinks:
        yield None
        return
    made = Copying([Copier(store, sink, mark_file) for sink in sinks], required)
    store.copy_rows(made.rows, waits=required)
    made.start()
    try:
        yield made
    finally:
        made.stop()
