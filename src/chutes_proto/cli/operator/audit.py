"""``chutes-proto audit``: every decision, for whom and why."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from itertools import islice
from typing import Any, TypeVar

import click
from attrs import evolve

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Group, answer, parsed
from chutes_proto.cli.console import moment
from chutes_proto.cli.operator import operating
from chutes_proto.cli.operator.operating import DAY, OperatorCommand
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store._run import Ask
from chutes_proto.store.rows import AuditRow, AuditWanted, ReadAudit
from chutes_proto.units.operator import PurgeAudits, ReadAuditPage

F = TypeVar("F", bound=Callable[..., Any])

_END = 1 << 62
_SHOWN = 1000
_STATES: dict[str, output.State] = {"granted": "good", "done": "good", "refused": "bad"}
_COLUMNS: output.Columns = {
    "TIME": lambda row: output.when(row.at),
    "ACTOR": lambda row: row.actor,
    "EVENT": lambda row: row.event,
    "VM": lambda row: output.vm(row.vm) if row.vm else "-",
    "DECISION": lambda row: output.Cell(row.decision, _STATES.get(row.decision, "")),
    "KEYS": lambda row: row.keys or "-",
    "REASON": lambda row: row.reason or "-",
}
_UNDER = {"ACTOR": "EVENT", "REASON": "DECISION", "KEYS": "DECISION"}

command: Group = Group(
    "audit",
    of=OperatorCommand,
    help="""Show, export and purge the audit rows.

    Each decision is kept in the transaction that carried it out: who asked, which boot, the decision and its reason,
    measurement profile, digest of the quote, generations of keys. No audit row contains a secret.

    Examples:
      chutes-proto audit list --vm vm-1 --config server.toml
      chutes-proto audit export --since 2026-05-01 --config server.toml > audit.jsonl

    See also: vm, keys
    """,
)


def _selection(default: int | None) -> Callable[[F], F]:
    """The options that select audit rows."""

    def decorate(function: F) -> F:
        options = (
            click.option(
                "--vm",
                metavar="VM",
                callback=parsed(operating.vm_name),
                help="HOTKEY/NAME, or NAME of any hotkey; also of a VM that was only ever refused",
            ),
            click.option("--request-id", metavar="ID", help="one request, by the id that its answer and the log have"),
            click.option("--event", metavar="WORD", help="one event, for example boot or 'key restored'"),
            click.option("--since", metavar="TIME", callback=parsed(moment), default="0", help="from this time on"),
            click.option("--until", metavar="TIME", callback=parsed(moment), help="before this time"),
            click.option(
                "--last",
                metavar="N",
                callback=parsed(operating.count),
                default=default and str(default),
                help=f"only the N newest (default: {default or 'all'})",
            ),
        )
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@command.command("list")
@_selection(_SHOWN)
@operating.shows
def listing(
    vm: str | None,
    request_id: str | None,
    event: str | None,
    since: int,
    until: int | None,
    last: int,
    config: str,
) -> int:
    """Show audit rows for people, the newest last.

    Examples:
      chutes-proto audit list --event boot --last 20 --config server.toml
      chutes-proto audit list --vm vm-1 --since 2026-05-01 --config server.toml --json
      chutes-proto audit list --request-id 541e166f739b0b89a1436895c227b41b --config server.toml

    See also: why, audit export, keys history
    """
    unit = _unit(vm, request_id, event, since, until)
    with operating.opened(config) as (_, store):
        rows = _newest(store, unit, last)
    return operating.answer_rows("rows", rows, _members, _COLUMNS, "no audit rows", _UNDER)


@command.command()
@_selection(None)
@operating.config_option
def export(
    vm: str | None,
    request_id: str | None,
    event: str | None,
    since: int,
    until: int | None,
    last: int | None,
    config: str,
) -> int:
    """Write audit rows as lines of JSON.

    Each line is one JSON object with all members, in the order of the decisions. Decisions that are made while an
    export runs may be in the next export only: let that one begin a minute before the last one did.

    Examples:
      chutes-proto audit export --config server.toml > audit.jsonl
      chutes-proto audit export --since 2026-05-01 --event boot --config server.toml

    See also: audit list, audit purge
    """
    unit = _unit(vm, request_id, event, since, until)
    with operating.opened(config) as (_, store):
        if last is not None:
            console.say_json_lines(map(_members, _newest(store, unit, last)))
            return console.GRANTED
        # No bar between the rows, where they go to the same terminal.
        console.say_json_lines(map(_members, _every(store, unit, is_told=not output.draws())))
    return console.GRANTED


@command.command()
@operating.purges("audit_days", 365, "written")
@operating.changes
def purge(older_than: int | None, yes: bool, reason: str, config: str) -> int:
    """Delete audit rows whose retention has ended, for ever.

    Deletes the audit rows that are older than audit_days of the configuration, by the time of each row and this
    machine's clock. Export them before. Servers may run meanwhile, and the purge may be stopped and begun again. An
    audit row says who deleted how many. Without --yes nothing is deleted, only counted.

    Examples:
      chutes-proto audit purge --config server.toml
      chutes-proto audit purge --older-than 730 --yes --config server.toml

    See also: audit export, keys purge
    """
    with (
        operating.opened(config) as (setup, store),
        output.progress("audit rows looked at") as tell,
    ):
        days = operating.kept_days(older_than, "audit_days", setup.config.audit_days, "audit rows")
        began = operating.now()
        before = began - days * DAY
        unit, found = PurgeAudits(began, before, reason, carry_out=yes), 0
        newest = _newest_number(store)
        while True:
            step = store.transact(unit)
            found += step.count
            if step.beyond is None:
                break
            unit = evolve(unit, beyond=step.beyond)
            tell(min(step.beyond, newest), newest)
    if not found:
        told = f"nothing to purge: no audit row is older than {rfc3339(before)}"
    elif yes:
        told = f"audit rows older than {rfc3339(before)} deleted: {found}"
    else:
        told = f"audit rows older than {rfc3339(before)}: {found}; with --yes they are deleted"
    return answer({"ok": True, "purged": yes, "older_than_days": days, "before": before, "rows": found}, told)


def _unit(vm: str | None, request_id: str | None, event: str | None, since: int, until: int | None) -> ReadAuditPage:
    end = _END if until is None else until
    if since >= end:
        raise ConfigurationError("--since: it is not before --until, so no time is selected; say an earlier one")
    hotkey, _, name = (vm or "").rpartition("/")
    return ReadAuditPage(AuditWanted(since, end, hotkey, name, event or "", request_id or ""))


def _newest_number(store: DurableStore) -> int:
    newest = store.transact(Ask(ReadAudit(_END, 1, backwards=True)))
    return newest[0][0] if newest else 0


def _every(store: DurableStore, unit: ReadAuditPage, *, is_told: bool) -> Generator[AuditRow]:
    """The rows one after the other, of which a page at a time is in memory."""
    newest = _newest_number(store)
    with output.waiting("audit rows looked at", newest) if is_told else nullcontext(output.untold) as tell:
        while True:
            page = store.transact(unit)
            yield from page.rows
            if page.beyond is None:
                return
            tell(min(newest, newest - page.beyond if unit.backwards else page.beyond))
            unit = evolve(unit, beyond=page.beyond)


def _newest(store: DurableStore, unit: ReadAuditPage, limit: int) -> list[AuditRow]:
    """So many of the newest rows, the oldest of them first."""
    with closing(_every(store, evolve(unit, backwards=True), is_told=True)) as rows:
        return [*islice(rows, limit)][::-1]


def _members(row: AuditRow) -> dict[str, object]:
    names = "at actor event decision reason hotkey vm boot_id request_id platform profile quote_digest keys"
    return operating.members(row, f"{names} peer_address")
