"""`FetchEvidence` by each driver, from hostile hosts, over real sockets and real TLS."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import repeat
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from chutes_proto.effects import FetchEvidence, Flow
from chutes_proto.errors import TransportError
from chutes_proto.io.drivers import aio
from chutes_proto.io.drivers.sync import Performer
from chutes_proto.io.http.httpx_messages import MAX_PIECES
from chutes_proto.transport.client import MAX_ANSWER
from chutes_proto.wire.http import HttpResponse
from tests.io.peers import Behaviour, Credentials, answering, flooding, peer, read_request
from tests.loops import on_loop
from tests.slow_peer import drip

Reply = tuple[HttpResponse, bytes]
Driver = Callable[[Flow[Reply]], Reply]

NAME = "no-such-host.invalid"
"""A name that cannot be resolved, so that only the given address leads to the host (RFC 6761, section 6.4)."""


def ask(effect: FetchEvidence) -> Flow[Reply]:
    return (yield from effect)


def by_blocking(flow: Flow[Reply]) -> Reply:
    return Performer().run(flow)


def by_trio(flow: Flow[Reply]) -> Reply:
    return on_loop("trio", aio.Performer().run, flow)


def by_asyncio(flow: Flow[Reply]) -> Reply:
    return on_loop("asyncio", aio.Performer().run, flow)


interruptible = pytest.mark.parametrize("drive", [by_trio, by_asyncio])
everywhere = pytest.mark.parametrize("drive", [by_blocking, by_trio, by_asyncio])


def fetch(drive: Driver, url: str, seconds: float = 20.0, host: str = NAME) -> Reply:
    port = urlsplit(url).port
    assert port is not None
    headers = (("x-chutes-nonce", "1"),)
    return drive(ask(FetchEvidence("127.0.0.1", port, host, "/server/attest?nonce=ab", headers, seconds)))


@everywhere
def test_the_address_is_connected_and_the_name_only_sent(
    drive: Driver, credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    heard: list[bytes] = []

    def behave(stream: ssl.SSLSocket) -> None:
        heard.append(read_request(stream))
        stream.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    with peer(credentials, behave) as (url, _):
        response, certificate = fetch(drive, url)
    (head,) = heard
    assert head.startswith(b"GET /server/attest?nonce=ab HTTP/1.1\r\n")
    port = urlsplit(url).port
    assert f"\r\nhost: {NAME}:{port}\r\n".encode() in head.lower()
    assert b"\r\nx-chutes-nonce: 1\r\n" in head.lower()
    assert (response.status, response.body) == (200, b"{}")
    leaf, *_ = x509.load_pem_x509_certificates(credentials.chain.read_bytes())
    assert certificate == leaf.public_bytes(Encoding.DER)


@everywhere
def test_the_name_stands_in_sni(drive: Driver, credentials: Credentials) -> None:
    named: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(credentials.chain)
    context.sni_callback = lambda _, name, __: named.append(name)

    def serve_one(listener: socket.socket) -> None:
        raw, _ = listener.accept()
        with raw, context.wrap_socket(raw, server_side=True) as stream:
            answering(b"HTTP/1.1 204 No Content\r\n\r\n")(stream)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        worker = threading.Thread(target=serve_one, args=(listener,))
        worker.start()
        response, _ = fetch(drive, f"https://x:{listener.getsockname()[1]}")
        worker.join()
    assert (response.status, named) == (204, [NAME])


@everywhere
def test_a_redirect_is_an_answer_and_not_followed(drive: Driver, credentials: Credentials) -> None:
    asked = threading.Event()

    def elsewhere(stream: ssl.SSLSocket) -> None:
        asked.set()

    with peer(credentials, elsewhere) as (other, _):
        redirect = f"HTTP/1.1 302 Found\r\nlocation: {other}/\r\ncontent-length: 0\r\n\r\n".encode()
        with peer(credentials, answering(redirect)) as (url, _):
            assert fetch(drive, url)[0].status == 302
    assert not asked.is_set()


@everywhere
def test_a_hundred_megabytes_are_not_taken(drive: Driver, credentials: Credentials) -> None:
    sent = [0]

    def behave(stream: ssl.SSLSocket) -> None:
        _ = read_request(stream)
        stream.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
        for _ in range(1526):
            stream.sendall(bytes(65536))
            sent[0] += 65536

    with peer(credentials, behave) as (url, _), pytest.raises(TransportError, match=f"more than {MAX_ANSWER} bytes"):
        _ = fetch(drive, url)
    assert sent[0] < 50_000_000


@everywhere
def test_single_bytes_are_not_taken_one_by_one(drive: Driver, credentials: Credentials) -> None:
    def behave(stream: ssl.SSLSocket) -> None:
        _ = read_request(stream)
        stream.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(2):
            stream.sendall(b"1\r\na\r\n" * MAX_PIECES)
        _ = stream.recv(1)  # the answer does not end, and nobody waits for its end

    with peer(credentials, behave) as (url, _), pytest.raises(TransportError, match=f"more than {MAX_PIECES} pieces"):
        _ = fetch(drive, url, seconds=60.0)


def lines_without_end(stream: ssl.SSLSocket) -> None:
    _ = read_request(stream)
    stream.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        stream.sendall(b"x: y\r\n" * 1000)


def drips(stream: ssl.SSLSocket) -> None:
    _ = read_request(stream)
    stream.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
    drip(stream.sendall, repeat(b"x"), 0.05)


def drips_its_head(stream: ssl.SSLSocket) -> None:
    _ = read_request(stream)
    drip(stream.sendall, repeat(b"H"), 0.05)


def is_silent(stream: ssl.SSLSocket) -> None:
    _ = read_request(stream)
    while stream.recv(1):
        pass


@everywhere
@pytest.mark.parametrize(
    "behaviour",
    [lines_without_end, drips, is_silent, answering(b""), answering(b"SSH-2.0\r\n\r\n"), answering(bytes(300))],
    ids=["lines", "drip", "silence", "nothing", "ssh", "zeros"],
)
def test_no_whole_answer_in_time(drive: Driver, credentials: Credentials, behaviour: Behaviour) -> None:
    began = time.monotonic()
    with peer(credentials, behaviour) as (url, _), pytest.raises(TransportError):
        _ = fetch(drive, url, seconds=1.0)
    assert time.monotonic() - began < 60


@interruptible
def test_on_a_loop_a_head_has_its_time_too(drive: Driver, credentials: Credentials) -> None:
    with peer(credentials, drips_its_head) as (url, _), pytest.raises(TransportError, match="within 1 s"):
        _ = fetch(drive, url, seconds=1.0)


@everywhere
def test_interim_answers_without_an_end_are_not_taken(drive: Driver, credentials: Credentials) -> None:
    """Each costs a loop some 50 us; a host with 10 Mbit/s could have all of its time."""

    def behave(stream: ssl.SSLSocket) -> None:
        _ = read_request(stream)
        while True:
            stream.sendall(b"HTTP/1.1 100 \r\n\r\n" * 1000)

    with peer(credentials, behave) as (url, _), pytest.raises(TransportError, match="more bytes than an answer may"):
        _ = fetch(drive, url, seconds=60.0)


@everywhere
def test_hello_requests_without_an_end_are_not_taken(drive: Driver) -> None:
    with flooding() as (port, _), pytest.raises(TransportError, match="more bytes than an answer may have"):
        _ = fetch(drive, f"https://x:{port}", seconds=60.0)


@everywhere
def test_a_peer_without_tls(drive: Driver) -> None:
    def serve_one(listener: socket.socket) -> None:
        raw, _ = listener.accept()
        with raw, suppress(OSError):
            raw.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            while raw.recv(4096):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        worker = threading.Thread(target=serve_one, args=(listener,))
        worker.start()
        with pytest.raises(TransportError) as raised:
            _ = fetch(drive, f"https://x:{listener.getsockname()[1]}", seconds=5.0)
        worker.join()
    assert not raised.value.maybe_delivered


@everywhere
@pytest.mark.parametrize("address", ["localhost", "1.2.3", ""])
def test_a_name_is_not_an_address(drive: Driver, address: str) -> None:
    with pytest.raises(ValueError, match="does not appear to be an IPv4 or IPv6 address"):
        _ = drive(ask(FetchEvidence(address, 443, "h", "/", (), 1.0)))
