"""Fetch the collateral of a platform from Intel's PCS or a PCCS, and parse their answers.

Rules kept here:

* four answers make up collateral: TCB info, which says whether the service knows the platform at all, then QE identity,
  PCK CRL and root CA CRL; after the first refusal a service is not asked for the rest;
* TCB info and QE identity are kept as the exact text that was signed, cut out of the answer;
* issuer chains are percent-encoded PEM in a header, whose name begins with ``SGX-`` or does not; CRLs are DER, PEM or
  hexadecimal digits. The services differ in all this, and so do their versions;
* answers are untrusted: for any bytes, the parsers return or raise `UpstreamError`, and their result is not verified
  yet.

Sources: Intel SGX and TDX Provisioning Certification Service API, version 4; Intel SGX/TDX Provisioning Certificate
Caching Service (PCCS), design guide; RFC 3986, 2.1; RFC 7468; RFC 9110, 10.2.3.
"""

from __future__ import annotations

import json
import re
from binascii import Error as Base64Error
from binascii import a2b_base64
from datetime import UTC
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, cast
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

from attrs import frozen

from chutes_proto.effects import Get, Now
from chutes_proto.errors import ConfigurationError, UpstreamError
from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote._certificates import PLATFORM_CA, common_name, read_certificate, read_pem
from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._der import DerError
from chutes_proto.quote._errors import QuoteFormatError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chutes_proto.collateral.library import Family
    from chutes_proto.effects import Flow
    from chutes_proto.quote._layout import PckReference, Quote
    from chutes_proto.quote._pck import Ca
    from chutes_proto.wire.http import HttpResponse

Update: TypeAlias = Literal["standard", "early"] | int
"""Whether TCB info and QE identity are the standard ones, the early ones of an announced TCB recovery, or those of a
TCB evaluation data number that the service still has."""

MAX_RETRY_AFTER: Final = 3600
"""The longest ``Retry-After`` that is respected, in seconds."""

INTEL_PCS: Final = "https://api.trustedservices.intel.com"
INTEL_ROOT_CA_CRL: Final = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"

_API: Final = "/certification/v4"
_ROOT_CA_CRL: Final = f"/sgx{_API}/rootcacrl"
_PATH: Final = re.compile(r"[A-Za-z0-9._~/-]*")
_ENCODED: Final = re.compile(r"(?:[\x20-\x24\x26-\x7e]|%[0-9A-Fa-f]{2})+")
_HEX: Final = re.compile(rb"\s*((?:[0-9A-Fa-f]{2})+)\s*")
_PEM_CRL: Final = re.compile(rb"\s*-----BEGIN X509 CRL-----([A-Za-z0-9+/=\s]+)-----END X509 CRL-----\s*")
_BLANK: Final = re.compile(r"[ \t\n\r]*")
_SECONDS: Final = re.compile(r"[0-9]{1,9}")
_scan: Final = json.JSONDecoder().raw_decode


@frozen
class Upstream:
    """A collateral service: its URL up to ``/sgx/…`` and ``/tdx/…``, and the URL of the root CA's CRL."""

    url: str
    root_ca_crl: str

    @classmethod
    def parse(cls, url: str, root_ca_crl: str | None = None) -> Upstream:
        """Parse the ``url`` of a service, with or without the tail ``/sgx/certification/v4``.

        A PCCS has the root CA's CRL among its paths, Intel publishes it elsewhere: at `INTEL_ROOT_CA_CRL`, which is
        the default for Intel's own PCS. ``root_ca_crl`` is the URL for any other service. Raises `ConfigurationError`
        for anything but https, or http to this machine.
        """
        base = check_service(url)
        for tee in ("/sgx", "/tdx"):
            base = base.removesuffix(tee + _API)
        base = base.rstrip("/")
        if root_ca_crl is None:
            return cls(base, INTEL_ROOT_CA_CRL if base == INTEL_PCS else base + _ROOT_CA_CRL)
        return cls(base, _checked(root_ca_crl).geturl())

    def tcb_info(self, family: Family, update: Update) -> str:
        """The URL of the TCB info for a family."""
        fmspc = f"{self.url}/{family.tee.lower()}{_API}/tcb?fmspc={family.fmspc.hex()}"
        return f"{fmspc}&{_wanted(update)}" if update != "standard" else fmspc

    def qe_identity(self, family: Family, update: Update) -> str:
        """The URL of the quoting enclave's identity for a family."""
        identity = f"{self.url}/{family.tee.lower()}{_API}/qe/identity"
        return f"{identity}?{_wanted(update)}" if update != "standard" else identity

    def pck_crl(self, family: Family) -> str:
        """The URL of the PCK CRL for a family."""
        return self.pck_crl_of(family.ca)

    def pck_crl_of(self, ca: Ca) -> str:
        """The URL of the PCK CRL of a CA."""
        return f"{self.url}/sgx{_API}/pckcrl?ca={ca}&encoding=der"

    def pck_certificate(self, reference: PckReference, qe_id: bytes) -> str:
        """The URL of the PCK certificate that a quote names. A PCCS knows platforms by the QE-ID; PCS ignores it."""
        pce_svn = reference.pce_svn.to_bytes(2, "little").hex()
        named = f"encrypted_ppid={reference.encrypted_ppid.hex()}&cpusvn={reference.cpu_svn.hex()}&pcesvn={pce_svn}"
        return f"{self.url}/sgx{_API}/pckcert?qeid={qe_id.hex()}&{named}&pceid={reference.pce_id.hex()}"


