"""The how-to guides about keys, backups and stores: a shell runs every command in them, where it would be needed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psycopg
import pytest
from cryptography.fernet import Fernet
from psycopg.conninfo import conninfo_to_dict

from chutes_proto.errors import StoreError
from chutes_proto.io.files import write_file
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.store._rows import AuditRow, BootRow, InsertAll, Scan
from chutes_proto.store._run import Ask
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import VAULT, boot
from chutes_proto.units.operator import StoreRestored
from tests.cli.conftest import HOTKEY
from tests.conftest import SOAK
from tests.postgres import Cluster
from tests.scenario.premises import Premises
from tests.waiting import wait_until
from tools.docs.pages import DOCS, fences

RECIPES: dict[str, list[str]] = {}
for page in ("keys-and-disks", "backup-restore", "rotate-kek"):
    for fence in fences(DOCS / "how-to" / f"{page}.md"):
        if fence.language == "sh":
            RECIPES.setdefault(fence.heading, []).append(fence.text)
MOVE = "Move a store from SQLite"
RECIPES[MOVE] = [
    one.text for one in fences(DOCS / "how-to" / "postgresql.md") if (one.heading, one.language) == (MOVE, "sh")
]
PPID, INSTANCE = "00112233445566778899aabbccddeeff", "ffeeddccbbaa99887766554433221100"

LONG = pytest.mark.skipif(not SOAK, reason="it runs in make soak: each takes a database of its own")
in_a_file = pytest.mark.parametrize("premises", ["sqlite"], indirect=True)


def follow(
    premises: Premises,
    title: str,
    part: int,
    platform: SimulatedPlatform | None = None,
    env: Any = None,
    misspelt: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Run one block of a recipe, in the operator's directory; what it says."""
    script = RECIPES[title][part]
    for right, wrong in misspelt.items():
        assert right in script
        script = script.replace(right, wrong)
    if platform is not None:
        assert PPID in script
        script = script.replace(PPID, platform.ppid.hex())
        script = script.replace(INSTANCE, (platform.platform_instance_id or b"").hex())
    program = f'chutes-proto() {{ {shlex.quote(sys.executable)} -m chutes_proto "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-c", program + script],  # as it is pasted: what goes on after a failure does so
        cwd=premises.directory,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def key(premises: Premises, **members: Any) -> str:
    vm = premises.vm()
    answer = vm.sync(vm.boot()["boot_token"], **members)
    return str(answer["storage"])


@in_a_file
def test_after_a_rekey(premises: Premises) -> None:
    premises.start_here()
    first = key(premises)
    assert key(premises, rekey=["storage"]) != first
    assert "retired" in follow(premises, "A disk does not open after a rekey", 0)
    assert key(premises) == first


@in_a_file
def test_a_lost_confirmation(premises: Premises) -> None:
    premises.edit('root_passphrase = "vm"', 'root_passphrase = "vm"\nexchange = "two-phase"')
    premises.start_here()

    def attest() -> tuple[Any, Callable[..., Any]]:
        vm = premises.vm()
        answer = vm.attest(vm.boot()["luks_quote_nonce"], "storage", formatted=["storage"])
        return answer["volumes"]["storage"], lambda: vm.confirm(answer["confirm_nonce"], storage=True)

    _ = attest()[1]()
    keys, confirm = attest()
    _ = confirm()  # and its answer is lost, so that the client takes the next key off the disk again
    assert keys["current"] in [attest()[0]["current"] for _ in range(2)]
    said = follow(premises, "A confirmation was lost", 0)
    assert "storage/1  retired, provisional" in said
    assert "confirm" in said


@in_a_file
def test_a_new_disk(premises: Premises) -> None:
    premises.start_here()
    first = key(premises, formatted=["storage"])

    def in_use() -> list[str]:
        vm = premises.vm()
        answer: list[str] = vm.sync(vm.boot()["boot_token"], formatted=[])["in_use"]
        return answer

    assert in_use() == ["storage"]
    _ = follow(premises, "A disk was replaced", 0)
    assert in_use() == []
    assert key(premises) == first


