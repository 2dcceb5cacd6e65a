"""A PostgreSQL for the tests: the one that ``CHUTES_PROTO_TEST_POSTGRES`` names, or a private one.

A private one is a cluster made with the installed programs: it lives in a temporary folder, in memory where there is
room, listens on a Unix socket there, asks for a password, and ends with the tests. PostgreSQL does not run as root, so
root gives it to another user. A standby of it and a pgbouncer before it are private in the same way.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

from chutes_proto.io.stores.postgres import PostgresStore
from tests.waiting import wait_until

VARIABLE = "CHUTES_PROTO_TEST_POSTGRES"
PASSWORD = "canary-password-of-the-database"
DEATHBED = ["setpriv", "--pdeathsig", "QUIT"]


def programs() -> Path | None:
    """The folder of the newest PostgreSQL that is installed."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    found += [Path(path).parent for path in [shutil.which("initdb")] if path]
    return max(found, key=lambda path: [int(part) for part in path.parts if part.isdigit()], default=None)


class Cluster:
    """A private cluster; `start` and `stop` may be called as often as a test likes.

    With ``primary`` it is a standby of that one, which streams under the name ``standby``.
    """

    def __init__(
        self,
        programs: Path,
        primary: Cluster | None = None,
        settings: Mapping[str, str] | None = None,
        place: str | None = None,
    ) -> None:
        self._programs = programs
        self._settings = settings or {}
        self.folder = Path(tempfile.mkdtemp(prefix="chutes-proto-pg-", dir=place or _memory()))
        self._as: dict[str, Any] = {"cwd": self.folder}
        self._process: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            user = next(name for name in ("postgres", "nobody") if _is_user(name))
            owner = pwd.getpwnam(user)
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
            self._as |= {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        password = self.folder / "password"
        password.write_text(_verifier(PASSWORD))
        password.chmod(0o644)
        make: list[str | Path] = [
            *(programs / "initdb", "--pgdata", self.folder / "data", "--no-sync", "--encoding=UTF8", "--locale=C"),
            *("--username=owner", "--auth=scram-sha-256", "--pwfile", password),
        ]
        if primary is not None:
            source = primary.url(application_name="standby")
            make = [programs / "pg_basebackup", "--pgdata", self.folder / "data", "--no-sync", "--checkpoint=fast"]
            make += ["--write-recovery-conf", "--dbname", source]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL, **self._as)
        self.start()

    def url(self, database: str = "postgres", *, user: str = "owner", password: str = PASSWORD, **query: str) -> str:
        query = {"host": str(self.folder), **query}
        return f"postgresql://{user}:{password}@/{database}?" + "&".join(
            f"{key}={quote(value, safe='')}" for key, value in query.items()
        )

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of an empty database. A pooler passes on no ``options``, so a schema would not do there."""
        name = f"chutes_{os.urandom(8).hex()}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        try:
            yield self.url(name)
        finally:
            with psycopg.connect(self.url(), autocommit=True) as connection:
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())

    def start(self, **settings: str) -> None:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "max_connections": "120",
            "shared_buffers": "32MB",
            "wal_level": "minimal",
            "max_wal_size": "128MB",
            "max_wal_senders": "0",
            "log_min_messages": "fatal",
            **self._settings,
            **settings,
        }
        command = [str(self._programs / "postgres"), "-D", str(self.folder / "data")]
        command += [f"--{name}={value}" for name, value in settings.items()]
        self._process = self.run(command, self.url())

    def run(self, command: list[str], url: str) -> subprocess.Popen[bytes]:
        """Start a program as the user who owns this cluster, and return when it answers at ``url``."""
        deathbed = DEATHBED if shutil.which(DEATHBED[0]) else []
        process: subprocess.Popen[bytes] = subprocess.Popen(
            [*deathbed, *command], stderr=subprocess.DEVNULL, **self._as
        )

        def answers() -> bool:
            assert process.poll() is None, f"{command[0]} does not start"
            with suppress(psycopg.OperationalError):
                psycopg.connect(url).close()
                return True
            return False

        _ = wait_until(answers)
        return process

    def begin(self, script: str) -> subprocess.Popen[bytes]:
        """Start a script of the shell as the user who owns this cluster, in its folder."""
        return subprocess.Popen(["bash", "-ec", script], **self._as)

    def shell(self, script: str) -> None:
        """Run a script as `begin` does, to its end."""
        process = self.begin(script)
        assert process.wait(120) == 0, script

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT (fast), SIGQUIT (at once, with recovery at the next start), SIGKILL (the same, as a crash)."""
        if self._process is not None:
            children = children_of(self._process.pid)
            self._process.send_signal(number)
            self._process.wait(60)
            self._process = None
            # After a SIGKILL its children notice, and end: until then no other server may have the cluster.
            _ = wait_until(lambda: not any(map(is_running, children)))

    def processes(self) -> list[int]:
        """The process of the server, and those of its sessions and workers."""
        assert self._process is not None
        return [self._process.pid, *children_of(self._process.pid)]

    def remove(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)


