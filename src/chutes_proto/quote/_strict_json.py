"""Decode JSON that can mean one thing only.

Rules kept here:

* UTF-8, bounded in size, in depth and in number of values; no lone surrogates;
* no member twice, no NaN or Infinity, only whole numbers unless fractions are asked for;
* whatever the bytes, `decode` returns or raises `JsonError`, in time proportional to their number.

Source: RFC 8259; RFC 3339 for dates, as far as Intel's services use it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import datetime
from functools import lru_cache
from math import isinf
from typing import Any, Final, NoReturn, TypeVar

from chutes_proto.quote._errors import QuoteError

T = TypeVar("T")

MAX_SIZE: Final = 1024 * 1024
MAX_DEPTH: Final = 16
MAX_VALUES: Final = 256 * 1024
"""Values in a text, by its commas and opening brackets, which stand in strings, too. Each value takes more memory than
its text: an empty list 24 times as much. The collateral of a fleet has one value for 25 bytes."""
MAX_FLOAT: Final = 64
"""Characters of a number with a fraction or an exponent: rounding one of 800 takes 40 times as long as one of 20."""

# Possessive, and with an optional end, so that no input makes it look at a byte twice.
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NOT_SKELETON: Final = bytes(set(range(256)) - set(b'[]{}"\\'))
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T(?!24)[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


class JsonError(QuoteError):
    """The bytes are not the JSON that is expected.

    ``problem`` repeats none of them; the text also names the ``doubled`` member, if one is.
    """

    def __init__(self, problem: str, doubled: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.doubled = doubled

    def __str__(self) -> str:
        return self.problem if self.doubled is None else f"{self.problem}: {self.doubled[:80]!r}"


def decode(data: bytes, *, limit: int = MAX_SIZE, fractions: bool = False) -> object:
    """Decode ``data``. Numbers are whole; with ``fractions`` also what a float holds. Raises `JsonError`."""
    if len(data) > limit:
        raise JsonError(f"more than {limit} bytes of JSON")
    opened = data.count(b"{") + data.count(b"[")
    if opened + data.count(b",") > MAX_VALUES:
        raise JsonError(f"more than {MAX_VALUES} values of JSON")
    if opened > MAX_DEPTH:
        _check_depth(data)
    try:
        text = data.decode("utf-8")
        value: object = (_FRACTIONS if fractions else _DECODER).decode(text)
    except UnicodeDecodeError:
        raise JsonError("not UTF-8") from None
    except json.JSONDecodeError as exc:
        raise JsonError(f"not JSON at character {exc.pos}") from None
    except ValueError:  # what turns digits into a number has a bound
        raise JsonError("a number too long") from None
    if "\\" in text:
        try:
            _ = json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise JsonError("a lone surrogate") from None
    return value


def hexadecimal(text: str, name: str, size: int) -> bytes:
    """Decode ``size`` bytes from hexadecimal digits of either case, of the member ``name``. Raises `JsonError`."""
    value = digits(text)
    if value is None or len(value) != size:
        raise JsonError(f"{name} is not {size} bytes in hexadecimal digits")
    return value


def digits(text: str) -> bytes | None:
    """Decode hexadecimal digits of either case, without white space; None for another text."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        return None
    return value if 2 * len(value) == len(text) else None


def date(text: str, name: str) -> int:
    """Decode a date and time of UTC in whole seconds, ending with ``Z``, to unix seconds. Raises `JsonError`."""
    try:
        return _unix_seconds(text)
    except ValueError:
        raise JsonError(f"{name} is not a date of the form YYYY-MM-DDThh:mm:ssZ") from None


@lru_cache(maxsize=256)
def _unix_seconds(text: str) -> int:
    if _DATE.fullmatch(text) is None:
        raise ValueError(text)
    seconds = int(datetime.fromisoformat(text).timestamp())
    if seconds < 0:
        raise ValueError(text)
    return seconds


def _check_depth(data: bytes) -> None:
    """Take away the innermost pairs of brackets, again and again: each time is a level.

    Not for data that opens no more brackets than there may be levels, as a request does: the decoder finds what does
    not match.
    """
    skeleton = data.translate(None, _NOT_SKELETON).replace(b'""', b"")
    if b'"' in skeleton or b"\\" in skeleton:  # brackets or quotes inside strings
        skeleton = _STRING.sub(b"", data).translate(None, _NOT_SKELETON)
    depth = 0
    while skeleton and depth < MAX_DEPTH:
        skeleton = skeleton.replace(b"{}", b"").replace(b"[]", b"")
        depth += 1
    if skeleton:
        raise JsonError(f"not JSON: nested deeper than {MAX_DEPTH} levels, or brackets that do not match")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) == 1:
        ((name, value),) = pairs
        return {name: value}
    table = dict(pairs)
    if len(table) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise JsonError("an object has a member twice", name)
    return table


def _float(text: str) -> float:
    if len(text) > MAX_FLOAT:
        raise JsonError("a number too long")
    value = float(text)
    if isinf(value):
        raise JsonError("a number too large")
    return value


def _refuse(_: str) -> NoReturn:
    raise JsonError("a number that is not whole")


def _none(_: str) -> NoReturn:
    raise JsonError("NaN or Infinity")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_refuse, parse_constant=_none)
_FRACTIONS: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_float, parse_constant=_none)
