"""`store compare`: what a restored store lacks, taken from the newer one; and inputs that are refused."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from attrs import evolve

from chutes_proto.cli import output
from chutes_proto.io.files import write_file
from chutes_proto.io.server.development import write_server
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.keys.generations import CALLER_VOLUME
from chutes_proto.store._rows import AuditRow, Forget, GenerationRow, Insert, Read, ReadAll, Scan, Vm, VmRow
from chutes_proto.store._run import Ask, Store
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import NOW, VAULT, VM, attest, boot, confirm, dump, platform, sync
from chutes_proto.units.operator import PurgeKeys, RebindVm
from tests.cli.conftest import Ended
from tests.postgres import PASSWORD

Command = Callable[..., Ended]
NEW_VM = Vm(VM.hotkey, "vm-new")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose KEK is that of the suite's units."""
    write_server(tmp_path, SimulatedPlatform(bytes(32)), int(time.time()))
    write_file(tmp_path / "kek", bytes(range(32)), mode=0o600)
    return tmp_path / "server.toml"


def rotated(store: Store, label: str) -> bytes:
    """A boot whose rotation is confirmed; the key that is on the disk now."""
    granted = evolve(boot(label), exchange="two-phase", exchange_downgrade="allow")
    store.transact(granted)
    attested = attest(granted, "body", "storage")
    pair = store.transact(attested).volumes[0][1]
    store.transact(confirm(attested, {"storage": True}))
    return pair.next.reveal()


def current(store: Store, label: str) -> bytes:
    granted = evolve(boot(label), exchange="two-phase")
    store.transact(granted)
    key = store.transact(attest(granted, "body", "storage")).volumes[0][1].current
    assert key is not None
    return key.reveal()


@pytest.fixture
def stores(tmp_path: Path) -> tuple[str, str]:
    """The backup of a store, and the store: since then a VM rotated its key, and another booted for the first time."""
    with closing(SqliteStore(tmp_path / "new.db", vault=VAULT)) as store:
        _ = rotated(store, "1")
    _ = shutil.copy(tmp_path / "new.db", tmp_path / "old.db")
    with closing(SqliteStore(tmp_path / "new.db", vault=VAULT)) as store:
        _ = rotated(store, "2")
        first = boot("first", vm=NEW_VM)
        store.transact(first)
        store.transact(sync(first, "body", "storage"))
    return f"sqlite:{tmp_path}/old.db", f"sqlite:{tmp_path}/new.db"


def open_store(address: str) -> SqliteStore:
    return SqliteStore(Path(address.removeprefix("sqlite:")), vault=VAULT)


def test_what_is_missing_is_listed_and_taken(command: Command, stores: tuple[str, str], config: Path) -> None:
    old, new = stores
    listed = command("store", "compare", old, new, "--json")
    assert listed.code == 1
    assert not listed.json["ok"]
    found = {(each["vm"], each["volume"]): (each["generations"], each["state"]) for each in listed.json["volumes"]}
    assert found == {
        (VM.name, "storage"): ([2], "missing"),
        (NEW_VM.name, "root"): ([1], "missing"),
        (NEW_VM.name, "storage"): ([1], "missing"),
    }
    human = command("store", "compare", old, new)
    assert (human.code, "missing" in human.out, NEW_VM.name in human.out) == (1, True, True)
    before = Path(new.removeprefix("sqlite:")).read_bytes()
    taken = command("store", "compare", old, new, "--take", "--config", config, "--reason", "lost", "--json")
    assert (taken.code, {each["state"] for each in taken.json["volumes"]}) == (0, {"taken"})
    assert Path(new.removeprefix("sqlite:")).read_bytes() == before
    with closing(open_store(old)) as restored, closing(open_store(new)) as newer:
        for vm in (VM, NEW_VM):
            keys = [store.transact(Ask(ReadAll(GenerationRow, vm))) for store in (restored, newer)]
            assert keys[0] == keys[1]
        told = [row for row in restored.transact(Ask(Scan(AuditRow))) if row.event == "keys taken"]
        assert [(row.vm, row.keys, row.reason.endswith("lost")) for row in told] == [
            (VM, "storage/2 taken", True),
            (NEW_VM, "root/1 taken, storage/1 taken", True),
        ]
        assert current(restored, "3") == current(newer, "3")
        restored.transact(again := boot("again", vm=NEW_VM))  # its name is bound, too
        newer.transact(again)
        unit = sync(again, "body", "storage")
        assert restored.transact(unit).passphrases == newer.transact(unit).passphrases


