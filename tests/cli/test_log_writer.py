"""The server's log: in order and whole; who does not read loses some and is told how many, and keeps nobody waiting."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from fcntl import F_SETPIPE_SZ, fcntl
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from chutes_proto.io.server import log_writer
from chutes_proto.io.server.log_writer import LogWriter
from chutes_proto.log import LONGEST, Level, Record, Value
from tests.waiting import wait_until


def record(number: int) -> Record:
    return Record(Level.INFO, "counted", {"number": number})


def told(said: bytes) -> list[int | str]:
    """The numbers of the records, and how many are missing where some are."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in said.splitlines()]
    return [line.get("number", f"missing {line.get('missing')}") for line in lines]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Each write to the one is a message at the other; there is room for a few."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        other.settimeout(60)
        yield one, other


def test_records_come_in_order_each_in_one_write(ends: tuple[socket.socket, socket.socket]) -> None:
    with closing(LogWriter(ends[0].fileno())) as log:
        for number in range(300):
            log(record(number))
        for number in range(300):
            line = ends[1].recv(65536)
            assert line.endswith(b"\n")
            assert told(line) == [number]


def stalled(log: LogWriter, count: int) -> None:
    """Log so many records, of which the first waits in the thread for who reads."""
    log(record(0))
    _ = wait_until(lambda: not log._waiting.qsize())
    for number in range(1, count):
        log(record(number))


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """A pipe without room, and a log with room for three."""
    monkeypatch.setattr(log_writer, "MAX_WAITING", 3)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with pytest.raises(BlockingIOError):
        while True:
            _ = os.write(writing, b" " * 4096)
    os.set_blocking(writing, True)
    yield reading, writing
    os.close(reading)
    os.close(writing)


def read(reading: int, lines: int) -> bytes:
    said = b""
    while said.count(b"\n") < lines:
        assert select.select([reading], [], [], 60)[0], said
        said += os.read(reading, 65536)
    return said


def test_records_that_cannot_wait_are_counted_where_they_are_missing(full: tuple[int, int]) -> None:
    reading, writing = full
    with closing(LogWriter(writing)) as log:
        began = time.monotonic()
        stalled(log, 10)
        assert time.monotonic() - began < 60
        assert told(read(reading, 4)) == [0, 1, 2, 3]
        log(record(10))
        log(record(11))
        assert told(read(reading, 3)) == ["missing 6", 10, 11]


def test_what_is_missing_at_the_end_is_told_too(full: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "FLUSH_SECONDS", 60.0)
    reading, writing = full
    said: list[bytes] = []
    reader = Thread(target=lambda: said.append(read(reading, 5)))
    log = LogWriter(writing)
    stalled(log, 6)
    reader.start()
    log.close()
    reader.join(60)
    assert told(said[0]) == [0, 1, 2, 3, "missing 2"]


@pytest.mark.parametrize("count", [1, 3, 10])
def test_the_end_does_not_wait_for_who_does_not_read(
    full: tuple[int, int], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_writer, "FLUSH_SECONDS", 0.3)
    log = LogWriter(full[1])
    stalled(log, count)
    began = time.monotonic()
    log.close()
    assert 0.2 < time.monotonic() - began < 60
    # Nothing is left to write, or it would be written where the number of this descriptor is used next.
    _ = read(full[0], count if count <= 4 else 5)
    log._thread.join(60)
    assert not log._thread.is_alive()


def test_what_a_full_disk_did_not_take_is_counted() -> None:
    reading, writing = os.pipe()
    full = os.open("/dev/full", os.O_WRONLY)
    log = LogWriter(os.dup(full))
    descriptor = log._descriptor
    for number in range(3):
        log(record(number))
    _ = wait_until(lambda: log._missing == 3)
    _ = os.dup2(writing, descriptor)
    log(record(3))
    log.close()
    assert told(read(reading, 2)) == ["missing 3", 3]
    for each in (reading, writing, full, descriptor):
        os.close(each)


