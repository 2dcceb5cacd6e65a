"""An HTTP/1.1 server connection (RFC 9112) as bytes in, whole requests out; whole answers in, bytes out.

The connection goes through these phases. Each has a deadline, and `expire` acts on one that has passed::

    HANDSHAKE ─▶ IDLE ─▶ RECEIVING ─▶ HANDLING ─▶ ANSWERING ─▶ IDLE, or LINGERING ─▶ CLOSED

Rules kept here:

* limits hold before anything is parsed or kept: a head or body that is too large is refused (431, 413), a request that
  takes too long (408), and bytes that are not a request (400). The application makes the answer to an error, as it does
  the answer to a request;
* these are refused (400) although h11 takes them, because parsers differ over where such a request ends: a line of head
  or trailers that no CR ends, a CR within a line (of a chunk's extension), a folded line, a length that is not one
  plain number, two kinds of length;
* however the peer's bytes are cut, requests and answers are the same;
* one request at a time: bytes of the next wait until the answer has been sent;
* after the last answer the peer is told that there will be no more, and a bounded amount of its further bytes is
  discarded: closing at once could destroy the answer on its way (RFC 9112, section 9.6);
* a connection that ends with nothing to send is closed at once: a proxy would send its next request over an open one,
  and lose it;
* h11 reads a request, but for a whole and plain one, of which ``plain.py`` makes the same in less time;
* times are seconds of a monotonic clock, given by the caller at each call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from enum import IntEnum, auto
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Protocol

from attrs import frozen

from chutes_proto.errors import BadRequest, LocalProtocolError, RemoteProtocolError
from chutes_proto.transport.plain import take_plain
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoints import largest_body
from chutes_proto.wire.http import Headers, HttpRequest, HttpResponse, MalformedRequest, plain_address

if TYPE_CHECKING:
    from chutes_proto.effects import Flow
    from chutes_proto.transport.tls import TlsSession

try:
    import h11
except ImportError:
    raise LocalProtocolError("serving HTTP needs h11: pip install 'chutes-proto[tls]'") from None

READ_SIZE: Final = 16 * 1024
"""Bytes that a binding reads at a time, which one connection can make it hold beyond a request."""

LAST_CALL_SECONDS: Final = 1.0
"""The time that an idle connection stays open once the server drains, and a pending answer once the server ends."""

FIRST_CALL_SECONDS: Final = 5.0
"""The time that accepted connections have to send a request once only other processes serve the listeners."""

_PIECE: Final = 64 * 1024
"""Bytes that are encrypted at once: OpenSSL keeps as much memory as it has held."""

_CLOSE: Final = ("connection", "close")

_BARE_LF: Final = re.compile(rb"[^\r]\n|\A\n\Z")  # trailers that are read on their own may be no more than the LF
_BARE_CR: Final = re.compile(rb"\r(?!\n)")
_STATUSES: Final = frozenset(HTTPStatus)
_FOLDED: Final = re.compile(rb"\n[ \t]")
_LENGTH: Final = re.compile(rb"\ncontent-length:(.*)\r", re.IGNORECASE)


class Application(Protocol):
    """The application that answers requests."""

    def handle(self, request: HttpRequest | MalformedRequest, /) -> Flow[HttpResponse]:
        """The answer to a request, or to bytes that never became one; raises nothing."""
        ...

    def stop(self, now: float, /, *, handed_over: bool = False) -> float:
        """Begin to stop; returns the latest end, on the clock of ``now``. A second call may return a sooner one.

        ``handed_over``: another process serves the same listeners and the same store from now on.
        """
        ...

    def ends_at(self, now: float, /) -> float:
        """The time to stop accepting and to end once pending answers are sent; infinity until `stop`.

        Each answer may change it: it is asked again whenever a connection has ended.
        """
        ...

    def sent(self, response: HttpResponse, /) -> None:
        """Note that all of ``response`` was given to the peer's connection; not called for one that is lost."""
        ...

    def complain(self, event: str, error: Exception, /) -> Flow[None]:
        """Log a fault in accepting or serving a connection; raises nothing."""
        ...


