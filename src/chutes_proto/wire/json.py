"""JSON as this API takes and gives it.

Taken: RFC 8259 in UTF-8, nested at most 16 deep, no member twice, no NaN and no number too large for a float, no lone
surrogates. Given: compact, because deployed VM images cut answers apart with ``grep``. Bounds hold before the parser
runs.
"""

from __future__ import annotations

import json
import re
from math import isinf
from typing import Any, NoReturn

MAX_DEPTH = 16

# Possessive, and with an optional end, so that no input makes it look at a byte twice.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class JsonError(ValueError):
    """Bytes that are not JSON as this API takes it; the text says what is wrong and repeats none of the input."""


def decode(data: bytes) -> Any:
    """The value that ``data`` says. Raises `JsonError`."""
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise JsonError(f"nested more than {MAX_DEPTH} deep")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise JsonError("not UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_number, parse_constant=_constant)
    except JsonError:
        raise
    except ValueError as exc:
        position = f" at character {exc.pos}" if isinstance(exc, json.JSONDecodeError) else ""
        raise JsonError(f"not JSON{position}") from None
    if "\\u" in text and _has_surrogate(value):
        raise JsonError("a lone surrogate")
    return value


def encode(value: object) -> bytes:
    """Compact JSON in ASCII, members in the order of ``value``."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise JsonError("an object has one member twice")
    return result


def _number(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise JsonError("a number too large")
    return value


def _constant(_: str) -> NoReturn:
    raise JsonError("NaN or Infinity")


def _has_surrogate(value: Any) -> bool:
    match value:
        case str():
            return _SURROGATE.search(value) is not None
        case list():
            return any(_has_surrogate(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
        case dict():
            return any(_has_surrogate(key) or _has_surrogate(item) for key, item in value.items())  # pyright: ignore[reportUnknownVariableType]
        case _:
            return False
