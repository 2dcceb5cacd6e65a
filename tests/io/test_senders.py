"""`Send` over real TLS, by each driver, against servers that break every rule."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat

import httpx
import pytest
from attrs import evolve

from chutes_proto.auth.client_identity import make_client_identity
from chutes_proto.errors import LocalProtocolError, TransportError
from chutes_proto.io.drivers.aio import HttpxSender
from chutes_proto.io.http.attested import attested_context
from chutes_proto.io.http.https import HttpsSender, TimeLimits
from chutes_proto.io.http.httpx_messages import open_client
from chutes_proto.io.http.tls import client_context
from chutes_proto.quote import Policy
from chutes_proto.transport.client import MAX_ANSWER
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.io.peers import Behaviour, Credentials, answering, flooding, peer, read_request
from tests.loops import on_loop
from tests.slow_peer import drip

SHORT = TimeLimits(connect=5.0, read=0.3, total=5.0)
REQUEST = HttpRequest("POST", "/servers/a%20b/luks?x=%2F&y=", (("x-boot-token", "70"),), b'{"volumes":["storage"]}')

Sender = Callable[[str, ssl.SSLContext, HttpRequest, TimeLimits], HttpResponse]


def by_blocking(url: str, context: ssl.SSLContext, request: HttpRequest, limits: TimeLimits) -> HttpResponse:
    with HttpsSender(context, url, limits) as send:
        return send(request)


def by_httpx(loop: str, url: str, context: ssl.SSLContext, request: HttpRequest, limits: TimeLimits) -> HttpResponse:
    async def main() -> HttpResponse:
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            return await HttpxSender(client, url, limits)(request)

    return on_loop(loop, main)


by_trio, by_asyncio = partial(by_httpx, "trio"), partial(by_httpx, "asyncio")


@pytest.fixture(params=[by_blocking, by_trio, by_asyncio])
def send(request: pytest.FixtureRequest) -> Sender:
    sender: Sender = request.param
    return sender


def talk(
    send: Sender, credentials: Credentials, behaviour: Behaviour, limits: TimeLimits = TimeLimits()
) -> HttpResponse:
    with peer(credentials, behaviour) as (url, _):
        return send(url, client_context(ca_pem=credentials.ca_pem), REQUEST, limits)


def test_a_request_and_its_answer_cross_unchanged(send: Sender, credentials: Credentials) -> None:
    seen: list[bytes] = []

    def behave(stream: ssl.SSLSocket) -> None:
        seen.append(read_request(stream))
        stream.sendall(b"HTTP/1.1 201 Created\r\nX-Two: a\r\nx-two: \xe9\r\ncontent-length: 3\r\n\r\n\x00\xffz")

    response = talk(send, credentials, behave)
    assert response == HttpResponse(201, (("x-two", "a"), ("x-two", "é"), ("content-length", "3")), b"\x00\xffz")
    assert response.body == b"\x00\xffz"
    head, _, body = seen[0].partition(b"\r\n\r\n")
    lines = [line.lower() for line in head.split(b"\r\n")]
    assert head.startswith(b"POST /servers/a%20b/luks?x=%2F&y= HTTP/1.1\r\n")
    assert body == REQUEST.body
    assert b"x-boot-token: 70" in lines
    assert b"accept-encoding: identity" in lines
    assert b"content-length: %d" % len(body) in lines
    assert any(line.startswith(b"host: localhost:") for line in lines)


def test_the_client_certificate_is_presented(send: Sender, credentials: Credentials) -> None:
    identity = make_client_identity(int(time.time()), bytes(32))
    presented: list[bytes | None] = []

    def behave(stream: ssl.SSLSocket) -> None:
        presented.append(stream.getpeercert(binary_form=True))
        answering(b"HTTP/1.1 204 No Content\r\n\r\n")(stream)

    with peer(credentials, behave, client_ca=identity.certificate_pem) as (url, _):
        response = send(url, client_context(identity, credentials.ca_pem), REQUEST, TimeLimits())
    assert response.status == 204
    assert presented == [ssl.PEM_cert_to_DER_cert(identity.certificate_pem.decode())]


def test_a_redirect_is_an_answer_and_not_followed(send: Sender, credentials: Credentials) -> None:
    count: list[bytes] = []

    def behave(stream: ssl.SSLSocket) -> None:
        count.append(read_request(stream))
        stream.sendall(b"HTTP/1.1 307 Temporary Redirect\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n")
        with contextlib.suppress(ValueError):
            count.append(read_request(stream))

    response = talk(send, credentials, behave)
    assert (response.status, response.header("location")) == (307, "/elsewhere")
    assert len(count) == 1


def test_a_coded_answer_is_not_undone(send: Sender, credentials: Credentials) -> None:
    bomb = b"\x1f\x8b" + bytes(100)
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb)
    assert talk(send, credentials, answering(head + bomb)).body == bomb


@pytest.mark.parametrize("loop", ["trio", "asyncio"])
def test_cookies_are_not_read(loop: str, credentials: Credentials) -> None:
    """Python's reader would keep the first, send it with the second request, and warn of a bug in itself."""
    seen: list[bytes] = []

    def behave(stream: ssl.SSLSocket) -> None:
        cookies = b"set-cookie: a=b\r\nset-cookie: c=d; max-age=%b\r\n" % (b"9" * 400)
        for _ in range(2):
            seen.append(read_request(stream))
            stream.sendall(b"HTTP/1.1 200 OK\r\n%bcontent-length: 0\r\n\r\n" % cookies)

    async def main(url: str) -> None:
        async with open_client(client_context(ca_pem=credentials.ca_pem)) as client:
            for _ in range(2):
                _ = await HttpxSender(client, url)(REQUEST)

    with peer(credentials, behave) as (url, _):
        on_loop(loop, main, url)
    assert [b"\r\ncookie:" in request.lower() for request in seen] == [False, False]


