"""Tables of a caller's configuration (plain data of TOML or JSON), of which nothing is overlooked.

Rules kept here:

* a key that nobody takes is an error, so that a typo never switches a check off;
* nothing is coerced; every error is a `PolicyError` that names the key by its path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar, cast

from chutes_proto.quote.errors import PolicyError

T = TypeVar("T")

_MISSING: Final = object()
_KINDS: Final[dict[type, str]] = {
    bool: "true or false",
    dict: "a table",
    int: "a whole number",
    list: "a list",
    str: "a string",
}


class Table:
    """A table and the path to it. Take every key, then call `finish`."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, dict):
            raise PolicyError(f"{path or 'the file'}: must be a table")
        self._left: dict[str, object] = dict(cast("Mapping[str, object]", value))
        self.path = path

    def at(self, key: str) -> str:
        """The path of a key."""
        return f"{self.path}{'.' if self.path and not self.path.endswith(' ') else ''}{key}"

    def keys(self) -> frozenset[str]:
        """The keys that are not taken yet."""
        return frozenset(self._left)

    def take(self, key: str, kind: type[T], default: Any = _MISSING) -> T:
        """The value of just this type; without a default it must be there."""
        value = self._left.pop(key, default)
        if value is _MISSING:
            raise PolicyError(f"{self.at(key)}: is missing")
        if value is default:
            return cast("T", value)
        if type(value) is not kind:
            raise PolicyError(f"{self.at(key)}: must be {_KINDS[kind]}")
        return value

    def given(self, **kinds: type[Any]) -> dict[str, Any]:
        """The values of those keys that are there, each of just its type."""
        return {key: self.take(key, kind) for key, kind in kinds.items() if key in self._left}

    def table(self, key: str, default: Any = _MISSING) -> Table:
        """The table in a table."""
        kind: type[dict[str, object]] = dict
        return Table(self.take(key, kind, default), self.at(key))

    def tables(self, key: str) -> list[object]:
        """A list whose members the caller makes tables of; empty where there is none."""
        kind: type[list[object]] = list
        return self.take(key, kind, [])

    def strings(self, key: str, default: Any = _MISSING) -> tuple[str, ...]:
        """A list of strings."""
        kind: type[list[object]] = list
        values = self.take(key, kind, default)
        if any(type(value) is not str for value in values):
            raise PolicyError(f"{self.at(key)}: must be a list of strings")
        return tuple(cast("list[str]", values))

    def octets(self, key: str, size: int) -> bytes:
        """Bytes in hexadecimal digits."""
        return octets(self.take(key, str), size, self.at(key))

    def rest(self) -> dict[str, object]:
        """All that is left, taken."""
        left, self._left = self._left, {}
        return left

    def finish(self) -> None:
        """Refuse the keys that nobody took."""
        if self._left:
            raise PolicyError(f"{self.at(min(self._left))}: there is no such key")


def octets(text: str, size: int, path: str) -> bytes:
    """So many bytes in hexadecimal digits of either case. Raises `PolicyError`."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != size or len(text) != 2 * size:
        raise PolicyError(f"{path}: must be {2 * size} hexadecimal digits")
    return value
