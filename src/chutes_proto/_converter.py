"""Convert plain data (as JSON and TOML have it) to attrs values and back: the project's one cattrs converter.

Rules kept here:

* nothing is coerced: a number is not a string, a string is not a list, ``true`` is not a number;
* a type that no rule here makes is refused when it is first asked for, never guessed;
* every problem is found, up to `MOST`, each with its path; none repeats a value;
* cattrs is imported at the first conversion: importing the verifier or the agent's settings does not cost that.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from math import isfinite
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar, Union, cast, get_args, get_origin

import attrs
from attrs import frozen

if TYPE_CHECKING:
    from cattrs import ClassValidationError, Converter

T = TypeVar("T")

Hook: TypeAlias = Callable[[object, Any], Any]
"""Makes a value of the type (second argument) from plain data. Raises `ProblemsError`."""

_LONGEST_SHOWN: Final = 128
_DEEPEST_KEY: Final = 32
_PART: Final = r"""(?:[A-Za-z0-9_-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')"""
_DEEP_KEY: Final = re.compile(
    rf"(?:^[ \t]*+\[{{0,2}}|[{{,])[ \t]*+{_PART}(?:[ \t]*+\.[ \t]*+{_PART}){{{_DEEPEST_KEY}}}", re.MULTILINE
)
"""A dotted key with more parts, where a key can be: tomllib takes a time with the square of their number."""
MOST: Final = 100
"""The most problems that are reported: a small body could have a great many."""


@frozen
class Problem:
    """One problem: its path (names and indexes), its kind in a stable word, and the text."""

    path: tuple[int | str, ...]
    kind: str
    msg: str

    def __str__(self) -> str:
        return ": ".join(filter(None, [".".join(map(_shown, self.path)), self.msg]))


def quoted(text: str) -> str:
    """A text of an input as an error shows it. It may be megabytes, or add a line."""
    return repr(text[:_LONGEST_SHOWN])


def _shown(place: int | str) -> str:
    """A part of a path."""
    if isinstance(place, int) or (len(place) <= _LONGEST_SHOWN and place.isprintable()):
        return str(place)
    return quoted(place)


class ProblemsError(ValueError):
    """A value with problems, all of which ``problems`` lists."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)[:MOST]
        super().__init__("; ".join(map(str, self.problems)))

    def at(self, place: int | str) -> list[Problem]:
        """The same problems, with ``place`` in front of their paths."""
        return [attrs.evolve(problem, path=(place, *problem.path)) for problem in self.problems]


class MismatchError(ProblemsError):
    """A value has one problem. ``kind`` is a stable word."""

    def __init__(self, kind: str, msg: str) -> None:
        super().__init__([Problem((), kind, msg)])


class StrictConverter:
    """Converts plain data to attrs values, strictly, and back.

    Args:
        hooks: how types of the caller's own are made, beside the usual ones.
        own_file: the input is its author's own file: unknown names are problems, and problems tell names and speak of
            tables and arrays, as TOML does. Otherwise unknown names are ignored, and a mapping's names, which are
            input, appear in paths as their position; deployed peers know the texts.
        refusal: the error that a class raises for fields that contradict each other; its text begins with the field's
            name and ``: ``.
        names: how fields are called in plain data, where not by their own name.
        plain: how types of the caller's own become plain data.
        omit_none: leave out of plain data what is None by default.

    A field's type may be optional, a ``Literal`` of words, ``tuple[…, ...]``, ``Mapping[str, …]``, or an attrs class.
    """

    def __init__(
        self,
        hooks: Mapping[Any, Hook] | None = None,
        *,
        own_file: bool = False,
        refusal: type[Exception] = ProblemsError,
        names: Mapping[str, str] | None = None,
        plain: Mapping[type[Any], Callable[[Any], object]] | None = None,
        omit_none: bool = False,
    ) -> None:
        self._object = _file_table if own_file else _object
        self._list = file_array if own_file else valid_list
        whole: dict[Any, Hook] = {Mapping[str, object]: lambda value, _: self._object(value)}
        self._hooks: dict[Any, Hook] = {**_USUAL, **whole, **(hooks or {})}
        self._own_file = own_file
        self._refusal = refusal
        self._names = names or {}
        self._plain = plain or {}
        self._omit_none = omit_none

    def structure(self, value: object, kind: type[T]) -> T:
        """Convert plain data to a ``kind``. Raises `ProblemsError`."""
        try:
            return self._fast.structure(value, kind)
        except self._failures:
            return self._detailed.structure(value, kind)

    def unstructure(self, value: object) -> Any:
        """Convert ``value`` to plain data."""
        return self._fast.unstructure(value)

    def from_toml(self, data: bytes, kind: type[T], check: Callable[[T], Iterable[str]]) -> T:
        """Read a ``kind`` from a TOML file.

        Raises `ProblemsError` with all problems of its form, or else with all that ``check`` finds.
        """
        made = self.structure(load_toml(data), kind)
        if problems := [Problem((), "value_error", text) for text in check(made)]:
            raise ProblemsError(problems)
        return made

    @cached_property
    def _failures(self) -> tuple[type[Exception], ...]:
        from cattrs import ForbiddenExtraKeysError

        return (ProblemsError, KeyError, ForbiddenExtraKeysError, self._refusal)

    @cached_property
    def _fast(self) -> Converter:
        """Stops at the first problem."""
        return self._made(detailed=False)

    @cached_property
    def _detailed(self) -> Converter:
        """Accepts exactly what `_fast` does, and raises `ProblemsError` with all problems."""
        return self._made(detailed=True)

    def _made(self, *, detailed: bool) -> Converter:
        from cattrs import Converter
        from cattrs.gen import make_dict_unstructure_fn, override

        converter = Converter(detailed_validation=detailed, forbid_extra_keys=self._own_file)

        def structure_hook(kind: Any) -> Hook:
            return self._hook(kind, converter)

        _ = converter.register_structure_hook_factory(lambda _: True, structure_hook)
        for kind in (str, int, bool, float, bytes):  # cattrs would call the type
            converter.register_structure_hook(kind, self._hooks.get(kind, _refuse))
        for kind, plain in self._plain.items():
            converter.register_unstructure_hook(kind, plain)
        if self._omit_none:

            def unstructure_table(kind: type[Any]) -> Callable[[Any], dict[str, Any]]:
                fields = attrs.fields(attrs.resolve_types(kind))
                omitted = {field.name: override(omit_if_default=True) for field in fields if field.default is None}
                return make_dict_unstructure_fn(kind, converter, _cattrs_use_linecache=False, **omitted)  # type: ignore[arg-type]

            _ = converter.register_unstructure_hook_factory(attrs.has, unstructure_table)
        return converter

    def _hook(self, kind: Any, converter: Converter) -> Hook:
        if kind in self._hooks:
            return self._hooks[kind]
        if attrs.has(kind):
            return self._table(kind, converter)
        match get_origin(kind), get_args(kind):
            case (origin, (one, none)) if origin in (Union, UnionType) and none is NoneType:
                hook = converter.get_structure_hook(one)
                return lambda value, _: None if value is None else hook(value, one)
            case (origin, words) if origin is Literal:
                return literal(*words)
            case (origin, (item, end)) if origin is tuple and end is ...:
                hook = converter.get_structure_hook(item)
                if converter.detailed_validation:
                    return list_of(lambda value: hook(value, item), self._list)
                return lambda value, _: tuple([hook(member, item) for member in self._list(value)])
            case (origin, (key, item)) if origin is Mapping and key is str:
                hook = converter.get_structure_hook(item)
                return _mapping_of(lambda value: hook(value, item), self._object, tell_names=self._own_file)
            case _:
                raise TypeError(f"nothing makes a {kind}")

    def _table(self, kind: type[Any], converter: Converter) -> Hook:
        from cattrs import ClassValidationError
        from cattrs.gen import make_dict_structure_fn, override

        renamed: dict[str, Any] = {field: override(rename=name) for field, name in self._names.items()}
        make = make_dict_structure_fn(attrs.resolve_types(kind), converter, _cattrs_use_linecache=False, **renamed)
        if not converter.detailed_validation:
            return lambda value, _: make(self._object(value), kind)

        def hook(value: object, _: object) -> Any:
            try:
                return make(self._object(value), kind)
            except ClassValidationError as exc:
                raise ProblemsError(self._problems(exc)) from None

        return hook

    def _problems(self, found: ClassValidationError) -> list[Problem]:
        from cattrs import ForbiddenExtraKeysError

        problems: list[Problem] = []
        of_fields, others = found.group_exceptions()
        for exc, field in of_fields:
            name = self._names.get(field.name, field.name)
            if isinstance(exc, ProblemsError):
                problems += exc.at(name)
            elif isinstance(exc, KeyError):
                problems.append(Problem((name,), "missing", "Field required"))
            else:
                raise exc
        for exc in others:
            if isinstance(exc, ProblemsError):
                problems += exc.problems
            elif isinstance(exc, ForbiddenExtraKeysError):
                known = [self._names.get(name, name) for name in attrs.fields_dict(exc.cl)]
                problems += [
                    Problem((name,), "extra_forbidden", _unknown(name, known)) for name in sorted(exc.extra_fields)
                ]
            elif isinstance(exc, self._refusal):
                name, _, msg = str(exc).partition(": ")
                problems.append(Problem((name,), "value_error", msg))
            else:
                raise exc
        return problems


def _unknown(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return f"Unknown key; did you mean {near}?" if near else "Unknown key"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like ``name``; None if none is much like it."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(name[:_LONGEST_SHOWN], list(known), 1, 0.8)), None)


def load_toml(data: bytes) -> dict[str, object]:
    """Parse a TOML file. Raises `ProblemsError`."""
    try:
        if (text := data.decode("utf-8")).startswith("\ufeff"):
            raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
        if _DEEP_KEY.search(text):
            raise ValueError(f"a key of more than {_DEEPEST_KEY} parts")
        return tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        raise MismatchError("toml", f"not TOML: {exc}") from None


def exactly(wanted: type[T], error: str, msg: str) -> Callable[..., T]:
    """Make a hook for values of exactly this type."""

    def hook(value: object, kind: object = wanted) -> T:
        if type(value) is not wanted or kind is not wanted:  # cattrs asks this hook for subclasses too
            raise MismatchError(error, msg)
        return value

    return hook


def list_of(item: Callable[[object], T], whole: Callable[[object], list[object]]) -> Callable[..., tuple[T, ...]]:
    """Make a hook that converts a list to a tuple; ``whole`` has the problem of what is none."""

    def hook(value: object, _: object = None) -> tuple[T, ...]:
        return tuple(_each(enumerate(whole(value)), item))

    return hook


def literal(*values: str) -> Hook:
    """Make a hook for one of a few words."""
    choices = " or ".join(f'"{value}"' for value in values)

    def hook(value: object, _: object) -> str:
        if not isinstance(value, str) or value not in values:
            raise MismatchError("literal_error", f"Input should be {choices}")
        return value

    return hook


def number(value: object, _: object) -> float:
    """Convert a finite number: neither JSON nor TOML needs to tell 1 from 1.0."""
    try:
        if type(value) in (int, float) and isfinite(made := float(cast("float", value))):
            return made
    except OverflowError:
        pass
    raise MismatchError("float_type", "Input should be a valid number")


string = exactly(str, "string_type", "Input should be a valid string")
integer = exactly(int, "int_type", "Input should be a valid integer")
boolean = exactly(bool, "bool_type", "Input should be a valid boolean")
valid_list: Callable[..., list[object]] = exactly(list, "list_type", "Input should be a valid list")
file_array: Callable[..., list[object]] = exactly(list, "list_type", "Input should be an array")
_object: Callable[..., dict[str, object]] = exactly(dict, "dict_type", "Input should be a valid dictionary")
_file_table: Callable[..., dict[str, object]] = exactly(
    dict, "dict_type", "Input should be a table of names and values (in JSON, an object)"
)

_USUAL: Final[Mapping[Any, Hook]] = {
    str: string,
    int: integer,
    bool: boolean,
    float: number,
}


def _refuse(_: object, kind: object) -> Any:
    raise TypeError(f"nothing makes a {kind}")


def _mapping_of(item: Callable[[object], T], whole: Callable[[object], dict[str, object]], *, tell_names: bool) -> Hook:
    def hook(value: object, _: object) -> dict[str, T]:
        table = whole(value)
        places = table if tell_names else range(len(table))
        return dict(zip(table, _each(zip(places, table.values(), strict=True), item), strict=True))

    return hook


def _each(members: Iterable[tuple[int | str, object]], item: Callable[[object], T]) -> list[T]:
    """Convert each member by ``item``, with its place in the path of its problems."""
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
