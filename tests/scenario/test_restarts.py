"""Restarts, upgrades and reloads while VMs boot with real `curl`: none of them may give up.

A VM here has the patience of a deployed one: nonce and boot have three attempts together, two seconds apart, the keys
are asked for once, and no call waits longer than 30 seconds.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from chutes_proto.auth.client_identity import make_client_identity
from chutes_proto.io.files import write_file
from tests.cli.conftest import HOTKEY, PROGRAM, end
from tests.scenario.premises import Premises, Vm
from tests.scenario.test_admin import listen
from tests.waiting import wait_until

pytestmark = pytest.mark.parametrize("premises", ["sqlite"], indirect=True)

IS_SOAK = bool(os.environ.get("CHUTES_PROTO_SOAK"))
RESTARTS = 50 if IS_SOAK else 2
VMS = 3
ATTEMPTS, PAUSE_SECONDS, CALL_SECONDS = 3, 2, 30


class GaveUp(AssertionError):
    """A deployed VM would have powered off."""


@define
class DeployedVm:
    """Boots one VM again and again with `curl`, until it is told to end."""

    premises: Premises
    name: str
    url: str
    ending: threading.Event
    patience: int = CALL_SECONDS
    boots: float = 0
    retries: list[str] = field(factory=list)

    def live(self) -> None:
        """Raises `GaveUp`, and nobody waits for more boots then."""
        try:
            while not self.ending.is_set():
                self.boot()
                self.boots += 1
        except GaveUp:
            self.boots = math.inf
            raise

    def boot(self) -> None:
        identity = make_client_identity(int(time.time()) - 60, os.urandom(32))
        home = self.premises.directory.with_name(self.name)
        home.mkdir(exist_ok=True)
        write_file(home / "cert.pem", identity.certificate_pem)
        write_file(home / "key.pem", identity.key_pem.reveal(), mode=0o600)
        quotes = Vm(self.premises, self.name, identity)
        for attempt in range(ATTEMPTS):
            if attempt:
                _ = self.ending.wait(0)  # looked at only between boots: a boot that has begun goes on
                threading.Event().wait(PAUSE_SECONDS)
            status, answer = self.call(home, "GET", "/servers/nonce")
            if status == 200:
                nonce = answer["nonce"]
                body = {"quote": quotes.quote(nonce, "boot"), "miner_hotkey": HOTKEY, "vm_name": self.name}
                status, granted = self.call(home, "POST", "/servers/boot/attestation", body, f"X-Chutes-Nonce: {nonce}")
                if status == 200:
                    break
                answer = granted
            self.retries.append(f"{status} {answer}")
        else:
            raise GaveUp(self.retries)
        volumes = {"volumes": ["storage", "tdx-cache"]}
        headers = (f"X-Boot-Token: {granted['boot_token']}", f"X-Chutes-Hotkey: {HOTKEY}")
        status, answer = self.call(home, "POST", f"/servers/{self.name}/luks", volumes, *headers)
        if status != 200:
            raise GaveUp(f"sync: {status} {answer}")

    def call(self, home: Path, method: str, path: str, body: object = None, *headers: str) -> tuple[int, Any]:
        """The status, 0 without an answer, and the answer's members or what `curl` said."""
        command: list[str | Path] = [
            "curl",
            "--silent",
            "--show-error",
            "--max-time",
            str(self.patience),
            "--cacert",
            self.premises.ca,
        ]
        command += ["--cert", home / "cert.pem", "--key", home / "key.pem", "--request", method, "--noproxy", "*"]
        command += [word for header in headers for word in ("--header", header)]
        command += ["--write-out", "\n%{http_code}", f"{self.url}{path}"]
        if body is not None:
            command += ["--header", "Content-Type: application/json", "--data-binary", json.dumps(body)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        content, _, status = done.stdout.rpartition("\n")
        return (int(status), json.loads(content)) if int(status) else (0, done.stderr.strip())


@contextmanager
def load(premises: Premises, url: str, patience: int = CALL_SECONDS) -> Iterator[list[DeployedVm]]:
    """VMs boot all the time; at the end none may have given up. None waits longer than ``patience`` for an answer."""
    ending = threading.Event()
    vms = [DeployedVm(premises, f"vm-{number}", url, ending, patience) for number in range(VMS)]
    with ThreadPoolExecutor(VMS) as threads:
        lives: list[Future[None]] = [threads.submit(vm.live) for vm in vms]
        try:
            yield vms
        finally:
            ending.set()
    for life in lives:
        life.result()


def wait_for_boots(vms: list[DeployedVm], more: int = 1, seconds: float = 120) -> None:
    """Until each VM has booted as many times more, or gave up."""
    before = [vm.boots for vm in vms]
    _ = wait_until(lambda: all(vm.boots >= old + more for vm, old in zip(vms, before, strict=True)), seconds)


def log_of(premises: Premises) -> list[dict[str, Any]]:
    return [json.loads(line) for line in premises.directory.with_name("log").read_text().splitlines()]


TRANSPORTS = ("trio", "asyncio")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_service_manager_holds_the_socket_and_no_boot_is_lost(
    premises: Premises, transport: str, require_program: Callable[[str], str]
) -> None:
    """It holds that of VMs: those of the operator are the server's own, and go with it."""
    _ = require_program("curl")
    listen(premises, 'unix = "admin.sock"')
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as held:
        port = held.getsockname()[1]
        premises.edit("limits.drain_seconds = 0", 'control = "control.sock"\nlimits.drain_seconds = 25')
        premises.edit("127.0.0.1:0", f"127.0.0.1:{port}")
        server = activated(premises, held, transport)
        with load(premises, f"https://127.0.0.1:{port}") as vms:
            for _ in range(RESTARTS):
                wait_for_boots(vms)
                end(server)  # as `systemctl restart` does: the next one starts when this one has ended
                assert server.returncode == 0
                server = activated(premises, held, transport)
            wait_for_boots(vms)
        end(server)
    assert [vm.retries for vm in vms] == [[]] * VMS
    stops = [record for record in log_of(premises) if record["event"] == "stopping"]
    assert [stop["handed_over"] for stop in stops] == [True] * (RESTARTS + 1)
    assert sorted(path.name for path in premises.directory.glob("*.sock*")) == []


def activated(premises: Premises, held: socket.socket, transport: str) -> subprocess.Popen[str]:
    """A server that a service manager has started with its socket; it serves."""
    serve = [*PROGRAM, "serve", "--config", str(premises.configuration), "--transport", transport]
    script = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{held.fileno()}'
    with premises.directory.with_name("log").open("a") as log:
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", *serve],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            pass_fds=[held.fileno()],
        )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("https://")
    return process
