"""``chutes-proto why``: why a VM was refused, in one command."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, cast

import attrs
import click
from attrs import evolve, frozen

from chutes_proto.auth.hotkey import Hotkey, HotkeyError
from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, answer, parsed
from chutes_proto.cli.operator import operating
from chutes_proto.cli.operator.operating import OperatorCommand
from chutes_proto.cli.verifier.fields import LOG_FORMS, parse_event_log, read_event_log
from chutes_proto.errors import ConfigurationError, Refused
from chutes_proto.io.files import read_lines
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.quote import EventLog, EventLogFormatError
from chutes_proto.quote._terms import rfc3339
from chutes_proto.server._traces import Traced, trace
from chutes_proto.server._why import Denial, Why, explain, recorded
from chutes_proto.store._rows import AuditRow, AuditWanted, FindLastBoot
from chutes_proto.store._run import Ask
from chutes_proto.units.operator import FindVerdict, ReadAuditPage
from chutes_proto.wire.codes import Code

_REQUEST_ID: Final = re.compile(r"[0-9a-f]{32}")
_LINE_BYTES: Final = 256 * 1024


@frozen
class _Refusal:
    """One refusal, and its explanation; ``at`` is a time of RFC 3339. A line of the log has no row."""

    at: str
    peer_address: str
    denial: Denial
    why: Why
    audit: AuditRow | None = None


@click.command("why", cls=OperatorCommand)
@click.argument(
    "subject", cls=Argument, metavar="SUBJECT", help="a VM (HOTKEY/NAME or NAME), a hotkey, or the id of a request"
)
@click.option(
    "--log",
    metavar="FILE",
    help="the server's log, or - for standard input: it has the refusals before a quote is verified, too",
)
@click.option(
    "--last", metavar="N", callback=parsed(operating.at_least_one), default="1", help="only the N newest (default: 1)"
)
@click.option("--event-log", metavar="LOG", help=f"the event log of the VM that was refused: {LOG_FORMS}")
@click.option("--against", metavar="GOOD", help="the event log of a known-good boot")
@operating.shows
def command(subject: str, log: str | None, last: int, event_log: str | None, against: str | None, config: str) -> int:
    """Explain why a VM was refused.

    For the newest refusal of a VM or a hotkey, or for one request: what was refused, at which step of verification,
    the values found and expected, the nearest profile, and what you can do. The server's log has the same text in each
    record of a refusal, under the key why.

    With --event-log (on Linux /sys/firmware/acpi/tables/data/CCEL of the VM) it says for each RTMR that differs
    whether the log leads to the value that was found, and with --against the first event that is not that of a
    known-good boot.

    The store has the refusals of genuine quotes. Everything that is refused before, such as a nonce that is too old, is
    in the log alone.

    Examples:
      chutes-proto why vm-1 --config server.toml
      chutes-proto why vm-1 --event-log CCEL --against good/CCEL --config server.toml
      chutes-proto why 5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY --last 5 --config server.toml --json

    See also: audit list, replay, verify
    """
    wanted = _wanted(subject)
    if against is not None and event_log is None:
        raise click.UsageError("--against goes with --event-log")
    logs = _events(event_log), _events(against)
    with operating.opened(config) as (_, store):
        found = {each.denial.request_id: each for each in _of_log(log, wanted)} if log else {}
        found |= {each.denial.request_id: each for each in _of_store(store, wanted, last)}
        refusals = sorted(found.values(), key=lambda each: each.at)[-last:]
        granted_at = _granted_at(store, refusals)
    if not refusals:
        hint = "" if log else "; refusals before a quote is verified are in the server's log: name it with --log"
        raise Refused(Code.KEY_NOT_FOUND, f"no refusal of {subject} is recorded{hint}")

    def people() -> None:
        for number, each in enumerate(refusals):
            if number:
                console.say("")
            first, *rest = each.why.lines()
            request = f", request {each.denial.request_id}" if each.denial.request_id else ""
            peer = f", peer {each.peer_address}" if each.peer_address else ""
            output.prose(f"refused at {each.at}{request}{peer}: {first}", "bad")
            for line in rest:
                output.prose(f"  {line}", rest=4)
            for traced in _traced(each, logs):
                output.prose(f"  {traced}", rest=4)
        if granted_at is not None:
            output.prose(f"granted since, at {rfc3339(granted_at)}", "good")

    listed = [_members(each, _traced(each, logs)) for each in refusals]
    return answer({"ok": True, "refusals": listed, "granted_at": granted_at}, people)


def _events(path: str | None) -> EventLog | None:
    """The event log in a file. Raises `ConfigurationError`."""
    if path is None:
        return None
    try:
        return parse_event_log(read_event_log(path))
    except EventLogFormatError as exc:
        raise ConfigurationError(f"{path}: {exc}") from None


def _traced(refusal: _Refusal, logs: tuple[EventLog | None, EventLog | None]) -> tuple[Traced, ...]:
    log, good = logs
    return () if log is None else trace(refusal.why.differences, log, good)


def _wanted(subject: str) -> AuditWanted:
    """The audit rows that a subject names."""
    if _REQUEST_ID.fullmatch(subject.lower()):
        return AuditWanted(request_id=subject.lower(), refused=True)
    try:
        return AuditWanted(hotkey=Hotkey.parse(subject).address, refused=True)
    except HotkeyError:
        pass
    try:
        hotkey, _, name = operating.vm_name(subject).rpartition("/")
    except ValueError as exc:
        raise click.BadParameter(f"{exc}; or say a hotkey or the id of a request", param_hint="SUBJECT") from None
    return AuditWanted(hotkey=hotkey, name=name, refused=True)


def _of_store(store: DurableStore, wanted: AuditWanted, last: int) -> Iterator[_Refusal]:
    unit = ReadAuditPage(wanted, backwards=True, limit=last)
    while last > 0:
        page = store.transact(unit)
        for row in page.rows[:last]:
            if not row.is_forged:
                yield _recorded(store, row)
        last -= len(page.rows)
        if page.beyond is None:
            return
        unit = evolve(unit, beyond=page.beyond)


def _recorded(store: DurableStore, row: AuditRow) -> _Refusal:
    denial = recorded(row, store.transact(FindVerdict(row)))
    return _Refusal(rfc3339(row.at), row.peer_address, denial, explain(denial), row)


def _of_log(path: str, wanted: AuditWanted) -> Iterator[_Refusal]:
    """The refusals that a log has; lines of another form, as journald's own, are left out."""
    lines: Iterable[bytes] = sys.stdin.buffer if path == "-" else read_lines(path, limit=_LINE_BYTES)
    for line in lines:
        try:
            found: object = json.loads(line[line.index(b"{") :])
        except (ValueError, RecursionError):
            continue
        told = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
        if told.get("event") != "refused":
            continue
        names = ("at", "code", "reason", "request_id", "peer", "hotkey", "vm", "why")
        read = {name: str(told.get(name, "")) for name in names}
        if _is_wanted(read, wanted):
            denial = Denial(read["code"], read["reason"], read["request_id"], read["hotkey"], read["vm"])
            why, step = explain(denial), told.get("step")
            what, _, where = read["why"].partition("; do: ")[0].partition("; ")
            why = evolve(why, where=where or why.where, step=step if type(step) is int else None)
            at = f"{read['at'].partition('.')[0]}Z"
            yield _Refusal(at, read["peer"], denial, evolve(why, what=what or why.what))


