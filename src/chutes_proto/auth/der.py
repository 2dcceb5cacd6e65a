"""Write DER, as much of it as certificates, CRLs and keys need; ``quote/_der.py`` is the strict reader.

Sources: ITU-T X.690, chapters 8 and 10; RFC 5280, 4.1.2.5 (times); RFC 7468 (PEM).
"""

from __future__ import annotations

from base64 import b64encode
from datetime import UTC, datetime
from typing import Final

from chutes_proto.errors import LocalProtocolError

_LAST: Final = 253_402_300_799  # 9999-12-31T23:59:59Z


def tlv(tag: int, *content: bytes) -> bytes:
    """Encode an element with this tag, of one byte, and these parts as its content."""
    value = b"".join(content)
    size = len(value)
    if size < 0x80:
        return bytes((tag, size)) + value
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + value


def sequence(*members: bytes) -> bytes:
    """A SEQUENCE."""
    return tlv(0x30, *members)


def integer(value: int) -> bytes:
    """An INTEGER, of either sign."""
    return tlv(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def octets(value: bytes) -> bytes:
    """An OCTET STRING."""
    return tlv(0x04, value)


def bits(value: bytes) -> bytes:
    """A BIT STRING of whole bytes."""
    return tlv(0x03, b"\0", value)


def oid(dotted: str) -> bytes:
    """An OBJECT IDENTIFIER, ``1.2.840.…``."""
    first, second, *rest = map(int, dotted.split("."))
    encoded = bytearray()
    for arc in (40 * first + second, *rest):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(arc & 0x7F | 0x80)
        encoded += bytes(reversed(groups))
    return tlv(0x06, bytes(encoded))


def time(moment: int) -> bytes:
    """Encode unix seconds as certificates do: UTCTime until 2049, from then on GeneralizedTime.

    Raises `LocalProtocolError` for one before 1970 or after 9999.
    """
    if not 0 <= moment <= _LAST:
        raise LocalProtocolError(f"a certificate's time is in unix seconds from 1970 to 9999, not {moment}")
    when = datetime.fromtimestamp(moment, UTC)
    text = f"{when:%Y%m%d%H%M%SZ}".encode()
    return tlv(0x17, text[2:]) if when.year < 2050 else tlv(0x18, text)


def pem(label: str, der: bytes) -> bytes:
    """Encode DER as PEM, with ``label`` in its first and last line."""
    text = b64encode(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"\n".join([f"-----BEGIN {label}-----".encode(), *lines, f"-----END {label}-----".encode(), b""])
