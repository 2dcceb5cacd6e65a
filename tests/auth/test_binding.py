"""Report data binds a nonce and a key; both are checked, the nonce first."""

from __future__ import annotations

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.auth.binding import check_report_data, report_data
from chutes_proto.auth.certificates import client_key
from chutes_proto.auth.client_identity import make_client_identity
from chutes_proto.errors import BadRequest, LocalProtocolError, Refusal, Refused
from chutes_proto.wire.codes import Code

KEY = client_key(x509.load_pem_x509_certificate(make_client_identity(0, bytes(32)).certificate_pem))
NONCE = bytes(range(32))
GOOD = report_data(NONCE, KEY.digest)


def test_layout() -> None:
    assert report_data(NONCE, KEY.digest) == NONCE + KEY.digest
    check_report_data(GOOD, NONCE, KEY)


@pytest.mark.parametrize(("nonce", "digest"), [(NONCE[1:], KEY.digest), (NONCE, KEY.digest + b"\0"), (b"", b"")])
def test_halves_have_their_size(nonce: bytes, digest: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        report_data(nonce, digest)


@given(st.integers(0, 511))
def test_every_bit_counts(bit: int) -> None:
    quoted = bytearray(GOOD)
    quoted[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Refusal) as refusal:
        check_report_data(bytes(quoted), NONCE, KEY)
    if bit < 256:
        assert isinstance(refusal.value, BadRequest)
        assert refusal.value.code is Code.NONCE_MISMATCH
        assert refusal.value.detail == "Quote nonce does not match expected nonce."
    else:
        assert isinstance(refusal.value, Refused)
        assert refusal.value.code is Code.CERTIFICATE_MISMATCH
        assert refusal.value.detail == "Invalid client certificate provided."


def test_the_nonce_is_checked_first() -> None:
    with pytest.raises(BadRequest):
        check_report_data(bytes(64), NONCE, KEY)


@given(st.binary(max_size=80).filter(lambda data: data != GOOD))
def test_anything_else_is_refused(quoted: bytes) -> None:
    with pytest.raises(Refusal):
        check_report_data(quoted, NONCE, KEY)


def test_longer_report_data_is_refused() -> None:
    with pytest.raises(Refused):
        check_report_data(GOOD + b"\0", NONCE, KEY)
