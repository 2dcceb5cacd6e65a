"""The authentication of rows: one MAC for each, bound to its table and key, under a random key that the KEK wraps.

Rules kept here:

* a MAC is format (1 byte), epoch (4 bytes, big-endian) and tag: the first 16 bytes of HMAC-SHA256 under the epoch's key
  over the MessagePack array ``["row", format, table, value of each column…]``, columns in their order, numbers in their
  shortest form. Drivers without booleans give 0 and 1; these are converted first;
* what the rows of a table have in common is worked out and hashed once, at its first row (`TableMacs`);
* nobody who can only write the database has the key, so a row that he made, changed or moved is not authentic.

This module knows no rows that belong together; ``_heads.py`` does.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hmac import compare_digest
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from chutes_proto.secret import Secret
from chutes_proto.store import _rows as store

FORMAT: Final = 1
"""The form of a MAC. Another column in a table that has MACs is another form."""
TAG_SIZE: Final = 16
MAC_SIZE: Final = 21

_HEAD: Final = struct.Struct(">BI")
_encode: Final = msgspec.msgpack.Encoder().encode
_TRUTH: Final[dict[Any, bool]] = {0: False, 1: True}
"""Booleans as drivers without them give them; any other number is a change."""

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
        self._of_tables: dict[str, TableMacs] = {}
        self._beginning = _HEAD.pack(FORMAT, epoch)

    def of_table(self, table: str, width: int) -> TableMacs:
        """The MACs of the rows of a table, each of which has ``width`` values."""
        return self._of_tables.get(table) or self._prepared(table, width)

    def of_row(self, table: str, values: Sequence[object]) -> bytes:
        """The MAC of the row of a table that has these values."""
        macs = self._of_tables.get(table) or self._prepared(table, len(values))
        return macs.make(values)

    def mac(self, label: str, *values: object) -> bytes:
        """The MAC of a message that begins with ``label`` and the format."""
        hmac = self._hmac.copy()
        hmac.update(_encode((label, FORMAT, *values)))
        return self._beginning + hmac.finalize()[:TAG_SIZE]

    def _prepared(self, table: str, width: int) -> TableMacs:
        hmac, nothing = self._hmac.copy(), (None,) * width
        hmac.update(_encode(("row", FORMAT, table, *nothing))[:-width])
        macs = self._of_tables[table] = TableMacs(hmac, len(_encode(nothing)) - width, self._beginning)
        return macs


class TableMacs:
    """The MACs of the rows of one table under one key.

    ``hmac`` has had what the messages of all rows begin with; after ``start`` bytes the values begin in an encoded row;
    ``beginning`` is that of each MAC.
    """

    __slots__ = ("_beginning", "_copy", "_start")

    def __init__(self, hmac: HMAC, start: int, beginning: bytes) -> None:
        self._copy = hmac.copy
        self._start = start
        self._beginning = beginning

    def make(self, values: Sequence[object]) -> bytes:
        """The MAC of the row that has these values."""
        hmac = self._copy()
        hmac.update(_encode(values)[self._start :])
        return self._beginning + hmac.finalize()[:TAG_SIZE]

    def tags(self, rows: Sequence[Sequence[Any]], flags: Sequence[int]) -> list[bytes | None]:
        """The tag of each stored row, None for one whose last column is not its MAC.

        Booleans have the indexes ``flags``. A boot reads many rows, so this is one loop without a call of ours.
        """
        copy, start, beginning = self._copy, self._start, self._beginning
        tags: list[bytes | None] = []
        for row in rows:
            *values, mac = row
            for at in flags:
                values[at] = _TRUTH.get(values[at], values[at])
            hmac = copy()
            hmac.update(_encode(values)[start:])
            tag = hmac.finalize()[:TAG_SIZE]
            tags.append(tag if type(mac) is bytes and compare_digest(mac, beginning + tag) else None)
        return tags


def epoch_of(mac: object) -> int | None:
    """The epoch that a MAC says it is of; None for what is not one of this format."""
    if not isinstance(mac, bytes) or len(mac) != MAC_SIZE or mac[0] != FORMAT:
        return None
    epoch: int = _HEAD.unpack_from(mac)[1]
    return epoch


def is_same(mac: object, right: bytes) -> bool:
    """Return whether a stored value is this MAC."""
    return isinstance(mac, bytes) and compare_digest(mac, right)
