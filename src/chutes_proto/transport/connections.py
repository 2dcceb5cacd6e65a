"""The connections of one server: which one ends when there is no room for another.

Rules kept here:

* a connection whose request is being worked on, or answered, is never ended for another's sake;
* of those that make the server wait, one ends at a time: of the address with most of them, so that one address cannot
  keep all others out; there one that never made a request, before one that did; and of these the oldest;
* an IPv6 address counts by its /64, which is one host's; peers of a unix socket are trusted, and never ended.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from chutes_proto.wire.http import address_prefix

if TYPE_CHECKING:
    from chutes_proto.transport.h1 import ServerConnection


class Connections:
    """Those of one server, of which there may be ``size``; where that many are open, one ends before the next comes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._open: dict[ServerConnection, None] = {}  # in the order of their arrival

    def make_room(self, connection: ServerConnection) -> tuple[ServerConnection, ...]:
        """Told by a connection before each of its waits: those that are to end now (at most one, and never itself)."""
        self._open[connection] = None
        if len(self._open) < self._size:
            return ()
        waiting = (other for other in self._open if other.waits_for_peer and other is not connection)
        others = [other for other in waiting if other.peer_address]
        if not others:
            return ()
        crowd = Counter(address_prefix(other.peer_address) for other in others)
        # Of equal ones the first, which is the oldest.
        ended = min(others, key=lambda other: (-crowd[address_prefix(other.peer_address)], other.has_asked))
        ended.abandon()
        self.remove(ended)
        return (ended,)

    def remove(self, connection: ServerConnection) -> None:
        """It has ended."""
        _ = self._open.pop(connection, None)
