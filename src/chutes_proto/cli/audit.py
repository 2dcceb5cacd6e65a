"""``chutes-proto audit``: what was decided, for whom and why."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from chutes_proto.cli import console, operating

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chutes_proto.io.stores.address import DurableStore
    from chutes_proto.store.rows import AuditRow
    from chutes_proto.units.operator import ReadAuditPage

NAME = "audit"
_END = 1 << 62
_SHOWN = 1000
_EXIT_CODES = """
        exit code: 0 done; 1 not possible as asked, or the store cannot be read; 2 usage, or a file that cannot be read
"""


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "show, export and purge the audit rows",
        f"""
        Each decision is kept in the same transaction as what it decided: who asked, which boot, what was decided and
        why, measurement profile, digest of the quote, generations of keys. No secret is among it.
        {_EXIT_CODES}
        """,
        "chutes-proto audit list --config /etc/chutes/server.toml --vm vm-1\n"
        "chutes-proto audit export --config /etc/chutes/server.toml --since 2026-05-01 > audit.jsonl",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    listed = console.command(
        actions,
        "list",
        "show them for people, the newest last",
        f"""
        Show one line for each decision, the newest last; the newest {_SHOWN} unless --last says otherwise.
        {_EXIT_CODES}
        """,
        "chutes-proto audit list --config /etc/chutes/server.toml --event boot --last 20",
    )
    export = console.command(
        actions,
        "export",
        "write them as lines of JSON",
        f"""
        Write one JSON object a line with all members, in the order in which the decisions were made. What is decided
        while an export runs may be in the next one only: let that begin a minute before the last one did.
        {_EXIT_CODES}
        """,
        "chutes-proto audit export --config /etc/chutes/server.toml > audit.jsonl",
    )
    purge = console.command(
        actions,
        "purge",
        "delete those whose retention is over, for ever",
        """
        Delete the audit rows that are older than audit_days, as the configuration says, by the time that each tells and
        this machine's clock; export them before. It goes some at a time, while servers go on, and can be stopped and
        begun again; who deleted how many is an audit row again. Without --yes nothing is deleted: how many would be is
        told.
        """,
        "chutes-proto audit purge --config /etc/chutes/server.toml\n"
        "chutes-proto audit purge --older-than 730 --yes --config /etc/chutes/server.toml",
    )
    told = "written so many days ago or earlier; audit_days of the configuration (365 by default) or more"
    console.add(purge, "--older-than", metavar="DAYS", type=operating.count, help=told)
    console.add(purge, "--yes", action="store_true", help="delete them")
    operating.add_reason(purge)
    operating.add_config(purge)
    for action in (listed, export):
        console.add(
            action,
            "--vm",
            metavar="VM",
            type=operating.vm_name,
            help="HOTKEY/NAME, or NAME of whatever hotkey; also of a VM that was only ever refused",
        )
        console.add(action, "--event", metavar="WORD", help="one event, for example boot or 'key restored'")
        console.add(action, "--since", metavar="TIME", type=console.moment, default=0, help="from this time on")
        console.add(action, "--until", metavar="TIME", type=console.moment, default=_END, help="before this time")
        shown = _SHOWN if action is listed else None
        told = f"only so many, the newest (default: {shown or 'all'})"
        console.add(action, "--last", metavar="N", type=operating.count, default=shown, help=told)
        console.add(action, "--config", metavar="FILE", required=True, help="the server's configuration file (TOML)")
    console.add_json(listed)
    export.set_defaults(json=True)
    return parser


def run(options: argparse.Namespace) -> int:
    return operating.refusing(_purge if options.action == "purge" else _show, options)


def _show(options: argparse.Namespace) -> int:
    from chutes_proto.errors import ConfigurationError
    from chutes_proto.units.operator import ReadAuditPage

    if options.since >= options.until:
        raise ConfigurationError("--since: there is no time from this one on that is before --until")
    hotkey, _, name = (options.vm or "").rpartition("/")
    with operating.opened(options) as (_, store):
        unit = ReadAuditPage(options.since, options.until, hotkey, name, options.event)
        rows = _every(store, unit) if options.last is None else _newest(store, unit, options.last)
        if options.action == "list" and options.json:
            console.say_json({"ok": True, "rows": [_members(row) for row in rows]})
            return console.GRANTED
        is_empty = True
        for row in rows:
            is_empty = False
            if options.action == "export":
                console.say_json(_members(row))
            else:
                console.say(_line(row))
        if is_empty and options.action == "list":
            console.say("no audit rows")
    return console.GRANTED


def _purge(options: argparse.Namespace) -> int:
    from attrs import evolve

    from chutes_proto.units.operator import PurgeAudits

    with operating.opened(options) as (setup, store):
        days = operating.kept_days(options, "audit_days", setup.config.audit_days, "audit rows")
        now = operating.now()
        before = now - days * operating.DAY
        unit, count = PurgeAudits(now, before, operating.reason(options), carry_out=options.yes), 0
        while True:
            step = store.transact(unit)
            count += step.count
            if step.beyond is None:
                break
            unit = evolve(unit, beyond=step.beyond)
            console.tell(f"audit rows{' deleted' if options.yes else ' that are old'} so far: {count}")
    if options.json:
        told = {"purged": options.yes, "older_than_days": days, "before": before, "rows": count}
        console.say_json({"ok": True, **told})
    elif not count:
        console.say(f"nothing to purge: no audit row is of before {operating.shown(before)}")
    elif options.yes:
        console.say(f"audit rows of before {operating.shown(before)} deleted: {count}")
    else:
        console.say(f"audit rows of before {operating.shown(before)}: {count}; with --yes they are deleted")
    return console.GRANTED


def _every(store: DurableStore, unit: ReadAuditPage) -> Iterator[AuditRow]:
    """The rows one after the other, of which a page at a time is in memory."""
    from attrs import evolve

    while True:
        page = store.transact(unit)
        yield from page.rows
        if page.beyond is None:
            return
        unit = evolve(unit, beyond=page.beyond)


def _newest(store: DurableStore, unit: ReadAuditPage, count: int) -> list[AuditRow]:
    """So many of the newest rows, the oldest of them first."""
    from itertools import islice

    from attrs import evolve

    return [*islice(_every(store, evolve(unit, backwards=True)), count)][::-1]


def _members(row: AuditRow) -> dict[str, object]:
    names = "at actor event decision reason hotkey vm boot_id request_id platform profile quote_digest keys"
    return operating.members(row, f"{names} peer_address")


def _line(row: AuditRow) -> str:
    vm = "" if row.vm is None else f"{row.vm.hotkey}/{row.vm.name}"
    parts = (operating.shown(row.at), row.actor, row.event, row.decision, vm, row.keys, row.reason)
    return "  ".join(part for part in parts if part)
