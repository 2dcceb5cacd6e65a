"""DER that is written is what the strict reader reads."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chutes_proto.auth import der
from chutes_proto.errors import LocalProtocolError
from chutes_proto.quote import _der as reader


def only(data: bytes) -> reader.Element:
    (element,) = reader.elements(data, 0, len(data))
    return element


@given(st.sampled_from([0x04, 0x30, 0x31, 0xA0]), st.lists(st.binary(max_size=200), max_size=3))
def test_elements_of_any_length(tag: int, content: list[bytes]) -> None:
    data = der.tlv(tag, *content)
    element = only(data)
    assert (element[0], reader.content(data, element)) == (tag, b"".join(content))


@pytest.mark.parametrize("size", [0, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x10000])
def test_lengths_are_in_their_shortest_form(size: int) -> None:
    data = der.octets(bytes(size))
    assert reader.content(data, only(data)) == bytes(size)


@given(st.integers(0, 1 << 160))
def test_integers(value: int) -> None:
    data = der.integer(value)
    assert int.from_bytes(reader.unsigned(data, only(data), size=21)) == value


def test_integers_below_zero() -> None:
    assert der.integer(-1) == bytes.fromhex("0201ff")
    with pytest.raises(reader.DerError, match="negative"):
        _ = reader.unsigned(der.integer(-1), only(der.integer(-1)), size=20)


@given(st.binary(max_size=300))
def test_bits(value: bytes) -> None:
    data = der.bits(value)
    assert reader.bits(data, only(data)) == value


@given(st.integers(0, 253_402_300_799))
@example(2_524_607_999)
@example(2_524_608_000)
def test_times(moment: int) -> None:
    data = der.time(moment)
    assert reader.time(data, only(data)) == moment
    assert (data[0] == reader.UTC_TIME) == (moment < 2_524_608_000)  # 2050


@pytest.mark.parametrize("moment", [-1, 253_402_300_800, 10**30])
def test_times_that_no_certificate_has(moment: int) -> None:
    with pytest.raises(LocalProtocolError, match="from 1970 to 9999"):
        _ = der.time(moment)


@pytest.mark.parametrize(
    ("dotted", "encoded"),
    [("2.5.4.3", "0603550403"), ("1.2.840.10045.4.3.2", "06082a8648ce3d040302"), ("2.999.3", "0603883703")],
)
def test_object_identifiers(dotted: str, encoded: str) -> None:
    """The last is the example of X.690, 8.19.5."""
    assert der.oid(dotted).hex() == encoded
