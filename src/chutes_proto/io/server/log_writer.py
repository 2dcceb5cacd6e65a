"""A server's log on standard error, which never blocks the server, even if nobody reads it.

Rules kept here:

* one thread writes the records in their order, each in one write;
* at most `MAX_WAITING` of them wait, and of those that a stranger may cause, half as many; further ones are counted,
  as are those that a full disk did not take, and the count is written before the next record that can wait. Decisions
  are not lost: the store's audit has them;
* of a record that was written in part, the rest is missing: the next begins on a line of its own;
* at the end, waiting records have `FLUSH_SECONDS`.
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

MAX_WAITING: Final = 1000
FLUSH_SECONDS: Final = 1.0

_Waiting = tuple[bytes, int]
"""A line, and how many records it stands for."""


class LogWriter:
    """Writes records to ``descriptor``, or to standard error; nowhere if the process has none.

    It does not use Python's own stream, because Python waits for the lock of that stream when it ends.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = _standard_error() if descriptor is None else descriptor
        self._waiting = Queue[_Waiting | None](MAX_WAITING)
        self._lock = Lock()
        self._missing = 0
        self._thread = Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def __call__(self, record: Record) -> None:
        """Queue one line of JSON, without waiting. May be called in every thread."""
        with self._lock:
            if record.is_noise and self._waiting.qsize() >= MAX_WAITING // 2:
                self._missing += 1
                return
            try:
                if self._missing:
                    self._waiting.put_nowait(_incomplete(self._missing))
                    self._missing = 0
                self._waiting.put_nowait((_line(record), 1))
            except Full:
                self._missing += 1

    def close(self) -> None:
        """Wait until all is written, for at most `FLUSH_SECONDS`. Later records are lost."""
        end = time.monotonic() + FLUSH_SECONDS
        with self._lock:  # not for longer: a thread that logs meanwhile must not wait
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
    """Return its descriptor; a process may begin without, and then a file may have its number."""
    return os.open(os.devnull, os.O_WRONLY) if sys.stderr is None else sys.stderr.fileno()


def _incomplete(missing: int) -> _Waiting:
    return _line(Record(Level.WARNING, "log_incomplete", {"missing": missing})), missing


def _line(record: Record) -> bytes:
    return record.as_json(datetime.now(UTC).isoformat(timespec="milliseconds")).encode() + b"\n"
