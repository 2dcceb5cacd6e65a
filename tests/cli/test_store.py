"""`store`: an operator makes and checks a store; and `serve` in PostgreSQL, which does neither."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from attrs import evolve

from chutes_proto.errors import StoreBusy
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.store_setup import make_store_setup
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.keys.vault import Vault
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import AuditRow, InsertAll
from chutes_proto.store._run import Ask
from chutes_proto.store._sql import SCHEMA_VERSION
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import VAULT, boot
from tests.cli.conftest import HOTKEY, PROGRAM, Ended, Server
from tests.postgres import PASSWORD, Cluster, schema

PLATFORM = SimulatedPlatform(bytes(32))

Command = Callable[..., Ended]


@pytest.fixture
def site(tmp_path: Path, empty_schema: str) -> Path:
    """An operator's directory, with an empty schema in PostgreSQL for a store."""
    directory = tmp_path / "site"
    directory.mkdir()
    write_server(directory, PLATFORM, int(time.time()))
    configuration = directory / "server.toml"
    text = configuration.read_text()
    assert '"sqlite:keys.db"' in text
    configuration.write_text(text.replace('"sqlite:keys.db"', f'"{empty_schema}"'))
    return directory


def quiet(*ends: Ended) -> None:
    """No password, and no traceback."""
    for end in ends:
        assert PASSWORD not in end.out + end.err
        assert "Traceback" not in end.err


# --- SQLite ---


def test_sqlite_is_made_checked_and_left_alone(command: Command, tmp_path: Path) -> None:
    address = f"sqlite:{tmp_path}/keys.db"
    missing = command("store", "check", "--store", address)
    assert (missing.code, "not made yet" in missing.err) == (1, True)
    assert list(tmp_path.iterdir()) == []
    with closing(SqliteStore(tmp_path / "keys.db", vault=VAULT)) as store:
        store.transact(boot("first", now=int(time.time())))
    found = command("store", "check", "--store", address, "--json").json
    assert (found["store"], found["rows"]["boot"], found["rows"]["volume"]) == (f"{tmp_path}/keys.db", 1, 0)
    assert "generation 1" in command("store", "check", "--store", address).out


def test_a_newer_schema_and_damage_are_refused_and_left_alone(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    with closing(SqliteStore(path, vault=VAULT)) as store:
        for number in range(40):
            store.transact(boot(str(number)))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE fact SET value = 999 WHERE name = 'schema_version'")
    before = path.read_bytes()
    end = command("store", "check", "--store", f"sqlite:{path}", "--json")
    assert (end.code, end.json["ok"]) == (1, False)
    assert "run the release that made it" in end.json["error"]
    assert "run the release that made it" in end.err
    assert path.read_bytes() == before
    path.write_bytes(before[: 4096 * 2] + b"\xa5" * (len(before) - 4096 * 2))
    assert command("store", "check", "--store", f"sqlite:{path}").code == 1


# --- PostgreSQL ---


def test_a_server_works_only_in_a_schema_that_was_made(
    command: Command, start: Callable[..., Server], site: Path, empty_schema: str
) -> None:
    config = ("--config", site / "server.toml")
    ends = [command("serve", *config), command("store", "check", *config), command("serve", *config, "--check")]
    for end in ends[:2]:
        assert end.code == 1
        assert "it is empty, as only a new one may be; run `chutes-proto store init`" in end.err
    remedy = f"chutes-proto store init --config {site}/server.toml"
    assert f"it is empty, as only a new one may be; nothing in it was changed; run {remedy}" in ends[2].err
    findings = command("serve", "--check", *config, "--json").json["findings"]
    (problem,) = [each for each in findings if each["state"] == "problem"]
    assert problem["detail"] == "it is empty, as only a new one may be; nothing in it was changed"
    assert problem["remedy"] == remedy
    made = command("store", "init", *config)
    assert made.code == 0, made.err
    checked = command("serve", *config, "--check")
    assert checked.code == 0, checked.err
    server = start(*config, ca=site / "ca.pem")
    simulated = site / "platform"
    key = site.parent / "platform-of-vms"
    assert not simulated.exists()
    end = server.stop(signal.SIGTERM)
    assert end.code == 0, end.err
    found = command("store", "check", *config, "--json")
    assert found.json["ok"]
    with closing(make_store_setup(ServerConfig.load(site / "server.toml")).store.open()) as store:
        store.transact(boot("first", now=int(time.time())))
    refused = command("store", "check", *config)
    assert refused.code == 1
    assert "neither kek_file nor kek_previous_file" in refused.err
    quiet(*ends, made, checked, end, found, refused)
    assert not key.exists()
    assert HOTKEY


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1])
def test_another_schema_version_is_refused(command: Command, site: Path, empty_schema: str, version: int) -> None:
    PostgresStore(empty_schema, make=True).close()
    with psycopg.connect(empty_schema) as connection:
        connection.execute("UPDATE fact SET value = %s WHERE name = 'schema_version'", (version,))
    for words in (["serve"], ["serve", "--check"], ["store", "init"], ["store", "check"]):
        end = command(*words, "--config", site / "server.toml")
        assert end.code == 1
        assert f"schema version {version}" in end.err
        quiet(end)


