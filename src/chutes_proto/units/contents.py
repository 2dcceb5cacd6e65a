"""Copying a whole store: read page by page, written in one transaction into a store that is empty.

Rules kept here:

* rows are copied as they stand: a consumed token stays consumed, an issued one valid, keys stay sealed as they are. The
  MACs of the rows are checked as they are read, and made again, under the key of the store that is filled;
* nothing is added to existing rows: two stores are never merged, because both may hold a generation of the same number;
* a page of rows is in memory at a time, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Final, TypeAlias

from attrs import define, evolve, frozen

from chutes_proto.errors import StoreError
from chutes_proto.store import _rows as store
from chutes_proto.store._custody import ROWS_KEY
from chutes_proto.store._run import Ask, Script, Store, Unit, untold

PAGE: Final = 1000
"""Rows of a page. SQLite takes 32,766 parameters in a statement, and a boot has the most columns."""

Page: TypeAlias = tuple[store.Row, ...]
"""Rows of one kind."""


def pages(source: Store, limit: int = PAGE) -> Iterator[Page]:
    """All rows of a store: a row comes after those that it refers to, audit rows in the order written.

    Each page is a transaction of its own, unless ``source`` is a snapshot.
    """
    found = chain.from_iterable(_Pages(source, kind, limit) for kind in store.ROWS)
    return (page for page in map(without_rows_key, found) if page)


def without_rows_key(page: Page) -> Page:
    """A page without the key of the rows' MACs, which is the store's own."""
    return tuple(row for row in page if not (isinstance(row, store.KeyringRow) and row.kind == ROWS_KEY))


@define
class _Pages:
    """The pages of one table, each of which begins after the one before."""

    source: Store
    kind: type[store.Row]
    limit: int
    after: store.Row | None = None
    beyond: int = 0
    forged: int = 0

    def __iter__(self) -> Iterator[Page]:
        return self

    def __next__(self) -> Page:
        if self.kind.KEY:
            page: Page = self.source.transact(Ask(store.ReadPage(self.kind, self.after, self.limit)))
        else:
            numbered = self.source.transact(Ask(store.ReadAudit(self.beyond, self.limit)))
            page = tuple(self._placed(row) for _, row in numbered)
            self.beyond = numbered[-1][0] if numbered else self.beyond
        if not page:
            raise StopIteration
        self.after = page[-1]
        return page

    def _placed(self, row: store.AuditRow) -> store.AuditRow:
        """The row; one that is forged with an index that no other one has, whether it was set apart or waits for it."""
        if not row.is_forged:
            return row
        self.forged += 1
        return evolve(row, idx=-self.forged)


def _count(kind: type[store.Row]) -> Script[int]:
    """The number of rows that `pages` has of a table."""
    if kind is store.KeyringRow:
        return len(without_rows_key((yield from store.Scan(store.KeyringRow))))
    return (yield from store.CountRows(kind))


@frozen
class CountAll(Unit[int]):
    """Count all rows of a store that `pages` gives."""

    def script(self) -> Script[int]:
        total = 0
        for kind in store.ROWS:
            total += yield from _count(kind)
        return total


@frozen
class Fill(Unit[None]):
    """Fill an empty store with ``pages``, with an audit row. Raises `StoreError` for a store that has rows.

    ``horizon`` is the nonce horizon of the store that they are from. ``pages`` is called again when the transaction is
    run again. ``tell`` takes how many rows are written, and of how many, ``total``, after each page.
    """

    horizon: int
    pages: Callable[[], Iterable[Page]]
    now: int
    reason: str
    total: int = 0
    tell: Callable[[int, int], object] = untold

    def script(self) -> Script[None]:
        for kind in store.ROWS:
            if found := (yield from _count(kind)):
                raise StoreError(f"the store to fill has rows already ({kind.TABLE}: {found}); take an empty store")
        # Also a horizon in the future: it covers redemptions that were swept.
        horizon = (yield from store.ReadTimes()).horizon
        yield from store.SetHorizon(max(horizon, self.horizon))
        written = 0
        for page in self.pages():
            yield from store.InsertAll(page)
            written += len(page)
            _ = self.tell(written, self.total)
        yield from store.Insert(store.AuditRow(self.now, "operator", "store copied", "done", self.reason))
