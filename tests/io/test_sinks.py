"""Copies of audit rows in a file and in a real journal: at commit, before the answer, and fail-closed by setting."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from attrs import evolve

from chutes_proto.errors import StoreError
from chutes_proto.io.files import give_to_owner_of
from chutes_proto.io.server.sequencer import Sequencer
from chutes_proto.io.server.sinks import FileSink, JournalSink, Sinks
from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.store._rows import AuditRow, Insert, Scan
from chutes_proto.store._run import Ask
from chutes_proto.testing.store_suite._parts import NOW, VAULT, boot
from chutes_proto.tlog.notes import Note
from tests.waiting import wait_until

ROW = AuditRow(NOW, "operator", "event", "done", "line 1\nline 2 \N{EURO SIGN}")


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DurableStore]:
    address: str = "sqlite:keys.db" if request.param == "sqlite" else request.getfixturevalue("empty_schema")
    with closing(StorePlace(address, tmp_path, vault=VAULT).open(make=True)) as store:
        yield store


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_and_checkpoints_are_in_the_file_before_the_answer(store: DurableStore, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    sinks = Sinks([FileSink(path, is_durable=True)], required=True, tell=store.add_note)
    store.copy_rows(sinks.rows)
    store.transact(boot("first"))
    store.transact(Ask(Insert(ROW)))
    first, second = lines(path)
    assert (first["entry"]["event"], second["entry"]["reason"]) == ("boot", ROW.reason)
    assert second["audit"] > first["audit"]
    path.rename(tmp_path / "rotated")
    file = tmp_path / "checkpoint"
    sequencer = Sequencer(store, lambda: VAULT, "o", file, lambda note: sinks.checkpoint(str(note)))
    sequencer.sequence()
    assert sequencer.checkpoint() is not None
    made, signed = lines(path)
    assert made["entry"]["event"] == "log key made"
    assert Note.parse(signed["checkpoint"].encode()) == Note.parse(file.read_bytes())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_root_makes_the_server_can_open(tmp_path: Path) -> None:
    """An operator's command of root that comes before the server's user must not shut it out."""
    os.chown(tmp_path, SERVER, SERVER)
    with closing(StorePlace("sqlite:keys.db", tmp_path, vault=VAULT).open(make=True)) as store:
        sinks = Sinks([FileSink(tmp_path / "audit.jsonl")], required=True, tell=store.add_note)
        store.copy_rows(sinks.rows)
        store.transact(Ask(Insert(ROW)))
        made = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in tmp_path.iterdir()}
    assert {"keys.db", "audit.jsonl"} <= made.keys()
    assert set(made.values()) == {(SERVER, SERVER)}
    os.chown(tmp_path / "audit.jsonl", SERVER, 0)
    FileSink(tmp_path / "audit.jsonl").write(["{}"])
    assert (tmp_path / "audit.jsonl").stat().st_gid == 0  # one that is there keeps whom it belongs to


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_root_gives_away_nothing_that_a_link_leads_to(tmp_path: Path) -> None:
    """The server's user can put a link in its place; a file of root's must not become that user's."""
    folder, elsewhere = tmp_path / "served", tmp_path / "elsewhere"
    folder.mkdir()
    os.chown(folder, SERVER, SERVER)
    elsewhere.touch()
    (folder / "audit.jsonl").symlink_to(elsewhere)
    give_to_owner_of(folder, folder / "audit.jsonl")
    assert elsewhere.stat().st_uid == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes into files of all users")
@pytest.mark.parametrize("is_there", [True, False])
def test_root_writes_through_no_link_of_the_servers_user(tmp_path: Path, is_there: bool) -> None:
    """An operator's command of root would write into any file, or make one anywhere; root's own links are followed."""
    folder, elsewhere = tmp_path / "served", tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "audit.jsonl").symlink_to(elsewhere)
    sinks = Sinks([FileSink(folder / "audit.jsonl")], required=False, tell=lambda _: None)
    if is_there:
        elsewhere.touch()
        assert not sinks.write(["{}"])
        elsewhere.write_text("")
    os.chown(folder, SERVER, SERVER)
    (failed,) = sinks.write(["{}"])
    assert failed == f"audit.file: {folder}/audit.jsonl: not a plain file, but a link or a loop of links"
    assert (elsewhere.read_text() if elsewhere.exists() else None) == ("" if is_there else None)


SERVER = 65534


