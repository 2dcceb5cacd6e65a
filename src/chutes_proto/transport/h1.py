"""An HTTP/1.1 server connection (RFC 9112) as bytes in, whole requests out; whole answers in, bytes out.

The connection goes through these phases; each has a deadline, and `expire` says what its end means::

    HANDSHAKE ─▶ IDLE ─▶ RECEIVING ─▶ HANDLING ─▶ ANSWERING ─▶ IDLE, or LINGERING ─▶ CLOSED

Rules kept here:

* limits hold before anything is parsed or kept: a head or body that is too large is refused (431, 413), a request that
  takes too long (408), and what is no request (400). What an error's answer looks like is not known here: it is asked
  for like the answer to a request;
* of what h11 takes, this is refused, too (400), because parsers are known to differ over where such a request ends: a
  line of head or trailers that no CR ends, a folded line, a length that is not one plain number, two kinds of length;
* however the peer's bytes are cut, requests and answers are the same;
* one request at a time: bytes of the next wait until the answer has been sent;
* after the last answer the peer is told that there will be no more, and a bounded amount of what it still sends is
  swallowed: closing at once could destroy the answer on its way (RFC 9112, section 9.6);
* times are seconds of a clock that never steps, told by the caller at each call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from enum import Enum, auto
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol

from attrs import frozen

from chutes_proto.errors import BadRequest, LocalProtocolError, RemoteProtocolError
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import Headers, HttpRequest, HttpResponse, MalformedRequest, plain_address

if TYPE_CHECKING:
    from chutes_proto.effects import Flow
    from chutes_proto.transport.tls import TlsSession

try:
    import h11
except ImportError:
    raise LocalProtocolError("serving HTTP needs h11: pip install 'chutes-proto[tls]'") from None

READ_SIZE: Final = 16 * 1024
"""How many bytes a binding reads at a time: what one connection can make it hold beyond a request."""

LAST_CALL_SECONDS: Final = 1.0
"""How long a connection that waits for a request stays open once it is draining; at the end, for what is under way."""

_CLOSE: Final = ("connection", "close")

_BARE_LF: Final = re.compile(rb"[^\r]\n|\A\n\Z")  # trailers that are read on their own may be no more than the LF
_FOLDED: Final = re.compile(rb"\n[ \t]")
_LENGTH: Final = re.compile(rb"\ncontent-length:(.*)\r", re.IGNORECASE)


class Application(Protocol):
    """What answers requests."""

    def handle(self, request: HttpRequest | MalformedRequest, /) -> Flow[HttpResponse]:
        """The answer to a request, or to bytes that never became one; raises nothing."""
        ...

    def stop(self, now: float, /) -> float:
        """Begin to stop; returns when to end at the latest, on the clock of ``now``. Told again, that may be sooner."""
        ...

    def ends_at(self, now: float, /) -> float:
        """When to accept no more and end with what is under way, as things are; infinity until told to stop.

        Each answer may change it: it is asked again whenever a connection has ended.
        """
        ...

    def sent(self, response: HttpResponse, /) -> None:
        """Hear that all of ``response`` was given to the peer's connection; of one that is lost, it hears nothing."""
        ...

    def complain(self, event: str, error: Exception, /) -> Flow[None]:
        """Tell the operator of a fault in accepting or serving a connection; raises nothing."""
        ...


