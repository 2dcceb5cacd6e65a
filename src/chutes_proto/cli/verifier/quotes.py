"""``chutes-proto inspect`` and ``chutes-proto profile``: the content of quotes, not verified."""

from __future__ import annotations

import click

from chutes_proto import quote as verifier
from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Command, answer, full_option, json_option, wants
from chutes_proto.cli.describe import exits
from chutes_proto.cli.verifier.fields import quote_argument, read_quote_file, refusal, say_fields
from chutes_proto.errors import ConfigurationError
from chutes_proto.quote._plain import quote_fields, registers


@click.command("inspect", cls=Command, exits=exits("decoded", "not a quote"))
@quote_argument
@json_option
@full_option
def inspect(quote: str) -> int:
    """Show the content of a quote without verifying it.

    Decodes header, report, attributes by name, and the claims of the PCK certificate about its platform. Nothing is
    verified: anyone can make a quote that says this.

    Examples:
      chutes-proto inspect sim/quote.bin
      chutes-proto inspect sim/quote.bin --json | python3 -m json.tool

    See also: verify, profile
    """
    try:
        fields = quote_fields(verifier.parse_quote(read_quote_file(quote), sgx=True))
    except verifier.QuoteFormatError as exc:
        said = {"parsed": False, "verified": False, "refusals": [refusal(exc.code, str(exc))]}
        return answer(said, f"not a quote: {exc} ({exc.code})", ok=False)

    def people() -> None:
        output.prose("This is what the quote says. Nothing of it was verified; `chutes-proto verify` does that.")
        say_fields(fields)

    return answer({"parsed": True, "verified": False, **fields}, people)


@click.command(
    "profile", cls=Command, exits=exits("printed", "a quote does not parse, is not of a TD, or the MRTDs differ")
)
@click.argument("boot", cls=Argument, metavar="BOOT", help="a quote made when the TD asks for its keys")
@click.argument("runtime", cls=Argument, metavar="RUNTIME", help="a quote that the same TD made later")
@click.option("--name", metavar="NAME", required=True, help="the profile's name")
@click.option("--version", metavar="VERSION", default="1", show_default=True, help="its version")
@json_option
def profile(boot: str, runtime: str, name: str, version: str) -> int:
    """Write a measurement profile from two quotes.

    Prints MRTD and the RTMRs of both as a profile, for a file that `measurements` of a server's configuration names,
    or for a policy.

    Nothing is verified: take quotes of a machine that you trust, and check them with `chutes-proto verify`. If you can
    build the image again, compare the registers with those of your build.

    Examples:
      chutes-proto profile boot.quote runtime.quote --name 8xh200 --version 1.0 > measurements.toml
      chutes-proto profile boot.quote runtime.quote --name 8xh200 --json

    See also: verify, inspect, serve
    """
    reports: list[verifier.TdReport10] = []
    for path in (boot, runtime):
        try:
            body = verifier.parse_quote(read_quote_file(path)).body
        except verifier.QuoteFormatError as exc:
            return _refuse(exc.code, f"{path}: {exc}")
        if not isinstance(body, verifier.TdReport10):
            return _refuse("quote_tee_type", f"{path}: not a quote of a TD")
        reports.append(body)
    first, later = reports
    if first.mr_td != later.mr_td:
        return _refuse("mrtd_differs", "the two quotes have different MRTDs, so they are not of one image")
    try:
        made = verifier.Profile(name=name, version=version, mrtd=first.mr_td, boot=first.rtmrs, runtime=later.rtmrs)
    except verifier.PolicyError as exc:
        raise ConfigurationError(f"--{exc}") from None
    content = {
        "name": made.name,
        "version": made.version,
        "mrtd": made.mrtd.hex(),
        "boot": registers(made.boot),
        "runtime": registers(made.runtime),
    }
    return answer({"profile": content}, made.to_toml())


def _refuse(code: str, detail: str) -> int:
    if wants("json"):
        console.say_json({"profile": None, "refusals": [refusal(code, detail)]})
    else:
        console.complain(f"{detail} ({code})")
    return console.REFUSED
