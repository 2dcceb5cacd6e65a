"""A binding's loop without sockets and with a clock that stands still: what `ServerConnection` is talked to through."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attrs import frozen

from chutes_proto.transport.h1 import DEFAULT_LIMITS, Limits, ServerConnection
from chutes_proto.transport.tls import TlsSession
from chutes_proto.wire import json
from chutes_proto.wire.codec import error_response
from chutes_proto.wire.http import HttpRequest, HttpResponse, MalformedRequest

JSON = (("content-type", "application/json"),)


def echo(request: HttpRequest) -> HttpResponse:
    """An answer that shows which request it answers."""
    return HttpResponse(200, JSON, json.encode([request.method, request.target, len(request.body)]))


@frozen
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def answers(data: bytes) -> list[Answer]:
    """The answers in what a server sent (none of them to a HEAD)."""
    found: list[Answer] = []
    while data:
        head, blank, data = data.partition(b"\r\n\r\n")
        assert blank, head
        line, *fields = head.decode("ascii").split("\r\n")
        version, status, *_ = line.split(" ")
        assert version == "HTTP/1.1"
        headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
        size = int(headers.get("content-length", "0"))
        assert len(data) >= size
        found.append(Answer(int(status), headers, data[:size]))
        data = data[size:]
    return found


class Talk:
    """One connection; ``respond`` is the application. ``requests`` and ``sent`` are all that came of it so far."""

    def __init__(
        self,
        respond: Callable[[HttpRequest], HttpResponse] = echo,
        *,
        tls: TlsSession | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.now = 1000.0
        self.respond = respond
        self.requests: list[HttpRequest] = []
        self.sent = b""
        self.connection = ServerConnection(self.now, tls=tls, limits=limits, peer_address="192.0.2.1")

    def feed(self, *pieces: bytes) -> bytes:
        """Receive each piece and do all there is to do; what was sent on it."""
        before = len(self.sent)
        for piece in pieces:
            if self.connection.closed:
                break
            self.connection.receive_data(piece, self.now)
            self.pump()
        return self.sent[before:]

    def pump(self) -> None:
        """Go on until the connection wants to read or is closed."""
        while True:
            match self.connection.next_request(self.now):
                case HttpRequest() as request:
                    self.requests.append(request)
                    self.connection.send_response(self.respond(request), self.now)
                case MalformedRequest(refusal):
                    self.connection.send_response(error_response(refusal, "r1"), self.now)
                case None:
                    pass
            data = self.connection.data_to_send()
            if not data:
                return
            self.sent += data

    def expire(self) -> bytes:
        """Let the deadline pass; what was sent on it."""
        assert self.now < self.connection.deadline < 2000
        self.now = self.connection.deadline
        self.connection.expire(self.now)
        before = len(self.sent)
        self.pump()
        return self.sent[before:]


def outcome(pieces: Iterable[bytes], limits: Limits = DEFAULT_LIMITS) -> tuple[list[HttpRequest], bytes, bool]:
    """Requests, what was sent, and whether the connection is closed, after these pieces and the end of the bytes."""
    talk = Talk(limits=limits)
    talk.feed(*filter(None, pieces), b"")
    return talk.requests, talk.sent, talk.connection.closed