def ask(upstream: Upstream, family: Family, update: Update) -> Flow[Collateral]:
    """Fetch unverified collateral from a service. Raises `TransportError` and `UpstreamError`."""
    tcb_info = yield from _get(upstream.tcb_info(family, update), "TCB info", says_unknown=True)
    info, info_signature = read_statement(tcb_info.body, "tcbInfo")
    qe_identity = yield from _get(upstream.qe_identity(family, update), "QE identity")
    identity, identity_signature = read_statement(qe_identity.body, "enclaveIdentity")
    pck_crl = yield from _get(upstream.pck_crl(family), "PCK CRL")
    root_ca_crl = yield from _get(upstream.root_ca_crl, "root CA CRL")
    return Collateral(
        pck_crl_issuer_chain=read_chain(pck_crl, "pck-crl-issuer-chain"),
        root_ca_crl=read_crl(root_ca_crl.body),
        pck_crl=read_crl(pck_crl.body),
        tcb_info_issuer_chain=read_chain(tcb_info, "tcb-info-issuer-chain"),
        tcb_info=info,
        tcb_info_signature=info_signature,
        qe_identity_issuer_chain=read_chain(qe_identity, "enclave-identity-issuer-chain"),
        qe_identity=identity,
        qe_identity_signature=identity_signature,
    )


def ask_pck_chain(upstream: Upstream, quote: Quote) -> Flow[bytes]:
    """Fetch the unverified PCK chain, in PEM, of a quote that names its PCK certificate or brings it alone.

    Raises `TransportError`, `UpstreamError`, and `QuoteFormatError` for certification data that cannot be read.
    """
    reference = quote.pck_reference
    if reference is not None:
        answer = yield from _get(upstream.pck_certificate(reference, quote.qe_id), "PCK certificate", says_unknown=True)
        if not answer.body.isascii():
            raise UpstreamError("PCK certificate: the answer is not PEM")
        return answer.body + b"\n" + read_chain(answer, "pck-certificate-issuer-chain")
    leaf = quote.certification.rstrip(b"\0")
    try:
        issuer = common_name(read_certificate(read_pem(leaf)[0]).issuer)
    except DerError as exc:
        raise QuoteFormatError("quote_structure", f"the PCK certificate: {exc}") from None
    answer = yield from _get(upstream.pck_crl_of("platform" if issuer == PLATFORM_CA else "processor"), "PCK CRL")
    return leaf + b"\n" + read_chain(answer, "pck-crl-issuer-chain")


def check_status(response: HttpResponse, what: str, now: int, *, says_unknown: bool = False) -> None:
    """Raise `UpstreamError` for all but 200. ``says_unknown``: 404 says that the platform is unknown."""
    if response.status == 200:
        return
    asked = _retry_after(response.header("retry-after"), now) if response.status in (429, 503) else None
    if response.status == 429 or response.status >= 500:
        raise UpstreamError(f"{what}: status {response.status}", retry_after=asked or 0)
    raise UpstreamError(f"{what}: status {response.status}", unknown=says_unknown and response.status == 404)


