"""Plain data (what JSON and TOML say) to attrs values, strictly: one way for messages and for configuration.

Rules kept here:

* nothing is coerced: a number is no string, a string no list, ``true`` no number;
* every problem is found, up to `MOST`, each with the path to it; none repeats the value;
* only attrs is needed: a boot agent has this on its way from the kernel to its first request.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeAlias, TypeVar, Union, cast, get_args, get_origin

import attrs
from attrs import frozen

from chutes_proto.errors import ConfigurationError

T = TypeVar("T")

Hook: TypeAlias = Callable[[object], Any]
"""Makes one kind of value of plain data. Raises `ProblemsError`."""

MOST: Final = 100
"""How many problems are told: a small body could have a great many."""


@frozen
class Problem:
    """One thing that is wrong: where (names and indexes), the kind in a stable word, and the text."""

    path: tuple[int | str, ...]
    kind: str
    msg: str

    def __str__(self) -> str:
        return ": ".join(filter(None, [".".join(map(str, self.path)), self.msg]))


class ProblemsError(ValueError):
    """All that is wrong with a value."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)[:MOST]
        super().__init__("; ".join(map(str, self.problems)))

    def at(self, place: int | str) -> list[Problem]:
        """The same problems of what this value is a part of."""
        return [attrs.evolve(problem, path=(place, *problem.path)) for problem in self.problems]


class MismatchError(ProblemsError):
    """A value is not what it should be. ``kind`` is a stable word."""

    def __init__(self, kind: str, msg: str) -> None:
        super().__init__([Problem((), kind, msg)])


class Structurer:
    """Makes attrs values of plain data. ``hooks``: how types of the caller's are made, beside the usual ones.

    A type may be optional, a ``Literal`` of words, a ``tuple[…, ...]``, or a ``Mapping[str, …]``, in whose problems'
    paths the place stands for the name, which is input. With ``own_file`` the input is its author's own file:
    unknown names are problems, and names are told.
    """

    def __init__(self, hooks: Sequence[tuple[Any, Hook]] = (), *, own_file: bool = False) -> None:
        self._hooks: dict[Any, Hook] = dict([*_USUAL, *hooks])
        self._own_file = own_file

    def structure(self, value: object, kind: type[T]) -> T:
        """``value`` as a ``kind``. Raises `ProblemsError`."""
        made: T = self._hook(kind)(value)
        return made

    def from_toml(self, data: bytes, kind: type[T], check: Callable[[T], Iterable[str]]) -> T:
        """The ``kind`` that a TOML file says.

        Raises `ConfigurationError`, which lists all that is wrong with its form, or all that ``check`` finds.
        """
        try:
            content = tomllib.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as exc:
            raise ConfigurationError(f"not TOML: {exc}") from None
        try:
            made = self.structure(content, kind)
        except ProblemsError as exc:
            raise ConfigurationError(str(exc)) from None
        if problems := "; ".join(check(made)):
            raise ConfigurationError(problems)
        return made

    def _hook(self, kind: Any) -> Hook:
        if kind not in self._hooks:
            self._hooks[kind] = self._made_hook(kind)
        return self._hooks[kind]

    def _made_hook(self, kind: Any) -> Hook:
        if attrs.has(kind):
            return self._table(kind)
        match get_origin(kind), get_args(kind):
            case (origin, (one, none)) if origin in (Union, UnionType) and none is NoneType:
                hook = self._hook(one)
                return lambda value: None if value is None else hook(value)
            case (origin, words) if origin is Literal:
                return literal(*words)
            case (origin, (item, end)) if origin is tuple and end is ...:
                return list_of(self._hook(item))
            case (origin, (key, item)) if origin is Mapping and key is str:
                return _mapping_of(self._hook(item), tell_names=self._own_file)
            case _:
                raise TypeError(f"nothing makes a {kind}")

    def _table(self, kind: type[Any]) -> Hook:
        fields = attrs.fields(attrs.resolve_types(kind))
        known = {field.name for field in fields}

        def hook(value: object) -> Any:
            table = _object(value)
            made: dict[str, Any] = {}
            problems: list[Problem] = []
            for field in fields:
                try:
                    if field.name in table:
                        made[field.alias] = self._hook(field.type)(table[field.name])
                    elif field.default is attrs.NOTHING:
                        raise MismatchError("missing", "Field required")
                except ProblemsError as exc:
                    problems += exc.at(field.name)
            if self._own_file:
                problems += [Problem((name,), "extra_forbidden", "Unknown key") for name in sorted({*table} - known)]
            if problems:
                raise ProblemsError(problems)
            return kind(**made)

        return hook


def exactly(kind: type[T], error: str, msg: str) -> Callable[[object], T]:
    """A hook for values of just this type."""

    def hook(value: object) -> T:
        if type(value) is not kind:
            raise MismatchError(error, msg)
        return value

    return hook


def list_of(item: Callable[[object], T]) -> Callable[[object], tuple[T, ...]]:
    """A hook that makes a tuple of a list."""

    def hook(value: object) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise MismatchError("list_type", "Input should be a valid list")
        return tuple(_each(enumerate(cast("list[object]", value)), item))

    return hook


def literal(*values: str) -> Callable[[object], str]:
    """A hook for one of a few words."""
    choices = " or ".join(f'"{value}"' for value in values)

    def hook(value: object) -> str:
        if not isinstance(value, str) or value not in values:
            raise MismatchError("literal_error", f"Input should be {choices}")
        return value

    return hook


def number(value: object) -> float:
    """A finite number: neither JSON nor TOML needs to tell 1 from 1.0."""
    try:
        if type(value) in (int, float) and isfinite(made := float(cast("float", value))):
            return made
    except OverflowError:
        pass
    raise MismatchError("float_type", "Input should be a valid number")


string = exactly(str, "string_type", "Input should be a valid string")
integer = exactly(int, "int_type", "Input should be a valid integer")
boolean = exactly(bool, "bool_type", "Input should be a valid boolean")
_object: Callable[[object], dict[str, object]] = exactly(dict, "dict_type", "Input should be a valid dictionary")

_USUAL: tuple[tuple[Any, Hook], ...] = (
    (str, string),
    (int, integer),
    (bool, boolean),
    (float, number),
    (Mapping[str, object], _object),
)


def _mapping_of(item: Hook, *, tell_names: bool) -> Hook:
    def hook(value: object) -> dict[str, Any]:
        table = _object(value)
        places = table if tell_names else range(len(table))
        return dict(zip(table, _each(zip(places, table.values(), strict=True), item), strict=True))

    return hook


def _each(members: Iterable[tuple[int | str, object]], item: Callable[[object], T]) -> list[T]:
    """What ``item`` makes of each at its place."""
    made: list[T] = []
    problems: list[Problem] = []
    for place, member in members:
        try:
            made.append(item(member))
        except ProblemsError as exc:
            problems += exc.at(place)
            if len(problems) >= MOST:
                break
    if problems:
        raise ProblemsError(problems)
    return made