@frozen
class Limits:
    """What one peer can make a connection hold and wait for.

    ``request_seconds`` is for a whole request from its first byte, ``idle_seconds`` for the first byte of the next one,
    ``write_seconds`` for the peer to take an answer, ``linger_…`` for what follows the last answer.
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


class _Phase(Enum):
    HANDSHAKE = auto()
    IDLE = auto()
    RECEIVING = auto()
    HANDLING = auto()
    ANSWERING = auto()
    LINGERING = auto()
    CLOSED = auto()


class ServerConnection:
    """One connection, the server's end of it.

    Until the connection is `closed`, a binding repeats: take `next_request`, and if there is one, give its answer to
    `send_response`; send what `data_to_send` gives, or where that is nothing, read some bytes for `receive_data`; and
    call `expire` when either was not done by the `deadline`. Nothing that the peer does makes a method raise.
    """

    def __init__(
        self,
        now: float,
        *,
        tls: TlsSession | None = None,
        limits: Limits = DEFAULT_LIMITS,
        peer_address: str = "",
    ) -> None:
        self._tls = tls
        self._limits = limits
        self._peer_address = peer_address
        self._seconds: Mapping[_Phase, float] = {
            _Phase.HANDSHAKE: limits.handshake_seconds,
            _Phase.IDLE: limits.idle_seconds,
            _Phase.RECEIVING: limits.request_seconds,
            _Phase.ANSWERING: limits.write_seconds,
            _Phase.LINGERING: limits.linger_seconds,
        }
        self._h11 = self._reader()
        self._inbox = bytearray()  # plaintext that h11 has not been given
        self._outbox = bytearray()
        self._in_flight = False  # the caller was given bytes to send and has not come back
        self._head: h11.Request | None = None
        self._body = bytearray()
        self._arrived = now
        self._sent_ahead = False
        self._ready: HttpRequest | MalformedRequest | None = None
        self._sending: HttpResponse | None = None
        self._sent: HttpResponse | None = None
        self._peer_ended = False
        self._end_told = False
        self._draining = False
        self._last = False  # nothing is answered any more
        self._swallowed = 0
        self._close_reason = ""
        self._deadline = math.inf
        self._enter(_Phase.IDLE if tls is None else _Phase.HANDSHAKE, now)

    @property
    def closed(self) -> bool:
        """There is nothing left to do but to close the socket."""
        return self._phase is _Phase.CLOSED

    @property
    def peer_address(self) -> str:
        """As in `HttpRequest.peer_address`."""
        return self._peer_address

    @property
    def waits_for_peer(self) -> bool:
        """No request is being worked on: whether it sends or takes what comes next, or does not, is the peer's."""
        return self._phase not in (_Phase.HANDLING, _Phase.CLOSED)

    @property
    def since(self) -> float:
        """When it came to where it is: accepted, shaken hands, begun a request, been answered."""
        return self._since

    @property
    def sent_ahead(self) -> bool:
        """Of the latest request something had come before the answer to the one before was sent."""
        return self._sent_ahead

    @property
    def close_reason(self) -> str:
        """Why the connection ends before its time, for the operator; empty while it does not."""
        return self._close_reason

    @property
    def deadline(self) -> float:
        """When to stop waiting for the peer and call `expire`; infinity while it is not the peer that is waited for."""
        return self._deadline

    def receive_data(self, data: bytes, now: float) -> None:
        """What the peer sent; ``b""`` when there will be no more.

        Raises `LocalProtocolError` while a request waits for its answer: what comes next is to be left in the socket.
        """
        if self._phase is _Phase.HANDLING:
            raise LocalProtocolError("there is a request to answer")
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
        """The answer of which the last bytes that `data_to_send` gave have now been sent, once; else None."""
        self._note_sent(now)
        response, self._sent = self._sent, None
        return response

    def next_request(self, now: float) -> HttpRequest | MalformedRequest | None:
        """The next whole request, once; None while there is none, and until the one before has been answered.

        What can never become a request comes as a `MalformedRequest`; its answer is the last one.
        """
        self._note_sent(now)
        if self._phase in (_Phase.IDLE, _Phase.RECEIVING) and self._has_unread:
            try:
                self._parse(now)
            except BadRequest as exc:
                self._refuse(exc, now)
            except h11.RemoteProtocolError as exc:
                self._refuse(_not_http(exc), now)
            except RemoteProtocolError as exc:
                self._finish(str(exc), now)
        request, self._ready = self._ready, None
        return request

    def send_response(self, response: HttpResponse, now: float) -> None:
        """The answer to the request that `next_request` gave.

        Raises `LocalProtocolError` if there is none to answer or the answer is none of HTTP's; that changes nothing.
        """
        if self._phase is not _Phase.HANDLING or self._ready is not None:
            raise LocalProtocolError("there is no request to answer")
        try:
            self._answer(response, now, last=self._draining)
        except RemoteProtocolError as exc:
            self._finish(str(exc), now)

    def data_to_send(self) -> bytes:
        """What to send to the peer now; it is given only once."""
        data = bytes(self._outbox)
        self._outbox.clear()
        self._in_flight = bool(data)
        return data

    def drain(self, now: float) -> None:
        """Make the next answer the last one, and do not wait long for a next request: only for one under way."""
        self._draining = True
        if self._phase is _Phase.IDLE:
            self._deadline = min(self._deadline, now + LAST_CALL_SECONDS)

    def finish(self, now: float) -> None:
        """The server ends: end it now, unless a request or its answer is under way; for these do not wait long."""
        self._draining = True
        if self._phase in (_Phase.HANDSHAKE, _Phase.IDLE):
            self.abandon("the server ends")
        elif self._phase is not _Phase.HANDLING:
            self._deadline = min(self._deadline, now + LAST_CALL_SECONDS)

    def abandon(self, reason: str) -> None:
        """End it now, without a word. The deadline has passed then."""
        self._outbox.clear()
        self._inbox.clear()
        self._close_reason = reason
        self._last = True
        self._phase, self._deadline = _Phase.CLOSED, -math.inf

    def expire(self, now: float) -> None:
        """The deadline has passed, whatever was waited for."""
        if self._phase is _Phase.RECEIVING and not self._in_flight:
            self._refuse(BadRequest(Code.REQUEST_TIMEOUT, "Request timeout"), now)
        elif self._phase in (_Phase.HANDSHAKE, _Phase.IDLE) and not self._in_flight:
            waited_for = "TLS handshake" if self._phase is _Phase.HANDSHAKE else "request"
            self._finish(f"no {waited_for} in time", now)
        elif self._phase is not _Phase.HANDLING:
            # Bytes were to be sent and the peer did not take them, or it was waited for long enough after the last.
            self._outbox.clear()
            self._close_reason = self._close_reason or ("the peer does not read" if self._in_flight else "")
            self._enter(_Phase.CLOSED, now)

    # --- from here on: what the phases do ---

    def _enter(self, phase: _Phase, now: float) -> None:
        self._phase, self._since = phase, now
        self._deadline = now + self._seconds.get(phase, math.inf)

    def _arrive(self, now: float) -> None:
        self._arrived = now
        self._enter(_Phase.RECEIVING, now)

    def _decrypted(self, data: bytes, now: float) -> bytes:
        if self._tls is None:
            return data
        try:
            plaintext = self._tls.receive_data(data)
        except RemoteProtocolError as exc:
            self._finish(str(exc), now)
            return b""
        self._outbox += self._tls.data_to_send()
        self._peer_ended = self._peer_ended or self._tls.peer_closed
        if self._phase is _Phase.HANDSHAKE and self._tls.established:
            self._enter(_Phase.IDLE, now)
        return plaintext

    @property
    def _has_unread(self) -> bool:
        """There is what `_parse` has not seen, or may see anew now that the request before is answered."""
        return bool(self._inbox or self._peer_ended or self._h11.trailing_data[0])

    def _parse(self, now: float) -> None:
        while True:
            event, read = self._next_event()
            match event:
                case h11.Request() as head:
                    self._begin(head, read)
                    if self._h11.they_are_waiting_for_100_continue:
                        self._write(self._h11.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
                case h11.Data() as data:
                    self._body += data.data
                    if len(self._body) > self._limits.body_bytes:
                        raise BadRequest(Code.BODY_TOO_LARGE, "Request body too large")
                case h11.EndOfMessage() if self._head is not None:
                    _check_lines(read)
                    if self._h11.their_state not in (h11.DONE, h11.MUST_CLOSE):  # it waits to hear that nobody switches
                        _ = self._h11.send(h11.Response(status_code=400, headers=[]))
                    self._ready = self._request(self._head)
                    self._enter(_Phase.HANDLING, now)
                    return
                case h11.ConnectionClosed():
                    self._finish("", now)
                    return
                case _:
                    return

    def _next_event(self) -> tuple[object, bytes]:
        """The next event of h11, given no more than it may hold, so that its limit does not depend on cuts.

        With it comes what was read for it, a head or trailers as they were sent.
        """
        _ = self._feed()
        while True:
            held, _ = self._h11.trailing_data
            event: object = self._h11.next_event()
            if event is not h11.NEED_DATA or not self._feed():
                return event, held[: len(held) - len(self._h11.trailing_data[0])]

    def _feed(self) -> bool:
        if self._inbox:
            room = self._limits.head_bytes - len(self._h11.trailing_data[0])
            if data := bytes(self._inbox[:room]):
                self._h11.receive_data(data)
                del self._inbox[:room]
            return bool(data)
        if self._peer_ended and not self._end_told:
            self._end_told = True
            self._h11.receive_data(b"")
            return True
        return False

    def _begin(self, head: h11.Request, sent: bytes) -> None:
        self._head, self._body = head, bytearray()
        headers = dict(head.headers)
        _check_lines(sent)
        length = int(headers.get(b"content-length", b"0"))
        said = [value.strip(b" \t") for value in _LENGTH.findall(sent)]
        if said not in ([], [b"%d" % length]):  # h11 makes one of several that are equal
            raise BadRequest(Code.BAD_REQUEST, "Bad Request", reason="the request's length is not one plain number")
        if head.http_version not in (b"1.0", b"1.1"):
            raise BadRequest(Code.BAD_REQUEST, "Bad Request", reason="neither HTTP/1.0 nor HTTP/1.1")
        if not head.target.startswith(b"/"):
            raise BadRequest(Code.BAD_REQUEST, "Bad Request", reason="the request's target is not in origin form")
        if b"transfer-encoding" in headers and (b"content-length" in headers or head.http_version == b"1.0"):
            # RFC 9112, section 6.3: what an attacker sends to make two parsers disagree.
            raise BadRequest(Code.BAD_REQUEST, "Bad Request", reason="the request's body has two lengths")
        if length > self._limits.body_bytes:
            raise BadRequest(Code.BODY_TOO_LARGE, "Request body too large")

    def _request(self, head: h11.Request) -> HttpRequest:
        return HttpRequest(
            method=head.method.decode("ascii"),
            target=head.target.decode("ascii"),
            headers=tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in head.headers),
            body=bytes(self._body),
            peer_certificate=None if self._tls is None else self._tls.peer_certificate,
            peer_address=self._peer_address,
            arrived=self._arrived,
        )

    def _refuse(self, refusal: BadRequest, now: float) -> None:
        self._draining = True
        self._close_reason = refusal.reason
        self._ready = MalformedRequest(refusal, self._peer_address)
        self._enter(_Phase.HANDLING, now)

    def _answer(self, response: HttpResponse, now: float, *, last: bool) -> None:
        headers = (*response.headers, ("content-length", str(len(response.body))))
        is_last = last or _CLOSE in headers or self._h11.their_state is not h11.DONE
        if is_last and _CLOSE not in headers:
            headers = (*headers, _CLOSE)
        head = _written_head(response.status, headers)
        has_body = self._head is None or self._head.method != b"HEAD"
        self._write(head + response.body if has_body else head)
        self._head, self._body, self._sending = None, bytearray(), response
        if is_last:
            self._finish("", now)
        else:
            sent_ahead, _ = self._h11.trailing_data
            self._h11, self._end_told = self._reader(), False
            if sent_ahead:
                self._h11.receive_data(sent_ahead)
            self._enter(_Phase.ANSWERING, now)

    def _reader(self) -> h11.Connection:
        """What reads one request. It is told of no answer: that would cost as much again as reading."""
        return h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.head_bytes - 1)

    def _write(self, data: bytes) -> None:
        if self._tls is None:
            self._outbox += data
        else:
            self._tls.send_data(data)
            self._outbox += self._tls.data_to_send()

    def _finish(self, reason: str, now: float) -> None:
        """Nothing more comes from our side than what is in the outbox."""
        self._last = True
        self._close_reason = self._close_reason or reason
        self._inbox.clear()
        if self._tls is not None:
            self._tls.close()
            self._outbox += self._tls.data_to_send()
        self._enter(_Phase.ANSWERING, now)
        if not self._outbox:
            self._answered(now)

    def _note_sent(self, now: float) -> None:
        """The caller has come back, and has sent what it was given."""
        self._in_flight = False
        if self._phase is _Phase.ANSWERING and not self._outbox:
            self._answered(now)

    def _answered(self, now: float) -> None:
        """The peer has been sent all there was."""
        self._sent, self._sending = self._sending, None
        if not self._last:
            self._enter(_Phase.IDLE, now)
            self._sent_ahead = bool(self._inbox or self._h11.trailing_data[0])
            if self._sent_ahead:  # its turn begins now
                self._arrive(now)
        elif self._peer_ended:
            self._enter(_Phase.CLOSED, now)
        else:
            self._enter(_Phase.LINGERING, now)


