"""The connections of one server: the next step of each, and which one ends when all are in use and another comes.

Rules kept here:

* a request is answered before anything is sent, and all is sent before anything is received;
* a connection whose request is being handled is never ended for another's sake;
* of those that make the server wait, one ends at a time: the one whose phase began longest ago. A client that goes on
  (handshake, request, taking the answer) is younger than a peer that does not;
* when the server ends, only connections with a pending request or answer stay, and of these none whose peer is slow;
* when it ends because another process took its listeners over, each connection that was accepted may still send one
  request: deployed clients send some only once, and nobody else has their connections;
* an address with more than its share of all connections loses its own first, so that none keeps all others out. Below
  that share addresses do not count: many VMs may come from one, and an attacker from many;
* an IPv6 address counts by its /64, which is one host's; peers of a unix socket are trusted, and never ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from attrs import frozen

from chutes_proto.transport.h1 import FIRST_CALL_SECONDS, ServerConnection
from chutes_proto.wire.http import HttpRequest, HttpResponse, MalformedRequest, address_prefix

SHARE: Final = 8
"""The divisor of one address's share: it may have ``size // SHARE`` connections, at least one, while others wait."""


@frozen
class Answer:
    """Give the application's answer to `send_response`; after other connections if the request was ``sent_ahead``."""

    request: HttpRequest | MalformedRequest
    sent_ahead: bool


@frozen
class Send:
    """Send all of this, by the connection's deadline."""

    data: bytes


@frozen
class Receive:
    """Give what the peer sends next to `receive_data`, by the connection's deadline."""


_RECEIVE: Final = Receive()


class Connections:
    """The connections of one server, at most ``size``: one ends before another one comes.

    ``wake`` is called with each connection whose deadline another connection or the server's end has brought forward,
    ``sent`` with each answer once its last byte was sent.
    """

    def __init__(
        self,
        size: int,
        wake: Callable[[ServerConnection], None],
        sent: Callable[[HttpResponse], object],
    ) -> None:
        self._size = size
        self._wake = wake
        self._sent = sent
        self._share = max(1, size // SHARE)
        self._open: dict[ServerConnection, bytes] = {}  # and its address's prefix; in the order of arrival
        self._finishing = False
        self._heard_until: float | None = None

    def __len__(self) -> int:
        return len(self._open)

    def next_step(self, connection: ServerConnection, now: float) -> Answer | Send | Receive | None:
        """The next step of a connection; None: close it. After its deadline, call `expire` first."""
        sent = connection.sent_response(now)
        if sent is not None:
            _ = self._sent(sent)
        if self._finishing:
            connection.finish(now)
        elif self._heard_until is not None:
            connection.hand_over(now, self._heard_until)
        request = connection.next_request(now)
        if request is not None:
            return Answer(request, connection.sent_ahead)
        if connection.closed:
            return None
        for ended in self.make_room(connection):
            self._wake(ended)
        data = connection.data_to_send()
        return Send(data) if data else _RECEIVE

    def drain(self, now: float) -> None:
        """Let all connections end with their next answer."""
        for connection in self._open:
            connection.drain(now)
            self._wake(connection)

    def hand_over(self, now: float) -> None:
        """Let all connections end with their next answer, those too that were accepted and not yet registered."""
        self._heard_until = now + FIRST_CALL_SECONDS
        for connection in self._open:
            connection.hand_over(now, self._heard_until)
            self._wake(connection)

    def finish(self, now: float) -> None:
        """Let all connections end, and those that are accepted later; each first answers the request that it has."""
        self._finishing = True
        for connection in self._open:
            connection.finish(now)
            self._wake(connection)

    def make_room(self, connection: ServerConnection) -> tuple[ServerConnection, ...]:
        """Register a connection before it waits; returns those that end for its sake (at most one, never itself)."""
        if connection not in self._open:
            self._open[connection] = address_prefix(connection.peer_address)
        if len(self._open) < self._size:
            return ()
        others = {
            other: prefix
            for other, prefix in self._open.items()
            if prefix and other.waits_for_peer and other is not connection
        }
        if not others:
            return ()
        ((most, held),) = Counter(others.values()).most_common(1)
        candidates = [other for other, prefix in others.items() if prefix == most or held <= self._share]
        ended = min(candidates, key=lambda other: other.since)
        ended.abandon("all connections were in use and another one came; limits.connections bounds them")
        self.remove(ended)
        return (ended,)

    def remove(self, connection: ServerConnection) -> None:
        """Forget a connection that has ended."""
        _ = self._open.pop(connection, None)
