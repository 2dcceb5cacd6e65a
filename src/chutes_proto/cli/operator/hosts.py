"""``chutes-proto hosts``: the host profiles that miners' tools have registered, for the operator."""

from __future__ import annotations

import json
import re

import click

from chutes_proto.cli import output
from chutes_proto.cli.base import Argument, Group, answer, parsed
from chutes_proto.cli.operator import operating
from chutes_proto.cli.operator.operating import OperatorCommand
from chutes_proto.store._rows import HostProfileRow, ReadHostProfiles
from chutes_proto.store._run import Ask
from chutes_proto.units.fleet import HOSTS, NameHost, RemoveHost

command: Group = Group(
    "hosts",
    of=OperatorCommand,
    help="""List host profiles, and say which measurement profiles such hosts are.

    A host tool describes the hardware of its host and asks which images it can boot. Until an operator names the
    profile, the answer is pending, and the tool launches no production image. Then it is what the loaded measurement
    profiles of that name say.

    Examples:
      chutes-proto hosts list --config server.toml
      chutes-proto hosts name 3f9a --as 8xh200 --config server.toml

    See also: profiles, registrations, audit
    """,
)


def _start(text: str) -> str:
    """The start of a fingerprint of this server's."""
    if not re.fullmatch(r"[0-9a-fA-F]{1,64}", text):
        raise ValueError("say the first hex digits of a fingerprint, or all 64")
    return text.lower()


def _published(text: str) -> str:
    """A fingerprint that others publish."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError("say 64 hex digits")
    return text.lower()


def _profile_name(text: str) -> str:
    """A name that a measurement profile may have."""
    if not 1 <= len(text) <= 128 or not text.isprintable():
        raise ValueError("say 1 to 128 printable characters")
    return text


_fingerprint = click.argument(
    "fingerprint",
    cls=Argument,
    metavar="FINGERPRINT",
    callback=parsed(_start),
    help="its fingerprint, or its start",
)


@command.command("list")
@operating.shows
def listing(config: str) -> int:
    """List all host profiles, oldest first; with --json also the hardware that each describes.

    Examples:
      chutes-proto hosts list --config server.toml

    See also: hosts name
    """
    with operating.opened(config) as (_, store):
        rows = store.transact(Ask(ReadHostProfiles(HOSTS)))
    return operating.answer_rows("hosts", map(_members, rows), _COLUMNS, "no host profiles")


def _members(row: HostProfileRow) -> dict[str, object]:
    return operating.members(row, "fingerprint hotkey name published created_at") | {"profile": json.loads(row.profile)}


_COLUMNS: output.Columns = {
    "FINGERPRINT": lambda row: output.short(row["fingerprint"]),
    "HOTKEY": lambda row: output.short(row["hotkey"]),
    "NAME": lambda row: output.Cell("pending", "warn") if row["name"] is None else output.Cell(row["name"], "good"),
    "PUBLISHED": lambda row: "" if row["published"] is None else output.short(row["published"]),
    "SINCE": lambda row: output.when(row["created_at"]),
}


@command.command()
@_fingerprint
@click.option(
    "--as",
    "name",
    metavar="NAME",
    callback=parsed(_profile_name),
    help="the name of the measurement profiles; without it, none",
)
@click.option(
    "--published",
    metavar="HEX",
    callback=parsed(_published),
    help="the fingerprint that is published for this class, 64 hex digits",
)
@operating.changes
def name(fingerprint: str, name: str | None, published: str | None, reason: str, config: str) -> int:
    """Say which measurement profiles such hosts are.

    Answers to host tools change at once. With --published they have that fingerprint, and only measurement profiles
    that have it, or none, count.

    Examples:
      chutes-proto hosts name 3f9a --as 8xh200 --config server.toml
      chutes-proto hosts name 3f9a --reason 'not ours' --config server.toml --json

    See also: hosts list, profiles
    """
    with operating.opened(config) as (_, store):
        row = store.transact(NameHost(operating.now(), fingerprint, name, published, reason))
    told = "named nothing" if row.name is None else f"named {row.name}"
    return answer({"ok": True, **operating.members(row, "fingerprint name published")}, f"{row.fingerprint}: {told}")


@command.command()
@_fingerprint
@operating.changes
def remove(fingerprint: str, reason: str, config: str) -> int:
    """Remove a host profile; a tool may register it again.

    Examples:
      chutes-proto hosts remove 3f9a --reason 'a test' --config server.toml
      chutes-proto hosts remove 3f9a --config server.toml --json

    See also: hosts list
    """
    with operating.opened(config) as (_, store):
        row = store.transact(RemoveHost(operating.now(), fingerprint, reason))
    return answer({"ok": True, "removed": row.fingerprint}, f"removed: {row.fingerprint}")
