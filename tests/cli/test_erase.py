"""`vm erase`, on both stores: nothing of a VM's keys is left, a name is free again, and no backup brings it back."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from chutes_proto.errors import StoreError
from chutes_proto.io.server import watching
from chutes_proto.io.server.reload import Running
from chutes_proto.io.server.serving import open_store
from chutes_proto.io.server.setup import ServerSetup, make_setup
from chutes_proto.io.stores import erasures
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.log import Record
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import EvidenceRow, GenerationRow, Put, Read, Scan, Vm, VmRow
from chutes_proto.store._run import Ask
from chutes_proto.units.revocations import Revocations
from tests.cli import test_operating
from tests.cli.test_operating import HOTKEY, NOW, PLATFORM, Site
from tests.loops import on_loop

site = test_operating.site


def setup_of(site: Site) -> ServerSetup:
    return make_setup(ServerConfig.load(site.configuration))


def marked(site: Site) -> Path:
    """Give the server a mark; returns the file of erasures beside it."""
    text = site.configuration.read_text()
    line = next(line for line in text.splitlines() if line.startswith("store"))
    address = setup_of(site).config.store.url
    site.configuration.write_text(text.replace(line, f'store = {{ url = "{address}", mark_file = "store.mark" }}'))
    return site.directory / "store.mark.erasures"


def claimed(site: Site) -> bool:
    with closing(setup_of(site).store.open()) as store:
        return store.transact(Ask(Read(VmRow, Vm(HOTKEY, "vm-1")))) is not None


def sealed(rows: tuple[GenerationRow, ...]) -> list[bytes]:
    return [value for row in rows for value in (row.sealed, row.wrapped_key) if value is not None]


def held(site: Site, values: list[bytes]) -> list[str]:
    """The files of the store that hold one of these values."""
    files = [site.directory / name for name in ("keys.db", "keys.db-wal") if (site.directory / name).exists()]
    return [file.name for file in files if any(value in file.read_bytes() for value in values)]


@test_operating.BOTH
def test_all_keys_are_destroyed_in_two_steps(site: Site) -> None:
    file = marked(site)
    for label in "123":
        site.boot(label, rekey=("storage",), at=NOW - 9)
    site.boot("6")
    site.boot("4", vm=Vm(HOTKEY, "vm-2"))
    keys = [row for row in site.rows() if row.vm.name == "vm-1"]
    told = site.json("vm", "erase", "vm-1")
    assert (told["erased"], len(told["keys"]), told["recorded_in"]) == (False, len(keys), None)
    assert [row for row in site.rows() if row.vm.name == "vm-1"] == keys
    assert not file.exists()
    shown = site.do("vm", "erase", "vm-1").out
    assert "disks in use: storage; with --yes they are destroyed for ever" in shown
    told = site.json("vm", "erase", "vm-1", "--yes", "--reason", "decommissioned")
    assert (told["ok"], told["erased"], told["recorded_in"]) == (True, True, str(file))
    assert any("backups" in line for line in told["may_remain"])
    gone = [row for row in site.rows() if row.vm.name == "vm-1"]
    assert {(row.state, row.sealed, row.wrapped_key) for row in gone} == {("purged", None, None)}
    assert [row.vm.name for row in site.rows() if row.sealed] == ["vm-2"] * 2
    assert [vm["vm"] for vm in site.json("vm", "list")["vms"]] == ["vm-2"]
    (row,) = site.json("audit", "list", "--event", "vm erased")["rows"]
    assert (row["vm"], "storage/3 erased" in row["keys"]) == ("vm-1", True)
    (line,) = file.read_text().splitlines()
    assert json.loads(json.loads(line)["through"]) == {"root": 1, "storage": len(gone) - 1}
    site.boot("5")  # another VM of the name
    assert max(row.generation for row in site.rows() if row.vm.name == "vm-1" and row.sealed) == len(gone)


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
@pytest.mark.parametrize("secure", [True, False], ids=["of this release", "of an older one"])
def test_no_file_of_sqlite_holds_a_key_afterwards(site: Site, secure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the file nor its log, while a server has it open; older copies in free pages neither."""
    if not secure:
        settings = [one for one in sqlite_settings() if one[0] != "secure_delete"]
        monkeypatch.setattr("chutes_proto.io.stores.sqlite._SETTINGS", (*settings, ("secure_delete", 0)))
    for label in "12345":
        site.boot(label, rekey=("storage",), at=NOW - 9)
    quotes = [PLATFORM.quote(bytes([number]) * 64) for number in range(3)]
    with closing(setup_of(site).store.open()) as opened:
        for row in (evidence(0, quotes[0], "vm-1"), evidence(1, quotes[1], "vm-1"), evidence(2, quotes[2], "vm-2")):
            opened.transact(Ask(Put(row)))
    values = [*sealed(site.rows()), *(quote[at : at + 32] for quote in quotes[:2] for at in (636, 668))]
    if not secure:
        with closing(sqlite3.connect(site.directory / "keys.db")) as connection:
            _ = connection.execute("PRAGMA secure_delete = 0")
            _ = connection.execute("CREATE TABLE moved AS SELECT * FROM generation")
            _ = connection.execute("DROP TABLE moved")
            _ = connection.execute("CREATE TABLE moved AS SELECT * FROM evidence")
            _ = connection.execute("DROP TABLE moved")
            connection.commit()
    with closing(SqliteStore(site.directory / "keys.db")):
        assert all(held(site, values[at : at + 2]) for at in range(0, len(values), 2))
        told = site.json("vm", "erase", "vm-1", "--yes")
        assert (told["ok"], told["quotes"]) == (True, 2)
        assert held(site, values) == []
    assert held(site, values) == []
    assert held(site, [quotes[2][636:668]])