@pytest.mark.parametrize("closes", [True, False])
def test_an_answer_without_a_length_ends_with_a_tls_alert(send: Sender, credentials: Credentials, closes: bool) -> None:
    """Whoever is between the two can cut a connection, but not close it."""

    def behave(stream: ssl.SSLSocket) -> None:
        answering(b"HTTP/1.0 200 OK\r\n\r\n" + bytes(40_000))(stream)
        if closes:
            _ = stream.unwrap()

    if closes:
        assert len(talk(send, credentials, behave).body) == 40_000
    else:
        with pytest.raises(TransportError, match=r"^the connection broke: the server closed the conn"):
            _ = talk(send, credentials, behave)


# --- no answer ---


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhalf",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"\x00" * 1000,
        b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 300_000 + b"\r\n\r\n",
    ],
    ids=lambda response: repr(response[:60]),
)
def test_after_an_incomplete_answer_the_request_may_have_been_delivered(
    send: Sender, credentials: Credentials, response: bytes
) -> None:
    with pytest.raises(TransportError) as raised:
        _ = talk(send, credentials, answering(response))
    assert raised.value.maybe_delivered


def test_an_endless_answer_is_cut(send: Sender, credentials: Credentials) -> None:
    def behave(stream: ssl.SSLSocket) -> None:
        _ = read_request(stream)
        stream.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            stream.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    with pytest.raises(TransportError, match=f"more than {MAX_ANSWER} bytes"):
        _ = talk(send, credentials, behave)


def test_the_largest_accepted_answer(send: Sender, credentials: Credentials) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"
    assert len(talk(send, credentials, answering(head % MAX_ANSWER + bytes(MAX_ANSWER))).body) == MAX_ANSWER
    with pytest.raises(TransportError, match="more than"):
        _ = talk(send, credentials, answering(head % (MAX_ANSWER + 1) + bytes(MAX_ANSWER + 1)))


def test_a_silent_server_ends_at_the_time_limit(send: Sender, credentials: Credentials) -> None:
    done = threading.Event()

    def behave(stream: ssl.SSLSocket) -> None:
        _ = read_request(stream)
        _ = done.wait(60)

    with peer(credentials, behave) as (url, _):
        with pytest.raises(TransportError) as raised:
            _ = send(url, client_context(ca_pem=credentials.ca_pem), REQUEST, SHORT)
        done.set()
    assert raised.value.maybe_delivered
    assert str(raised.value) == "the server was silent for 0.3 s"


def test_a_request_that_is_not_taken_ends_at_the_time_limit(send: Sender, credentials: Credentials) -> None:
    """On trio, a generator of its body that nobody ends would warn whoever runs the program with warnings."""
    done = threading.Event()
    body = bytes(32 << 20)  # more than the buffers between the two

    def behave(stream: ssl.SSLSocket) -> None:
        del stream  # nothing is read from it
        _ = done.wait(60)

    with peer(credentials, behave) as (url, _):
        with pytest.raises(TransportError, match=r"^the server was silent for 0\.3 s$") as raised:
            _ = send(url, client_context(ca_pem=credentials.ca_pem), evolve(REQUEST, body=body), SHORT)
        done.set()
    assert raised.value.maybe_delivered


