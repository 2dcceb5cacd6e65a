"""Read a file of Intel's PcsClientTool, which has the collateral of many platforms: that of one quote, or all of it.

Rules kept here:

* the tool writes TCB info as JSON of its own, not the text that was signed; that is made again as Intel's service
  writes it, without white space and with the members in their order. If it is another, its signature does not verify;
* chains are percent-encoded PEM, CRLs hexadecimal digits, identities the service's own text;
* which platform the quote is of is read from it unverified: it only chooses among the pieces, which are not verified
  either;
* for any bytes, a `Collateral`'s pieces or `CollateralFormatError`.

Source: Intel SGX and TDX DCAP, ``tools/PcsClientTool`` (``platform_collaterals.json``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final, NoReturn, cast
from urllib.parse import unquote_to_bytes

from chutes_proto.quote import _layout as layout
from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote._certificates import PLATFORM_CA, SGX_EXTENSION, common_name, read_certificate, read_pem
from chutes_proto.quote._der import DerError
from chutes_proto.quote._errors import CollateralFormatError
from chutes_proto.quote._layout import Quote
from chutes_proto.quote._pck import Ca, PckIdentity, read_pck_extension

Table = Mapping[str, object]

_PCK_CHAIN: Final = "PCK-Certificate-Issuer-Chain"
_TCB_INFO_CHAIN: Final = "TCB-Info-Issuer-Chain"
_IDENTITY_CHAIN: Final = "Enclave-Identity-Issuer-Chain"


def pieces(collaterals: object, quote: Quote) -> dict[str, bytes | None]:
    """Choose the pieces for ``quote`` from the file's member ``collaterals``. Raises `CollateralFormatError`."""
    table = _table(collaterals, "collaterals")
    certificates = _table(table.get("certificates"), "certificates")
    chain = _pck_chain(table, certificates, quote)
    pck = _claimed(chain, quote)
    tee = pck.tee.lower()
    found = _family(table, certificates, pck.ca, tee, _tcb_info(table, pck.fmspc, tee))
    found["pck_certificate_chain"] = None if quote.certification_type == layout.CERTIFICATION_PCK_CHAIN else chain
    return found


def all_pieces(collaterals: object) -> list[dict[str, bytes | None]]:
    """The pieces for each TCB info under each PCK CA that the file has. Raises `CollateralFormatError`."""
    table = _table(collaterals, "collaterals")
    certificates = _table(table.get("certificates"), "certificates")
    issuers = _table(_member(certificates, _PCK_CHAIN), _PCK_CHAIN)
    crls = _table(table.get("pckcacrl"), "pckcacrl")
    cas: tuple[Ca, ...] = ("platform", "processor")
    found = [
        _family(table, certificates, ca, tee, _table(entry[f"{tee}_tcbinfo"], f"{tee}_tcbinfo"))
        for entry in _list(table.get("tcbinfos"), "tcbinfos")
        for tee in ("tdx", "sgx")
        if f"{tee}_tcbinfo" in entry
        for ca in cas
        if issuers.get(ca.upper()) and crls.get(f"{ca}Crl")
    ]
    if not found:  # a file with the early ones alone, for example
        raise CollateralFormatError(
            "it has no standard TCB info, or no PCK CA with its CRL; fetch them with the tool again"
        )
    return found


def _family(table: Table, certificates: Table, ca: Ca, tee: str, info: Table) -> dict[str, bytes | None]:
    issuers = _chain(_member(_member(certificates, _PCK_CHAIN), ca.upper()), f"{_PCK_CHAIN} {ca.upper()}")
    identity = "tdqeidentity" if tee == "tdx" else "qeidentity"
    tcb_info, tcb_info_signature = _statement(info, "tcbInfo")
    qe_identity, qe_identity_signature = _statement(_decoded(table.get(identity), identity), "enclaveIdentity")
    crls = _table(table.get("pckcacrl"), "pckcacrl")
    return {
        "pck_crl_issuer_chain": issuers,
        "root_ca_crl": _hex(table.get("rootcacrl"), "rootcacrl"),
        "pck_crl": _hex(crls.get(f"{ca}Crl"), f"{ca}Crl"),
        "tcb_info_issuer_chain": _chain(_member(certificates, _TCB_INFO_CHAIN), _TCB_INFO_CHAIN),
        "tcb_info": tcb_info,
        "tcb_info_signature": tcb_info_signature,
        "qe_identity_issuer_chain": _chain(_member(certificates, _IDENTITY_CHAIN), _IDENTITY_CHAIN),
        "qe_identity": qe_identity,
        "qe_identity_signature": qe_identity_signature,
    }