def evidence(place: int, quote: bytes, vm: str) -> EvidenceRow:
    """That of a granted boot, or with a place that of a refused one."""
    name = f"refused p {place}" if place else f"vm {HOTKEY}/{vm}"
    return EvidenceRow(name, Vm(HOTKEY, vm), "a", "tcb_rejected" if place else None, quote, "{}", NOW - 9)


@test_operating.BOTH
def test_an_erasure_that_was_cut_short_is_run_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys are gone by then, but not what the command does after that."""
    file = marked(site)
    site.boot("1")
    with monkeypatch.context() as patched:
        patched.setattr("chutes_proto.cli.operator.vm.keep_erasures", lambda *_: lost())
        assert site.do("vm", "erase", "vm-1", "--yes").code == 1
    assert not file.exists()
    told = site.json("vm", "erase", "vm-1", "--yes")
    assert (told["ok"], told["keys"], len(file.read_text().splitlines())) == (True, [], 1)
    assert len(site.json("audit", "list", "--event", "vm erased")["rows"]) == 1
    assert site.do("vm", "erase", "vm-2", "--yes").code == 1


def lost() -> None:
    raise StoreError("the disk is full")


def forge(site: Site, seconds: int) -> None:
    with closing(sqlite3.connect(site.directory / "keys.db")) as attacker, attacker:
        attacker.execute("UPDATE generation SET created_at = created_at + ?", (seconds,))


def sqlite_settings() -> Any:
    from chutes_proto.io.stores import sqlite

    return sqlite._SETTINGS


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("how", ["start", "restored"])
def test_a_restored_store_repeats_it_before_it_serves(site: Site, how: str, is_known: bool) -> None:
    """Also one into which somebody has put the record of the erasure, as it was in the database."""
    file = marked(site)
    site.boot("1")
    site.boot("2", vm=Vm(HOTKEY, "vm-2"))
    with closing(setup_of(site).store.open()) as opened:
        for row in (evidence(0, PLATFORM.quote(bytes(64)), "vm-1"), evidence(1, PLATFORM.quote(bytes(64)), "vm-1")):
            opened.transact(Ask(Put(row)))
    values = sealed(tuple(row for row in site.rows() if row.vm.name == "vm-1"))
    _ = shutil.copy(site.directory / "keys.db", site.directory / "backup")
    assert site.do("vm", "erase", "vm-1", "--yes").code == 0
    kept = file.read_bytes()
    with closing(sqlite3.connect(site.directory / "keys.db")) as attacker:
        records = attacker.execute("SELECT * FROM erasure").fetchall()
    for end in ("-wal", "-shm"):
        (site.directory / f"keys.db{end}").unlink(missing_ok=True)
    _ = shutil.copy(site.directory / "backup", site.directory / "keys.db")
    assert sealed(tuple(row for row in site.rows() if row.vm.name == "vm-1")) == values
    if is_known:
        with closing(sqlite3.connect(site.directory / "keys.db", isolation_level=None)) as attacker:
            attacker.execute(f"INSERT INTO erasure VALUES ({', '.join('?' * len(records[0]))})", records[0])
    if how == "restored":
        told = site.json("store", "restored")
        assert (told["vms_erased_again"], told["keys_erased_again"]) == (1, 2)
    else:
        with open_store(Running(setup_of(site))) as (_, warnings):
            assert any("1 VMs were erased again" in warning for warning in warnings)
    (row,) = site.json("audit", "list", "--event", "vm erased again")["rows"]
    assert re.fullmatch(r"erased at \d{4}-\S+Z; repeated, because the store had lost that", row["reason"])
    assert [row.vm.name for row in site.rows() if row.sealed] == ["vm-2"] * 2
    assert [vm["vm"] for vm in site.json("vm", "list")["vms"]] == ["vm-2"]
    with closing(setup_of(site).store.open()) as opened:
        assert opened.transact(Ask(Scan(EvidenceRow))) == ()
    site.boot("3", at=int(time.time()) + 200)  # later keys of the name stay, whatever is repeated
    with open_store(Running(setup_of(site))) as (_, warnings):
        assert not any("erased again" in warning for warning in warnings)
    assert len([row for row in site.rows() if row.sealed]) == 4
    assert file.read_bytes() == kept


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_rows_that_are_not_authentic_do_not_hide_an_erasure(site: Site) -> None:
    """Else the store would be served, and hand out the erased keys once somebody puts the rows right again.

    Those of a VM that has the name since the erasure stop that VM alone.
    """
    _ = marked(site)
    site.boot("1")
    _ = shutil.copy(site.directory / "keys.db", site.directory / "backup")
    assert site.do("vm", "erase", "vm-1", "--yes").code == 0
    site.boot("2", at=int(time.time()) + 200)
    forge(site, 1)
    with open_store(Running(setup_of(site))):
        pass
    for end in ("-wal", "-shm"):
        (site.directory / f"keys.db{end}").unlink(missing_ok=True)
    _ = shutil.copy(site.directory / "backup", site.directory / "keys.db")
    forge(site, 1)
    ended = site.do("store", "restored", "--reason", "x")
    assert (ended.code, "of table generation is not authentic" in ended.err) == (1, True)
    forge(site, -1)
    assert site.json("store", "restored", "--reason", "x")["vms_erased_again"] == 1


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_keys_made_since_in_a_store_that_was_restored_are_not_erased(site: Site) -> None:
    """Such a store was served without the file, so a later key has a number that an erased one had."""
    file = marked(site)
    site.boot("1", at=NOW - 9)
    _ = shutil.copy(site.directory / "keys.db", site.directory / "backup")
    site.boot("2", rekey=("storage",), at=NOW - 8)
    assert site.do("vm", "erase", "vm-1", "--yes").code == 0
    for end in ("-wal", "-shm"):
        (site.directory / f"keys.db{end}").unlink(missing_ok=True)
    _ = shutil.copy(site.directory / "backup", site.directory / "keys.db")
    site.boot("3", rekey=("storage",), at=int(time.time()) + 200)
    with open_store(Running(setup_of(site))):
        assert [(row.volume, row.generation) for row in site.rows() if row.sealed] == [("storage", 2)]
    assert claimed(site), "else a VM of another machine could have the later key"
    assert file.exists()


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_the_erasures_of_another_store_destroy_nothing(site: Site) -> None:
    """An operator who gives a server another store moves the mark away, and may forget what is beside it."""
    file = marked(site)
    site.boot("1", vm=Vm(HOTKEY, "vm-2"))
    for end in ("", "-wal", "-shm"):
        if (site.directory / f"keys.db{end}").exists():
            _ = (site.directory / f"keys.db{end}").rename(site.directory / f"other.db{end}")
    site.boot("2", at=NOW - 9)
    assert site.do("vm", "erase", "vm-1", "--yes").code == 0
    line = file.read_text()
    for end in ("", "-wal", "-shm"):
        (site.directory / f"keys.db{end}").unlink(missing_ok=True)
        if (site.directory / f"other.db{end}").exists():
            _ = (site.directory / f"other.db{end}").rename(site.directory / f"keys.db{end}")
    site.boot("3", at=NOW - 9)
    with open_store(Running(setup_of(site))):
        assert len([row for row in site.rows() if row.vm.name == "vm-1" and row.sealed]) == 2
    assert file.read_text() == line
    assert site.do("vm", "erase", "vm-2", "--yes").code == 0
    assert file.read_text().startswith(line)
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_every_server_notes_what_another_one_erased(site: Site) -> None:
    site.boot("1")
    assert site.do("vm", "erase", "vm-1", "--yes").code == 0  # where there is no mark
    file = marked(site)
    with open_store(Running(setup_of(site))):
        assert len(file.read_text().splitlines()) == 1


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_a_server_says_once_that_it_cannot_note_erasures(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tries again every second, for as long as a disk is full or a file is damaged."""
    _ = marked(site)
    setup, tried, told = setup_of(site), list[str](), list[Record]()

    def fail(*_: object) -> None:
        tried.append("tried")
        if len(tried) == 4:
            raise LookupError("enough")
        raise StoreError("the disk is full" if len(tried) < 3 else "the file is damaged")

    async def watch() -> None:
        async with anyio.create_task_group() as group:
            _ = group.start_soon(watching.watch_erasures, Running(setup), store, told.append)
            while not tried:  # it may begin after the first change
                setup.service.revoked.now = Revocations(setup.service.revoked.now.version + 1)
                await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(watching, "WATCH_SECONDS", 0)
    monkeypatch.setattr(watching, "keep_erasures", fail)
    with closing(setup.store.open()) as store, pytest.raises(ExceptionGroup):
        on_loop("trio", watch)
    assert [record.fields["error"] for record in told] == ["the disk is full", "the file is damaged"]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "{}",
        '{"store":1,"erasure_id":"1","hotkey":"h","vm":"v","erased_at":1,"through":"[]"}',
        '{"store":1,"erasure_id":"1","hotkey":"h","vm":"v","erased_at":1,"through":"{"}',
        '{"store":1,"erasure_id":1,"hotkey":"h","vm":"v","erased_at":1,"through":"{}"}',
        '{"store":1,"erasure_id":"1","hotkey":"h","vm":"v","erased_at":true,"through":"{}"}',
        '{"store":"1","erasure_id":"1","hotkey":"h","vm":"v","erased_at":1,"through":"{}"}',
        '{"erasure_id":"1","hotkey":"h","vm":"v","erased_at":1,"through":"{}"}',
        "[" * 50_000,
        "1",
        '{"store":1,"kind":"vm","subject":"v","reason":"r","created_at":1,"ends_at":null}',
        '{"store":1,"kind":"all","subject":"v","reason":"r","created_at":1,"ends_at":null,"allowed_at":null}',
        '{"store":1,"kind":"vm","subject":"v","reason":"r","created_at":"1","ends_at":null,"allowed_at":null}',
        '{"store":1,"kind":"vm","subject":"v","reason":"r","created_at":1,"ends_at":null,"allowed_at":true}',
        '{"store":1,"kind":"vm","subject":1,"reason":"r","created_at":1,"ends_at":null,"allowed_at":null}',
    ],
)
@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_a_file_that_cannot_be_read_stops_the_server(site: Site, line: str) -> None:
    site.boot("1")
    file = marked(site)
    with suppress(ValueError, RecursionError):
        told = json.loads(line)
        kek, mac = next(iter(erasures._macs(setup_of(site).service.vault).items()))
        line = json.dumps(told | {"kek": kek, "mac": mac(told)}) if isinstance(told, dict) else line
    _ = file.write_text(line + "\n")
    ended = site.do("store", "restored", "--reason", "x")
    assert (ended.code, f"{file}, line 1: neither an erasure nor a revocation" in ended.err) == (1, True)


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_a_line_that_no_server_wrote_is_not_done(site: Site) -> None:
    """Else one who can write the file alone destroys keys, and lets a revoked VM boot."""
    file = marked(site)
    site.boot("1")
    assert site.do("vm", "revoke", "vm-1").code == 0
    written = file.read_text()
    (revoked,) = map(json.loads, written.splitlines())
    erased = {"erasure_id": "1", "hotkey": HOTKEY, "vm": "vm-1", "erased_at": NOW + 99, "through": '{"storage":9}'}
    erased |= {name: revoked[name] for name in ("store", "kek", "mac")}
    for line in (revoked | {"allowed_at": int(time.time()) + 99}, erased):
        _ = file.write_text(f"{written}{json.dumps(line)}\n")
        with pytest.raises(StoreError, match="line 2: its MAC is not that of a server"), open_store(started(site)):
            pass
        assert site.do("store", "restored").code == 1
        assert "line 2: its MAC" in site.do("serve", "--check").err
    assert len(site.json("revocations")["revocations"]) == 1
    assert len([row for row in site.rows() if row.sealed]) == 2


