"""``chutes-proto profiles``: reference values as they are published, compared with a file and taken over into it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import click
from attrs import frozen

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Group, answer, json_option, wants
from chutes_proto.cli.describe import exits
from chutes_proto.cli.output import Cell
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.files import read_file, write_file
from chutes_proto.io.yaml_file import read_yaml
from chutes_proto.quote import PolicyError, Profile
from chutes_proto.quote._measurements import REGISTERS
from chutes_proto.quote._published import ProfileFile, parse_profile_file
from chutes_proto.server._profiles import EXTRA_KEYS
from chutes_proto.wire.http import HttpRequest

command: Group = Group(
    "profiles",
    help="""Take over reference values that are published.

    A release of the image comes with reference values: a JSON list that a key server publishes, or a YAML file.

    Examples:
      chutes-proto profiles import published.json --into measurements.json --yes
      chutes-proto profiles import https://keys.example:8443/servers/tee/measurements --into measurements.json

    See also: profile, serve
    """,
)


@frozen
class _Change:
    """A profile that the import adds, removes or changes; ``parts`` say what differs."""

    change: str
    name: str
    version: str
    parts: str = ""


_STATES: Final[dict[str, output.State]] = {"added": "good", "removed": "bad", "changed": "warn"}
_COLUMNS: Final[output.Columns] = {
    "CHANGE": lambda row: Cell(row.change, _STATES[row.change]),
    "PROFILE": lambda row: row.name,
    "VERSION": lambda row: row.version,
    "WHAT": lambda row: row.parts,
}


@command.command("import", exits=exits("imported, or there is nothing to change", "not confirmed; nothing was changed"))
@click.argument("source", cls=Argument, metavar="FILE|URL", help="the published values: JSON, YAML or TOML")
@click.option("--into", metavar="FILE", required=True, help="the file that measurements of server.toml names")
@click.option("--ca-file", metavar="PEM", help="CAs to trust for the URL, instead of the system's")
@click.option("--yes", is_flag=True, help="do not ask")
@json_option
def import_command(source: str, into: str, ca_file: str | None, yes: bool) -> int:
    """Import published reference values into a file.

    Shows which profiles would be added, removed or changed, asks, and then writes the published file as it is. Restart
    the servers afterwards: they read their files at the start.

    This list decides which images get keys. Compare it with a build of your own where you can.

    Examples:
      chutes-proto profiles import published.json --into measurements.json --yes
      chutes-proto profiles import published.json --into measurements.json --yes --json

    See also: profile, serve
    """
    data = _fetched(source, ca_file) if "://" in source else read_file(source)
    new = _parsed(source, data)
    old = _parsed(into, read_file(into)) if Path(into).exists() else ProfileFile(())
    changes = _changes(old, new)
    members: dict[str, object] = {
        "changes": [console.plain(change) for change in changes],
        "not_served": list(new.not_served),
    }
    if not changes and Path(into).exists():
        return answer({"ok": True, "imported": False, **members}, f"{into} has these values already")
    if not wants("json"):
        _show(changes, new)
    if not yes and not _is_confirmed(into):
        return answer({"ok": False, "imported": False, **members}, "nothing was changed", ok=False)
    write_file(into, data)
    return answer({"ok": True, "imported": True, **members}, "")


def _is_confirmed(into: str) -> bool:
    if wants("json") or not sys.stdin.isatty():
        console.complain("say --yes where nobody can be asked")
        return False
    return click.confirm(f"Write them into {into}?", err=True)


def _show(changes: list[_Change], new: ProfileFile) -> None:
    output.table(_COLUMNS, changes, empty="no profile changes")
    for what in new.not_served:
        console.say(f"not served: {what}")


def _parsed(name: str, data: bytes) -> ProfileFile:
    try:
        return parse_profile_file(data, read_yaml, extra_keys=EXTRA_KEYS)
    except PolicyError as exc:
        raise ConfigurationError(f"{name}: {exc}") from None


def _changes(old: ProfileFile, new: ProfileFile) -> list[_Change]:
    before = {profile.identity: (profile, extras) for profile, extras in old.profiles}
    after = {profile.identity: (profile, extras) for profile, extras in new.profiles}
    changes: list[_Change] = []
    for identity in dict.fromkeys((*before, *after)):
        if identity not in after:
            changes.append(_Change("removed", *identity))
        elif identity not in before:
            changes.append(_Change("added", *identity))
        elif before[identity] != after[identity]:
            parts = _differing(before[identity][0], after[identity][0])
            changes.append(_Change("changed", *identity, ", ".join(parts) or "options"))
    return changes


def _differing(old: Profile, new: Profile) -> list[str]:
    stages = [("boot", old.registers("boot"), new.registers("boot"))]
    stages += [("runtime", old.registers("runtime"), new.registers("runtime"))]
    return [
        *(
            f"{register} ({stage})"
            for stage, before, after in stages
            for register, was, now in zip(REGISTERS, before, after, strict=True)
            if was != now
        ),
        *(name for name in ("expected_gpus", "gpu_count", "fingerprints") if getattr(old, name) != getattr(new, name)),
    ]


def _fetched(url: str, ca_file: str | None) -> bytes:
    """The body at ``url``, over TLS to a server whose certificate verifies; no redirect is followed."""
    from chutes_proto.io.http.https import HttpsSender
    from chutes_proto.io.http.tls import context_trusting

    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with HttpsSender(context_trusting(ca_file), f"{parts.scheme}://{parts.netloc}") as sender:
        response = sender(HttpRequest("GET", target))
    if response.status != 200:
        raise ConfigurationError(f"{url}: the server answers {response.status}")
    return response.body
