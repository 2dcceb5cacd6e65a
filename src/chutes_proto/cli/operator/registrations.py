"""``chutes-proto registrations``: the servers that all miners have registered, for the operator."""

from __future__ import annotations

from typing import Any

import click

from chutes_proto.cli import output
from chutes_proto.cli.base import Argument, Group, answer
from chutes_proto.cli.operator import operating
from chutes_proto.cli.operator.operating import OperatorCommand
from chutes_proto.store._rows import ReadPage, ServerRow
from chutes_proto.units.operator import RemoveRegistration

command: Group = Group(
    "registrations",
    of=OperatorCommand,
    help="""List and remove the servers that miners registered.

    An id, an address and a GPU belong to one server. A server without evidence is replaced by a registration at its
    address that is linked to a boot from there; every other wrong claim an operator removes here. Miners use `servers`.

    Examples:
      chutes-proto registrations list --config server.toml
      chutes-proto registrations remove n1 --reason 'the address is not theirs' --config server.toml

    See also: servers, vm, audit
    """,
)


@command.command("list")
@operating.shows
def listing(config: str) -> int:
    """List all registered servers.

    One row for each server: id, hotkey and name, host and address, and the evidence that the address is the miner's.

    Examples:
      chutes-proto registrations list --config server.toml

    See also: registrations remove, vm list
    """
    with operating.opened(config) as (_, store):
        rows = operating.listing(store, lambda after: ReadPage(ServerRow, after, operating.PAGE))
        return operating.answer_rows("registrations", map(_members, rows), _COLUMNS, "no registrations")


def _members(row: ServerRow) -> dict[str, Any]:
    return operating.members(row, "server_id hotkey name host address boot_id platform created_at")


def _evidence(row: dict[str, Any]) -> output.Cell:
    if row["boot_id"]:
        return output.Cell(f"boot {output.short(row['boot_id'])}", "good")
    if row["platform"]:
        return output.Cell(f"attested from {output.short(row['platform'])}", "good")
    return output.Cell("none", "warn")


_COLUMNS: output.Columns = {
    "ID": lambda row: row["server_id"],
    "SERVER": lambda row: output.vm(row["hotkey"], row["name"]),
    "HOST": lambda row: row["host"],
    "ADDRESS": lambda row: row["address"],
    "EVIDENCE": _evidence,
    "SINCE": lambda row: output.when(row["created_at"]),
}


@command.command()
@click.argument("id", cls=Argument, metavar="ID", help="the server's id")
@operating.changes
def remove(id: str, reason: str, config: str) -> int:  # noqa: A002 - the argument's name
    """Remove a server, whichever miner registered it.

    Its id, address and GPUs are free then, and it may be registered again. The keys of its VM are kept.

    Examples:
      chutes-proto registrations remove n1 --reason 'the address is not theirs' --config server.toml
      chutes-proto registrations remove n2 --config server.toml --json

    See also: registrations list
    """
    with operating.opened(config) as (_, store):
        row = store.transact(RemoveRegistration(operating.now(), id, reason))
    told = f"removed: {row.server_id} of {row.hotkey}, at {row.address}; the keys of its VM are kept"
    return answer({"ok": True, "removed": row.server_id}, told)
