"""The messages of Intel's quote generation service: what is sent byte for byte, and what is taken of an answer."""

from __future__ import annotations

import struct

import pytest

from chutes_proto.errors import LocalProtocolError, RemoteProtocolError
from chutes_proto.transport.qgs import MAX_MESSAGE, message_size, quote_request, read_quote
from tests.qgs import qgs_answer

QUOTE = bytes(range(200))


def test_a_request_byte_for_byte() -> None:
    report = bytes(range(256)) * 4
    header = "0000 0418  0100 0100 00000000 18040000 00000000  00040000 00000000"
    assert quote_request(report) == bytes.fromhex(header) + report


@pytest.mark.parametrize("size", [0, 64, 1023, 1025])
def test_only_a_report_is_sent(size: int) -> None:
    with pytest.raises(LocalProtocolError, match="a TDREPORT has 1024 bytes"):
        _ = quote_request(bytes(size))


@pytest.mark.parametrize(("key_id", "minor"), [(b"", 0), (b"", 1), (b"", 7), (bytes(16), 1)])
def test_the_quote_stands_behind_the_key_id(key_id: bytes, minor: int) -> None:
    framed = qgs_answer(QUOTE, key_id=key_id, minor=minor)
    assert message_size(framed[:4]) == len(framed) - 4
    assert read_quote(framed[4:]) == QUOTE


@pytest.mark.parametrize("size", [0, 16, 23, MAX_MESSAGE + 1, 2**32 - 1])
def test_an_answer_of_a_size_that_none_has(size: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"an answer of {size} bytes"):
        _ = message_size(size.to_bytes(4, "big"))
    with pytest.raises(RemoteProtocolError):
        _ = message_size(bytes(3))


def answer(major: int = 1, kind: int = 1, size: int = 124, error: int = 0, key_id: int = 0, quote: int = 100) -> bytes:
    return struct.pack("<HHIIIII", major, 1, kind, size, error, key_id, quote) + bytes(100)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (answer()[:23], "cut off after 23 bytes"),
        (answer(major=2), "of version 2.1, not 1.x"),
        (answer(kind=0), "of type 0"),
        (answer(kind=3), "of type 3"),
        (answer(error=0x12001), "error 0x12001, unexpected error"),
        (answer(error=0x12003, size=24, quote=0), "error 0x12003, wrong parameter"),
        (answer(error=0xFFFFFFFF), "error 0xffffffff, which is unknown"),
        (answer(size=123), "do not agree: 124 bytes came, 123 are announced"),
        (answer(size=125), "do not agree"),
        (answer(quote=99), "do not agree"),
        (answer(quote=101), "do not agree"),
        (answer(quote=0), "do not agree"),
        (answer(key_id=100, quote=0), "do not agree"),
        (answer(key_id=1), "do not agree"),
        (answer(key_id=2**32 - 1, quote=101), "do not agree"),
        (answer() + b"x", "do not agree"),
    ],
)
def test_what_is_no_quote(message: bytes, told: str) -> None:
    with pytest.raises(RemoteProtocolError, match=told):
        _ = read_quote(message)
    assert read_quote(answer()) == bytes(100)
