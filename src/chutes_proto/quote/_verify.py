"""Verify that a quote is genuine, of a genuine platform, and find its TCB status.

    opened = open_quote(data, now=now)                               opened.pck: which collateral to ask for
    signed = check_signed(opened)                                    the platform made this quote
    verified = verify_collateral(collateral, now=now)                once for many quotes
    verdict = verify_quote(signed, verified, now=now, report_data=expected)
                                                                     the result; or all at once: verify_genuine(…)

Rules kept here:

* each stage returns a value that only it can make, and takes the value of the one before: what did not verify cannot
  look like what did. A quote goes in as bytes, so that what is read of it is what its signature is over;
* the numbers beside the checks are those of ``_steps.py``; ``docs/reference/verification.md`` has the rules;
* ``now`` is the caller's clock in unix seconds, and all times are checked against it in every stage;
* no chain is built: three certificates with fixed places, names compared as DER, the root pinned by its key;
* what was verified may be remembered, by the DER of certificates and all other bytes that were: a check that passed
  for them passes for them always.
  Times, CRLs, identities and TCB levels are not remembered; nor is what was refused.

A verdict does not say that the quote is acceptable: a policy decides that, and ``verify`` of ``_policy.py`` returns
nothing that a policy did not accept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from hashlib import sha256
from hmac import compare_digest
from typing import TYPE_CHECKING, ClassVar, Final, Protocol, TypeVar

from attrs import evolve, field, frozen
from msgspec import Struct

from chutes_proto._lazy import LazyModule
from chutes_proto._proof import PROOF, Proven
from chutes_proto.quote import _certificates as certificates
from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.quote import _layout as layout
from chutes_proto.quote import _statements as statements
from chutes_proto.quote import _steps as steps
from chutes_proto.quote._arguments import BytesLike, as_bytes, check_flag, check_kind
from chutes_proto.quote._certificates import Certificate, Kind
from chutes_proto.quote._collateral import Collateral, CollateralDigests, CollateralIssue, VerifiedCollateral
from chutes_proto.quote._der import DerError
from chutes_proto.quote._ecdsa import EllipticCurvePublicKey
from chutes_proto.quote._layout import Quote, SgxReport, Tee
from chutes_proto.quote._pck import Ca, PckIdentity, read_pck_extension
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot, check_self_signed
from chutes_proto.quote._statements import QeIdentity, Stated, TcbStatus
from chutes_proto.quote._steps import Checked, checked
from chutes_proto.quote._strict_json import JsonError
from chutes_proto.quote._tcb import assess
from chutes_proto.quote._terms import Term, Window, check_duration, check_seconds, check_terms, window

if TYPE_CHECKING:
    from chutes_proto.quote import _behind as behind
    from chutes_proto.quote import _plain as plain
    from chutes_proto.quote import _supplemental as supplemental
else:  # a verdict is verified more often than it is explained
    behind = LazyModule("chutes_proto.quote._behind")
    plain = LazyModule("chutes_proto.quote._plain")
    supplemental = LazyModule("chutes_proto.quote._supplemental")

T = TypeVar("T")

_OF_CERTIFICATES: Final = (4, 5, 7, 8)
"""The steps that a certificate takes, but for its times."""


class _Notes:
    """The checks of a remembered value: new for the first caller, marked as remembered for all others."""

    __slots__ = ("_again", "_first", "_notes")

    def __init__(self, *notes: Checked) -> None:
        self._notes = notes
        self._first: Iterator[tuple[Checked, ...]] = iter((notes,))
        self._again: tuple[Checked, ...] = ()

    def take(self) -> tuple[Checked, ...]:
        notes = next(self._first, self._again)
        if not notes:
            notes = self._again = tuple(checked(n.subject, *n.steps, remembered=True) for n in self._notes)
        return notes


class PckChain(Struct, frozen=True, eq=False):
    """A PCK certificate that its CA links to the root; ``chain`` is both in DER, without the root."""

    leaf: Certificate
    leaf_key: EllipticCurvePublicKey
    issuer: Certificate
    chain: tuple[bytes, ...]
    identity: PckIdentity
    terms: tuple[Term, ...]
    window: Window
    notes: _Notes


@frozen(kw_only=True, eq=False)
class OpenedQuote(Proven):
    """A quote whose PCK chain leads to the root. The quote itself is not verified yet.

    ``pck`` says which platform it claims to be of, and so what collateral to ask for.
    """

    quote: Quote
    pck: PckIdentity
    root: TrustedRoot
    chain: PckChain
    checked: tuple[Checked, ...]


@frozen(kw_only=True, eq=False)
class SignedQuote(Proven):
    """A quote made by the platform of its PCK certificate. Collateral says how up to date that platform is.

    ``qe_report`` is the report of the quoting enclave that signed it.
    """

    opened: OpenedQuote
    qe_report: SgxReport
    checked: tuple[Checked, ...]


@frozen(kw_only=True, eq=False)
class Verdict(Proven):
    """A genuine quote of a genuine platform; ``tcb_status`` says how up to date its TCB is.

    That does not make it acceptable: its host may debug the TD, the image may be any, and the platform out of date.
    `Policy.appraise` decides; a verdict has no truth value, so that no ``if`` mistakes it for a decision.

    Revoked TCBs have no verdict. ``advisory_ids`` are those of all parts; levels that are up to date may have some too.
    ``tcb_date`` (unix seconds) is the earliest date of the parts' levels; ``platform``, ``module`` and ``qe`` are the
    levels at launch, ``current_status`` is of the TCB at present where the report has it. ``collateral`` has the
    numbers and dates of the collateral, ``tcb_info_version`` is the version of the TCB info's form. ``window`` is when
    all that was used is valid (unix seconds, inclusive, no grace), ``verified_at`` the caller's ``now``. ``checked``
    says which steps each piece passed, in the order of the stages; a step that had nothing to check is not there.
    ``current_advisory_ids`` are those of the TCB at present. ``signed`` and ``verified`` are the results of the stages.
    """

    quote: Quote
    pck: PckIdentity
    tcb_status: TcbStatus
    current_status: TcbStatus | None
    advisory_ids: tuple[str, ...]
    current_advisory_ids: tuple[str, ...]
    tcb_date: int
    platform: Stated
    module: Stated | None
    qe: Stated
    collateral: CollateralIssue
    tcb_info_version: int
    window: Window
    verified_at: int
    root: TrustedRoot
    checked: tuple[Checked, ...]
    signed: SignedQuote = field(repr=False)
    verified: VerifiedCollateral = field(repr=False)
    _instead: ClassVar[str] = (
        "the quote is genuine, which a policy may still refuse; call verify(..., policy=...), or Policy.appraise with"
        " this verdict"
    )

    def behind(self) -> tuple[behind.Behind, ...]:
        """Find the parts whose TCB is behind: what each lacks for its next level, since when, with which advisories."""
        verified, qe_report = self.verified, self.signed.qe_report
        reached = self.platform, self.module, self.qe
        body = self.quote.body
        return behind.behind(verified.tcb_info, verified.qe_identity, self.pck, body, qe_report, reached)

    def supplemental(self) -> dict[str, object]:
        """Make the supplemental data of Intel's Quote Verification Enclave, by its names."""
        return supplemental.supplemental(self)

    def to_dict(self) -> dict[str, object]:
        """Make plain data for JSON: bytes in lowercase hex, times in unix seconds."""
        return plain.verdict_fields(self)

    @property
    def evaluation_number(self) -> int:
        """The lower TCB evaluation data number of TCB info and QE identity."""
        return self.collateral.evaluation_number

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of all steps that were taken, in order."""
        return tuple(sorted({number for piece in self.checked for number in piece.steps}))


def open_quote(
    data: BytesLike,
    *,
    now: int,
    root: TrustedRoot = INTEL_ROOT,
    sgx: bool = False,
    pck_certificate_chain: bytes | None = None,
) -> OpenedQuote:
    """Parse a quote and verify its PCK chain up to the root (steps 1 to 11, and 26 for a chain beside the quote).

    ``data`` are the bytes of a TDX quote, with ``sgx`` also those of an SGX quote (`parse_quote` reads both). ``now``
    is in whole unix seconds. ``pck_certificate_chain`` (PEM, leaf first) is for quotes whose certification data is not
    a chain: an encrypted PPID, whose CPUSVN, PCESVN and PCE-ID must be the certificate's, or the certificate alone
    (types 2, 3 and 4). A quote that has a chain is verified by its own. Raises `VerificationError`; `TypeError` for
    arguments of another type, a parsed quote among them.
    """
    check_seconds("now", now)
    check_kind("root", root, TrustedRoot, "a TrustedRoot, as of TrustedRoot.from_der")
    check_flag("sgx", sgx)
    if pck_certificate_chain is not None:
        pck_certificate_chain = as_bytes(pck_certificate_chain, "a PEM chain in bytes", "pck_certificate_chain")
    quote = layout.parse_quote(data, sgx=sgx)
    if quote.header.qe_vendor_id != layout.INTEL_VENDOR_ID:  # 1
        raise steps.QeVendorError(
            "quote", "the vendor does not match", got=quote.header.qe_vendor_id, expected=layout.INTEL_VENDOR_ID
        )
    if quote.certification_type == layout.CERTIFICATION_PCK_CHAIN:  # 2
        certification, beside = quote.certification, False
    elif quote.certification_type in _NEEDS_CHAIN and pck_certificate_chain is not None:
        certification, beside = pck_certificate_chain, True
    else:
        problem = "unsupported type of certification data"
        if quote.certification_type in _NEEDS_CHAIN:
            problem = "the PCK chain is not in the quote, and not given beside it"
        got, expected = quote.certification_type, layout.CERTIFICATION_PCK_CHAIN
        raise steps.CertificationTypeError("quote", problem, got=got, expected=expected)
    chain = _pck_chain(root, quote.tee, _read_chain(certification, "PCK chain", 2))  # 3-8, 11
    check_terms(chain.terms, now)  # 9, 10
    notes = (_OPENED, *chain.notes.take(), _CHAIN_TIMES)
    if beside:
        _check_names(quote, chain)  # 26
        notes = (*notes, _NAMED)
    return OpenedQuote(quote=quote, pck=chain.identity, root=root, chain=chain, checked=notes, proof=PROOF)


def _check_names(quote: Quote, chain: PckChain) -> None:
    """Step 26 for a chain beside the quote: it is of the PCK certificate that the certification data names."""
    pck = chain.identity
    reference = quote.pck_reference
    if reference is None:  # type 4
        try:
            named = certificates.read_pem(quote.certification)
        except DerError as exc:
            raise steps.ChainFormError("certification data", str(exc)) from None
        if named != chain.chain[:1]:
            raise steps.PckChainMismatchError("PCK chain beside the quote", "the quote has another PCK certificate")
        return
    for name, got, expected in (
        ("CPUSVN", pck.cpu_svn, reference.cpu_svn),
        ("PCESVN", pck.pce_svn, reference.pce_svn),
        ("PCE-ID", pck.pce_id, reference.pce_id),
    ):
        if got != expected:
            problem = f"its {name} is not that of the certification data"
            raise steps.PckChainMismatchError("PCK chain beside the quote", problem, got=got, expected=expected)


def check_signed(opened: OpenedQuote) -> SignedQuote:
    """Verify without collateral that the platform made the quote, up to date or not (steps 28 to 30 and 33).

    Call it before collateral is fetched: otherwise anyone who knows the platform's certificates, which are not secret,
    could cause the fetch. Raises `VerificationError`; `TypeError` for anything but an `OpenedQuote`.
    """
    check_kind("opened", opened, OpenedQuote, "an OpenedQuote, as of open_quote")
    quote = opened.quote
    qe_report, attestation_key, notes = _quoting_enclave(
        opened.chain, quote.qe_report_bytes, quote.qe_report_signature, quote.qe_auth, quote.attestation_key
    )  # 28-30
    try:
        ecdsa.verify_raw(attestation_key, quote.signature, quote.signed)  # 33
    except ecdsa.InvalidSignature:
        raise steps.QuoteSignatureError("quote", "the attestation key did not sign it") from None
    passed = (*opened.checked, *notes.take(), _SIGNED)
    return SignedQuote(opened=opened, qe_report=qe_report, checked=passed, proof=PROOF)


def verify_collateral(
    collateral: Collateral, *, now: int, root: TrustedRoot = INTEL_ROOT, grace: int = 0
) -> VerifiedCollateral:
    """Verify CRLs, TCB info, QE identity and the chains of their signers (steps 3 to 10 and 12 to 20).

    ``grace`` seconds are added to the end of CRLs, TCB info and QE identity, never to a certificate's. ``now`` and
    ``grace`` are whole numbers. Raises `VerificationError`; `TypeError` for arguments of another type, `ValueError` for
    a negative grace.
    """
    check_seconds("now", now)
    return _collateral(collateral, now, root, grace)


def authenticate_collateral(
    collateral: Collateral, *, root: TrustedRoot = INTEL_ROOT, grace: int = 0
) -> VerifiedCollateral:
    """Verify collateral but for its times: `verify_collateral` without steps 9, 10, 19 and 20.

    For callers that ask when it is valid; ``verify_quote`` checks all times in any case. Raises `VerificationError`;
    `TypeError` for a root or a grace of another type.
    """
    return _collateral(collateral, None, root, grace)


def _collateral(collateral: Collateral, now: int | None, root: TrustedRoot, grace: int) -> VerifiedCollateral:
    check_kind("collateral", collateral, Collateral, "a Collateral, as of Collateral.load")
    check_kind("root", root, TrustedRoot, "a TrustedRoot, as of TrustedRoot.from_der")
    check_duration("grace", grace)
    of_pck_crl = _read_signers(collateral.pck_crl_issuer_chain, _PCK_CA)  # 3
    issuer, issuer_key, issuer_terms, issuer_notes = _signer(root, of_pck_crl, _PCK_CA)  # 4-8
    of_tcb_info = _read_signers(collateral.tcb_info_issuer_chain, _TCB_SIGNER)  # 3
    tcb_signer, tcb_key, tcb_terms, tcb_notes = _signer(root, of_tcb_info, _TCB_SIGNER)  # 4-8
    of_qe_identity = _read_signers(collateral.qe_identity_issuer_chain, _TCB_SIGNER)  # 3
    qe_signer, qe_key, qe_terms, qe_notes = _signer(root, of_qe_identity, _TCB_SIGNER)  # 4-8
    certificate_terms = (*issuer_terms, *tcb_terms, *qe_terms)
    if now is not None:
        check_terms(certificate_terms, now)  # 9, 10
    root_crl, revoked_by_root = _crl(collateral.root_ca_crl, "root CRL", root.name, _root_key(root))  # 12-14
    pck_crl, revoked_pcks = _crl(collateral.pck_crl, "PCK CRL", issuer.subject, issuer_key)
    _check_not_revoked("root certificate", root.serial, revoked_by_root)  # 15
    for certificate, place in ((issuer, _PCK_CA), (tcb_signer, _TCB_SIGNER), (qe_signer, _TCB_SIGNER)):
        _check_not_revoked(place.subject, certificate.serial, revoked_by_root)
    _check_stated("TCB info", collateral.tcb_info, collateral.tcb_info_signature, tcb_key)  # 16
    _check_stated("QE identity", collateral.qe_identity, collateral.qe_identity_signature, qe_key)
    tcb_info = _statement("TCB info", collateral.tcb_info, statements.read_tcb_info)  # 17, 18
    qe_identity = _statement("QE identity", collateral.qe_identity, statements.read_qe_identity)
    if qe_identity.tee != tcb_info.tee:  # 18
        raise steps.StatementKindError(
            "QE identity", "it is of another TEE", got=qe_identity.tee, expected=tcb_info.tee
        )
    terms = (
        *certificate_terms,
        Term("root CRL", root_crl.this_update, root_crl.next_update),
        Term("PCK CRL", pck_crl.this_update, pck_crl.next_update),
        Term("TCB info", tcb_info.issued, tcb_info.next_update),
        Term("QE identity", qe_identity.issued, qe_identity.next_update),
    )
    if now is not None:
        check_terms(terms, now, grace)  # 19, 20
    beside = collateral.pck_certificate_chain
    return VerifiedCollateral(
        root=root,
        ca=_ca(issuer),
        tcb_info=tcb_info,
        qe_identity=qe_identity,
        issuer_name=issuer.subject,
        issuer_point=issuer.point,
        revoked_by_root=revoked_by_root,
        revoked_pcks=revoked_pcks,
        issue=CollateralIssue(
            tcb_info.evaluation_number,
            qe_identity.evaluation_number,
            root_crl.number,
            pck_crl.number,
            tcb_info.issued,
            qe_identity.issued,
            root_crl.this_update,
            pck_crl.this_update,
        ),
        digests=CollateralDigests.of(collateral),
        pck_chain=None if beside is None else _read_chain(beside, "PCK chain beside the collateral", 2),
        terms=terms,
        window=window(terms),
        grace=grace,
        checked=(
            *issuer_notes.take(),
            *tcb_notes.take(),
            *qe_notes.take(),
            *_COLLATERAL,
            *(() if now is None else _COLLATERAL_TIMES),
        ),
        proof=PROOF,
    )


def verify_quote(signed: SignedQuote, verified: VerifiedCollateral, *, now: int, report_data: bytes | None) -> Verdict:
    """Verify a quote by collateral of its platform (steps 9, 10, 15, 19 to 27, 31, 32 and 34 to 37).

    ``now`` is in whole unix seconds. ``report_data`` is as for `verify_genuine`: None only if something else binds the
    quote to the peer. Raises `VerificationError`; `TypeError` for arguments of another type.
    """
    check_kind("signed", signed, SignedQuote, "a SignedQuote, as of check_signed")
    check_kind("verified", verified, VerifiedCollateral, "a VerifiedCollateral, as of verify_collateral")
    check_seconds("now", now)
    _check_expected(report_data)
    _check_belongs(signed.opened, verified, now)
    return _judge(signed, verified, now, report_data)


def foresee(verdict: Verdict, *, at: int) -> Verdict:
    """The verdict on the same quote at another time, if its collateral is renewed by then and says the same.

    For plans: what was verified is a quote of the past. Raises `VerificationError` where a certificate is not valid at
    that time (steps 9 and 10), and `TypeError` unless ``at`` is an integer.
    """
    terms = [*verdict.signed.opened.chain.terms, *verdict.verified.terms]
    certificates_of = [term for term in terms if term.is_certificate]
    check_terms(certificates_of, at)
    return evolve(verdict, verified_at=at, window=window(certificates_of), proof=PROOF)


def certificates_end(verdict: Verdict) -> int:
    """The last second at which `foresee` finds all certificates valid."""
    terms = (*verdict.signed.opened.chain.terms, *verdict.verified.terms)
    return window(term for term in terms if term.is_certificate)[1]


def _check_belongs(opened: OpenedQuote, verified: VerifiedCollateral, now: int) -> None:
    """Steps 9, 10, 15 and 19 to 27: the collateral is this platform's, and both are valid now."""
    quote, chain, pck = opened.quote, opened.chain, opened.pck
    info = verified.tcb_info
    if verified.root != opened.root:  # 21
        raise steps.RootMismatchError("collateral", "it was verified under another root than the quote")
    check_terms(chain.terms, now)  # 9, 10
    check_terms(verified.terms, now, verified.grace)  # 9, 10, 19, 20
    if info.tee != quote.tee:  # 22
        raise steps.CollateralTeeError("collateral", "it is for another TEE", got=info.tee, expected=quote.tee)
    if (chain.issuer.subject, chain.issuer.point) != (verified.issuer_name, verified.issuer_point):  # 23
        raise steps.CollateralCaError("PCK CRL", "it is of another CA", got=verified.ca, expected=pck.ca)
    if info.fmspc != pck.fmspc:  # 24
        raise steps.FmspcMismatchError("TCB info", "it is for another FMSPC", got=info.fmspc, expected=pck.fmspc)
    if info.pce_id != pck.pce_id:  # 25
        raise steps.PceIdMismatchError("TCB info", "it is for another PCE-ID", got=info.pce_id, expected=pck.pce_id)
    if verified.pck_chain is not None and verified.pck_chain[:2] != chain.chain:  # 26
        raise steps.PckChainMismatchError("PCK chain beside the collateral", "it is not the quote's")
    _check_not_revoked(_PCK_CA.subject, chain.issuer.serial, verified.revoked_by_root)  # 15
    if chain.leaf.serial in verified.revoked_pcks:  # 27
        raise steps.PckRevokedError(_PCK.subject, "it is on the PCK CRL", got=chain.leaf.serial)


