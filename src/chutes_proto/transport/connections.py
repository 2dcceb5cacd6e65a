"""The connections of one server: what each does next, and which one ends when there is no room for another.

Rules kept here:

* a request is answered before anything is sent, and all is sent before anything is received;
* a connection whose request is being worked on is never ended for another's sake;
* of those that make the server wait, one ends at a time: the one that came to where it is longest ago. Who does what a
  client does is younger than who does not, whatever that is: a handshake, a request, to take an answer;
* at the server's end only those stay that have a request or its answer under way, and of these none whose peer is slow;
* an address with more than its share of all ends its own first, so that none keeps all others out. Who has no more is
  not looked at by address: many VMs may come from one, and an attacker from many;
* an IPv6 address counts by its /64, which is one host's; peers of a unix socket are trusted, and never ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from attrs import frozen

from chutes_proto.wire.http import HttpRequest, HttpResponse, MalformedRequest, address_prefix

if TYPE_CHECKING:
    from chutes_proto.transport.h1 import ServerConnection


SHARE: Final = 8
"""One in so many of all is what one address may have while others want more; one is always its."""


@frozen
class Answer:
    """Give the application's answer to `send_response`; where the request was sent ahead, others have a turn first."""

    request: HttpRequest | MalformedRequest
    sent_ahead: bool


@frozen
class Send:
    """Send all of this, by the connection's deadline."""

    data: bytes


@frozen
class Sent:
    """All of this answer was sent: tell the application."""

    response: HttpResponse


@frozen
class Receive:
    """Give what the peer sends next to `receive_data`, by the connection's deadline."""


_RECEIVE: Final = Receive()


class Connections:
    """Those of one server, of which there may be ``size``; where that many are open, one ends before the next comes.

    ``wake`` is told of each connection whose deadline was brought forward by something other than its own steps.
    """

    def __init__(self, size: int, wake: Callable[[ServerConnection], None]) -> None:
        self._size = size
        self._wake = wake
        self._share = max(1, size // SHARE)
        self._open: dict[ServerConnection, bytes] = {}  # and whence; in the order of their arrival
        self._finishing = False

    def next_step(self, connection: ServerConnection, now: float) -> Answer | Send | Sent | Receive | None:
        """What to do next for a connection; None: close it. After its deadline, `expire` comes first."""
        sent = connection.sent_response(now)
        if sent is not None:
            return Sent(sent)
        if self._finishing:
            connection.finish(now)
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
        """Let all of them end with their next answer."""
        for connection in self._open:
            connection.drain(now)
            self._wake(connection)

    def finish(self, now: float) -> None:
        """Let all of them end, those that are yet to come too; each first answers the request that it has."""
        self._finishing = True
        for connection in self._open:
            connection.finish(now)
            self._wake(connection)

    def make_room(self, connection: ServerConnection) -> tuple[ServerConnection, ...]:
        """Before each wait of a connection: those that end now for its sake (at most one, and never itself)."""
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
        ended.abandon("others needed its place")
        self.remove(ended)
        return (ended,)

    def remove(self, connection: ServerConnection) -> None:
        """It has ended."""
        _ = self._open.pop(connection, None)
