"""A served server and its signals: it drains, ends, takes a new certificate; as a process, on both loops."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from fcntl import F_SETPIPE_SZ, fcntl
from pathlib import Path
from typing import Any, Literal

import httpx
import psycopg
import pytest
from attrs import field, frozen

from chutes_proto.auth import client_identity
from chutes_proto.auth.binding import report_data
from chutes_proto.auth.client_identity import ClientIdentity, make_client_identity
from chutes_proto.auth.server_identity import ServerIdentity, make_server_identity
from chutes_proto.io.http.tls import client_context
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.setup import make_setup
from chutes_proto.server import ServerConfig
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.wire.codec import encode_quote
from tests.cli.conftest import HOTKEY, Ended, Server
from tests.postgres import Cluster, schema
from tests.waiting import wait_until

PLATFORM = SimulatedPlatform(bytes(32))

pytestmark = pytest.mark.parametrize("transport", ["trio", "asyncio"])


@pytest.fixture
def site(tmp_path: Path) -> Path:
    directory = tmp_path / "site"
    directory.mkdir()
    write_server(directory, PLATFORM, int(time.time()))
    return directory


@pytest.fixture
def serve(site: Path, start: Callable[..., Server], transport: str) -> Callable[[int], Server]:
    """Starts the site's server, which drains for that many seconds."""

    def run(seconds: int) -> Server:
        path = site / "server.toml"
        _ = path.write_text(path.read_text().replace("drain_seconds = 0", f"drain_seconds = {seconds}"))
        return start("--config", path, "--transport", transport, ca=site / "ca.pem")

    return run


def client(server: Server, ca_pem: bytes | None = None) -> httpx.Client:
    context = ssl.create_default_context(cadata=(ca_pem or server.ca.read_bytes()).decode())
    return httpx.Client(base_url=server.url, verify=context, trust_env=False, timeout=60)


def records(ended: Ended) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ended.err.splitlines()]


def wait_for(event: str, server: Server) -> dict[str, Any]:
    assert server.process.stderr is not None
    while line := server.process.stderr.readline():
        record: dict[str, Any] = json.loads(line)
        if record["event"] == event:
            return record
    pytest.fail(f"the server ended without {event}")


LONG = 3600
"""So many seconds may a server drain whose end has another cause."""


@frozen
class Vm:
    """A VM that boots as deployed ones do, with a connection for each call."""

    server: Server
    identity: ClientIdentity = field(factory=lambda: make_client_identity(int(time.time()) - 60, os.urandom(32)))

    def post(self, target: str, body: dict[str, object], **headers: str) -> Any:
        context = client_context(self.identity, self.server.ca.read_bytes())
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with httpx.Client(base_url=self.server.url, verify=context, trust_env=False, timeout=60) as http:
            answer = http.post(target, json=body, headers=named)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def quote(self, nonce: str, stage: Literal["boot", "runtime"]) -> str:
        data = report_data(bytes.fromhex(nonce), self.identity.spki_sha256)
        return encode_quote(PLATFORM.quote(data, stage=stage))

    def boot(self) -> dict[str, str]:
        with client(self.server) as http:
            nonce = http.get("/servers/nonce").json()["nonce"]
        body: dict[str, object] = {"quote": self.quote(nonce, "boot"), "miner_hotkey": HOTKEY, "vm_name": "vm-1"}
        members: dict[str, str] = self.post("/servers/boot/attestation", body, x_chutes_nonce=nonce)
        return members

    def sync(self, token: str) -> None:
        body: dict[str, object] = {"volumes": ["storage"]}
        _ = self.post("/servers/vm-1/luks", body, x_boot_token=token, x_chutes_hotkey=HOTKEY)

    def attest(self, nonce: str) -> str:
        body: dict[str, object] = {"quote": self.quote(nonce, "runtime"), "volumes": ["storage"]}
        answer = self.post("/servers/vm-1/luks/attest", body, x_quote_nonce=nonce, x_chutes_hotkey=HOTKEY)
        return str(answer["confirm_nonce"])

    def confirm(self, nonce: str) -> None:
        body: dict[str, object] = {"volumes": {"storage": {"rotated": False}}}
        _ = self.post("/servers/vm-1/luks/confirm", body, x_confirm_nonce=nonce, x_chutes_hotkey=HOTKEY)


