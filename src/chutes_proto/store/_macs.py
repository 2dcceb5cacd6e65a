"""The authentication of rows: one MAC for each, bound to its table and key, under a random key that the KEK wraps.

Rules kept here:

* a MAC is format (1 byte), epoch (4 bytes, big-endian) and tag: the first 16 bytes of HMAC-SHA256 under the epoch's key
  over the MessagePack array ``["row", format, table, value of each column…]``, columns in their order, numbers in their
  shortest form. Drivers without booleans give 0 and 1; these are converted first;
* what the rows of a table have in common is worked out and hashed once, at its first row;
* nobody who can only write the database has the key, so a row that he made, changed or moved is not authentic.

This module knows no rows that belong together; ``_guard.py`` does.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hmac import compare_digest
from typing import Final

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from chutes_proto.secret import Secret
from chutes_proto.store import rows as store

FORMAT: Final = 1
"""The form of a MAC. Another column in a table that has MACs is another form."""
TAG_SIZE: Final = 16
MAC_SIZE: Final = 21

_HEAD: Final = struct.Struct(">BI")
_encode: Final = msgspec.msgpack.Encoder().encode

UNSEALED: Final[frozenset[type[store.Row]]] = frozenset({store.NonceRow, store.LogTileRow})
"""The rows without a MAC: a nonce carries its own tag, and all tiles have the root hash in the log's state. So has an
audit row that is its entry: the MAC of one is of what was written, without its place, and counts until then."""


class EpochKey:
    """The key of the MACs of one epoch, derived from the ``random`` key of that epoch's row in the keyring.

    A MAC begins with a copy of a prepared HMAC, which takes half the time of one that gets the key; a table's has had
    the beginning of its messages, too.
    """

    __slots__ = ("_beginning", "_hmac", "_of_tables", "epoch")

    def __init__(self, epoch: int, random: Secret) -> None:
        self.epoch: int = epoch
        key = HKDF(SHA256(), 32, None, b"chutes-proto custody").derive(random.reveal())
        self._hmac = HMAC(key, SHA256())
        self._of_tables: dict[str, tuple[HMAC, int]] = {}
        self._beginning = _HEAD.pack(FORMAT, epoch)

    def of_row(self, table: str, values: Sequence[object]) -> bytes:
        """The MAC of the row of a table that has these values."""
        prepared, start = self._of_tables.get(table) or self._prepared(table, len(values))
        hmac = prepared.copy()
        hmac.update(_encode(values)[start:])
        return self._beginning + hmac.finalize()[:TAG_SIZE]

    def mac(self, label: str, *values: object) -> bytes:
        """The MAC of a message that begins with ``label`` and the format."""
        hmac = self._hmac.copy()
        hmac.update(_encode((label, FORMAT, *values)))
        return self._beginning + hmac.finalize()[:TAG_SIZE]

    def _prepared(self, table: str, width: int) -> tuple[HMAC, int]:
        """The HMAC of what the messages of all rows of a table begin with, and where their values begin."""
        hmac, nothing = self._hmac.copy(), (None,) * width
        hmac.update(_encode(("row", FORMAT, table, *nothing))[:-width])
        prepared = self._of_tables[table] = hmac, len(_encode(nothing)) - width
        return prepared


def epoch_of(mac: object) -> int | None:
    """The epoch that a MAC says it is of; None for what is not one of this format."""
    if not isinstance(mac, bytes) or len(mac) != MAC_SIZE or mac[0] != FORMAT:
        return None
    epoch: int = _HEAD.unpack_from(mac)[1]
    return epoch


def is_same(mac: object, right: bytes) -> bool:
    """Return whether a stored value is this MAC."""
    return isinstance(mac, bytes) and compare_digest(mac, right)
