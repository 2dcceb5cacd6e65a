"""Verify Intel TDX and SGX quotes, and appraise them. No I/O, no clock: bytes and times come from the caller.

    verdict = verify(quote, Collateral.load("collateral.json"), now=now, report_data=expected,
                     policy=Policy.load("policy.toml"))

`verify` returns only what the policy accepts, and raises `VerificationError` for everything else. `open_quote`,
`check_signed`, `verify_collateral`, `verify_quote` and `Policy.appraise` are its stages, for callers that keep verified
collateral for many quotes. The package can be taken out and used alone; only `Collateral.load` and `Policy.load` need
the rest of the project. The rules are in ``docs/reference/verification.md``.
"""

from typing import TYPE_CHECKING

from chutes_proto._lazy import lazily

if TYPE_CHECKING:
    from chutes_proto.quote._attested import (
        CertificateEvidence,
        CertificateEvidenceError,
        evidence_for,
        read_evidence,
        verify_certificate,
    )
    from chutes_proto.quote._attributes import AttributePolicy
    from chutes_proto.quote._behind import Behind, Lack
    from chutes_proto.quote._collateral import Collateral, CollateralDigests, CollateralIssue, VerifiedCollateral
    from chutes_proto.quote._errors import (
        AppraisalError,
        CollateralFormatError,
        PolicyError,
        QuoteError,
        QuoteFormatError,
        Refusal,
        VerificationError,
    )
    from chutes_proto.quote._eventlog import (
        Difference,
        Event,
        EventLog,
        EventLogFormatError,
        EventLogMismatchError,
        ReplayedLog,
        first_difference,
        parse_event_log,
        parse_event_log_json,
        replay,
    )
    from chutes_proto.quote._identity import IdentityPolicy
    from chutes_proto.quote._layout import (
        Header,
        PckReference,
        Quote,
        SgxAttributes,
        SgxReport,
        TdAttributes,
        TdReport10,
        TdReport15,
        TdReport15Ex,
        Xfam,
        parse_quote,
    )
    from chutes_proto.quote._measurements import (
        Profile,
        RegisterRule,
        Schedule,
        Stage,
        parse_profiles_json,
        parse_profiles_toml,
    )
    from chutes_proto.quote._pck import PckIdentity
    from chutes_proto.quote._policy import (
        AcceptedVerdict,
        AllOf,
        AnyOf,
        AnyPolicy,
        Policy,
        TcbPolicy,
        parse_policy_toml,
        verify,
    )
    from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
    from chutes_proto.quote._statements import Stated, TcbStatus
    from chutes_proto.quote._terms import Term
    from chutes_proto.quote._verify import (
        OpenedQuote,
        SignedQuote,
        Verdict,
        check_signed,
        open_quote,
        verify_collateral,
        verify_genuine,
        verify_quote,
    )
else:
    __getattr__ = lazily(
        globals(),
        {
            "chutes_proto.quote._attested": (
                "CertificateEvidence CertificateEvidenceError evidence_for read_evidence verify_certificate"
            ),
            "chutes_proto.quote._attributes": "AttributePolicy",
            "chutes_proto.quote._behind": "Behind Lack",
            "chutes_proto.quote._collateral": "Collateral CollateralDigests CollateralIssue VerifiedCollateral",
            "chutes_proto.quote._eventlog": (
                "Difference Event EventLog EventLogFormatError EventLogMismatchError ReplayedLog first_difference "
                "parse_event_log parse_event_log_json replay"
            ),
            "chutes_proto.quote._identity": "IdentityPolicy",
            "chutes_proto.quote._layout": (
                "Header PckReference Quote SgxAttributes SgxReport TdAttributes TdReport10 TdReport15 TdReport15Ex "
                "Xfam parse_quote"
            ),
            "chutes_proto.quote._measurements": (
                "Profile RegisterRule Schedule Stage parse_profiles_json parse_profiles_toml"
            ),
            "chutes_proto.quote._pck": "PckIdentity",
            "chutes_proto.quote._policy": (
                "AcceptedVerdict AllOf AnyOf AnyPolicy Policy TcbPolicy parse_policy_toml verify"
            ),
            "chutes_proto.quote._roots": "INTEL_ROOT TrustedRoot",
            "chutes_proto.quote._statements": "Stated TcbStatus",
            "chutes_proto.quote._terms": "Term",
            "chutes_proto.quote._verify": (
                "OpenedQuote SignedQuote Verdict check_signed open_quote verify_collateral verify_genuine verify_quote"
            ),
            "chutes_proto.quote._errors": (
                "AppraisalError CollateralFormatError PolicyError QuoteError QuoteFormatError Refusal VerificationError"
            ),
        },
    )

__all__ = ["check_signed", "open_quote", "verify", "verify_collateral", "verify_genuine", "verify_quote"]
__all__ += ["CertificateEvidence", "CertificateEvidenceError", "evidence_for", "read_evidence", "verify_certificate"]
__all__ += ["Behind", "CollateralDigests", "CollateralIssue", "Lack", "Stated", "Term"]
__all__ += ["Collateral", "OpenedQuote", "PckIdentity", "SignedQuote", "TcbStatus", "Verdict", "VerifiedCollateral"]
__all__ += ["AcceptedVerdict", "AllOf", "AnyOf", "AnyPolicy", "Policy", "Stage", "parse_policy_toml"]
__all__ += [
    "AttributePolicy",
    "IdentityPolicy",
    "Profile",
    "RegisterRule",
    "Schedule",
    "TcbPolicy",
    "parse_profiles_json",
    "parse_profiles_toml",
]
__all__ += ["Header", "PckReference", "Quote", "SgxAttributes", "SgxReport", "TdAttributes"]
__all__ += ["TdReport10", "TdReport15", "TdReport15Ex", "Xfam"]
__all__ += ["INTEL_ROOT", "TrustedRoot", "parse_quote"]
__all__ += ["Difference", "Event", "EventLog", "ReplayedLog"]
__all__ += ["first_difference", "parse_event_log", "parse_event_log_json", "replay"]
__all__ += ["AppraisalError", "CollateralFormatError", "EventLogFormatError", "EventLogMismatchError", "PolicyError"]
__all__ += ["QuoteError", "QuoteFormatError", "Refusal", "VerificationError"]