def stop_with_open(number: int, server: Server) -> None:
    """Tell it to stop; it has so many open boots."""
    server.process.send_signal(signal.SIGTERM)
    stopping = wait_for("stopping", server)
    assert [stopping[name] for name in ("signal", "open_boots", "drain_seconds")] == ["SIGTERM", number, LONG]


def check_end(server: Server) -> None:
    """It ends by itself, as it should."""
    assert server.process.wait(60) == 0
    assert server.process.stdout is not None
    assert server.process.stderr is not None
    assert server.process.stdout.read() == ""
    last = json.loads(server.process.stderr.read().splitlines()[-1])  # what `wait_for` took ahead is there, too
    assert last["event"] == "stopped"
    assert "about" not in last


def test_a_server_that_is_told_to_stop_ends_at_once_where_no_boot_is_open(serve: Callable[[int], Server]) -> None:
    server = serve(LONG)
    with client(server) as waits:
        assert waits.get("/servers/nonce").status_code == 200
        vm = Vm(server)
        vm.sync(vm.boot()["boot_token"])
        stop_with_open(0, server)
        check_end(server)


def test_it_goes_on_until_the_sync_of_an_open_boot_and_sends_others_away(serve: Callable[[int], Server]) -> None:
    server = serve(LONG)
    vm = Vm(server)
    token = vm.boot()["boot_token"]
    stop_with_open(1, server)
    with client(server) as late:
        sent_away = late.get("/servers/nonce")
        assert (sent_away.status_code, sent_away.json()["code"]) == (503, "draining")
        assert sent_away.headers["connection"] == "close"
        served = late.get("/servers/vm-1/luks", params={"hotkey": HOTKEY}, headers={"x-boot-token": "0" * 64})
        assert (served.status_code, served.json()["code"]) == (401, "boot_token_invalid")
    vm.sync(token)
    check_end(server)


def test_it_goes_on_until_the_confirmation_of_a_two_phase_boot(serve: Callable[[int], Server], site: Path) -> None:
    path = site / "server.toml"
    _ = path.write_text(path.read_text().replace("[profile_defaults]", '[profile_defaults]\nexchange = "two-phase"'))
    server = serve(LONG)
    vm = Vm(server)
    nonce = vm.boot()["luks_quote_nonce"]
    stop_with_open(1, server)
    vm.confirm(vm.attest(nonce))
    check_end(server)


def test_it_ends_in_time_where_a_vm_does_not_come_back(serve: Callable[[int], Server]) -> None:
    server = serve(1)
    _ = Vm(server).boot()
    server.process.send_signal(signal.SIGTERM)
    check_end(server)


def test_a_second_signal_ends_it_at_once(serve: Callable[[int], Server]) -> None:
    server = serve(LONG)
    _ = Vm(server).boot()
    stop_with_open(1, server)
    ended = server.stop(signal.SIGINT)
    assert ended.code == 0
    told = records(ended)
    assert [record["event"] for record in told] == ["stopping", "stopped"]
    assert told[0]["drain_seconds"] == 0


# --- a store that hangs ---


def waits(other: psycopg.Connection[Any]) -> bool:
    """Does the look for a token wait for ``other``? The server's background work may wait, too."""
    _ = other.execute("SELECT pg_stat_clear_snapshot()")  # which the transaction keeps otherwise
    asking = "SELECT query FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
    return any("WHERE token_digest" in query for (query,) in other.execute(asking, [other.info.backend_pid]))


