"""`revoke`, `allow` and `revocations`, on both stores."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psycopg
import pytest
from attrs import define

from chutes_proto.cli import output
from chutes_proto.cli.operator import operating
from chutes_proto.errors import FileUnavailable, Refused, StoreBusy
from chutes_proto.io.server.reload import Running
from chutes_proto.io.server.serving import open_store
from chutes_proto.io.server.store_setup import StoreSetup, make_store_setup
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import AuditRow, InsertAll, Vm
from chutes_proto.store._run import Ask, Store, Unit
from chutes_proto.testing.store_suite._parts import boot
from tests.cli import test_operating
from tests.cli.test_erase import marked, setup_of
from tests.cli.test_operating import HOTKEY, NOW, Site, importing

site = test_operating.site
reference = test_operating.reference


@test_operating.BOTH
def test_a_vm_is_shut_out_and_allowed_again(site: Site) -> None:
    site.boot("1")
    told = site.json("vm", "revoke", "vm-1", "--until", "2126-12-24", "--reason", "owner left")
    assert (told["subject"], told["ends_at"]) == (f"{HOTKEY}/vm-1", 4_953_744_000)
    assert [(vm["vm"], vm["last_boot_at"] > 0) for vm in told["vms"]] == [("vm-1", True)]
    with pytest.raises(Refused, match="revoked"):
        site.boot("2")
    said = site.do("vm", "revoke", "vm-1", "--reason", "for ever").out
    assert "revoked for good; a VM of it that runs goes on" in said
    (row,) = site.json("revocations")["revocations"]
    assert (row["kind"], row["ends_at"], row["in_force"]) == ("vm", None, True)
    assert row["reason"].endswith(": for ever")
    assert site.do("vm", "allow", "vm-1").code == 0
    assert site.do("vm", "allow", "vm-1").code == 1
    site.boot("3")
    assert site.do("revocations").out == "nothing is revoked\n"
    events = [(row["event"], row["vm"]) for row in site.json("audit", "list", "--vm", "vm-1")["rows"]]
    assert [event for event in events if event[0] not in ("boot", "sync")] == [
        ("vm revoked", "vm-1"),
        ("vm revoked", "vm-1"),
        ("vm allowed", "vm-1"),
    ]


def test_a_hotkey_and_a_platform_with_all_its_vms(site: Site) -> None:
    site.boot("1")
    (listed,) = site.json("vm", "list")["vms"]
    kind, _, value = listed["platform"].partition(":")
    for words in (("hotkey", "revoke", HOTKEY), ("platform", "revoke", f"--{kind}", value)):
        told = site.json(*words)
        assert [vm["vm"] for vm in told["vms"]] == ["vm-1"]
        with pytest.raises(Refused, match="revoked"):
            site.boot("2")
        assert site.do(words[0], "allow", *words[2:]).code == 0
    site.boot("3")
    never = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
    assert site.json("hotkey", "revoke", never)["vms"] == []  # before it was ever seen
    assert site.json("vm", "revoke", f"{never}/vm-7")["vms"] == []


@pytest.mark.parametrize(
    "words",
    [
        ("vm", "revoke", "vm-1", "--until", "2020-01-01"),
        ("platform", "revoke"),
        ("platform", "allow", "--ppid", "00" * 16, "--instance", "00" * 16),
        ("platform", "revoke", "--ppid", "00"),
        ("hotkey", "revoke", "nobody"),
    ],
)
def test_wrong_usage_changes_nothing(site: Site, words: tuple[str, ...]) -> None:
    site.boot("1")
    assert site.do(*words).code == 2
    assert site.json("revocations")["revocations"] == []


def put_back(site: Site) -> None:
    """Put the backup in place of the store."""
    for end in ("-wal", "-shm"):
        (site.directory / f"keys.db{end}").unlink(missing_ok=True)
    _ = shutil.copy(site.directory / "backup", site.directory / "keys.db")


def in_force(site: Site) -> list[tuple[str, str]]:
    return [(row["subject"].rpartition("/")[2], row["reason"]) for row in site.json("revocations")["revocations"]]


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
@pytest.mark.parametrize("how", ["start", "restored"])
def test_a_restored_store_repeats_what_was_revoked_and_allowed(site: Site, how: str) -> None:
    """Of VMs 1 to 4 the backup knows that 2 to 4 are revoked; 3 was allowed since, 4 revoked anew, 1 revoked."""
    file = marked(site)
    for number in "1234":
        site.boot(number, vm=Vm(HOTKEY, f"vm-{number}"))
    for number in "234":
        told = site.json("vm", "revoke", f"vm-{number}", "--reason", "before")
    assert told["recorded_in"] == str(file)
    _ = shutil.copy(site.directory / "keys.db", site.directory / "backup")
    assert site.do("vm", "allow", "vm-3").code == 0
    for number in "14":
        assert site.do("vm", "revoke", f"vm-{number}", "--reason", "since").code == 0
    expected = in_force(site)
    assert [name for name, _ in expected] == ["vm-1", "vm-2", "vm-4"]
    kept = file.read_bytes()
    put_back(site)
    assert in_force(site) != expected
    if how == "restored":
        assert site.json("store", "restored")["revocations_repeated"] == 3
    else:
        with open_store(Running(setup_of(site))) as (_, warnings):
            assert any("3 revocations or ends of one repeated" in warning for warning in warnings)
    assert in_force(site) == expected
    with open_store(Running(setup_of(site))) as (_, warnings):
        assert not any("repeated" in warning for warning in warnings)
    assert file.read_bytes() == kept
    events = [row["event"] for row in site.json("audit", "list")["rows"]]
    assert sorted(event for event in events if "again" in event) == ["vm allowed again", *["vm revoked again"] * 2]


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_what_the_file_alone_knows_is_allowed_again(site: Site) -> None:
    file = marked(site)
    site.boot("1")
    _ = shutil.copy(site.directory / "keys.db", site.directory / "backup")
    assert site.do("vm", "revoke", "vm-1").code == 0
    put_back(site)
    assert site.do("vm", "allow", f"{HOTKEY}/vm-1").code == 0
    put_back(site)
    with open_store(Running(setup_of(site))):
        assert in_force(site) == []
    assert site.do("vm", "revoke", "vm-1").code == 0
    assert len(file.read_text().splitlines()) == 1


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_a_file_of_erasures_that_cannot_be_used_is_told_with_what_was_changed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked(site)
    site.boot("1")
    file = site.directory / "store.mark.erasures"
    file.mkdir()
    for words in (("serve", "--check"), ("serve",)):  # a check says what a start would
        ended = site.do(*words)
        assert (ended.code, f"{file}: cannot be read: not a plain file" in ended.out + ended.err) == (1, True), words

    def said(*words: str) -> str:
        ended = site.do(*words)
        assert ended.code == 1
        assert ended.err.count(str(file)) == 1
        return " ".join(ended.err.split())

    revoked = said("vm", "revoke", "vm-1")
    assert "vm-1 is revoked, but a restored backup will not know it: erasures: " in revoked
    assert "mend that, and the next such command or server notes it" in revoked
    assert "nothing was changed: erasures: " in said("vm", "allow", "vm-1")
    assert len(site.json("revocations")["revocations"]) == 1
    assert "its keys are destroyed in the store, and copies are not: erasures: " in said("vm", "erase", "vm-1", "--yes")
    assert {key["state"] for key in site.json("keys", "history", f"{HOTKEY}/vm-1")["generations"]} <= {"purged"}
    file.rmdir()
    revoked = site.json("vm", "revoke", f"{HOTKEY}/vm-1")
    assert revoked["recorded_in"] == str(file)

    def full(*_: object, **__: object) -> None:
        raise FileUnavailable(f"{file}: cannot be written: No space left on device")

    monkeypatch.setattr("chutes_proto.io.stores.erasures.write_file", full)
    allowed = said("vm", "allow", f"{HOTKEY}/vm-1")
    assert f"vm {HOTKEY}/vm-1 may boot again, but a restored backup will not know it: erasures: " in allowed
    assert site.json("revocations")["revocations"] == []


@test_operating.BOTH
def test_each_change_counts_as_later_than_the_one_before(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in one second, and where the clock of another machine is behind."""
    _ = marked(site)
    for at, words in ((NOW, "revoke"), (NOW, "allow"), (NOW - 500, "revoke"), (NOW - 900, "allow")):
        monkeypatch.setattr("chutes_proto.cli.operator.operating.now", lambda at=at: at)
        _ = shutil.copy(site.directory / "keys.db", site.directory / "backup") if site.rows() else None
        assert site.do("hotkey", words, HOTKEY).code == 0
    assert in_force(site) == []
    with open_store(Running(setup_of(site))) as (_, warnings):
        assert not any("repeated" in warning for warning in warnings)
    assert in_force(site) == []