def _pck_chain(table: Table, certificates: Table, quote: Quote) -> bytes:
    """The quote's own chain, or that of the certificate which the quote names."""
    if quote.certification_type == layout.CERTIFICATION_PCK_CHAIN:
        return quote.certification
    if quote.certification_type == layout.CERTIFICATION_PCK:
        leaf = quote.certification.rstrip(b"\0") + b"\n"
    else:
        leaf = _named_certificate(table, quote)
    issuers = _member(certificates, _PCK_CHAIN)
    return leaf + _chain(_member(issuers, _ca(leaf).upper()), _PCK_CHAIN)


def _named_certificate(table: Table, quote: Quote) -> bytes:
    """The PCK certificate of the platform's PPID, at the TCB, that the quote names."""
    reference = quote.pck_reference
    if reference is None:
        raise CollateralFormatError("the quote has no certification data by which to choose")
    tcbm = (reference.cpu_svn + reference.pce_svn.to_bytes(2, "little")).hex()
    for platform in _list(table.get("pck_certs"), "pck_certs"):
        if str(platform.get("enc_ppid")).lower() != reference.encrypted_ppid.hex():
            continue
        for certificate in _list(platform.get("certs"), "certs"):
            if str(certificate.get("tcbm")).lower() == tcbm:
                return _chain(certificate.get("cert"), "cert") + b"\n"
    raise CollateralFormatError(f"pck_certs has no certificate of the quote's platform at TCBm {tcbm}")


def _ca(leaf: bytes) -> Ca:
    try:
        issuer = common_name(read_certificate(read_pem(leaf)[0]).issuer)
    except DerError as exc:
        raise CollateralFormatError(f"the PCK certificate: {exc}") from None
    return "platform" if issuer == PLATFORM_CA else "processor"


def _claimed(chain: bytes, quote: Quote) -> PckIdentity:
    ca = _ca(chain)
    try:
        extension = read_certificate(read_pem(chain)[0]).extensions[SGX_EXTENSION]
        return read_pck_extension(extension, ca=ca, tee=quote.tee)
    except (DerError, KeyError) as exc:
        raise CollateralFormatError(f"the PCK certificate: no SGX extension that can be read: {exc}") from None


def _tcb_info(table: Table, fmspc: bytes, tee: str) -> Table:
    for entry in _list(table.get("tcbinfos"), "tcbinfos"):
        if str(entry.get("fmspc")).lower() == fmspc.hex() and f"{tee}_tcbinfo" in entry:
            return _table(entry[f"{tee}_tcbinfo"], f"{tee}_tcbinfo")
    raise CollateralFormatError(f"tcbinfos has no {tee}_tcbinfo of FMSPC {fmspc.hex()}; fetch it with the tool again")


def _statement(table: Table, name: str) -> tuple[bytes, bytes]:
    """The text that was signed, and its signature."""
    statement = _table(table.get(name), name)
    text = json.dumps(statement, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8"), _hex(table.get("signature"), f"signature of {name}")


def _decoded(text: object, name: str) -> Table:
    if not isinstance(text, str):
        _refuse(name, "a text")
    try:
        return _table(strict_json.decode(text.encode("utf-8"), fractions=True), name)
    except strict_json.JsonError as exc:
        raise CollateralFormatError(f"{name}: {exc}") from None


def _member(table: object, name: str) -> object:
    """The member ``name``, which some releases call ``SGX-name``."""
    members = _table(table, name)
    return members.get(name, members.get(f"SGX-{name}"))


def _chain(value: object, name: str) -> bytes:
    if not isinstance(value, str) or not value.isascii():
        _refuse(name, "percent-encoded PEM")
    return unquote_to_bytes(value)


def _hex(value: object, name: str) -> bytes:
    piece = strict_json.digits(value) if isinstance(value, str) else None
    return _refuse(name, "hexadecimal digits") if piece is None else piece


def _table(value: object, name: str) -> Table:
    return cast("Table", value) if isinstance(value, dict) else _refuse(name, "an object")


def _list(value: object, name: str) -> list[Table]:
    if not isinstance(value, list):
        _refuse(name, "a list")
    return [_table(member, f"member of {name}") for member in cast("list[object]", value)]


def _refuse(name: str, kind: str) -> NoReturn:
    raise CollateralFormatError(f"{name} is missing, or not {kind}")