@contextmanager
def hanging(cluster: Cluster) -> Iterator[None]:
    """The database's processes stand still: who asks it something hears nothing."""
    processes = cluster.processes()
    try:
        _signal(processes, signal.SIGSTOP)
        yield
    finally:
        _signal(processes, signal.SIGCONT)


def _signal(processes: list[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # the database ends some of its own
            os.kill(process, number)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]], ids=["one", "two"])
def test_a_store_that_hangs_keeps_no_server_from_its_end(
    serve: Callable[[int], Server], site: Path, cluster: Cluster, numbers: list[signal.Signals]
) -> None:
    path = site / "server.toml"
    with schema(cluster.url()) as url:
        proxy = '[[proxy]]\nname = "front"\nunix = "keys.sock"\n'
        _ = path.write_text(path.read_text().replace("sqlite:keys.db", url) + proxy)
        make_setup(ServerConfig.load(path)).store.open(make=True).close()
        server = serve(1 if len(numbers) == 1 else 600)
        with ExitStack() as stack:
            other = stack.enter_context(psycopg.connect(url))
            threads, hangs = stack.enter_context(ThreadPoolExecutor()), stack.enter_context(client(server))
            assert (site / "keys.sock").exists()
            # Another transaction holds the request up, until it is sure that the database hangs with it.
            _ = other.execute("LOCK TABLE boot")
            answer = threads.submit(
                hangs.get, "/servers/vm-1/luks", params={"hotkey": HOTKEY}, headers={"x-boot-token": "0" * 64}
            )
            _ = wait_until(lambda: waits(other))
            _ = stack.enter_context(hanging(cluster))
            for number in numbers[:-1]:
                server.process.send_signal(number)
                _ = wait_for("stopping", server)
            assert not answer.done()
            ended = server.stop(numbers[-1])
            assert isinstance(answer.exception(), httpx.TransportError)  # the store itself gives up later
        assert ended.code == 0
        said = records(ended)
        assert [record["event"] for record in said] == ["serving", "warning", "stopping", "stopped"][-len(said) :]
        assert "did not answer in time" in said[-1]["about"]
        assert not (site / "keys.sock").exists()


WITHOUT_THREADS = """
import signal, sys, threading
from chutes_proto.io.server import serving
from chutes_proto.io.server.setup import make_setup
from chutes_proto.server import ServerConfig

def refuse(thread):
    raise RuntimeError("can't start new thread")

start, other = threading.Thread.start, refuse

def change(*_):
    global other
    threading.Thread.start, other = other, threading.Thread.start

def announce(urls):
    change()
    print(urls[0], flush=True)

signal.signal(signal.SIGUSR1, change)
setup = make_setup(ServerConfig.load(sys.argv[1]))
serving.serve_until_stopped(sys.argv[2], setup, setup.collateral, announce, (signal.SIGTERM,))
"""


def test_a_server_goes_on_and_drains_where_the_system_allows_no_thread_for_a_while(site: Path, transport: str) -> None:
    path = site / "server.toml"
    _ = path.write_text(path.read_text().replace("drain_seconds = 0", f'drain_seconds = {LONG}\nadmin.unix = "admin"'))
    command = [sys.executable, "-c", WITHOUT_THREADS, str(path), transport]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            server = Server(process, process.stdout.readline().strip(), site / "ca.pem", [])
            assert "can't start new thread; RuntimeError at " in wait_for("background_failed", server)["error"]
            process.send_signal(signal.SIGUSR1)
            vm = Vm(server)
            granted = vm.boot()
            process.send_signal(signal.SIGUSR1)
            process.send_signal(signal.SIGHUP)
            assert wait_for("reload_refused", server)["error"] == "can't start new thread"
            stop_with_open(1, server)
            vm.sync(granted["boot_token"])
            check_end(server)
        finally:
            process.kill()


