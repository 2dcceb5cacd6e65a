"""The servers of both bindings, over real sockets and with real programs. The test itself runs on the same loop."""

from __future__ import annotations

import hashlib
import math
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import ref

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from anyio.streams.tls import TLSStream
from attrs import define, field

from chutes_proto.auth.certificates import spki_sha256
from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.effects import Flow, Log, Sleep
from chutes_proto.io.drivers.aio import Performer
from chutes_proto.io.server.aio import Server
from chutes_proto.io.server.sockets import ACCEPT_IN_A_ROW, Listening, listen_tls, listen_unix
from chutes_proto.log import Level, Record
from chutes_proto.transport.connections import UNSENT
from chutes_proto.transport.h1 import DEFAULT_LIMITS, Limits
from chutes_proto.transport.tls import server_context
from chutes_proto.wire import json
from chutes_proto.wire.codec import error_response
from chutes_proto.wire.http import HttpRequest, HttpResponse, MalformedRequest
from tests.transport.tls_client import NOW, client_context
from tests.waiting import async_wait_until

pytestmark = pytest.mark.anyio

JSON = (("content-type", "application/json"),)
GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
IDENTITY = make_server_identity(NOW, bytes(32))
CONTEXT = server_context(IDENTITY.chain_pem, IDENTITY.key_pem)
BIG = 1 << 24
GONE = (anyio.BrokenResourceError, anyio.EndOfStream)


@define
class Echo:
    """An application that says whom it sees. ``/slow`` waits to be released, ``/big`` says much, ``/broken`` fails.

    It ends ``drain`` seconds after it was told to, or as soon as nothing is ``open``.
    """

    drain: float = math.inf
    open: set[str] = field(factory=lambda: {"something"})
    latest: float = math.inf
    stopped: bool = False
    held: int = 0
    released: bool = False
    cancelled: list[str] = field(factory=list)
    big: list[ref[HttpResponse]] = field(factory=list)

    def complain(self, event: str, error: Exception) -> Flow[None]:
        yield from Log(Record(Level.ERROR, event, {"error": f"{type(error).__name__}: {error}"}))

    def stop(self, now: float, *, handed_over: bool = False) -> float:
        self.latest = now if self.stopped else now + self.drain
        self.stopped = True
        if handed_over:
            self.open.clear()
        return self.latest

    def ends_at(self, now: float) -> float:
        return self.latest if self.open or not self.stopped else min(self.latest, now)

    def sent(self, response: HttpResponse) -> None:
        self.open.discard(response.header("closes") or "")

    def handle(self, request: HttpRequest | MalformedRequest) -> Flow[HttpResponse]:
        if isinstance(request, MalformedRequest):
            return error_response(request.refusal, "r")
        if request.target == "/slow":
            self.held += 1
            try:
                while not self.released:
                    yield from Sleep(0.01)
            except GeneratorExit:
                self.cancelled.append(request.target)
                raise
        if request.target == "/broken":
            raise RuntimeError("a defect")
        if request.target == "/big":
            big = HttpResponse(200, body=bytes(BIG))
            self.big.append(ref(big))
            return big
        certificate = request.peer_certificate
        content = {
            "target": request.target,
            "body": hashlib.sha256(request.body).hexdigest(),
            "peer": request.peer_address,
            "key": None if certificate is None else spki_sha256(certificate).hex(),
        }
        headers = (*JSON, ("connection", "close")) if request.target == "/last" else JSON
        if request.target == "/slow":
            headers = (*headers, ("closes", "slow"))
        return HttpResponse(200, headers, json.encode(content))


@define
class Counted(Echo):
    """It says how often another task had its turn before each request."""

    turns: int = 0
    seen: list[int] = field(factory=list)

    async def count_turns(self) -> None:
        while True:
            await anyio.lowlevel.checkpoint()
            self.turns += 1

    def handle(self, request: HttpRequest | MalformedRequest) -> Flow[HttpResponse]:
        self.seen.append(self.turns)
        return (yield from Echo.handle(self, request))