# --- what is said, and what is not ---


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("keys.db", '"sqlite:/path/to/keys.db" or "postgresql://user@host/database"'),
        ("postgresql:keys", '"sqlite:/path/to/keys.db" or "postgresql://user@host/database"'),
        (f"postgresql://me:{PASSWORD}@db/keys", "other users can read a command line"),
        (f"postgresql://db/keys?password={PASSWORD}", "other users can read a command line"),
        ("postgresql://db/keys?colour=red", "not a PostgreSQL URL"),
    ],
)
def test_a_wrong_address_is_usage(command: Command, address: str, told: str) -> None:
    end = command("store", "check", "--store", address)
    assert (end.code, told in end.err) == (2, True), end.err
    quiet(end)


def test_a_password_comes_from_a_file(command: Command, cluster: Cluster, tmp_path: Path) -> None:
    passfile = tmp_path / "pgpass"
    passfile.write_text(f"*:*:*:*:{PASSWORD}\n")
    passfile.chmod(0o600)
    with schema(cluster.url()) as url:
        address = url.replace(f":{PASSWORD}@", "@") + f"&passfile={passfile}"
        assert PASSWORD not in address
        PostgresStore(address, make=True).close()
        made = command("store", "check", "--store", address)
        assert made.code == 0, made.err
        passfile.write_text("*:*:*:*:another\n")
        refused = command("store", "check", "--store", address)
        assert refused.code == 1
        assert "password authentication failed" in refused.err
        quiet(made, refused)


# --- copies ---


def vault_of(site: Path) -> Vault:
    return make_store_setup(ServerConfig.load(site / "server.toml")).vault


def filled(path: Path, vault: Vault) -> str:
    with closing(SqliteStore(path, vault=vault)) as store:
        for number in range(3):
            store.transact(evolve(boot(str(number)), vault=vault))
    return f"sqlite:{path}"


def with_store(site: Path, name: str) -> tuple[str, Path]:
    """The option for a configuration with the same KEK, and with that file for its store."""
    text = (site / "server.toml").read_text()
    (line,) = (each for each in text.splitlines() if each.startswith("store = "))
    path = site / f"{name}.toml"
    path.write_text(text.replace(line, f'store = "sqlite:{name}"'))
    return "--config", path


def test_a_store_is_copied_into_an_empty_one_and_no_other(command: Command, site: Path) -> None:
    foreign = filled(site / "foreign.db", VAULT)
    old = filled(site / "old.db", vault_of(site))
    config, new = ("--config", site / "server.toml"), with_store(site, "new.db")
    unmade = command("store", "copy", "--from", old, *config)
    assert (unmade.code, "run `chutes-proto store init`" in unmade.err) == (1, True)
    made = command("store", "init", *config)
    assert "a new store without keys; `chutes-proto store copy` fills it" in made.out
    before = (site / "old.db").read_bytes()
    lost = command("store", "copy", "--from", foreign, *config, "--json")  # sealed under keys that this server has not
    assert (lost.code, lost.json["ok"]) == (1, False)
    assert "neither kek_file nor kek_previous_file" in lost.json["error"]
    assert command("store", "check", *config, "--json").json["rows"]["audit"] == 0
    copied = command("store", "copy", "--from", old, *new, "--reason", "a test", "--json")
    assert copied.code == 0
    assert (copied.json["copied_from"], copied.json["rows"]["boot"]) == (f"{site}/old.db", 3)
    assert copied.json["rows"]["audit"] == command("store", "check", "--store", old, "--json").json["rows"]["audit"] + 1
    assert "copying " in copied.err
    again = command("store", "copy", "--from", old, *new)
    assert (again.code, "has rows already" in again.err) == (1, True)
    (site / "link.db").symlink_to(site / "old.db")
    itself = command("store", "copy", "--from", old, *with_store(site, "link.db"))
    assert (itself.code, "old.db is the store to fill" in itself.err) == (2, True)
    assert (site / "old.db").read_bytes() == before
    quiet(unmade, made, lost, copied, again, itself)


