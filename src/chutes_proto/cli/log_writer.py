"""A server's log on standard error: whoever reads it, or does not, keeps the server from nothing.

Rules kept here:

* one thread writes the records in their order, each in one write;
* `ROOM` of them may wait; those beyond are counted, as are those that a full disk did not take, and the count is told
  before the next record that there is room for. What was decided stands in the audit, which is the store's;
* at the end what waits has `FLUSH_SECONDS`.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from queue import Full, Queue
from threading import Lock, Thread
from typing import Final

from chutes_proto.log import Level, Record

ROOM: Final = 1000
FLUSH_SECONDS: Final = 1.0


class LogWriter:
    """Writes records to ``descriptor``. Not through Python's own stream, whose lock Python waits for when it ends."""

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._waiting = Queue[tuple[bytes, int] | None](ROOM)  # lines, and how many records each stands for
        self._lock = Lock()
        self._missing = 0
        self._thread = Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def __call__(self, record: Record) -> None:
        """Have one line of JSON written; never waits. May be called in every thread."""
        with self._lock:
            if not self._tell_missing(0.0) or not self._put(record, 1, 0.0):
                self._missing += 1

    def close(self) -> None:
        """Wait until all is written, for at most `FLUSH_SECONDS`. What comes afterwards is lost."""
        end = time.monotonic() + FLUSH_SECONDS
        with self._lock:
            _ = self._tell_missing(FLUSH_SECONDS)
        try:
            self._waiting.put(None, timeout=max(0.0, end - time.monotonic()))
        except Full:
            return
        self._thread.join(max(0.0, end - time.monotonic()))

    def _tell_missing(self, seconds: float) -> bool:
        """Whether nothing is missing that was not told."""
        if self._missing and self._put(
            Record(Level.WARNING, "log_incomplete", {"missing": self._missing}), self._missing, seconds
        ):
            self._missing = 0
        return not self._missing

    def _put(self, record: Record, stands_for: int, seconds: float) -> bool:
        line = record.as_json(datetime.now(UTC).isoformat(timespec="milliseconds")).encode() + b"\n"
        try:
            self._waiting.put((line, stands_for), block=seconds > 0, timeout=seconds)
        except Full:
            return False
        return True

    def _write(self) -> None:
        while waiting := self._waiting.get():
            line, stands_for = waiting
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError:
                with self._lock:
                    self._missing += stands_for
