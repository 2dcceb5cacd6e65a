"""The cost of a boot for a key server, over TLS on SQLite, by layer and beside its floor; and the cost of a nonce.

A boot has its own connection, with nonce, attestation and sync, each sent as the agent sends it: head and body at once.
Its platform was seen before, so that the caches have it. CPU time is that of the whole server process. The servers take
turns, so that a slow moment affects all of them: the floor (``floor.py``), the same with the rows of a boot, and this
one on both loops. The same server without sockets, loop and threads (bare) runs here, its bytes are handed to it, and
its thread's CPU time is the least disturbed by other work of the machine: the place to measure a small change.

The layers (``layers.py``) are timed in other runs of the same servers, because timing costs some.

Syncs are sent over connections that stay open, by client threads of one process, on the same machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import platform as machine
import re
import signal
import sqlite3
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from resource import RUSAGE_SELF, RUSAGE_THREAD, getrusage
from statistics import fmean, median
from types import MappingProxyType
from typing import Any

from attrs import evolve

from bench.floor import Recording, Statement
from bench.layers import NAMES, OPERATIONS, Execute, Layers, watched
from bench.measure import resident
from chutes_proto.auth.binding import report_data
from chutes_proto.auth.client_identity import ENTROPY_SIZE, ClientIdentity, make_client_identity
from chutes_proto.effects import run as perform
from chutes_proto.io.drivers.sync import Performer
from chutes_proto.io.http.https import HttpsSender, TimeLimits
from chutes_proto.io.http.tls import client_context
from chutes_proto.io.server import serving
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.log_writer import LogWriter
from chutes_proto.io.server.setup import make_setup
from chutes_proto.secret import Secret
from chutes_proto.server import ServerConfig
from chutes_proto.server._app import App
from chutes_proto.store._rows import Vm
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import VM, boot, platform
from chutes_proto.transport.client import ClientConnection
from chutes_proto.transport.connections import Answer, Connections, Send
from chutes_proto.transport.h1 import ServerConnection
from chutes_proto.transport.tls import ServerContext, TlsSession, server_context
from chutes_proto.units.revocations import ReadRevocations
from chutes_proto.wire.codec import JSON_HEADERS, encode_quote
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.certificates import NEW_KEY, certificate_pem, key_pem, self_signed

TURNS = 6
BOOTS = 50
"""Boots of a turn."""
SYNCS = 960
SYNCING = 64
"""The VMs whose boots they belong to, 15 of each: of a VM with more than 32, the tokens of older boots do not count."""
CALLERS = (1, 16, 64)
NONCES = 1_000_000
VOLUMES = ("storage", "tdx-cache")
PLATFORM = SimulatedPlatform(b"a world to measure in")

Sender = Callable[[HttpRequest], HttpResponse]


def run() -> None:
    with tempfile.TemporaryDirectory(prefix="chutes-proto-bench-") as name:
        folder = Path(name)
        write_server(folder, PLATFORM, int(time.time()))
        _whole_boots(folder)
        _handshakes()
        _syncs(folder)
        _nonces(folder)


# --- a whole boot ---


def _whole_boots(folder: Path) -> None:
    optimized = "yes" if "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "") else "no"
    version = f"{machine.python_implementation()} {machine.python_version()}"
    build = f"{version} of {sys.base_prefix}, --enable-optimizations: {optimized}"  # Debian's optimizes without it
    whole = _measured(folder, "plain")
    print(f"CPU of the server for a whole boot, in ms; medians of {TURNS} turns of {BOOTS} boots; {build}")
    print(f"{'server':>12}{'whole':>12}{'in kernel':>12}{'over floor':>12}")
    for server, turns in whole.items():
        cpu = {part: median(turn[part] for turn in turns) for part in ("whole", "system")}
        ratio = cpu["whole"] / median(turn["whole"] for turn in whole["floor"])
        print(f"{server:>12}{cpu['whole']:12.2f}{cpu['system']:12.2f}{ratio:12.2f}")
    timed = _measured(folder, "timed")
    print("\nBy layer, with timing on: ms a boot, and the share of the whole")
    print(f"{'layer':>28}{'calls':>8}" + "".join(f"{server:>18}" for server in timed))
    means = {
        server: {part: fmean(turn[part] for turn in turns) for part in turns[0]} for server, turns in timed.items()
    }
    for name in (*NAMES, "everything else"):
        row = f"{name:>28}{means['bare'].get(f'calls of {name}', 0):8.0f}"
        for parts in means.values():
            spent = parts.get(name, 0.0) if name in NAMES else parts["whole"] - sum(parts[each] for each in NAMES)
            row += f"{spent:12.3f}{spent / parts['whole']:6.0%}"
        print(row)
    print(f"{'whole':>36}" + "".join(f"{parts['whole']:12.3f}{1:6.0%}" for parts in means.values()))
    floor = median(turn["whole"] for turn in whole["floor"])
    print("\nOver the floor, were the code of the operations and of the store free: what the layers above leave then")
    for server, parts in means.items():
        left = 1 - sum(parts[name] for name in OPERATIONS) / parts["whole"]
        print(f"{server:>12}{left * median(turn['whole'] for turn in whole[server]) / floor:12.2f}{left:12.0%}")


def _measured(folder: Path, how: str) -> dict[str, list[dict[str, float]]]:
    """Return, by server, what each turn of boots took: ms a boot."""
    found: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        floors = ("floor", "floor, rows") if how == "plain" else ()
        servers = {
            which: stack.enter_context(_server(folder, which, how)) for which in (*floors, "bare", "trio", "asyncio")
        }
        for turn in range(-1, TURNS):  # the first one fills the caches
            for server, (_, boot_one, parts) in servers.items():
                before = parts()
                for number in range(BOOTS):
                    boot_one(f"vm-{number % 10}")
                after = parts()
                if turn >= 0:
                    spent = {part: 1e3 * (after[part] - before.get(part, 0)) / BOOTS for part in after}
                    calls = {part: value / 1e3 for part, value in spent.items() if part.startswith("calls of ")}
                    found.setdefault(server, []).append(spent | calls)
    return found


def boot_at(folder: Path, url: str, vm: str) -> None:
    """Boot one VM, over a connection of its own."""
    identity = make_client_identity(int(time.time()) - 60, os.urandom(ENTROPY_SIZE))
    with _sender(folder, url, identity) as sender:
        _boot_over(sender, identity, vm)


def _boot_over(sender: Sender, identity: ClientIdentity, vm: str) -> None:
    nonce = _ask(sender, "GET", "/servers/nonce")["nonce"].ljust(64, "0")
    quote = encode_quote(PLATFORM.quote(report_data(bytes.fromhex(nonce), identity.spki_sha256)))
    body = {"quote": quote, "miner_hotkey": VM.hotkey, "vm_name": vm}
    grant = _ask(sender, "POST", "/servers/boot/attestation", body, {"x-chutes-nonce": nonce})
    headers = {"x-boot-token": grant["boot_token"], "x-chutes-hotkey": VM.hotkey}
    _ = _ask(sender, "POST", f"/servers/{vm}/luks", {"volumes": VOLUMES}, headers)


# --- the servers ---

Parts = Callable[[], dict[str, float]]
"""Returns the CPU time of a server until now, and of its parts, in seconds."""


@contextmanager
def _server(folder: Path, which: str, how: str = "plain") -> Generator[tuple[str, Callable[[str], None], Parts]]:
    """Start a server; yields its URL, and a function that boots a VM there. ``how``: plain, or timed by layer."""
    arguments: list[str | Path] = ["bench.floor", folder]
    if which == "floor, rows":
        arguments.append(_recorded(folder))
    elif which != "floor":
        arguments = ["bench.boots", folder, which, how]
    command = [sys.executable, "-m", *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        output, wanted = process.stdout, process.stdin

        def parts() -> dict[str, float]:
            process.send_signal(signal.SIGUSR1)
            _ = wanted.write("\n")  # wakes a read that began just before the signal, which would wait on
            wanted.flush()
            found: dict[str, float] = json.loads(output.readline())
            return found

        def boot_within(vm: str) -> None:
            _ = wanted.write(f"{vm}\n")
            wanted.flush()
            assert output.readline() == "booted\n"

        try:
            url = output.readline().strip()
            yield url, (boot_within if which == "bare" else functools.partial(boot_at, folder, url)), parts
        finally:
            process.terminate()


def _serve(folder: Path, which: str, how: str) -> None:
    """Serve; at SIGUSR1, print the CPU time of the server and of its layers."""
    layers = Layers()
    if how == "timed":
        layers.install()
    setup = make_setup(ServerConfig.load(folder / "server.toml"))
    if which == "bare":
        with closing(setup.store.open()) as store:
            performer = Performer(store=store, collateral=setup.collateral, log=LogWriter())  # type: ignore[arg-type]
            setup.service.revoked.now = store.transact(ReadRevocations())  # as a server does beside its boots
            bare = _Bare(App(setup.service), performer, folder)
            _report(layers, bare.cpu)
            print("bare", flush=True)
            for line in sys.stdin:
                if vm := line.strip():
                    bare.boot(vm)
                    print("booted", flush=True)
        return
    _report(layers, lambda: {"whole": time.process_time(), "system": getrusage(RUSAGE_SELF).ru_stime})
    announce = lambda urls: print(urls[0], flush=True)  # noqa: E731
    serving.serve_until_stopped(which, setup, setup.collateral, announce, (signal.SIGTERM,))  # type: ignore[arg-type]


def _recorded(folder: Path) -> Path:
    """Record what two boots of one VM ask an SQLite store; returns the file of a `Recording`."""
    own = folder / "recorded"
    own.mkdir(exist_ok=True)
    write_server(own, PLATFORM, int(time.time()))
    setup = make_setup(ServerConfig.load(own / "server.toml"))
    asked: list[Statement] = []

    def around(sql: str, execute: Execute) -> Execute:
        def recorded(_: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
            asked.append((sql, values))
            return execute(sql, values)

        return recorded

    boots: list[list[Statement]] = []
    connect = sqlite3.connect
    try:
        setattr(sqlite3, "connect", functools.partial(connect, factory=watched(around)))  # noqa: B010
        with closing(setup.store.open()) as store:
            performer = Performer(store=store, collateral=setup.collateral, log=lambda _: None)  # type: ignore[arg-type]
            setup.service.revoked.now = store.transact(ReadRevocations())
            bare = _Bare(App(setup.service), performer, own)
            settings = tuple(sql.removeprefix("PRAGMA ") for sql, _ in asked if re.fullmatch(r"PRAGMA \w+ = \w+", sql))
            while len(boots) < 2 or [sql for sql, _ in boots[-2]] != [sql for sql, _ in boots[-1]]:
                asked.clear()  # once a second a boot does more
                bare.boot("vm-0")
                boots.append([*asked])
    finally:
        setattr(sqlite3, "connect", connect)  # noqa: B010
    assert any(sql.startswith("INSERT") for sql, _ in boots[-1])
    path = own / "recording"
    _ = path.write_bytes(pickle.dumps(Recording(own / "keys.db", settings, (boots[-2], boots[-1]))))
    return path


def _report(layers: Layers, cpu: Callable[[], dict[str, float]]) -> None:
    def report(*_: object) -> None:
        calls = {f"calls of {name}": layers.calls[name] for name in NAMES}
        print(json.dumps({**cpu(), **{name: layers.spent[name] for name in NAMES}, **calls}), flush=True)

    _ = signal.signal(signal.SIGUSR1, report)


class _Bare:
    """A server without sockets, loop and threads, beside its client: bytes are handed over within this process."""

    def __init__(self, app: App, performer: Performer, folder: Path) -> None:
        self._app = app
        self._perform = performer.perform
        self._server = server_context(
            (folder / "server.pem").read_bytes(), Secret((folder / "server.key").read_bytes())
        )
        self._authorities = (folder / "ca.pem").read_bytes()
        self._spent = self._in_kernel = 0.0

    def cpu(self) -> dict[str, float]:
        """Return the CPU time of the server's part."""
        return {"whole": self._spent, "system": self._in_kernel}

    def boot(self, vm: str) -> None:
        """Boot one VM."""
        identity = make_client_identity(int(time.time()) - 60, os.urandom(ENTROPY_SIZE))
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = client_context(identity, self._authorities)
        tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        connections = Connections(1024, lambda _: None, self._app.sent)
        connection: list[ServerConnection] = []

        def served(data: bytes) -> None:
            start, kernel = time.thread_time(), getrusage(RUSAGE_THREAD).ru_stime
            if not connection:
                connection.append(
                    ServerConnection(time.monotonic(), tls=TlsSession(self._server), peer_address="10.0.0.1")
                )
            connection[0].receive_data(data, time.monotonic())
            _ = incoming.write(self._answers(connections, connection[0]))
            self._spent += time.thread_time() - start
            self._in_kernel += getrusage(RUSAGE_THREAD).ru_stime - kernel

        def reach(step: Callable[[], Any]) -> Any:
            """Do a step of the client's TLS; the server has its turn whenever the client waits."""
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    served(outgoing.read())

        def sender(request: HttpRequest) -> HttpResponse:
            http = ClientConnection("127.0.0.1")
            _ = tls.write(http.send_request(request))
            response = None
            while response is None:
                response = http.receive_data(reach(lambda: tls.read(64 * 1024)))
            return response

        _ = reach(tls.do_handshake)
        _boot_over(sender, identity, vm)
        with suppress(ssl.SSLError):
            tls.unwrap()
        served(outgoing.read())

    def _answers(self, connections: Connections, connection: ServerConnection) -> bytes:
        """Take the steps of a connection until it waits for its peer; return what it sends."""
        sent = b""
        while step := connections.next_step(connection, time.monotonic()):
            match step:
                case Answer(request):
                    connection.send_response(perform(self._app.handle(request), self._perform), time.monotonic())
                case Send(data):
                    sent += data
                case _:
                    break
        else:
            connections.remove(connection)
        return sent


