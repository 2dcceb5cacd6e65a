"""A server's log on standard error: whoever reads it, or does not, keeps the server from nothing.

Rules kept here:

* one thread writes the records in their order, each in one write;
* `ROOM` of them may wait; those beyond are counted, as are those that a full disk did not take, and the count is told
  before the next record that there is room for. What was decided stands in the audit, which is the store's;
* of a record that was taken in part, the rest is missing: the next begins on a line of its own;
* at the end what waits has `FLUSH_SECONDS`.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import UTC, datetime
from queue import Full, Queue
from threading import Lock, Thread
from typing import Final

from chutes_proto.log import Level, Record

ROOM: Final = 1000
FLUSH_SECONDS: Final = 1.0

_Waiting = tuple[bytes, int]
"""A line, and for how many records it stands."""


class LogWriter:
    """Writes records to ``descriptor``, or to standard error; where the process has none, nowhere.

    Not through Python's own stream, whose lock Python waits for when it ends.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = _standard_error() if descriptor is None else descriptor
        self._waiting = Queue[_Waiting | None](ROOM)
        self._lock = Lock()
        self._missing = 0
        self._thread = Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def __call__(self, record: Record) -> None:
        """Have one line of JSON written; never waits. May be called in every thread."""
        with self._lock:
            try:
                if self._missing:
                    self._waiting.put_nowait(_incomplete(self._missing))
                    self._missing = 0
                self._waiting.put_nowait((_line(record), 1))
            except Full:
                self._missing += 1

    def close(self) -> None:
        """Wait until all is written, for at most `FLUSH_SECONDS`. What comes afterwards is lost."""
        end = time.monotonic() + FLUSH_SECONDS
        with self._lock:  # not for longer: whoever logs meanwhile does not wait
            missing, self._missing = self._missing, 0
        try:
            for last in ([_incomplete(missing)] if missing else []) + [None]:
                self._waiting.put(last, timeout=max(0.0, end - time.monotonic()))
        except Full:
            return
        self._thread.join(max(0.0, end - time.monotonic()))

    def _write(self) -> None:
        at_start = True  # of a line
        while waiting := self._waiting.get():
            line, stands_for = waiting
            line = line if at_start else b"\n" + line
            try:
                while line:
                    written = os.write(self._descriptor, line)
                    at_start = line[:written].endswith(b"\n")
                    line = line[written:]
            except OSError:
                with self._lock:
                    self._missing += stands_for


def _standard_error() -> int:
    """Python has none where the process was started without; another file may have got its number since."""
    return os.open(os.devnull, os.O_WRONLY) if sys.stderr is None else sys.stderr.fileno()


def _incomplete(missing: int) -> _Waiting:
    return _line(Record(Level.WARNING, "log_incomplete", {"missing": missing})), missing


def _line(record: Record) -> bytes:
    return record.as_json(datetime.now(UTC).isoformat(timespec="milliseconds")).encode() + b"\n"