class Pooler:
    """A pgbouncer before ``cluster``. No session of the database outlives a second, if no client holds it.

    It carries over no prepared statements, as none did before pgbouncer 1.21, and takes a schema in the URL, as all do
    from 1.26 on.
    """

    def __init__(self, cluster: Cluster, program: str, mode: str) -> None:
        self._cluster = cluster
        self._port = str(6432 + ["session", "transaction", "statement"].index(mode))
        configuration, users = cluster.folder / f"{mode}.ini", cluster.folder / f"{mode}.users"
        users.write_text(f'"owner" "{PASSWORD}"\n')
        settings = {
            "pool_mode": mode,
            "listen_port": self._port,
            "unix_socket_dir": cluster.folder,
            "auth_type": "scram-sha-256",
            "auth_file": users,
            "admin_users": "owner",
            "default_pool_size": 60,
            "max_prepared_statements": 0,
            "track_extra_parameters": "IntervalStyle, search_path",
            "server_lifetime": 1,
            "server_idle_timeout": 1,
            "server_login_retry": 1,
        }
        told = "".join(f"{name} = {value}\n" for name, value in settings.items())
        configuration.write_text(f"[databases]\n* = host={cluster.folder}\n[pgbouncer]\n{told}")
        self._process = cluster.run([program, "--quiet", str(configuration)], self.url("pgbouncer"))

    def url(self, database: str, **query: str) -> str:
        return self._cluster.url(database, port=self._port, **query)

    def before(self, url: str) -> str:
        """The URL of the same database, through this pooler."""
        return f"{url}&port={self._port}"

    def recycle(self) -> None:
        """Let every transaction from now on meet a new session, except where a client holds an old one."""
        with psycopg.connect(self.url("pgbouncer"), autocommit=True) as connection:
            connection.execute("RECONNECT")

    def close(self) -> None:
        self._process.kill()
        self._process.wait(60)


def _memory() -> str | None:
    """A file system in memory with room for clusters: each commit waits for the disk, and no test ends the machine."""
    place = Path("/dev/shm")
    return str(place) if place.is_dir() and shutil.disk_usage(place).free > 2 << 30 else None


def _verifier(password: str) -> str:
    """What PostgreSQL keeps of a password, with one iteration of 4096: each connection of a test derives the key anew.

    The form is that of PostgreSQL's ``pg_authid.rolpassword``, the keys those of RFC 5802, section 3.
    """
    salt = os.urandom(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 1)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    of_server = hmac.digest(salted, b"Server Key", "sha256")
    texts = [b64encode(part).decode() for part in (salt, stored, of_server)]
    return "SCRAM-SHA-256$1:{}${}:{}".format(*texts)


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    """It has not ended. One that has may still be listed, as a zombie."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def _is_user(name: str) -> bool:
    try:
        return bool(pwd.getpwnam(name).pw_uid)
    except KeyError:
        return False


@contextmanager
def schema(url: str) -> Iterator[str]:
    """An empty schema in the database at ``url``: its URL, for as long as it is used."""
    name = f"chutes_{os.urandom(8).hex()}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
    try:
        yield url + ("&" if "?" in url else "?") + f"options=-csearch_path%3D{name}"
    finally:
        wait_until(lambda: _drop(url, name))


def _drop(url: str, name: str) -> bool:
    """Drop a schema; return False if a session of a process that was killed still works in it, and came in the way."""
    with psycopg.connect(url, autocommit=True) as connection, suppress(psycopg.errors.DeadlockDetected):
        connection.execute(f"DROP SCHEMA {name} CASCADE".encode())
        return True
    return False


class Schemas:
    """Schemas with our tables, for one test after another: to make one takes ten times as long as to empty it.

    Each is made in an empty schema or database, which ``make`` makes. One in which a test changed more than rows (a
    table, an index, a function, a right) is not used again.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[str]]) -> None:
        self._new: Callable[[], AbstractContextManager[str]] = make
        self._made = ExitStack()
        self._free: list[_Schema] = []

    @contextmanager
    def borrow(self) -> Iterator[str]:
        """The URL of a schema as `store init` leaves it."""
        borrowed = self._free.pop() if self._free else _Schema(self._made.enter_context(self._new()))
        yield borrowed.url
        if borrowed.is_emptied():
            self._free.append(borrowed)

    def close(self) -> None:
        self._made.close()