HUNG_UP = """
import os, signal, sys
from chutes_proto.cli.main import program
from chutes_proto.io.server import setup

load, signals = setup.load_config, [signal.SIGHUP]

def hang_up(*given):
    while signals:  # at the start, and not at a reload
        os.kill(0, signals.pop())
    return load(*given)

setup.load_config = hang_up
sys.exit(program())
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_hangup_during_the_start_reloads_after_it(site: Path, transport: str, workers: str) -> None:
    words = ["serve", "--config", str(site / "server.toml"), "--transport", transport, "--workers", workers]
    command = [sys.executable, "-c", HUNG_UP, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            server = Server(process, process.stdout.readline().strip(), site / "ca.pem", [])
            assert wait_for("reloaded", server)["caller"] == "SIGHUP"
            ended = server.stop(signal.SIGTERM)
            assert ended.code == 0
            assert "worker_ended" not in ended.err
        finally:
            process.kill()


HANGING = """
import os, time
from contextlib import ExitStack
from chutes_proto.io.server import log_writer
from chutes_proto.io.server import serving
from chutes_proto.log import Level, Record
serving.FLUSH_SECONDS = log_writer.FLUSH_SECONDS = 8.0
log = log_writer.LogWriter()
log(Record(Level.INFO, "serving"))
places = ExitStack()
places.callback(os.unlink, "/nothing/here")
print(time.monotonic(), flush=True)
serving._end_after(8.5, log, places)
time.sleep(60)
"""


def test_the_time_for_the_log_is_within_the_time_for_the_end(transport: str, pipe: tuple[int, int]) -> None:
    fill(pipe[1])
    done = subprocess.run([sys.executable, "-c", HANGING], stdout=subprocess.PIPE, stderr=pipe[1], check=True)
    # A promise: 8.5 seconds in all. One after the other they would be 16.5, and a slow machine may need the rest.
    assert 8 < time.monotonic() - float(done.stdout) < 16


# --- a log that nobody reads ---


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe with little room."""
    reading, writing = os.pipe()
    _ = fcntl(writing, F_SETPIPE_SZ, 4096)
    yield reading, writing
    os.close(reading)
    os.close(writing)


def fill(writing: int) -> None:
    """Through a file of its own, so that the server's end goes on to wait."""
    with open(f"/proc/self/fd/{writing}", "wb", buffering=0, opener=_without_waiting) as file:
        while file.write(b" ") is not None:
            pass


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_all(reading: int) -> bytes:
    os.set_blocking(reading, False)
    said = b""
    with suppress(BlockingIOError):
        while piece := os.read(reading, 65536):
            said += piece
    return said


@pytest.mark.parametrize("is_read_later", [False, True])
def test_a_log_that_nobody_reads_keeps_nobody_waiting(
    start: Callable[..., Server], site: Path, transport: str, pipe: tuple[int, int], is_read_later: bool
) -> None:
    reading, writing = pipe
    command = ("--config", site / "server.toml", "--transport", transport)
    server = start(*command, ca=site / "ca.pem", stderr=writing)
    fill(writing)
    with client(server) as asks:
        for _ in range(3):
            assert asks.get("/nothing").status_code == 404  # a line each
            assert asks.get("/servers/nonce").status_code == 200
        if is_read_later:
            said: list[bytes] = []

            def are_told() -> bool:
                said.append(read_all(reading))
                return b"".join(said).count(b"\n") >= 5

            _ = wait_until(are_told)
            told = [json.loads(line)["event"] for line in b"".join(said).splitlines()]
            assert told == ["serving", "warning", *["refused"] * 3]  # one that is read late lacks nothing
            fill(writing)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0


# --- certificates ---


def put(site: Path, identity: ServerIdentity) -> None:
    _ = (site / "server.pem").write_bytes(identity.chain_pem)
    _ = (site / "server.key").write_bytes(identity.key_pem.reveal())