def _judge(signed: SignedQuote, verified: VerifiedCollateral, now: int, expected: bytes | None) -> Verdict:
    """Steps 31, 32 and 34 to 37, under collateral that was found to be this platform's."""
    opened = signed.opened
    quote, pck = opened.quote, opened.pck
    _check_quoting_enclave(signed.qe_report, verified.qe_identity)  # 31, 32
    tcb = assess(verified.tcb_info, verified.qe_identity, pck, quote.body, signed.qe_report)  # 34-36
    got = quote.body.report_data
    if expected is not None and not compare_digest(got, expected):  # 37
        problem = "the report data does not match"
        if len(expected) != len(got):
            problem += f": {len(expected)} bytes are expected, and every quote has {len(got)}"
        raise steps.ReportDataMismatchError("quote", problem, got=got, expected=expected)
    chain, collateral = opened.chain.window, verified.window
    return Verdict(
        quote=quote,
        pck=pck,
        tcb_status=tcb.status,
        current_status=tcb.current,
        advisory_ids=tcb.advisory_ids,
        current_advisory_ids=tcb.current_advisory_ids,
        tcb_date=tcb.date,
        platform=tcb.platform,
        module=tcb.module,
        qe=tcb.qe,
        collateral=verified.issue,
        tcb_info_version=verified.tcb_info.version,
        window=(max(chain[0], collateral[0]), min(chain[1], collateral[1])),
        verified_at=now,
        root=opened.root,
        signed=signed,
        verified=verified,
        checked=(
            *signed.checked,
            *verified.checked,
            _CHAIN_TIMES,
            *_COLLATERAL_TIMES,
            _BELONGS if verified.pck_chain is None else _BELONGS_BESIDE,
            _QE,
            _TD_LEVELS if quote.tee == "TDX" else _ENCLAVE_LEVELS,
            *(() if expected is None else (_REPORT_DATA,)),
        ),
        proof=PROOF,
    )