# --- TLS ---


def _handshakes() -> None:
    """Print the CPU time of a handshake at the server, by the key of its certificate."""
    keys = {name: NEW_KEY[name]() for name in ("p256", "rsa2048")}
    contexts = {
        name: server_context(certificate_pem(self_signed(key)), Secret(key_pem(key))) for name, key in keys.items()
    }
    times = {name: 1e3 * median(_handshake(context) for _ in range(100)) for name, context in contexts.items()}
    print(f"\nTLS handshake at the server: {times['p256']:.2f} ms with a certificate of P-256,", end="")
    print(f" {times['rsa2048']:.2f} ms with RSA-2048; ratio {times['rsa2048'] / times['p256']:.1f}")


def _handshake(context: ServerContext) -> float:
    """Return the seconds of the server's part."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    tls = anyone.wrap_bio(incoming, outgoing)
    session, spent = None, 0.0
    while session is None or not session.established:
        with suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        data = outgoing.read()
        start = time.thread_time()
        session = session or TlsSession(context)
        _ = session.receive_data(data)
        answer = session.data_to_send()
        spent += time.thread_time() - start
        _ = incoming.write(answer)
    return spent


# --- syncs over HTTP ---


def _syncs(folder: Path) -> None:
    print(f"\nSQLite over HTTP, one server; {SYNCS} syncs\n{'clients':>12}{'syncs/s':>12}{'ratio':>12}")
    first = 0.0
    setup = make_setup(ServerConfig.load(folder / "server.toml"))
    runs = count()
    with _server(folder, "trio") as (url, _, _):
        for callers in CALLERS:
            syncs = [(f"vm-{callers}-{number % SYNCING}", f"{next(runs):064x}") for number in range(SYNCS)]
            with closing(setup.store.open()) as store:
                for vm, token in syncs:
                    granted = evolve(
                        boot(token, now=int(time.time()), vm=Vm(VM.hotkey, vm)),
                        platform=platform(vm),
                        vault=setup.service.vault,
                        token_digest=hashlib.sha256(token.encode()).digest(),
                    )
                    _ = store.transact(granted)
            senders = [_sender(folder, url) for _ in range(callers)]
            start = time.perf_counter()
            with ThreadPoolExecutor(callers) as threads:
                parts = [syncs[caller::callers] for caller in range(callers)]
                _ = [*threads.map(_sync_all, senders, parts)]  # raises what one of them has raised
            rate = SYNCS / (time.perf_counter() - start)
            for sender in senders:
                sender.close()
            first = first or rate
            print(f"{callers:>12}{rate:>12.0f}{rate / first:>12.2f}")


def _sync_all(sender: HttpsSender, syncs: list[tuple[str, str]]) -> None:
    for vm, token in syncs:
        headers = {"x-boot-token": token, "x-chutes-hotkey": VM.hotkey}
        _ = _ask(sender, "POST", f"/servers/{vm}/luks", {"volumes": VOLUMES}, headers)


def _sender(folder: Path, url: str, identity: ClientIdentity | None = None) -> HttpsSender:
    return HttpsSender(client_context(identity, (folder / "ca.pem").read_bytes()), url, TimeLimits(60, 60, 60))


def _ask(
    sender: Sender, method: str, path: str, body: Any = None, headers: Mapping[str, str] = MappingProxyType({})
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
    _serve(Path(sys.argv[1]), *sys.argv[2:])
