"""Copies of a server's audit rows, beside its requests: each sink has a thread and a queue of its own.

Rules kept here:

* a row is queued when its transaction is committed. A sink that fails, a disk that hangs and a queue that is full are
  logged and counted, and hold up no commit, no other sink and no end of the process. Rows that it lacks are
  in the store: `audit export`;
* with ``audit.required`` nothing is queued: the answer waits for the sinks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Final

from chutes_proto.io.server.sinks import Sink, Sinks, checkpoint_line, row_line
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.store._rows import AuditRow

QUEUED: Final = 10_000
"""The most transactions whose rows wait for a sink."""
HANGS_SECONDS: Final = 10.0
"""A write that takes longer is a failure."""
STOP_SECONDS: Final = 5.0
"""How long the end of a process waits for all sinks."""


class _Copier:
    """Writes lines to one sink, in a thread."""

    def __init__(self, store: DurableStore, sink: Sink) -> None:
        self._sinks = Sinks([sink], required=False, tell=store.add_note, copies=store.copies)
        self._name = sink.name
        self._waiting = SimpleQueue[Sequence[str] | None]()
        self._writes_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="copies of audit rows", daemon=True)
        self._thread.start()

    def put(self, lines: Sequence[str]) -> None:
        """Queue lines; waits for nothing."""
        since = self._writes_since
        hangs = since is not None and time.monotonic() - since > HANGS_SECONDS
        if hangs or self._waiting.qsize() >= QUEUED:
            self._sinks.missed(self._name, f"{self._name}: it takes too long", len(lines))
        else:
            self._waiting.put(lines)

    def stop(self) -> None:
        """End the thread once all that is queued is written."""
        self._waiting.put(None)

    def join(self, seconds: float) -> None:
        """Wait for that so long; a sink that hangs is left."""
        self._thread.join(max(0.0, seconds))

    def _run(self) -> None:
        while (lines := self._waiting.get()) is not None:
            self._writes_since = time.monotonic()
            _ = self._sinks.write(lines)
            self._writes_since = None


@contextmanager
def copying(store: DurableStore, sinks: Sequence[Sink], *, required: bool) -> Generator[Callable[[str], None]]:
    """Copy the rows of ``store`` to ``sinks`` while the block runs; yields what copies a checkpoint."""
    if required:
        all_at_once = Sinks(sinks, required=True, tell=store.add_note, copies=store.copies)
        store.copy_rows(all_at_once.rows)
        yield all_at_once.checkpoint
        return
    copiers = [_Copier(store, sink) for sink in sinks]

    def put(lines: Sequence[str]) -> None:
        for copier in copiers:
            copier.put(lines)

    def rows(rows: Sequence[tuple[int, AuditRow]]) -> None:
        put([row_line(*each) for each in rows])

    if copiers:
        store.copy_rows(rows)
    try:
        yield lambda note: put([checkpoint_line(note)])
    finally:
        until = time.monotonic() + STOP_SECONDS
        for copier in copiers:
            copier.stop()
        for copier in copiers:
            copier.join(until - time.monotonic())
