"""The connections of one server: the next step of each, and which one ends when all are in use and another comes.

Rules kept here:

* a request is answered before anything is sent, and all is sent before anything is received;
* a connection whose request is being handled is never ended for another's sake;
* of those that make the server wait, one ends at a time: the one whose phase began longest ago. A client that goes on
  (handshake, request, taking the answer) is younger than a peer that does not;
* when the server ends, only connections with a pending request or answer stay, and of these none whose peer is slow;
* when it ends and another process serves its listeners, each connection that was accepted may still send one request:
  deployed clients send some only once, and nobody else has their connections;
* an address with more than its share of all connections loses its own first, so that none keeps all others out. Below
  that share addresses do not count: many VMs may come from one, and an attacker from many;
* peers that do not take their answers have `UNSENT` bytes of memory in all: beyond that the oldest long answer ends;
* an IPv6 address counts by its /64, which is one host's; peers of a unix socket are trusted, and never ended.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Final

from attrs import frozen

from chutes_proto.transport.h1 import FIRST_CALL_SECONDS, ServerConnection
from chutes_proto.wire.http import HttpRequest, HttpResponse, MalformedRequest, address_prefix

SHARE: Final = 8
"""The divisor of one address's share: it may have ``size // SHARE`` connections, at least one, while others wait."""

LONG: Final = 64 * 1024
"""An answer of more bytes is long. None of a VM's boot is: these are a few kilobytes."""

UNSENT: Final = 64 * 1024 * 1024
"""The most bytes of long answers that wait for their peers to take them."""


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

_MAX_LEFT: Final = 16


class _Queue:
    """Connections, of which the one whose phase began longest ago is found without a look at each.

    That time moves to a later one only, so it is looked at when a connection comes first by the time that is known. One
    at work will wait from now on at the earliest, so it goes behind all that wait already and is not met each time.
    """

    def __init__(self) -> None:
        self.members: set[ServerConnection] = set()
        self._heap: list[tuple[float, int, ServerConnection]] = []
        """With the known time, and a number that is larger for later ones; those that have left stay for a while."""

    def add(self, connection: ServerConnection, number: int) -> None:
        self.members.add(connection)
        heappush(self._heap, (connection.since, number, connection))

    def remove(self, connection: ServerConnection) -> None:
        self.members.remove(connection)
        if len(self._heap) > 2 * len(self.members) + _MAX_LEFT:
            self._heap = [entry for entry in self._heap if entry[2] in self.members]
            heapify(self._heap)

    def first(self, besides: ServerConnection) -> ServerConnection | None:
        """The one that makes the server wait longest."""
        at_work: list[tuple[float, int, ServerConnection]] = []
        found: ServerConnection | None = None
        while found is None and self._heap:
            since, number, first = self._heap[0]
            if first in self.members and since < first.since:
                _ = heapreplace(self._heap, (first.since, number, first))
            elif first in self.members and first.waits_for_peer and first is not besides:
                found = first
            else:
                at_work += [(max(since, besides.since), number, first)] if first in self.members else []
                _ = heappop(self._heap)
        for entry in at_work:
            heappush(self._heap, entry)
        return found


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
        self._open: dict[ServerConnection, bytes] = {}  # and its address's prefix
        self._number = count()
        self._strangers = _Queue()
        self._of_address: dict[bytes, _Queue] = {}
        self._crowds: dict[bytes, _Queue] = {}  # of these, those with more than their share
        self._unsent: dict[ServerConnection, int] = {}
        """Those that take a long answer, the oldest first, and its bytes."""
        self._finishing = False
        self._heard_until: float | None = None

    def __len__(self) -> int:
        return len(self._open)

    def next_step(self, connection: ServerConnection, now: float) -> Answer | Send | Receive | None:
        """The next step of a connection; None: close it. After its deadline, call `expire` first."""
        _ = self._unsent.pop(connection, None)  # it took all that it was given
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
        if len(data) > LONG and self._open[connection]:
            self._hold(connection, len(data))
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
            self._add(connection)
        if len(self._open) < self._size:
            return ()
        others = {queue: len(queue.members) - (connection in queue.members) for queue in self._crowds.values()}
        crowds = [queue for queue in sorted(others, key=lambda each: -others[each]) if others[queue] > self._share]
        found = (queue.first(besides=connection) for queue in (*crowds, self._strangers))
        ended = next((each for each in found if each is not None), None)
        if ended is None:
            return ()
        ended.abandon()
        self.remove(ended)
        return (ended,)

    def _add(self, connection: ServerConnection) -> None:
        prefix = self._open[connection] = address_prefix(connection.peer_address)
        if prefix:
            number = next(self._number)
            self._strangers.add(connection, number)
            queue = self._of_address.setdefault(prefix, _Queue())
            queue.add(connection, number)
            if len(queue.members) > self._share:
                self._crowds[prefix] = queue

    def _hold(self, connection: ServerConnection, size: int) -> None:
        """Note a long answer that is to be taken, and end the oldest others while all have more than `UNSENT` bytes."""
        self._unsent[connection] = size
        while len(self._unsent) > 1 and sum(self._unsent.values()) > UNSENT:
            oldest = next(iter(self._unsent))
            oldest.abandon()
            self.remove(oldest)
            self._wake(oldest)

    def remove(self, connection: ServerConnection) -> None:
        """Forget a connection that has ended."""
        _ = self._unsent.pop(connection, None)
        if prefix := self._open.pop(connection, b""):
            self._strangers.remove(connection)
            queue = self._of_address[prefix]
            queue.remove(connection)
            if len(queue.members) <= self._share:
                _ = self._crowds.pop(prefix, None)
            if not queue.members:
                del self._of_address[prefix]