def read_statement(body: bytes, name: str) -> tuple[bytes, bytes]:
    """Cut signed text and signature (r ‖ s) out of ``{name: {…}, "signature": hex}``. Raises `UpstreamError`."""
    try:
        table = strict_json.decode(body, fractions=True)
        if not isinstance(table, dict):
            raise strict_json.JsonError("not a JSON object")
        members = cast("Mapping[str, object]", table)
        signature = members.get("signature")
        if not isinstance(members.get(name), dict) or not isinstance(signature, str):
            raise strict_json.JsonError(f"{name} is not an object, or signature not a string")
        signed_with = strict_json.hexadecimal(signature, "signature", 64)
    except strict_json.JsonError as exc:
        raise UpstreamError(f"{name}: {exc}") from None
    return _member_text(body.decode("utf-8"), name).encode("utf-8"), signed_with


def read_chain(response: HttpResponse, name: str) -> bytes:
    """Read the certificate chain in the header ``name`` or ``sgx-name``. Raises `UpstreamError`."""
    found = {value for key, value in response.headers if key in (name, f"sgx-{name}")}
    if len(found) != 1:
        raise UpstreamError(f"{name}: {'two different headers' if found else 'the header is missing'}")
    value = found.pop()
    if not _ENCODED.fullmatch(value):
        raise UpstreamError(f"{name}: the header is not percent-encoded text")
    chain = unquote_to_bytes(value)
    if not chain.isascii():
        raise UpstreamError(f"{name}: the header is not PEM")
    return chain


def read_crl(body: bytes) -> bytes:
    """Read a CRL in DER, hexadecimal digits or PEM, and return its DER. Raises `UpstreamError`."""
    if body.startswith(b"\x30"):  # a SEQUENCE; as a digit it would be "0", which no CRL begins with
        return body
    if digits := _HEX.fullmatch(body):
        return bytes.fromhex(digits[1].decode("ascii"))
    if block := _PEM_CRL.fullmatch(body):
        try:
            if der := a2b_base64(block[1].translate(None, b" \t\r\n"), strict_mode=True):
                return der
        except Base64Error:
            pass
    raise UpstreamError("CRL: the answer is neither DER nor PEM nor hexadecimal digits")


def _wanted(update: Update) -> str:
    return f"tcbEvaluationDataNumber={update}" if isinstance(update, int) else f"update={update}"


def _get(url: str, what: str, *, says_unknown: bool = False) -> Flow[HttpResponse]:
    response = yield from Get(url)
    check_status(response, what, (yield from Now()), says_unknown=says_unknown)
    return response


def _member_text(text: str, name: str) -> str:
    """Cut out the text of a member's value; the object is known to be well-formed and to have the member once."""
    at = text.index("{") + 1
    while True:
        key, at = _scan(text, _after_blank(text, at))
        start = _after_blank(text, _after_blank(text, at) + 1)
        _, end = _scan(text, start)
        if key == name:
            return text[start:end]
        at = _after_blank(text, end) + 1


def _after_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return at if match is None else match.end()


def _retry_after(text: str | None, now: int) -> int | None:
    if text is None:
        return None
    if _SECONDS.fullmatch(text):
        wait = int(text)
    else:
        try:
            moment = parsedate_to_datetime(text)
        except (ValueError, TypeError, OverflowError):  # what it raises differs by what is wrong, and by version
            return None
        wait = int(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()) - now
    return max(0, min(wait, MAX_RETRY_AFTER))


def check_service(url: str) -> str:
    """Check the URL of a service, and return it without a final slash. Raises `ConfigurationError`."""
    return _checked(url).geturl().rstrip("/")


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as exc:
        raise ConfigurationError(f"{url!r} is not a URL: {exc}") from None
    host = parts.hostname
    if not host or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigurationError(f'{url!r} is not a URL; write for example "https://pccs.example:8081"')
    if parts.username is not None or parts.query or parts.fragment or not _PATH.fullmatch(parts.path):
        raise ConfigurationError(f"the URL of {host}: remove the user, query or fragment")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_this_machine(host)):
        raise ConfigurationError(f"{url!r}: use https; http is for a service on this machine only")
    return parts


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