@in_a_file
def test_another_machine(premises: Premises) -> None:
    premises.start_here()
    first = key(premises)
    home = premises.platform
    premises.platform = home.another(1)
    collateral = premises.directory / "collateral" / "another.json"
    write_file(collateral, premises.platform.collateral_json(premises.now))
    assert premises.vm().boot(status=403)["code"] == "platform_mismatch"
    write_file(premises.directory / "quote.bin", premises.platform.quote(bytes(64)))
    said = follow(premises, "A VM's disks moved to another machine", 0, premises.platform)
    assert premises.platform.ppid.hex() in said
    assert key(premises) == first
    premises.platform = home
    assert premises.vm().boot(status=403)["code"] == "platform_mismatch"


@in_a_file
def test_a_backup(premises: Premises, require_program: Callable[[str], str]) -> None:
    _ = require_program("sqlite3")
    premises.start()
    first = key(premises)
    token = premises.vm().boot()["boot_token"]
    nonce = premises.vm().nonce()
    issued = int(time.time())
    _ = follow(premises, "Back up a store in SQLite", 0)
    backup = premises.directory / "keys.backup"
    assert backup.stat().st_mode & 0o777 == 0o600
    content = backup.read_bytes()
    with pytest.raises(AssertionError):
        _ = follow(premises, "Back up a store in SQLite", 0, misspelt={"keys.db": "nowhere.db"})
    assert (backup.read_bytes() == content, list(premises.directory.glob("nowhere.db*"))) == (True, [])
    assert key(premises, rekey=["storage"]) != first
    premises.kill()
    assert (premises.directory / "keys.db-wal").stat().st_size
    with pytest.raises(AssertionError):
        _ = follow(premises, "Restore a store in SQLite", 0, misspelt={"keys.backup": "keys.bakup"})
    assert (premises.directory / "keys.db-wal").stat().st_size
    if os.geteuid() == 0:  # an operator restores as root what the server's user must open
        os.chown(premises.directory, 65534, 65534)
    _ = follow(premises, "Restore a store in SQLite", 0)
    owners = [(path.stat().st_uid, path.stat().st_gid) for path in (premises.directory, premises.directory / "keys.db")]
    assert owners[0] == owners[1]
    assert (premises.directory / "replaced" / "keys.db-wal").stat().st_size
    (premises.directory / "replaced").rename(premises.directory / "older")
    for lost in premises.directory.glob("keys.db*"):  # a disk that took the store with it
        lost.unlink()
    _ = follow(premises, "Restore a store in SQLite", 0)
    assert "keys sealed under" in follow(premises, "Restore a store in SQLite", 1)
    premises.start()
    _ = premises.vm().sync(token, status=401)
    for of_before in (nonce, None):
        assert premises.vm().boot(of_before, status=503)["code"] == "store_unavailable"
    _ = wait_until(lambda: int(time.time()) != issued)
    premises.turn(f"UPDATE fact SET value = {issued} WHERE name = 'nonce_horizon'")  # a minute passes
    assert premises.vm().boot(nonce, status=503)["code"] == "store_unavailable"
    assert key(premises) == first


@in_a_file
def test_what_the_backup_lacks(premises: Premises, require_program: Callable[[str], str]) -> None:
    """A disk was formatted anew after the backup; the store that was replaced can still be read."""
    _ = require_program("sqlite3")
    premises.start()
    _ = key(premises)
    _ = follow(premises, "Back up a store in SQLite", 0)
    newest = key(premises, rekey=["storage"])
    premises.kill()
    _ = follow(premises, "Restore a store in SQLite", 0)
    assert "missing" in follow(premises, "Take the keys that the backup lacks", 0)
    assert "taken" in follow(premises, "Take the keys that the backup lacks", 1)
    premises.start()
    assert key(premises) == newest


