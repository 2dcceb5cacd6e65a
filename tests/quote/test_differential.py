"""Beside dcap-qvl, an independent verifier: nothing is accepted here that it refuses, but for differences on purpose.

Every disagreement, in both directions, is in a table with its reason. `make soak` runs the campaign over all pairs of
faults and thousands of edits; a short one is in every run.

Honest and faulty platforms of the simulator, and bytes of theirs that Hypothesis changes; verification and a policy
that makes dcap-qvl's choices, against dcap-qvl's verdict under the same root.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import Any

import attrs
import dcap_qvl
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from chutes_proto.errors import QuoteError
from chutes_proto.quote._certificates import read_pem
from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._layout import parse_quote
from chutes_proto.quote._pck import Ca
from chutes_proto.quote._verify import verify_genuine
from chutes_proto.testing._faults import FAULTS
from chutes_proto.testing._pki import pem
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing._quotes import Form
from tests.conftest import SOAK
from tests.quote.cases import DCAP_QVL_POLICY
from tests.quote.simulated import NOW, PLATFORM, REPORT_DATA, ROOT, with_certification

FORMS: tuple[Form, ...] = ("v4", "v5-td10", "v5-td15", "v5-td15ex")
PIECES = [field.name for field in attrs.fields(Collateral) if field.name != "pck_certificate_chain"]
IN_HEX = {"root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature"}

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def _chains(collateral: Collateral) -> tuple[bytes, ...]:
    return collateral.tcb_info_issuer_chain, collateral.qe_identity_issuer_chain, collateral.pck_crl_issuer_chain


def _lacks_root(quote: bytes, collateral: Collateral) -> bool:
    certification = parse_quote(quote).certification
    return len(read_pem(certification)) < 3 or any(len(read_pem(chain)) < 2 for chain in _chains(collateral))


def _has_other_text(quote: bytes, collateral: Collateral) -> bool:
    del quote
    try:
        _ = [chain.decode() for chain in _chains(collateral)]
    except UnicodeDecodeError:
        return True
    return False


DIFFERENCES: dict[str, Callable[[bytes, Collateral], bool]] = {
    "the root is pinned by its key, so a chain may leave its certificate out": _lacks_root,
    "bytes around certificates count for nothing, and collateral there is text in UTF-8": _has_other_text,
}
"""Quotes that are accepted here on purpose though dcap-qvl may refuse them."""


STRICTER: dict[str, str] = {
    "attestation_key": "a point is loaded before the identity of the quoting enclave is looked at",
    "certificate_expired": "the pinned root has an end, too",
    "certificate_format": "data that is not read there must be in strict DER here",
    "certificate_issuer": "a PCK certificate is issued by a PCK CA, never by the root",
    "certificate_role": "each certificate has the name, constraints and key usage of its place",
    "certificate_signature": "the PCK CRL's issuer chain is verified, which is not read there",
    "certificate_not_yet_valid": "the PCK CRL's issuer chain is verified, which is not read there",
    "certificate_revoked": "the PCK CRL's issuer chain is verified, which is not read there",
    "chain_form": "a chain is the certificates in their order, and no others; each chain must be there",
    "collateral_not_yet_valid": "this update of a CRL is checked",
    "crl_issuer": "the PCK CRL's issuer chain is verified, which is not read there",
    "crl_signature": "the PCK CRL's issuer chain is verified, which is not read there",
    "crl_format": "a CRL has number and key identifier, and is complete",
    "pce_id_mismatch": "TCB info is for the PCE-ID, too",
    "pck_extension": "the SGX extension has all items, once, in order, with components that equal the CPUSVN",
    "qe_report_data": "the second half of the QE's report data is zero",
    "quote_structure": "declared lengths are filled, outer certification data is of type 6",
    "statement_format": "no TCB level stands twice",
    "statement_kind": "versions and TCB types that are not known are not guessed",
    "untrusted_root": "the PCK CRL's issuer chain is verified, which is not read there",
}
"""Codes of quotes that are refused here on purpose, though dcap-qvl may accept them, and why."""


def ours(quote: bytes, collateral: Collateral) -> tuple[str, str]:
    """The TCB status, or an empty text and the code of the refusal."""
    try:
        verdict = verify_genuine(quote, collateral, now=NOW, report_data=None, root=ROOT)
        _ = DCAP_QVL_POLICY.appraise(verdict, now=NOW, stage="boot")
        return str(verdict.tcb_status), ""
    except QuoteError as exc:
        return "", exc.code


def theirs(quote: bytes, collateral: Collateral) -> tuple[str, str]:
    try:
        pieces = {name: getattr(collateral, name) for name in PIECES}
        texts = {name: piece if name in IN_HEX else piece.decode() for name, piece in pieces.items()}
        value = dcap_qvl.QuoteCollateralV3(**texts)
        return str(dcap_qvl.verify_with_root_ca(quote, value, PLATFORM.root_der, NOW).status), ""
    except ValueError as exc:  # UnicodeDecodeError too: its collateral holds text
        return "", str(exc)


def check(quote: bytes, collateral: Collateral) -> None:
    """What is accepted here has the same status there, what is refused here is refused there, or a table says why."""
    status, code = ours(quote, collateral)
    other, error = theirs(quote, collateral)
    if status:
        assert other == status or any(differs(quote, collateral) for differs in DIFFERENCES.values()), error
    else:
        assert not other or code in STRICTER, f"{other} there, {code} here"


@cache
def made(form: Form, ca: Ca, faults: tuple[str, ...]) -> tuple[bytes, Collateral]:
    platform = SimulatedPlatform(PLATFORM.seed, form=form, ca=ca).having(*faults)
    return platform.quote(REPORT_DATA), attrs.evolve(platform.collateral(NOW), pck_certificate_chain=None)


honest = st.builds(made, st.sampled_from(FORMS), st.sampled_from(["platform", "processor"]), st.just(()))


@st.composite
def edited(draw: st.DrawFn, data: bytes) -> bytes:
    """The same bytes but for one or two small changes."""
    for _ in range(draw(st.integers(1, 2))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(start + 4, len(data))))
        data = data[:start] + draw(st.binary(max_size=4)) + data[end:]
    return data


@st.composite
def rewrapped(draw: st.DrawFn, chain: bytes) -> bytes:
    """The same certificates, or some of them, in PEM that is wrapped another way, with other things between."""
    ders = draw(st.lists(st.sampled_from(read_pem(chain)), min_size=1, max_size=4) | st.just([*read_pem(chain)]))
    separator = draw(st.sampled_from([b"", b"\n", b"\r\n", b" ", b"text\n", b"\0"]))
    text = separator.join(pem([der]).encode() for der in ders)
    end = draw(st.sampled_from([b"\n", b"\r\n", b"\r", b"", b"\n\n", b"\r\n\r\n", b"\n\r\n"]))
    which = draw(st.integers(-1, text.count(b"\n")))
    lines = text.split(b"\n")
    cut = b"\n".join(lines[:which]) + end + b"\n".join(lines[which:]) if which > 0 else text.replace(b"\n", end)
    return cut + draw(st.sampled_from([b"", b"\0", b"\n\0"]))


def other_signature(signature: bytes) -> bytes:
    """(r, n - s), which holds as well as (r, s)."""
    return signature[:32] + (ORDER - int.from_bytes(signature[32:])).to_bytes(32)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault(fault: str) -> None:
    for form in FORMS:
        check(*made(form, "platform", (fault,)))


@pytest.mark.skipif(not SOAK, reason="the whole campaign is part of `make soak`")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ca", ["platform", "processor"])
def test_the_campaign(form: Form, ca: Ca) -> None:
    """All pairs of faults."""
    for one, other in combinations(FAULTS, 2):
        try:
            pair = made.__wrapped__(form, ca, (one, other))
        except (IndexError, ValueError):  # one fault takes away what another would change
            continue
        check(*pair)


def test_every_reason_is_used() -> None:
    """Else the table would hide what it does not have to; the other codes are those of edited bytes."""
    used = {ours(*pair)[1] for fault in FAULTS for pair in [made("v4", "platform", (fault,))] if theirs(*pair)[0]}
    assert len(used & {*STRICTER}) >= 12
    assert used - {*STRICTER} - {""} == set()


def test_an_honest_platform_is_accepted_by_both() -> None:
    for form in FORMS:
        assert ours(*made(form, "platform", ())) == theirs(*made(form, "platform", ())) == ("UpToDate", "")


@given(
    st.sampled_from(FORMS), st.sampled_from(["platform", "processor"]), st.sets(st.sampled_from([*FAULTS]), max_size=3)
)
def test_several_faults(form: Form, ca: Ca, faults: set[str]) -> None:
    try:
        pair = made(form, ca, tuple(sorted(faults)))
    except (IndexError, ValueError):  # one fault takes away what another would change
        reject()
    check(*pair)


@given(honest, st.data())
def test_edited_quotes(pair: tuple[bytes, Collateral], data: st.DataObject) -> None:
    quote, collateral = pair
    check(data.draw(edited(quote)), collateral)


@given(honest, st.data())
def test_rewrapped_chains_in_quotes(pair: tuple[bytes, Collateral], data: st.DataObject) -> None:
    quote, collateral = pair
    parsed = parse_quote(quote)
    chain = data.draw(rewrapped(parsed.certification))
    check(with_certification(quote, 5, chain), collateral)


@given(honest, st.sampled_from(PIECES), st.data())
def test_edited_collateral(pair: tuple[bytes, Collateral], piece: str, data: st.DataObject) -> None:
    quote, collateral = pair
    original: bytes = getattr(collateral, piece)
    change: Any = edited(original)
    if piece.endswith("chain"):
        change |= rewrapped(original)
    if piece.endswith("signature"):
        change |= st.just(other_signature(original))
    check(quote, attrs.evolve(collateral, **{piece: data.draw(change)}))


@given(honest, honest, st.sets(st.sampled_from(PIECES)))
def test_exchanged_collateral(one: tuple[bytes, Collateral], other: tuple[bytes, Collateral], pieces: set[str]) -> None:
    exchanged: Any = {piece: getattr(other[1], piece) for piece in pieces}
    check(one[0], attrs.evolve(one[1], **exchanged))


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_an_empty_line_in_pem_ends_headers_for_both(end: bytes) -> None:
    quote, collateral = made("v4", "platform", ())
    chain = parse_quote(quote).certification
    for at in (chain.index(b"\n", 40), chain.index(b"\n-----END")):
        other = with_certification(quote, 5, chain[:at] + end + chain[at + 1 :])
        assert (ours(other, collateral)[0], theirs(other, collateral)[0]) == ("", "")


def test_signatures_are_malleable_for_both() -> None:
    quote, collateral = made("v4", "platform", ())
    signature = parse_quote(quote).signature
    changed = quote.replace(signature, other_signature(signature))
    assert ours(changed, collateral) == theirs(changed, collateral) == ("UpToDate", "")


def test_text_around_certificates_differs_on_purpose() -> None:
    """As some programs write names. It never comes to dcap-qvl's verdict: its collateral cannot have such bytes."""
    quote, collateral = made("v4", "platform", ())
    told = attrs.evolve(collateral, pck_crl_issuer_chain=b"Subject: CN = \xe9\n" + collateral.pck_crl_issuer_chain)
    assert ours(quote, told)[0] == "UpToDate"
    assert "codec can't decode" in theirs(quote, told)[1]
    check(quote, told)
    utf8 = attrs.evolve(told, pck_crl_issuer_chain=b"Subject: CN = \xc3\xa9\n" + collateral.pck_crl_issuer_chain)
    assert ours(quote, utf8) == theirs(quote, utf8) == ("UpToDate", "")
    assert not _has_other_text(quote, utf8)


def test_a_chain_without_its_root_differs_on_purpose() -> None:
    """Else the table of differences would hide what it does not have to."""
    quote, collateral = made("v4", "platform", ())
    chain = b"".join(pem([der]).encode() for der in read_pem(parse_quote(quote).certification)[:2])
    short = with_certification(quote, 5, chain)
    assert ours(short, collateral)[0] == "UpToDate"
    assert _lacks_root(short, collateral)
    assert not _lacks_root(quote, collateral)
