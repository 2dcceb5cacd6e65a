"""The content of a quote as plain data, for JSON and for people.

Bytes, and the 64-bit sets of flags, are lowercase hex in the order in which they stand in the quote.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct
from msgspec.structs import asdict

from chutes_proto._converter import StrictConverter
from chutes_proto.quote._certificates import PLATFORM_CA, SGX_EXTENSION, common_name, read_certificate, read_pem
from chutes_proto.quote._der import DerError
from chutes_proto.quote._layout import (
    Quote,
    SgxAttributes,
    SgxReport,
    TdAttributes,
    TdReport10,
    TdReport15,
    TdReport15Ex,
    Xfam,
)
from chutes_proto.quote._pck import Ca, PckIdentity, read_pck_extension

_BODY_TYPES: Final = {SgxReport: "SGX", TdReport10: "TD10", TdReport15: "TD15", TdReport15Ex: "TD15Ex"}
_FLAGS: Final = {"seam_attributes", "td_attributes", "xfam", "init_servtd_attributes", "current_servtd_attributes"}


def plain(values: dict[str, object]) -> dict[str, object]:
    """``values`` for JSON: bytes in hex, tuples as lists, structs as objects."""
    found: dict[str, object] = _CONVERTER.unstructure(values)
    return found


_CONVERTER: Final = StrictConverter(plain={bytes: bytes.hex, Struct: lambda struct: plain(asdict(struct))})


def quote_fields(quote: Quote) -> dict[str, object]:
    """Header, body, and the claims of the PCK certificate in it; ``pck`` is None where none can be read."""
    header, body = quote.header, quote.body
    fields: dict[str, object] = {
        "version": header.version,
        "tee": quote.tee,
        "tee_type": header.tee_type,
        "att_key_type": header.key_type,
        "qe_vendor_id": header.qe_vendor_id,
        "user_data": header.user_data,
        "body_type": _BODY_TYPES[type(body)],
    }
    for name, value in asdict(body).items():
        if name == "rtmrs":
            fields |= registers(value)
        elif not name.startswith("reserved"):
            fields[name] = value.to_bytes(8, "little") if name in _FLAGS else value
    if isinstance(body, SgxReport):
        fields["attribute_names"] = [flag.name for flag in SgxAttributes(body.flags)]
    else:
        fields["attribute_names"] = [flag.name for flag in TdAttributes(body.td_attributes)]
        fields["xfam_names"] = [flag.name for flag in Xfam(body.xfam)]
    return plain({**fields, "trailing_bytes": quote.trailing, "pck": _claimed_platform(quote)})


def verdict_fields(verdict: Any) -> dict[str, object]:  # a Verdict, whose module imports this one
    """The quote's fields, and the verdict on it; an accepted one has its profile and what that left open."""
    fields: dict[str, object] = {name: getattr(verdict, name) for name in _OF_VERDICT}
    fields |= {"valid_from": verdict.window[0], "valid_until": verdict.window[1], "behind": verdict.behind()}
    for name in ("stage", "unpinned", "replayed"):
        if (value := getattr(verdict, name, None)) is not None:
            fields[name] = value
    matched = getattr(verdict, "matched", None)
    if matched is not None:
        fields["profile"] = {"name": matched.name, "version": matched.version}
    return quote_fields(verdict.quote) | plain({**fields, "root": verdict.root.digest})


_OF_VERDICT: Final = (
    *("tcb_status", "current_status", "advisory_ids", "current_advisory_ids", "tcb_date", "evaluation_number"),
    *("collateral", "tcb_info_version", "verified_at", "steps"),
)


def registers(rtmrs: tuple[bytes, ...]) -> dict[str, str]:
    """RTMRs by name, in hex."""
    return {f"rtmr{number}": rtmr.hex() for number, rtmr in enumerate(rtmrs)}


def _claimed_platform(quote: Quote) -> PckIdentity | None:
    """The claims of the PCK certificate in the quote, whichever CA signed it."""
    try:
        leaf = read_certificate(read_pem(quote.certification)[0])
        ca: Ca = "platform" if common_name(leaf.issuer) == PLATFORM_CA else "processor"
        return read_pck_extension(leaf.extensions[SGX_EXTENSION], ca=ca, tee=quote.tee)
    except (DerError, KeyError):
        return None
