"""What an operator does to rows, each command one transaction with its audit row."""

from __future__ import annotations

from attrs import frozen

from chutes_proto.store.rows import AuditRow, Insert, RaiseHorizon, VoidTokens
from chutes_proto.store.run import Script, Unit

ISSUED_AHEAD = 60
"""How far ahead of our clock a nonce may have been issued."""


@frozen
class StoreRestored(Unit[None]):
    """The store came back from a backup: what was spent since is unknown, so no nonce and no token of before counts."""

    now: int

    def script(self) -> Script[None]:
        """Raise the horizon, void all tokens."""
        yield from RaiseHorizon(self.now + ISSUED_AHEAD)
        yield from VoidTokens(None, self.now)
        yield from Insert(AuditRow(at=self.now, actor="operator", event="store restored", decision="done"))
