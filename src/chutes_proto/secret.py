"""Secrets as a type: they are not shown, compared in variable time, hashed or pickled.

``reveal()`` is the only way to the bytes, so that a search for it finds every place where a secret leaves.

``wipe()`` overwrites the bytes that are held here. It is an effort, not a promise: what ``reveal()`` gave away, and
what a parser or a TLS library held before, lies in memory until something else takes its place.
"""

from __future__ import annotations

import hmac
from typing import ClassVar, NoReturn

__all__ = ["Secret"]


class Secret:
    """Secret bytes. ``repr`` and ``str`` are ``***``; equality takes constant time; no hashing, no pickling."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value: bytearray | None = bytearray(value)

    def reveal(self) -> bytes:
        """Return the bytes, to put on the wire, into a cipher or into a pipe, and nowhere else.

        Raises `ValueError` when they were wiped, so that nothing is ever encrypted with zeros.
        """
        return bytes(self._held())

    def wipe(self) -> None:
        """Overwrite the bytes; `reveal` raises from then on. Wiping twice does no harm."""
        if self._value is not None:
            self._value[:] = bytes(len(self._value))
            self._value = None

    def _held(self) -> bytearray:
        if self._value is None:
            raise ValueError("the secret was wiped")
        return self._value

    def __len__(self) -> int:
        return len(self._held())

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._held(), other._held())

    __hash__: ClassVar[None]  # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not serialised; reveal() it where it is needed")
