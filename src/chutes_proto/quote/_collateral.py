"""Collateral: everything that Intel signs about a platform, before and after its verification.

Rules kept here:

* a `Collateral` holds the pieces as they were signed, byte for byte, and says nothing about them;
* its file form is one JSON object: certificate chains as PEM text, TCB info and QE identity as the signed text, their
  signatures and both CRLs in hexadecimal digits. An unknown or doubled member is refused. ``_pcs_client.py`` reads
  another form;
* a `VerifiedCollateral` is made by ``_verify.py`` only.

Source of the pieces: Intel SGX and TDX Provisioning Certification Service API, version 4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final, Protocol, cast

from attrs import field, fields, frozen
from msgspec import Struct

from chutes_proto._proof import Proven
from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote._arguments import BytesLike, as_utf8
from chutes_proto.quote._errors import CollateralFormatError
from chutes_proto.quote._layout import Tee, parse_quote
from chutes_proto.quote._pck import Ca
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._statements import QeIdentity, TcbInfo
from chutes_proto.quote._terms import Term, Window, window

MAX_SIZE: Final = 4 * 1024 * 1024
"""More bytes than any collateral file has."""


class PathLike(Protocol):
    """An `os.PathLike` of text, without the module ``os``."""

    def __fspath__(self) -> str: ...


@frozen(kw_only=True)
class Collateral:
    """Unverified collateral: PEM for chains (leaf first), DER for CRLs, the signed text for statements.

    Signatures are r ‖ s (64 bytes). ``pck_certificate_chain`` is optional: it is that of a quote which does not bring
    its own, and must be the quote's if that does.
    """

    pck_crl_issuer_chain: bytes
    root_ca_crl: bytes
    pck_crl: bytes
    tcb_info_issuer_chain: bytes
    tcb_info: bytes
    tcb_info_signature: bytes
    qe_identity_issuer_chain: bytes
    qe_identity: bytes
    qe_identity_signature: bytes
    pck_certificate_chain: bytes | None = None

    def __attrs_post_init__(self) -> None:
        for name in _MEMBERS:
            if type(piece := getattr(self, name)) is not bytes and (name != _OPTIONAL or piece is not None):
                raise TypeError(f"{name}: must be bytes, not {type(piece).__name__}")

    @classmethod
    def load(cls, path: str | PathLike, *, quote: BytesLike | None = None) -> Collateral:
        """Read the pieces from a file of a form that `from_json` reads.

        Raises `chutes_proto.errors.FileUnavailable` and `CollateralFormatError`; both name the file.
        """
        from chutes_proto.io.files import read_file

        data = read_file(path, limit=MAX_SIZE)
        try:
            return cls.from_json(data, quote=quote)
        except CollateralFormatError as exc:
            raise CollateralFormatError(f"{path}: {exc}") from None

    @classmethod
    def from_json(cls, data: BytesLike | str, *, quote: BytesLike | None = None) -> Collateral:
        """Read the pieces from a file's bytes or text.

        That is the file of ``to_json``, which is also dcap-qvl's, or one of Intel's PcsClientTool with the collateral
        of many platforms: then those for ``quote``, of which nothing is verified here. Raises `CollateralFormatError`,
        and `QuoteFormatError` for a quote that does not parse.
        """
        members = _members(data)
        if _MANY in members:
            if quote is None:
                raise CollateralFormatError("it has collateral of many platforms; give the quote, which chooses")
            from chutes_proto.quote import _pcs_client as pcs_client

            chosen: Any = pcs_client.pieces(members[_MANY], parse_quote(quote, sgx=True))
            return cls(**chosen)
        return cls._of(members)

    @classmethod
    def all_from_json(cls, data: BytesLike | str) -> tuple[Collateral, ...]:
        """Read all that is in a file of a form that `from_json` reads, for every platform. Raises the same error."""
        members = _members(data)
        if _MANY not in members:
            return (cls._of(members),)
        from chutes_proto.quote import _pcs_client as pcs_client

        found: list[Any] = [*pcs_client.all_pieces(members[_MANY])]
        return tuple(cls(**pieces) for pieces in found)

    @classmethod
    def _of(cls, members: Mapping[str, object]) -> Collateral:
        if members.get(_OPTIONAL, "") is None:  # as other writers leave it out
            members = {name: value for name, value in members.items() if name != _OPTIONAL}
        if unknown := sorted(name for name in members if name not in _MEMBERS):
            raise CollateralFormatError(f"{unknown[0][:80]!r} is not a member of collateral; remove it")
        pieces = {name: _piece(members[name], name) for name in _MEMBERS if name in members}
        if missing := [name for name in _MEMBERS if name not in pieces and name != _OPTIONAL]:
            raise CollateralFormatError(f"{missing[0]} is missing")
        return cls(**pieces)

    def to_json(self) -> bytes:
        """Write the file that `from_json` reads. Raises `CollateralFormatError` for a text piece that is not UTF-8."""
        table: dict[str, str] = {}
        for name in _MEMBERS:
            piece: bytes | None = getattr(self, name)
            if piece is None:
                continue
            try:
                table[name] = piece.hex() if name in _IN_HEX else piece.decode("utf-8")
            except UnicodeDecodeError:
                raise CollateralFormatError(f"{name} is not text in UTF-8") from None
        return json.dumps(table, indent=1).encode("ascii")


_OPTIONAL: Final = "pck_certificate_chain"
_IN_HEX: Final = frozenset({"root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature"})
_MEMBERS: Final = tuple(member.name for member in fields(Collateral))


class CollateralIssue(Struct, frozen=True):
    """Numbers and dates (unix seconds) of the pieces of collateral, none of which Intel ever lowers.

    Keep the highest of each that was seen, for each FMSPC and CA, to find a rollback. Intel gives all CRLs of one CA
    the same number, so their dates count.
    """

    tcb_info_number: int
    qe_identity_number: int
    root_crl_number: int
    pck_crl_number: int
    tcb_info_issued: int
    qe_identity_issued: int
    root_crl_issued: int
    pck_crl_issued: int

    @property
    def evaluation_number(self) -> int:
        """The lower TCB evaluation data number of TCB info and QE identity."""
        return min(self.tcb_info_number, self.qe_identity_number)

    @property
    def issued_at(self) -> int:
        """The earliest date of TCB info, QE identity and PCK CRL: Intel issues these again every day.

        The root CRL stays the same for up to a year, so its date says nothing about the collateral's age.
        """
        return min(self.tcb_info_issued, self.qe_identity_issued, self.pck_crl_issued)


class CollateralDigests(Struct, frozen=True):
    """SHA-256 (32 bytes) of each document that Intel signs, as it was received.

    Two pieces of collateral with the same digests say the same of a platform: chains and signatures only prove that.
    """

    tcb_info: bytes
    qe_identity: bytes
    root_ca_crl: bytes
    pck_crl: bytes

    @classmethod
    def of(cls, collateral: Collateral) -> CollateralDigests:
        """Compute the digests of unverified collateral."""
        pieces = (collateral.tcb_info, collateral.qe_identity, collateral.root_ca_crl, collateral.pck_crl)
        return cls(*(sha256(piece).digest() for piece in pieces))


@frozen(kw_only=True, eq=False)
class VerifiedCollateral(Proven):
    """Collateral that verified under ``root``, as values.

    Keep it for all quotes of its platforms until ``usable_until``: ``verify_quote`` checks all times again. Revoked
    serial numbers are the contents of their INTEGERs. ``window`` is from when to when all pieces are valid, in unix
    seconds, both inclusive, without any grace. ``digests`` names the documents that it was read from, ``has_root`` says
    whether a chain brought a certificate of the root.
    """

    root: TrustedRoot
    ca: Ca
    tcb_info: TcbInfo
    qe_identity: QeIdentity
    issuer_name: bytes
    issuer_point: bytes
    revoked_by_root: frozenset[bytes] = field(repr=False)
    revoked_pcks: frozenset[bytes] = field(repr=False)
    issue: CollateralIssue
    digests: CollateralDigests = field(repr=False)
    pck_chain: tuple[bytes, ...] | None = field(repr=False)
    terms: tuple[Term, ...]
    window: Window
    grace: int
    has_root: bool = field(repr=False)

    @property
    def tee(self) -> Tee:
        return self.tcb_info.tee

    @property
    def fmspc(self) -> bytes:
        return self.tcb_info.fmspc

    @property
    def usable_until(self) -> int:
        """The last second at which `verify_quote` accepts it: the end of the window, or of the grace after it."""
        return window(self.terms, self.grace)[1]


_MANY: Final = "collaterals"
"""The member that a file of PcsClientTool has, and no other."""


def _members(data: BytesLike | str) -> Mapping[str, object]:
    data = as_utf8(data, "the bytes or text of a collateral file")
    try:
        table = strict_json.decode(data, limit=MAX_SIZE, fractions=True)
    except strict_json.JsonError as exc:
        raise CollateralFormatError(str(exc)) from None
    if not isinstance(table, dict):
        raise CollateralFormatError("not a JSON object")
    return cast("Mapping[str, object]", table)


def _piece(value: object, name: str) -> bytes:
    if not isinstance(value, str):
        raise CollateralFormatError(f"{name} is not a string")
    if name not in _IN_HEX:
        return value.encode("utf-8")
    if (piece := strict_json.digits(value)) is None:
        raise CollateralFormatError(f"{name} is not in hexadecimal digits")
    return piece
