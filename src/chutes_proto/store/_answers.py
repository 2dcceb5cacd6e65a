"""The rows that a database answers with: those that were asked for, each once, with values of the right types.

A MAC says that a key server wrote a row, and not that it belongs into an answer. The owner of a database can change
what "equal" means there, and have any row found by any value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from chutes_proto.errors import RowNotAuthentic
from chutes_proto.store import _rows as store
from chutes_proto.store._columns import Rows, Values, columns, mistyped
from chutes_proto.store._rows import StoreOp

NOT_ASKED: Final = (
    "it is not what was asked for: an index or an operator of the database was changed, or the search_path"
)

_ASKED_BY: Final[dict[type[StoreOp[Any]], tuple[str, ...]]] = {
    **dict.fromkeys((store.ReadAll, store.ReadLiveGenerations, store.FindLastBoot), ("hotkey", "vm")),
    store.FindLastBootFrom: ("hotkey", "peer_address"),
    store.ReadBootVolumes: ("boot_id",),
    store.ReadRevocation: ("kind", "subject"),
}
"""The columns by which operations ask for rows: those on whose reply something depends.

The rows of `ReadClaims` are only shown, and of the log's state, which `LockLog` reads, one row alone has a MAC.
"""

_ASKED_AMONG: Final[dict[type[StoreOp[Any]], tuple[str, ...]]] = {
    store.FindLastBoots: ("hotkey", "vm"),
    store.ReadGpus: ("server_id",),
}
"""The same for operations that ask for the rows of several: their values are all those of the statement."""

_LONGEST_ORIGIN: Final = 255
_PLACES: Final = {kind: {name: at for at, name in enumerate(columns(kind))} for kind in store.ROWS}


def check_asked(op: StoreOp[Any], kind: type[store.Row], values: Values, rows: Rows) -> None:
    """Compare authentic rows with the values by which an operation asked for them. Raises `RowNotAuthentic`.

    These are the first ones of its statement.
    """
    names, among = _ASKED_BY.get(type(op), ()), _ASKED_AMONG.get(type(op), ())
    if isinstance(op, store.Read):
        names = (op.by,) if op.by else kind.KEY
    places = _PLACES[kind]
    for row in rows:
        for name, value in zip(names, values, strict=False):
            if row[places[name]] != value:
                raise RowNotAuthentic(kind.TABLE, key_text(kind, row), NOT_ASKED)
    if among:
        asked = {values[at : at + len(among)] for at in range(0, len(values), len(among))}
        for row in rows:
            if tuple(row[places[name]] for name in among) not in asked:
                raise RowNotAuthentic(kind.TABLE, key_text(kind, row), NOT_ASKED)


def check_once(kind: type[store.Row], rows: Rows) -> None:
    """Require that no two rows have one key: of a table that inherits from another one there may be an older row, too.

    Raises `RowNotAuthentic`.
    """
    seen: set[Sequence[Any]] = set()
    for row in rows:
        key = row[: len(kind.KEY)]
        if key in seen:
            raise RowNotAuthentic(kind.TABLE, key_text(kind, row), "it is there twice")
        seen.add(key)


def check_types(kind: type[store.Row], rows: Rows) -> None:
    """Check the values of what no MAC authenticates: their types, and the log's state. Raises `RowNotAuthentic`."""
    for row in rows:
        wrong = [*mistyped(kind, row)]
        if kind is store.LogStateRow and not wrong:
            wrong = _wrong_in_state(row)
        if wrong:
            named = ", ".join(columns(kind)[at] for at in wrong)
            raise RowNotAuthentic(kind.TABLE, key_text(kind, row), f"no key server writes such a value of {named}")


def _wrong_in_state(row: Sequence[Any]) -> list[int]:
    """The columns of the log's state that would never end a loop over its tiles, or add a line to its public keys."""
    size, origin = (_PLACES[store.LogStateRow][name] for name in ("size", "origin"))
    is_line = row[origin].isprintable() and len(row[origin]) <= _LONGEST_ORIGIN
    return [*([size] if row[size] < 0 else []), *([] if is_line else [origin])]


def key_text(kind: type[store.Row], values: Sequence[Any]) -> str:
    """The key of a row, as faults and the head of the store name it."""
    key = values[: len(kind.KEY)]
    return "/".join(part.hex() if isinstance(part, bytes) else str(part) for part in key)
