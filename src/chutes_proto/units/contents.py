"""Copying a whole store: read in one transaction, written in one, into a store that is empty.

Rules kept here:

* rows are copied as they stand: a consumed token stays consumed, an issued one valid, keys stay sealed as they are;
* nothing is added to existing rows: two stores are never merged, because both may hold a generation of the same number.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from chutes_proto.errors import StoreError
from chutes_proto.store import rows as store
from chutes_proto.store._run import Script, Unit

_ROWS_A_REPORT = 1000


@frozen
class Contents:
    """The nonce horizon and all rows: a row comes after those that it refers to, audit rows in the order written."""

    horizon: int
    rows: tuple[store.Row, ...]


@frozen
class ReadContents(Unit[Contents]):
    """Read all rows of a store."""

    def script(self) -> Script[Contents]:
        rows: list[store.Row] = []
        for kind in store.ROWS:
            rows.extend((yield from store.Scan(kind)))
        return Contents((yield from store.ReadTimes()).horizon, tuple(rows))


def _untold(_: int) -> None:
    pass


@frozen
class WriteContents(Unit[None]):
    """Fill an empty store with ``contents``, with an audit row. Raises `StoreError` for a store that has rows."""

    contents: Contents
    now: int
    reason: str
    tell: Callable[[int], object] = _untold
    """Takes how many rows are written, now and then."""

    def script(self) -> Script[None]:
        for kind in store.ROWS:
            if found := len((yield from store.Scan(kind))):
                raise StoreError(f"the store to fill has rows already ({kind.TABLE}: {found}); take an empty store")
        # Also a horizon in the future: it covers redemptions that were swept.
        horizon = (yield from store.ReadTimes()).horizon
        yield from store.SetHorizon(max(horizon, self.contents.horizon))
        for number, row in enumerate(self.contents.rows):
            if number % _ROWS_A_REPORT == 0:
                _ = self.tell(number)
            yield from store.Insert(row)
        yield from store.Insert(store.AuditRow(self.now, "operator", "store copied", "done", self.reason))
