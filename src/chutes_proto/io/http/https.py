"""`Send` and `Get` over the standard library's TLS and sockets, without an event loop: small enough for an initramfs.

Rules kept here:

* a request goes to the one origin of its sender, over https; no redirect is followed;
* no request is sent before the server's chain and name are verified;
* every wait ends: each address has its share of the time for a connection, and a slow peer ends with the whole time,
  and so does one that sends so fast that OpenSSL never ceases to read;
* of the addresses of a name, those at which an attempt failed are tried last;
* a connection can begin before its request is ready: the server answers in the meantime;
* a failed request leaves no connection behind; a connection is used again only while the server is silent on it.
"""

from __future__ import annotations

import math
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from attrs import frozen

from chutes_proto.errors import LocalProtocolError, RemoteProtocolError, TransportError
from chutes_proto.io import seconds_left
from chutes_proto.wire.http import Headers, HttpRequest, HttpResponse
from chutes_proto.wire.origin import Origin

if TYPE_CHECKING:
    from chutes_proto.transport.client import ClientConnection

T = TypeVar("T")

_READ_SIZE: Final = 16 * 1024
_SSL_PLACE: Final = re.compile(r"^\[[A-Z]+\] | \(_ssl\.c:[0-9]+\)$")
_BEGIN_SECONDS: Final = 1.0
_BEGUN_SECONDS: Final = 2.0
"""How long a connection that was begun may be used: a server closes one on which it receives nothing more."""


@frozen
class TimeLimits:
    """Time limits of one request in seconds: to connect, for each read or write, and in total.

    The server may work on a request for 25 s before it gives up, so ``read`` and ``total`` should be longer.
    """

    connect: float = 10.0
    read: float = 30.0
    total: float = 60.0

    def exceeded(self, body: bytearray) -> TransportError:
        """Return the error for an answer that was given up after ``body``: too slow, or too large."""
        from chutes_proto.transport.client import MAX_ANSWER

        if len(body) > MAX_ANSWER:
            return TransportError(f"the server's answer has more than {MAX_ANSWER} bytes", maybe_delivered=True)
        return TransportError(f"no whole answer within {self.total:g} s", maybe_delivered=True)