_NEEDS_CHAIN: Final = frozenset(
    {layout.CERTIFICATION_PPID_RSA2048, layout.CERTIFICATION_PPID_RSA3072, layout.CERTIFICATION_PCK}
)
"""The types of certification data that name a PCK certificate, whose chain comes from elsewhere."""

_OPENED: Final = checked("quote", 1, 2)
_NAMED: Final = checked("PCK chain beside the quote", 26)
_CHAIN: Final = checked("PCK chain", 3)
_CHAIN_WITH_ROOT: Final = checked("PCK chain", 3, 6)
_LEAF: Final = checked("PCK certificate", *_OF_CERTIFICATES, 11)
_CHAIN_TIMES: Final = checked("PCK chain", 9, 10)
_ENCLAVE: Final = checked("quoting enclave", 28, 29, 30)
_COLLATERAL: Final = (
    checked("root CRL", 12, 13, 14),
    checked("PCK CRL", 12, 13, 14),
    checked("certificates of the collateral", 15),
    checked("TCB info", 16, 17, 18),
    checked("QE identity", 16, 17, 18),
)
_COLLATERAL_TIMES: Final = (checked("certificates of the collateral", 9, 10), checked("collateral", 19, 20))
_BELONGS: Final = checked("quote and collateral", 15, 21, 22, 23, 24, 25, 27)
_BELONGS_BESIDE: Final = checked("quote and collateral", 15, 21, 22, 23, 24, 25, 26, 27)
_QE: Final = checked("quoting enclave", 31, 32)
_SIGNED: Final = checked("quote", 33)
_TD_LEVELS: Final = checked("TCB", 34, 35, 36)
_ENCLAVE_LEVELS: Final = checked("TCB", 35, 36)
_REPORT_DATA: Final = checked("report data", 37)


