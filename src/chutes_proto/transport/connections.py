"""The connections of one server: which one ends when there is no room for another.

Rules kept here:

* a connection whose request is being worked on is never ended for another's sake;
* of those that make the server wait, one ends at a time: of the address with most of them, so that one address cannot
  keep all others out; there one that never made a request, before one that did, and last one that does not take its
  answer; and of these the oldest;
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
        self._open: dict[ServerConnection, bytes] = {}  # and whence; in the order of their arrival

    def make_room(self, connection: ServerConnection) -> tuple[ServerConnection, ...]:
        """Told by a connection before each of its waits: those that are to end now (at most one, and never itself)."""
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
        crowd = Counter(others.values())
        # Of equal ones the first, which is the oldest.
        ended = min(others, key=lambda other: (-crowd[others[other]], other.at_stake))
        ended.abandon()
        self.remove(ended)
        return (ended,)

    def remove(self, connection: ServerConnection) -> None:
        """It has ended."""
        _ = self._open.pop(connection, None)
