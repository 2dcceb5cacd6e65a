"""A strict reader of CBOR (RFC 8949), as much of it as evidence in certificates needs, and its writer.

Rules kept here:

* unsigned numbers, byte and text strings, arrays, maps and tags, of definite length; nothing else;
* bounded in depth; no key of a map twice; nothing after the value;
* whatever the bytes, `decode` returns or raises `CborError`, in time proportional to their number.

A library would read more than this, and is one more thing that hostile bytes meet.
"""

from __future__ import annotations

from typing import Final, cast

from attrs import frozen

from chutes_proto.quote._errors import QuoteError

MAX_DEPTH: Final = 8

_UNSIGNED, _BYTES, _TEXT, _ARRAY, _MAP, _TAG = 0, 2, 3, 4, 5, 6


class CborError(QuoteError):
    """The bytes are not the CBOR that is expected."""


@frozen
class Tagged:
    """A value with its tag."""

    tag: int
    value: object


def decode(data: bytes) -> object:
    """Decode one value that fills ``data``. Raises `CborError`."""
    value, end = _value(data, 0, MAX_DEPTH)
    if end != len(data):
        raise CborError("bytes are left over after the CBOR value")
    return value


def encode(value: object) -> bytes:
    """Encode unsigned numbers, bytes, texts, lists, dicts and `Tagged`, in their shortest form."""
    match value:
        case int() if value >= 0:
            return _head(_UNSIGNED, value)
        case bytes():
            return _head(_BYTES, len(value)) + value
        case str():
            return _head(_TEXT, len(value.encode())) + value.encode()
        case list():
            members = cast("list[object]", value)
            return _head(_ARRAY, len(members)) + b"".join(map(encode, members))
        case dict():
            table = cast("dict[object, object]", value)
            return _head(_MAP, len(table)) + b"".join(encode(key) + encode(item) for key, item in table.items())
        case Tagged(tag, inner):
            return _head(_TAG, tag) + encode(inner)
        case _:
            raise TypeError(f"{type(value).__name__} is not encoded here")


def _head(major: int, number: int) -> bytes:
    if number < 24:
        return bytes([major << 5 | number])
    size = next(size for size in range(4) if number < 1 << (8 << size))
    return bytes([major << 5 | 24 + size]) + number.to_bytes(1 << size)


def _value(data: bytes, pos: int, depth: int) -> tuple[object, int]:
    if depth == 0:
        raise CborError(f"nested deeper than {MAX_DEPTH} levels")
    major, number, pos = _read_head(data, pos)
    match major:
        case 0:  # _UNSIGNED
            return number, pos
        case 2 | 3:  # _BYTES, _TEXT
            piece = data[pos : pos + number]
            if len(piece) != number:
                raise CborError("a string is cut off")
            return (piece if major == _BYTES else _text(piece)), pos + number
        case 4:  # _ARRAY
            members: list[object] = []
            for _ in range(_count(data, pos, number)):
                member, pos = _value(data, pos, depth - 1)
                members.append(member)
            return members, pos
        case 5:  # _MAP
            table: dict[object, object] = {}
            for _ in range(_count(data, pos, number)):
                key, pos = _value(data, pos, depth - 1)
                if not isinstance(key, str | bytes | int) or key in table:
                    raise CborError("a map has a key twice, or one that is neither a string nor a number")
                table[key], pos = _value(data, pos, depth - 1)
            return table, pos
        case 6:  # _TAG
            inner, pos = _value(data, pos, depth - 1)
            return Tagged(number, inner), pos
        case _:
            raise CborError("a type of value that is not read here")


def _read_head(data: bytes, pos: int) -> tuple[int, int, int]:
    if pos >= len(data):
        raise CborError("a value is cut off")
    major, short = data[pos] >> 5, data[pos] & 0x1F
    if short < 24:
        return major, short, pos + 1
    if short > 27:
        raise CborError("an indefinite length")
    size = 1 << (short - 24)
    number = data[pos + 1 : pos + 1 + size]
    if len(number) != size:
        raise CborError("a number is cut off")
    return major, int.from_bytes(number), pos + 1 + size


def _count(data: bytes, pos: int, number: int) -> int:
    """The number of members, each of which takes a byte at least."""
    if number > len(data) - pos:
        raise CborError("an array or map is cut off")
    return number


def _text(piece: bytes) -> str:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        raise CborError("a text that is not UTF-8") from None