def verify_genuine(
    data: BytesLike,
    collateral: Collateral | VerifiedCollateral,
    *,
    now: int,
    report_data: bytes | None,
    root: TrustedRoot = INTEL_ROOT,
    grace: int = 0,
    sgx: bool = False,
) -> Verdict:
    """Verify a quote with all stages but the policy: the verdict is genuine, not yet acceptable.

    ``report_data`` are the 64 bytes that it must bind (step 37); pass None only if something else binds the quote to
    the peer: a genuine quote of another machine verifies as well. ``collateral`` may be what `verify_collateral`
    returned under the same root; then only its times are verified again, and its own grace counts. The other arguments
    are those of `open_quote` and `verify_collateral`. Raises `VerificationError`; `TypeError` for arguments of another
    type, `ValueError` for a negative grace.
    """
    _check_expected(report_data)
    check_duration("grace", grace)
    if isinstance(collateral, VerifiedCollateral):
        if grace != 0:
            raise TypeError("grace: is that of the verified collateral; pass it to verify_collateral")
        opened = open_quote(data, now=now, root=root, sgx=sgx)
        verified = collateral
    else:
        check_kind("collateral", collateral, Collateral, "a Collateral, as of Collateral.load")
        beside = collateral.pck_certificate_chain
        opened = open_quote(data, now=now, root=root, sgx=sgx, pck_certificate_chain=beside)
        verified = verify_collateral(collateral, now=now, root=root, grace=grace)
    _check_belongs(opened, verified, now)
    return _judge(check_signed(opened), verified, now, report_data)


