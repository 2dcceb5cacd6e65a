"""Several processes on one socket: they serve, are replaced, reload and stop as one server."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import ssl
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from chutes_proto.io.http.tls import client_context
from chutes_proto.server._config import LimitOptions
from tests.cli.conftest import start_server
from tests.scenario.premises import Premises
from tests.scenario.test_admin import listen, over, series
from tests.scenario.test_restarts import IS_SOAK, TRANSPORTS
from tests.waiting import send_twice, wait_until

pytestmark = pytest.mark.parametrize("premises", ["sqlite"], indirect=True)
LIMIT = 12


def children(premises: Premises) -> list[int]:
    assert premises.server is not None
    pid = premises.server.process.pid
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def has_at_most_one(premises: Premises) -> bool:
    """Of workers that stop, the one with the open boot is left: another may accept until then, and it not see that."""
    return len(children(premises)) <= 1


def records(premises: Premises, event: str) -> list[dict[str, Any]]:
    lines = premises.directory.with_name("log").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def is_gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def metrics_directory(pid: int) -> Path:
    """The directory that all workers of a server keep their counts in."""
    (place,) = re.findall(rb"PROMETHEUS_MULTIPROC_DIR=([^\0]+)", Path(f"/proc/{pid}/environ").read_bytes())
    return Path(place.decode())


def metrics_files(pid: int) -> list[str]:
    return sorted(each.name for each in metrics_directory(pid).iterdir())


def boot(premises: Premises, name: str = "vm-1") -> None:
    vm = premises.vm(name)
    _ = vm.sync(vm.boot()["boot_token"])


@pytest.mark.parametrize("transport", TRANSPORTS if IS_SOAK else TRANSPORTS[:1])
def test_workers_are_one_server(premises: Premises, transport: str) -> None:
    premises.edit("limits.drain_seconds = 0", "limits.drain_seconds = 2")
    listen(premises, 'unix = "admin.sock"')
    premises.start("--workers", "2", "--transport", transport)
    first = children(premises)
    assert len(first) == 2
    boot(premises)
    os.kill(first[0], signal.SIGKILL)
    _ = wait_until(lambda: len(records(premises, "serving")) == 3)
    assert [record["code"] for record in records(premises, "worker_ended")] == [-signal.SIGKILL]
    for _ in range(6):
        boot(premises)
    with over(premises.directory / "admin.sock") as admin:

        def is_summed() -> bool:
            return series(admin).get(("requests_total", "", "sync_volumes", "200")) == 7

        _ = wait_until(is_summed)
    for each in children(premises):  # the new worker goes on in the files of the one before
        assert {name.rpartition("_")[2] for name in metrics_files(each)} == {"0.db", "1.db"}
    assert premises.server is not None
    premises.server.process.send_signal(signal.SIGHUP)
    _ = wait_until(lambda: len(records(premises, "reloaded")) == 1)
    workers = children(premises)
    premises.stop()
    assert all(is_gone(pid) for pid in workers)


def test_workers_end_with_a_supervisor_that_is_killed_and_leave_its_address(
    premises: Premises, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for their drain: the next server can listen, and completes the boots that are open."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a server of another test would remove what this one leaves
    premises.edit("limits.drain_seconds = 0", "limits.drain_seconds = 3600")
    listen(premises, 'unix = "admin.sock"')
    premises.start("--workers", "2")
    premises.edit("127.0.0.1:0", premises.url.removeprefix("https://"))
    vm = premises.vm()
    token = vm.boot()["boot_token"]
    workers = children(premises)
    left = metrics_directory(workers[0])
    premises.kill()
    _ = wait_until(lambda: all(map(is_gone, workers)))
    assert left.exists()
    premises.start("--workers", "2")
    assert not left.exists()
    other = metrics_directory(children(premises)[0])
    premises.run("serve", "--workers", "2", "--config", premises.configuration)  # its address is in use
    assert other.exists()
    _ = vm.sync(token)
    premises.stop()
    assert not other.exists()


def test_a_signal_to_all_processes_is_one(premises: Premises) -> None:
    """As from systemd, or from a terminal: each worker gets it from there, too, and serves its open boots."""
    premises.edit("limits.drain_seconds = 0", "limits.drain_seconds = 3600")
    premises.start("--workers", "2")
    vm = premises.vm()
    token = vm.boot()["boot_token"]
    assert premises.server is not None
    process = premises.server.process
    for each in (*children(premises), process.pid):
        os.kill(each, signal.SIGTERM)
    _ = wait_until(lambda: len(records(premises, "stopping")) >= 3)
    _ = wait_until(lambda: has_at_most_one(premises))
    _ = vm.sync(token)
    assert process.wait(60) == 0


@pytest.mark.parametrize(("options", "processes"), [((), 1), (("--workers", "2"), 3)], ids=["one", "workers"])
def test_a_signal_that_comes_twice_at_once_is_one(premises: Premises, options: tuple[str, ...], processes: int) -> None:
    """`timeout` sends it to its program, and to the group of that."""
    premises.edit("limits.drain_seconds = 0", "limits.drain_seconds = 3600")
    premises.start(*options)
    vm = premises.vm()
    token = vm.boot()["boot_token"]
    assert premises.server is not None
    process = premises.server.process
    send_twice(process.pid, signal.SIGTERM)
    _ = wait_until(lambda: len(records(premises, "stopping")) >= processes)
    _ = wait_until(lambda: has_at_most_one(premises))
    _ = vm.sync(token)
    assert process.wait(60) == 0
    assert {record.get("drain_seconds", 3600) for record in records(premises, "stopping")} == {3600}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("options", [(), ("--workers", "2")], ids=["one", "workers"])
def test_no_signal_ends_a_process_that_ends(premises: Premises, options: tuple[str, ...], transport: str) -> None:
    """`timeout` and systemd send theirs twice, maybe just when it ends: it would lose its log, and leave its files."""
    listen(premises, 'unix = "admin.sock"')
    premises.start(*options, "--transport", transport)
    workers = children(premises)
    assert premises.server is not None
    process = premises.server.process

    def has_ended() -> bool:
        for each in (*workers, process.pid):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGTERM)
        return process.poll() is not None

    _ = wait_until(has_ended)
    assert process.returncode == 0
    assert len(records(premises, "stopped")) == 1 + len(workers)
    assert not (premises.directory / "admin.sock").exists()


def test_workers_that_end_hear_what_they_accepted(premises: Premises) -> None:
    """A VM may come for its keys to a worker without open boots, while the one that granted its boot serves on."""
    premises.edit("limits.drain_seconds = 0", "limits.drain_seconds = 3600")
    premises.start("--workers", "2")
    assert premises.server is not None
    process, url = premises.server.process, httpx.URL(premises.url)
    with (
        socket.create_connection((url.host, url.port or 443), 30) as accepted,
        ssl.create_default_context(cafile=premises.ca).wrap_socket(accepted, server_hostname="localhost") as stream,
    ):
        process.send_signal(signal.SIGTERM)
        _ = wait_until(lambda: len(children(premises)) == 1)  # the other one has accepted nobody
        stream.sendall(b"GET /servers/nonce HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b'"code":"draining"' in stream.recv(1000)  # a boot would begin, and none does any more
    assert process.wait(60) == 0


def test_a_second_signal_ends_them_at_once(premises: Premises) -> None:
    premises.edit("limits.drain_seconds = 0", "limits.drain_seconds = 3600")
    premises.start("--workers", "2")
    _ = premises.vm().boot()  # and never comes back
    assert premises.server is not None
    process = premises.server.process
    process.send_signal(signal.SIGTERM)
    _ = wait_until(lambda: len(records(premises, "stopping")) >= 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


def test_a_full_disk_under_the_log_costs_no_boot(premises: Premises) -> None:
    with Path("/dev/full").open("w") as full:
        premises.server = start_server(
            "--config", premises.configuration, "--workers", "2", ca=premises.ca, stderr=full
        )
    boot(premises)
    _ = premises.vm("another").boot(status=401, nonce="0" * 64)
    premises.stop()


def test_workers_share_the_limits(premises: Premises) -> None:
    shared = LimitOptions(connections=1000, verifications=3, requests_per_minute=0).shared(4)
    assert (shared.connections, shared.verifications, shared.requests_per_minute) == (250, 1, 0)
    assert (shared.store_connections, shared.host_calls, shared.host_profiles_per_hour) == (4, 4, 3)
    assert shared.body_bytes == LimitOptions().body_bytes
    assert premises.run("serve", "--dev", "--workers", "2").code == 2

    premises.edit("limits.drain_seconds = 0", f"limits.drain_seconds = 0\nlimits.requests_per_minute = {LIMIT}")
    premises.start("--workers", "2")
    began, trusted = time.monotonic(), client_context(ca_pem=premises.ca.read_bytes())
    answers = [httpx.get(f"{premises.url}/servers/nonce", verify=trusted, timeout=60) for _ in range(3 * LIMIT)]
    more = math.ceil((time.monotonic() - began) * LIMIT / 60)
    granted = [answer.status_code for answer in answers].count(200)
    assert LIMIT // 2 <= granted <= LIMIT + more, (granted, more)  # each connection reaches either worker
    assert {answer.status_code for answer in answers} == {200, 429}
    premises.stop()
