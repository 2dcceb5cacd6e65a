"""The sender without an event loop: every wait ends, and a kept connection is clean."""

from __future__ import annotations

import os
import re
import socket
import ssl
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import pytest

from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.errors import LocalProtocolError, TransportError
from chutes_proto.io.http.attested import attested_context
from chutes_proto.io.http.https import HttpGetter, HttpsSender, TimeLimits
from chutes_proto.io.http.tls import client_context
from chutes_proto.quote import Policy
from chutes_proto.wire.http import HttpRequest
from chutes_proto.wire.origin import Origin
from tests.io.peers import Behaviour, Credentials, answering, peer, read_request
from tests.slow_peer import drip

REQUEST = HttpRequest("POST", "/servers/vm/luks", (("x-boot-token", "70"),), b'{"volumes":["storage"]}')
SHORT = TimeLimits(connect=5.0, read=5.0, total=0.4)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def sender(credentials: Credentials, url: str, limits: TimeLimits = TimeLimits()) -> HttpsSender:
    return HttpsSender(client_context(ca_pem=credentials.ca_pem), url, limits)


def test_a_context_that_verifies_no_server_is_refused(credentials: Credentials) -> None:
    context = client_context(ca_pem=credentials.ca_pem)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with pytest.raises(LocalProtocolError, match="verifies no certificate"):
        _ = HttpsSender(context, "https://keys.example")
    attested = attested_context(Policy(measurements="unchecked"), lambda _: pytest.fail("there is no handshake"))
    HttpsSender(attested, "https://keys.example").close()


def fails(credentials: Credentials, behaviour: Behaviour, limits: TimeLimits = TimeLimits()) -> TransportError:
    began = time.monotonic()
    with peer(credentials, behaviour) as (url, _), sender(credentials, url, limits) as send:
        with pytest.raises(TransportError) as raised:
            _ = send(REQUEST)
        assert time.monotonic() - began < limits.total + 60
    return raised.value


def unreachable(send: HttpsSender) -> TransportError:
    """Return the error of a request that was not sent."""
    with send, pytest.raises(TransportError, match="no connection to ") as raised:
        _ = send(REQUEST)
    assert not raised.value.maybe_delivered
    return raised.value


# --- connections that are kept ---


@contextmanager
def counted(credentials: Credentials, behaviour: Behaviour) -> Iterator[tuple[HttpsSender, list[int]]]:
    """A sender to a peer, with the connections that it made."""
    connections: list[int] = []

    def behave(stream: ssl.SSLSocket) -> None:
        connections.append(1)
        behaviour(stream)

    with peer(credentials, behave) as (url, _), sender(credentials, url) as send:
        yield send, connections


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_connection_is_used_again(credentials: Credentials, version: ssl.TLSVersion) -> None:
    seen: list[bytes] = []

    def behave(stream: ssl.SSLSocket) -> None:
        with suppress(ValueError):
            while True:
                seen.append(read_request(stream))
                stream.sendall(OK)

    with peer(credentials, behave) as (url, ended):
        context = client_context(ca_pem=credentials.ca_pem)
        context.minimum_version = context.maximum_version = version
        with HttpsSender(context, url) as send:
            assert [send(REQUEST).body for _ in range(3)] == [b"ok"] * 3
    assert len(seen) == 3
    assert len(ended) == 1