@frozen
class Limits:
    """Limits on the bytes that one peer can make a connection hold, and on the time that it waits.

    ``request_seconds`` is for a whole request from its first byte, ``idle_seconds`` for the first byte of the next one,
    ``write_seconds`` for the peer to take an answer, ``linger_…`` for bytes after the last answer.
    """

    head_bytes: int = 16 * 1024
    body_bytes: int = 64 * 1024
    handshake_seconds: float = 10.0
    idle_seconds: float = 30.0
    request_seconds: float = 30.0
    write_seconds: float = 30.0
    linger_seconds: float = 2.0
    linger_bytes: int = 1024 * 1024


DEFAULT_LIMITS: Final = Limits()


class _Phase(IntEnum):  # a number's hash is C, a plain member's is Python
    HANDSHAKE = auto()
    IDLE = auto()
    RECEIVING = auto()
    HANDLING = auto()
    ANSWERING = auto()
    LINGERING = auto()
    CLOSED = auto()


class ServerConnection:
    """The server's end of one connection.

    Until the connection is `closed`, a binding repeats: take `next_request`, and if there is one, give its answer to
    `send_response`; send what `data_to_send` gives, or where that is nothing, read some bytes for `receive_data`; and
    call `expire` when either was not done by the `deadline`. Nothing that the peer does makes a method raise.
    """

    def __init__(
        self, now: float, *, tls: TlsSession | None = None, limits: Limits = DEFAULT_LIMITS, peer_address: str = ""
    ) -> None:
        self.peer_address: str = peer_address
        """As in `HttpRequest.peer_address`."""
        self.since: float = now
        """The time at which its phase began: accepted, handshake complete, request begun, answered."""
        self.deadline: float = math.inf
        """The time to stop waiting for the peer and call `expire`; infinity while the peer is not waited for."""
        self.sent_ahead: bool = False
        """A part of the latest request had come before the answer to the previous one was sent."""
        self._tls = tls
        self._limits = limits
        self._seconds: Mapping[_Phase, float] = {
            _Phase.HANDSHAKE: limits.handshake_seconds,
            _Phase.IDLE: limits.idle_seconds,
            _Phase.RECEIVING: limits.request_seconds,
            _Phase.ANSWERING: limits.write_seconds,
            _Phase.LINGERING: limits.linger_seconds,
        }
        self._reading: h11.Connection | None = None  # reads the current request, which is not a plain one
        self._inbox = bytearray()  # plaintext that nobody has read
        self._read = b""  # what h11 has taken of the next event: a chunk's header may come before the event does
        self._outbox = bytearray()
        self._in_flight = False  # the caller was given bytes to send and has not come back
        self._head: h11.Request | None = None
        self._body = bytearray()
        self._arrived = now
        self._ready: HttpRequest | MalformedRequest | None = None
        self._sending: HttpResponse | None = None
        self._sent: HttpResponse | None = None
        self._peer_ended = False
        self._end_given = False
        self._draining = False
        self._heard_until = math.inf  # no request is waited for after this time
        self._has_answered = False
        self._last = False  # nothing is answered any more
        self._swallowed = 0
        self._enter(_Phase.IDLE if tls is None else _Phase.HANDSHAKE, now)

    @property
    def closed(self) -> bool:
        """Whether nothing is left to do but to close the socket."""
        return self._phase is _Phase.CLOSED

    @property
    def has_shaken_hands(self) -> bool:
        """Whether the TLS handshake is complete; True without TLS."""
        return self._tls is None or self._tls.established

    @property
    def waits_for_peer(self) -> bool:
        """Whether the next step is the peer's, to send or to take bytes: no request is being handled."""
        return self._phase not in (_Phase.HANDLING, _Phase.CLOSED)

    def receive_data(self, data: bytes, now: float) -> None:
        """Take bytes that the peer sent; ``b""`` when there will be no more.

        Raises `LocalProtocolError` while a request waits for its answer: leave further bytes in the socket.
        """
        if self._phase is _Phase.HANDLING:
            raise LocalProtocolError("a request waits for its answer; call send_response first")
        self._in_flight = False
        self._peer_ended = self._peer_ended or not data
        if self._last:
            self._swallowed += len(data)
            if self._phase is _Phase.LINGERING and (not data or self._swallowed >= self._limits.linger_bytes):
                self._enter(_Phase.CLOSED, now)
            return
        self._inbox += self._decrypted(data, now)
        if self._inbox and self._phase is _Phase.IDLE:
            self._arrive(now)

    def sent_response(self, now: float) -> HttpResponse | None:
        """The answer whose last bytes, from `data_to_send`, have now been sent, once; else None."""
        self._note_sent(now)
        response, self._sent = self._sent, None
        return response

    def next_request(self, now: float) -> HttpRequest | MalformedRequest | None:
        """The next whole request, once; None while there is none, and until the previous one has been answered.

        Bytes that can never become a request come as a `MalformedRequest`; its answer is the last one.
        """
        self._note_sent(now)
        if self._phase in (_Phase.IDLE, _Phase.RECEIVING) and (self._inbox or self._peer_ended):
            try:
                self._parse(now)
            except BadRequest as exc:
                self._refuse(exc, now)
            except h11.RemoteProtocolError as exc:
                self._refuse(_not_http(exc), now)
            except RemoteProtocolError:
                self._finish(now)
        request, self._ready = self._ready, None
        return request

    def send_response(self, response: HttpResponse, now: float) -> None:
        """Answer the request that `next_request` gave.

        Raises `LocalProtocolError`, and changes nothing, if no request waits or HTTP cannot carry the answer.
        """
        if self._phase is not _Phase.HANDLING or self._ready is not None:
            raise LocalProtocolError("no request waits for an answer; call next_request first")
        try:
            self._answer(response, now, last=self._draining)
        except RemoteProtocolError:
            self._finish(now)

    def data_to_send(self) -> bytes:
        """Bytes to send to the peer now; they are given only once."""
        data = bytes(self._outbox)
        self._outbox.clear()
        self._in_flight = bool(data)
        return data

    def drain(self, now: float) -> None:
        """Make the next answer the last one; wait for a next request no longer than `LAST_CALL_SECONDS`."""
        self._draining = True
        if self._phase is _Phase.IDLE:
            self.deadline = min(self.deadline, now + LAST_CALL_SECONDS)

    def hand_over(self, now: float, until: float) -> None:
        """`drain`, and hear a request that was not answered yet until the time ``until``, however slow it comes.

        So who was accepted just before is served, and a silent peer does not keep the server from its end.
        """
        self._draining = True
        self._heard_until = until
        if self._phase is _Phase.IDLE and self._has_answered:
            self.deadline = min(self.deadline, now + LAST_CALL_SECONDS)
        self._cap_deadline()

    def finish(self, now: float) -> None:
        """End the connection with the server: now, or within `LAST_CALL_SECONDS` if a request or answer is pending."""
        self._draining = True
        if self._phase in (_Phase.HANDSHAKE, _Phase.IDLE):
            self.abandon()
        elif self._phase is not _Phase.HANDLING:
            self.deadline = min(self.deadline, now + LAST_CALL_SECONDS)

    def abandon(self) -> None:
        """End the connection now, without telling the peer. Its deadline has passed then."""
        self._forget()
        self._inbox.clear()
        self._last = True
        self._phase, self.deadline = _Phase.CLOSED, -math.inf

    def expire(self, now: float) -> None:
        """Act on a deadline that has passed: answer 408, or end the connection."""
        if self._phase is _Phase.RECEIVING and not self._in_flight:
            self._refuse(BadRequest(Code.REQUEST_TIMEOUT, "Request timeout"), now)
        elif self._phase in (_Phase.HANDSHAKE, _Phase.IDLE) and not self._in_flight:
            self._finish(now)
        elif self._phase is not _Phase.HANDLING:
            # The peer did not take the bytes to send, or the time after the last answer is over.
            self._forget()
            self._enter(_Phase.CLOSED, now)

    # --- the work of the phases ---

    def _forget(self) -> None:
        """Forget an answer that was not taken: it may be long."""
        self._outbox.clear()
        self._sending = None

    def _enter(self, phase: _Phase, now: float) -> None:
        self._phase, self.since = phase, now
        self.deadline = now + self._seconds.get(phase, math.inf)
        if self.deadline > self._heard_until:
            self._cap_deadline()

    def _cap_deadline(self) -> None:
        if self._phase in (_Phase.HANDSHAKE, _Phase.IDLE, _Phase.RECEIVING):
            self.deadline = min(self.deadline, self._heard_until)

    def _arrive(self, now: float) -> None:
        self._arrived = now
        self._enter(_Phase.RECEIVING, now)

    def _decrypted(self, data: bytes, now: float) -> bytes:
        if self._tls is None:
            return data
        try:
            plaintext = self._tls.receive_data(data)
        except RemoteProtocolError:
            self._finish(now)
            return b""
        self._outbox += self._tls.data_to_send()
        self._peer_ended = self._peer_ended or self._tls.peer_closed
        if self._phase is _Phase.HANDSHAKE and self._tls.established:
            self._enter(_Phase.IDLE, now)
        return plaintext

    def _parse(self, now: float) -> None:
        if self._reading is None:
            if not self._inbox:  # the peer has ended after a request
                self._finish(now)
                return
            plain = take_plain(self._inbox, self._limits.head_bytes, self._limits.body_bytes)
            if plain is not None:
                self._ready = self._request(*plain)
                self._enter(_Phase.HANDLING, now)
                return
            self._reading = _reader(self._limits)
        reader = self._reading
        while True:
            event, read = self._next_event(reader)
            match event:
                case h11.Request() as head:
                    self._begin(head, read)
                    if reader.they_are_waiting_for_100_continue:
                        self._write(reader.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
                case h11.Data() as data:
                    _check_lines(read[: len(read) - len(data.data)])
                    self._body += data.data
                    self._check_size(len(self._body))
                case h11.EndOfMessage() if self._head is not None:
                    _check_lines(read)
                    if reader.their_state not in (h11.DONE, h11.MUST_CLOSE):  # it waits to hear that nobody switches
                        _ = reader.send(h11.Response(status_code=400, headers=[]))
                    self._ready = self._request(*_parts(self._head), bytes(self._body))
                    self._enter(_Phase.HANDLING, now)
                    return
                case h11.ConnectionClosed():
                    self._finish(now)
                    return
                case _:
                    return

    def _next_event(self, reader: h11.Connection) -> tuple[object, bytes]:
        """The next event of h11 and the bytes read for it, such as a head or a chunk's header as they were sent.

        h11 is given no more than it may hold, so that its limit does not depend on how the bytes are cut.
        """
        _ = self._feed(reader)
        while True:
            held, _ = reader.trailing_data
            event: object = reader.next_event()
            self._read += held[: len(held) - len(reader.trailing_data[0])]
            if event is not h11.NEED_DATA:
                read, self._read = self._read, b""
                return event, read
            if not self._feed(reader):
                return event, b""

    def _feed(self, reader: h11.Connection) -> bool:
        if self._inbox:
            space = self._limits.head_bytes - len(reader.trailing_data[0])
            if data := bytes(self._inbox[:space]):
                reader.receive_data(data)
                del self._inbox[:space]
            return bool(data)
        if self._peer_ended and not self._end_given:
            self._end_given = True
            reader.receive_data(b"")
            return True
        return False

    def _begin(self, head: h11.Request, sent: bytes) -> None:
        self._head, self._body = head, bytearray()
        headers = dict(head.headers)
        _check_lines(sent)
        length = int(headers.get(b"content-length", b"0"))
        said = [value.strip(b" \t") for value in _LENGTH.findall(sent)]
        if said not in ([], [b"%d" % length]):  # h11 makes one of several that are equal
            raise bad_request("the request's length is not one plain number")
        if head.http_version not in (b"1.0", b"1.1"):
            raise bad_request("neither HTTP/1.0 nor HTTP/1.1")
        if not head.target.startswith(b"/"):
            raise bad_request("the request's target is not in origin form")
        if b"transfer-encoding" in headers and (b"content-length" in headers or head.http_version == b"1.0"):
            # RFC 9112, section 6.3: an attacker sends both to make two parsers disagree.
            raise bad_request("the request's body has two lengths")
        self._check_size(length)

    def _check_size(self, size: int) -> None:
        if size > self._limits.body_bytes and self._head is not None:
            method, target = self._head.method.decode("ascii"), self._head.target.decode("ascii")
            if size > largest_body(method, target, self._limits.body_bytes):
                raise BadRequest(Code.BODY_TOO_LARGE, "Request body too large")

    def _request(self, method: str, target: str, headers: Headers, body: bytes) -> HttpRequest:
        return HttpRequest(
            method=method,
            target=target,
            headers=headers,
            body=body,
            peer_certificate=None if self._tls is None else self._tls.peer_certificate,
            peer_address=self.peer_address,
            arrived=self._arrived,
        )

    def _refuse(self, refusal: BadRequest, now: float) -> None:
        self._draining = True
        self._ready = MalformedRequest(refusal, self.peer_address)
        self._enter(_Phase.HANDLING, now)

    def _answer(self, response: HttpResponse, now: float, *, last: bool) -> None:
        headers = (*response.headers, ("content-length", str(len(response.body))))
        reader = self._reading
        is_last = last or _CLOSE in headers or (reader is not None and reader.their_state is not h11.DONE)
        if is_last and _CLOSE not in headers:
            headers = (*headers, _CLOSE)
        head = _written_head(response.status, headers)
        has_body = self._head is None or self._head.method != b"HEAD"
        self._write(head + response.body if has_body else head)
        self._head, self._body, self._sending = None, bytearray(), response
        self._has_answered = True
        if is_last:
            self._finish(now)
        else:
            if reader is not None:
                self._inbox[:0] = reader.trailing_data[0]
            self._reading, self._end_given = None, False
            self._enter(_Phase.ANSWERING, now)

    def _write(self, data: bytes) -> None:
        if self._tls is None:
            self._outbox += data
            return
        for start in range(0, len(data), _PIECE):
            self._tls.send_data(data[start : start + _PIECE])
            self._outbox += self._tls.data_to_send()

    def _finish(self, now: float) -> None:
        """End our side: nothing follows the bytes in the outbox. Without any, all that ends it is that it is closed."""
        self._last = True
        self._inbox.clear()
        if self._tls is not None:
            self._tls.close()
            self._outbox += self._tls.data_to_send()
        self._enter(_Phase.ANSWERING if self._outbox else _Phase.CLOSED, now)

    def _note_sent(self, now: float) -> None:
        """Note that the caller has sent the bytes it was given: it calls again only then."""
        self._in_flight = False
        if self._phase is _Phase.ANSWERING and not self._outbox:
            self._answered(now)

    def _answered(self, now: float) -> None:
        """Go on after the whole answer was sent."""
        self._sent, self._sending = self._sending, None
        if not self._last:
            self._enter(_Phase.IDLE, now)
            self.sent_ahead = bool(self._inbox)
            if self.sent_ahead:  # its time begins now
                self._arrive(now)
        elif self._peer_ended:
            self._enter(_Phase.CLOSED, now)
        else:
            self._enter(_Phase.LINGERING, now)


def _reader(limits: Limits) -> h11.Connection:
    """An h11 connection that reads one request. It does not see the answer: that would cost as much as reading."""
    return h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head_bytes - 1)


