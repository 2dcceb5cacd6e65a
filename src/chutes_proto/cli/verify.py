"""``chutes-proto verify``: is this quote genuine, and acceptable?"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any, Final

from chutes_proto.cli import console
from chutes_proto.quote._terms import rfc3339

if TYPE_CHECKING:
    from collections.abc import Callable

    from chutes_proto.quote import AnyPolicy, QuoteError, TrustedRoot

NAME = "verify"
_SHORTEST: Final = 1024  # digits; no quote has fewer


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "verify a quote against collateral, and appraise it",
        """
        Verify a TDX quote (version 4 or 5; also SGX, version 3): PCK chain up to Intel's root or to --root, CRLs, TCB
        info, QE identity, signatures, TCB levels. Then appraise it: with --policy by that, else by what a policy says
        without a word, measurements left unchecked: TCB UpToDate, no debugging, SEPT_VE_DISABLE, not migratable.
        Needs no network.

        exit code: 0 genuine and accepted; 1 refused, also where quote or collateral do not parse; 2 usage, or a file
        that cannot be opened
        """,
        """
        chutes-proto verify quote.bin --collateral collateral.json
        chutes-proto verify sim/quote.bin --collateral sim/collateral.json --root sim/root.der --at $(cat sim/now.txt)
        chutes-proto verify quote.bin --collateral collateral.json --policy policy.toml --json
        """,
    )
    console.add(parser, "quote", metavar="QUOTE", help="a file with the quote's bytes")
    console.add(
        parser,
        "--collateral",
        metavar="FILE",
        required=True,
        help="JSON with these members: pck_crl_issuer_chain, root_ca_crl, pck_crl, tcb_info_issuer_chain, tcb_info,"
        " tcb_info_signature, qe_identity_issuer_chain, qe_identity, qe_identity_signature and, if you like,"
        " pck_certificate_chain; README.md of the package chutes_proto.quote says in which form",
    )
    console.add_at(parser, "the time to judge at")
    console.add(parser, "--root", metavar="DER", help="a root to trust instead of Intel's")
    console.add(
        parser, "--report-data", type=console.report_data, metavar="HEX", help="64 bytes that the quote must bind"
    )
    console.add(
        parser,
        "--policy",
        metavar="FILE",
        help="a policy in TOML: [tcb], [identity], [attributes] and"
        " [[profile]], or [[any_of]] or [[all_of]] with policies in it",
    )
    console.add(
        parser, "--stage", choices=("boot", "runtime"), default="boot", help="for the policy's profiles (default: boot)"
    )
    console.add_json(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    import time

    from chutes_proto.cli.quotes import trusted_root
    from chutes_proto.io.files import MAX_SIZE, read_head

    root = trusted_root(options)
    policy = _policy(options)
    now = int(time.time()) if options.at is None else options.at
    quote, collateral = (read_head(path, MAX_SIZE + 1) for path in (options.quote, options.collateral))
    report = _judge(options, quote, collateral, now, root, policy)
    if options.json:
        console.say_json(report)
    else:
        _say(options, report)
    return console.GRANTED if report["accepted"] else console.REFUSED


def _policy(options: argparse.Namespace) -> AnyPolicy:
    from chutes_proto.errors import ConfigurationError, QuoteError
    from chutes_proto.quote import Policy
    from chutes_proto.server._profiles import EXTRA_KEYS

    if options.policy is None:
        return Policy(measurements="unchecked")
    try:
        return Policy.load(options.policy, extra_keys=EXTRA_KEYS)
    except QuoteError as exc:
        raise ConfigurationError(f"--policy: {exc}") from None


def _judge(
    options: argparse.Namespace,
    quote_data: bytes,
    collateral_data: bytes,
    now: int,
    root: TrustedRoot,
    policy: AnyPolicy,
) -> dict[str, Any]:
    from chutes_proto.cli.quotes import claimed_platform, plain, platform_fields, quote_fields
    from chutes_proto.quote import (
        AppraisalError,
        Collateral,
        CollateralFormatError,
        QuoteFormatError,
        VerificationError,
        open_quote,
        parse_quote,
        verify_genuine,
    )

    report: dict[str, Any] = {
        "genuine": False,
        "accepted": False,
        "tcb_status": None,
        "advisory_ids": [],
        "refusals": [],
        "at": now,
        "root": root.digest.hex(),
    }
    try:
        quote = parse_quote(quote_data, sgx=True)
    except QuoteFormatError as exc:
        report["refusals"] = [{"code": exc.code, "detail": str(exc)}]
        return report | _text_hint(quote_data)
    report |= quote_fields(quote) | platform_fields(claimed_platform(quote))
    try:
        collateral = Collateral.from_json(collateral_data)
        verdict = verify_genuine(quote_data, collateral, now=now, report_data=options.report_data, root=root, sgx=True)
        report |= plain(
            {
                "genuine": True,
                "tcb_status": verdict.tcb_status,
                "advisory_ids": verdict.advisory_ids,
                "tcb_date": verdict.tcb_date,
                "evaluation_number": verdict.evaluation_number,
                "valid_from": verdict.window[0],
                "valid_until": verdict.window[1],
                "steps": verdict.steps,
                "checked": verdict.checked,
            }
        )
        matched = policy.appraise(verdict, stage=options.stage).matched
        report |= {"accepted": True, "profile": matched.name if matched else None}
    except AppraisalError as exc:
        report["refusals"] = [{"code": refusal.code, "detail": refusal.detail} for refusal in exc.refusals]
        report["explanation"] = exc.explain()
    except (CollateralFormatError, VerificationError) as exc:
        report["refusals"] = [{"code": exc.code, "detail": str(exc)}]
        report |= _hint(options, exc, lambda: open_quote(quote_data, now=now, root=root, sgx=True))
    return report


def _text_hint(data: bytes) -> dict[str, str]:
    """What to do with a quote that was written down as text."""
    text = b"".join(data.split())
    if len(text) < _SHORTEST:
        return {}
    if re.fullmatch(rb"(?:0x)?[0-9a-fA-F]+", text):
        return {"hint": "The file looks like hexadecimal text; make bytes of it: xxd -r -p QUOTE quote.bin"}
    if re.fullmatch(rb"[A-Za-z0-9+/_-]+={0,2}", text):
        return {"hint": "The file looks like base64 text; make bytes of it: base64 -d QUOTE > quote.bin"}
    return {}


def _hint(options: argparse.Namespace, exc: QuoteError, open_again: Callable[[], object]) -> dict[str, object]:
    """What to do where the collateral alone is at fault, so that nothing can be said about the quote; or the root."""
    import shlex

    from chutes_proto.cli.quotes import ANOTHER_ROOT
    from chutes_proto.quote import CollateralFormatError
    from chutes_proto.quote import _steps as steps

    file = options.collateral
    match exc:
        case steps.CollateralExpiredError() | steps.CollateralNotYetValidError():
            hint = f"Fetch {file} anew with `chutes-proto collateral fetch`, or judge at another time with --at."
        case CollateralFormatError():
            hint = f"{file}: fetch it with `chutes-proto collateral fetch`, or see verify --help."
        case (
            steps.CollateralTeeError()
            | steps.CollateralCaError()
            | steps.FmspcMismatchError()
            | steps.PceIdMismatchError()
            | steps.PckChainMismatchError()
        ):
            root = [] if options.root is None else ["--root", str(options.root)]
            asked = shlex.join(["--quote", str(options.quote), *root])
            fetch = f"chutes-proto collateral fetch {asked} --upstream URL --out DIR"
            hint = f"{file} is not of the platform of {options.quote}; fetch what is: `{fetch}`."
        case steps.UntrustedRootError():
            try:
                _ = open_again()
            except steps.UntrustedRootError:
                return {"hint": f"{options.quote} {ANOTHER_ROOT}."}
            hint = f"{file} {ANOTHER_ROOT}."
        case _:
            return {}
    return {"unjudged": True, "hint": hint}


def _say(options: argparse.Namespace, report: dict[str, Any]) -> None:
    from chutes_proto.cli.quotes import say_fields
    from chutes_proto.quote.errors import spans

    told = ("accepted", "genuine", "refusals", "explanation", "unjudged", "hint", "steps", "checked")
    if report["accepted"]:
        console.say("ACCEPTED: the quote verifies")
    elif report["genuine"]:
        console.say("REFUSED: the quote is genuine, but not acceptable")
    elif "unjudged" in report:
        console.say("REFUSED: it cannot be judged with this collateral")
    else:
        console.say("REFUSED: the quote does not verify")
    for refusal in report["refusals"]:
        console.say(f"{refusal['code']}: {refusal['detail']}")
    for name in ("explanation", "hint"):
        if name in report:
            console.say(report[name])
    if options.report_data is None:
        console.say("The report data was not compared with anything: say --report-data to bind the quote.")
    if options.policy is None:
        console.say("Measurements were not compared with anything: say --policy with profiles to check them.")
    fields = {name: _shown(name, value) for name, value in report.items() if name not in told}
    say_fields({"steps": spans(report["steps"]), **fields} if report["genuine"] else fields)


def _shown(name: str, value: Any) -> object:
    """A time for people; all else as it is."""
    return rfc3339(value) if name in ("at", "tcb_date", "valid_from", "valid_until") else value
