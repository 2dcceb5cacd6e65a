"""The tags that nonces and tokens carry: HMAC-SHA-256, cut to 16 bytes."""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from chutes_proto.secret import Secret

TAG_SIZE: Final = 16


class TagKey:
    """A MAC key, kept as a prepared HMAC that each tag copies. It is not shown, and cannot be wiped."""

    __slots__ = ("_copy",)

    def __init__(self, key: Secret) -> None:
        self._copy = HMAC(key.reveal(), SHA256()).copy

    def tag(self, message: bytes) -> bytes:
        """The tag of a message."""
        mac = self._copy()
        mac.update(message)
        return mac.finalize()[:TAG_SIZE]