def test_a_slow_body_ends_with_the_whole_time(send: Sender, credentials: Credentials) -> None:
    def behave(stream: ssl.SSLSocket) -> None:
        _ = read_request(stream)
        stream.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        drip(stream.sendall, repeat(b"x", 1000), 0.05)

    began = time.monotonic()
    with pytest.raises(TransportError, match=r"within 0\.4 s") as raised:
        _ = talk(send, credentials, behave, TimeLimits(connect=5.0, read=0.3, total=0.4))
    assert raised.value.maybe_delivered
    assert time.monotonic() - began < 40.0  # the body would drip for 50 s


# --- no connection: the address and the reason, in the same words by each driver ---


def test_nobody_listens(send: Sender) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        with pytest.raises(TransportError) as raised:
            address = f"127.0.0.1:{reserved.getsockname()[1]}"
            _ = send(f"https://{address}", client_context(), REQUEST, SHORT)
    assert not raised.value.maybe_delivered
    assert str(raised.value) == f"no connection to {address}: Connection refused"


@pytest.mark.parametrize("name", ["keys..example", f"{'a' * 64}.example"])
def test_a_name_that_no_host_can_have(send: Sender, name: str) -> None:
    with pytest.raises(TransportError, match=f"^no connection to {name}: ") as raised:
        _ = send(f"https://{name}", client_context(), REQUEST, SHORT)
    assert not raised.value.maybe_delivered


def test_a_handshake_that_never_comes(send: Sender) -> None:
    limits = TimeLimits(connect=0.3, read=5.0, total=5.0)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TransportError) as raised:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        _ = send(f"https://{address}", client_context(), REQUEST, limits)
    assert not raised.value.maybe_delivered
    assert str(raised.value) == f"no connection to {address}: none within 0.3 s"


def test_a_peer_that_sends_empty_messages_without_an_end(send: Sender) -> None:
    with flooding() as (port, ended), pytest.raises(TransportError) as raised:
        limits = TimeLimits(connect=0.3, read=5.0, total=5.0)
        _ = send(f"https://127.0.0.1:{port}", client_context(), REQUEST, limits)
    assert str(raised.value) == f"no connection to 127.0.0.1:{port}: none within 0.3 s"
    assert ended == [True]


@pytest.mark.parametrize("wrong", ["name", "authority"])
def test_an_untrusted_server_gets_no_request(send: Sender, credentials: Credentials, wrong: str) -> None:
    heard: list[bytes] = []

    def behave(stream: ssl.SSLSocket) -> None:
        heard.append(read_request(stream))

    with peer(credentials, behave) as (url, _):
        context = client_context(ca_pem=None if wrong == "authority" else credentials.ca_pem)
        with pytest.raises(
            TransportError, match=r"^no connection to .*: the server's certificate does not ver"
        ) as raised:
            _ = send(url.replace("localhost", "127.0.0.1") if wrong == "name" else url, context, REQUEST, SHORT)
    assert not raised.value.maybe_delivered
    assert heard == []


def test_a_server_without_an_accepted_quote_is_like_any_untrusted_one(send: Sender, credentials: Credentials) -> None:
    context = attested_context(Policy(), lambda _: pytest.fail("there is no quote"))
    with peer(credentials, answering(b"")) as (url, _), pytest.raises(TransportError) as raised:
        _ = send(url, context, REQUEST, SHORT)
    told = "the server's certificate does not verify: attested certificate: it does not have the extension"
    assert str(raised.value).startswith(f"no connection to {url.removeprefix('https://')}: {told}")


# --- what callers get wrong ---


def test_a_client_that_is_closed_without_a_loop(credentials: Credentials) -> None:
    """As on a loop: the connection of a request behind the block would stay open."""
    with peer(credentials, answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as (url, _):
        with HttpsSender(client_context(ca_pem=credentials.ca_pem), url, SHORT) as send:
            assert send(REQUEST).status == 200
        for late in (lambda: send(REQUEST), send.begin):
            with pytest.raises(LocalProtocolError, match="the client is closed; make a request within its"):
                _ = late()


@pytest.mark.parametrize("loop", ["trio", "asyncio"])
def test_a_client_that_is_closed(loop: str) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            send = HttpxSender(client, "https://keys.example", SHORT)
        with pytest.raises(LocalProtocolError, match="the client is closed; make a request within its"):
            _ = await send(REQUEST)

    on_loop(loop, main)


def test_a_request_that_http_cannot_carry(send: Sender, credentials: Credentials) -> None:
    request = HttpRequest("GET", "/", (("x-boot-token", "a\r\nb: c"),))
    with peer(credentials, answering(b"")) as (url, _), pytest.raises(LocalProtocolError):
        _ = send(url, client_context(ca_pem=credentials.ca_pem), request, SHORT)