_LEAVE_OUT = {
    "sqlite": "CREATE TRIGGER kept_{table}_{event} BEFORE {event} ON {table} BEGIN SELECT raise(IGNORE); END",
    "postgresql": "CREATE TRIGGER kept_{event} BEFORE {event} ON {table} FOR EACH ROW EXECUTE FUNCTION left_out()",
}
"""A trigger on a table that leaves out what is written."""
_FUNCTION = "CREATE FUNCTION left_out() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"


def leave_out(site: Site, tables: tuple[str, ...], events: tuple[str, ...] = ("INSERT", "UPDATE")) -> None:
    """Have the database leave out what is written to tables, but say that it was written."""
    kind = "postgresql" if make_store_setup(ServerConfig.load(site.configuration)).store.path is None else "sqlite"
    made = [_LEAVE_OUT[kind].format(table=table, event=event) for table in tables for event in events]
    execute(site, *([_FUNCTION] if kind == "postgresql" else []), *made)


def execute(site: Site, *statements: str) -> None:
    """Change the database as somebody without the keys can."""
    place = make_store_setup(ServerConfig.load(site.configuration)).store
    if place.path is not None:
        with closing(sqlite3.connect(place.path)) as file, file:
            for each in statements:
                _ = file.execute(each)
    else:
        with psycopg.connect(place.address, autocommit=True) as database:
            for each in statements:
                _ = database.execute(each.encode())


