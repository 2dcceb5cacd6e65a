"""A simulated platform and everything that it needs to be verified, for the tests of this room."""

from __future__ import annotations

from typing import Any, Final

from chutes_proto.quote import _certificates as certificates
from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
from chutes_proto.quote._layout import parse_quote
from chutes_proto.quote._measurements import Profile
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._verify import SignedQuote, Verdict, check_signed, open_quote, verify_collateral, verify_genuine
from chutes_proto.testing._platform import BOOT_RTMRS, MRTD, RUNTIME_RTMRS, SimulatedPlatform

NOW: Final = 1_800_000_000
REPORT_DATA: Final = bytes(range(64))
PLATFORM: Final = SimulatedPlatform(b"the world of the verifier's tests")
TD15: Final = SimulatedPlatform(PLATFORM.seed, form="v5-td15")
ROOT: Final = TrustedRoot.from_der(PLATFORM.root_der)
PROFILE: Final = Profile(name="simulated", version="1", mrtd=MRTD, boot=BOOT_RTMRS, runtime=RUNTIME_RTMRS)


def forget() -> None:
    """Drop all that the verifier remembers of certificates and signatures."""
    for remembered in (certificates.read_certificate, ecdsa.load_point, ecdsa.recall, ecdsa.recall_raw):
        remembered.cache_clear()


def collateral_of(platform: SimulatedPlatform, now: int = NOW) -> Collateral:
    return Collateral.from_json(platform.collateral_json(now))


def signed_of(data: bytes, now: int = NOW) -> SignedQuote:
    return check_signed(open_quote(data, now=now, root=ROOT))


def verified_of(platform: SimulatedPlatform, now: int = NOW) -> VerifiedCollateral:
    return verify_collateral(collateral_of(platform, now), now=now, root=ROOT)


def with_certification(quote: bytes, kind: int, data: bytes) -> bytes:
    """The quote (version 4 or 5) with other certification data: no signature covers it, so only lengths follow."""
    parsed = parse_quote(quote)
    start = len(parsed.signed) + 4
    head = start + 128 + 6  # signature and attestation key, the header of the outer certification data
    fixed = head + 384 + 64 + 2 + len(parsed.qe_auth)
    inner = quote[head:fixed] + kind.to_bytes(2, "little") + len(data).to_bytes(4, "little") + data
    auth = quote[start : start + 128] + (6).to_bytes(2, "little") + len(inner).to_bytes(4, "little") + inner
    return quote[: start - 4] + len(auth).to_bytes(4, "little") + auth


def verdict_of(platform: SimulatedPlatform, *faults: str, now: int = NOW, **options: Any) -> Verdict:
    """The verdict on a quote with these faults; the collateral is as the faults make it, at ``now``."""
    platform = platform.having(*faults)
    quote = platform.quote(REPORT_DATA, **options)
    return verify_genuine(quote, collateral_of(platform, now), now=now, report_data=REPORT_DATA, root=ROOT)