def forget() -> None:
    """Drop all remembered chains and quoting enclaves; this only costs time."""
    for cached in remembered().values():
        cached.cache_clear()


class _Cached(Protocol):
    def cache_clear(self) -> None: ...

    def cache_info(self) -> CacheInfo: ...


class CacheInfo(Protocol):
    """How often a remembered result was used, and how often it was not there."""

    @property
    def hits(self) -> int: ...

    @property
    def misses(self) -> int: ...


def remembered() -> dict[str, _Cached]:
    """The stages of verification whose results are remembered, by name."""
    return {
        "root": _root_terms,
        "issuer": _issued_by_root,
        "signer": _signer,
        "pck_chain": _pck_chain,
        "quoting_enclave": _quoting_enclave,
    }


# --- certificates ---


@frozen(eq=False)
class _Place:
    """A place in a chain: what a certificate in it must be called and be allowed to do."""

    subject: str
    names: frozenset[bytes]
    kind: Kind


_PCK_CA: Final = _Place("PCK CA certificate", frozenset({certificates.PLATFORM_CA, certificates.PROCESSOR_CA}), "CA")
_PCK: Final = _Place("PCK certificate", frozenset({certificates.PCK}), "end entity")
_TCB_SIGNER: Final = _Place("TCB signing certificate", frozenset({certificates.TCB_SIGNING}), "end entity")