@pytest.mark.parametrize(
    "archive",
    [
        "whole",
        *(pytest.param(case, marks=LONG) for case in ("packaged", "earlier", "missing", "truncated", "foreign")),
    ],
)
def test_a_recovery_to_the_last_transaction(postgres_programs: Path, archive: str) -> None:
    """The database is killed after the last commit, with its disk lost; what was acknowledged is recovered.

    Where the archive does not have it all, or it stops at an earlier time, the database does not start, or servers
    refuse what it recovered.
    """
    title = "Point-in-time recovery in PostgreSQL"
    settings = {"wal_level": "replica", "max_wal_senders": "4"}
    with ExitStack() as stack:
        cluster = Cluster(postgres_programs, None, settings)
        stack.callback(cluster.remove)
        (cluster.folder / "password").unlink()
        given = "postgresql://backup@db.internal/postgres?passfile=/etc/chutes/pgpass"
        assert given in RECIPES[title][0]
        at = f"PATH={postgres_programs}:$PATH\n" + RECIPES[title][0].replace(given, cluster.url())
        cluster.shell(at)
        again = at.replace("mkdir", ": mkdir")
        receiving = cluster.begin(f"{again}exec {RECIPES[title][1]}")
        stack.callback(receiving.wait, 60)
        stack.callback(receiving.kill)
        for statement in text_of(title, "sql").split(";")[:2]:
            with psycopg.connect(cluster.url(), autocommit=True) as database:
                _ = database.execute(statement.encode())
        with psycopg.connect(cluster.url(), autocommit=True) as database:
            synchronous = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
            _ = wait_until(lambda: database.execute(synchronous).fetchone())
        place = StorePlace(cluster.url(), cluster.folder, mark_file=cluster.folder / "mark", vault=VAULT)
        with closing(place.open(make=True)) as store:
            store.keep_mark()
            store.transact(boot("before"))
            for _ in range(2):  # that day
                cluster.shell(again + RECIPES[title][2])
                another_second()
            kept = sorted(cluster.folder.glob("base-*"))
            assert len(kept) == 2
            assert "head -n -7" in RECIPES[title][2]
            keep_one = again + RECIPES[title][2].replace("head -n -7", "head -n -1")
            cluster.shell("mkdir partial && touch partial/file")  # as a loss of power leaves it
            assert cluster.begin(keep_one).wait(120) != 0
            assert sorted(cluster.folder.glob("base-*")) == kept
            cluster.shell(f"rm -r partial\n{keep_one}")
            (base,) = cluster.folder.glob("base-*")
            assert base not in kept
            assert not (cluster.folder / "wal" / "000000010000000000000001").exists()
            store.transact(boot("between"))
            with psycopg.connect(cluster.url()) as database:
                ((then,),) = database.execute("SELECT clock_timestamp()::text").fetchall()
            store.transact(boot("last"))
            cluster.stop(signal.SIGKILL)
        shutil.rmtree(cluster.folder / "data")
        receiving.kill()
        harm(cluster.folder / "wal", archive, postgres_programs)
        mark = (cluster.folder / "mark").read_bytes()
        recover = RECIPES[title][3].replace(
            "touch", f"cat {cluster.folder}/here >> recovered/postgresql.auto.conf\ntouch"
        )
        here = {"listen_addresses": "", "unix_socket_directories": str(cluster.folder), "max_connections": "120"}
        if archive == "packaged":  # as with Debian's packages
            start = "pg_ctl --pgdata recovered --wait start"
            assert start in recover
            there = text_of(title, "bash").replace("/etc/postgresql/15/main", f"{cluster.folder}/etc")
            recover = recover.replace(start, f"{PACKAGED}\n{there}")
        if archive == "earlier":
            last = "synchronous_standby_names = ''\n"
            lines_of_time = re.sub(r"(?<=time = ').*(?=')", then, text_of(title, "text"))
            assert (last in recover, then in lines_of_time) == (True, True)
            recover = recover.replace(last, f"{last}{lines_of_time}\n")
        lines = [f"{name} = '{value}'\n" for name, value in {**settings, **here}.items()]
        _ = (cluster.folder / "here").write_text("".join(lines))
        debian = "/usr/lib/postgresql/15/bin"
        assert debian in recover
        recover = recover.replace(debian, str(postgres_programs))
        script = f"PATH=/usr/bin:/bin\n{recover.replace('--wait', '--wait --log log')}"
        if archive == "truncated":
            assert cluster.begin(script).wait(120) != 0
            assert "has wrong size" in (cluster.folder / "log").read_text()
            return
        cluster.shell(script)
        stack.callback(cluster.shell, f"{postgres_programs}/pg_ctl --pgdata recovered --mode immediate stop")
        if archive not in {"whole", "packaged"}:
            with pytest.raises(StoreError, match="it lacks"):
                _ = place.open()
            assert (cluster.folder / "mark").read_bytes() == mark
            return
        with closing(place.open()) as store:
            assert {row.boot_id for row in store.transact(Ask(Scan(BootRow)))} == {
                boot(label).boot_id for label in ("before", "between", "last")
            }
            _ = store.transact(StoreRestored(0, "recovered"))
        cluster.shell(f"mkdir new && cd new\n{at}{RECIPES[title][2]}")  # of the new database