class _Schema:
    """One that is empty but for the facts that `store init` writes."""

    def __init__(self, url: str) -> None:
        self.url = url
        PostgresStore(url, make=True).close()
        with psycopg.connect(url, autocommit=True) as connection:
            self._facts = connection.execute("SELECT name, value FROM fact").fetchall()
            self._parts = connection.execute(_PARTS).fetchall()

    def is_emptied(self) -> bool:
        """Bring the rows back to those of a new store, unless more was changed, or a session is in the way."""
        with psycopg.connect(self.url, autocommit=True) as connection, suppress(psycopg.errors.DeadlockDetected):
            if connection.execute(_PARTS).fetchall() != self._parts:
                return False
            connection.execute(_EMPTY)
            connection.cursor().executemany("INSERT INTO fact (name, value) VALUES (%s, %s)", self._facts)
            self._parts = connection.execute(_PARTS).fetchall()
            return True
        return False


_PARTS = """
WITH class AS (SELECT oid, xmin FROM pg_class WHERE relnamespace = current_schema()::regnamespace)
SELECT 'schema', oid, '', xmin::text FROM pg_namespace WHERE oid = current_schema()::regnamespace
UNION ALL SELECT 'class', oid, '', xmin::text FROM class
UNION ALL SELECT 'column', attrelid, attname, xmin::text FROM pg_attribute WHERE attrelid IN (SELECT oid FROM class)
UNION ALL SELECT 'index', indexrelid, '', xmin::text FROM pg_index WHERE indexrelid IN (SELECT oid FROM class)
UNION ALL SELECT 'trigger', oid, '', xmin::text FROM pg_trigger WHERE tgrelid IN (SELECT oid FROM class)
UNION ALL SELECT 'function', oid, '', xmin::text FROM pg_proc WHERE pronamespace = current_schema()::regnamespace
ORDER BY 1, 2, 3
"""
"""The statement that lists the parts of a schema, each with the transaction that changed it last."""

_EMPTY = """
DO $$ BEGIN EXECUTE (
 SELECT 'TRUNCATE ' || string_agg(oid::regclass::text, ', ') || ' RESTART IDENTITY CASCADE' FROM pg_class
 WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'
 AND (pg_relation_size(oid) > 0 OR oid IN (SELECT attrelid FROM pg_attribute WHERE attidentity <> ''))
); END $$
"""
"""The statement that empties the tables that have held rows; to empty all takes longer."""


def replace_now(connection: psycopg.Connection[Any], value: str) -> None:
    """Make ``now()`` in the schema of ``connection`` return the value of an expression."""
    text = f"CREATE OR REPLACE FUNCTION now() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT {value}'"
    connection.execute(text.encode())


@contextmanager
def schema_with_clock(url: str) -> Iterator[tuple[str, Callable[[int], None]]]:
    """An empty schema whose ``now()`` goes before PostgreSQL's, and what stops it at a time."""
    with schema(url) as inner, psycopg.connect(inner, autocommit=True) as connection:

        def set_clock(at: int) -> None:
            replace_now(connection, f"to_timestamp({at})")

        yield inner + "%2Cpg_catalog", set_clock