@lru_cache(maxsize=256)
def _pck_chain(root: TrustedRoot, tee: Tee, ders: tuple[bytes, ...]) -> PckChain:
    """Steps 3 to 8 and 11, remembered by the certificates: text around them makes no new entry."""
    leaf_der, issuer_der, *above = ders
    root_terms = _root_terms(root, (*above,))
    issuer, issuer_key, issuer_term, issuer_notes = _issued_by_root(root, issuer_der, _PCK_CA)
    leaf = _issued(leaf_der, _PCK, issuer.subject, issuer_key)
    extension = leaf.extensions.get(certificates.SGX_EXTENSION)
    if extension is None:  # 11
        raise steps.PckExtensionError(_PCK.subject, "the SGX extension is missing")
    try:
        identity = read_pck_extension(extension, ca=_ca(issuer), tee=tee)  # 11
    except DerError as exc:
        raise steps.PckExtensionError(_PCK.subject, str(exc)) from None
    terms = (*root_terms, issuer_term, _term(leaf, _PCK))
    notes = _Notes(_CHAIN_WITH_ROOT if above else _CHAIN, *issuer_notes.take(), _LEAF)
    key = _key(leaf, _PCK.subject)
    return PckChain(leaf, key, issuer, (leaf_der, issuer_der), identity, terms, window(terms), notes)