def peer_address(name: tuple[object, ...] | str | bytes) -> str:
    """The IP address in what a socket says of its peer; empty where there is none, as for a unix socket."""
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
    """The head of an answer as h11 writes it, once for all that are alike. Raises `LocalProtocolError`."""
    try:
        return h11.Connection(h11.SERVER).send(h11.Response(status_code=status, headers=list(headers))) or b""
    except h11.LocalProtocolError as exc:
        raise LocalProtocolError(f"not an answer of HTTP: {exc}") from exc


def _check_lines(sent: bytes) -> None:
    """Raises `BadRequest` where a line of a head or of trailers ends in LF alone, or is folded.

    RFC 9112, sections 2.2 and 5.2.
    """
    if _BARE_LF.search(sent):
        raise BadRequest(Code.BAD_REQUEST, "Bad Request", reason="a line of the request ends without CR")
    if _FOLDED.search(sent):
        raise BadRequest(Code.BAD_REQUEST, "Bad Request", reason="a folded line in the request's head or trailers")


def _not_http(exc: h11.RemoteProtocolError) -> BadRequest:
    if exc.error_status_hint == 431:
        return BadRequest(Code.HEAD_TOO_LARGE, "Request head too large")
    return BadRequest(Code.BAD_REQUEST, "Bad Request", reason=str(exc)[:200])