@pytest.mark.parametrize(
    ("statement", "named"),
    [("UPDATE vm SET proven = 1 - proven", "table vm"), ("DELETE FROM vm", "table vm is not authentic: it is missing")],
)
def test_a_store_is_not_copied_with_a_forged_row(command: Command, site: Path, statement: str, named: str) -> None:
    """A new store takes what it gets for true."""
    config = ("--config", site / "server.toml")
    assert command("store", "init", *config).code == 0
    _ = filled(site / "old.db", vault_of(site))
    with closing(sqlite3.connect(site / "old.db")) as file, file:
        file.execute(statement)
    refused = command("store", "copy", "--from", f"sqlite:{site}/old.db", *config)
    assert (refused.code, named in refused.err) == (1, True), refused.err
    assert command("store", "check", *config, "--json").json["rows"]["boot"] == 0
    quiet(refused)


def test_a_check_names_a_forged_row_and_says_what_to_do_but_not_to_check(command: Command, site: Path) -> None:
    text = (site / "server.toml").read_text()
    (line,) = (each for each in text.splitlines() if each.startswith("store = "))
    (site / "sqlite.toml").write_text(text.replace(line, 'store = { url = "sqlite:keys.db" }'))
    setup = make_store_setup(ServerConfig.load(site / "sqlite.toml"))
    with closing(setup.store.open(make=True)) as store:
        store.transact(evolve(boot("1"), vault=setup.vault))
    with closing(sqlite3.connect(site / "keys.db")) as file, file:
        file.execute("UPDATE vm SET proven = 1 - proven")
        file.execute("UPDATE boot SET peer_address = 'x'")
    found = command("store", "check", "--config", site / "sqlite.toml")
    assert found.code == 1
    named = [
        line.split(" is not")[0].split()[-1] for line in found.out.splitlines() if line.startswith("not authentic: ")
    ]
    assert sorted(named) == ["boot", "vm"]  # a line for each
    assert found.out.count("table vm is not authentic: its MAC") == 1  # looked at with its table, and with its VM
    assert "restore a backup" in found.out
    assert "chutes-proto store check" not in found.out
    quiet(found)
    with closing(sqlite3.connect(site / "keys.db")) as file, file:
        file.execute("DELETE FROM keyring")  # without it no row can be looked at
    found = command("store", "check", "--config", site / "sqlite.toml")
    assert (found.code, "table keyring is not authentic: it is missing" in found.err) == (1, True), found.err
    assert "restore a backup" in found.err
    assert "chutes-proto store check" not in found.err


def test_a_store_is_copied_from_a_configuration_only_if_its_server_would_use_it(command: Command, site: Path) -> None:
    config, old = ("--config", site / "server.toml"), site / "old.toml"
    text = (site / "server.toml").read_text()
    (line,) = (each for each in text.splitlines() if each.startswith("store = "))
    old.write_text(text.replace(line, 'store = { url = "sqlite:old.db", mark_file = "old.mark" }'))
    assert command("store", "init", *config).code == 0
    setup = make_store_setup(ServerConfig.load(old))
    with closing(evolve(setup.store, mark_file=setup.mark_file).open(make=True)) as store:
        store.keep_mark()
        store.transact(evolve(boot("1"), vault=setup.vault))
    with closing(sqlite3.connect(site / "old.db")) as file, file:
        file.execute("UPDATE fact SET value = 0 WHERE name = 'seal'")
        file.execute("UPDATE vm SET proven = 1 - proven")
    refused = command("store", "copy", "--from-config", old, *config)
    assert (refused.code, "its rows are of epoch 0, and" in refused.err) == (1, True), refused.err
    assert command("store", "check", *config, "--json").json["rows"]["boot"] == 0
    with closing(sqlite3.connect(site / "old.db")) as file, file:
        file.execute("UPDATE fact SET value = 1 WHERE name = 'seal'")
        file.execute("UPDATE vm SET proven = 1 - proven")
    copied = command("store", "copy", "--from-config", old, *config)
    assert (copied.code, "not compared with a mark" in copied.err) == (0, False), copied.err
    quiet(refused, copied)


def test_a_file_that_a_server_has_open_is_not_copied(command: Command, site: Path) -> None:
    """Even an idle one: what it grants later would be missing in the copy."""
    old, new = filled(site / "old.db", vault_of(site)), with_store(site, "new.db")
    server = SqliteStore(site / "old.db")
    refused = command("store", "copy", "--from", old, *new)
    assert (refused.code, "stop all servers" in refused.err) == (1, True), refused.err
    server.close()
    with closing(StorePlace("sqlite:old.db", site).open(alone=True)) as alone:
        alone.check()
        with pytest.raises(StoreBusy):
            SqliteStore(site / "old.db", busy_seconds=0.1)
    assert not (site / "new.db").exists()
    assert command("store", "copy", "--from", old, *new).code == 0
    assert sorted(path.name for path in site.glob("new.db*")) == ["new.db", "new.db.toml"]