def _read_signers(pem: bytes, place: _Place) -> tuple[bytes, ...]:
    """Step 3 for the chain of a signer of collateral."""
    return _read_chain(pem, f"chain of the {place.subject}", 1)


@lru_cache(maxsize=64)
def _signer(
    root: TrustedRoot, ders: tuple[bytes, ...], place: _Place
) -> tuple[Certificate, EllipticCurvePublicKey, tuple[Term, ...], _Notes]:
    """Steps 4 to 8 for a chain of a certificate and, or without, the root that issued it; with their terms."""
    subject = f"chain of the {place.subject}"
    der, *above = ders
    root_terms = _root_terms(root, (*above,))
    certificate, key, term, notes = _issued_by_root(root, der, place)
    form = checked(subject, 3, 6) if above else checked(subject, 3)
    return certificate, key, (*root_terms, term), _Notes(form, *notes.take())


def _read_chain(pem: bytes, subject: str, least: int) -> tuple[bytes, ...]:
    """Step 3: so many certificates, and the root or not."""
    try:
        ders = certificates.read_pem(pem)  # 3
    except DerError as exc:
        raise steps.ChainFormError(subject, str(exc)) from None
    if not least <= len(ders) <= least + 1:  # 3
        raise steps.ChainFormError(
            subject, "it is too short or too long", got=len(ders), expected=f"{least} or {least + 1}"
        )
    return ders


def _check_expected(report_data: object) -> None:
    if report_data is not None and not isinstance(report_data, bytes | bytearray):
        raise TypeError(f"report_data: must be 64 bytes, or None, not {type(report_data).__name__}")


@lru_cache(maxsize=16)
def _root_terms(root: TrustedRoot, above: tuple[bytes, ...]) -> tuple[Term, ...]:
    """The validity of the root: by the pin, and by another certificate of it that came with a chain (step 6)."""
    terms: tuple[Term, ...] = (Term("root certificate", root.not_before, root.not_after, is_certificate=True),)
    for der in above:
        if sha256(der).digest() != root.digest:
            terms = (*terms, _check_root(root, der))  # 6
    return terms


def _check_root(root: TrustedRoot, der: bytes) -> Term:
    certificate = _read(der, "root certificate")
    if certificate.subject != root.name or certificate.point != root.point:  # 6
        problem = "untrusted; a root other than Intel's is trusted only as the argument root="
        raise steps.UntrustedRootError("root certificate", problem, got=certificate.point, expected=root.point)
    try:
        check_self_signed(certificate)  # 6: renewed with the same name and key
    except DerError as exc:
        raise steps.UntrustedRootError("root certificate", str(exc)) from None
    return Term("root certificate", certificate.not_before, certificate.not_after, is_certificate=True)


@lru_cache(maxsize=64)
def _issued_by_root(
    root: TrustedRoot, der: bytes, place: _Place
) -> tuple[Certificate, EllipticCurvePublicKey, Term, _Notes]:
    """Steps 4, 5, 7 and 8."""
    certificate = _issued(der, place, root.name, _root_key(root))
    notes = _Notes(checked(place.subject, *_OF_CERTIFICATES))
    return certificate, _key(certificate, place.subject), _term(certificate, place), notes


@lru_cache(maxsize=16)
def _root_key(root: TrustedRoot) -> EllipticCurvePublicKey:
    """Load the root's key. `forget` does not drop it: it is the caller's choice, not a result of verification."""
    return ecdsa.load_point(root.point)


def _issued(der: bytes, place: _Place, issuer: bytes, issuer_key: EllipticCurvePublicKey) -> Certificate:
    """Steps 4, 5, 7 and 8."""
    certificate = _read(der, place.subject)
    try:
        name = certificates.common_name(certificate.subject)  # 5
        certificates.check_kind(certificate, place.kind)
    except DerError as exc:
        raise steps.CertificateRoleError(place.subject, str(exc)) from None
    if name not in place.names:  # 5
        got, expected = name.decode("utf-8", "replace"), " or ".join(sorted(n.decode() for n in place.names))
        raise steps.CertificateRoleError(
            place.subject, "its common name does not match", got=repr(got), expected=repr(expected)
        )
    if certificate.issuer != issuer:  # 7
        raise steps.CertificateIssuerError(
            place.subject, "it names another issuer", got=certificate.issuer, expected=issuer
        )
    try:
        ecdsa.verify(issuer_key, certificate.signature, certificate.signed)  # 8
    except ecdsa.InvalidSignature:
        raise steps.CertificateSignatureError(place.subject, "its issuer did not sign it") from None
    return certificate