@pytest.mark.parametrize(
    ("which", "changed"),
    [
        *((which, f"generation.{name}") for which in (0, 1) for name in ("volume", "generation", "state")),
        (1, "volume.volume"),  # of the old store none is read
    ],
)
def test_a_value_of_another_type_is_named(command: Command, stores: tuple[str, str], which: int, changed: str) -> None:
    """Without a KEK there is no MAC to tell, and SQLite takes any type in any column."""
    table, _, column = changed.partition(".")
    with closing(sqlite3.connect(stores[which].removeprefix("sqlite:"), isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = 1")
        (row,) = connection.execute(f"SELECT max(rowid) FROM {table} WHERE vm = ?", (VM.name,)).fetchone()
        connection.execute(f"UPDATE {table} SET {column} = X'FF' WHERE rowid = ?", (row,))
    compared = command("store", "compare", *stores)
    assert compared.code == 2
    assert f"of table {table} is not authentic: no key server writes such a value of {column}" in compared.err


def test_what_was_proven_since_the_backup_is_not_forgotten(
    command: Command, stores: tuple[str, str], config: Path
) -> None:
    """Else a stranger on the platform could take the name over without the hotkey, or a VM be served as before."""
    old, new = stores
    with closing(open_store(new)) as newer:
        newer.transact(evolve(boot("proven"), hotkey_proven=True, exchange="two-phase"))
    assert command("store", "compare", old, new, "--take", "--config", config).code == 0
    with closing(open_store(old)) as restored:
        claim = restored.transact(Ask(Read(VmRow, VM)))
    assert claim is not None
    assert (claim.proven, claim.exchange) == (True, "two-phase")


def test_another_key_of_the_same_number_is_not_overwritten(
    command: Command, stores: tuple[str, str], config: Path
) -> None:
    """A server went on with the restored store before anybody compared."""
    old, new = stores
    with closing(open_store(old)) as restored:
        _ = rotated(restored, "diverged")
        before = restored.transact(Ask(ReadAll(GenerationRow, VM)))
    ended = command("store", "compare", old, new, "--take", "--config", config, "--json")
    assert ended.code == 1
    states = {(each["vm"], each["volume"]): each["state"] for each in ended.json["volumes"]}
    assert states == {
        (VM.name, "storage"): "differs",
        (NEW_VM.name, "root"): "taken",
        (NEW_VM.name, "storage"): "taken",
    }
    with closing(open_store(old)) as restored:
        assert restored.transact(Ask(ReadAll(GenerationRow, VM))) == before


def test_keys_are_taken_where_the_newer_store_has_purged_the_backups_own(
    command: Command, stores: tuple[str, str], config: Path
) -> None:
    """The backup is older than the retention: its active key is one of those that were deleted since."""
    old, new = stores
    with closing(open_store(new)) as newer:
        for label in "345":
            _ = rotated(newer, label)
        purged = newer.transact(PurgeKeys(NOW + 86_400, 0, "old", (VM,), carry_out=True))
    (active,) = [row for row in storage_keys(old) if row.state == "active"]
    assert (active.volume, active.generation) in [(row.volume, row.generation) for row in purged]
    assert command("store", "compare", old, new, "--take", "--config", config).code == 0
    (kept,) = [row for row in storage_keys(old) if row.generation == active.generation]
    assert (kept.state, kept.sealed) == ("retired", active.sealed)
    with closing(open_store(old)) as restored, closing(open_store(new)) as newer:
        assert current(restored, "6") == current(newer, "6")


@pytest.mark.parametrize("are_both_purged", [False, True])
def test_what_the_backup_has_purged_stays_purged(
    command: Command, stores: tuple[str, str], config: Path, are_both_purged: bool
) -> None:
    """And the key that a VM's callers have is no disk's: it is never missed."""
    old, new = stores
    with closing(open_store(new)) as newer:
        for label in "345":
            _ = rotated(newer, label)
    _ = shutil.copy(new.removeprefix("sqlite:"), old.removeprefix("sqlite:"))
    with closing(open_store(old)) as restored:
        restored.transact(PurgeKeys(NOW + 86_400, 0, "old", (VM,), carry_out=True))
    purged = {row.generation for row in storage_keys(old) if row.sealed is None}
    with closing(open_store(new)) as newer:
        if are_both_purged:
            newer.transact(PurgeKeys(NOW + 86_400, 0, "old", (VM,), carry_out=True))
        _ = rotated(newer, "6")
        newer.transact(Ask(Insert(evolve(storage_keys(new)[0], volume=CALLER_VOLUME, generation=1))))
    assert purged
    assert command("store", "compare", old, new, "--take", "--config", config).code == 0
    assert {row.generation for row in storage_keys(old) if row.sealed is None} == purged
    assert len(storage_keys(old)) == len(storage_keys(new))


def storage_keys(address: str) -> list[GenerationRow]:
    with closing(open_store(address)) as store:
        return [row for row in store.transact(Ask(ReadAll(GenerationRow, VM))) if row.volume == "storage"]


def test_a_vm_that_is_bound_elsewhere_takes_its_keys_only_once_it_is_rebound(
    command: Command, stores: tuple[str, str], config: Path
) -> None:
    """The owner proved itself after the backup, and took over a name that a stranger had booted first."""
    old, new = stores
    owner, name = platform("owner"), Vm(VM.hotkey, "vm-taken")
    stranger = evolve(boot("stranger", vm=name), root=None)
    with closing(open_store(old)) as restored, closing(open_store(new)) as newer:
        for store in (restored, newer):
            store.transact(stranger)
        proven = evolve(boot("owner", vm=name), root=None, platform=owner, hotkey_proven=True)
        newer.transact(proven)
        newer.transact(sync(proven, "body", "storage"))
    take = ("store", "compare", old, new, "--take", "--config", config, "--json")
    ended = command(*take)
    states = {each["vm"]: each["state"] for each in ended.json["volumes"]}
    assert (ended.code, states) == (1, {VM.name: "taken", NEW_VM.name: "taken", name.name: "elsewhere"})
    with closing(open_store(old)) as restored:
        assert not restored.transact(Ask(ReadAll(GenerationRow, name)))
        restored.transact(RebindVm(proven.now, name, owner, False, proven.vault, "the owner's"))
    ended = command(*take)
    assert (ended.code, [each["state"] for each in ended.json["volumes"]]) == (0, ["taken"])


def test_keys_that_were_taken_half_are_taken_by_running_it_again(
    command: Command, stores: tuple[str, str], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = ("store", "compare", *stores, "--take", "--config", config, "--json")
    with ExitStack() as stack, monkeypatch.context() as patch:

        @contextmanager
        def waiting(_doing: str, _total: int) -> Iterator[Callable[..., object]]:
            yield lambda *_: stack.enter_context(held(tmp_path / "old.db"))

        patch.setattr(output, "waiting", waiting)
        patch.setattr("chutes_proto.cli.operator.store._VMS", 1)
        patch.setitem(SqliteStore.__init__.__kwdefaults__ or {}, "busy_seconds", 0.1)
        ended = command(*take)
    assert (ended.code, "run the command again, and it does what is left" in ended.err) == (2, True), ended
    again = command(*take)
    assert (again.code, len({each["vm"] for each in again.json["volumes"]})) == (0, 1)


@contextmanager
def held(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        _ = connection.execute("BEGIN IMMEDIATE")
        yield


def test_a_key_that_the_server_could_not_open_is_not_taken(
    command: Command, stores: tuple[str, str], config: Path
) -> None:
    old, new = stores
    write_file(config.with_name("kek"), bytes(32), mode=0o600)
    with closing(open_store(old)) as restored:
        before = dump(restored)
    refused = command("store", "compare", old, new, "--take", "--config", config, "--json")
    assert (refused.code, "name the file of that KEK" in refused.json["error"]) == (1, True)
    write_file(config.with_name("kek.old"), bytes(range(32)), mode=0o600)
    with closing(open_store(old)) as restored:
        assert dump(restored) == before
    text = config.read_text().replace('kek_file = "kek"', 'kek_file = "kek"\nkek_previous_file = "kek.old"')
    _ = config.write_text(text)
    assert command("store", "compare", old, new, "--take", "--config", config).code == 0


def test_stores_that_cannot_be_compared(command: Command, stores: tuple[str, str], tmp_path: Path) -> None:
    old, new = stores
    with closing(SqliteStore(tmp_path / "foreign.db", vault=VAULT)) as foreign:
        foreign.transact(evolve(boot("foreign"), root=None))
        other = boot("another", vm=Vm(VM.hotkey, "another"))
        foreign.transact(other)
    _ = (tmp_path / "cut.db").write_bytes((tmp_path / "new.db").read_bytes()[:5000])
    _ = (tmp_path / "text.db").write_text("no database " * 1000)
    for which, why in (
        ([old, f"sqlite:{tmp_path}/none.db"], "not made yet"),
        ([old, f"sqlite:{tmp_path}/foreign.db"], "share no key"),
        ([old, f"sqlite:{tmp_path}/cut.db"], "cut.db"),
        ([f"sqlite:{tmp_path}/text.db", new], "text.db"),
        ([old, old], "name the newer store"),
        ([old, "mysql://x"], "NEW: say"),
        ([old, f"postgresql://u:{PASSWORD}@h/d"], "leave the password out"),
        ([old, new, "--take"], "goes with --config"),
    ):
        ended = command("store", "compare", *which)
        assert (ended.code, why in " ".join(ended.err.split())) == (2, True), (which, ended)
        assert "Traceback" not in ended.err
        assert PASSWORD not in ended.err


def test_it_takes_from_postgresql(
    command: Command, stores: tuple[str, str], config: Path, empty_schema: str, tmp_path: Path
) -> None:
    """The newer store is a database, the restored one a file."""
    old, new = stores
    StorePlace(empty_schema, tmp_path, vault=VAULT).open(make=True).close()
    _ = config.write_text(config.read_text().replace("sqlite:keys.db", empty_schema))
    assert command("store", "copy", "--from", new, "--config", config).code == 0
    passfile = tmp_path / "pgpass"
    write_file(passfile, f"*:*:*:*:{PASSWORD}\n".encode(), mode=0o600)
    newer = empty_schema.replace(f":{PASSWORD}@", "@") + f"&passfile={passfile}"
    assert len(command("store", "compare", old, newer, "--json").json["volumes"]) == 3
    assert command("store", "compare", old, newer, "--take", "--config", config).code == 0
    assert command("store", "compare", old, new).code == 0


def test_a_newer_store_without_keys_has_none_that_are_missing(command: Command, tmp_path: Path) -> None:
    for name in ("old.db", "new.db"):
        SqliteStore(tmp_path / name, vault=VAULT).close()
    ended = command("store", "compare", f"sqlite:{tmp_path}/old.db", f"sqlite:{tmp_path}/new.db")
    assert (ended.code, "no key is missing" in ended.out) == (0, True)


def test_keys_of_a_vm_that_no_platform_claims_are_taken(
    command: Command, stores: tuple[str, str], config: Path
) -> None:
    """As after an import: its next boot claims the name."""
    old, new = stores
    with closing(open_store(new)) as newer:
        newer.transact(Ask(Forget(VmRow, NEW_VM)))
    assert command("store", "compare", old, new, "--take", "--config", config).code == 0
    with closing(open_store(old)) as restored:
        assert restored.transact(Ask(Read(VmRow, NEW_VM))) is None
        assert restored.transact(Ask(ReadAll(GenerationRow, NEW_VM)))