def _is_wanted(told: Mapping[str, str], wanted: AuditWanted) -> bool:
    pairs = (("request_id", wanted.request_id), ("hotkey", wanted.hotkey), ("vm", wanted.name))
    return all(told[name] == value for name, value in pairs if value)


def _granted_at(store: DurableStore, refusals: list[_Refusal]) -> int | None:
    """When the VM of the newest refusal was granted a boot since."""
    row = refusals[-1].audit if refusals else None
    if row is None or row.vm is None:
        return None
    boot = store.transact(Ask(FindLastBoot(row.vm)))
    return boot.created_at if boot is not None and boot.created_at >= row.at else None


def _members(refusal: _Refusal, traced: tuple[Traced, ...]) -> dict[str, object]:
    denial, why, row = refusal.denial, refusal.why, refusal.audit
    names = ("request_id", "hotkey", "vm", "event", "code", "reason")
    told: dict[str, object] = {"at": refusal.at, "peer_address": refusal.peer_address}
    told |= {name: getattr(denial, name) for name in names}
    told |= {"step": why.step, "profile": why.profile, "remedy": why.remedy, "text": str(why)}
    told["differences"] = [attrs.asdict(each) for each in why.differences]
    told["event_log"] = [
        {"register": one.register, "is_of_boot": one.is_of_boot, "is_good": one.is_good, "text": str(one)}
        for one in traced
    ]
    kept = {} if row is None else operating.members(row, "platform quote_digest")
    return told | {"platform": kept.get("platform"), "quote_digest": kept.get("quote_digest")}
