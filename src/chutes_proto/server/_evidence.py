"""Verification and appraisal of a quote as evidence of an approved TD that holds a TLS key, in this order of checks:

1. the nonce: shape, tag, age, binding (`_nonces.py`), or for the volumes of a two-phase boot that boot's
   (`_rotation.py`); the client certificate's key;
2. base64 and the quote's structure;
3. report data: the nonce, then the key;
4. the PCK chain up to the trusted root and the quote's signatures; only then collateral for its platform; then the
   quote against it. Collateral that is not current, or not this platform's, is a fault of ours (503);
5. TCB status and attributes against the policy;
6. measurements against the accepted profiles.

Nothing here writes or consumes. Texts are those that deployed clients print; the exact reason is for the operator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

from attrs import frozen
from msgspec.structs import asdict

from chutes_proto._proof import NoTruthValue
from chutes_proto.auth.binding import check_report_data
from chutes_proto.auth.certificates import ClientKey
from chutes_proto.auth.hotkey import Hotkey
from chutes_proto.effects import FetchCollateral, Flow, Now
from chutes_proto.errors import CollateralUnavailable, Refused, Unavailable
from chutes_proto.log import Value
from chutes_proto.quote import _steps as steps
from chutes_proto.quote._collateral import CollateralDigests, CollateralIssue, VerifiedCollateral
from chutes_proto.quote._errors import AppraisalError, QuoteFormatError, VerificationError
from chutes_proto.quote._layout import parse_quote
from chutes_proto.quote._measurements import Profile, Stage
from chutes_proto.quote._policy import AcceptedVerdict
from chutes_proto.quote._terms import check_terms
from chutes_proto.quote._verify import Verdict, check_signed, open_quote, verify_quote
from chutes_proto.server._grounds import grounds, platform_of, refusal_code
from chutes_proto.server._service import Service
from chutes_proto.store._rows import Platform
from chutes_proto.units.records import AcceptedQuote, Kept
from chutes_proto.wire import json
from chutes_proto.wire.codec import decode_quote
from chutes_proto.wire.codes import Code

_NOT_VERIFIED = "Unable to parse provided quote for verification."
OURS = (
    steps.CertificateNotYetValidError,
    steps.RootMismatchError,
    steps.CollateralTeeError,
    steps.CollateralCaError,
    steps.FmspcMismatchError,
    steps.PceIdMismatchError,
    steps.PckChainMismatchError,
)
"""A clock of ours that is behind, or collateral that is not this platform's: no VM could mend it."""
_NOT_EXPECTED = "Quote does not match expected measurements. Ensure you are running a supported VM."


@frozen
class Evidence(NoTruthValue):
    """A quote that verified: steps 1 to 4 hold. `appraise` decides whether it is accepted."""

    verdict: Verdict
    quote: bytes

    @property
    def quote_digest(self) -> bytes:
        """SHA-256 of the quote."""
        return hashlib.sha256(self.quote).digest()

    @property
    def platform(self) -> Platform:
        """The platform that the quote comes from."""
        return platform_of(self.verdict)

    @property
    def tcb_status(self) -> str:
        """The status of the platform's TCB."""
        return str(self.verdict.tcb_status)

    def accepted(self, profile: Profile, rested_on: str) -> AcceptedQuote:
        """The quote as rows name it, accepted under ``profile``."""
        names = (profile.name, profile.version, self.tcb_status)
        pin = self.platform.pin
        return AcceptedQuote(self.quote_digest, pin, *names, advisories=self.advisories, rested_on=rested_on)

    @property
    def kept(self) -> Kept:
        """The parts that are kept, to be appraised again."""
        return Kept(self.quote, _kept_collateral(self.verdict.collateral, self.verdict.verified.digests))

    def grounds(self, service: Service, stage: Stage, outcome: str, *, hotkey_proven: bool | None) -> str:
        """The grounds of a decision on it, for the audit row."""
        return grounds(self.verdict, service.documents, stage, outcome, hotkey_proven=hotkey_proven)

    @property
    def advisories(self) -> str:
        """Intel's advisories that apply to the platform, with a space between."""
        return " ".join(self.verdict.advisory_ids)

    def fields(self, service: Service) -> dict[str, Value]:
        """The fields of a log line about a grant for this quote."""
        return {"tcb_status": self.tcb_status, "platform": str(self.platform.pin), "trust": service.trust}


@lru_cache(maxsize=64)
def _kept_collateral(issue: CollateralIssue, digests: CollateralDigests) -> str:
    """The part that is kept of collateral, as JSON: the same for all quotes that it verifies, so it is made once."""
    sha256 = {name: value.hex() for name, value in asdict(digests).items()}
    return json.encode({**asdict(issue), "sha256": sha256}).decode()


