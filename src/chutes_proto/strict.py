"""Plain data (what JSON and TOML say) to attrs values, strictly: one way for messages and for configuration.

Rules kept here:

* nothing is coerced: a number is no string, a string no list, ``true`` no number;
* every problem is found, each with the path to it; none repeats the value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import attrs
from attrs import frozen
from cattrs import ClassValidationError, Converter, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn

T = TypeVar("T")

Hook: TypeAlias = "Callable[[object, Any], Any]"


class MismatchError(ValueError):
    """A value is not what it should be. ``kind`` is a stable word, ``inner`` the path inside the value."""

    def __init__(self, kind: str, msg: str, inner: tuple[int | str, ...] = ()) -> None:
        super().__init__(msg)
        self.kind = kind
        self.msg = msg
        self.inner = inner


@frozen
class Problem:
    """One thing that is wrong: where (names and indexes), the kind in a stable word, and the text."""

    path: tuple[int | str, ...]
    kind: str
    msg: str


class ProblemsError(ValueError):
    """All that is wrong with a value."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, problem.path))}: {problem.msg}" for problem in problems))
        self.problems = tuple(problems)


class Structurer:
    """Makes attrs values of plain data. ``hooks``: how types of the caller's are made, beside the usual ones."""

    def __init__(self, hooks: Sequence[tuple[Any, Hook]] = (), *, forbid_extra_keys: bool = False) -> None:
        self._converter = Converter(detailed_validation=True, forbid_extra_keys=forbid_extra_keys)
        self._forbid_extra_keys = forbid_extra_keys
        _ = self._converter.register_structure_hook_factory(attrs.has, self._table)
        for kind, hook in (*_USUAL, *hooks):
            self._register(kind, hook)

    def structure(self, value: object, kind: type[T]) -> T:
        """``value`` as a ``kind``. Raises `ProblemsError`."""
        try:
            return self._converter.structure(value, kind)
        except ClassValidationError as exc:
            raise ProblemsError(_flatten(exc, kind)) from None
        except MismatchError as exc:
            raise ProblemsError([Problem(exc.inner, exc.kind, exc.msg)]) from None

    def add_list(self, kind: type[Any]) -> None:
        """Teach it ``tuple[kind, ...]``, made of a list of what ``kind`` is made of."""

        def hook(value: object, _: Any) -> tuple[Any, ...]:
            if not isinstance(value, list):
                raise MismatchError("list_type", "Input should be a valid list")
            items: list[Any] = []
            problems: list[Problem] = []
            for index, member in enumerate(cast("list[object]", value)):
                try:
                    items.append(self.structure(member, kind))
                except ProblemsError as exc:
                    problems.extend(attrs.evolve(problem, path=(index, *problem.path)) for problem in exc.problems)
            if problems:
                raise ProblemsError(problems)
            return tuple(items)

        self._register(tuple[kind, ...], hook)  # type: ignore[valid-type]

    def add_mapping(self, kind: type[Any]) -> None:
        """Teach it ``Mapping[str, kind]``, made of an object. A problem's path has the place: the name is input."""

        def hook(value: object, _: Any) -> dict[str, Any]:
            if not isinstance(value, dict):
                raise MismatchError("dict_type", "Input should be a valid dictionary")
            members: dict[str, Any] = {}
            problems: list[Problem] = []
            for index, (name, member) in enumerate(cast("dict[str, object]", value).items()):
                try:
                    members[name] = self.structure(member, kind)
                except ProblemsError as exc:
                    problems.extend(attrs.evolve(problem, path=(index, *problem.path)) for problem in exc.problems)
            if problems:
                raise ProblemsError(problems)
            return members

        self._register(cast("Any", Mapping)[str, kind], hook)

    def _register(self, kind: Any, hook: Hook) -> None:
        if isinstance(kind, type):
            self._converter.register_structure_hook(kind, hook)
            return

        def is_kind(candidate: Any) -> bool:
            return bool(candidate == kind)

        self._converter.register_structure_hook_func(is_kind, hook)

    def _table(self, kind: type[Any]) -> Hook:
        fields = make_dict_structure_fn(
            kind, self._converter, _cattrs_forbid_extra_keys=self._forbid_extra_keys, _cattrs_detailed_validation=True
        )

        def hook(value: object, _: Any) -> Any:
            if not isinstance(value, dict):
                raise MismatchError("dict_type", "Input should be a valid dictionary")
            return fields(cast("dict[str, Any]", value), _)

        return hook


def exactly(kind: type[T], error: str, msg: str) -> Callable[[object, Any], T]:
    """A hook for values of just this type."""

    def hook(value: object, _: Any) -> T:
        if type(value) is not kind:
            raise MismatchError(error, msg)
        return value

    return hook


def list_of(item: Callable[[object, Any], T]) -> Callable[[object, Any], tuple[T, ...]]:
    """A hook that makes a tuple of a list."""

    def hook(value: object, _: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise MismatchError("list_type", "Input should be a valid list")
        items: list[T] = []
        for index, member in enumerate(cast("list[object]", value)):
            try:
                items.append(item(member, _))
            except MismatchError as exc:
                raise MismatchError(exc.kind, exc.msg, (index, *exc.inner)) from None
        return tuple(items)

    return hook


def literal(*values: str) -> Callable[[object, Any], str]:
    """A hook for one of a few words."""
    choices = " or ".join(f'"{value}"' for value in values)

    def hook(value: object, _: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise MismatchError("literal_error", f"Input should be {choices}")
        return value

    return hook


string = exactly(str, "string_type", "Input should be a valid string")
integer = exactly(int, "int_type", "Input should be a valid integer")
boolean = exactly(bool, "bool_type", "Input should be a valid boolean")

_USUAL: tuple[tuple[Any, Hook], ...] = (
    (str, string),
    (int, integer),
    (bool, boolean),
    (tuple[str, ...], list_of(string)),
    (tuple[int, ...], list_of(integer)),
    (Mapping[str, object], exactly(dict, "dict_type", "Input should be a valid dictionary")),
)


def _flatten(error: ClassValidationError, kind: type[Any]) -> list[Problem]:
    """The problems of ``kind``'s fields, in the order of the fields; what is no field's comes last."""
    order = {attribute.name: index for index, attribute in enumerate(attrs.fields(kind))}
    noted, others = error.group_exceptions()
    found: list[Problem] = []
    for exc, note in sorted(noted, key=lambda pair: order[pair[1].name]):
        match exc:
            case ClassValidationError():
                found.extend(attrs.evolve(p, path=(note.name, *p.path)) for p in _flatten(exc, note.type))
            case ProblemsError(problems=problems):
                found.extend(attrs.evolve(p, path=(note.name, *p.path)) for p in problems)
            case MismatchError():
                found.append(Problem((note.name, *exc.inner), exc.kind, exc.msg))
            case KeyError():
                found.append(Problem((note.name,), "missing", "Field required"))
            case _:
                raise exc
    for exc in others:
        match exc:
            case ForbiddenExtraKeysError(extra_fields=extra):
                found.extend(Problem((name,), "extra_forbidden", "Unknown key") for name in sorted(extra))
            case _:
                raise exc
    return found
