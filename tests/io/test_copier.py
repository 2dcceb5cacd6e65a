"""A server's copies of audit rows: nothing waits for a sink."""

from __future__ import annotations

import json
import os
import pty
import tty
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from chutes_proto.io.server import copier
from chutes_proto.io.server.copier import copying
from chutes_proto.io.server.sinks import FileSink
from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.store._rows import AuditRow, Insert
from chutes_proto.store._run import Ask
from chutes_proto.testing.store_suite._parts import NOW, VAULT
from tests.waiting import wait_until


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DurableStore]:
    place = StorePlace("sqlite:keys.db", tmp_path, mark_file=tmp_path / "mark", vault=VAULT)
    with closing(place.open(make=True)) as store:
        yield store


@pytest.fixture
def hung() -> Iterator[tuple[Path, int]]:
    """A device that takes a few kilobytes, and then hangs until its other end is read."""
    reader, device = pty.openpty()
    tty.setraw(device)
    os.set_blocking(device, False)
    try:
        while True:
            _ = os.write(device, b"full\n" * 100)
    except BlockingIOError:
        pass
    yield Path(os.ttyname(device)), reader
    os.close(reader)  # what waits for it ends
    os.close(device)


def commit(store: DurableStore, event: str) -> None:
    store.transact(Ask(Insert(AuditRow(NOW, "operator", event, "done"))))


def copied(path: Path) -> list[str]:
    """The events of the rows in a file."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [each["entry"]["event"] for each in found]


def test_a_disk_that_hangs_holds_up_neither_commits_nor_other_sinks_nor_the_end(
    store: DurableStore, hung: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "QUEUED", 20)
    monkeypatch.setattr(copier, "STOP_SECONDS", 0.1)
    good, bad = tmp_path / "audit.jsonl", FileSink(hung[0])
    with copying(store, [bad, FileSink(good)], required=False):
        written: list[str] = []
        while store.copies.missed["audit.file"] < 10:  # the device takes some before it hangs
            written.append(f"event {len(written)}")
            commit(store, written[-1])
            wait_until(lambda: copied(good) == written)
        assert [*store.copies.failing] == [bad.name]
        assert any(note.startswith(f"{bad.name}: it takes too long; lines are missing") for note in store.notes)


def test_all_that_is_queued_is_copied_at_the_end(store: DurableStore, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with copying(store, [FileSink(path)], required=False) as copy_checkpoint:
        for number in range(20):
            commit(store, f"event {number}")
        copy_checkpoint("a note")
    assert path.read_text().splitlines()[-1] == '{"checkpoint": "a note"}'
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert copied(path) == [f"event {number}" for number in range(20)]
