"""``chutes-proto replay``: is this event log what the RTMRs of a quote were extended with?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, cast

from chutes_proto.cli import console

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chutes_proto.quote import Event, EventLog, TdReport10
    from chutes_proto.quote._eventlog import Difference

NAME = "replay"


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "replay a TD's event log against a quote, and find where a boot went another way",
        """
        Replay an event log (CCEL; Linux has it in /sys/firmware/acpi/tables/data/CCEL) and compare the result with
        RTMR0 to RTMR3 of a TDX quote. With --against also compare it with the log of a known-good boot, and name the
        first event that differs. The quote is not verified here; `chutes-proto verify` does that. The simulated
        platform has no event log: log and quote are of a real TD.

        exit code: 0 the log is the quote's and, with --against, measures what the good log does; 1 it does not, also
        where a file does not parse; 2 usage, or a file that cannot be opened
        """,
        """
        chutes-proto replay CCEL --quote quote.bin
        chutes-proto replay CCEL --quote quote.bin --against good/CCEL --json
        """,
    )
    console.add(parser, "log", metavar="LOG", help="a file with the event log's bytes")
    console.add(parser, "--quote", metavar="QUOTE", required=True, help="a file with the quote's bytes")
    console.add(parser, "--against", metavar="GOOD", help="the event log of a known-good boot")
    console.add_json(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    from chutes_proto.io.files import read_head
    from chutes_proto.quote._eventlog import MAX_SIZE

    names = (options.log, options.quote, *(() if options.against is None else (options.against,)))
    report = _judge(names, [read_head(name, MAX_SIZE + 1) for name in names])
    if options.json:
        console.say_json(report)
    else:
        _say(report)
    return console.GRANTED if report["accepted"] else console.REFUSED


def _judge(names: Sequence[str], files: Sequence[bytes]) -> dict[str, Any]:
    """The report on a log, a quote and perhaps the log of a good boot, each with the name of its file."""
    from chutes_proto.quote import (
        EventLogFormatError,
        EventLogMismatchError,
        QuoteFormatError,
        first_difference,
        parse_event_log,
        parse_quote,
        replay,
    )

    report: dict[str, Any] = {"accepted": False, "parsed": False, "replayed": False, "refusals": []}

    def refuse(code: str, detail: str) -> None:
        report["refusals"].append({"code": code, "detail": detail})

    parsed: list[Any] = []
    parsers: list[Callable[[bytes], Any]] = [parse_event_log, parse_quote, parse_event_log]
    for name, data, parse in zip(names, files, parsers[: len(names)], strict=True):
        try:
            parsed.append(parse(data))
        except (EventLogFormatError, QuoteFormatError) as exc:
            refuse(exc.code, f"{name}: {exc}")
    if report["refusals"]:
        return report
    log: EventLog = parsed[0]
    body = cast("TdReport10", parsed[1].body)  # SGX quotes are not asked for
    good: EventLog | None = parsed[2] if len(parsed) > 2 else None
    try:
        verified = sum(event.digest_verified for event in log.events)
        report |= {"parsed": True, "events": len(log.events), "digests_verified": verified}
        report |= {f"rtmr{number}": rtmr.hex() for number, rtmr in enumerate(log.rtmrs)}
        difference = None if good is None else first_difference(log, good)
        if difference is not None:
            report["difference"] = _difference(difference)
            refuse("event_log_difference", f"the boots part at this event of {difference}")
        replayed = replay(log, body.rtmrs)
        report |= {
            "replayed": True,
            "secure_boot": replayed.secure_boot,
            "kernel_command_lines": list(replayed.kernel_command_lines),
            "grub_commands": list(replayed.grub_commands),
            "boot_applications": [digest.hex() for digest in replayed.boot_applications],
        }
    except EventLogMismatchError as exc:
        report |= {"register": exc.register, "registers": list(exc.registers)}
        refuse(exc.code, str(exc))
    report["accepted"] = not report["refusals"]
    return report


def _difference(difference: Difference) -> dict[str, Any]:
    return {
        "register": difference.register,
        "got": _event(difference.got),
        "expected": _event(difference.expected),
    }


def _event(event: Event | None) -> dict[str, Any] | None:
    if event is None:
        return None
    return {
        "number": event.number,
        "type": event.type_name,
        "digest": event.digest.hex(),
        "digest_verified": event.digest_verified,
        "data": event.data[:4096].hex(),
    }


def _say(report: dict[str, Any]) -> None:
    from chutes_proto.cli.quotes import say_fields

    if not report["parsed"]:
        console.say("REFUSED: nothing was compared, because a file does not parse")
    elif not report["replayed"]:
        console.say("REFUSED: the log does not replay to the RTMRs of the quote")
    elif not report["accepted"]:
        console.say("REFUSED: the log replays to the RTMRs of the quote, but it is not the good boot's")
    else:
        console.say("ACCEPTED: the log replays to the RTMRs of the quote")
    for refusal in report["refusals"]:
        console.say(f"{refusal['code']}: {refusal['detail']}")
    console.say("The quote was not verified: `chutes-proto verify` does that.")
    told = ("accepted", "parsed", "replayed", "refusals", "difference")
    say_fields({name: value for name, value in report.items() if name not in told})
