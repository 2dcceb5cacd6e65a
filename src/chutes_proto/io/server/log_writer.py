"""A server's log on standard error, which never blocks the server, even if nobody reads it.

Rules kept here:

* one thread formats and writes the records in their order, each in one write. After it has written all of them it
  rests for `REST_SECONDS`, so that under load it formats many at a time, which takes a small part of the time for each;
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
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Final

from chutes_proto.log import Level, Record, Value

MAX_WAITING: Final = 1000
FLUSH_SECONDS: Final = 1.0
REST_SECONDS: Final = 0.05

_Waiting = tuple[Record, float, int]
"""A record, its unix time in seconds, and how many records it stands for."""


class LogWriter:
    """Writes records to ``descriptor``, or to standard error; nowhere if the process has none.

    It does not use Python's own stream, because Python waits for the lock of that stream when it ends.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = _standard_error() if descriptor is None else descriptor
        self._waiting = SimpleQueue[_Waiting | None]()
        self._lock = Lock()
        self._missing = 0
        self._ending = Event()
        self._thread = Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def __call__(self, record: Record) -> None:
        """Queue one line of JSON, without waiting. May be called in every thread."""
        with self._lock:
            if self._waiting.qsize() >= (MAX_WAITING // 2 if record.is_noise else MAX_WAITING):
                self._missing += 1
                return
            if self._missing:
                self._put_missing()
            self._waiting.put((record, time.time(), 1))

    def close(self) -> None:
        """Wait until all is written, for at most `FLUSH_SECONDS`. Later records are lost."""
        with self._lock:
            if self._missing:
                self._put_missing()
            self._waiting.put(None)
        self._ending.set()
        self._thread.join(FLUSH_SECONDS)

    def _put_missing(self) -> None:
        record = Record(Level.WARNING, "log_incomplete", {"missing": self._missing})
        self._waiting.put((record, time.time(), self._missing))
        self._missing = 0

    def _write(self) -> None:
        at_start = True  # of a line
        while waiting := self._waiting.get():
            record, at, stands_for = waiting
            line = _line(record, at) if at_start else b"\n" + _line(record, at)
            try:
                while line:
                    written = os.write(self._descriptor, line)
                    at_start = line[:written].endswith(b"\n")
                    line = line[written:]
            except OSError:
                with self._lock:
                    self._missing += stands_for
            if self._waiting.empty():
                _ = self._ending.wait(REST_SECONDS)


def _standard_error() -> int:
    """Return its descriptor; a process may begin without, and then a file may have its number."""
    return os.open(os.devnull, os.O_WRONLY) if sys.stderr is None else sys.stderr.fileno()


def _line(record: Record, at: float) -> bytes:
    time_of_it = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    try:
        return record.as_json(time_of_it).encode() + b"\n"
    except (TypeError, ValueError) as exc:  # a defect of ours must not end the log
        fields: dict[str, Value] = {"lost": record.event, "error": f"{type(exc).__name__}: {exc}"}
        return Record(Level.ERROR, "log_failed", fields).as_json(time_of_it).encode() + b"\n"