WHOLE = ("store_head", "revocation", "fact")


@test_operating.BOTH
@pytest.mark.parametrize(
    ("words", "tables"),
    [
        (("vm", "revoke", "vm-1"), WHOLE),
        (("vm", "revoke", "vm-1"), ("revocation",)),
        (("vm", "revoke", "vm-1"), ("fact",)),
        (("hotkey", "revoke", HOTKEY), WHOLE),
        (("hotkey", "allow", "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"), WHOLE),
        (("store", "restored"), WHOLE),
        (("vm", "erase", "vm-1", "--yes"), WHOLE),
        (("vm", "erase", "vm-1", "--yes"), ("generation", "head", "vm", "boot")),
        (("vm", "erase", "vm-1", "--yes"), ("generation",)),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_change_that_the_database_does_not_keep_is_not_told_as_done(
    site: Site, words: tuple[str, ...], tables: tuple[str, ...]
) -> None:
    """Nothing else would tell: the log has it, and all rows agree with a head that was never replaced."""
    site.boot("1")
    assert site.do("hotkey", "revoke", "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty").code == 0
    leave_out(site, tables)
    ended = site.do(*words)
    assert (ended.code, ended.out) == (1, "")
    assert "the database has not kept it" in ended.err
    assert "it has version 2, and version 3 was seen" in ended.err or tables != WHOLE


PPID = ("--ppid", "00112233445566778899aabbccddeeff")
CHANGES = {
    ("vm", "bind", f"{HOTKEY}/vm-9", *PPID): ("vm",),
    ("vm", "rebind", "vm-1", *PPID, "--keep-keys"): ("vm", "boot"),
    ("vm", "rebind", "vm-1", *PPID, "--new-keys"): ("vm", "generation", "volume", "boot"),
    ("keys", "restore", "vm-1", "storage", "1"): ("generation",),
    ("keys", "allow-format", "vm-1", "storage"): ("volume",),
    ("keys", "purge", "vm-1", "--yes"): ("generation",),
}
"""The tables that each command writes, beside the head of the VM."""


@test_operating.BOTH
@pytest.mark.parametrize(
    ("words", "tables"),
    [(words, left) for words, each in CHANGES.items() for left in (*((table,) for table in each), (*each, "head"))],
    ids=lambda words: "-".join(words[:2]),
)
def test_a_change_of_a_vm_that_the_database_does_not_keep_is_not_told_as_done(
    site: Site, words: tuple[str, ...], tables: tuple[str, ...]
) -> None:
    for label in "12345":
        site.boot(label, rekey=("storage",), at=NOW - 100 * 86_400)
    site.boot("6")
    leave_out(site, tables)
    ended = site.do(*words, "--json")
    assert (ended.code, '"ok": true' in ended.out) == (1, False)
    assert "the database has not kept it" in ended.err


NOT_AUTHENTIC = ("UPDATE boot SET token_expires_at = 1", "UPDATE revocation SET reason = 'another'")


@pytest.mark.parametrize(
    "words", [words for words in CHANGES if words[1] not in ("rebind", "purge")], ids=lambda words: "-".join(words[:2])
)
def test_a_row_of_another_table_that_is_not_authentic_is_not_told_as_a_change_that_was_not_kept(
    site: Site, words: tuple[str, ...]
) -> None:
    for label in "12":
        site.boot(label, rekey=("storage",))
    site.boot("3")
    assert site.do("hotkey", "revoke", "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty").code == 0
    execute(site, *NOT_AUTHENTIC)
    ended = site.do(*words)
    assert ended.code == 0, ended.err


def test_an_import_goes_on_after_a_vm_with_a_boot_that_is_not_authentic(site: Site, reference: dict[str, Path]) -> None:
    assert importing(site, reference).code == 0
    home = boot("1").platform
    bound = ("--ppid", home.ppid.hex(), "--instance", (home.instance_id or b"").hex())
    assert site.do("vm", "bind", "vm-1", *bound).code == 0
    site.boot("1")
    execute(site, *NOT_AUTHENTIC)
    again = importing(site, reference)
    assert (again.code, "2 were there already" in again.out) == (0, True)


@test_operating.BOTH
def test_a_purge_that_the_database_does_not_keep_is_not_told_as_done(site: Site) -> None:
    old_rows(site)
    leave_out(site, ("boot", "audit"), ("DELETE",))
    for words in (("vm", "purge-boots"), ("audit", "purge")):
        assert site.do(*words).code == 0
        ended = site.do(*words, "--yes")
        assert (ended.code, ended.out) == (1, "")
        assert "the database has not kept it" in ended.err


def test_what_grows_old_during_a_purge_is_not_told_as_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for label, days in (("1", 300), ("2", 200)):
        site.boot(label, at=NOW - days * 86_400)

    waiting = ["3"]

    def boot_once(*_: int) -> None:
        if waiting:
            site.boot(waiting.pop())

    with monkeypatch.context() as patch:
        patch.setattr(output, "progress", lambda _: nullcontext(boot_once))
        ended = site.do("vm", "purge-boots", "--yes", "--json")
    assert (ended.code, waiting, ended.json["boots"]) == (0, [], 1)
    assert site.json("vm", "purge-boots")["boots"] == 1, "the one of 200 days ago"


@pytest.mark.parametrize("words", [("vm", "purge-boots"), ("audit", "purge"), ("keys", "purge", "vm-1")], ids=" ".join)
def test_a_purge_that_cannot_be_looked_at_again_is_told_as_done(
    site: Site, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    old_rows(site)
    real = operating.opened

    @contextmanager
    def busy_after(config: str, **options: bool) -> Iterator[tuple[StoreSetup, object]]:
        with real(config, **options) as (setup, store):
            yield setup, _BusyAfter(store)

    with monkeypatch.context() as patch:
        patch.setattr(operating, "opened", busy_after)
        ended = site.do(*words, "--yes")
    assert ended.code == 1
    assert "the last change is done, unless the database has not kept it: too busy" in ended.err


@define
class _BusyAfter:
    """A store that is busy once rows were purged."""

    store: Store
    is_busy: bool = False

    def transact(self, unit: Unit[Any]) -> Any:
        if self.is_busy:
            raise StoreBusy("too busy")
        self.is_busy = getattr(unit, "carry_out", False)
        return self.store.transact(unit)


def old_rows(site: Site) -> None:
    """Boots, verdicts, keys and audit rows that each purge would delete some of."""
    with closing(make_store_setup(ServerConfig.load(site.configuration)).store.open(make=True)) as store:
        store.transact(Ask(InsertAll((AuditRow(NOW - 800 * 86_400, "vm", "old", "granted"),) * 300)))
    for label, days in (("1", 500), ("2", 400), ("3", 300), ("4", 200), ("5", 100)):
        site.boot(label, rekey=("storage",), at=NOW - days * 86_400)
    assert site.do("audit", "checkpoint").code == 0


def test_an_import_that_the_database_does_not_keep_is_not_told_as_done(site: Site, reference: dict[str, Path]) -> None:
    site.boot("1", vm=Vm(HOTKEY, "other"))
    leave_out(site, ("generation",))
    ended = importing(site, reference)
    assert (ended.code, ended.out) == (1, "")
    assert "the database has not kept it" in ended.err
