"""``chutes-proto verify``: whether a quote is genuine and acceptable."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable
from typing import Any, Final

import click

from chutes_proto import quote as verifier
from chutes_proto.cli import console, output
from chutes_proto.cli.base import Command, answer, at_option, full_option, json_option, parsed
from chutes_proto.cli.describe import exits
from chutes_proto.cli.verifier.fields import (
    OTHER_ROOT,
    quote_argument,
    refusal,
    root_option,
    say_fields,
    say_verdict,
    stage_option,
    trusted_root,
)
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.files import MAX_SIZE, read_head
from chutes_proto.quote import _steps as steps
from chutes_proto.quote._errors import spans
from chutes_proto.quote._plain import plain, quote_fields
from chutes_proto.quote._terms import rfc3339
from chutes_proto.server._profiles import EXTRA_KEYS

_SHORTEST: Final = 1024  # digits; no quote has fewer
_NOT_FIELDS: Final = ("accepted", "genuine", "refusals", "explanation", "unjudged", "hint", "steps", "checked")
_TIMES: Final = ("at", "tcb_date", "valid_from", "valid_until")


@click.command(
    "verify", cls=Command, exits=exits("genuine and accepted", "refused, also where quote or collateral do not parse")
)
@quote_argument
@click.option(
    "--collateral",
    "collateral_file",
    metavar="FILE",
    required=True,
    help="JSON with these members: pck_crl_issuer_chain, root_ca_crl, pck_crl, tcb_info_issuer_chain, tcb_info,"
    " tcb_info_signature, qe_identity_issuer_chain, qe_identity, qe_identity_signature and, if you like,"
    " pck_certificate_chain; docs/reference/collateral.md has the form",
)
@at_option("the time to verify at")
@root_option
@click.option(
    "--report-data", metavar="HEX", callback=parsed(console.report_data), help="64 bytes that the quote must bind"
)
@click.option(
    "--policy",
    "policy_file",
    metavar="FILE",
    help="a policy in TOML: [tcb], [identity], [attributes] and [[profile]], or [[any_of]] or [[all_of]] of policies",
)
@stage_option
@json_option
@full_option
def command(
    quote: str,
    collateral_file: str,
    at: int | None,
    root: str | None,
    report_data: bytes | None,
    policy_file: str | None,
    stage: Any,
) -> int:
    """Verify a quote against collateral, and appraise it.

    Verifies a TDX quote (version 4 or 5; also SGX, version 3): PCK chain up to Intel's root or to --root, CRLs, TCB
    info, QE identity, signatures, TCB levels. Then appraises it: by --policy, or by an empty policy that does not check
    measurements: TCB UpToDate, no debugging, SEPT_VE_DISABLE, not migratable. Needs no network.

    Examples:
      chutes-proto verify sim/quote.bin --collateral sim/collateral.json --root sim/root.der
      chutes-proto verify sim/quote.bin --collateral sim/collateral.json \\
          --root sim/root.der --at $(cat sim/now.txt) --policy measurements.toml --json

    See also: inspect, collateral fetch, profile, simulate
    """
    now = int(time.time()) if at is None else at
    trust = trusted_root(root)
    policy = _policy(policy_file)
    data, collateral = (read_head(path, MAX_SIZE + 1) for path in (quote, collateral_file))
    report: dict[str, Any] = {
        "genuine": False,
        "accepted": False,
        "tcb_status": None,
        "advisory_ids": [],
        "refusals": [],
        "at": now,
        "root": trust.digest.hex(),
    }
    try:
        report |= quote_fields(verifier.parse_quote(data, sgx=True))
        verdict = verifier.verify_genuine(
            data, verifier.Collateral.from_json(collateral), now=now, report_data=report_data, root=trust, sgx=True
        )
        report |= plain(
            {
                "genuine": True,
                "tcb_status": verdict.tcb_status,
                "advisory_ids": verdict.advisory_ids,
                "tcb_date": verdict.tcb_date,
                "evaluation_number": verdict.evaluation_number,
                "collateral": verdict.collateral,
                "valid_from": verdict.window[0],
                "valid_until": verdict.window[1],
                "steps": verdict.steps,
                "checked": verdict.checked,
            }
        )
        matched = policy.appraise(verdict, stage=stage).matched
        report |= {"accepted": True, "profile": matched.name if matched else None}
    except verifier.AppraisalError as exc:
        report["refusals"] = [refusal(one.code, one.detail) for one in exc.refusals]
        report["explanation"] = exc.explain()
    except verifier.QuoteFormatError as exc:
        report |= {"refusals": [refusal(exc.code, str(exc))], **_text_hint(data)}
    except (verifier.CollateralFormatError, verifier.VerificationError) as exc:
        report["refusals"] = [refusal(exc.code, str(exc))]
        report |= _hint(
            exc, quote, collateral_file, root, lambda: verifier.open_quote(data, now=now, root=trust, sgx=True)
        )
    return answer(
        report,
        lambda: _say(
            report,
            is_bound=report_data is not None,
            is_measured=policy_file is not None,
            has_floor=_has_floor(policy),
        ),
        ok=report["accepted"],
    )


def _policy(path: str | None) -> verifier.AnyPolicy:
    if path is None:
        return verifier.Policy(measurements="unchecked")
    try:
        return verifier.Policy.load(path, extra_keys=EXTRA_KEYS)
    except verifier.QuoteError as exc:
        raise ConfigurationError(f"--policy: {exc}") from None


def _text_hint(data: bytes) -> dict[str, str]:
    """The remedy for a quote that was written as text."""
    text = b"".join(data.split())
    if len(text) < _SHORTEST:
        return {}
    if re.fullmatch(rb"(?:0x)?[0-9a-fA-F]+", text):
        return {"hint": "The file looks like hexadecimal text; make bytes of it: xxd -r -p QUOTE quote.bin"}
    if re.fullmatch(rb"[A-Za-z0-9+/_-]+={0,2}", text):
        return {"hint": "The file looks like base64 text; make bytes of it: base64 -d QUOTE > quote.bin"}
    return {}


def _hint(
    exc: verifier.QuoteError, quote: str, collateral: str, root: str | None, open_again: Callable[[], object]
) -> dict[str, object]:
    """The remedy; ``unjudged`` where the collateral alone is at fault, so that nothing is known about the quote."""
    match exc:
        case steps.CollateralExpiredError() | steps.CollateralNotYetValidError():
            hint = (
                f"Fetch {collateral} again with `chutes-proto collateral fetch`, or verify at another time with --at."
            )
        case verifier.CollateralFormatError():
            hint = f"{collateral}: fetch it with `chutes-proto collateral fetch`, or see verify --help."
        case (
            steps.CollateralTeeError()
            | steps.CollateralCaError()
            | steps.FmspcMismatchError()
            | steps.PceIdMismatchError()
            | steps.PckChainMismatchError()
        ):
            fetch = shlex.join(
                ["chutes-proto", "collateral", "fetch", "--quote", quote, *(["--root", root] if root else [])]
            )
            hint = f"{collateral} is not of the platform of {quote}; fetch its own: `{fetch} --upstream URL --out DIR`."
        case steps.UntrustedRootError():
            try:
                _ = open_again()
            except steps.UntrustedRootError:
                return {"hint": f"{quote} {OTHER_ROOT}."}
            hint = f"{collateral} {OTHER_ROOT}."
        case _:
            return {}
    return {"unjudged": True, "hint": hint}


def _has_floor(policy: verifier.AnyPolicy) -> bool:
    """Whether a lower bound of the TCB evaluation data number holds for all that is accepted."""
    match policy:
        case verifier.AllOf(policies=members):
            return any(map(_has_floor, members))
        case verifier.AnyOf(policies=members):
            return all(map(_has_floor, members))
        case verifier.Policy():
            return policy.tcb.min_evaluation_number > 0


def _say(report: dict[str, Any], *, is_bound: bool, is_measured: bool, has_floor: bool) -> None:
    if report["accepted"]:
        headline = "ACCEPTED: the quote verifies"
    elif report["genuine"]:
        headline = "REFUSED: the quote is genuine, but not acceptable"
    elif "unjudged" in report:
        headline = "REFUSED: the quote cannot be verified with this collateral"
    else:
        headline = "REFUSED: the quote does not verify"
    say_verdict(report, headline)
    for name in ("explanation", "hint"):
        if name in report:
            output.prose(report[name])
    if not is_bound:
        output.prose("The report data was not compared with anything: use --report-data to bind the quote.")
    if not is_measured:
        output.prose("Measurements were not compared with anything: use --policy with profiles to check them.")
    if not has_floor:
        output.prose(
            "The TCB recovery was not compared with anything: the supplier of the collateral chooses it; use"
            " min_evaluation_number of a policy."
        )
    fields = {name: value for name, value in report.items() if name not in _NOT_FIELDS}
    fields |= {name: rfc3339(fields[name]) for name in _TIMES if name in fields}
    say_fields({"steps": spans(report["steps"]), **fields} if report["genuine"] else fields)
