"""The server of the trio binding, over real sockets and with real programs."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import define, field

from chutes_proto.auth.certificates import make_server_identity, spki_sha256
from chutes_proto.effects import Flow, Sleep
from chutes_proto.log import Record
from chutes_proto.transport.h1 import DEFAULT_LIMITS, Limits
from chutes_proto.transport.tls import server_context
from chutes_proto.wire import json
from chutes_proto.wire.answers import error_response
from chutes_proto.wire.http import HttpRequest, HttpResponse, MalformedRequest
from chutes_proto_trio import Performer, serve
from tests.transport.tls_client import NOW, client_context

JSON = (("content-type", "application/json"),)
GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"


@define
class Echo:
    """An application that says whom it sees; ``/slow`` takes its time, ``/broken`` has a defect."""

    cancelled: list[str] = field(factory=list)

    def handle(self, request: HttpRequest | MalformedRequest) -> Flow[HttpResponse]:
        if isinstance(request, MalformedRequest):
            return error_response(request.refusal, "r")
        if request.target == "/slow":
            try:
                yield from Sleep(3600)
            finally:
                self.cancelled.append(request.target)
        if request.target == "/broken":
            raise RuntimeError("a defect")
        certificate = request.peer_certificate
        content = {
            "target": request.target,
            "body": hashlib.sha256(request.body).hexdigest(),
            "peer": request.peer_address,
            "key": None if certificate is None else spki_sha256(certificate).hex(),
        }
        headers = (*JSON, ("connection", "close")) if request.target == "/last" else JSON
        return HttpResponse(200, headers, json.encode(content))


@define
class Running:
    port: int
    app: Echo
    log: list[Record]

    async def plain(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def connect(self) -> trio.SSLStream[trio.SocketStream]:
        stream = trio.SSLStream(await self.plain(), client_context(), server_hostname="localhost")
        await stream.do_handshake()
        return stream


@asynccontextmanager
async def running(limits: Limits = DEFAULT_LIMITS, connections: int = 100) -> AsyncIterator[Running]:
    identity = make_server_identity(NOW, bytes(32))
    context = server_context(identity.chain_pem, identity.key_pem)
    app, log = Echo(), list[Record]()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        start = partial(serve, limits=limits, connections=connections)
        nursery.start_soon(start, listeners, app, Performer(log=log.append), lambda: context)
        yield Running(listeners[0].socket.getsockname()[1], app, log)
        nursery.cancel_scope.cancel()


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    data = bytearray()
    while piece := await stream.receive_some():
        data += piece
    return bytes(data)


async def ask(stream: trio.abc.Stream, request: bytes = GET) -> bytes:
    await stream.send_all(request)
    return bytes(await stream.receive_some())


@pytest.mark.parametrize("kind", ["rsa:2048", "ec", "ed25519", None])
def test_curl(kind: str | None, tmp_path: Path, require_program: Callable[[str], str]) -> None:
    curl, openssl = require_program("curl"), require_program("openssl")
    (tmp_path / "ca.pem").write_bytes(make_server_identity(NOW, bytes(32)).ca_pem)
    body = b'{"a":1}' * 1000
    (tmp_path / "body").write_bytes(body)
    command = [curl, "-sS", "--fail", "--max-time", "20", "--cacert", f"{tmp_path}/ca.pem"]
    command += ["--data-binary", f"@{tmp_path}/body"]
    digest = None
    if kind is not None:
        options = ["-pkeyopt", "ec_paramgen_curve:P-256"] if kind == "ec" else []
        files = ["-keyout", f"{tmp_path}/k.pem", "-out", f"{tmp_path}/c.pem"]
        subprocess.run(
            [
                openssl,
                "req",
                "-x509",
                "-newkey",
                kind,
                *options,
                "-nodes",
                "-days",
                "1",
                "-subj",
                "/CN=tdx-vm-1",
                *files,
            ],
            check=True,
            capture_output=True,
        )
        command += ["--cert", f"{tmp_path}/c.pem", "--key", f"{tmp_path}/k.pem"]
        pem = subprocess.run(
            [openssl, "x509", "-in", f"{tmp_path}/c.pem", "-pubkey", "-noout"], check=True, capture_output=True
        ).stdout
        der = subprocess.run(
            [openssl, "pkey", "-pubin", "-outform", "der"], input=pem, check=True, capture_output=True
        ).stdout
        digest = hashlib.sha256(der).hexdigest()

    async def main() -> bytes:
        async with running() as server:
            urls = [f"https://{host}:{server.port}/a" for host in ("localhost", "127.0.0.1")]
            done = await trio.run_process([*command, "-4", *urls], capture_stdout=True)
            return done.stdout

    expected = {"target": "/a", "body": hashlib.sha256(body).hexdigest(), "peer": "127.0.0.1", "key": digest}
    assert trio.run(main) == json.encode(expected) * 2


def test_openssl_as_a_client(require_program: Callable[[str], str], tmp_path: Path) -> None:
    openssl = require_program("openssl")
    (tmp_path / "ca.pem").write_bytes(make_server_identity(NOW, bytes(32)).ca_pem)

    async def main() -> str:
        async with running() as server:
            command = [openssl, "s_client", "-connect", f"127.0.0.1:{server.port}", "-verify_ip", "127.0.0.1"]
            command += ["-verify_return_error", "-CAfile", f"{tmp_path}/ca.pem", "-ign_eof"]
            done = await trio.run_process(command, stdin=GET.replace(b"/a", b"/last"), capture_stdout=True)
            return done.stdout.decode()

    said = trio.run(main)
    assert "Verify return code: 0 (ok)" in said
    assert "HTTP/1.1 200" in said


def test_connections_are_kept_and_ended() -> None:
    async def main() -> None:
        async with running() as server, await server.connect() as stream:
            for _ in range(3):
                assert (await ask(stream)).startswith(b"HTTP/1.1 200")
            assert b"connection: close" in await ask(stream, GET.replace(b"/a", b"/last"))
            assert await stream.receive_some() == b""
            assert server.log == []

    trio.run(main)


def test_deadlines() -> None:
    limits = Limits(handshake_seconds=0.2, idle_seconds=0.2, request_seconds=0.2, linger_seconds=0.2)

    async def main() -> None:
        async with running(limits) as server:
            with trio.fail_after(10):
                async with await server.plain() as silent:
                    assert await read_all(silent) == b""
                async with await server.connect() as idle:
                    assert await idle.receive_some() == b""
                async with await server.connect() as slow:
                    answer = await ask(slow, GET[:10])
                    assert answer.startswith(b"HTTP/1.1 408")
                    assert b'"code":"request_timeout"' in answer
                    assert await slow.receive_some() == b""

    trio.run(main)


def test_a_peer_that_does_not_read_is_cut_off() -> None:
    limits = Limits(write_seconds=0.3)

    async def main() -> None:
        async with running(limits, connections=1) as server:
            with trio.fail_after(20):
                deaf = await server.connect()
                with pytest.raises(trio.BrokenResourceError):
                    await deaf.send_all(GET * 1_000_000)  # requests without end, and no answer taken
                await trio.aclose_forcefully(deaf)
                async with await server.connect() as other:  # its slot is free again
                    assert (await ask(other)).startswith(b"HTTP/1.1 200")

    trio.run(main)


def test_a_refusal_reaches_a_peer_that_goes_on_sending() -> None:
    async def main() -> None:
        async with running() as server, await server.plain() as plain:
            stream = trio.SSLStream(plain, client_context(), server_hostname="localhost")
            await stream.send_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 500000\r\n\r\n" + b"x" * 500_000)
            answer = bytes(await stream.receive_some())
            assert answer.startswith(b"HTTP/1.1 413")
            assert b'"code":"body_too_large"' in answer
            await trio.aclose_forcefully(stream)

    trio.run(main)


def test_a_connection_waits_for_its_slot() -> None:
    async def main() -> None:
        async with running(connections=2) as server:
            first, second = await server.connect(), await server.connect()
            third = trio.SSLStream(await server.plain(), client_context(), server_hostname="localhost")
            with pytest.raises(trio.TooSlowError), trio.fail_after(0.2):
                await third.do_handshake()
            await trio.aclose_forcefully(third)
            assert (await ask(second)).startswith(b"HTTP/1.1 200")
            await first.aclose()
            with trio.fail_after(5):
                async with await server.connect() as fourth:
                    assert (await ask(fourth)).startswith(b"HTTP/1.1 200")
            await second.aclose()

    trio.run(main)


def test_faults_end_one_connection_and_are_logged() -> None:
    async def main() -> None:
        async with running(connections=2) as server:
            async with await server.connect() as stream:
                await stream.send_all(GET.replace(b"/a", b"/broken"))
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
            for _ in range(5):
                gone = await server.connect()
                await gone.send_all(GET)
                await trio.aclose_forcefully(gone)
                async with await server.plain() as garbage:
                    await garbage.send_all(GET)
            async with await server.connect() as stream:
                assert (await ask(stream)).startswith(b"HTTP/1.1 200")
            assert [(record.event, record.fields["error"]) for record in server.log] == [
                ("connection_failed", "RuntimeError: a defect")
            ]

    trio.run(main)


def test_cancellation_ends_the_flows_in_hand() -> None:
    async def main() -> Echo:
        async with running() as server:
            stream = await server.connect()
            await stream.send_all(GET.replace(b"/a", b"/slow"))
            await trio.sleep(0.1)
            assert server.app.cancelled == []
        with trio.fail_after(5):
            await read_all(stream.transport_stream)
        await trio.aclose_forcefully(stream)
        return server.app

    assert trio.run(main).cancelled == ["/slow"]