class HttpsSender:
    """Performs `Send` over connections of its own, one at a time, which it keeps for the next request.

    ``url`` is the server's origin, ``https://host:port``; ``context``, which must verify it, is the caller's choice.
    Close a sender after its last request, or use it as a context manager. Raises `LocalProtocolError` for an ``url``
    that is not such an origin, and for a context that verifies no peer.
    """

    def __init__(self, context: ssl.SSLContext, url: str, limits: TimeLimits = TimeLimits()) -> None:
        # The context of `attested_context` verifies in a socket of its own.
        if context.verify_mode == ssl.CERT_NONE and context.sslsocket_class is ssl.SSLSocket:
            raise LocalProtocolError(
                "the context verifies no certificate, so anyone on the way could hand out keys; make it with"
                " client_context or attested_context"
            )
        self._context = context
        self._origin = Origin.parse(url)
        self._limits = limits
        self._kept: _Connection | None = None
        self._begun: _TlsStream | None = None
        self._begun_at = 0.0
        self._suspects: dict[object, None] = {}
        """Addresses that took a connection and have answered nothing since, the one tried last at the end."""
        self._is_closed = False

    def __enter__(self) -> HttpsSender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; a request after that raises `LocalProtocolError`."""
        self._is_closed = True
        kept, self._kept = self._kept, None
        begun, self._begun = self._begun, None
        for connection in (kept, begun):
            if connection is not None:
                connection.close()

    def __call__(self, request: HttpRequest) -> HttpResponse:
        """Return the whole answer. Raises `TransportError`, and `LocalProtocolError` if HTTP forbids the request."""
        end = time.monotonic() + self._limits.total
        connection, self._kept = self._kept, None
        if connection is None or not connection.is_silent(end):
            if connection is not None:
                connection.close()
            connection = self._connect(end)
        try:
            response = connection.exchange(request, self._limits.read, end)
            _ = self._suspects.pop(connection.address, None)
            if connection.http.reusable:
                self._kept = connection
            return response
        except TimeoutError as exc:
            if time.monotonic() >= end:
                raise self._limits.exceeded(bytearray()) from exc
            raise TransportError(f"the server was silent for {self._limits.read:g} s", maybe_delivered=True) from exc
        except OSError as exc:
            raise TransportError(f"the connection broke: {why_not(exc)}", maybe_delivered=True) from exc
        except RemoteProtocolError as exc:
            raise TransportError(str(exc), maybe_delivered=True) from exc
        finally:
            if self._kept is not connection:
                connection.close()

    def begin(self) -> None:
        """Send the first bytes of a connection, so that the server works while the caller still prepares a request.

        Takes at most a second. A fault is not raised here, but by the request.
        """
        with suppress(TransportError):
            self._begun = self._begun or self._begin(time.monotonic() + min(_BEGIN_SECONDS, self._limits.connect))
            self._begun_at = time.monotonic()

    def _begin(self, end: float) -> _TlsStream:
        """Return a connection on which the client hello is sent. Raises `TransportError` and `LocalProtocolError`."""
        if self._is_closed:
            raise LocalProtocolError("the client is closed; make a request within its `with` block")
        with self._connecting():
            suspects = [*self._suspects]
            addresses = _addresses(self._origin, end)
            addresses.sort(key=lambda found: suspects.index(found[1]) + 1 if found[1] in suspects else 0)
            plain, address = _connected(addresses, end)
            try:
                stream = _TlsStream(plain, address, self._context, self._origin.name)
                stream.begin(end)
            except BaseException:
                plain.close()
                raise
            return stream

    def _connect(self, end: float) -> _Connection:
        """Return a connection whose peer is verified. Raises `TransportError`."""
        end = min(end, time.monotonic() + self._limits.connect)
        begun, self._begun = self._begun, None
        if begun is not None and time.monotonic() - self._begun_at > _BEGUN_SECONDS:
            begun.close()
            begun = None
        stream = begun or self._begin(end)
        _ = self._suspects.pop(stream.address, None)
        self._suspects[stream.address] = None
        from chutes_proto.transport.client import ClientConnection  # while the hello is on its way

        try:
            with self._connecting():
                stream.shake_hands(end)
        except BaseException:
            stream.close()
            raise
        return _Connection(stream, ClientConnection(self._origin.authority))

    @contextmanager
    def _connecting(self) -> Generator[None]:
        """Turn every error before a request is sent into `TransportError`."""
        try:
            yield
        except (OSError, ValueError) as exc:  # ValueError: a name that no certificate can have
            why = f"none within {self._limits.connect:g} s" if isinstance(exc, TimeoutError) else why_not(exc)
            raise TransportError(f"no connection to {self._origin.authority}: {why}", maybe_delivered=False) from exc


class _PlainSender(HttpsSender):
    """The same without TLS, for a service on this machine."""

    def _connect(self, end: float) -> _Connection:
        with self._connecting():
            end = min(end, time.monotonic() + self._limits.connect)
            plain, address = _connected(_addresses(self._origin, end), end)
        from chutes_proto.transport.client import ClientConnection

        return _Connection(_Stream(plain, address), ClientConnection(self._origin.authority))


@frozen
class HttpGetter:
    """Performs `Get` and `Post`, each over a connection of its own; ``context`` verifies https."""

    context: ssl.SSLContext
    limits: TimeLimits = TimeLimits()

    def __call__(self, url: str, headers: Headers = (), body: bytes | None = None) -> HttpResponse:
        """Return the whole answer. Raises `TransportError`, and `LocalProtocolError` for a URL that is none."""
        scheme, _, rest = url.partition("://")
        authority, slash, path = rest.partition("/")
        kind = _PlainSender if scheme == "http" else HttpsSender
        port = ":80" if scheme == "http" and not re.search(r":[0-9]+$", authority) else ""
        with kind(self.context, f"https://{authority}{port}", self.limits) as sender:
            return sender(HttpRequest("GET" if body is None else "POST", slash + path, headers, body or b""))


class _Stream:
    """A connected socket. A wait ends after ``seconds`` of silence, and at ``end``, with `TimeoutError`."""

    def __init__(self, connected: socket.socket, address: object) -> None:
        self._socket = connected
        self.address = address

    def send(self, data: bytes, seconds: float, end: float) -> None:
        """Send all of ``data``. Raises `OSError`."""
        unsent = memoryview(data)
        while unsent:
            self._socket.settimeout(min(seconds, seconds_left(end)))
            unsent = unsent[self._socket.send(unsent) :]

    def receive(self, seconds: float, end: float) -> bytes:
        """Return the next bytes, ``b""`` at the end. Raises `OSError`."""
        self._socket.settimeout(min(seconds, seconds_left(end)))
        return self._socket.recv(_READ_SIZE)

    def close(self) -> None:
        self._socket.close()


class _TlsStream(_Stream):
    """TLS over a socket, by way of memory.

    OpenSSL reads messages that mean nothing, such as hello requests, for as long as there are any. From memory there
    are few at a time; from the socket they would keep this thread from the time and from signals.
    """

    def __init__(self, connected: socket.socket, address: object, context: ssl.SSLContext, name: bytes) -> None:
        super().__init__(connected, address)
        self._received, self._unsent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._unsent, server_hostname=name)

    def begin(self, end: float) -> None:
        """Send the client hello. Raises `OSError`."""
        with suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        super().send(self._unsent.read(), math.inf, end)

    def shake_hands(self, end: float) -> None:
        """Complete the handshake, which verifies the peer. Raises `OSError`."""
        self._perform(self._tls.do_handshake, math.inf, end)

    def send(self, data: bytes, seconds: float, end: float) -> None:
        unsent = memoryview(data)
        while unsent:  # in pieces: what is not sent is in memory
            unsent = unsent[self._perform(partial(self._tls.write, unsent[:_READ_SIZE]), seconds, end) :]

    def receive(self, seconds: float, end: float) -> bytes:
        return self._perform(partial(self._tls.read, _READ_SIZE), seconds, end)

    def _perform(self, work: Callable[[], T], seconds: float, end: float) -> T:
        while True:
            try:
                done = work()
            except ssl.SSLWantReadError:
                super().send(self._unsent.read(), seconds, end)
            except OSError:
                with suppress(OSError):  # the alert; a peer that is gone must not hide the reason
                    super().send(self._unsent.read(), seconds, end)
                raise
            else:
                super().send(self._unsent.read(), seconds, end)
                return done
            if data := super().receive(seconds, end):
                _ = self._received.write(data)
            else:
                self._received.write_eof()


class _Connection:
    """A connection to the origin, with the state of HTTP on it."""

    def __init__(self, stream: _Stream, http: ClientConnection) -> None:
        self._stream = stream
        self.address = stream.address
        self.http = http

    def exchange(self, request: HttpRequest, read: float, end: float) -> HttpResponse:
        """Return the answer. Raises `OSError` (`TimeoutError` where it took too long) and `RemoteProtocolError`."""
        self._stream.send(self.http.send_request(request), read, end)
        while True:
            response = self.http.receive_data(self._stream.receive(read, end))
            if response is not None:
                return response

    def is_silent(self, end: float) -> bool:
        """Return whether the server has sent nothing, not even a close, since its last answer."""
        try:
            _ = self._stream.receive(0, end)
        except BlockingIOError:
            return True  # at most a message of TLS itself, such as a session ticket
        except OSError:
            pass
        return False

    def close(self) -> None:
        self._stream.close()


def _addresses(origin: Origin, end: float) -> list[tuple[int, Any]]:
    """Return families and addresses to try, in the resolver's order. Raises `OSError`."""
    try:
        return _resolved(origin, socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass
    import threading  # only a name needs it

    found: list[tuple[int, Any]] = []
    errors: list[OSError] = []

    def resolve() -> None:
        try:
            found.extend(_resolved(origin, 0))
        except UnicodeError:
            errors.append(OSError(f"{origin.host} is not a host name"))
        except OSError as exc:
            errors.append(exc)

    resolver = threading.Thread(target=resolve, daemon=True)  # nothing can interrupt it, so it may be left behind
    resolver.start()
    resolver.join(seconds_left(end))
    if found:
        return found
    raise errors[0] if errors else TimeoutError()


def _resolved(origin: Origin, flags: int) -> list[tuple[int, Any]]:
    found = socket.getaddrinfo(origin.name, origin.port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _, _, _, address in found]


def _connected(addresses: list[tuple[int, Any]], end: float) -> tuple[socket.socket, object]:
    """Connect to the first address that answers in its share of the time, and return it, too.

    Raises the last one's `OSError`.
    """
    error: OSError = TimeoutError()
    for index, (family, address) in enumerate(addresses):
        try:
            plain = socket.socket(family, socket.SOCK_STREAM)
            try:
                plain.settimeout(seconds_left(end) / (len(addresses) - index))
                plain.connect(address)
            except BaseException:
                plain.close()
                raise
        except OSError as exc:
            error = exc
        else:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return plain, address
    raise error


def why_not(exc: BaseException) -> str:
    """Return the reason of a failed connection or request, in words for the operator."""
    match exc:
        case ssl.SSLCertVerificationError():
            return f"the server's certificate does not verify: {exc.verify_message}"
        case ssl.SSLEOFError():
            return "the server closed the connection without a TLS alert"
        case ssl.SSLError(reason=str(reason)):
            return f"TLS: {reason.lower().replace('_', ' ')}"
        case ssl.SSLError(strerror=str(text)):  # it has no name in Python; its number is not an errno
            return f"TLS: {_SSL_PLACE.sub('', text)}"
        case OSError(errno=int(number)) if number > 0:
            return os.strerror(number)  # asyncio has a text of its own, without the reason
        case OSError(strerror=str(text)):
            return text
        case _:
            return str(exc) or type(exc).__name__
