"""All that is in a store, read in one transaction and written in one, into a store that is empty.

Rules kept here:

* rows are copied as they stand: what was spent is spent, what was issued counts, keys stay sealed as they are;
* nothing is added to what is there already: two stores do not become one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from chutes_proto.errors import StoreError
from chutes_proto.store._run import Unit
from chutes_proto.store.rows import (
    ROWS,
    AuditRow,
    Claim,
    GpuRow,
    Insert,
    NonceRow,
    Put,
    RaiseHorizon,
    ReadTimes,
    RedeemNonce,
    Row,
    Scan,
    ServerRow,
    VmRow,
    VolumeRow,
)

if TYPE_CHECKING:
    from chutes_proto.store._run import Script


@frozen
class Contents:
    """The rows, those that others refer to before these, audit rows as they were written; and the nonces' horizon."""

    horizon: int
    rows: tuple[Row, ...]


@frozen
class ReadContents(Unit[Contents]):
    """All there is."""

    def script(self) -> Script[Contents]:
        """Read it."""
        rows: list[Row] = []
        for kind in ROWS:
            rows.extend((yield from Scan(kind)))
        return Contents((yield from ReadTimes()).horizon, tuple(rows))


@frozen
class WriteContents(Unit[None]):
    """Fill an empty store with ``contents``, and say so in an audit row. Raises `StoreError` for one that is not."""

    contents: Contents
    now: int
    reason: str

    def script(self) -> Script[None]:
        """See that there is nothing, and write."""
        for kind in ROWS:
            if found := len((yield from Scan(kind))):
                raise StoreError(f"the store to fill has rows already ({kind.TABLE} {found}); take an empty one")
        yield from RaiseHorizon(self.contents.horizon)  # also one in the future: it covers redemptions that were swept
        for row in self.contents.rows:
            if not (yield from _write(row)):
                raise StoreError(f"a {row.TABLE} row contradicts another one; nothing was copied")
        yield from Insert(AuditRow(self.now, "operator", "store copied", "done", self.reason))


def _write(row: Row) -> Script[bool]:
    """Whether the row is there now."""
    match row:
        case NonceRow():
            return (yield from RedeemNonce(row))
        case ServerRow() | GpuRow():
            return (yield from Claim(row))
        case VmRow() | VolumeRow():
            yield from Put(row)
        case _:
            yield from Insert(row)
    return True
