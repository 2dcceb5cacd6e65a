"""Report data, which binds a quote to one nonce and one TLS key.

The 64 bytes are the nonce (32) followed by SHA-256 of the DER SubjectPublicKeyInfo of the client certificate (32). Both
halves are compared in constant time, the nonce first.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Final

from chutes_proto.errors import BadRequest, LocalProtocolError, Refused
from chutes_proto.wire.codes import Code

if TYPE_CHECKING:
    from chutes_proto.auth.certificates import ClientKey

_HALF: Final = 32


def report_data(nonce: bytes, spki_sha256: bytes) -> bytes:
    """Make the 64 bytes of report data. Raises `LocalProtocolError` unless both halves have 32 bytes."""
    if len(nonce) != _HALF or len(spki_sha256) != _HALF:
        raise LocalProtocolError(f"report data is {_HALF} bytes of nonce and {_HALF} of digest")
    return nonce + spki_sha256


def check_report_data(quoted: bytes, nonce: bytes, key: ClientKey) -> None:
    """Compare a quote's 64 bytes of report data with the nonce and the client key.

    Raises `BadRequest` unless ``quoted`` begins with ``nonce``, then `Refused` unless it ends with the key's digest.
    """
    expected = report_data(nonce, key.digest)
    if not hmac.compare_digest(quoted[:_HALF], expected[:_HALF]):
        raise BadRequest(Code.NONCE_MISMATCH, "Quote nonce does not match expected nonce.")
    if not hmac.compare_digest(quoted[_HALF:], expected[_HALF:]):
        raise Refused(
            Code.CERTIFICATE_MISMATCH,
            "Invalid client certificate provided.",
            reason="the quote's report data binds another TLS key than the client certificate's",
        )
