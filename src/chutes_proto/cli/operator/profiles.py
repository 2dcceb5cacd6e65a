"""``chutes-proto profiles``: the schedule of reference values, the VMs that need replacing, and published values."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import click

from chutes_proto._converter import load_toml
from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Group, answer, json_option, parsed, wants
from chutes_proto.cli.describe import exits
from chutes_proto.cli.operator import operating
from chutes_proto.cli.operator.operating import OperatorCommand
from chutes_proto.cli.output import Cell
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.files import Files, is_there, read_file, write_file
from chutes_proto.io.server.setup import read_profiles
from chutes_proto.io.server.store_setup import Problems, make_store_setup
from chutes_proto.io.yaml_file import read_yaml
from chutes_proto.quote import PolicyError, Profile
from chutes_proto.quote._measurements import REGISTERS
from chutes_proto.quote._published import ProfileFile, parse_profile_file
from chutes_proto.quote._terms import rfc3339
from chutes_proto.server import ServerConfig
from chutes_proto.server._profiles import EXTRA_KEYS
from chutes_proto.store._rows import FleetVm, ReadFleet
from chutes_proto.wire.http import HttpRequest

command: Group = Group(
    "profiles",
    help="""Show when reference values count, and take over published ones.

    A profile is the reference values of one image. Its schedule says from when until when it counts, and whether its
    VMs are listed. A release of the image comes with reference values: a JSON list that a key server publishes, or a
    YAML file.

    Examples:
      chutes-proto profiles list --config server.toml
      chutes-proto profiles import published.json --into measurements.json --yes
      chutes-proto profiles import https://keys.example:8443/servers/tee/measurements --into measurements.json

    See also: profile, serve, policy check
    """,
)


_STATES: Final[dict[str, output.State]] = {"added": "good", "removed": "bad", "changed": "warn"}
_COLUMNS: Final[output.Columns] = {
    "CHANGE": lambda row: Cell(row["change"], _STATES[row["change"]]),
    "PROFILE": lambda row: row["name"],
    "VERSION": lambda row: row["version"],
    "WHAT": lambda row: row["parts"],
}


@command.command(
    "import",
    exits=exits(
        "imported, or there is nothing to change",
        "not confirmed, or no image is for Intel TDX; nothing was changed",
    ),
)
@click.argument("source", cls=Argument, metavar="FILE|URL", help="the published values: JSON, YAML or TOML")
@click.option("--into", metavar="FILE", required=True, help="the file that measurements of server.toml names")
@click.option("--ca-file", metavar="PEM", help="CAs to trust for the URL, instead of the system's")
@click.option("--yes", is_flag=True, help="do not ask")
@json_option
def import_command(source: str, into: str, ca_file: str | None, yes: bool) -> int:
    """Import published reference values into a file.

    Shows which profiles would be added, removed or changed, and which of their registers have no value ("is any", "is
    replayed"), asks, and then writes the published file as it is. Let the servers reload afterwards.

    Images for AMD SEV-SNP are listed as not served, and stay in the file. A file of such images alone is not imported.

    This list decides which images get keys. Compare it with a build of your own where you can.

    Examples:
      chutes-proto profiles import published.json --into measurements.json --yes

    See also: profile, serve
    """
    data = _fetched(source, ca_file) if "://" in source else read_file(source)
    new = _parsed(source, data)
    _require_form(into, data)
    old = _replaced(into) if is_there(into) else ProfileFile(())
    changes = _changes(old, new) if new.profiles else []
    members: dict[str, object] = {"changes": changes, "not_served": list(new.not_served)}
    if not new.profiles:  # imported, it would take all profiles from the servers
        told = [f"not served: {what}" for what in new.not_served]
        told.append(f"nothing was imported: no image of {source} is for Intel TDX")
        return answer({"ok": False, "imported": False, **members}, "\n".join(told), ok=False)
    if not changes and is_there(into):
        return answer({"ok": True, "imported": False, **members}, f"{into} has these values already")
    if not wants("json"):
        output.table(_COLUMNS, changes, empty="no profile changes")
        for what in new.not_served:
            console.say(f"not served: {what}")
    if not yes and not _is_confirmed(into):
        return answer({"ok": False, "imported": False, **members}, "nothing was changed", ok=False)
    write_file(into, data)
    return answer({"ok": True, "imported": True, **members}, "")


# --- the schedule ---

_STATE_COLOURS: Final[dict[str, output.State]] = {
    "scheduled": "",
    "enforced": "good",
    "warned": "warn",
    "retiring": "warn",
    "ended": "bad",
    "removed": "bad",
}


_LISTED: Final[output.Columns] = {
    "PROFILE": lambda row: row["name"],
    "VERSION": lambda row: row["version"],
    "STATE": lambda row: Cell(row["state"], _STATE_COLOURS[row["state"]]),
    "FROM": lambda row: _when(row["not_before"]),
    "UNTIL": lambda row: _when(row["not_after"]),
    "GRACE UNTIL": lambda row: "-" if row["ends_at"] == row["not_after"] else _when(row["ends_at"]),
    "VMS": lambda row: "-" if row["vms"] is None else str(row["vms"]),
}


def _when(at: int | None) -> str:
    return "-" if at is None else rfc3339(at)


@command.command("list", cls=OperatorCommand)
@click.option("--at", metavar="TIME", callback=parsed(console.moment), help="the state at this time (default: now)")
@operating.shows
def list_command(config: str, at: int | None) -> int:
    """List the profiles of a server with their schedule.

    A profile is scheduled (not yet), enforced, warned (its VMs are granted and listed, because its mode is "warn"),
    retiring (its end is over and its grace is not: its VMs are granted and listed) or ended. VMS is the number of VMs
    whose last boot ran it; `profiles vms` lists those that need replacing.

    Examples:
      chutes-proto profiles list --config server.toml
      chutes-proto profiles list --at 2027-01-01 --config server.toml

    See also: profiles vms, serve, vm list
    """
    now = operating.now() if at is None else at
    loaded = ServerConfig.load(config)
    profiles = _configured(loaded)
    counts: Counter[tuple[str | None, str | None]] | None = None
    if make_store_setup(loaded).store.is_made():
        counts = Counter((vm.profile_name, vm.profile_version) for vm in _fleet(config))
    rows = [
        {
            "name": one.name,
            "version": one.version,
            "state": one.schedule.state(now),
            "not_before": one.schedule.not_before,
            "not_after": one.schedule.not_after,
            "ends_at": one.schedule.end,
            "vms": None if counts is None else counts[one.identity],
        }
        for one in profiles
    ]
    return operating.answer_rows("profiles", rows, _LISTED, "no profiles")


_VMS: Final[output.Columns] = {
    "VM": lambda row: output.vm(row["hotkey"], row["vm"]),
    "PROFILE": lambda row: row["profile"],
    "VERSION": lambda row: row["version"],
    "STATE": lambda row: Cell(row["state"], _STATE_COLOURS[row["state"]]),
    "LAST BOOT": lambda row: output.when(row["last_boot_at"]),
}


@command.command("vms", cls=OperatorCommand)
@click.option("--at", metavar="TIME", callback=parsed(console.moment), help="the state at this time (default: now)")
@operating.shows
def vms_command(config: str, at: int | None) -> int:
    """List the VMs whose profile is warned, retiring, ended or removed.

    A VM is listed by the profile of its last granted boot. One whose profile has ended, or is no longer among the
    reference values, is refused at its next boot.

    Examples:
      chutes-proto profiles vms --config server.toml
      chutes-proto profiles vms --at 2027-01-01 --config server.toml

    See also: profiles list, vm list
    """
    now = operating.now() if at is None else at
    states = {one.identity: one.schedule.state(now) for one in _configured(ServerConfig.load(config))}

    def found() -> Iterator[dict[str, Any]]:
        for vm in _fleet(config):
            if vm.profile_name is not None and vm.profile_version is not None:
                state = states.get((vm.profile_name, vm.profile_version), "removed")
                if state != "enforced":
                    names = {"hotkey": vm.vm.hotkey, "vm": vm.vm.name}
                    ran = {"profile": vm.profile_name, "version": vm.profile_version}
                    yield {**names, **ran, "state": state, "last_boot_at": vm.last_boot_at}

    return operating.answer_rows("vms", found(), _VMS, "no VM runs a profile that is to be replaced")


def _configured(config: ServerConfig) -> list[Profile]:
    """The profiles that a configuration names, with their schedules. Raises `ConfigurationError`."""
    problems = Problems()
    base = Path.cwd() if config.path is None else Path(config.path).parent
    served, _ = read_profiles(config, base, Files(), problems)
    if problems.found:
        raise problems.error()
    return [one.measurements for one in served]


def _fleet(config: str) -> Iterator[FleetVm]:
    """All VMs, with the profiles of their last boots."""
    with operating.opened(config) as (_, store):

        def page(after: FleetVm | None) -> ReadFleet:
            return ReadFleet(None if after is None else after.vm, operating.PAGE)

        yield from operating.listing(store, page)


# --- importing ---


def _is_confirmed(into: str) -> bool:
    if wants("json") or not sys.stdin.isatty():
        console.complain("say --yes where nobody can be asked")
        return False
    return click.confirm(f"Write them into {into}?", err=True)


def _parsed(name: str, data: bytes) -> ProfileFile:
    try:
        return parse_profile_file(data, read_yaml, extra_keys=EXTRA_KEYS)
    except PolicyError as exc:
        raise ConfigurationError(f"{name}: {exc}") from None


def _replaced(into: str) -> ProfileFile:
    """The profiles of the file that an import replaces."""
    try:
        return _parsed(into, read_file(into))
    except ConfigurationError as exc:
        told = f"--into: {exc}; correct it, or name a file that does not exist yet"
        raise ConfigurationError(told) from None


def _require_form(into: str, data: bytes) -> None:
    """Refuse to write what is not TOML into a file of that name, which has options that no published list has."""
    try:
        _ = load_toml(data) if Path(into).suffix == ".toml" else None
    except ValueError:
        told = f"--into: {into}: the published values are not TOML; name a file of their own, such as published.json"
        raise ConfigurationError(told) from None


def _changes(old: ProfileFile, new: ProfileFile) -> list[dict[str, str]]:
    before = {profile.identity: (profile, extras) for profile, extras in old.profiles}
    after = {profile.identity: (profile, extras) for profile, extras in new.profiles}
    changes: list[dict[str, str]] = []
    for identity in dict.fromkeys((*before, *after)):
        if identity not in after:
            changes.append(_change("removed", identity))
        elif identity not in before:
            changes.append(_change("added", identity, _without_value(after[identity][0])))
        elif before[identity] != after[identity]:
            parts = _differing(before[identity][0], after[identity][0])
            changes.append(_change("changed", identity, parts or ["options"]))
    return changes


def _change(change: str, identity: tuple[str, str], parts: Iterable[str] = ()) -> dict[str, str]:
    """A profile that the import adds, removes or changes; ``parts`` say what differs."""
    name, version = identity
    return {"change": change, "name": name, "version": version, "parts": ", ".join(parts)}


_BESIDE: Final = ("expected_gpus", "gpu_count", "fingerprints", "schedule", "attributes", "rules")


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
        *(name for name in _BESIDE if getattr(old, name) != getattr(new, name)),
        *_without_value(new),
    ]


def _without_value(profile: Profile) -> list[str]:
    """The registers for which a profile has a rule in place of a value: an image of anybody's may match it."""
    return [f"{each.register}{(each.stage and f' ({each.stage})') or ''} is {each.check}" for each in profile.rules]


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