def test_a_copy_that_fails_is_told_or_fails_the_request(store: DurableStore, tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "audit.jsonl"
    store.copy_rows(Sinks([FileSink(gone)], required=False, tell=store.add_note, copies=store.copies).rows)
    store.transact(Ask(Insert(ROW)))
    store.transact(Ask(Insert(ROW)))
    (note,) = [note for note in store.notes if "audit.file" in note]
    assert note.startswith(f"audit.file: {gone}: No such file or directory; lines are missing there from ")
    assert (store.copies.missed, [*store.copies.failing]) == ({"audit.file": 2}, [f"audit.file: {gone}"])
    store.copy_rows(Sinks([FileSink(gone)], required=True, tell=store.add_note, copies=store.copies).rows)
    with pytest.raises(StoreError, match=r"audit.required is set, so the answer does not leave"):
        store.transact(boot("first"))
    assert [row.event for row in store.transact(Ask(Scan(AuditRow)))] == ["event", "event", "boot"], (
        "it is kept all the same"
    )
    gone.parent.mkdir()
    store.transact(Ask(Insert(ROW)))
    assert len(lines(gone)) == 1
    assert f"audit.file: {gone}: it takes lines again; 3 of " in store.notes[-1]
    assert not store.copies.failing
    # A full disk is a device that is always full.
    store.copy_rows(Sinks([FileSink(Path("/dev/full"))], required=True, tell=store.add_note, copies=store.copies).rows)
    with pytest.raises(StoreError, match="No space left"):
        store.transact(Ask(Insert(ROW)))


@pytest.fixture
def journal(require_program: Callable[[str], str]) -> Iterator[tuple[str, Path]]:
    """A real journal in a namespace of its own, and its socket."""
    _ = require_program("journalctl")
    if os.geteuid() != 0:
        pytest.skip("systemd-journald needs root")
    name = f"chutes{uuid4().hex[:8]}"
    place = Path(f"/run/systemd/journal.{name}")
    place.mkdir(parents=True)
    with subprocess.Popen(["/lib/systemd/systemd-journald", name], stderr=subprocess.DEVNULL) as serving:
        try:
            wait_until((place / "socket").exists)
            yield name, place / "socket"
        finally:
            serving.terminate()
    shutil.rmtree(place)
    for path in (Path("/run/log/journal"), Path("/var/log/journal")):
        for left in path.glob(f"*.{name}"):
            shutil.rmtree(left)


def test_the_journal_has_each_row(journal: tuple[str, Path]) -> None:
    name, path = journal
    sinks = Sinks([JournalSink(path)], required=True, tell=print)
    largest = evolve(ROW, reason="x" * 60_000)
    sinks.rows([(7, ROW), (8, largest)])
    sinks.checkpoint("o\n3\nhash\n")

    def read() -> list[Any]:
        command = ["journalctl", f"--namespace={name}", "-o", "json", "--all", "-t", "chutes-proto-audit"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [json.loads(json.loads(line)["MESSAGE"]) for line in shown.splitlines()]

    wait_until(lambda: len(read()) == 3)
    first, second, signed = read()
    assert (first["audit"], first["entry"]["reason"]) == (7, ROW.reason)
    assert second["entry"]["reason"] == largest.reason
    assert signed == {"checkpoint": "o\n3\nhash\n"}


def test_a_journal_that_is_away_fails(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(StoreError, match=r"audit\.journal: No such file"):
        Sinks([JournalSink(tmp_path / "socket")], required=True, tell=told.append).rows([(1, ROW)])
    assert told[0].startswith("audit.journal: No such file or directory; lines are missing there from ")


def test_after_a_line_that_a_full_disk_took_in_part_the_next_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    told: list[str] = []
    sinks = Sinks([FileSink(path)], required=True, tell=told.append)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
        with pytest.raises(StoreError, match="the disk is full"):
            sinks.rows([(1, ROW)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sinks.rows([(2, ROW)])
    sinks.rows([(3, ROW)])
    part, *whole = path.read_text().splitlines()
    assert part == '{"audit":1,"entry":{'
    assert [json.loads(line)["audit"] for line in whole] == [2, 3]


def test_a_journal_that_stands_still_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chutes_proto.io.server.sinks.JOURNAL_SECONDS", 0.1)
    path = tmp_path / "socket"
    told: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(path))
        sinks = Sinks([JournalSink(path)], required=False, tell=told.append)
        while not told:
            sinks.rows([(1, ROW)])
        monkeypatch.setattr("chutes_proto.io.server.sinks.JOURNAL_SECONDS", 1000.0)
        sinks.rows([(2, ROW)])
        (fault,) = told
        assert fault.startswith("audit.journal: the journal does not take it; ")
        _ = journal.recv(1 << 16)
        sinks.rows([(3, ROW)])
        assert told[1].startswith("audit.journal: it takes lines again; 2 of ")


def test_a_pipe_that_nobody_reads_fails(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    told: list[str] = []
    sinks = Sinks([FileSink(path)], required=True, tell=told.append)
    with pytest.raises(StoreError, match="No such device or address"):
        sinks.rows([(1, ROW)])
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        sinks.rows([(2, ROW)])
        assert json.loads(os.read(reader, 1 << 16))["audit"] == 2
        with pytest.raises(StoreError, match=r"audit.required"):
            while True:
                sinks.rows([(3, ROW)])
    finally:
        os.close(reader)
