"""The arguments of callers: one of another type is a `TypeError` that names it, before anything is made of it.

Rules kept here:

* bytes are copied where the caller could still change them, so that what was verified stays what it was;
* text stands for its UTF-8;
* a flag is a bool: the text "false" would be true.
"""

from __future__ import annotations

from typing import TypeAlias

BytesLike: TypeAlias = bytes | bytearray | memoryview


def as_bytes(data: BytesLike, must: str, name: str = "data") -> bytes:
    """The bytes that ``data`` holds. Raises `TypeError`, which says what they ``must`` be."""
    if type(data) is bytes:
        return data
    try:
        return bytes(memoryview(data))
    except TypeError:
        raise TypeError(f"{name}: must be {must}, not {type(data).__name__}") from None


def as_utf8(data: BytesLike | str, must: str) -> bytes:
    """The bytes that ``data`` holds, or those of the text. Raises `TypeError`, which says what they ``must`` be."""
    if isinstance(data, str):
        return data.encode("utf-8", "surrogatepass")  # who decodes it refuses a lone surrogate
    return as_bytes(data, must)


def check_kind(name: str, value: object, kind: type | tuple[type, ...], must: str) -> None:
    """Refuse what only looks like the value that it ``must`` be. Raises `TypeError`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: must be {must}, not {type(value).__name__}")


def check_flag(name: str, value: object) -> None:
    """Refuse what is not a bool. Raises `TypeError`."""
    if type(value) is not bool:
        raise TypeError(f"{name}: must be True or False, not {value!r}")