def started(site: Site) -> Running:
    return Running(setup_of(site))


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_a_new_kek_takes_the_lines_over(site: Site) -> None:
    file = marked(site)
    site.boot("1")
    assert site.do("vm", "revoke", "vm-1").code == 0
    before = file.read_text()
    configured = test_operating.new_key(site)
    with open_store(started(site)):
        assert json.loads(file.read_text())["kek"] != json.loads(before)["kek"]
    assert site.do("keys", "rewrap").code == 0
    _ = site.configuration.write_text(configured)
    with open_store(started(site)):
        pass
    _ = file.write_text(before)
    told = "line 1: it was written under .* name that KEK in kek_previous_file.* if it is destroyed, move the file away"
    with pytest.raises(StoreError, match=told), open_store(started(site)):
        pass


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_a_pipe_in_the_place_of_a_file_beside_the_mark_is_not_waited_for(site: Site) -> None:
    file = marked(site)
    site.boot("1")
    with open_store(started(site)):
        assert site.do("vm", "revoke", "vm-1").code == 0
    assert site.do("audit", "checkpoint").code == 0
    for name, code in (("store.mark", 1), ("store.mark.checkpoint", 0), ("store.mark.erasures", 1)):
        path = site.directory / name
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        ended = site.do("serve", "--check")
        assert (ended.code, f"{path}: " in ended.out + ended.err) == (code, True)
        assert "not a plain file" in ended.out + ended.err
        path.unlink()
        _ = path.write_bytes(kept)
    assert file.exists()
