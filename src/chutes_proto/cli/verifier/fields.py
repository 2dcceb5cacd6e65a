"""The content of a quote as fields, for `inspect`, `verify` and `replay`; and options that verifying commands share.

Bytes, and the 64-bit sets of flags, are lowercase hex in the order in which they stand in the quote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast

import click
from msgspec import Struct
from msgspec.structs import asdict

from chutes_proto import quote as verifier
from chutes_proto._converter import StrictConverter
from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument
from chutes_proto.errors import ConfigurationError, QuoteError
from chutes_proto.io.files import read_file
from chutes_proto.quote._certificates import PLATFORM_CA, SGX_EXTENSION, common_name, read_certificate, read_pem
from chutes_proto.quote._der import DerError
from chutes_proto.quote._pck import Ca, read_pck_extension

_BODY_TYPES: Final = {
    verifier.SgxReport: "SGX",
    verifier.TdReport10: "TD10",
    verifier.TdReport15: "TD15",
    verifier.TdReport15Ex: "TD15Ex",
}
_FLAGS: Final = {"seam_attributes", "td_attributes", "xfam", "init_servtd_attributes", "current_servtd_attributes"}
_WIDTH: Final = 26
OTHER_ROOT: Final = (
    "is under another root than Intel's, or than that of --root, which names one to trust"
    " (that of the simulated platform is in the root.der that `simulate` writes)"
)
"""The remedy where a chain ends at a root that is not trusted."""


def exits(done: str, refused: str) -> dict[int, str]:
    """The exit codes of a command that only reads files."""
    return {
        console.GRANTED: done,
        console.REFUSED: refused,
        console.USAGE: "wrong usage, or a file that cannot be opened",
    }


quote_argument = click.argument("quote", cls=Argument, metavar="QUOTE", help="a file with the quote's bytes")
root_option = click.option("--root", metavar="DER", help="a root to trust instead of Intel's")
stage_option = click.option(
    "--stage", type=click.Choice(("boot", "runtime")), default="boot", show_default=True, help="measurements of"
)


def trusted_root(path: str | None) -> verifier.TrustedRoot:
    """The root of ``--root``, or Intel's. Raises `ConfigurationError`."""
    if path is None:
        return verifier.INTEL_ROOT
    data = read_file(path)
    try:
        return verifier.TrustedRoot.from_der(data)
    except QuoteError as exc:
        raise ConfigurationError(f"--root: {path}: {exc}") from None


def plain(values: dict[str, object]) -> dict[str, object]:
    """``values`` for JSON: bytes in hex, tuples as lists, structs as objects."""
    found: dict[str, object] = _CONVERTER.unstructure(values)
    return found


_CONVERTER: Final = StrictConverter(plain={bytes: bytes.hex, Struct: lambda struct: plain(asdict(struct))})


def quote_fields(quote: verifier.Quote) -> dict[str, object]:
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
    if isinstance(body, verifier.SgxReport):
        fields["attribute_names"] = _names(verifier.SgxAttributes(body.flags))
    else:
        fields |= {
            "attribute_names": _names(verifier.TdAttributes(body.td_attributes)),
            "xfam_names": _names(verifier.Xfam(body.xfam)),
        }
    return plain({**fields, "trailing_bytes": quote.trailing, "pck": _claimed_platform(quote)})


def registers(rtmrs: tuple[bytes, ...]) -> dict[str, str]:
    """RTMRs by name, in hex."""
    return {f"rtmr{number}": rtmr.hex() for number, rtmr in enumerate(rtmrs)}


def _names(flags: verifier.TdAttributes | verifier.SgxAttributes | verifier.Xfam) -> list[str]:
    """Those of the bits that have one."""
    return [str(flag.name) for flag in flags]


def _claimed_platform(quote: verifier.Quote) -> verifier.PckIdentity | None:
    """The claims of the PCK certificate in the quote, whichever CA signed it."""
    try:
        leaf = read_certificate(read_pem(quote.certification)[0])
        ca: Ca = "platform" if common_name(leaf.issuer) == PLATFORM_CA else "processor"
        return read_pck_extension(leaf.extensions[SGX_EXTENSION], ca=ca, tee=quote.tee)
    except (DerError, KeyError):
        return None


def refusal(code: str, detail: str) -> dict[str, str]:
    """One of ``refusals`` in a report."""
    return {"code": code, "detail": detail}


def say_verdict(report: Mapping[str, object], headline: str) -> None:
    """The first lines of a report: a headline with its state, and each refusal."""
    output.say(headline, "good" if report["accepted"] else "bad")
    for one in cast("list[dict[str, str]]", report["refusals"]):
        output.prose(f"{one['code']}: {one['detail']}")


def say_fields(fields: Mapping[str, object]) -> None:
    """One line each; members of a mapping are named after it, an empty list and None are a dash."""
    for name, value in fields.items():
        match value:
            case dict():
                members = cast("dict[str, object]", value)
                say_fields({f"{name}.{member}": inner for member, inner in members.items()})
                continue
            case None | []:
                text = "-"
            case list():
                text = ", ".join(map(str, cast("list[object]", value)))
            case _:
                text = str(value)
        output.prose(f"{name:{_WIDTH}} {text}", rest=_WIDTH + 1)
