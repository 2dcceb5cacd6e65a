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
* only what is true of bytes alone is remembered: a certificate as it was read, and that a signature of a certificate or
  of a quoting enclave's report holds. Everything else is checked for each quote.

A verdict does not say that the quote is acceptable: a policy decides that, and ``verify`` of ``_policy.py`` returns
nothing that a policy did not accept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from hmac import compare_digest
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar

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
from chutes_proto.quote._strict_json import JsonError
from chutes_proto.quote._tcb import assess
from chutes_proto.quote._terms import Term, Window, check_duration, check_seconds, check_terms, window

if TYPE_CHECKING:
    from chutes_proto.quote import _behind as behind
    from chutes_proto.quote import _plain as plain
else:  # a verdict is verified more often than it is explained
    behind = LazyModule("chutes_proto.quote._behind")
    plain = LazyModule("chutes_proto.quote._plain")

T = TypeVar("T")


class PckChain(Struct, frozen=True, eq=False):
    """A PCK certificate that its CA links to the root; ``chain`` is both in DER, without the root."""

    leaf: Certificate
    issuer: Certificate
    chain: tuple[bytes, ...]
    identity: PckIdentity
    terms: tuple[Term, ...]


@frozen(kw_only=True, eq=False)
class OpenedQuote(Proven):
    """A quote whose PCK chain leads to the root. The quote itself is not verified yet.

    ``pck`` says which platform it claims to be of, and so what collateral to ask for.
    """

    quote: Quote
    pck: PckIdentity
    root: TrustedRoot
    chain: PckChain
    steps: frozenset[int] = field(repr=False)


@frozen(kw_only=True, eq=False)
class SignedQuote(Proven):
    """A quote made by the platform of its PCK certificate. Collateral says how up to date that platform is.

    ``qe_report`` is the report of the quoting enclave that signed it.
    """

    opened: OpenedQuote
    qe_report: SgxReport


