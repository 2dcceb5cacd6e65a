"""Chains of certificates, the quote's own and the collateral's: until when they hold, who revokes them, with which
algorithms they are signed, and how much is remembered of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from base64 import encodebytes
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from attrs import evolve

from chutes_proto import quote
from chutes_proto.auth import der
from chutes_proto.quote import _certificates as certificates
from chutes_proto.quote import _layout as layout
from chutes_proto.quote._certificates import read_certificate, read_crl
from chutes_proto.quote._errors import VerificationError
from chutes_proto.quote._steps import (
    CertificateExpiredError,
    CertificateFormatError,
    CertificateRevokedError,
    CollateralExpiredError,
    CrlFormatError,
    UntrustedRootError,
)
from chutes_proto.quote._terms import rfc3339
from chutes_proto.quote._verify import (
    authenticate_collateral,
    open_quote,
    verify_collateral,
    verify_quote,
)
from chutes_proto.testing._faults import Fault
from chutes_proto.testing._pki import Keys
from chutes_proto.testing._platform import COLLATERAL_SECONDS, SimulatedPlatform
from tests.quote.simulated import (
    NOW,
    PLATFORM,
    REPORT_DATA,
    ROOT,
    collateral_of,
    forget,
    signed_of,
    verdict_of,
    verified_of,
    with_certification,
)

QUOTE = PLATFORM.quote(REPORT_DATA)
END = NOW + 100
GRACE = 1_000_000
PLACES = {
    "root": "root certificate",
    "intermediate": "PCK CA certificate",
    "pck": "PCK certificate",
    "tcb_signer": "TCB signing certificate",
}


def _until_end(draft: str) -> SimulatedPlatform:
    """The platform, one certificate of which ends; the others, names, keys and statements are as ever."""
    changes: Any = {draft: lambda certificate: evolve(certificate, not_after=END)}
    return PLATFORM.having(Fault(name="short", side="certificates", what="a short life", **changes))


# --- times ---


@pytest.mark.parametrize("draft", ["root", "intermediate", "pck"])
def test_a_quote_serves_as_long_as_each_certificate_in_it(draft: str) -> None:
    """The collateral's certificates, of the same names and keys, last; the refusal names the one that does not."""
    data = _until_end(draft).quote(REPORT_DATA)
    verified = verified_of(PLATFORM)
    forget()
    for _ in range(2):  # made, then remembered
        signed = signed_of(data)
        assert verify_quote(signed, verified, now=NOW, report_data=None).window == (NOW, END)
        assert verify_quote(signed, verified, now=END, report_data=None).verified_at == END
        for late in (
            lambda signed=signed: verify_quote(signed, verified, now=END + 1, report_data=None),
            lambda: open_quote(data, now=END + 1, root=ROOT),
        ):
            with pytest.raises(CertificateExpiredError) as caught:
                _ = late()
            assert (caught.value.subject, caught.value.code) == (PLACES[draft], "certificate_expired")


@pytest.mark.parametrize(
    ("draft", "member"),
    [
        *[("root", f"{name}_issuer_chain") for name in ("pck_crl", "tcb_info", "qe_identity")],
        ("intermediate", "pck_crl_issuer_chain"),
        ("tcb_signer", "tcb_info_issuer_chain"),
        ("tcb_signer", "qe_identity_issuer_chain"),
    ],
)
def test_no_grace_for_a_certificate_of_the_collateral(draft: str, member: str) -> None:
    collateral = evolve(collateral_of(PLATFORM), **{member: getattr(collateral_of(_until_end(draft)), member)})
    signed = signed_of(QUOTE)
    for verified in (
        verify_collateral(collateral, now=NOW, root=ROOT, grace=GRACE),
        authenticate_collateral(collateral, root=ROOT, grace=GRACE),
    ):
        assert (verified.window, verified.usable_until) == ((NOW, END), END)
        assert verify_quote(signed, verified, now=END, report_data=None).window == (NOW, END)
        with pytest.raises(CertificateExpiredError) as caught:
            _ = verify_quote(signed, verified, now=END + 1, report_data=None)
        assert (caught.value.subject, caught.value.code) == (PLACES[draft], "certificate_expired")
    with pytest.raises(CertificateExpiredError):
        _ = verify_collateral(collateral, now=END + 1, root=ROOT, grace=GRACE)


def test_a_root_of_the_same_name_and_key_must_be_signed_by_it() -> None:
    forged = PLATFORM.root_der[:-1] + bytes([PLATFORM.root_der[-1] ^ 1])
    collateral = collateral_of(PLATFORM)
    pem = collateral.tcb_info_issuer_chain.replace(_pem(PLATFORM.root_der), _pem(forged))
    assert pem != collateral.tcb_info_issuer_chain
    with pytest.raises(UntrustedRootError):
        _ = verify_collateral(evolve(collateral, tcb_info_issuer_chain=pem), now=NOW, root=ROOT)


def _pem(data: bytes) -> bytes:
    lines = encodebytes(data).replace(b"\n", b"")
    return b"\n".join(lines[at : at + 64] for at in range(0, len(lines), 64))


def test_grace_is_for_what_is_no_certificate() -> None:
    verified = verify_collateral(collateral_of(PLATFORM), now=NOW, root=ROOT, grace=GRACE)
    end = NOW + COLLATERAL_SECONDS
    assert (verified.window, verified.usable_until) == ((NOW, end), end + GRACE)
    with pytest.raises(CollateralExpiredError, match=f"at most {rfc3339(end + GRACE)}"):
        _ = verify_collateral(collateral_of(PLATFORM), now=end + GRACE + 1, root=ROOT, grace=GRACE)