@define
class Running:
    port: int
    app: Echo
    log: list[Record]
    server: Any
    ended: anyio.Event

    async def plain(self) -> anyio.abc.SocketStream:
        """A connection whose peer soon holds all that it has not read."""
        stream = await anyio.connect_tcp("127.0.0.1", self.port)
        stream.extra(anyio.abc.SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        return stream

    async def connect(self) -> TLSStream:
        return await shaken(await self.plain())

    def receives_a_request(self) -> bool:
        """The server has a part of one."""
        return any(connection._phase.name == "RECEIVING" for connection in self.server._connections._open)

    async def slow(self) -> TLSStream:
        """A connection whose request is being worked on until it is released."""
        held = self.app.held
        stream = await self.connect()
        await stream.send(GET.replace(b"/a", b"/slow"))
        _ = await async_wait_until(lambda: self.app.held != held)
        return stream


async def shaken(stream: anyio.abc.ByteStream) -> TLSStream:
    return await TLSStream.wrap(
        stream, hostname="localhost", ssl_context=client_context(), server_side=False, standard_compatible=False
    )


@asynccontextmanager
async def running(
    limits: Limits = DEFAULT_LIMITS,
    connections: int = 100,
    app: Echo | None = None,
    more: tuple[Listening, ...] = (),
    is_one_of_several: bool = False,
) -> AsyncIterator[Running]:
    app, log = app or Echo(), list[Record]()
    listening = [*listen_tls(("127.0.0.1", 0), lambda: CONTEXT), *more]
    port = listening[0].socket.getsockname()[1]
    async with anyio.create_task_group() as nursery:
        performer = Performer(log=log.append)
        server = Server(app, performer, limits=limits, connections=connections, is_one_of_several=is_one_of_several)
        ended = anyio.Event()

        async def serve() -> None:
            await server.serve(listening)
            ended.set()

        nursery.start_soon(serve)
        with anyio.fail_after(60):
            yield Running(port, app, log, server, ended)
        nursery.cancel_scope.cancel()


async def read_all(stream: anyio.abc.ByteReceiveStream) -> bytes:
    data = bytearray()
    try:
        while True:
            data += await stream.receive()
    except anyio.EndOfStream:
        return bytes(data)


async def ask(stream: anyio.abc.ByteStream, request: bytes = GET) -> bytes:
    await stream.send(request)
    return await stream.receive()


def make_client_certificate(openssl: str, kind: str, folder: Path) -> str:
    """Make a key of this kind and its certificate. Returns the digest of the public key."""
    options = ["-pkeyopt", "ec_paramgen_curve:P-256"] if kind == "ec" else []
    make = [openssl, "req", "-x509", "-newkey", kind, *options, "-nodes", "-days", "1", "-subj", "/CN=tdx-vm-1"]
    subprocess.run([*make, "-keyout", f"{folder}/k.pem", "-out", f"{folder}/c.pem"], check=True, capture_output=True)
    read = [openssl, "x509", "-in", f"{folder}/c.pem", "-pubkey", "-noout"]
    pem = subprocess.run(read, check=True, capture_output=True).stdout
    encode = [openssl, "pkey", "-pubin", "-outform", "der"]
    return hashlib.sha256(subprocess.run(encode, input=pem, check=True, capture_output=True).stdout).hexdigest()


@pytest.mark.parametrize("kind", ["rsa:2048", "ec", "ed25519", None])
async def test_curl(kind: str | None, tmp_path: Path, require_program: Callable[[str], str]) -> None:
    curl, openssl = require_program("curl"), require_program("openssl")
    (tmp_path / "ca.pem").write_bytes(IDENTITY.ca_pem)
    body = b'{"a":1}' * 1000
    (tmp_path / "body").write_bytes(body)
    command = [curl, "-sS", "--fail", "--max-time", "20", "--cacert", f"{tmp_path}/ca.pem"]
    command += ["--data-binary", f"@{tmp_path}/body"]
    digest = None
    if kind is not None:
        digest = make_client_certificate(openssl, kind, tmp_path)
        command += ["--cert", f"{tmp_path}/c.pem", "--key", f"{tmp_path}/k.pem"]

    async with running() as server:
        urls = [f"https://{host}:{server.port}/a" for host in ("localhost", "127.0.0.1")]
        done = await anyio.run_process([*command, "-4", *urls])
    expected = {"target": "/a", "body": hashlib.sha256(body).hexdigest(), "peer": "127.0.0.1", "key": digest}
    assert done.stdout == json.encode(expected) * 2


async def test_connections_are_kept_and_ended() -> None:
    async with running() as server, await server.connect() as stream:
        for _ in range(3):
            assert (await ask(stream)).startswith(b"HTTP/1.1 200")
        assert b"connection: close" in await ask(stream, GET.replace(b"/a", b"/last"))
        assert await read_all(stream) == b""
        assert server.log == []


async def test_a_unix_socket_speaks_plain_http(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with running(more=(listen_unix(path),)) as server:
        assert path.stat().st_mode & 0o777 == 0o660
        async with await server.connect() as stream:
            assert (await ask(stream)).startswith(b"HTTP/1.1 200")
        async with await anyio.connect_unix(path) as plain:
            assert b'"peer":""' in await ask(plain)


async def test_a_proxy_hears_at_once_that_its_idle_connection_ends(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    limits = Limits(idle_seconds=0.2, linger_seconds=600)
    async with running(limits, more=(listen_unix(path),)), await anyio.connect_unix(path) as kept:
        assert b'"peer":""' in await ask(kept)
        with anyio.fail_after(60):
            assert await read_all(kept) == b""


async def test_deadlines_of_silent_and_slow_peers() -> None:
    async with running(Limits(handshake_seconds=0.2)) as server:
        async with await server.plain() as silent:
            assert await read_all(silent) == b""
        async with await server.plain() as halfway:
            await halfway.send(b"\x16\x03\x01\x02\x00\x01")
            assert await read_all(halfway) == b""
    async with running(Limits(idle_seconds=0.2)) as server, await server.connect() as idle:
        assert await read_all(idle) == b""
    async with running(Limits(request_seconds=0.2, linger_seconds=0.2)) as server:
        async with await server.connect() as slow:
            await slow.send(GET[:10])
            answer = await read_all(slow)
            assert answer.startswith(b"HTTP/1.1 408")
            assert b'"code":"request_timeout"' in answer
        async with await server.connect() as drip:
            with pytest.raises(GONE):
                for byte in GET * 20:  # a byte now and then does not buy time
                    await drip.send(bytes([byte]))
                    await anyio.sleep(0.02)
                await drip.receive()
                await drip.receive()


async def test_a_peer_that_does_not_read_is_cut_off() -> None:
    limits = Limits(write_seconds=0.3)
    async with running(limits, connections=1) as server:
        deaf = await server.connect()
        await deaf.send(GET.replace(b"/a", b"/big"))
        with pytest.raises(anyio.BrokenResourceError):
            for _ in range(10_000):  # requests without end, and no answer taken
                await deaf.send(GET * 1000)
        await anyio.aclose_forcefully(deaf)
        async with await server.connect() as other:  # its slot is free again
            assert (await ask(other)).startswith(b"HTTP/1.1 200")


async def test_a_refusal_reaches_a_peer_that_goes_on_sending() -> None:
    async with running() as server:
        stream = await server.connect()
        await stream.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 500000\r\n\r\n" + b"x" * 500_000)
        answer = await stream.receive()
        assert answer.startswith(b"HTTP/1.1 413")
        assert b'"code":"body_too_large"' in answer
        await anyio.aclose_forcefully(stream)


async def test_others_have_their_turn_between_requests_that_are_sent_ahead() -> None:
    app, requests = Counted(), 50
    async with running(app=app) as server, anyio.create_task_group() as nursery:
        async with await server.connect() as stream:
            nursery.start_soon(app.count_turns)
            await stream.send(GET * requests)
            answers = b""
            while answers.count(b"HTTP/1.1 200") < requests:
                answers += await stream.receive()
        nursery.cancel_scope.cancel()
    assert len(set(app.seen)) > requests // 4  # trio shuffles whose turn is first


async def test_those_who_wait_are_accepted_together_and_others_have_their_turn_meanwhile() -> None:
    count, opened = 100, list[int]()
    async with running(connections=200) as server:
        with ExitStack() as stack:
            for _ in range(count):  # the system takes them, while the server has no turn
                _ = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            while not opened or opened[-1] < count:
                await anyio.lowlevel.checkpoint()
                opened.append(server.server.open_connections)
    most = max(after - before for before, after in pairwise(opened))
    assert 2 < most <= 2 * ACCEPT_IN_A_ROW  # those of two rounds, where trio shuffles whose turn is first


async def test_a_connection_waits_for_its_slot() -> None:
    """Nobody's request is given up for another's sake."""
    async with running(connections=2) as server:
        first, second = await server.slow(), await server.slow()
        third = await server.plain()
        with anyio.move_on_after(0.2) as waiting:
            await shaken(third)
        assert waiting.cancelled_caught
        await anyio.aclose_forcefully(third)
        server.app.released = True
        for stream in (first, second):
            assert (await stream.receive()).startswith(b"HTTP/1.1 200")
        async with await server.connect() as fourth:  # their answers were given, so one of them yields
            assert (await ask(fourth)).startswith(b"HTTP/1.1 200")
        for stream in (first, second):
            await anyio.aclose_forcefully(stream)


@pytest.mark.parametrize("listeners", [1, 2])
async def test_silent_peers_keep_nobody_out(listeners: int, tmp_path: Path) -> None:
    """As many as there may be, in each state in which a peer can be silent; and who asks is answered at once."""

    limits = Limits(handshake_seconds=3600.0, idle_seconds=3600.0, request_seconds=3600.0)
    more = tuple(listen_unix(tmp_path / "s") for _ in range(listeners - 1))
    async with running(limits, connections=8, more=more) as server:
        silent: list[anyio.abc.ByteStream] = [await server.plain() for _ in range(10)]
        halfway = await server.connect()
        await halfway.send(GET[:10])
        silent += [halfway, await server.connect()]
        async with await server.connect() as stream:
            assert (await ask(stream)).startswith(b"HTTP/1.1 200")
            silent += [await server.plain() for _ in range(5)]
            assert (await ask(stream)).startswith(b"HTTP/1.1 200")  # who goes on stays before who is silent
            silent += [await server.plain() for _ in range(5)]
            assert (await ask(stream)).startswith(b"HTTP/1.1 200")
        for peer in silent:
            await anyio.aclose_forcefully(peer)
        assert server.log == []


async def test_peers_that_do_not_read_keep_nobody_out() -> None:
    async with running(Limits(write_seconds=3600.0), connections=4) as server:
        deaf: list[anyio.abc.ByteStream] = []
        for _ in range(6):
            deaf.append(await server.connect())
            assert (await ask(deaf[-1], GET.replace(b"/a", b"/big"))).startswith(b"HTTP/1.1 200")
        async with await server.connect() as stream:
            assert (await ask(stream)).startswith(b"HTTP/1.1 200")
        for peer in deaf:
            await anyio.aclose_forcefully(peer)
        assert server.log == []


async def test_peers_that_do_not_read_have_so_much_memory_and_no_more() -> None:
    """Each may ask for the longest answer there is: with hundreds of them the system would end the server."""
    big = GET.replace(b"/a", b"/big")
    async with running(Limits(write_seconds=3600.0), connections=100) as server:
        deaf: list[anyio.abc.ByteStream] = []
        for _ in range(8):
            deaf.append(await server.connect())
            assert (await ask(deaf[-1], big)).startswith(b"HTTP/1.1 200")
        _ = await async_wait_until(lambda: server.server.open_connections * BIG <= UNSENT)
        async with await server.connect() as stream:
            await stream.send(big.replace(b"Host", b"Connection: close\r\nHost"))
            assert len(await read_all(stream)) > BIG
        for peer in deaf:
            await anyio.aclose_forcefully(peer)
        assert server.log == []


async def test_an_answer_that_was_taken_is_not_kept() -> None:
    """Its peer may then be silent, and so may others."""
    async with running() as server, await server.connect() as stream:
        answer = await ask(stream, GET.replace(b"/a", b"/big"))
        while len(answer) < BIG:
            answer += await stream.receive()
        _ = await async_wait_until(lambda: server.app.big[0]() is None)
        assert server.server.open_connections == 1


async def test_faults_end_one_connection_and_are_logged() -> None:
    async with running(connections=2) as server:
        async with await server.connect() as stream:
            await stream.send(GET.replace(b"/a", b"/broken"))
            with pytest.raises(GONE):
                await stream.receive()
        for _ in range(5):
            gone = await server.connect()
            await gone.send(GET)
            await anyio.aclose_forcefully(gone)
            async with await server.plain() as garbage:
                await garbage.send(GET)
        async with await server.connect() as stream:
            assert (await ask(stream)).startswith(b"HTTP/1.1 200")
        assert [(record.event, record.fields["error"]) for record in server.log] == [
            ("connection_failed", "RuntimeError: a defect")
        ]


async def test_cancellation_ends_the_flows_in_hand() -> None:
    async with running() as server:
        stream = await server.slow()
        assert server.app.cancelled == []
    with anyio.fail_after(60), pytest.raises(GONE):
        await stream.receive()
    await anyio.aclose_forcefully(stream)
    assert server.app.cancelled == ["/slow"]


# --- stopping ---


async def test_a_server_that_stops_ends_connections_with_their_answers() -> None:
    async with running(Limits(idle_seconds=3600.0)) as server:
        idle, busy, sending = await server.connect(), await server.slow(), await server.connect()
        assert (await ask(idle)).startswith(b"HTTP/1.1 200")
        await sending.send(GET[:10])
        _ = await async_wait_until(server.receives_a_request)
        server.server.stop()
        server.app.released = True
        await sending.send(GET[10:])
        for stream in (sending, busy):  # what was under way is answered, for the last time
            answer = await read_all(stream)
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"connection: close" in answer
        with anyio.fail_after(60):  # an idle connection would not end
            assert await read_all(idle) == b""
        async with await server.connect() as late:  # the listener is open until the end
            assert (await ask(late)).startswith(b"HTTP/1.1 200")
        for stream in (idle, busy, sending):
            await anyio.aclose_forcefully(stream)


async def test_a_server_ends_once_nothing_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the other connections do: one that waits for nothing, and peers that do not go on."""
    monkeypatch.setattr("chutes_proto.transport.connections.FIRST_CALL_SECONDS", 0.0)  # when it is handed over only
    limits = Limits(handshake_seconds=3600.0, idle_seconds=3600.0, request_seconds=3600.0, write_seconds=3600.0)
    async with running(limits, app=Echo(drain=3600.0, open={"slow"})) as server:
        silent, idle, halfway, deaf = await server.plain(), *[await server.connect() for _ in range(3)]
        assert (await ask(idle)).startswith(b"HTTP/1.1 200")
        await halfway.send(GET[:10])
        assert (await ask(deaf, GET.replace(b"/a", b"/big"))).startswith(b"HTTP/1.1 200")
        last = await server.slow()
        assert server.server.stop() == pytest.approx(3600)
        async with await server.connect() as other:  # until then it serves
            assert (await ask(other)).startswith(b"HTTP/1.1 200")
        assert not server.ended.is_set()
        server.app.released = True
        assert (await read_all(last)).startswith(b"HTTP/1.1 200")
        await server.ended.wait()
        for stream in (silent, idle, halfway, deaf, last):
            await anyio.aclose_forcefully(stream)
        assert server.log == []


async def test_a_server_with_nothing_open_answers_what_is_under_way_and_accepts_no_more() -> None:
    async with running(app=Echo(drain=3600.0, open=set())) as server:
        idle, busy = await server.connect(), await server.slow()
        server.server.stop()
        with pytest.raises((*GONE, ssl.SSLError)):
            await idle.receive()
        with pytest.raises(OSError):  # noqa: PT011 - whatever says that nobody listens
            await server.plain()
        assert not server.ended.is_set()
        server.app.released = True
        assert (await read_all(busy)).startswith(b"HTTP/1.1 200")
        await server.ended.wait()
        for stream in (idle, busy):
            await anyio.aclose_forcefully(stream)


async def test_a_server_that_handed_its_listener_over_answers_what_it_accepted() -> None:
    async with running(app=Echo(drain=3600.0)) as server:
        answered, fresh, busy = await server.connect(), await server.connect(), await server.slow()
        assert (await ask(answered)).startswith(b"HTTP/1.1 200")
        server.server.stop(handed_over=True)
        with pytest.raises(OSError):  # noqa: PT011 - nobody else has this listener, so nobody listens
            await server.plain()
        await fresh.send(GET)
        assert b"connection: close" in await read_all(fresh)
        assert not server.ended.is_set()
        server.app.released = True
        assert (await read_all(busy)).startswith(b"HTTP/1.1 200")
        await server.ended.wait()
        for stream in (answered, fresh, busy):
            await anyio.aclose_forcefully(stream)


async def test_a_worker_that_ends_hears_what_it_accepted() -> None:
    """A VM comes for its keys, and meets a worker without open boots; the one that granted its boot serves on."""
    async with running(app=Echo(drain=3600.0, open=set()), is_one_of_several=True) as server:
        accepted = await server.plain()
        _ = await async_wait_until(lambda: server.server.open_connections)
        server.server.stop()
        with pytest.raises(OSError):  # noqa: PT011 - no other process has this listener, so nobody listens
            await server.plain()
        stream = await shaken(accepted)
        await stream.send(GET)
        assert (await read_all(stream)).startswith(b"HTTP/1.1 200")
        await server.ended.wait()
        await anyio.aclose_forcefully(stream)


async def test_what_is_not_done_in_time_is_cancelled() -> None:
    async with running(app=Echo(drain=0.3)) as server:
        stream = await server.slow()
        server.server.stop()
        with pytest.raises(GONE):
            await stream.receive()
        await anyio.aclose_forcefully(stream)
        with pytest.raises(OSError):  # noqa: PT011 - whatever says that nobody listens
            await server.plain()
    assert server.app.cancelled == ["/slow"]


async def test_told_again_a_server_ends_at_once() -> None:
    async with running(app=Echo(drain=3600.0)) as server:
        stream = await server.connect()
        assert server.server.stop() == pytest.approx(3600)
        assert server.server.stop() == 0
        with pytest.raises((*GONE, ssl.SSLError)):
            await stream.receive()
        await anyio.aclose_forcefully(stream)
