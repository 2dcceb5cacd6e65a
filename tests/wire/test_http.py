"""Addresses as limits count them."""

import pytest

from chutes_proto.wire.http import address_prefix


@pytest.mark.parametrize(
    ("address", "prefix"),
    [
        ("", b""),
        ("192.0.2.7", bytes([192, 0, 2, 7])),
        ("2001:db8::1", bytes.fromhex("20010db800000000")),
        ("not an address", b"not an address"),
    ],
)
def test_a_limit_counts_one_host(address, prefix):
    assert address_prefix(address) == prefix