# --- revocation ---


class _NewSerials(Keys):
    """The same keys, and for the PCK CA's another certificate."""

    def serial(self, label: str) -> int:
        return Keys.serial(self, f"new {label}" if label == "platform CA" else label)


def test_of_two_certificates_of_one_ca_the_revoked_one_is_not_in_the_quote() -> None:
    new = Fault(name="new", side="certificates", what="a renewed PCK CA", keys=lambda keys: _NewSerials(keys.seed))
    data = PLATFORM.having(new).quote(REPORT_DATA)

    def revoking(label: str) -> Fault:
        change = partial(evolve, revoked=(label,))
        return Fault(name="revoking", side="collateral", what="one of them is revoked", root_crl=change)

    signed = signed_of(data)
    assert verify_quote(signed, verified_of(PLATFORM), now=NOW, report_data=None).steps
    verified = verified_of(PLATFORM.having(revoking("new platform CA")))
    assert verify_quote(signed_of(QUOTE), verified, now=NOW, report_data=None).steps
    with pytest.raises(CertificateRevokedError) as caught:
        _ = verify_quote(signed, verified, now=NOW, report_data=None)
    assert caught.value.subject == PLACES["intermediate"]
    with pytest.raises(CertificateRevokedError):
        _ = verified_of(PLATFORM.having(revoking("platform CA")))


# --- algorithms ---

SHA256 = der.sequence(der.oid("1.2.840.10045.4.3.2"))
SHA384 = der.sequence(der.oid("1.2.840.10045.4.3.3"))


def _renamed(signed: bytes, signer: str, inner: bytes, outer: bytes) -> bytes:
    """Signed again, and with SHA-256 whatever the algorithm inside and outside of what is signed is called."""
    assert signed.count(SHA256) == 1
    signed = signed.replace(SHA256, inner)
    return der.sequence(signed, outer, der.bits(Keys(PLATFORM.seed).sign(signer, signed)))


def _in_chain(field: str, at: int, signer: str, inner: bytes, outer: bytes) -> Fault:
    def change(chain: tuple[bytes, ...]) -> tuple[bytes, ...]:
        renamed = _renamed(read_certificate(chain[at]).signed, signer, inner, outer)
        return (*chain[:at], renamed, *chain[at + 1 :])

    changes: Any = {field: change}
    return Fault(name="algorithm", side="certificates", what="another algorithm", **changes)


def _of_crl(member: str, signer: str, inner: bytes, outer: bytes) -> Fault:
    def change(members: dict[str, str]) -> dict[str, str]:
        renamed = _renamed(read_crl(bytes.fromhex(members[member])).signed, signer, inner, outer)
        return {**members, member: renamed.hex()}

    return Fault(name="algorithm", side="collateral", what="another algorithm", collateral=change)


SIGNED: dict[str, tuple[Callable[[bytes, bytes], Fault], type[VerificationError]]] = {
    "PCK certificate": (partial(_in_chain, "pck_chain", 0, "platform CA"), CertificateFormatError),
    "PCK CA certificate": (partial(_in_chain, "pck_chain", 1, "root"), CertificateFormatError),
    "root certificate": (partial(_in_chain, "pck_chain", 2, "root"), CertificateFormatError),
    "TCB signing certificate": (partial(_in_chain, "tcb_chain", 0, "root"), CertificateFormatError),
    "root CRL": (partial(_of_crl, "root_ca_crl", "root"), CrlFormatError),
    "PCK CRL": (partial(_of_crl, "pck_crl", "platform CA"), CrlFormatError),
}


@pytest.mark.parametrize("subject", SIGNED)
def test_both_names_of_the_signature_algorithm_are_right(subject: str) -> None:
    """RFC 5280, 4.1.1.2 and 5.1.1.2: the one inside of what is signed and the one outside are the same."""
    fault, step = SIGNED[subject]
    assert verdict_of(PLATFORM.having(fault(SHA256, SHA256))).tcb_status == "UpToDate"
    for inner, outer in ((SHA384, SHA256), (SHA256, SHA384), (SHA384, SHA384)):
        with pytest.raises(step, match="algorithm") as caught:
            _ = verdict_of(PLATFORM.having(fault(inner, outer)))
        assert caught.value.subject == subject


# --- what is remembered ---


def _remembering(module: object) -> dict[str, Any]:
    """The module's own functions that remember, by name."""
    name = getattr(module, "__name__", "")
    return {
        f"{name}.{function.__name__}": function
        for function in vars(module).values()
        if hasattr(function, "cache_info") and not isinstance(function, type) and function.__module__ == name
    }


def test_what_is_remembered_is_bounded() -> None:
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(quote.__path__, "chutes_proto.quote."):
        found |= _remembering(importlib.import_module(module.name))
    assert {"chutes_proto.quote._ecdsa.recall", "chutes_proto.quote._certificates.read_certificate"} < found.keys()
    sizes = {name: function.cache_info().maxsize for name, function in found.items()}
    assert {name: size for name, size in sizes.items() if size is None or not 0 < size <= 1024} == {}


def test_text_around_certificates_makes_no_new_entry() -> None:
    """Else anyone could push out of the cache what verified, with one quote padded in many ways."""
    certification = layout.parse_quote(QUOTE).certification
    forget()
    entries: dict[str, int] = {}
    for text in (b"", b"\n", b"\0\0", b"Subject: anyone\n"):
        _ = open_quote(with_certification(QUOTE, 5, certification + text), now=NOW, root=ROOT)
        found = {name: function.cache_info().currsize for name, function in _remembering(certificates).items()}
        assert text == b"" or found == entries
        entries = found
