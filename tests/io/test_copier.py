"""A server's copies of audit rows: nothing waits for a sink, and nothing is lacking after a failure or a kill."""

from __future__ import annotations

import json
import math
import os
import pty
import signal
import subprocess
import sys
import threading
import tty
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from chutes_proto.errors import StoreError
from chutes_proto.io.server import copier
from chutes_proto.io.server.copier import copying
from chutes_proto.io.server.sinks import FileSink
from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.store._run import Ask
from chutes_proto.store.rows import AuditRow, Insert
from chutes_proto.testing.store_suite._parts import NOW, VAULT
from tests.store.test_custody import run
from tests.store.test_forged_audit import forge, sequenced
from tests.waiting import LIMIT_SECONDS, wait_until

COMMITS = """
import sys
from pathlib import Path
from chutes_proto.io.server.copier import copying
from chutes_proto.io.server.sinks import FileSink
from chutes_proto.io.stores.address import StorePlace
from tests.io.test_copier import commit
folder, sink = map(Path, sys.argv[1:])
store = StorePlace("sqlite:keys.db", folder, mark_file=folder / "mark").open()
with copying(store, [FileSink(sink)], required=False, mark_file=folder / "mark"):
    for number in range(3):
        commit(store, f"cut {number}")
    print("committed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DurableStore]:
    place = StorePlace("sqlite:keys.db", tmp_path, mark_file=tmp_path / "mark")
    with closing(place.open(migrate=True)) as store:
        yield store


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is queued is copied at the end, and no row is settled, however slow the machine is."""
    monkeypatch.setattr(copier, "STOP_SECONDS", LIMIT_SECONDS)
    monkeypatch.setattr(copier, "SETTLED_SECONDS", math.inf)


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
    """The events of the rows in a file, of which some may be there twice."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [each["entry"]["event"] for each in found]


def events(path: Path) -> list[str]:
    return [*dict.fromkeys(copied(path))]


def test_a_disk_that_hangs_holds_up_neither_commits_nor_other_sinks_nor_the_end(
    store: DurableStore, hung: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "QUEUED", 20)
    monkeypatch.setattr(copier, "STOP_SECONDS", 0.1)
    good, bad = tmp_path / "audit.jsonl", FileSink(hung[0])
    with copying(store, [bad, FileSink(good)], required=False, mark_file=None):
        written: list[str] = []
        while store.copies.missed["audit.file"] < 10:  # the device takes some before it hangs
            written.append(f"event {len(written)}")
            commit(store, written[-1])
            wait_until(lambda: events(good) == written)
        assert [*store.copies.failing] == [bad.name]
        assert any(note.startswith(f"{bad.name}: it takes too long; lines are missing") for note in store.notes)


def test_rows_of_a_killed_process_are_copied_by_the_next(
    store: DurableStore, hung: tuple[Path, int], tmp_path: Path
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "audit.jsonl"
    commit(store, "before the first start")
    with copying(store, [FileSink(path)], required=False, mark_file=mark):
        commit(store, "first")
    assert events(path) == ["first"]
    command = [sys.executable, "-c", COMMITS, str(tmp_path), str(hung[0])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "committed\n"
        (file,) = tmp_path.glob("mark.copied.file.*")
        process.send_signal(signal.SIGKILL)
    with copying(store, [FileSink(path)], required=False, mark_file=mark):
        wait_until(lambda: "cut 2" in events(path))
        assert not file.exists()
        commit(store, "last")
    assert events(path) == ["first", "cut 0", "cut 1", "cut 2", "last"]


@pytest.mark.parametrize("required", [False, True])
def test_a_sink_that_works_again_gets_what_it_lacks(
    store: DurableStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, required: bool
) -> None:
    monkeypatch.setattr(copier, "PAGE", 2)
    monkeypatch.setattr(copier, "RETRY_SECONDS", 0.01)
    path = tmp_path / "mounted" / "audit.jsonl"
    wanted = [f"event {number}" for number in range(5)]
    with copying(store, [FileSink(path)], required=required, mark_file=tmp_path / "mark"):
        for event in wanted:
            if required:
                with pytest.raises(StoreError, match=r"audit\.required"):
                    commit(store, event)
            else:
                commit(store, event)
        wait_until(lambda: bool(store.copies.failing))
        path.parent.mkdir()
        wait_until(lambda: events(path) == wanted)
        wait_until(lambda: not store.copies.failing)
        commit(store, "live")
        wait_until(lambda: events(path)[-1] == "live")
    assert any("it takes lines again" in note and note.endswith("are copied now") for note in store.notes)


def test_a_row_that_is_committed_while_others_are_read_is_copied_once(
    store: DurableStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "PAGE", 1)
    is_writing, goes_on = threading.Event(), threading.Event()
    written: list[str] = []

    class Slow:
        name = "audit.file: slow"

        def write(self, lines: Sequence[str]) -> None:
            is_writing.set()
            assert goes_on.wait(LIMIT_SECONDS)
            written.extend(lines)

    mark = tmp_path / "mark"
    with copying(store, [FileSink(tmp_path / "audit.jsonl")], required=False, mark_file=mark):
        commit(store, "before")
    with copying(store, [Slow()], required=False, mark_file=mark):
        assert is_writing.wait(LIMIT_SECONDS)  # of what the store has; the next page is not read yet
        commit(store, "meanwhile")
        goes_on.set()
    assert [json.loads(line)["entry"]["event"] for line in written] == ["before", "meanwhile"]


def test_a_row_that_no_unit_wrote_as_it_is_is_left_out(tmp_path: Path) -> None:
    place = StorePlace("sqlite:keys.db", tmp_path, vault=VAULT)
    mark, path = tmp_path / "mark", tmp_path / "audit.jsonl"
    with closing(place.open(migrate=True)) as store:
        with copying(store, [FileSink(path)], required=False, mark_file=mark):
            pass
        for event in ("written", "changed later"):
            commit(store, event)
        assert [*sequenced(store)] == ["written", "changed later"]
        commit(store, "waits")
    forge(place, "has no MAC")
    forge(place, "has a place beyond the log", idx=7)
    forge(place, "was set apart", idx=-1)
    run(place, "UPDATE audit SET event = 'rewritten' WHERE event = 'changed later'")
    with closing(place.open()) as store:
        with copying(store, [FileSink(path)], required=False, mark_file=mark):
            wait_until(lambda: "waits" in events(path))
            commit(store, "last")
        assert events(path) == ["written", "waits", "last"]
        assert sum("is not as a unit wrote it, and is left out" in note for note in store.notes) == 4


def test_a_position_goes_on_once_its_rows_are_settled(
    store: DurableStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "RETRY_SECONDS", 0.01)
    mark, path = tmp_path / "mark", tmp_path / "audit.jsonl"

    def kept() -> int:
        (file,) = tmp_path.glob("mark.copied.file.*")
        return int(json.loads(file.read_bytes())["copied"])

    with copying(store, [FileSink(path)], required=False, mark_file=mark):
        first = kept()
        commit(store, "event")
        wait_until(lambda: events(path) == ["event"])
        assert kept() == first
        monkeypatch.setattr(copier, "SETTLED_SECONDS", 0.0)
        wait_until(lambda: kept() == first + 1)
    with copying(store, [FileSink(path)], required=False, mark_file=mark):
        commit(store, "next")
    assert events(path) == ["event", "next"]
    assert copied(path).count("event") == 1


def test_a_process_that_lives_keeps_its_position(store: DurableStore, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "audit.jsonl"
    with copying(store, [FileSink(path)], required=False, mark_file=mark):
        commit(store, "event")
        with copying(store, [FileSink(path)], required=False, mark_file=mark):
            assert len([*tmp_path.glob("mark.copied.file.*")]) == 2
    _ = (tmp_path / "mark.copied.file.0").write_bytes(b"[]")  # not a position: it is removed
    with copying(store, [FileSink(path)], required=False, mark_file=mark):
        assert len([*tmp_path.glob("mark.copied.file.*")]) == 1


def test_processes_that_start_at_once_each_keep_a_position(tmp_path: Path) -> None:
    """One takes a file that another has just made, and not yet locked, for one that was left."""

    def start(_: int) -> None:
        copier.PositionFile(tmp_path, "mark.copied.file", 1).close()

    with ThreadPoolExecutor(8) as threads:
        _ = [*threads.map(start, range(1200))]
    last = copier.PositionFile(tmp_path, "mark.copied.file", 1)
    assert len([*tmp_path.iterdir()]) == 1
    last.close()


def test_a_position_without_a_folder_is_told(store: DurableStore, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with copying(store, [FileSink(path)], required=False, mark_file=tmp_path / "gone" / "mark"):
        commit(store, "event")
    assert events(path) == ["event"]
    assert [note for note in store.notes if "its position is not kept" in note and "No such file" in note]
