"""A strict reader of DER, as much of it as certificates and CRLs need.

Rules kept here:

* definite lengths of at most three bytes, each in its shortest form; tags of one byte;
* no recursion: a structure is read one level at a time, and only where its reader knows what to expect;
* whatever the bytes, a function returns or raises `DerError`.

Source: ITU-T X.690, chapters 8 and 10; RFC 5280, 4.1.2.5 (times).
"""

from __future__ import annotations

from datetime import UTC, datetime
from operator import itemgetter
from typing import Final, TypeAlias

from chutes_proto.quote._errors import QuoteError

BOOLEAN: Final = 0x01
INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
OBJECT_IDENTIFIER: Final = 0x06
ENUMERATED: Final = 0x0A
UTF8_STRING: Final = 0x0C
PRINTABLE_STRING: Final = 0x13
UTC_TIME: Final = 0x17
GENERALIZED_TIME: Final = 0x18
SEQUENCE: Final = 0x30
SET: Final = 0x31

_TAG: Final = itemgetter(0)
_Z: Final = ord("Z")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

Element: TypeAlias = "tuple[int, int, int, int]"
"""Tag, where the element begins, where its content begins, and where both end."""


class DerError(QuoteError):
    """The bytes are not the DER that is expected."""


def elements(data: bytes, start: int, end: int) -> list[Element]:
    """The elements, one after the other, that fill ``data[start:end]`` exactly."""
    found: list[Element] = []
    add = found.append
    pos = start
    try:
        while pos < end:
            tag = data[pos]
            length = data[pos + 1]
            content = pos + 2
            if length > 0x7F:
                length, content = _long(data, content, length & 0x7F)
            stop = content + length
            if stop > end:
                raise DerError("an element is longer than what holds it")
            if tag & 0x1F == 0x1F:
                raise DerError("a tag of more than one byte")
            add((tag, pos, content, stop))
            pos = stop
    except IndexError:
        raise DerError("an element is cut off") from None
    return found


def _long(data: bytes, start: int, size: int) -> tuple[int, int]:
    """A length of so many bytes, and where it ends."""
    if not 1 <= size <= 3:
        raise DerError("a length that is indefinite or too long")
    content = start + size
    length = int.from_bytes(data[start:content])
    if length < 0x80 or length >> (8 * (size - 1)) == 0:
        raise DerError("a length that is not in its shortest form")
    return length, content


def only(data: bytes, start: int, end: int, tag: int) -> tuple[int, int]:
    """The content of the one element of this tag that fills ``data[start:end]``."""
    try:
        length = data[start + 1]
        content = start + 2
        if length > 0x7F:
            length, content = _long(data, content, length & 0x7F)
        if data[start] == tag and content + length == end:
            return content, end
    except IndexError:
        pass
    raise DerError(f"not exactly one element, of tag 0x{tag:02x}")


def several(data: bytes, start: int, end: int, least: int, most: int) -> list[Element]:
    """The elements that fill ``data[start:end]``, at least ``least`` and at most ``most``."""
    found = elements(data, start, end)
    if not least <= len(found) <= most:
        raise DerError("a structure has more or fewer members than it should")
    return found


def members(data: bytes, start: int, end: int, *tags: int) -> list[Element]:
    """The elements of just these tags that fill ``data[start:end]``."""
    found = elements(data, start, end)
    if (*map(_TAG, found),) != tags:
        raise DerError("a structure has other members than it should")
    return found


def content(data: bytes, element: Element) -> bytes:
    return data[element[2] : element[3]]


def whole(data: bytes, element: Element) -> bytes:
    """The element with its tag and length."""
    return data[element[1] : element[3]]


def unsigned(data: bytes, element: Element, *, size: int) -> bytes:
    """The content of an INTEGER that is not negative, in its shortest form, of at most ``size`` bytes and a sign."""
    tag, _, start, stop = element
    if tag != INTEGER or start == stop:
        raise DerError("not an INTEGER")
    if data[start] > 0x7F:
        raise DerError("a negative INTEGER")
    if data[start] == 0 and stop - start > 1 and data[start + 1] < 0x80:
        raise DerError("an INTEGER that is not in its shortest form")
    value = data[start:stop]
    if len(value) - (value[0] == 0 and len(value) > 1) > size:
        raise DerError(f"an INTEGER of more than {size} bytes")
    return value


def boolean(data: bytes, element: Element) -> bool:
    value = content(data, element)
    if element[0] != BOOLEAN or value not in (b"\x00", b"\xff"):
        raise DerError("not a BOOLEAN")
    return value == b"\xff"


def bits(data: bytes, element: Element) -> bytes:
    """The bytes of a BIT STRING that is made of whole bytes."""
    value = content(data, element)
    if element[0] != BIT_STRING or value[:1] != b"\x00":
        raise DerError("not a BIT STRING of whole bytes")
    return value[1:]


def time(data: bytes, element: Element) -> int:
    """A UTCTime or GeneralizedTime of seconds in UTC, as unix seconds."""
    tag = element[0]
    text = content(data, element)
    if tag == UTC_TIME:
        text = (b"20" if text[:2] < b"50" else b"19") + text
    elif tag != GENERALIZED_TIME:
        raise DerError("not a time")
    if len(text) != 15 or text[14] != _Z or not text[:14].isdigit():
        raise DerError("a time that is not in seconds of UTC")
    rest, second = divmod(int(text[:14]), 100)
    rest, minute = divmod(rest, 100)
    rest, hour = divmod(rest, 100)
    rest, day = divmod(rest, 100)
    year, month = divmod(rest, 100)
    try:
        since = datetime(year, month, day, hour, minute, second, 0, UTC) - _EPOCH
    except ValueError:
        raise DerError("a time that does not exist") from None
    return since.days * 86400 + since.seconds