def _read(der: bytes, subject: str) -> Certificate:
    """Step 4."""
    try:
        return certificates.read_certificate(der)  # 4
    except DerError as exc:
        raise steps.CertificateFormatError(subject, str(exc)) from None


def _key(certificate: Certificate, subject: str) -> EllipticCurvePublicKey:
    try:
        return ecdsa.load_point(certificate.point)  # 4
    except ValueError:
        raise steps.CertificateFormatError(subject, "its key is not a point of P-256") from None


def _term(certificate: Certificate, place: _Place) -> Term:
    return Term(place.subject, certificate.not_before, certificate.not_after, is_certificate=True)


def _ca(issuer: Certificate) -> Ca:
    return "platform" if certificates.common_name(issuer.subject) == certificates.PLATFORM_CA else "processor"


# --- collateral ---


def _crl(
    der: bytes, subject: str, issuer: bytes, issuer_key: EllipticCurvePublicKey
) -> tuple[certificates.Crl, frozenset[bytes]]:
    """Steps 12 to 14: the CRL and the serial numbers on it."""
    try:
        crl = certificates.read_crl(der)  # 12
        if crl.issuer != issuer:  # 13
            raise steps.CrlIssuerError(subject, "it names another issuer", got=crl.issuer, expected=issuer)
        ecdsa.verify(issuer_key, crl.signature, crl.signed)  # 14
        return crl, certificates.revoked_serials(crl)
    except DerError as exc:
        raise steps.CrlFormatError(subject, str(exc)) from None
    except ecdsa.InvalidSignature:
        raise steps.CrlSignatureError(subject, "its issuer did not sign it") from None


def _check_not_revoked(subject: str, serial: bytes, revoked: frozenset[bytes]) -> None:
    """Step 15."""
    if serial in revoked:  # 15
        raise steps.CertificateRevokedError(subject, "it is on the root CRL", got=serial)


def _check_stated(subject: str, text: bytes, signature: bytes, key: EllipticCurvePublicKey) -> None:
    """Step 16, before the text is read."""
    try:
        ecdsa.verify_raw(key, signature, text)
    except ecdsa.InvalidSignature:
        raise steps.StatementSignatureError(subject, "the TCB signing key did not sign it") from None


def _statement(subject: str, text: bytes, read: Callable[[bytes], T]) -> T:
    """Steps 17 and 18."""
    try:
        return read(text)
    except statements.AnotherKindError as exc:
        raise steps.StatementKindError(subject, str(exc)) from None
    except JsonError as exc:
        raise steps.StatementFormatError(subject, str(exc)) from None


# --- the quote ---


@lru_cache(maxsize=256)
def _quoting_enclave(
    chain: PckChain, report: bytes, signature: bytes, auth: bytes, attestation_key: bytes
) -> tuple[SgxReport, EllipticCurvePublicKey, _Notes]:
    """Steps 28 to 30: the attestation key is the quoting enclave's, the quoting enclave the platform's."""
    try:
        ecdsa.verify_raw(chain.leaf_key, signature, report)  # 28
    except ecdsa.InvalidSignature:
        raise steps.QeReportSignatureError("QE report", "the PCK did not sign it") from None
    qe_report = layout.parse_sgx_report(report)
    expected = sha256(attestation_key + auth).digest() + bytes(32)
    if qe_report.report_data != expected:  # 29
        got = qe_report.report_data
        raise steps.QeReportDataError(
            "QE report", "its report data is not the attestation key's hash", got=got, expected=expected
        )
    try:
        key = ecdsa.load_point(attestation_key)  # 30
    except ValueError:
        raise steps.AttestationKeyError("attestation key", "it is not a point of P-256", got=attestation_key) from None
    return qe_report, key, _Notes(_ENCLAVE)


_DEBUG: Final = int(layout.SgxAttributes.DEBUG)


def _check_quoting_enclave(report: SgxReport, identity: QeIdentity) -> None:
    """Steps 31 and 32."""
    if report.flags & _DEBUG:  # 31
        raise steps.QeDebugError("quoting enclave", "it is a debug enclave")
    misc_select = int.from_bytes(report.misc_select, "little") & identity.misc_select_mask
    attributes = int.from_bytes(report.attributes, "little") & identity.attributes_mask
    for name, got, expected in (
        ("MRSIGNER", report.mr_signer, identity.mr_signer),
        ("ISVPRODID", report.isv_prod_id, identity.isv_prod_id),
        ("MISCSELECT under its mask", misc_select, identity.misc_select),
        ("ATTRIBUTES under their mask", attributes, identity.attributes),
    ):
        if got != expected:  # 32
            raise steps.QeIdentityMismatchError("quoting enclave", f"{name} does not match", got=got, expected=expected)
