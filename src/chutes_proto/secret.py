"""Secrets are a type of their own: what holds one does not show it, compare it in variable time or hash it.

``reveal()`` is the only way to the bytes, so that a search for it finds every place where a secret leaves.
"""

from __future__ import annotations

import hmac
from typing import NoReturn


class Secret:
    """Secret bytes. ``repr`` and ``str`` are ``***``; equality takes constant time; no hashing, no pickling."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = bytes(value)

    def reveal(self) -> bytes:
        """The bytes, to put on the wire, into a cipher or into a pipe, and nowhere else."""
        return self._value

    def __len__(self) -> int:
        return len(self._value)

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value, other._value)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not serialised; reveal() it where it is needed")
