"""``chutes-proto registrations``: the servers that all miners have registered, for the operator."""

from __future__ import annotations

import argparse

from chutes_proto.cli import console, operating

NAME = "registrations"


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "list and remove what miners registered",
        """
        An id, an address and a GPU belong to one server. A server without evidence yields to a registration at its
        address that is linked to a boot from there; what else is held wrongly, an operator removes here. Miners have
        `servers`.

        exit code: 0 done; 1 not possible as asked, and nothing was changed; 2 usage, or a file that cannot be read
        """,
        "chutes-proto registrations list --config /etc/chutes/server.toml\n"
        "chutes-proto registrations remove n1 --reason 'the address is not theirs' --config server.toml",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    listed = console.command(
        actions,
        "list",
        "show all registered servers",
        "Show each server: its id, hotkey and name, its host and address, and what evidence there is that it is its.",
        "chutes-proto registrations list --config /etc/chutes/server.toml --json",
    )
    remove = console.command(
        actions,
        "remove",
        "remove a server, whoever registered it",
        """
        Remove a server with its GPUs, so that its id, address and GPUs are free. The keys of its VM are kept. It may be
        registered again.
        """,
        "chutes-proto registrations remove n1 --reason 'the address is not theirs' --config /etc/chutes/server.toml",
    )
    console.add(remove, "id", metavar="ID", help="the server's id")
    operating.add_reason(remove)
    for action in (listed, remove):
        operating.add_config(action)
    return parser


def run(options: argparse.Namespace) -> int:
    return operating.refusing({"list": _list, "remove": _remove}[options.action], options)


def _list(options: argparse.Namespace) -> int:
    from chutes_proto.units.operator import Registrations

    with operating.opened(options) as (_, store):
        rows = store.transact(Registrations())
    if options.json:
        names = "server_id hotkey name host address boot_id platform created_at"
        console.say_json({"ok": True, "registrations": [operating.members(row, names) for row in rows]})
        return console.GRANTED
    if not rows:
        console.say("no registrations")
    for row in rows:
        boot = f"linked to boot {row.boot_id}" if row.boot_id else None
        evidence = boot or (f"attested from {row.pin}" if row.pin else "no evidence")
        console.say(
            f"{row.server_id}  {row.hotkey}/{row.name}  {row.host} ({row.address})  {evidence}"
            f"  since {operating.shown(row.created_at)}"
        )
    return console.GRANTED


def _remove(options: argparse.Namespace) -> int:
    from chutes_proto.units.operator import RemoveRegistration

    with operating.opened(options) as (_, store):
        row = store.transact(RemoveRegistration(operating.now(), options.id, operating.reason(options)))
    if options.json:
        console.say_json({"ok": True, "removed": row.server_id})
    else:
        console.say(f"removed: {row.server_id} of {row.hotkey}, at {row.address}; the keys of its VM are kept")
    return console.GRANTED