def test_a_certificate_of_which_a_library_warns_adds_no_line_to_the_log(
    serve: Callable[[int], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_identity, "derived_serial", lambda *_: 0)
    server = serve(0)
    _ = Vm(server).boot()
    server.process.send_signal(signal.SIGTERM)
    said = server.process.communicate(timeout=60)[1]
    assert "boot_granted" in [json.loads(line)["event"] for line in said.splitlines()]


def test_a_new_certificate_is_taken_and_a_bad_one_is_not(serve: Callable[[int], Server], site: Path) -> None:
    server = serve(0)
    with client(server) as kept:
        assert kept.get("/servers/nonce").status_code == 200
        new = make_server_identity(int(time.time()), os.urandom(32))
        put(site, new)
        server.process.send_signal(signal.SIGHUP)
        _ = wait_for("reloaded", server)
        with client(server, new.ca_pem) as fresh:
            assert fresh.get("/servers/nonce").status_code == 200
        with client(server) as old, pytest.raises(httpx.ConnectError):
            _ = old.get("/servers/nonce")
        assert kept.get("/servers/nonce").status_code == 200  # open connections stay
        put(site, make_server_identity(int(time.time()), os.urandom(32)))
        _ = (site / "server.pem").write_bytes(b"garbage")
        server.process.send_signal(signal.SIGHUP)
        told = wait_for("reload_refused", server)
        assert told["level"] == "error"
        assert "server.pem" in told["error"]
        (site / "server.key").chmod(0o644)
        server.process.send_signal(signal.SIGHUP)
        assert "chmod 640" in wait_for("reload_refused", server)["error"]
        with client(server, new.ca_pem) as fresh:
            assert fresh.get("/servers/nonce").status_code == 200
    assert server.stop(signal.SIGTERM).code == 0


def test_a_proxys_socket_comes_and_goes_with_the_server(
    start: Callable[..., Server], site: Path, transport: str
) -> None:
    with (site / "server.toml").open("a") as file:
        _ = file.write('[[proxy]]\nname = "front"\nunix = "keys.sock"\n')
        _ = file.write('networks = ["127.0.0.0/8"]\nsecret_file = "secret"\n')
    (site / "secret").touch(0o600)
    _ = (site / "secret").write_text("new\nold\n")
    (trusted,) = make_setup(ServerConfig.load(site / "server.toml")).service.proxies.proxies
    assert len(trusted.secrets) == 2
    server = start("--config", site / "server.toml", "--transport", transport, ca=site / "ca.pem")
    proxied = {"x-forwarded-for": "192.0.2.7", "x-attestation-proxy-auth": "old"}
    transport_ = httpx.HTTPTransport(uds=str(site / "keys.sock"))
    with httpx.Client(transport=transport_, base_url="http://keys", timeout=60) as proxy:
        assert proxy.get("/servers/nonce", headers=proxied).status_code == 200
        assert proxy.get("/servers/nonce", headers={"x-forwarded-for": "192.0.2.7"}).status_code == 400
    with client(server) as proxy:
        assert proxy.get("/servers/nonce", headers=proxied).status_code == 200
        assert proxy.get("/servers/nonce", headers=proxied | {"x-attestation-proxy-auth": "older"}).status_code == 400
    ended = server.stop(signal.SIGTERM)
    assert ended.code == 0
    assert "older" not in ended.err
    assert not (site / "keys.sock").exists()


@pytest.mark.parametrize("secret", ["", "a\nb\nc\n", "two words\n", "é\n"])
def test_a_bad_secret_is_told_and_not_shown(
    command: Callable[..., Ended], site: Path, transport: str, secret: str
) -> None:
    with (site / "server.toml").open("a") as file:
        _ = file.write('[[proxy]]\nname = "front"\nnetworks = ["127.0.0.0/8"]\nsecret_file = "secret"\n')
    (site / "secret").touch(0o600)
    _ = (site / "secret").write_text(secret)
    ended = command("serve", "--config", site / "server.toml", "--transport", transport, "--check")
    assert ended.code == 1
    assert "proxy.front.secret_file: " in ended.err
    assert "words" not in ended.err.replace("passwords", "")
