"""The cost of a boot for a key server, a real process on SQLite over TLS, and the cost of a nonce.

A boot has its own connection, with nonce, attestation and sync, each sent as the agent sends it: head and body at once.
Its platform was seen before, so that the caches have it. CPU time is that of the whole server process, and of each part
that is timed within it: the TLS session, the checks of signatures, and the store's transactions (of which the units'
own Python, with sealing and audit rows, is measured in memory). The rest is everything else: sockets, loop, threads,
HTTP, JSON, parsing, checks, log. A server whose application does nothing shows the share of sockets, loop and HTTP.

Syncs are sent over connections that stay open, by client threads of one process, on the same machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

from attrs import evolve

from bench.measure import resident
from chutes_proto.auth.binding import report_data
from chutes_proto.auth.client_identity import ENTROPY_SIZE, ClientIdentity, make_client_identity
from chutes_proto.effects import Flow
from chutes_proto.effects import run as perform
from chutes_proto.io.drivers.sync import Performer
from chutes_proto.io.http.https import HttpsSender, TimeLimits
from chutes_proto.io.http.tls import client_context
from chutes_proto.io.server import serving
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.setup import make_setup
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.server import ServerConfig
from chutes_proto.server._app import App
from chutes_proto.store.rows import Vm
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import VM, boot, platform, sync
from chutes_proto.transport.tls import TlsSession
from chutes_proto.wire.codec import JSON_HEADERS, encode_quote
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.store.memory import MemoryStore

BOOTS = 300
SYNCS = 960
CALLERS = (1, 16, 64)
NONCES = 1_000_000
VOLUMES = ("storage", "tdx-cache")
PLATFORM = SimulatedPlatform(b"a world to measure in")


def run() -> None:
    with tempfile.TemporaryDirectory(prefix="chutes-proto-bench-") as name:
        folder = Path(name)
        write_server(folder, PLATFORM, int(time.time()))
        _whole_boots(folder)
        _syncs(folder)
        _nonces(folder)


# --- a whole boot ---


def _whole_boots(folder: Path) -> None:
    units = _units_alone()
    print(f"CPU of the server for a whole boot, in ms; {BOOTS} boots, one after the other")
    heads = (
        "loop",
        "boot",
        "in kernel",
        "TLS",
        "signatures",
        "database",
        "its units",
        "the rest",
        "share",
        "of it HTTP",
    )
    print("".join(head.rjust(11) for head in heads))
    for transport in ("trio", "asyncio"):
        whole, system, tls, signatures, store = _measured(folder, transport, "served")
        idle, _, idle_tls, *_ = _measured(folder, transport, "idle")
        rest = whole - tls - signatures - store
        times = "".join(f"{value:11.2f}" for value in (whole, system, tls, signatures, store, units, rest))
        print(f"{transport:>11}{times}{rest / whole:11.0%}{idle - idle_tls:11.2f}")


def _measured(folder: Path, transport: str, what: str) -> list[float]:
    """Return the CPU time of the server and of its parts for a boot, in ms."""
    with _server(folder, transport, what) as (url, parts):
        for number in range(20):
            boot_at(folder, url, f"vm-{number % 10}")
        before = parts()
        for number in range(BOOTS):
            boot_at(folder, url, f"vm-{number % 10}")
        after = parts()
    return [1e3 * (after[part] - before[part]) / BOOTS for part in after]


def boot_at(folder: Path, url: str, vm: str) -> None:
    """Boot one VM, over a connection of its own."""
    identity = make_client_identity(int(time.time()) - 60, os.urandom(ENTROPY_SIZE))
    with _sender(folder, url, identity) as sender:
        _boot_over(sender, identity, vm)


def _boot_over(sender: HttpsSender, identity: ClientIdentity, vm: str) -> None:
    nonce = _ask(sender, "GET", "/servers/nonce")["nonce"]
    quote = encode_quote(PLATFORM.quote(report_data(bytes.fromhex(nonce), identity.spki_sha256)))
    body = {"quote": quote, "miner_hotkey": VM.hotkey, "vm_name": vm}
    grant = _ask(sender, "POST", "/servers/boot/attestation", body, {"x-chutes-nonce": nonce})
    headers = {"x-boot-token": grant["boot_token"], "x-chutes-hotkey": VM.hotkey}
    _ = _ask(sender, "POST", f"/servers/{vm}/luks", {"volumes": VOLUMES}, headers)


def _units_alone() -> float:
    """Return the CPU time of a boot's two units on a store in memory, in ms."""
    store = MemoryStore()
    boots = [evolve(boot(str(number)), now=boot("").now) for number in range(BOOTS)]
    syncs = [sync(granted, "body", *VOLUMES) for granted in boots]
    start = time.process_time()
    for granted, unit in zip(boots, syncs, strict=True):
        _ = store.transact(granted)
        _ = store.transact(unit)
    return 1e3 * (time.process_time() - start) / BOOTS


# --- the server, timed from within ---

Parts = Callable[[], dict[str, float]]


@contextmanager
def _server(folder: Path, transport: str, what: str = "served") -> Generator[tuple[str, Parts]]:
    command = [sys.executable, "-m", "bench.boots", str(folder), transport, what]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        output = process.stdout

        def parts() -> dict[str, float]:
            process.send_signal(signal.SIGUSR1)
            found: dict[str, float] = json.loads(output.readline())
            return found

        try:
            yield output.readline().strip(), parts
        finally:
            process.terminate()


