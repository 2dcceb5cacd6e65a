"""The stages: what each guarantees, that time is checked in all of them, and that nothing else is remembered."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from typing import Any

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from chutes_proto.quote import _certificates as certificates
from chutes_proto.quote import _layout as layout
from chutes_proto.quote import _pck as pck
from chutes_proto.quote import _statements as statements
from chutes_proto.quote import _tcb as tcb
from chutes_proto.quote import _terms as terms
from chutes_proto.quote import _verify as stages
from chutes_proto.quote._collateral import CollateralDigests
from chutes_proto.quote._errors import VerificationError
from chutes_proto.quote._layout import parse_quote
from chutes_proto.quote._policy import Policy, verify
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
from chutes_proto.quote._steps import (
    CertificateExpiredError,
    CertificateFormatError,
    CertificateNotYetValidError,
    CertificationTypeError,
    CollateralExpiredError,
    CollateralNotYetValidError,
    QeReportSignatureError,
    ReportDataMismatchError,
    RootMismatchError,
    StatementSignatureError,
    UntrustedRootError,
)
from chutes_proto.quote._verify import (
    certificates_end,
    check_signed,
    foresee,
    open_quote,
    verify_collateral,
    verify_genuine,
    verify_quote,
)
from chutes_proto.testing._pki import EXPIRES, ISSUED, pem
from chutes_proto.testing._platform import COLLATERAL_SECONDS, SimulatedPlatform
from chutes_proto.testing._quotes import QuoteParts
from tests.conftest import ROOT as PROJECT
from tests.quote.simulated import (
    NOW,
    PLATFORM,
    REPORT_DATA,
    ROOT,
    TD15,
    collateral_of,
    forget,
    signed_of,
    verdict_of,
    verified_of,
    with_certification,
)

QUOTE = PLATFORM.quote(REPORT_DATA)
OTHER_QUOTE = PLATFORM.another(1).quote(bytes(64), stage="runtime", padding=16)
COLLATERAL = collateral_of(PLATFORM)


@pytest.mark.parametrize("form", ["v4", "v5-td10", "v5-td15", "v5-td15ex"])
@pytest.mark.parametrize("ca", ["platform", "processor"])
def test_an_honest_platform(form: str, ca: str) -> None:
    platform = SimulatedPlatform(PLATFORM.seed, form=form, ca=ca)  # type: ignore[arg-type]
    opened = open_quote(platform.quote(REPORT_DATA, padding=70), now=NOW, root=ROOT)
    assert (opened.pck.fmspc, opened.pck.ca, opened.pck.tee) == (platform.fmspc, ca, "TDX")
    assert (opened.pck.ppid, opened.pck.platform_instance_id) == (platform.ppid, platform.platform_instance_id)
    verified = verified_of(platform)
    assert (verified.fmspc, verified.ca, verified.tee) == (platform.fmspc, ca, "TDX")
    verdict = verify_quote(check_signed(opened), verified, now=NOW, report_data=None)
    assert verdict.tcb_status == "UpToDate"
    assert verdict.current_status == ("UpToDate" if form.startswith("v5-td15") else None)
    assert verdict.quote.body.report_data == REPORT_DATA
    assert verdict.window == (NOW, NOW + COLLATERAL_SECONDS)
    assert verdict.verified_at == NOW


@pytest.mark.parametrize("kind", [bytearray, memoryview, lambda data: memoryview(data + b"_")[:-1]])
def test_whatever_holds_the_bytes_of_a_quote(kind: Callable[[bytes], Any]) -> None:
    held = kind(QUOTE)
    quote = parse_quote(held)
    assert quote == parse_quote(QUOTE)
    assert {type(piece) for piece in (quote.signed, quote.qe_auth, quote.certification)} == {bytes}
    opened = open_quote(held, now=NOW, root=ROOT)
    if isinstance(held, bytearray):
        held[:] = bytes(len(held))
    assert opened.quote == quote
    assert verify_quote(check_signed(opened), verified_of(PLATFORM), now=NOW, report_data=None).tcb_status == "UpToDate"


def test_verified_collateral_names_the_documents_that_it_was_read_from() -> None:
    collateral = collateral_of(PLATFORM)
    assert verified_of(PLATFORM).digests == CollateralDigests(
        tcb_info=sha256(collateral.tcb_info).digest(),
        qe_identity=sha256(collateral.qe_identity).digest(),
        root_ca_crl=sha256(collateral.root_ca_crl).digest(),
        pck_crl=sha256(collateral.pck_crl).digest(),
    )


def test_report_data_of_another_length_are_told_apart() -> None:
    with pytest.raises(ReportDataMismatchError, match="32 bytes are expected, and every quote has 64"):
        _ = verify_genuine(QUOTE, collateral_of(PLATFORM), now=NOW, root=ROOT, report_data=REPORT_DATA[:32])


def test_another_root_is_only_trusted_by_name() -> None:
    with pytest.raises(UntrustedRootError, match="trusted only as the argument root="):
        _ = open_quote(QUOTE, now=NOW)
    with pytest.raises(UntrustedRootError, match="trusted only as the argument root="):
        _ = verify_collateral(collateral_of(PLATFORM), now=NOW)
    other = SimulatedPlatform(b"another world, another root")
    other_root = TrustedRoot.from_der(other.root_der)
    verified = verify_collateral(collateral_of(other), now=NOW, root=other_root)
    with pytest.raises(RootMismatchError):
        _ = verify_quote(signed_of(QUOTE), verified, now=NOW, report_data=None)


def test_the_reference_shows_how_another_root_is_trusted() -> None:
    page = (PROJECT / "docs/reference/verification.md").read_text("utf-8")
    block = next(b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "root=" in b)
    names: dict[str, Any] = {
        "quote_bytes": QUOTE,
        "file_bytes": PLATFORM.collateral_json(NOW),
        "root_bytes": PLATFORM.root_der,
        "report_data": REPORT_DATA,
        "policy": Policy(measurements="unchecked"),
        "now": NOW,
    }
    exec(block, names)
    assert names["verdict"].tcb_status == "UpToDate"


# --- what was checked ---


def test_a_verdict_says_which_steps_were_taken() -> None:
    collateral = attrs.evolve(collateral_of(PLATFORM), pck_certificate_chain=None)
    verdict = verify_genuine(QUOTE, collateral, now=NOW, root=ROOT, report_data=REPORT_DATA)
    assert verdict.steps == tuple(number for number in range(1, 38) if number != 26)
    unbound = verify_genuine(QUOTE, collateral, now=NOW, root=ROOT, report_data=None)
    assert set(verdict.steps) - set(unbound.steps) == {37}
    assert unbound.to_dict()["steps"] == list(unbound.steps)
    beside = attrs.evolve(collateral, pck_certificate_chain=parse_quote(QUOTE).certification)
    beside_too = verify_genuine(QUOTE, beside, now=NOW, root=ROOT, report_data=REPORT_DATA)
    assert beside_too.steps == tuple(range(1, 38))


# --- values that prove a check ---


def _with_certification(certification: bytes) -> bytes:
    """The quote with other certification data, which no signature is over."""
    quote = parse_quote(QUOTE)
    return QuoteParts(
        signed=quote.signed,
        signature=quote.signature,
        attestation_key=quote.attestation_key,
        qe_report=quote.qe_report_bytes,
        qe_signature=quote.qe_report_signature,
        qe_auth=quote.qe_auth,
        cert_data=certification,
    ).encode()


@pytest.mark.parametrize("name", layout.Quote.__struct_fields__)
def test_no_copy_of_a_parsed_quote_verifies(name: str) -> None:
    """A signature is over bytes: what else a copy says of them, nobody signed."""
    quote, other = parse_quote(QUOTE), parse_quote(OTHER_QUOTE)
    members = msgspec.structs.asdict(quote) | {name: getattr(other, name)}
    copies = [replace(quote, **{name: getattr(other, name)}), layout.Quote(**members)]
    if sys.version_info >= (3, 13):
        copies.append(copy.replace(quote, **{name: getattr(other, name)}))
    for altered in [*copies, *(pickle.loads(pickle.dumps(each)) for each in copies)]:
        for sgx in (False, True):
            with pytest.raises(TypeError, match=r"^data: must be the bytes of a quote, not Quote$"):
                _ = open_quote(altered, now=NOW, root=ROOT, sgx=sgx)
            with pytest.raises(TypeError, match=r"^data: must be the bytes of a quote, not Quote$"):
                _ = verify_genuine(altered, COLLATERAL, now=NOW, root=ROOT, report_data=None, sgx=sgx)


def test_kept_collateral_verifies_many_quotes_until_it_expires() -> None:
    kept = verified_of(PLATFORM)
    policy = Policy(measurements="unchecked")
    options: dict[str, Any] = {"now": NOW, "report_data": REPORT_DATA, "root": ROOT, "policy": policy}
    for quote in (QUOTE, PLATFORM.quote(REPORT_DATA, stage="runtime")):
        once = verify(quote, COLLATERAL, **options)
        assert verify(quote, kept, **options).to_dict() == once.to_dict()
    with pytest.raises(ReportDataMismatchError):
        _ = verify(QUOTE, kept, **{**options, "report_data": bytes(64)})
    with pytest.raises(CollateralExpiredError):
        _ = verify(QUOTE, kept, **{**options, "now": kept.usable_until + 1})
    with pytest.raises(UntrustedRootError):
        _ = verify(QUOTE, kept, **{**options, "root": INTEL_ROOT})
    with pytest.raises(TypeError, match="grace: is that of the verified collateral"):
        _ = verify(QUOTE, kept, **options, grace=60)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("qe_report_signature", "qe_report_signature"),
        ("qe_report_data", "qe_report_data"),
        ("quote_signature", "quote_signature"),
        ("body_altered", "quote_signature"),
    ],
)
def test_what_the_platform_did_not_sign_needs_no_collateral_to_be_refused(fault: str, code: str) -> None:
    opened = open_quote(PLATFORM.having(fault).quote(REPORT_DATA), now=NOW, root=ROOT)
    with pytest.raises(VerificationError) as caught:
        _ = check_signed(opened)
    assert caught.value.code == code


def test_no_proof_can_be_made_by_hand() -> None:
    opened = open_quote(QUOTE, now=NOW, root=ROOT)
    signed = check_signed(opened)
    verified = verified_of(PLATFORM)
    verdict = verify_quote(signed, verified, now=NOW, report_data=None)
    for value in (opened, signed, verified, verdict):
        fields = {field.name: getattr(value, field.name) for field in attrs.fields(type(value))}
        with pytest.raises(TypeError, match="proves a check"):
            _ = type(value)(**fields)
        with pytest.raises(TypeError, match="proves a check"):
            _ = attrs.evolve(value)
        if sys.version_info >= (3, 13):
            with pytest.raises(TypeError, match="proves a check"):
                _ = copy.replace(value)
        with pytest.raises((TypeError, msgspec.ValidationError)):  # and by no decoder
            _ = msgspec.convert(fields, type(value))
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(value, "terms", ())  # noqa: B010 - the type checker sees that it is frozen
        assert "PROOF" not in repr(value)
    assert copy.copy(verdict).tcb_status == verdict.tcb_status


def test_values_are_frozen() -> None:
    rooms = [layout, certificates, pck, terms, statements, tcb, stages]
    kinds = {kind for room in rooms for kind in vars(room).values() if isinstance(kind, type(msgspec.Struct))}
    values = {kind for kind in kinds if not kind.__name__.endswith("Form") and kind is not msgspec.Struct}
    assert len(values) > 15
    assert [kind for kind in values if not kind.__struct_config__.frozen] == []


# --- time ---


def test_time_is_checked_in_every_stage() -> None:
    end = NOW + COLLATERAL_SECONDS
    signed, verified = signed_of(QUOTE), verified_of(PLATFORM)
    for now in (NOW, end):
        assert verify_collateral(collateral_of(PLATFORM), now=now, root=ROOT).window == (NOW, end)
        assert verify_quote(signed, verified, now=now, report_data=None).verified_at == now
    for now, step in ((NOW - 1, CollateralNotYetValidError), (end + 1, CollateralExpiredError)):
        with pytest.raises(step):
            _ = verify_collateral(collateral_of(PLATFORM), now=now, root=ROOT)
        with pytest.raises(step):
            _ = verify_quote(signed, verified, now=now, report_data=None)
    for now, certificate_step in ((ISSUED - 1, CertificateNotYetValidError), (EXPIRES + 1, CertificateExpiredError)):
        with pytest.raises(certificate_step):
            _ = open_quote(QUOTE, now=now, root=ROOT)
        with pytest.raises(certificate_step):
            _ = verify_quote(signed, verified, now=now, report_data=None)


def test_a_verdict_can_be_foreseen_as_long_as_its_certificates_are_valid() -> None:
    verdict = verdict_of(PLATFORM)
    assert verdict.window[1] < certificates_end(verdict) == EXPIRES
    assert foresee(verdict, at=EXPIRES).verified_at == EXPIRES
    with pytest.raises(CertificateExpiredError):
        _ = foresee(verdict, at=EXPIRES + 1)


def test_grace_extends_statements_and_never_certificates() -> None:
    end = NOW + COLLATERAL_SECONDS
    late = end + 3600
    collateral = collateral_of(PLATFORM)
    verified = verify_collateral(collateral, now=late, root=ROOT, grace=3600)
    assert verified.window == (NOW, end)
    assert verified.usable_until == late
    signed = signed_of(QUOTE, now=late)
    assert verify_quote(signed, verified, now=late, report_data=None).window == (NOW, end)
    with pytest.raises(CollateralExpiredError):
        _ = verify_quote(signed, verified, now=late + 1, report_data=None)
    with pytest.raises(CertificateExpiredError):
        _ = verify_collateral(collateral, now=EXPIRES + 1, root=ROOT, grace=EXPIRES)


def test_a_time_in_milliseconds_is_shown_as_it_is() -> None:
    """Cut to the last date it would look like the end that it is after."""
    with pytest.raises(CertificateExpiredError, match=f"got {NOW * 1000} s after 1970"):
        _ = verify_genuine(QUOTE, COLLATERAL, now=NOW * 1000, root=ROOT, report_data=None)
    with pytest.raises(CertificateNotYetValidError, match="got -1 s after 1970"):
        _ = verify_genuine(QUOTE, COLLATERAL, now=-1, root=ROOT, report_data=None)


# --- what is remembered ---


def test_refusals_are_not_remembered() -> None:
    forget()
    for fault in ("pck_signature", "qe_report_signature", "intermediate_signature", "chain_extra"):
        with pytest.raises(VerificationError):
            _ = verdict_of(PLATFORM, fault)
        with pytest.raises(VerificationError):
            _ = verdict_of(PLATFORM, fault)
    assert verdict_of(PLATFORM).tcb_status == "UpToDate"


# --- hostile bytes ---


def test_a_signature_is_of_one_length() -> None:
    """Zeros before s leave its value as it is."""
    signature = COLLATERAL.tcb_info_signature
    longer = attrs.evolve(COLLATERAL, tcb_info_signature=signature[:32] + bytes(2) + signature[32:])
    with pytest.raises(StatementSignatureError):
        _ = verify_collateral(longer, now=NOW, root=ROOT)


def test_a_key_off_the_curve_does_not_load() -> None:
    leaf = open_quote(QUOTE, now=NOW, root=ROOT).chain.leaf
    with pytest.raises(CertificateFormatError, match="not a point"):
        _ = stages._read(leaf.der.replace(leaf.point, b"\x01" * 64), "PCK certificate")


@given(st.integers(0, len(QUOTE) - 1), st.integers(1, 255))
def test_no_byte_of_a_quote_can_be_changed(at: int, change: int) -> None:
    mutated = QUOTE[:at] + bytes([QUOTE[at] ^ change]) + QUOTE[at + 1 :]
    pem = QUOTE.index(b"-----BEGIN")
    try:
        verdict = verify_genuine(mutated, collateral_of(PLATFORM), now=NOW, report_data=None, root=ROOT)
    except VerificationError:
        return
    # White space in PEM says nothing; everything else is signed or declared.
    assert at >= pem
    assert verdict.quote.body == parse_quote(QUOTE).body


@given(st.data())
def test_a_mutated_chain(data: st.DataObject) -> None:
    mutated = bytearray(parse_quote(QUOTE).certification)
    at = data.draw(st.integers(0, len(mutated) - 1))
    mutated[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    with suppress(VerificationError):
        _ = open_quote(_with_certification(bytes(mutated)), now=NOW, root=ROOT)


@given(st.sampled_from(sorted(attrs.asdict(collateral_of(PLATFORM)))), st.data())
def test_mutated_collateral_never_verifies_as_something_else(name: str, data: st.DataObject) -> None:
    collateral = collateral_of(TD15)
    piece: bytes | None = getattr(collateral, name)
    mutated = bytearray(piece or b"")
    at = data.draw(st.integers(0, len(mutated)))
    mutated[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    with suppress(VerificationError):
        verified = verify_collateral(attrs.evolve(collateral, **{name: bytes(mutated)}), now=NOW, root=ROOT)
        honest = verified_of(TD15)
        assert (verified.tcb_info, verified.qe_identity) == (honest.tcb_info, honest.qe_identity)
        assert (verified.revoked_by_root, verified.revoked_pcks) == (honest.revoked_by_root, honest.revoked_pcks)


# --- certification data without a chain ---

CHAIN = parse_quote(PLATFORM.quote(REPORT_DATA)).certification
PCK = open_quote(PLATFORM.quote(REPORT_DATA), now=NOW, root=ROOT).pck


def _named(kind: int, *, cpu_svn: bytes = PCK.cpu_svn, pce_svn: int = PCK.pce_svn, pce_id: bytes = PCK.pce_id) -> bytes:
    """A quote that names its PCK certificate by an encrypted PPID."""
    data = bytes({2: 256, 3: 384}[kind]) + cpu_svn + pce_svn.to_bytes(2, "little") + pce_id
    return with_certification(PLATFORM.quote(REPORT_DATA), kind, data)


def _by_leaf(pem: bytes) -> bytes:
    return with_certification(PLATFORM.quote(REPORT_DATA), 4, pem)


LEAF = CHAIN[: CHAIN.index(b"-----END") + 26]


@pytest.mark.parametrize("quote", [_named(2), _named(3), _by_leaf(LEAF)], ids=["type 2", "type 3", "type 4"])
def test_a_chain_may_come_beside_the_quote(quote: bytes) -> None:
    beside = attrs.evolve(collateral_of(PLATFORM), pck_certificate_chain=CHAIN)
    verdict = verify_genuine(quote, beside, now=NOW, report_data=REPORT_DATA, root=ROOT)
    assert (verdict.tcb_status, verdict.pck) == ("UpToDate", PCK)
    assert 26 in verdict.steps
    with pytest.raises(CertificationTypeError, match="not given beside it"):
        _ = verify_genuine(quote, collateral_of(PLATFORM), now=NOW, report_data=REPORT_DATA, root=ROOT)


@pytest.mark.parametrize(
    ("quote", "problem"),
    [
        (_named(3, cpu_svn=bytes(16)), "CPUSVN"),
        (_named(3, pce_svn=PCK.pce_svn + 1), "PCESVN"),
        (_named(2, pce_id=b"\1\0"), "PCE-ID"),
        (_by_leaf(CHAIN), "another PCK certificate"),
        (_by_leaf(pem(PLATFORM.another(1).pck_chain()[:1]).encode()), "another PCK certificate"),
        (_by_leaf(b"no PEM"), "not 1 to 3 certificates"),
        (with_certification(PLATFORM.quote(REPORT_DATA), 3, bytes(403)), "403 bytes of certification data of type 3"),
        (with_certification(PLATFORM.quote(REPORT_DATA), 1, bytes(36)), "unsupported type"),
    ],
)
def test_a_chain_beside_the_quote_is_the_one_that_the_quote_names(quote: bytes, problem: str) -> None:
    with pytest.raises(VerificationError, match=problem):
        _ = open_quote(quote, now=NOW, root=ROOT, pck_certificate_chain=CHAIN)


def test_another_machines_chain_beside_the_quote_made_no_signature_of_it() -> None:
    """Machines of one kind have one TCB: only the signature of the QE report tells them apart."""
    other = pem(PLATFORM.another(1).pck_chain()).encode()
    opened = open_quote(_named(3), now=NOW, root=ROOT, pck_certificate_chain=other)
    with pytest.raises(QeReportSignatureError):
        _ = check_signed(opened)


def test_a_quote_with_a_chain_is_verified_by_its_own() -> None:
    other = pem(PLATFORM.another(1).pck_chain()).encode()
    assert open_quote(PLATFORM.quote(REPORT_DATA), now=NOW, root=ROOT, pck_certificate_chain=other).pck == PCK
