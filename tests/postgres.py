"""A PostgreSQL for the tests: the one that ``CHUTES_PROTO_TEST_POSTGRES`` names, or a private one.

A private one is a cluster made with the installed programs: it lives in a temporary folder, listens on a Unix socket
there, asks for a password, and ends with the tests. PostgreSQL does not run as root, so root gives it to another user.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

VARIABLE = "CHUTES_PROTO_TEST_POSTGRES"
PASSWORD = "canary-password-of-the-database"
DEATHBED = ["setpriv", "--pdeathsig", "QUIT"]


def programs() -> Path | None:
    """The folder of the newest PostgreSQL that is installed."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    found += [Path(path).parent for path in [shutil.which("initdb")] if path]
    return max(found, key=lambda path: [int(part) for part in path.parts if part.isdigit()], default=None)


class Cluster:
    """A private cluster; `start` and `stop` may be called as often as a test likes."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="chutes-proto-pg-"))
        self._as: dict[str, Any] = {"cwd": self.folder}
        self._process: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            user = next(name for name in ("postgres", "nobody") if _is_user(name))
            owner = pwd.getpwnam(user)
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
            self._as |= {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        initdb: list[str | Path] = [
            *(programs / "initdb", "--pgdata", self.folder / "data", "--no-sync", "--encoding=UTF8", "--locale=C"),
            *("--username=owner", "--auth=scram-sha-256", "--pwfile", password),
        ]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, **self._as)
        self.start()

    def url(self, database: str = "postgres", *, user: str = "owner", password: str = PASSWORD, **query: str) -> str:
        query = {"host": str(self.folder), **query}
        return f"postgresql://{user}:{password}@/{database}?" + "&".join(
            f"{key}={quote(value, safe='')}" for key, value in query.items()
        )

    def start(self, **settings: str) -> None:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "max_connections": "120",
            "shared_buffers": "32MB",
            "wal_level": "minimal",
            "max_wal_senders": "0",
            "log_min_messages": "fatal",
            **settings,
        }
        command = [*(DEATHBED if shutil.which(DEATHBED[0]) else []), str(self._programs / "postgres")]
        command += ["-D", str(self.folder / "data"), *(f"--{name}={value}" for name, value in settings.items())]
        process: subprocess.Popen[bytes] = subprocess.Popen(command, stderr=subprocess.DEVNULL, **self._as)
        self._process = process
        until = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url()).close()
                return
            except psycopg.OperationalError:
                assert process.poll() is None, "PostgreSQL does not start"
                assert time.monotonic() < until, "PostgreSQL does not answer"
            time.sleep(0.02)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT (fast), SIGQUIT (at once, with recovery at the next start), SIGKILL (the same, as a crash)."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)
            self._process = None
            if number is signal.SIGKILL:
                time.sleep(0.3)  # its children notice, and end

    def remove(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)


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
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA {name} CASCADE".encode())


@contextmanager
def schema_with_clock(url: str) -> Iterator[tuple[str, Callable[[int], None]]]:
    """An empty schema whose ``now()`` goes before PostgreSQL's, and what sets it."""
    with schema(url) as inner, psycopg.connect(inner, autocommit=True) as connection:

        def set_clock(at: int) -> None:
            body = f"SELECT to_timestamp({at})"
            text = f"CREATE OR REPLACE FUNCTION now() RETURNS timestamptz LANGUAGE sql STABLE AS '{body}'"
            connection.execute(text.encode())

        yield inner + "%2Cpg_catalog", set_clock