def _serve(folder: str, transport: Any, what: str) -> None:
    """Serve; at SIGUSR1, print the CPU time of the server and its parts. An idle server answers without work."""
    cpu = {"tls": 0.0, "signatures": 0.0, "store": 0.0}

    def timed(part: str, owner: Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, _timed(cpu, part, getattr(owner, name)))

    timed("tls", TlsSession, "__init__", "receive_data", "send_data", "close", "data_to_send")
    timed("signatures", ecdsa, "load_point", "verify", "verify_raw")
    timed("store", SqliteStore, "transact")
    if what == "idle":
        setattr(App, "handle", _nothing_done)  # noqa: B010
    lock = threading.Lock()

    def report(*_: object) -> None:
        with lock:
            print(json.dumps({"whole": time.process_time(), "system": os.times().system, **cpu}), flush=True)

    _ = signal.signal(signal.SIGUSR1, report)
    setup = make_setup(ServerConfig.load(Path(folder) / "server.toml"))
    announce = lambda urls: print(urls[0], flush=True)  # noqa: E731
    serving.serve_until_stopped(transport, setup, setup.collateral, announce, (signal.SIGTERM,))


def _nothing_done(*_: object) -> Flow[HttpResponse]:
    """Return, in place of the application, an answer that fits each step of a boot."""
    yield from ()
    members = dict.fromkeys(("nonce", "key", "boot_token", *VOLUMES), "0" * 64)
    return HttpResponse(200, (("content-type", "application/json"),), json.dumps(members).encode())


def _timed(cpu: dict[str, float], part: str, work: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(work)
    def timing(*arguments: Any, **named: Any) -> Any:
        start = time.thread_time()
        try:
            return work(*arguments, **named)
        finally:
            cpu[part] += time.thread_time() - start

    return timing


# --- syncs over HTTP ---


def _syncs(folder: Path) -> None:
    print(f"\nSQLite over HTTP, one server; {SYNCS} syncs\n{'clients':>12}{'syncs/s':>12}{'ratio':>12}")
    first = 0.0
    setup = make_setup(ServerConfig.load(folder / "server.toml"))
    runs = count()
    with _server(folder, "trio") as (url, _):
        for callers in CALLERS:
            tokens = [f"{next(runs):064x}" for _ in range(SYNCS)]
            with closing(setup.store.open()) as store:
                for number, token in enumerate(tokens):
                    caller = number % callers
                    granted = evolve(
                        boot(token, now=int(time.time()), vm=Vm(VM.hotkey, f"vm-{callers}-{caller}")),
                        platform=platform(f"{callers} {caller}"),
                        vault=setup.service.vault,
                        token_digest=hashlib.sha256(token.encode()).digest(),
                    )
                    _ = store.transact(granted)
            senders = [_sender(folder, url) for _ in range(callers)]
            works = [
                functools.partial(_sync_all, senders[caller], f"vm-{callers}-{caller}", tokens[caller::callers])
                for caller in range(callers)
            ]
            threads = [threading.Thread(target=work) for work in works]
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rate = SYNCS / (time.perf_counter() - start)
            for sender in senders:
                sender.close()
            first = first or rate
            print(f"{callers:>12}{rate:>12.0f}{rate / first:>12.2f}")


def _sync_all(sender: HttpsSender, vm: str, tokens: list[str]) -> None:
    for token in tokens:
        headers = {"x-boot-token": token, "x-chutes-hotkey": VM.hotkey}
        _ = _ask(sender, "POST", f"/servers/{vm}/luks", {"volumes": VOLUMES}, headers)


def _sender(folder: Path, url: str, identity: ClientIdentity | None = None) -> HttpsSender:
    return HttpsSender(client_context(identity, (folder / "ca.pem").read_bytes()), url, TimeLimits(60, 60, 60))


def _ask(
    sender: HttpsSender, method: str, path: str, body: Any = None, headers: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    sent = b"" if body is None else json.dumps(body).encode()
    answer = sender(HttpRequest(method, path, (*JSON_HEADERS, *headers.items()), sent))
    assert answer.status == 200, answer.body
    members: dict[str, Any] = json.loads(answer.body)
    return members


# --- nonces ---


def _nonces(folder: Path) -> None:
    """Issue nonces in a row, without HTTP: memory must not grow, and nothing is written."""
    setup = make_setup(ServerConfig.load(folder / "server.toml"))
    app = App(setup.service)
    request = HttpRequest("GET", f"/servers/nonce?miner_hotkey={VM.hotkey}", peer_address="10.0.0.1")
    with closing(setup.store.open()) as store:
        performer = Performer(store=store)
        before = store.check()
        start = time.perf_counter()
        sizes: list[int] = []
        for number in range(NONCES):
            response = perform(app.handle(request), performer.perform)
            assert response.status == 200
            if number in (NONCES // 100, NONCES - 1):
                sizes.append(resident())
        rate = NONCES / (time.perf_counter() - start)
        rows = sum(store.check().values()) - sum(before.values())
    print(f"\nnonces: {NONCES} issued, {rate:.0f} a second; {rows} rows written", end="")
    print(f"; memory after a hundredth {sizes[0]} kB, at the end {sizes[1]} kB")


if __name__ == "__main__":
    _serve(*sys.argv[1:])
