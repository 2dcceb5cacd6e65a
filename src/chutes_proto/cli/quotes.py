"""A quote and its platform as fields: members of a JSON object, or lines for people; `inspect` and `verify` show them.

Bytes, and the 64-bit sets of flags, are lowercase hex in the order in which they stand in the quote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, cast

from msgspec import Struct
from msgspec.structs import asdict

from chutes_proto._converter import StrictConverter
from chutes_proto.cli import console
from chutes_proto.errors import ConfigurationError, QuoteError
from chutes_proto.io.files import read_file
from chutes_proto.quote._certificates import PLATFORM_CA, SGX_EXTENSION, common_name, read_certificate, read_pem
from chutes_proto.quote._der import DerError
from chutes_proto.quote._layout import (
    SgxAttributes,
    SgxReport,
    TdAttributes,
    TdReport10,
    TdReport15,
    TdReport15Ex,
    Xfam,
)
from chutes_proto.quote._pck import PckIdentity, read_pck_extension
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot

if TYPE_CHECKING:
    import argparse

    from chutes_proto.quote._layout import Quote
    from chutes_proto.quote._pck import Ca

_BODY_TYPES: Final = {SgxReport: "SGX", TdReport10: "TD10", TdReport15: "TD15", TdReport15Ex: "TD15Ex"}
_FLAGS: Final = {"seam_attributes", "td_attributes", "xfam", "init_servtd_attributes", "current_servtd_attributes"}
_WIDTH: Final = 26
ANOTHER_ROOT: Final = (
    "is under another root than Intel's, or than that of --root, which names one to trust"
    " (that of the simulated platform is in the root.der that `simulate` writes)"
)
"""What to do where a chain ends at a root that is not trusted."""


def plain(values: dict[str, object]) -> dict[str, object]:
    """``values`` for JSON: bytes in hex, tuples as lists, structs as objects."""
    found: dict[str, object] = _CONVERTER.unstructure(values)
    return found


_CONVERTER: Final = StrictConverter(plain={bytes: bytes.hex, Struct: lambda struct: plain(asdict(struct))})


def quote_fields(quote: Quote) -> dict[str, object]:
    """Header and body."""
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
            fields |= {f"rtmr{number}": rtmr for number, rtmr in enumerate(value)}
        elif not name.startswith("reserved"):
            fields[name] = value.to_bytes(8, "little") if name in _FLAGS else value
    if isinstance(body, SgxReport):
        fields["attribute_names"] = _names(SgxAttributes(body.flags))
    else:
        fields |= {"attribute_names": _names(TdAttributes(body.td_attributes)), "xfam_names": _names(Xfam(body.xfam))}
    return plain({**fields, "trailing_bytes": quote.trailing})


def _names(flags: TdAttributes | SgxAttributes | Xfam) -> list[str]:
    """Those of the bits that have one."""
    return [str(flag.name) for flag in flags]


def platform_fields(pck: PckIdentity | None) -> dict[str, object]:
    """What a PCK certificate says of its platform."""
    return plain({"pck": pck})


def claimed_platform(quote: Quote) -> PckIdentity | None:
    """What the PCK certificate in the quote says, whoever signed it; None where there is none that can be read."""
    try:
        leaf = read_certificate(read_pem(quote.certification)[0])
        ca: Ca = "platform" if common_name(leaf.issuer) == PLATFORM_CA else "processor"
        return read_pck_extension(leaf.extensions[SGX_EXTENSION], ca=ca, tee=quote.tee)
    except (DerError, KeyError):
        return None


def trusted_root(options: argparse.Namespace) -> TrustedRoot:
    """The root of ``--root``, or Intel's. Raises `ConfigurationError`."""
    if options.root is None:
        return INTEL_ROOT
    data = read_file(options.root)
    try:
        return TrustedRoot.from_der(data)
    except QuoteError as exc:
        raise ConfigurationError(f"--root: {options.root}: {exc}") from None


def say_fields(fields: Mapping[str, object]) -> None:
    """One line each; a mapping's members are named after it, an empty list and None are a dash."""
    for name, value in fields.items():
        match value:
            case dict():
                members = cast("dict[str, object]", value)
                say_fields({f"{name}.{member}": inner for member, inner in members.items()})
            case None | []:
                console.say(f"{name:{_WIDTH}} -")
            case list():
                console.say(f"{name:{_WIDTH}} {', '.join(map(str, cast('list[object]', value)))}")
            case _:
                console.say(f"{name:{_WIDTH}} {value}")
