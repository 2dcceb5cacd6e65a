"""A sealed store whose database does not answer what it is asked for: with authentic rows, but others, or fewer."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from attrs import evolve

from chutes_proto.errors import Refused, RowNotAuthentic
from chutes_proto.io.stores import marks
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.io.stores.sealing import find_faults
from chutes_proto.store import _custody
from chutes_proto.store import _sql as sql
from chutes_proto.store._custody import Custody, SeenHeads
from chutes_proto.store._rows import (
    BootRow,
    FindLastBoot,
    FindLastBoots,
    GenerationRow,
    Platform,
    Read,
    ReadRevocation,
    ReadUnclaimed,
    Vm,
    VmRow,
)
from chutes_proto.store._run import Ask, Unit
from chutes_proto.store._sql import columns
from chutes_proto.testing.store_suite._parts import NOW, VAULT, VM, boot, sync
from chutes_proto.units.operator import AllowFormat, RebindVm, StoreRestored
from chutes_proto.units.revocations import ReadRevocations, Revoke
from tests.store.test_custody import BOTH, copied, run

if TYPE_CHECKING:
    from pathlib import Path

GUESSED = bytes(32)
"""The digest of a token that nobody issued."""


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StorePlace:
    address: str = "sqlite:keys.db" if request.param == "sqlite" else request.getfixturevalue("empty_schema")
    return StorePlace(address, tmp_path, vault=VAULT)


def test_a_token_that_nobody_issued_finds_no_boot(empty_schema: str, tmp_path: Path) -> None:
    """Whoever owns the database would get the keys of each VM that has a live token, and changes no row for that."""
    place = StorePlace(empty_schema, tmp_path, vault=VAULT)
    granted = boot("one")
    guess = evolve(sync(granted, "body", "storage"), certificate=None, token_digest=GUESSED)
    with closing(place.open(make=True)) as store:
        store.transact(granted)
        with pytest.raises(Refused, match="Boot token not found"):
            store.transact(guess)
    ((schema,),) = run(place, "SELECT current_schema()")
    guessed = rf"$2 OPERATOR(pg_catalog.=) '\x{GUESSED.hex()}'"
    same = f"SELECT $1 OPERATOR(pg_catalog.=) $2 OR {guessed}"
    run(place, f"CREATE FUNCTION same(bytea, bytea) RETURNS boolean LANGUAGE sql IMMUTABLE AS $same${same}$same$")
    run(place, "CREATE OPERATOR = (LEFTARG = bytea, RIGHTARG = bytea, FUNCTION = same)")
    # As ALTER ROLE … SET search_path does it for a URL that has none.
    place = evolve(place, address=place.address.replace(schema, f"{schema}%2Cpg_catalog"))
    with closing(place.open()) as store:
        with pytest.raises(RowNotAuthentic, match=f"{granted.boot_id} of table boot .* not what was asked for"):
            store.transact(guess)
        assert store.custody.faults == {"boot": 1}


def test_a_boot_that_was_away_while_its_name_was_taken_over_opens_nothing(place: StorePlace) -> None:
    """Its row is authentic, and its head lists it, so its token would be as alive as before."""
    before = boot("of who came first")
    owner = evolve(boot("of the owner", now=NOW + 100), hotkey_proven=True, platform=Platform(bytes(16), bytes(16)))
    with closing(place.open(make=True)) as store:
        store.transact(before)
        run(place, "CREATE TABLE kept AS SELECT * FROM boot")
        run(place, "DELETE FROM boot")
        with pytest.raises(RowNotAuthentic, match=f"{before.boot_id} of table boot .* missing"):
            store.transact(owner)
        run(place, "INSERT INTO boot SELECT * FROM kept")
        store.transact(owner)
        with pytest.raises(Refused, match="Boot token not found"):
            store.transact(evolve(sync(before, "body", "storage"), now=NOW + 200))


def test_the_key_of_an_older_epoch_stands_in_for_no_newer_one(place: StorePlace) -> None:
    """Whoever had the old KEK knows it, and a server may still open it."""
    with closing(place.open(make=True)):
        older = run(place, "SELECT kind, epoch, kek_id, wrapped, created_at FROM keyring WHERE kind = 'rows'")
    custody = Custody("store")
    custody.hold(BOTH.unwrap)
    assert custody.session(1, lambda _: older).key is not None
    with pytest.raises(RowNotAuthentic, match=r"rows/1 of table keyring .* not what was asked for"):
        _ = custody.session(2, lambda _: older)
    assert len(custody.opened("rows", lambda _: older)) == 1
    assert custody.opened("log", lambda _: older) == []


def test_an_older_row_beside_the_newest_one_does_not_count(empty_schema: str, tmp_path: Path) -> None:
    """A table that inherits from another one has rows of the same keys: a permission to format came back with one."""
    place = StorePlace(empty_schema, tmp_path, vault=VAULT)
    first, second, third = (boot(f"{number}", now=NOW + number) for number in range(3))
    with closing(place.open(make=True)) as store:
        store.transact(first)
        store.transact(sync(first, "one", "storage"))
        store.transact(AllowFormat(NOW, VM, "storage", "test"))
        run(place, "CREATE TABLE kept AS SELECT * FROM volume")
        store.transact(second)
        assert store.transact(evolve(sync(second, "two", "storage"), formatted=frozenset())).in_use == ()
        run(place, "CREATE TABLE newest () INHERITS (volume)")
        run(place, "WITH moved AS (DELETE FROM ONLY volume RETURNING *) INSERT INTO newest SELECT * FROM moved")
        run(place, "INSERT INTO volume SELECT * FROM kept")
        store.transact(third)
        with pytest.raises(RowNotAuthentic, match="vm-0/storage of table volume is not authentic: it is there twice"):
            store.transact(evolve(sync(third, "three", "storage"), formatted=frozenset()))
        assert {fault.why for fault in find_faults(store)} == {"it is there twice"}


def test_a_revocation_stays_where_the_mark_alone_is_shown_the_newest_head(empty_schema: str, tmp_path: Path) -> None:
    """A view can tell the statements of a server apart."""
    place = StorePlace(empty_schema, tmp_path, vault=VAULT, mark_file=tmp_path / "store.mark")
    with closing(place.open(make=True)) as store:
        store.keep_mark()
        store.transact(boot("one"))
        run(place, "CREATE TABLE old_head AS SELECT * FROM store_head")
        store.transact(Revoke(NOW, 8, "hotkey", VM.hotkey, None, "test"))
        with pytest.raises(Refused, match="revoked"):
            store.transact(boot("two"))
    of_mark = "current_query() LIKE '%loss_decided%'"
    both = f"SELECT * FROM new_head WHERE {of_mark} UNION ALL SELECT * FROM old_head WHERE NOT {of_mark}"
    run(place, "ALTER TABLE store_head RENAME TO new_head")
    run(place, f"CREATE VIEW store_head AS {both}")
    run(place, "UPDATE fact SET value = 0 WHERE name = 'revocations'")
    run(place, "DELETE FROM revocation")
    with closing(place.open()) as store:
        units: tuple[Unit[object], ...] = (boot("three"), Ask(ReadRevocation("hotkey", VM.hotkey)))
        for unit in units:
            with pytest.raises(RowNotAuthentic, match="it has version 1, and version 2 was"):
                _ = store.transact(unit)


@pytest.mark.parametrize(
    "question", [FindLastBoot(VM), FindLastBoots((VM, Vm(VM.hotkey, "other")))], ids=["of one", "of several"]
)
@pytest.mark.parametrize("given", ["an older one", "none"])
def test_no_older_boot_stands_in_for_the_newest_one(
    given: str, question: FindLastBoot | FindLastBoots, empty_schema: str, tmp_path: Path
) -> None:
    """Both are authentic, and in the head: a server would be registered as what its VM was before."""
    place = StorePlace(empty_schema, tmp_path, vault=VAULT)
    older, newest = boot("older"), boot("newest", now=NOW + 1)
    with closing(place.open(make=True)) as store:
        store.transact(older)
        store.transact(newest)
        found = store.transact(Ask(question))
        (row,) = found if isinstance(found, tuple) else (found,)
        assert row is not None
        assert row.boot_id == newest.boot_id
    hidden = f"boot_id = '{newest.boot_id}'" if given == "an older one" else "TRUE"
    run(place, "ALTER TABLE boot RENAME TO boots")
    of_newest = "current_query() LIKE '%ORDER BY created_at DESC LIMIT 1%'"
    run(place, f"CREATE VIEW boot AS SELECT * FROM boots WHERE NOT ({of_newest} AND {hidden})")
    with (
        closing(place.open()) as store,
        pytest.raises(RowNotAuthentic, match=f"{newest.boot_id} of table boot .* it is the newest one, and was not"),
    ):
        _ = store.transact(Ask(question))


@pytest.mark.parametrize("question", [FindLastBoot(VM), FindLastBoots((VM,))], ids=["of one", "of several"])
def test_a_boot_that_is_missing_is_found_by_the_question_for_the_newest_one(
    question: FindLastBoot | FindLastBoots, place: StorePlace
) -> None:
    older = boot("older")
    with closing(place.open(make=True)) as store:
        store.transact(older)
        store.transact(boot("newest", now=NOW + 1))
        run(place, f"DELETE FROM boot WHERE boot_id = '{older.boot_id}'")
        with pytest.raises(RowNotAuthentic, match=f"{older.boot_id} of table boot .* missing"):
            _ = store.transact(Ask(question))


@pytest.mark.parametrize(
    ("where", "fault"),
    [("hotkey = ? AND vm <> ?", "not what was asked for"), ("hotkey = ? AND vm = ?", "more than one boot was given")],
)
def test_boots_beside_the_newest_ones_are_refused(
    where: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are authentic: a list of servers would show the version of another VM, or one that this VM had."""
    query = sql._QUERIES[FindLastBoots]
    other = sql._Query(lambda _: (sql.select(BootRow, f"WHERE {where}"), (VM.hotkey, VM.name)), query.reply)
    theirs = evolve(boot("of another VM"), vm=Vm(VM.hotkey, "other"))
    with closing(StorePlace("sqlite:keys.db", tmp_path, vault=VAULT).open(make=True)) as store:
        for granted in (boot("older"), boot("newest", now=NOW + 1), theirs):
            store.transact(granted)
        monkeypatch.setitem(sql._QUERIES, FindLastBoots, other)
        with pytest.raises(RowNotAuthentic, match=fault):
            _ = store.transact(Ask(FindLastBoots((VM,))))