PACKAGED = """
mkdir etc
mv recovered/postgresql.conf recovered/pg_hba.conf recovered/pg_ident.conf etc
cat >> etc/postgresql.conf <<END
data_directory = '/var/lib/postgresql/15/main'
hba_file = '$PWD/etc/pg_hba.conf'
ident_file = '$PWD/etc/pg_ident.conf'
END"""
"""Leave a base backup as one of Debian's packages is, whose configuration names the old database's directory."""


def another_second() -> None:
    second = int(time.time())
    _ = wait_until(lambda: int(time.time()) != second)


def harm(wal: Path, archive: str, programs: Path) -> None:
    """Spoil the newest file of an archive."""
    newest = max(wal.iterdir())
    match archive:
        case "missing":
            newest.unlink()
        case "truncated":
            os.truncate(newest, newest.stat().st_size // 2)
        case "foreign":
            other = Cluster(programs)
            try:
                _ = newest.write_bytes(next((other.folder / "data" / "pg_wal").glob("0*")).read_bytes())
            finally:
                other.remove()
        case _:
            pass


def text_of(title: str, language: str) -> str:
    found = fences(DOCS / "how-to" / "backup-restore.md")
    return next(fence.text for fence in found if (fence.heading, fence.language) == (title, language))


@pytest.mark.parametrize("premises", ["sqlite", "postgresql"], indirect=True)
def test_a_clock_that_was_ahead(premises: Premises) -> None:
    premises.start_here()
    premises.turn(f"UPDATE fact SET value = {premises.now + 86_400} WHERE name = 'nonce_horizon'")
    assert premises.vm().boot(status=503)["code"] == "store_unavailable"
    premises.wait_for_log("a clock was ahead", "run `chutes-proto store restored`")
    before = premises.now
    said = follow(premises, "A clock was ahead, and boots wait for a time in the future", 0)
    granted = re.search(r"boots are granted again after (\S+)", said)
    assert granted is not None
    assert before + 60 <= datetime.fromisoformat(granted[1]).timestamp() <= premises.now + 60
    premises.turn(f"UPDATE fact SET value = {before - 60} WHERE name = 'nonce_horizon'")  # a minute passes
    assert premises.vm().boot()


@in_a_file
def test_another_key_encryption_key(premises: Premises) -> None:
    title = "One server"
    premises.start_here()
    first = key(premises)
    old = (premises.directory / "kek").read_bytes()
    assert "store: " in follow(premises, title, 0)
    assert (premises.directory / "kek").stat().st_mode & 0o777 == 0o600
    assert (premises.directory / "kek.previous").read_bytes() == old
    new = (premises.directory / "kek").read_bytes()
    with pytest.raises(AssertionError, match=r"kek\.previous.*File exists"):  # once more, by mistake
        _ = follow(premises, title, 0)
    assert (premises.directory / "kek").read_bytes() == new
    assert (premises.directory / "kek.previous").read_bytes() == old
    assert premises.configuration.stat().st_mode & 0o777 == 0o600
    premises.stop()
    premises.start_here()
    assert key(premises) == first
    assert "no key is under another" in follow(premises, title, 1)
    premises.edit('kek_previous_file = "kek.previous"\n', "")
    premises.stop()
    premises.start_here()
    assert key(premises) == first


@in_a_file
def test_a_purge(premises: Premises) -> None:
    row = AuditRow(premises.now - 366 * 86_400, "vm", "old", "granted")
    with closing(premises.open()) as store:
        store.transact(Ask(InsertAll((row,) * 300)))
    premises.start_here()
    last = [key(premises, rekey=["storage"]) for _ in range(5)][-1]
    premises.turn("UPDATE generation SET retired_at = retired_at - 91 * 86400")
    said = follow(premises, "Purge retired keys", 0)
    assert "2 passphrases deleted" in said
    assert premises.json("audit", "checkpoint")["size"] > 300  # all old rows are sequenced, as they soon are
    assert " deleted: 256\n" in follow(premises, "Purge retired keys", 1)
    (exported,) = premises.directory.glob("audit-*.jsonl")
    events = [json.loads(line)["event"] for line in exported.read_text().splitlines()]
    assert (events.count("old"), events.count("boot")) == (300, 5)
    events = [row["event"] for row in premises.json("audit", "list")["rows"]]
    assert (events.count("old"), events.count("boot")) == (44, 5)
    assert premises.json("audit", "verify")["ok"]
    assert key(premises) == last


@in_a_file
def test_a_move_to_postgresql(premises: Premises, empty_schema: str) -> None:
    premises.edit('store = "sqlite:keys.db"', 'store = { url = "sqlite:keys.db", mark_file = "store.mark" }')
    premises.start_here()
    vm = premises.vm()
    token = vm.boot()["boot_token"]
    first = key(premises, formatted=["storage"])
    premises.stop()
    moved = premises.directory / "postgres.toml"
    write_file(moved, premises.configuration.read_bytes().replace(b"sqlite:keys.db", empty_schema.encode()), mode=0o600)
    before = (premises.directory / "keys.db").read_bytes()
    with pytest.raises(AssertionError, match=r"sever\.toml: cannot be read"):
        _ = follow(premises, MOVE, 0, misspelt={"--from-config server.toml": "--from-config sever.toml"})
    assert (premises.directory / "keys.db").read_bytes() == before
    said = follow(premises, MOVE, 0)
    assert f"copied from: {premises.directory}/keys.db" in said
    assert "is not compared with a mark" not in said
    assert not list(premises.directory.glob("keys.db*"))
    assert (premises.directory / "moved" / "keys.db").stat().st_size
    assert empty_schema in premises.configuration.read_text()
    assert not (premises.directory / "store.mark").exists()
    premises.start_here()
    assert vm.sync(token, formatted=["storage"])["storage"] == first  # what was issued counts
    vm = premises.vm()
    assert vm.sync(vm.boot()["boot_token"], formatted=[])["in_use"] == ["storage"]


@in_a_file
def test_an_import(premises: Premises, empty_schema: str, require_program: Callable[[str], str]) -> None:
    require_program("psql")
    fernet = Fernet.generate_key()
    write_file(premises.directory / "fernet.key", fernet, mode=0o600)
    passphrases = json.dumps({name: Fernet(fernet).encrypt(name.encode() * 9).decode() for name in ("storage",)})
    with psycopg.connect(empty_schema, autocommit=True) as database:
        _ = database.execute(
            b"CREATE TABLE vm_cache_configs (miner_hotkey text, vm_name text, volume_passphrases jsonb,"
            b" last_boot_at timestamptz, PRIMARY KEY (miner_hotkey, vm_name))"
        )
        row = (HOTKEY, "vm-1", passphrases)
        _ = database.execute("INSERT INTO vm_cache_configs VALUES (%s, %s, %s, now())", row)
    where = conninfo_to_dict(empty_schema)
    names = {
        "host": "PGHOST",
        "user": "PGUSER",
        "password": "PGPASSWORD",
        "options": "PGOPTIONS",
        "dbname": "PGDATABASE",
    }
    env = {variable: str(where[name]) for name, variable in names.items() if name in where}
    said = follow(premises, "Import keys from the reference system", 0, env=env)
    assert "not bound, holds keys" in said
    premises.start_here()
    assert premises.vm().boot(status=403)["code"] == "platform_mismatch"
    _ = follow(premises, "Import keys from the reference system", 1, premises.platform)
    assert key(premises) == "storage" * 9


def test_no_recipe_is_left_out() -> None:
    source = Path(__file__).read_text("utf-8")
    for title in RECIPES:
        assert f'"{title}"' in source, title
    assert sum(map(len, RECIPES.values())) == 22
