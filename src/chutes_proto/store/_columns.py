"""Rows as the values of their columns, and back.

The columns are the fields of a row class in their order; a `Vm` and a `Pin` are two columns each. SQLite has no
booleans, and takes a value of any type in any column (`mistyped`).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, Final, Literal, TypeAlias, Union, get_args, get_origin

import attrs
from attrs import frozen

from chutes_proto.store import _rows as store

Values: TypeAlias = tuple[Any, ...]
"""The values of one row, or of a statement's parameters, in order."""
Rows: TypeAlias = Sequence[Sequence[Any]]
"""The result of a statement."""


def _type_of(attribute: attrs.Attribute[Any]) -> Any:
    """The type of a field, without its ``None``."""
    kind: Any = attribute.type
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (member for member in get_args(kind) if member is not types.NoneType)
    return kind


_PAIRS: Final[dict[Any, tuple[str, str]]] = {store.Vm: ("hotkey", "vm"), store.Pin: ("platform_kind", "platform_id")}
"""The columns of each type that is two of them."""

PARTS: Final[dict[Any, Callable[[Any], Values]]] = {
    store.Vm: attrgetter("hotkey", "name"),
    store.Pin: attrgetter("kind", "value"),
}
"""The values of the same."""


def _types_of(row: type[Any]) -> tuple[tuple[type, bool, int], ...]:
    """The type of each column, whether it may be NULL, and the index of the column that is NULL with it."""
    found: list[tuple[type, bool, int]] = []
    for field in attrs.fields(row):
        of = _type_of(field)
        parts = attrs.fields(of) if of in _PAIRS else (field,)
        pair = range(len(found), len(found) + len(parts))
        for part, other in zip(parts, reversed(pair), strict=True):
            kind = str if get_origin(_type_of(part)) is Literal else _type_of(part)
            found.append((kind, types.NoneType in get_args(field.type), other))
    return tuple(found)


@frozen
class _Layout:
    """The columns of a row's fields: one for each, or a pair."""

    columns: tuple[str, ...]
    fields: Callable[[store.Row], Values]
    pairs: tuple[tuple[int, Any], ...]
    """Index and type of each field that is a pair."""
    flags: tuple[int, ...]
    """The indexes of the fields that are booleans."""
    flag_columns: tuple[int, ...]
    """The indexes of their columns."""
    types: tuple[tuple[type, bool, int], ...]
    """As `_types_of` returns them."""

    @classmethod
    def of(cls, kind: type[Any]) -> _Layout:
        fields = [(field.name, _type_of(field)) for field in attrs.fields(kind)]
        columns = [(column, of) for name, of in fields for column in _PAIRS.get(of, (name,))]
        return cls(
            columns=tuple(column for column, _ in columns),
            fields=attrgetter(*(name for name, _ in fields)),
            pairs=tuple((at, of) for at, (_, of) in enumerate(fields) if of in _PAIRS),
            flags=tuple(at for at, (_, of) in enumerate(fields) if of is bool),
            flag_columns=tuple(at for at, (_, of) in enumerate(columns) if of is bool),
            types=_types_of(kind),
        )


_LAYOUTS: Final = {kind: _Layout.of(kind) for kind in store.ROWS}


def columns(kind: type[store.Row]) -> tuple[str, ...]:
    """The names of a row's columns, in the order of its values."""
    return _LAYOUTS[kind].columns


def flags(kind: type[store.Row]) -> tuple[int, ...]:
    """The indexes of a row's boolean columns."""
    return _LAYOUTS[kind].flag_columns


def mistyped(kind: type[store.Row], values: Sequence[Any]) -> Mapping[int, object]:
    """For each column of a row that has a value of another type, its index and an empty value of its type.

    SQLite takes any value in any column.
    """
    layout = _LAYOUTS[kind]
    return _mistyped(layout, tuple(map(type, values[: len(layout.columns)])))


@lru_cache(1024)
def _mistyped(layout: _Layout, found: Sequence[type]) -> Mapping[int, object]:
    wrong: dict[int, object] = {}
    for at, (kind, (of, may_be_null, other)) in enumerate(zip(found, layout.types, strict=True)):
        if kind is types.NoneType:
            is_right = may_be_null and found[other] is kind
        else:
            is_right = kind is of or (of is bool and kind is int)
        if not is_right:
            wrong[at] = of()
    return wrong


def encode(row: store.Row) -> Values:
    """The values of a row, one for each column."""
    layout = _LAYOUTS[type(row)]
    values = list(layout.fields(row))
    for at, of in reversed(layout.pairs):
        whole = values[at]
        values[at : at + 1] = (None, None) if whole is None else PARTS[of](whole)
    return tuple(values)


def decode_rows(kind: type[Any], rows: Rows) -> tuple[Any, ...]:
    """The rows of ``kind`` that have these values; drivers without a boolean type give 0 and 1. A MAC is left out."""
    layout = _LAYOUTS[kind]
    width = len(layout.columns)
    made: list[Any] = []
    for values in rows:
        members = list(values[:width])
        for at, of in layout.pairs:
            second = members.pop(at + 1)
            if members[at] is not None or second is not None:  # one alone is an edit, and must show in an entry
                members[at] = of(members[at], second)
        for at in layout.flags:
            members[at] = bool(members[at])
        made.append(kind(*members))
    return tuple(made)
