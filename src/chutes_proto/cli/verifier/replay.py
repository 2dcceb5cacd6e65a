"""``chutes-proto replay``: whether the RTMRs of a quote were extended with an event log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import click

from chutes_proto import quote as verifier
from chutes_proto.cli import console
from chutes_proto.cli.base import Argument, Command, answer, full_option, json_option
from chutes_proto.cli.describe import exits
from chutes_proto.cli.verifier.fields import (
    LOG_FORMS,
    QUOTE_FORMS,
    parse_event_log,
    read_event_log,
    read_quote_file,
    refusal,
    say_fields,
    say_verdict,
)
from chutes_proto.quote._plain import registers

_NOT_FIELDS: Final = ("accepted", "parsed", "replayed", "refusals", "difference")


@click.command(
    "replay",
    cls=Command,
    exits=exits(
        "the log is the quote's and, with --against, measures the same as the good log",
        "it does not, also where a file does not parse",
    ),
)
@click.argument("log", cls=Argument, metavar="LOG", help=f"a file with the event log: {LOG_FORMS}")
@click.option("--quote", metavar="QUOTE", required=True, help=f"a file with the quote: {QUOTE_FORMS}")
@click.option("--against", metavar="GOOD", help="the event log of a known-good boot")
@json_option
@full_option
def command(log: str, quote: str, against: str | None) -> int:
    """Replay an event log against a quote, and find the first event that differs.

    Replays an event log (CCEL; on Linux /sys/firmware/acpi/tables/data/CCEL; or the JSON list of a dstack VM) and
    compares the result with RTMR0 to RTMR3 of a TDX quote. With --against also compares it with the log of a known-good
    boot. The quote is not verified here; `chutes-proto verify` does that. The simulated platform has no event log: use
    log and quote of a real TD.

    Examples:
      chutes-proto replay CCEL --quote quote.bin
      chutes-proto replay CCEL --quote quote.bin --against good/CCEL --json

    See also: verify, inspect
    """
    report = _report(log, quote, against)
    return answer(report, lambda: _say(report), ok=bool(report["accepted"]))


def _report(log_file: str, quote_file: str, good_file: str | None) -> dict[str, Any]:
    parsers: dict[str, Callable[[bytes], Any]] = {
        "log": parse_event_log,
        "quote": verifier.parse_quote,
        "good": parse_event_log,
    }
    names = {"log": log_file, "quote": quote_file, **({} if good_file is None else {"good": good_file})}
    files = {role: read_quote_file(name) if role == "quote" else read_event_log(name) for role, name in names.items()}
    refusals: list[dict[str, str]] = []
    report: dict[str, Any] = {"accepted": False, "parsed": False, "replayed": False, "refusals": refusals}
    parsed: dict[str, Any] = {}
    for role, name in names.items():
        try:
            parsed[role] = parsers[role](files[role])
        except (verifier.EventLogFormatError, verifier.QuoteFormatError) as exc:
            refusals.append(refusal(exc.code, f"{name}: {exc}"))
    if refusals:
        return report
    log: verifier.EventLog = parsed["log"]
    body = cast("verifier.TdReport10", parsed["quote"].body)  # SGX quotes do not parse here
    try:
        verified = sum(event.digest_verified for event in log.events)
        report |= {"parsed": True, "events": len(log.events), "digests_verified": verified, **registers(log.rtmrs)}
        difference = verifier.first_difference(log, parsed["good"]) if "good" in parsed else None
        if difference is not None:
            got, expected = _event(difference.got), _event(difference.expected)
            report["difference"] = {"register": difference.register, "got": got, "expected": expected}
            refusals.append(refusal("event_log_difference", f"the boots differ from this event of {difference} on"))
        replayed = verifier.replay(log, body.rtmrs)
        report |= {
            "replayed": True,
            "secure_boot": replayed.secure_boot,
            "kernel_command_lines": list(replayed.kernel_command_lines),
            "grub_commands": list(replayed.grub_commands),
            "boot_applications": [digest.hex() for digest in replayed.boot_applications],
        }
    except verifier.EventLogMismatchError as exc:
        report |= {"register": exc.register, "registers": list(exc.registers)}
        refusals.append(refusal(exc.code, str(exc)))
    report["accepted"] = not refusals
    return report


def _event(event: verifier.Event | None) -> dict[str, Any] | None:
    if event is None:
        return None
    return {
        "number": event.number,
        "type": event.type_name,
        "digest": event.digest.hex(),
        "digest_verified": event.digest_verified,
        "data": event.data[:4096].hex(),
    }


def _say(report: Mapping[str, Any]) -> None:
    if not report["parsed"]:
        headline = "REFUSED: nothing was compared, because a file does not parse"
    elif not report["replayed"]:
        headline = "REFUSED: the log does not replay to the RTMRs of the quote"
    elif not report["accepted"]:
        headline = "REFUSED: the log replays to the RTMRs of the quote, but differs from the good boot's"
    else:
        headline = "ACCEPTED: the log replays to the RTMRs of the quote"
    say_verdict(report, headline)
    console.say("The quote was not verified: `chutes-proto verify` does that.")
    say_fields({name: value for name, value in report.items() if name not in _NOT_FIELDS})
