"""An operator's premises: files, a store, a real server process, commands as processes; and VMs that speak plain HTTP.

All that anyone could read of it is kept in ``heard``: what processes say, and every answer that hands out no key.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import psycopg
from anyio.abc import TaskStatus
from anyio.from_thread import start_blocking_portal
from attrs import define, field
from cryptography.fernet import Fernet

import chutes_proto_trio
from chutes_proto.auth.binding import report_data
from chutes_proto.auth.client_identity import ClientIdentity, make_client_identity
from chutes_proto.cli.main import main
from chutes_proto.io.files import write_file
from chutes_proto.io.http.tls import client_context
from chutes_proto.io.quoters.simulated import open_platform
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.log_writer import LogWriter
from chutes_proto.io.server.setup import make_setup
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.server import ServerConfig
from chutes_proto.store._run import Ask
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.wire.codec import encode_quote
from tests.cli.conftest import HOTKEY, PROGRAM, Ended, Server, end, killed_after_a_line, start_server
from tests.turning import Turn
from tests.waiting import wait_until

VOLUMES = ("storage", "tdx-cache")
REFUSED = 400
"""As an expected status: that one, or any greater one."""


class ServerHere:
    """A server on a loop of its own in a thread; its log is appended to a file, as that of a process."""

    def __init__(self, config: ServerConfig, log: Path) -> None:
        self._stack = ExitStack()
        writer = self._stack.enter_context(closing(LogWriter(self._stack.enter_context(log.open("a")).fileno())))
        portal = self._stack.enter_context(start_blocking_portal("trio"))

        async def serve(*, task_status: TaskStatus[Sequence[str]]) -> None:
            await chutes_proto_trio.serve(config, ready=task_status.started, log=writer)

        self._serving, (self.url, *_) = portal.start_task(serve)

    def stop(self) -> None:
        _ = self._serving.cancel()
        self._stack.close()


@define
class Premises:
    """``directory`` is the operator's; beside it are the platform of the VMs and the server's log."""

    directory: Path
    store: str
    platform: SimulatedPlatform = field(init=False)
    heard: list[bytes] = field(factory=list[bytes])
    server: Server | None = None
    _here: ServerHere | None = None

    def __attrs_post_init__(self) -> None:
        self.directory.mkdir()
        self.platform = open_platform(self.platform_directory, self.now).platform
        write_server(self.directory, self.platform, self.now)
        self.edit("sqlite:keys.db", self.store)
        self.edit("limits.drain_seconds = 0", "limits.drain_seconds = 0\nrotate_after_hours = 0")
        make_setup(ServerConfig.load(self.configuration)).store.open(make=True).close()

    @property
    def configuration(self) -> Path:
        return self.directory / "server.toml"

    @property
    def platform_directory(self) -> Path:
        return self.directory.with_name("platform")

    @property
    def ca(self) -> Path:
        return self.directory / "ca.pem"

    @property
    def url(self) -> str:
        server = self.server or self._here
        assert server is not None
        return server.url

    @property
    def now(self) -> int:
        return int(time.time())

    def edit(self, old: str, new: str) -> None:
        text = self.configuration.read_text()
        assert old in text
        _ = self.configuration.write_text(text.replace(old, new))

    def new_key(self) -> None:
        """A new key-encryption key, with the old one beside it."""
        _ = (self.directory / "kek").replace(self.directory / "kek.old")
        write_file(self.directory / "kek", os.urandom(32), mode=0o600)
        if "kek_previous_file" not in self.configuration.read_text():
            self.edit('kek_file = "kek"', 'kek_file = "kek"\nkek_previous_file = "kek.old"')

    def start(self, *options: str) -> None:
        with (self.directory.with_name("log")).open("a") as log:
            self.server = start_server("--config", self.configuration, *options, ca=self.ca, stderr=log)
        self.heard += [line.encode() for line in self.server.said]

    def start_here(self) -> None:
        """`start` in this process, where it is of no matter whose process it is: that costs a tenth."""
        self._here = ServerHere(ServerConfig.load(self.configuration), self.directory.with_name("log"))

    def stop(self) -> None:
        if self._here is not None:
            self._here.stop()
            self._here = None
        if self.server is not None:
            end(self.server.process)
            assert self.server.process.returncode == 0
            self.server = None

    def kill(self) -> None:
        """The server ends in the middle of whatever it does."""
        assert self.server is not None
        self.server.process.kill()
        _ = self.server.process.communicate()

    def wait_for_log(self, *texts: str) -> None:
        """Return once the server's log has all of ``texts``: a thread writes it, maybe after the answer."""
        log = self.directory.with_name("log")
        _ = wait_until(lambda: all(text in log.read_text() for text in texts))

    def close(self) -> None:
        """Stop, and hear what the server had to say."""
        if self.server is not None:
            end(self.server.process)
        if self._here is not None:
            self._here.stop()
        log = self.directory.with_name("log")
        self.heard.append(log.read_bytes() if log.exists() else b"")

    def do(self, *words: object) -> Ended:
        """A command of the operator's, in a process of its own."""
        return self.run(*words, "--config", self.configuration)

    def run(self, *words: object) -> Ended:
        done = subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True, timeout=120, check=False)
        self.heard += [done.stdout.encode(), done.stderr.encode()]
        assert "Traceback" not in done.stderr, done.stderr
        return Ended(done.returncode, done.stdout, done.stderr)

    def here(self, *words: object) -> Ended:
        """`do` in this process, where it is of no matter whose process it is."""
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            code = main([*map(str, words), "--config", str(self.configuration)])
        self.heard += [out.getvalue().encode(), err.getvalue().encode()]
        return Ended(code, out.getvalue(), err.getvalue())

    def killed_after_a_line(self, *words: object) -> str:
        """See `tests.cli.conftest.killed_after_a_line`."""
        said = killed_after_a_line([*PROGRAM, *words, "--config", self.configuration])
        self.heard.append(said.encode())
        return said

    def plant(self, passphrases: Mapping[str, Mapping[str, str]]) -> None:
        """Import the passphrases of VMs by volume, as another server's, bound to the platform."""
        key = Fernet.generate_key()
        write_file(self.directory / "fernet.key", key, mode=0o600)
        quote = b64encode(self.platform.quote(bytes(64))).decode()
        rows = [
            {
                "miner_hotkey": HOTKEY,
                "vm_name": vm,
                "volume_passphrases": {
                    name: Fernet(key).encrypt(text.encode()).decode() for name, text in named.items()
                },
                "boot_quote": quote,
            }
            for vm, named in passphrases.items()
        ]
        file = self.directory / "rows.jsonl"
        _ = file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = self.do("keys", "import-fernet", file, "--fernet-key-file", self.directory / "fernet.key")
        assert done.code == 0, done

    def json(self, *words: object) -> Any:
        ended = self.here(*words, "--json")
        assert ended.code == 0, ended
        return ended.json

    def sql(self, statement: str) -> None:
        """A change by the database's administrator behind the server's back."""
        if self.store.startswith("sqlite:"):
            with closing(sqlite3.connect(self.directory / "keys.db", timeout=60)) as connection, connection:
                _ = connection.execute(statement)
        else:
            with psycopg.connect(self.store, autocommit=True) as database:
                _ = database.execute(statement.encode())

    def turn(self, statement: str) -> None:
        """A change of generations or facts by one who has the KEK, such as the passing of time."""
        with closing(self.open()) as store:
            store.transact(Ask(Turn(statement)))

    def open(self) -> DurableStore:
        return make_setup(ServerConfig.load(self.configuration)).store.open()

    def vm(self, name: str = "vm-1") -> Vm:
        return Vm(self, name)