def verify_evidence(service: Service, nonce: bytes, key: ClientKey, quote_text: str, now: int) -> Flow[Evidence]:
    """Verify a quote over ``nonce`` (32 bytes): steps 2 to 4. Raises `Refused`; `Unavailable` for a fault of ours."""
    data = decode_quote(quote_text)
    try:
        claimed = parse_quote(data)
    except QuoteFormatError as exc:
        raise Refused(Code.QUOTE_MALFORMED, _format_text(exc), reason=str(exc)).because(exc) from None
    check_report_data(claimed.body.report_data, nonce, key)
    try:
        opened = open_quote(data, now=now, root=service.root)
        signed = check_signed(opened)
        with service.verifications.of((opened.pck.fmspc, opened.pck.ca)):
            collateral = yield from FetchCollateral(opened.pck, now)
            if collateral.issuer_point != opened.chain.issuer.point:  # the PCK CA may have a new key
                collateral = yield from FetchCollateral(opened.pck, now, instead_of=collateral)
        now = yield from Now()  # collateral may be younger than the request
        _check_current(collateral, now)
        verdict = verify_quote(signed, collateral, now=now, report_data=None)  # compared above
    except VerificationError as exc:
        if isinstance(exc, OURS):
            raise _no_collateral(f"{exc.code}: {exc}").because(exc) from None
        text = _NOT_VERIFIED + _part(exc)
        raise Refused(Code.QUOTE_REJECTED, text, reason=f"{exc.code}: {exc}").because(exc) from None
    except CollateralUnavailable as exc:
        raise _no_collateral(str(exc)) from None
    return Evidence(verdict, data)


def _check_current(collateral: VerifiedCollateral, now: int) -> None:
    """Raise `Unavailable` for collateral that expired while it was fetched; the next request fetches it again."""
    try:
        check_terms(collateral.terms, now, collateral.grace)
    except VerificationError as exc:
        raise _no_collateral(f"{exc.code}: {exc}").because(exc) from None


def _no_collateral(reason: str) -> Unavailable:
    text = "No collateral for this platform now. Retry shortly."
    return Unavailable(Code.COLLATERAL_UNAVAILABLE, text, reason=reason, retry_after=10)


def appraise(
    service: Service,
    evidence: Evidence,
    stage: Literal["boot", "runtime"],
    claimed: str,
    proven: Callable[[], Hotkey] | None = None,
) -> AcceptedVerdict:
    """Appraise evidence (steps 5 and 6). Raises `Refused`; its reason lists all differences, got and expected.

    ``claimed`` is the hotkey that the caller names; ``proven`` returns the one that it proves, or raises `Refused`.
    Raises `Unavailable` where the policy refuses the collateral: no VM could mend it.
    """
    try:
        return service.rules.accept(evidence.verdict, stage, claimed, proven)
    except AppraisalError as exc:
        reason = "; ".join([*getattr(exc, "__notes__", ()), str(exc)])
        match refusal_code(exc):
            case None:
                raise _no_collateral(reason).because(exc) from None
            case Code.TCB_REJECTED as code:
                text = f"{_NOT_VERIFIED} (TCB status)"
            case Code.ATTRIBUTES_REJECTED as code:
                text = f"{_NOT_VERIFIED} (attributes)"
            case code:
                registers = [refusal.register for refusal in exc.refusals if refusal.register]
                text = _NOT_EXPECTED + (f" ({registers[0]})" if registers else "")
        raise Refused(code, text, reason=reason).because(exc) from None


def _part(error: VerificationError) -> str:
    """The end of a refusal's text: deployed clients print no code, and an operator asks first which of these it was."""
    match error:
        case steps.UntrustedRootError():
            return " (root)"
        case steps.TcbNotSupportedError() | steps.TcbRevokedError():
            return " (TCB status)"
        case _:
            return " (signature)"


def _format_text(error: QuoteFormatError) -> str:
    """The text that a deployed client prints for a quote that does not parse."""
    match error.code:
        case "quote_too_short":
            return f"Quote too short: {error.got} bytes"
        case "quote_version":
            return f"Invalid quote version: {error.got} (expected 4 or 5)"
        case "quote_tee_type":
            return f"Invalid TEE type: {error.got:08x} (expected 0x81 for TDX)"
        case "quote_key_type":
            return f"Invalid attestation key type: {error.got}"
        case _:
            return "Failed to parse quote: its structure is not that of a TDX quote"
