"""Messages of Intel's quote generation service (QGS): the request for a quote, and the quote in its answer.

Source: Intel DCAP, ``QuoteGeneration/quote_wrapper``: ``qgs_msg_lib/inc/qgs_msg_lib.h`` for the messages (packed,
numbers little-endian) and ``tdx_attest/tdx_attest.c`` for the frame around them (the message's size, four bytes,
big-endian).

Rules kept here:

* no more than `MAX_MESSAGE` is read, whatever size the service announces;
* an answer is used only if all its sizes agree.
"""

from __future__ import annotations

import struct
from typing import Final

from chutes_proto.errors import LocalProtocolError, RemoteProtocolError

REPORT_SIZE: Final = 1024
"""Bytes of a TDREPORT (Intel TDX Module ABI, TDREPORT_STRUCT)."""
FRAME_SIZE: Final = 4
MAX_MESSAGE: Final = 64 * 1024
"""The most bytes of a message. A quote has some 5000, with its certificates; Intel's library takes 16 KiB."""

_HEADER: Final = struct.Struct("<HHIII")
"""Major and minor version, type, size of the whole message, error code."""
_SIZES: Final = struct.Struct("<II")
"""Sizes of the report and of the list of key ids in a request, of the chosen key id and of the quote in an answer."""
_MAJOR, _MINOR = 1, 1
_GET_QUOTE_REQ, _GET_QUOTE_RESP = 0, 1

_ERRORS: Final = {
    0x12001: "unexpected error; its own log says more",
    0x12002: "not enough memory",
    0x12003: "wrong parameter",
    0x12004: "unknown version of the message",
    0x12005: "wrong type of message",
    0x12006: "wrong size of message",
    0x12007: "wrong error code",
}


def quote_request(report: bytes) -> bytes:
    """The framed request for a quote of ``report``, a TDREPORT of 1024 bytes; the service chooses the key."""
    if len(report) != REPORT_SIZE:
        raise LocalProtocolError(f"a TDREPORT has {REPORT_SIZE} bytes, not {len(report)}")
    size = _HEADER.size + _SIZES.size + len(report)
    header = _HEADER.pack(_MAJOR, _MINOR, _GET_QUOTE_REQ, size, 0)
    return size.to_bytes(FRAME_SIZE, "big") + header + _SIZES.pack(len(report), 0) + report


def message_size(frame: bytes) -> int:
    """The number of bytes after the four of ``frame``. Raises `RemoteProtocolError` for a size that no answer has."""
    size = int.from_bytes(frame, "big")
    if len(frame) != FRAME_SIZE or not _HEADER.size + _SIZES.size <= size <= MAX_MESSAGE:
        raise RemoteProtocolError(f"an answer of {size} bytes does not come from a quote generation service")
    return size


def read_quote(message: bytes) -> bytes:
    """The quote in an answer without its frame; the quote itself is not parsed.

    Raises `RemoteProtocolError`, with the service's own error where it has one.
    """
    if len(message) < _HEADER.size + _SIZES.size:
        raise RemoteProtocolError(f"its answer is cut off after {len(message)} bytes")
    major, minor, kind, size, error = _HEADER.unpack_from(message)
    # Other minor versions are compatible (qgs_msg_lib.cpp, qgs_msg_inflate_get_quote_resp).
    if major != _MAJOR:
        raise RemoteProtocolError(f"its answer is of version {major}.{minor}, not {_MAJOR}.x")
    if kind != _GET_QUOTE_RESP:
        raise RemoteProtocolError(f"its answer is of type {kind}, not {_GET_QUOTE_RESP} (GET_QUOTE_RESP)")
    if error:
        raise RemoteProtocolError(f"it made no quote: error {error:#x}, {_ERRORS.get(error, 'which is unknown')}")
    key_id_size, quote_size = _SIZES.unpack_from(message, _HEADER.size)
    start = _HEADER.size + _SIZES.size + key_id_size
    if not quote_size or not size == len(message) == start + quote_size:
        raise RemoteProtocolError(
            f"the sizes in its answer do not agree: {len(message)} bytes came, {size} are announced, {key_id_size} of"
            f" them a key id and {quote_size} a quote"
        )
    return message[start:]