@pytest.mark.parametrize("answer", [OK, OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")])
def test_a_connection_that_the_server_closed_is_replaced(credentials: Credentials, answer: bytes) -> None:
    closed = threading.Semaphore(0)

    def behave(stream: ssl.SSLSocket) -> None:
        answering(answer)(stream)
        stream.close()
        closed.release()

    with counted(credentials, behave) as (send, connections):
        for _ in range(2):
            assert send(REQUEST).body == b"ok"
            assert closed.acquire(timeout=60)
    assert len(connections) == 2


def test_bytes_sent_ahead_are_never_an_answer(credentials: Credentials) -> None:
    forged = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged"
    ahead = threading.Event()

    def behave(stream: ssl.SSLSocket) -> None:
        _ = read_request(stream)
        if not ahead.is_set():
            stream.sendall(OK + forged)  # with the answer …
            ahead.set()
        else:
            stream.sendall(OK)
            stream.sendall(forged)  # … or behind it
        with suppress(OSError):
            _ = stream.recv(1)

    with counted(credentials, behave) as (send, connections):
        assert [send(REQUEST).body for _ in range(3)] == [b"ok"] * 3
    assert len(connections) == 3


def test_a_fault_leaves_no_connection(credentials: Credentials) -> None:
    with counted(credentials, answering(b"SSH-2.0\r\n\r\n")) as (send, connections):
        for _ in range(2):
            with pytest.raises(TransportError, match=r"not an answer of HTTP/1\.1"):
                _ = send(REQUEST)
        with pytest.raises(LocalProtocolError):
            _ = send(HttpRequest("GET", "/", (("a", "b\r\nc: d"),)))
    assert len(connections) == 3


def test_a_connection_is_begun_before_its_request(credentials: Credentials) -> None:
    with counted(credentials, answering(OK)) as (send, connections):
        send.begin()
        send.begin()
        assert send(REQUEST).body == b"ok"
        assert len(connections) == 1
        send.begin()  # and is closed unused


def test_a_connection_that_was_begun_long_ago_is_replaced(
    credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may have ended it: that would cost the request an attempt."""
    monkeypatch.setattr("chutes_proto.io.http.https._BEGUN_SECONDS", 0.0)
    with peer(credentials, answering(OK)) as (url, ended), sender(credentials, url) as send:
        send.begin()
        assert send(REQUEST).body == b"ok"
    assert len(ended) == 2


def test_a_failed_beginning_is_raised_by_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        send = HttpsSender(client_context(), f"https://127.0.0.1:{reserved.getsockname()[1]}")
        send.begin()
        assert "Connection refused" in str(unreachable(send))
    monkeypatch.setattr("chutes_proto.io.http.https._BEGIN_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        send = HttpsSender(client_context(), f"https://127.0.0.1:{silent.getsockname()[1]}", TimeLimits(connect=0.3))
        send.begin()
        assert "none within 0.3 s" in str(unreachable(send))


# --- every wait ends ---


def dripping(start: bytes, drop: bytes) -> Behaviour:
    def behave(stream: ssl.SSLSocket) -> None:
        _ = read_request(stream)
        stream.sendall(start)
        drip(stream.sendall, repeat(drop), 0.02)

    return behave


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\nx: ", b"y"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"y"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    ],
    ids=["head", "body", "chunks", "interim answers"],
)
def test_a_slow_peer_ends_with_the_whole_time(credentials: Credentials, start: bytes, drop: bytes) -> None:
    error = fails(credentials, dripping(start, drop), SHORT)
    assert error.maybe_delivered
    assert str(error) == "no whole answer within 0.4 s"


def test_an_address_that_does_not_answer_has_only_its_share(
    credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as full, peer(credentials, answering(OK)) as (url, _):
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]  # what comes after these is not even answered
        for connecting in waiting:
            connecting.setblocking(False)
            _ = connecting.connect_ex(full.getsockname())
        there = ("127.0.0.1", Origin.parse(url).port)
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in (full.getsockname(), there)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with sender(credentials, url, TimeLimits(connect=3.0)) as send:
            assert send(REQUEST).body == b"ok"
        found.pop()
        assert "none within 0.3 s" in str(unreachable(sender(credentials, url, TimeLimits(connect=0.3))))
        for connecting in waiting:
            connecting.close()


def test_an_address_that_answered_nothing_is_tried_last(
    credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a server whose process hangs: the system takes its connections."""
    with peer(credentials, answering(OK)) as (url, _), socket.socket() as hung:
        port = int(url.rpartition(":")[2])
        hung.bind(("127.0.0.2", port))
        hung.listen()
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{last}", port)) for last in (2, 1)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with sender(credentials, url, TimeLimits(connect=1.0)) as send:
            with pytest.raises(TransportError, match=r"none within 1 s$"):
                _ = send(REQUEST)
            assert send(REQUEST).body == b"ok"


def test_a_resolver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    real: Callable[..., object] = socket.getaddrinfo

    def hanging(*where: Any, flags: int, **options: Any) -> object:
        if not flags:
            _ = done.wait(60)
        return real(*where, flags=flags, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    error = unreachable(HttpsSender(client_context(), "https://localhost:1", TimeLimits(connect=0.2)))
    done.set()
    assert str(error) == "no connection to localhost:1: none within 0.2 s"


@pytest.mark.parametrize(
    ("url", "port"),
    [("https://h", 443), ("https://h/x:8", 443), ("https://h:80/x", 80), ("http://[::1]/x", 80), ("http://h:81", 81)],
)
def test_the_port_of_a_service(url: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def unknown(_: object, port: object, **__: object) -> object:
        asked.append(port)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(TransportError, match="no connection to "):
        _ = HttpGetter(client_context())(url)
    assert {*asked} == {port}


# --- hostile servers ---


def test_a_head_without_an_end(credentials: Credentials) -> None:
    def behave(stream: ssl.SSLSocket) -> None:
        _ = read_request(stream)
        stream.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            stream.sendall(b"x: y\r\n" * 100)

    error = fails(credentials, behave)
    assert error.maybe_delivered
    assert "too long" in str(error)


def test_a_reset_after_the_request(credentials: Credentials) -> None:
    def behave(stream: ssl.SSLSocket) -> None:
        _ = read_request(stream)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    error = fails(credentials, behave)
    assert error.maybe_delivered
    assert str(error).startswith("the connection broke: ")


@contextmanager
def raw(behaviour: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does something else than TLS with its one connection."""

    def serve() -> None:
        with suppress(OSError), listener.accept()[0] as connection:
            behaviour(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        worker = threading.Thread(target=serve)
        worker.start()
        yield f"https://localhost:{listener.getsockname()[1]}"
        worker.join()


def _plain_http(connection: socket.socket) -> None:
    _ = connection.recv(100)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")


def _close(connection: socket.socket) -> None:
    _ = connection.recv(10_000)


def _old_tls(credentials: Credentials) -> Callable[[socket.socket], None]:
    def behave(connection: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(credentials.chain)
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with suppress(OSError), context.wrap_socket(connection, server_side=True):
            pass

    return behave


def test_a_peer_without_proper_tls_gets_no_request(credentials: Credentials) -> None:
    for behaviour, why in (
        (_plain_http, "TLS: "),
        (_close, "without a TLS alert"),
        (_old_tls(credentials), "TLS: .*version"),
    ):
        with raw(behaviour) as url:
            assert re.search(why, str(unreachable(sender(credentials, url))))


def test_invalid_certificates(tmp_path: Path, credentials: Credentials) -> None:
    heard: list[bytes] = []

    def behave(stream: ssl.SSLSocket) -> None:
        heard.append(stream.recv(1))

    old = make_server_identity(int(time.time()) - 400 * 86400, os.urandom(32), ["localhost"])
    chain = tmp_path / "old.pem"
    _ = chain.write_bytes(old.chain_pem + old.key_pem.reveal())
    expired = Credentials(old.ca_pem, chain)
    with peer(expired, behave) as (url, _):
        error = unreachable(sender(expired, url))
    assert "does not verify: certificate has expired" in str(error)
    assert isinstance(error.__cause__, ssl.SSLCertVerificationError)
    with peer(credentials, behave) as (url, _):
        error = unreachable(sender(credentials, url.replace("localhost", "127.0.0.1")))
    assert "does not verify: IP address mismatch" in str(error)
    assert heard == []


# --- addresses ---


@pytest.mark.parametrize(
    ("url", "origin", "authority"),
    [
        ("https://keys.example", Origin("keys.example", 443), "keys.example"),
        ("HTTPS://Keys.Example:443/", Origin("keys.example", 443), "keys.example"),
        ("https://[2001:DB8::1]:8443", Origin("2001:db8::1", 8443), "[2001:db8::1]:8443"),
    ],
)
def test_origins(url: str, origin: Origin, authority: str) -> None:
    assert Origin.parse(url) == origin
    assert origin.authority == authority


@pytest.mark.parametrize(
    "url",
    [
        "https://a:0",
        "https://a:65536",
        "https://[::1",
        "https://-a",
        "https://a.",
        "https://a b",
        "https://ключ.example",
        cast("str", None),
    ],
)
def test_no_origins(url: str) -> None:
    with pytest.raises(LocalProtocolError, match="https://host:port"):
        _ = Origin.parse(url)