@define
class Vm:
    """A boot of a VM with an ephemeral TLS key; each method is one request, and hands out its answer's members."""

    premises: Premises
    name: str
    identity: ClientIdentity = field(factory=lambda: make_client_identity(int(time.time()) - 60, os.urandom(32)))

    def ask(self, method: str, path: str, *, status: int = 200, **request: Any) -> dict[str, Any]:
        context = client_context(self.identity, self.premises.ca.read_bytes())
        with httpx.Client(base_url=self.premises.url, verify=context, trust_env=False, timeout=60) as http:
            response = http.request(method, path, **request)
        assert response.status_code >= REFUSED if status == REFUSED else response.status_code == status, response.text
        if status != 200 or path.endswith("confirm"):
            self.premises.heard += [response.content, repr(response.headers.multi_items()).encode()]
        members: dict[str, Any] = response.json()
        return members

    def nonce(self) -> str:
        return str(self.ask("GET", "/servers/nonce", params={"miner_hotkey": HOTKEY})["nonce"])

    def is_served(self) -> bool:
        """Whether the server gives nonces: it looks at its store once a second, and gives none while it refuses it."""
        try:
            _ = self.nonce()
        except AssertionError:
            return False
        return True

    def quote(self, nonce: str, stage: Any) -> str:
        return encode_quote(
            self.premises.platform.quote(report_data(bytes.fromhex(nonce), self.identity.spki_sha256), stage=stage)
        )

    def boot(self, nonce: str | None = None, *, status: int = 200, **members: Any) -> dict[str, Any]:
        nonce = nonce or self.nonce()
        body = {"quote": self.quote(nonce, "boot"), "miner_hotkey": HOTKEY, "vm_name": self.name} | members
        headers = {"x-chutes-nonce": nonce}
        return self.ask("POST", "/servers/boot/attestation", json=body, headers=headers, status=status)

    def sync(self, token: str, *volumes: str, status: int = 200, **members: Any) -> dict[str, Any]:
        headers = {"x-boot-token": token, "x-chutes-hotkey": HOTKEY}
        body = {"volumes": list(volumes or VOLUMES)} | members
        return self.ask("POST", f"/servers/{self.name}/luks", json=body, headers=headers, status=status)

    def read(self, token: str, *, status: int = 200) -> dict[str, Any]:
        headers = {"x-boot-token": token, "x-chutes-hotkey": HOTKEY}
        return self.ask("GET", f"/servers/{self.name}/luks", headers=headers, status=status)

    def attest(self, nonce: str, *volumes: str, status: int = 200, **members: Any) -> dict[str, Any]:
        headers = {"x-quote-nonce": nonce, "x-chutes-hotkey": HOTKEY}
        body = {"quote": self.quote(nonce, "runtime"), "volumes": list(volumes or VOLUMES)} | members
        return self.ask("POST", f"/servers/{self.name}/luks/attest", json=body, headers=headers, status=status)

    def confirm(self, nonce: str, *, status: int = 200, **rotated: bool) -> dict[str, Any]:
        headers = {"x-confirm-nonce": nonce, "x-chutes-hotkey": HOTKEY}
        body = {"volumes": {name.replace("_", "-"): {"rotated": value} for name, value in rotated.items()}}
        return self.ask("POST", f"/servers/{self.name}/luks/confirm", json=body, headers=headers, status=status)


@define
class Watch:
    """The view that everyone on the machine has of a process: its command line and its environment. Those of this
    process and of all that began in it are read all the time.

    An environment is read once for each command line that a process has: it is fixed as that is, when a program begins.
    """

    seen: set[bytes] = field(factory=set[bytes])
    _over: threading.Event = field(factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        assert self._thread is not None
        self._thread.join(60)

    def _look(self) -> None:
        known: set[tuple[int, bytes]] = set()
        while not self._over.wait(0.02):
            for number in _family(os.getpid()):
                with suppress(OSError):  # it has ended
                    process = Path(f"/proc/{number}")
                    line = (process / "cmdline").read_bytes()
                    if (number, line) not in known:
                        self.seen |= {line, (process / "environ").read_bytes()}
                        known.add((number, line))


def _family(process: int) -> Iterator[int]:
    """A process, its children, and theirs."""
    yield process
    with suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))
