"""``chutes-proto verify``: whether a quote is genuine and acceptable."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
from attrs import field, frozen

from chutes_proto import quote as verifier
from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Command, answer, at_option, full_option, json_option, one_of, parsed
from chutes_proto.cli.describe import exits
from chutes_proto.cli.verifier.fields import (
    LOG_FORMS,
    OTHER_ROOT,
    QUOTE_FORMS,
    parse_event_log,
    read_event_log,
    read_quote_file,
    refusal,
    root_option,
    say_fields,
    say_verdict,
    stage_option,
    trusted_root,
)
from chutes_proto.collateral.library import Family
from chutes_proto.errors import CollateralUnavailable, ConfigurationError
from chutes_proto.io.files import MAX_SIZE, read_file, read_head
from chutes_proto.quote import _steps as steps
from chutes_proto.quote._errors import spans
from chutes_proto.quote._measurements import REGISTERS
from chutes_proto.quote._plain import plain, quote_fields
from chutes_proto.quote._policy_set import BoundPolicies, parse_policy_set
from chutes_proto.quote._terms import rfc3339
from chutes_proto.server._profiles import EXTRA_KEYS

_NOT_FIELDS: Final = (
    *("accepted", "genuine", "refusals", "explanation", "unjudged", "hint", "steps", "behind", "rule"),
)
_TIMES: Final = ("at", "tcb_date", "valid_from", "valid_until")
_READ: Final = (
    "TDX quotes of version 4 or 5 and SGX quotes of version 3 are read, as bytes, hexadecimal digits or base64."
)


@click.command(
    "verify", cls=Command, exits=exits("genuine and accepted", "refused, also where quote or collateral do not parse")
)
@click.argument(
    "quotes",
    cls=Argument,
    metavar="QUOTE...",
    nargs=-1,
    required=True,
    help=f"a file with a quote, - for standard input: {QUOTE_FORMS}",
)
@click.option(
    "--collateral",
    "collateral_file",
    metavar="FILE",
    help="JSON with these members: pck_crl_issuer_chain, root_ca_crl, pck_crl, tcb_info_issuer_chain, tcb_info,"
    " tcb_info_signature, qe_identity_issuer_chain, qe_identity, qe_identity_signature and, if you like,"
    " pck_certificate_chain; docs/reference/collateral.md has the form; or a file of Intel's PcsClientTool",
)
@click.option(
    "--fetch", is_flag=True, help="fetch the collateral, once for each kind of platform, in place of --collateral"
)
@click.option(
    "--service", "services", metavar="URL", multiple=True, help="with --fetch: a PCCS, in place of Intel's; repeatable"
)
@click.option("--ca-file", metavar="PEM", help="with --fetch: CAs to trust for TLS, instead of the system's")
@click.option("--why", is_flag=True, help="explain the result: the rule that refuses, and how far each part is behind")
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
@click.option(
    "--event-log",
    "log_file",
    metavar="LOG",
    help=f"the TD's event log, for profiles with replayed registers: {LOG_FORMS}",
)
@stage_option
@json_option
@full_option
def command(
    quotes: tuple[str, ...],
    collateral_file: str | None,
    fetch: bool,
    services: tuple[str, ...],
    ca_file: str | None,
    why: bool,
    at: int | None,
    root: str | None,
    report_data: bytes | None,
    policy_file: str | None,
    log_file: str | None,
    stage: Any,
) -> int:
    """Verify quotes against collateral, and appraise them.

    Verifies TDX quotes (version 4 or 5; also SGX, version 3): PCK chain up to Intel's root or to --root, CRLs, TCB
    info, QE identity, signatures, TCB levels. Then appraises them: by --policy, or by an empty policy that does not
    check measurements: TCB UpToDate, no debugging, SEPT_VE_DISABLE, not migratable. Needs no network but for --fetch.

    Several quotes get a line each, and a summary; --json then has a list of reports.

    Examples:
      chutes-proto verify sim/quote.bin --collateral sim/collateral.json --root sim/root.der
      chutes-proto verify sim/quote.bin --collateral sim/collateral.json \\
          --root sim/root.der --at $(cat sim/now.txt) --policy measurements.toml --json
      base64 sim/quote.bin | chutes-proto verify - --collateral sim/collateral.json --root sim/root.der --why

    See also: inspect, collateral fetch, profile, simulate
    """
    one_of(collateral=collateral_file, fetch=True if fetch else None)
    if (services or ca_file) and not fetch:
        raise ConfigurationError("--service and --ca-file go with --fetch")
    if len(quotes) > 1 and (report_data is not None or log_file is not None):
        raise ConfigurationError("--report-data and --event-log go with one quote")
    if log_file is not None and policy_file is None:
        raise ConfigurationError("--event-log goes with --policy, whose profiles say which registers it explains")
    if collateral_file is not None and Path(collateral_file).is_dir():
        raise ConfigurationError(
            f"--collateral: {collateral_file} is a directory; name the file of the quote's platform"
        )
    trust = trusted_root(root)
    policy = _policy(policy_file)
    log = None if log_file is None else read_event_log(log_file)
    task = _Task(collateral_file, services, ca_file, at, root, trust, report_data, policy, log_file, log, stage)
    told = _Told(report_data is not None, policy_file is not None, log_file is not None, _demands(policy, _floor), why)
    reports = [_report(task, quote) for quote in quotes]
    if len(reports) == 1:
        return answer(reports[0], lambda: _say(reports[0], told), ok=reports[0]["accepted"])
    accepted = sum(report["accepted"] for report in reports)
    codes = Counter(report["refusals"][0]["code"] for report in reports if report["refusals"])
    summary = {"quotes": len(reports), "accepted": accepted, "refused": len(reports) - accepted, "codes": dict(codes)}
    listed = [{"file": quote, **report} for quote, report in zip(quotes, reports, strict=True)]

    def people() -> None:
        for report in listed:
            _say_line(report, told)
        refused = "".join(f", {count} {code}" for code, count in sorted(codes.items()))
        console.say(f"{accepted} of {len(reports)} accepted{refused}")
        _say_open(told)

    return answer({"accepted": accepted == len(reports), "summary": summary, "quotes": listed}, people, ok=not codes)


@frozen
class _Task:
    """The options by which quotes are verified."""

    collateral_file: str | None
    services: tuple[str, ...]
    ca_file: str | None
    at: int | None
    root: str | None
    trust: verifier.TrustedRoot
    report_data: bytes | None
    policy: verifier.AnyPolicy | BoundPolicies
    log_file: str | None
    log: bytes | None
    stage: Any
    fetched: dict[Family, verifier.Collateral] = field(factory=dict[Family, verifier.Collateral])
    """The collateral of platforms whose quotes have a chain."""


@frozen
class _Told:
    """The contents of a report for people."""

    is_bound: bool
    has_policy: bool
    has_log: bool
    has_floor: bool
    why: bool


def _report(task: _Task, quote: str) -> dict[str, Any]:
    """Verify and appraise one quote."""
    now = int(time.time()) if task.at is None else task.at
    trust = task.trust
    data = read_quote_file(quote)
    report: dict[str, Any] = {
        "genuine": False,
        "accepted": False,
        "tcb_status": None,
        "advisory_ids": [],
        "refusals": [],
        "at": now,
        "root": trust.digest.hex(),
    }
    collateral: verifier.Collateral | None = None
    try:
        report |= quote_fields(verifier.parse_quote(data, sgx=True))
        collateral = _collateral(task, data, now)
        if task.at is None:
            report["at"] = now = int(time.time())  # fetched collateral may be younger than this command
        verdict = verifier.verify_genuine(data, collateral, now=now, report_data=task.report_data, root=trust, sgx=True)
        report |= plain(
            {
                "genuine": True,
                "tcb_status": verdict.tcb_status,
                "advisory_ids": verdict.advisory_ids,
                "tcb_date": verdict.tcb_date,
                "evaluation_number": verdict.evaluation_number,
                "collateral": verdict.collateral,
                "behind": verdict.behind(),
                "valid_from": verdict.window[0],
                "valid_until": verdict.window[1],
                "steps": verdict.steps,
            }
        )
        log = None if task.log is None else parse_event_log(task.log)
        accepted = task.policy.appraise(verdict, now=now, stage=task.stage, event_log=log)
        report |= {"accepted": True, "profile": accepted.matched.name if accepted.matched else None}
        is_pinned = accepted.quote.tee == "SGX" and _demands(task.policy, _enclave)
        report |= {"unpinned": [] if is_pinned else list(accepted.unpinned), "replayed": list(accepted.replayed)}
    except verifier.AppraisalError as exc:
        report["refusals"] = [refusal(one.code, one.detail) for one in exc.refusals]
        report["explanation"] = exc.explain()
        if task.log is None and any(one.code == "event_log" for one in exc.refusals):
            report["hint"] = "Give the TD's event log with --event-log."
    except verifier.EventLogFormatError as exc:
        report["refusals"] = [refusal(exc.code, f"{task.log_file}: {exc}")]
    except verifier.QuoteFormatError as exc:
        hint = f"Is {'standard input' if quote == '-' else quote} a quote, and all of it? {_READ}"
        report |= {"refusals": [refusal(exc.code, str(exc))], "hint": hint}
    except CollateralUnavailable as exc:
        report |= {"refusals": [refusal("collateral_unavailable", str(exc))], "unjudged": True}
    except (verifier.CollateralFormatError, verifier.VerificationError) as exc:
        report["refusals"] = [refusal(exc.code, str(exc))]
        if isinstance(exc, verifier.VerificationError):
            report["rule"] = f"step {exc.step}: {exc.rule}"
        named = task.collateral_file or "the fetched collateral"

        def quote_alone() -> object:
            chain = None if collateral is None else collateral.pck_certificate_chain
            opened = verifier.open_quote(data, now=now, root=trust, sgx=True, pck_certificate_chain=chain)
            return verifier.check_signed(opened)

        def collateral_alone() -> object:
            return collateral and verifier.verify_collateral(collateral, now=now, root=trust)

        report |= _hint(exc, quote, named, task.root, quote_alone, collateral_alone)
    return report


def _collateral(task: _Task, data: bytes, now: int) -> verifier.Collateral:
    if task.collateral_file is not None:
        return verifier.Collateral.from_json(read_head(task.collateral_file, MAX_SIZE + 1), quote=data)
    from chutes_proto.collateral.pcs import INTEL_PCS
    from chutes_proto.io.collateral.of_quote import fetch_collateral

    try:
        family = Family.of(verifier.open_quote(data, now=now, root=task.trust, sgx=True).pck)
    except verifier.VerificationError:  # the fetch says why, or fetches the chain, too
        family = None
    if family in task.fetched:
        return task.fetched[family]
    found = fetch_collateral(data, task.services or (INTEL_PCS,), root=task.trust, ca_file=task.ca_file)
    if family is not None:
        task.fetched[family] = found
    return found


def _policy(path: str | None) -> verifier.AnyPolicy | BoundPolicies:
    if path is None:
        return verifier.Policy(measurements="unchecked")
    data = read_file(path)
    try:
        return parse_policy_set(data, extra_keys=EXTRA_KEYS).with_own_profiles()
    except verifier.PolicyError as exc:
        raise ConfigurationError(f"--policy: {path}: {exc}") from None


def _hint(
    exc: verifier.QuoteError,
    quote: str,
    collateral: str,
    root: str | None,
    quote_alone: Callable[[], object],
    collateral_alone: Callable[[], object],
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
            if _error_of(quote_alone):
                return {"hint": f"{quote} {OTHER_ROOT}."}
            hint = f"{collateral} {OTHER_ROOT}."
        case steps.CertificateRevokedError():  # the CA of the quote, too
            return {}
        case _:
            if _error_of(quote_alone) or not _error_of(collateral_alone):
                return {}
            hint = f"{collateral} is at fault: fetch it again with `chutes-proto collateral fetch`."
    return {"unjudged": True, "hint": hint}


def _error_of(check: Callable[[], object]) -> verifier.VerificationError | None:
    try:
        _ = check()
    except verifier.VerificationError as exc:
        return exc
    return None


def _demands(policy: verifier.AnyPolicy | BoundPolicies, one: Callable[[verifier.Policy], bool]) -> bool:
    """Whether a demand of ``one`` policy holds for all that is accepted."""
    match policy:
        case verifier.AllOf(policies=members):
            return any(_demands(member, one) for member in members)
        case BoundPolicies(policies=members) | verifier.AnyOf(policies=members):
            return all(_demands(member, one) for member in members)
        case verifier.Policy():
            return one(policy)


def _floor(policy: verifier.Policy) -> bool:
    """A lower bound of the TCB evaluation data number."""
    return policy.tcb.min_evaluation_number > 0


def _enclave(policy: verifier.Policy) -> bool:
    """The enclave or its signer."""
    return bool(policy.identity.mr_enclave or policy.identity.mr_signer)


def _say(report: dict[str, Any], told: _Told) -> None:
    say_verdict(report, _headline(report))
    for name in ("explanation", "hint"):
        if name in report:
            output.prose(report[name])
    if told.why:
        _say_why(report)
    _say_open(told, report)
    fields = {name: value for name, value in report.items() if name not in _NOT_FIELDS}
    fields |= {name: rfc3339(fields[name]) for name in _TIMES if name in fields}
    if "collateral" in fields:
        issue = fields["collateral"]
        fields["collateral"] = issue | {name: rfc3339(at) for name, at in issue.items() if name.endswith("_issued")}
    say_fields({"steps": spans(report["steps"]), **fields} if report["genuine"] else fields)


def _say_open(told: _Told, report: dict[str, Any] | None = None) -> None:
    """Name all that was not compared; of several quotes, which have no ``report`` here, all that is common to them."""
    if not told.is_bound:
        output.prose("The report data was not compared with anything: use --report-data to bind the quote.")
    if not told.has_policy:
        output.prose(_UNCHECKED)
    elif report is not None:
        _say_unpinned(report)
    if told.has_log and report is not None and report["accepted"] and not report["replayed"]:
        output.prose("The event log was not compared with anything, as the profile has no replayed register.")
    if not told.has_floor:
        output.prose(
            "The TCB recovery was not compared with anything: the supplier of the collateral chooses it; use"
            " min_evaluation_number of a policy."
        )


def _say_unpinned(report: dict[str, Any], indent: str = "") -> None:
    """Name the registers that a policy accepted with any value."""
    unpinned = set(report.get("unpinned", ()))
    if unpinned >= {*REGISTERS}:
        output.prose(indent + _UNCHECKED)
    elif unpinned:
        names = ", ".join(sorted(unpinned))
        output.prose(f"{indent}{names}: not compared with anything, as the profile accepts any value.")


_UNCHECKED: Final = "Measurements were not compared with anything: use --policy with profiles to check them."


def _headline(report: dict[str, Any]) -> str:
    if report["accepted"]:
        return "ACCEPTED: the quote verifies"
    if report["genuine"]:
        return "REFUSED: the quote is genuine, but not acceptable"
    if "unjudged" in report:
        return "REFUSED: the quote cannot be verified with this collateral"
    return "REFUSED: the quote does not verify"


def _say_line(report: dict[str, Any], told: _Told) -> None:
    """One quote of several."""
    codes = ", ".join(one["code"] for one in report["refusals"])
    state = f"ACCEPTED  {report['tcb_status']}" if report["accepted"] else f"REFUSED   {codes}"
    output.prose(f"{state}  {report['file']}", "good" if report["accepted"] else "bad")
    if told.why:
        for one in report["refusals"]:
            output.prose(f"  {one['code']}: {one['detail']}")
        _say_why(report)
    if told.has_policy:
        _say_unpinned(report, "  ")


def _say_why(report: dict[str, Any]) -> None:
    if "rule" in report:
        output.prose(f"The rule that refuses it is {report['rule']}.")
    for part in report.get("behind", ()):
        lacks = ", ".join(f"{one['component']} is {one['got']}, not {one['needed']}" for one in part["lacks"])
        advisories = ", ".join(part["advisory_ids"]) or "none"
        output.prose(
            f"The {part['part']} is {part['status']}; the next level, {part['next_status']}, is of"
            f" {rfc3339(part['since'])[:10]}: {lacks}. Advisories that it ends: {advisories}."
        )