@frozen(kw_only=True, eq=False)
class Verdict(Proven):
    """A genuine quote of a genuine platform; ``tcb_status`` says how up to date its TCB is.

    That does not make it acceptable: its host may debug the TD, the image may be any, and the platform out of date.
    `Policy.appraise` decides; a verdict has no truth value, so that no ``if`` mistakes it for a decision.

    Revoked TCBs have no verdict. ``advisory_ids`` are those of all parts; levels that are up to date may have some too.
    ``tcb_date`` (unix seconds) is the earliest date of the parts' levels; ``platform``, ``module`` and ``qe`` are the
    levels at launch, ``current_status`` is of the TCB at present where the report has it. ``collateral`` has the
    numbers and dates of the collateral, ``tcb_info_version`` is the version of the TCB info's form. ``window`` is when
    all that was used is valid (unix seconds, inclusive, no grace), ``verified_at`` the caller's ``now``. ``steps``
    are the numbers of all steps that were taken, in order; one that had nothing to check is not there.
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
    steps: tuple[int, ...]
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

    def to_dict(self) -> dict[str, object]:
        """Make plain data for JSON: bytes in lowercase hex, times in unix seconds."""
        return plain.verdict_fields(self)

    @property
    def evaluation_number(self) -> int:
        """The lower TCB evaluation data number of TCB info and QE identity."""
        return self.collateral.evaluation_number


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
    ders = _read_chain(certification, "PCK chain", 2)  # 3
    chain = _pck_chain(root, quote.tee, ders)  # 4-8, 11
    check_terms(chain.terms, now)  # 9, 10
    taken = {*range(1, 12)} if len(ders) > 2 else {*range(1, 12)} - {6}
    if beside:
        _check_names(quote, chain)  # 26
        taken.add(26)
    return OpenedQuote(quote=quote, pck=chain.identity, root=root, chain=chain, steps=frozenset(taken), proof=PROOF)


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
    attestation_key = _attestation_key(opened.chain.leaf, quote)  # 28-30
    try:
        ecdsa.verify_raw(attestation_key, quote.signature, quote.signed)  # 33
    except ecdsa.InvalidSignature:
        raise steps.QuoteSignatureError("quote", "the attestation key did not sign it") from None
    return SignedQuote(opened=opened, qe_report=quote.qe_report, proof=PROOF)


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
    pck_ca = _signer(root, collateral.pck_crl_issuer_chain, _PCK_CA)  # 3-8
    tcb_signer = _signer(root, collateral.tcb_info_issuer_chain, _TCB_SIGNER)
    qe_signer = _signer(root, collateral.qe_identity_issuer_chain, _TCB_SIGNER)
    issuer = pck_ca.certificate
    certificate_terms = (*pck_ca.terms, *tcb_signer.terms, *qe_signer.terms)
    if now is not None:
        check_terms(certificate_terms, now)  # 9, 10
    root_crl, revoked_by_root = _crl(collateral.root_ca_crl, "root CRL", root.name, root.point)  # 12-14
    pck_crl, revoked_pcks = _crl(collateral.pck_crl, "PCK CRL", issuer.subject, issuer.point)
    _check_not_revoked("root certificate", root.serial, revoked_by_root)  # 15
    for signer, place in ((pck_ca, _PCK_CA), (tcb_signer, _TCB_SIGNER), (qe_signer, _TCB_SIGNER)):
        _check_not_revoked(place.subject, signer.certificate.serial, revoked_by_root)
    _check_stated("TCB info", collateral.tcb_info, collateral.tcb_info_signature, tcb_signer)  # 16
    _check_stated("QE identity", collateral.qe_identity, collateral.qe_identity_signature, qe_signer)
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
        has_root=any(signer.has_root for signer in (pck_ca, tcb_signer, qe_signer)),
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
    taken = {*opened.steps, *_STEPS}
    if verified.has_root:
        taken.add(6)
    if verified.pck_chain is not None:
        taken.add(26)
    if quote.tee == "TDX":
        taken.add(34)
    if expected is not None:
        taken.add(37)
    chain, collateral = window(opened.chain.terms), verified.window
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
        steps=(*sorted(taken),),
        proof=PROOF,
    )


_NEEDS_CHAIN: Final = frozenset(
    {layout.CERTIFICATION_PPID_RSA2048, layout.CERTIFICATION_PPID_RSA3072, layout.CERTIFICATION_PCK}
)
"""The types of certification data that name a PCK certificate, whose chain comes from elsewhere."""

_STEPS: Final = frozenset(range(1, 37)) - {6, 26, 34}
"""The steps that every verdict takes."""


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


def _pck_chain(root: TrustedRoot, tee: Tee, ders: tuple[bytes, ...]) -> PckChain:
    """Steps 4 to 8 and 11."""
    leaf_der, issuer_der, *above = ders
    root_terms = _root_terms(root, above)
    issuer = _issued(issuer_der, _PCK_CA, root.name, root.point)
    leaf = _issued(leaf_der, _PCK, issuer.subject, issuer.point)
    extension = leaf.extensions.get(certificates.SGX_EXTENSION)
    if extension is None:  # 11
        raise steps.PckExtensionError(_PCK.subject, "the SGX extension is missing")
    try:
        identity = read_pck_extension(extension, ca=_ca(issuer), tee=tee)  # 11
    except DerError as exc:
        raise steps.PckExtensionError(_PCK.subject, str(exc)) from None
    terms = (*root_terms, _term(issuer, _PCK_CA), _term(leaf, _PCK))
    return PckChain(leaf, issuer, (leaf_der, issuer_der), identity, terms)


class _Signer(Struct, frozen=True, eq=False):
    """The signer of a piece of collateral; ``has_root``: its chain brings a certificate of the root."""

    certificate: Certificate
    terms: tuple[Term, ...]
    has_root: bool


def _signer(root: TrustedRoot, pem: bytes, place: _Place) -> _Signer:
    """Steps 3 to 8 for a chain of a certificate and, or without, the root that issued it."""
    der, *above = _read_chain(pem, f"chain of the {place.subject}", 1)
    root_terms = _root_terms(root, above)
    certificate = _issued(der, place, root.name, root.point)
    return _Signer(certificate, (*root_terms, _term(certificate, place)), bool(above))


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


def _root_terms(root: TrustedRoot, above: Sequence[bytes]) -> tuple[Term, ...]:
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


def _issued(der: bytes, place: _Place, issuer: bytes, point: bytes) -> Certificate:
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
        ecdsa.recall(point, certificate.signature, certificate.signed)  # 8
    except ecdsa.InvalidSignature:
        raise steps.CertificateSignatureError(place.subject, "its issuer did not sign it") from None
    return certificate


def _read(der: bytes, subject: str) -> Certificate:
    """Step 4."""
    try:
        certificate = certificates.read_certificate(der)  # 4
        _ = ecdsa.load_point(certificate.point)
    except DerError as exc:
        raise steps.CertificateFormatError(subject, str(exc)) from None
    except ValueError:
        raise steps.CertificateFormatError(subject, "its key is not a point of P-256") from None
    return certificate


def _term(certificate: Certificate, place: _Place) -> Term:
    return Term(place.subject, certificate.not_before, certificate.not_after, is_certificate=True)


def _ca(issuer: Certificate) -> Ca:
    return "platform" if certificates.common_name(issuer.subject) == certificates.PLATFORM_CA else "processor"


# --- collateral ---


def _crl(der: bytes, subject: str, issuer: bytes, point: bytes) -> tuple[certificates.Crl, frozenset[bytes]]:
    """Steps 12 to 14: the CRL and the serial numbers on it."""
    try:
        crl = certificates.read_crl(der)  # 12
        if crl.issuer != issuer:  # 13
            raise steps.CrlIssuerError(subject, "it names another issuer", got=crl.issuer, expected=issuer)
        ecdsa.verify(ecdsa.load_point(point), crl.signature, crl.signed)  # 14
        return crl, certificates.revoked_serials(crl)
    except DerError as exc:
        raise steps.CrlFormatError(subject, str(exc)) from None
    except ecdsa.InvalidSignature:
        raise steps.CrlSignatureError(subject, "its issuer did not sign it") from None


def _check_not_revoked(subject: str, serial: bytes, revoked: frozenset[bytes]) -> None:
    """Step 15."""
    if serial in revoked:  # 15
        raise steps.CertificateRevokedError(subject, "it is on the root CRL", got=serial)


def _check_stated(subject: str, text: bytes, signature: bytes, signer: _Signer) -> None:
    """Step 16, before the text is read."""
    try:
        ecdsa.verify_raw(ecdsa.load_point(signer.certificate.point), signature, text)
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


def _attestation_key(leaf: Certificate, quote: Quote) -> EllipticCurvePublicKey:
    """Steps 28 to 30: the attestation key is the quoting enclave's, the quoting enclave the platform's."""
    try:
        ecdsa.recall_raw(leaf.point, quote.qe_report_signature, quote.qe_report_bytes)  # 28
    except ecdsa.InvalidSignature:
        raise steps.QeReportSignatureError("QE report", "the PCK did not sign it") from None
    got = quote.qe_report.report_data
    expected = sha256(quote.attestation_key + quote.qe_auth).digest() + bytes(32)
    if got != expected:  # 29
        raise steps.QeReportDataError(
            "QE report", "its report data is not the attestation key's hash", got=got, expected=expected
        )
    try:
        return ecdsa.load_point(quote.attestation_key)  # 30
    except ValueError:
        raise steps.AttestationKeyError(
            "attestation key", "it is not a point of P-256", got=quote.attestation_key
        ) from None


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