@pytest.mark.parametrize("name", ["", "&application_name=keys"], ids=["default", "named"])
def test_a_copy_from_postgresql_names_sessions_that_may_be_a_servers(
    command: Command, site: Path, empty_schema: str, name: str
) -> None:
    """A pooler keeps the sessions of a server that was stopped, so they are no reason to refuse."""
    empty_schema += name
    passfile = site / "pgpass"
    passfile.write_text(f"*:*:*:*:{PASSWORD}\n")
    passfile.chmod(0o600)
    old = f"{empty_schema.replace(f':{PASSWORD}@', '@')}&passfile={passfile}"
    vault = vault_of(site)
    with closing(PostgresStore(empty_schema, make=True, vault=vault)) as server:
        server.transact(evolve(boot("1"), vault=vault))
        copied = command("store", "copy", "--from", old, *with_store(site, "new.db"), "--json")
    assert copied.json["rows"]["boot"] == 1
    for told in (copied.json["note"], copied.err):
        assert "other sessions of chutes-proto are connected there" in told
    quiet(copied)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_copy_leaves_no_store(command: Command, site: Path, sent: signal.Signals) -> None:
    with closing(SqliteStore(site / "old.db", vault=vault_of(site))) as store:
        store.transact(Ask(InsertAll(tuple(AuditRow(1, "vm", "boot", "granted", "x" * 2000) for _ in range(2000)))))
    old, new = f"sqlite:{site}/old.db", with_store(site, "new.db")
    copying = [*PROGRAM, "store", "copy", "--from", old, *map(str, new)]
    with subprocess.Popen(copying, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "is not compared with a mark" in process.stderr.readline()
        assert process.stderr.readline().startswith("copying 2000 rows")
        process.send_signal(sent)
        assert process.wait(60) != 0
    assert not (site / "new.db").exists()
    assert sent == signal.SIGKILL or len(list(site.glob("new.db*"))) == 1
    again = command("store", "copy", "--from", old, *new, "--json")
    assert again.json["rows"]["audit"] == 2001
    assert sorted(path.name for path in site.glob("new.db*")) == ["new.db", "new.db.toml"]


def test_a_copy_of_what_is_no_store(command: Command, site: Path) -> None:
    new = with_store(site, "new.db")
    for source, code, told in (
        (f"sqlite:{site}/none.db", 1, "not made yet"),
        (f"sqlite:{site}/kek", 1, "not an SQLite database"),
        ("mysql:keys", 2, "--from: say"),
        ("postgresql://u:hidden@db/keys", 2, "--from: other users can read"),
        ("postgresql://u@db/keys?passfile=pgpass", 2, "passfile: say the whole path"),
    ):
        end = command("store", "copy", "--from", source, *new)
        assert (end.code, told in end.err) == (code, True), end.err
        assert "hidden" not in end.err
    assert not (site / "new.db").exists()


# --- what others may not read, and what the database does not let us do ---


def test_a_configuration_with_a_password_is_not_for_everybody(command: Command, site: Path) -> None:
    configuration = site / "server.toml"
    assert PASSWORD in configuration.read_text()
    _ = command("store", "init", "--config", configuration)
    for mode, code in ((0o600, 0), (0o640, 0), (0o644, 1), (0o604, 1)):
        configuration.chmod(mode)
        end = command("serve", "--config", configuration, "--check")
        assert (end.code, f"chmod 640 {configuration}" in end.err) == (code, bool(code)), end.err
        quiet(end)


def test_a_user_of_the_database_who_may_only_read(command: Command, site: Path, empty_schema: str) -> None:
    config = ("--config", site / "server.toml")
    assert command("store", "init", *config).code == 0
    with psycopg.connect(empty_schema, autocommit=True) as connection:
        (name,) = connection.execute("SELECT current_schema()").fetchone() or ("",)
        _ = connection.execute(f"CREATE ROLE reader_{name}")
        for what in ("SELECT ON ALL TABLES IN SCHEMA", "USAGE ON SCHEMA"):
            _ = connection.execute(f"GRANT {what} {name} TO reader_{name}")
    assert "options=" in empty_schema
    text = (site / "server.toml").read_text().replace(empty_schema, f"{empty_schema}%20-crole%3Dreader_{name}")
    (site / "server.toml").write_text(text)
    ends = [command("serve", *config, "--check"), command("serve", *config)]
    with psycopg.connect(empty_schema, autocommit=True) as connection:
        _ = connection.execute(f"GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {name} TO reader_{name}")
        _ = connection.execute(f"REVOKE INSERT ON generation FROM reader_{name}")
    ends.append(command("serve", *config, "--check"))
    for end in ends:
        assert (end.code, "may not do that" in end.err) == (1, True), end.err
    assert "(it lacks INSERT on generation)" in ends[-1].err
    with psycopg.connect(empty_schema, autocommit=True) as connection:
        _ = connection.execute(f"GRANT INSERT ON generation TO reader_{name}")
    assert command("serve", *config, "--check").code == 0
    quiet(*ends)
