"""A nonce is redeemed once, in the same transaction as what it grants.

Redemptions are forgotten after a day, and then no nonce of that age is redeemed at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chutes_proto.codes import Code
from chutes_proto.errors import Refused, Unavailable
from chutes_proto.quote.terms import rfc3339
from chutes_proto.store.rows import NonceRow, RaiseHorizon, ReadHorizon, RedeemNonce, SweepNonces

if TYPE_CHECKING:
    from chutes_proto.store.run import Script

SKEW = 60
"""How far ahead of our clock a nonce may have been issued, in seconds."""

NONCE_KEPT_SECONDS = 86_400
NONCES_SWEPT = 100


def redeem_nonce(nonce: bytes, purpose: str, issued_at: int, now: int) -> Script[None]:
    """Redeem a nonce whose tag, age and purpose hold.

    Raises `Refused` for one that was redeemed or may have been, and `Unavailable` while the horizon lies ahead, as it
    does for a minute after a restore: then no nonce can be redeemed, and none is at fault.
    """
    horizon = yield from ReadHorizon()
    if horizon >= now:
        text = "No nonce can be redeemed now. Retry shortly."
        why = f"all nonces issued before {rfc3339(horizon)} are void, as after `chutes-proto store restored`"
        raise Unavailable(Code.STORE_UNAVAILABLE, text, retry_after=10, reason=f"{why}; boots wait until then")
    if issued_at <= horizon:
        raise _invalid(f"issued at {issued_at}, and the horizon is {horizon}")
    if not (yield from RedeemNonce(NonceRow(nonce, purpose, issued_at, now))):
        raise _invalid("redeemed before")
    swept = yield from SweepNonces(now - NONCE_KEPT_SECONDS, NONCES_SWEPT)
    if swept:
        yield from RaiseHorizon(max(row.issued_at for row in swept))


def _invalid(why: str) -> Refused:
    return Refused(Code.NONCE_INVALID, "Invalid nonce supplied", reason=f"nonce {why}")
