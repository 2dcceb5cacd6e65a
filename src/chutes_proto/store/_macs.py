"""The authentication of rows: one MAC for each, bound to its table and key, under a random key that the KEK wraps.

Rules kept here:

* a MAC is format (1 byte), epoch (4 bytes, big-endian) and tag: the first 16 bytes of HMAC-SHA256 under the epoch's key
  over the MessagePack array ``["row", format, table, value of each column…]``, columns in their order, numbers in their
  shortest form. Drivers without booleans give 0 and 1; these are converted first;
* the layout of each table is worked out once, when this module is imported;
* nobody who can only write the database has the key, so a row that he made, changed or moved is not authentic.

This module knows no rows that belong together; ``_guard.py`` does.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from chutes_proto.secret import Secret
from chutes_proto.store import rows as store

FORMAT: Final = 1
"""The form of a MAC. Another column in a table that has MACs is another form."""
TAG_SIZE: Final = 16
MAC_SIZE: Final = 21

_HEAD: Final = struct.Struct(">BI")
_encode: Final = msgspec.msgpack.Encoder().encode

UNSEALED: Final[frozenset[type[store.Row]]] = frozenset(
    {store.NonceRow, store.AuditRow, store.LogStateRow, store.LogTileRow}
)
"""The rows without a MAC: a nonce carries its own tag, and the log contradicts its signed checkpoints."""


class EpochKey:
    """The key of the MACs of one epoch, derived from the ``random`` key of that epoch's row in the keyring."""

    __slots__ = ("_beginning", "_key", "epoch")

    def __init__(self, epoch: int, random: Secret) -> None:
        self.epoch: int = epoch
        self._key = HKDF(SHA256(), 32, None, b"chutes-proto custody").derive(random.reveal())
        self._beginning = _HEAD.pack(FORMAT, epoch)

    def mac(self, label: str, *values: object) -> bytes:
        """The MAC of a message that begins with ``label`` and the format."""
        return self._beginning + hmac.digest(self._key, _encode((label, FORMAT, *values)), "sha256")[:TAG_SIZE]

    def holds(self, mac: object, label: str, *values: object) -> bool:
        """Return whether a MAC is the one of this message."""
        return isinstance(mac, bytes) and hmac.compare_digest(mac, self.mac(label, *values))


def is_of_row(key: EpochKey, kind: type[store.Row], values: Sequence[Any], flags: tuple[int, ...], mac: object) -> bool:
    """Return whether ``mac`` is that of a row, whose columns a driver gave; ``flags`` are indexes of its booleans."""
    if flags:
        values = list(values)
        for at in flags:
            if values[at] in (0, 1):  # any other number is a change
                values[at] = bool(values[at])
    return key.holds(mac, "row", kind.TABLE, *values)