def test_a_server_serves_no_vm_that_is_older_than_it_has_seen(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log knows the version, too, but who keeps it from a unit set a VM back: here that undoes a rebind."""
    monkeypatch.setattr(marks, "LOOK_SECONDS", -1)
    stolen, elsewhere = boot("on a machine that was stolen"), Platform(bytes(16), b"another machine!")
    groups = ("boot_volume", "boot", "vm", "generation", "volume", "head")
    again = boot("again", now=NOW + 900)
    with closing(place.open(make=True)) as store, closing(place.open()) as operator:
        store.transact(stolen)
        store.transact(sync(stolen, "one", "storage"))
        back = [copied(place, table) for table in groups]
        operator.transact(RebindVm(NOW, VM, elsewhere, True, VAULT, "stolen"))
        store.transact(evolve(boot("elsewhere", now=NOW + 800), platform=elsewhere))
        with pytest.raises(Refused, match="another platform"):
            store.transact(again)
        for set_back in back:
            set_back()
        operator.transact(Revoke(NOW, 8, "hotkey", "other", None, "a newer head of the store"))
        run(place, f"INSERT INTO fact (name, value) VALUES ('loss_decided_at', {NOW - 1})")  # as nobody decided
        for _ in range(2):
            with pytest.raises(RowNotAuthentic, match=r"table head .* it has version 2, and version 4 was seen"):
                store.transact(again)
        run(place, "DELETE FROM fact WHERE name = 'loss_decided_at'")
        assert {fault.table for fault in find_faults(store)} == {"head"}
        for table in groups:
            run(place, f"DELETE FROM {table}")
        with pytest.raises(RowNotAuthentic, match=r"table head .* it is missing, and version 4 was seen"):
            store.transact(again)
        for set_back in back:
            set_back()
        operator.transact(StoreRestored(NOW, "the backup is right"))
        assert store.transact(Ask(Read(VmRow, VM)))


@pytest.mark.parametrize("seen_by", ["a read", "a write"])
def test_a_server_takes_no_head_of_the_store_that_is_older_than_it_has_seen(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch, seen_by: str
) -> None:
    """The mark learns of a head once a second: who sets it back in between undoes a revocation unseen."""
    tables = ("store_head", "revocation", "fact")
    with closing(place.open(make=True)) as store, closing(place.open()) as operator:
        store.transact(boot("one"))
        monkeypatch.setattr(marks.MarkKeeper, "compare", lambda *_: None)
        back = [copied(place, table) for table in tables]
        (operator if seen_by == "a read" else store).transact(Revoke(NOW, 8, "hotkey", VM.hotkey, None, "stolen"))
        if seen_by == "a read":
            assert store.transact(ReadRevocations()).version == 8
        for set_back in back:
            set_back()
        for _ in range(2):
            with pytest.raises(RowNotAuthentic, match=r"table store_head .* it has version 1, and version 2 was seen"):
                store.transact(boot("three"))


def test_of_heads_that_were_seen_the_newest_count_for_transactions_that_began_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A transaction at the same time as the commit finds what was there when it began."""
    monkeypatch.setattr(_custody, "REMEMBERED", 2)
    seen, one, two, three = SeenHeads(), ("hotkey", "one"), ("hotkey", "two"), ("hotkey", "three")
    seen.note({one: 4}, 10.0)
    assert (seen.least(one, 9.0), seen.least(one, 10.0), seen.least(two, 10.0)) == (0, 4, 0)
    seen.note({two: 1}, 11.0)
    seen.note({one: 3}, 12.0)  # by one that had begun before, and ended later
    assert seen.least(one, 10.0) == 4
    seen.note({three: 1}, 13.0)
    assert [seen.least(vm, 13.0) for vm in (one, two, three)] == [4, 0, 1]
    seen.clear()
    assert seen.least(one, 13.0) == 0


def test_a_vm_with_a_name_of_another_type_hides_no_other_one(tmp_path: Path) -> None:
    """A listing ends at a page without a VM. SQLite takes a value of another type in any column."""
    place = StorePlace("sqlite:keys.db", tmp_path, vault=VAULT)
    with closing(place.open(make=True)) as store:
        store.transact(boot("one"))
        run(place, "DELETE FROM vm")
        others = ", ".join(columns(GenerationRow)[2:])
        run(place, f"INSERT INTO generation (hotkey, vm, {others}) SELECT '0', x'00', {others} FROM generation")
        assert store.transact(Ask(ReadUnclaimed(None, 1))) == (VM,)