def test_the_next_record_begins_on_a_line_of_its_own() -> None:
    reading, writing = os.pipe()
    room = fcntl(writing, F_SETPIPE_SZ, 4096)
    os.set_blocking(writing, False)
    log = LogWriter(writing)
    log(Record(Level.INFO, "long", {"one": "a" * LONGEST, "two": "b" * room}))
    _ = wait_until(lambda: log._missing)
    part = os.read(reading, room)
    assert len(part) == room
    log(record(1))
    log(record(2))
    log.close()
    rest = os.read(reading, room)
    assert rest.startswith(b"\n")
    assert told(rest[1:]) == ["missing 1", 1, 2]
    os.close(reading)
    os.close(writing)


def test_who_logs_does_not_wait_for_the_end(full: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "FLUSH_SECONDS", 60.0)
    log = LogWriter(full[1])
    stalled(log, 10)
    end = Thread(target=log.close)
    end.start()
    _ = wait_until(lambda: not log._missing)  # the end has taken what is missing, and waits to tell it
    log(record(10))
    assert end.is_alive()
    assert told(read(full[0], 5)) == [0, 1, 2, 3, "missing 6"]
    end.join(60)
    assert not end.is_alive()


def test_the_end_does_not_wait_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "REST_SECONDS", 600.0)
    monkeypatch.setattr(log_writer, "FLUSH_SECONDS", 60.0)
    reading, writing = os.pipe()
    log = LogWriter(writing)
    log(record(0))
    assert told(read(reading, 1)) == [0]
    log(record(1))  # while the thread rests
    log.close()
    assert told(read(reading, 1)) == [1]
    assert not log._thread.is_alive()
    os.close(reading)
    os.close(writing)


def test_a_record_that_is_not_json_does_not_end_the_log() -> None:
    reading, writing = os.pipe()
    with closing(LogWriter(writing)) as log:
        wrong: Any = {"number": object()}
        log(Record(Level.INFO, "counted", wrong))
        log(record(1))
        lost, kept = map(json.loads, read(reading, 2).splitlines())
    assert (lost["event"], lost["lost"], kept["number"]) == ("log_failed", "counted", 1)
    os.close(reading)
    os.close(writing)


WITHOUT_STANDARD_ERROR = """
import os, sys
from chutes_proto.io.server.log_writer import LogWriter
from chutes_proto.log import Level, Record
assert os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT) == 2
log = LogWriter()
log(Record(Level.INFO, "told"))
log.close()
"""


def test_without_standard_error_no_other_file_is_written_to(tmp_path: Path) -> None:
    file = tmp_path / "keys.db"
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", WITHOUT_STANDARD_ERROR, str(file)]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
    assert file.read_bytes() == b""


LONG = "é" * (LONGEST + 1)


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (LONG, LONG[:-1] + "…"),
        (LONG[:-1], LONG[:-1]),
        ([LONG, "b"], ["…"]),
        (["a", "b"] * LONGEST, ["a", "b"] * (LONGEST // 4) + ["…"]),
        ([""] * LONGEST, [""] * LONGEST),
        ([""] * (LONGEST + 1), [""] * LONGEST + ["…"]),
        (10**6, 10**6),
    ],
    ids=["text", "text that fits", "one of a list", "list", "list that fits", "empty texts", "number"],
)
def test_a_text_that_strangers_make_long_is_cut(value: Value, printed: Value) -> None:
    line = json.loads(Record(Level.INFO, "told", {"short": "a", "long": value}).as_json("now"))
    assert line == {"at": "now", "level": "info", "event": "told", "short": "a", "long": printed}


def test_what_strangers_cause_is_dropped_first(full: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "MAX_WAITING", 8)
    log = LogWriter(full[1])
    stalled(log, 1)
    for number in range(1, 20):
        log(Record(Level.WARNING, "refused", {"number": number}, is_noise=True))
    for number in range(20, 23):
        log(record(number))
    assert told(read(full[0], 9)) == [0, 1, 2, 3, 4, "missing 15", 20, 21, 22]
    log.close()