def _parts(head: h11.Request) -> tuple[str, str, Headers]:
    headers = tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in head.headers)
    return head.method.decode("ascii"), head.target.decode("ascii"), headers


def peer_address(name: tuple[object, ...] | str | bytes) -> str:
    """The IP address in a socket's peer name; empty if it has none, as for a unix socket."""
    match name:
        case (str(host), *_):
            try:
                return plain_address(host.partition("%")[0])  # without the zone of RFC 4007
            except ValueError:
                return ""
        case _:
            return ""


@lru_cache(maxsize=256)
def _written_head(status: int, headers: Headers) -> bytes:
    """The head of an answer as h11 writes it; equal heads are written once. Raises `LocalProtocolError`."""
    try:
        answer = h11.Response(status_code=status, headers=list(headers), reason=_phrase(status))
        return h11.Connection(h11.SERVER).send(answer) or b""
    except h11.LocalProtocolError as exc:
        raise LocalProtocolError(f"not an answer of HTTP: {exc}") from exc


def _phrase(status: int) -> str:
    """The reason phrase of a status: RFC 9112 makes it optional, and some clients print nothing else."""
    return HTTPStatus(status).phrase if status in _STATUSES else ""


def bad_request(reason: str) -> BadRequest:
    """The refusal of bytes that are not a request; only the operator hears ``reason``."""
    return BadRequest(Code.BAD_REQUEST, "Bad Request", reason=reason)


def _check_lines(sent: bytes) -> None:
    """Raise `BadRequest` for a line of a head, a chunk or trailers that ends in LF alone, has a CR in it, or is folded.

    RFC 9112, sections 2.2 and 5.2.
    """
    if _BARE_LF.search(sent):
        raise bad_request("a line of the request ends without CR")
    if _BARE_CR.search(sent):
        raise bad_request("a line of the request has a CR in it")
    if _FOLDED.search(sent):
        raise bad_request("a folded line in the request's head or trailers")


def _not_http(exc: h11.RemoteProtocolError) -> BadRequest:
    if exc.error_status_hint == 431:
        return BadRequest(Code.HEAD_TOO_LARGE, "Request head too large")
    return bad_request(str(exc)[:200])
