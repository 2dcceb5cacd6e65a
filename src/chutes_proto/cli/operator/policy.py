"""``chutes-proto policy``: an appraisal policy in a file, checked and put into words."""

from __future__ import annotations

import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import evolve, frozen

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Command, Group, answer, json_option, parsed, wants
from chutes_proto.cli.console import moment
from chutes_proto.cli.describe import exits
from chutes_proto.cli.operator import operating
from chutes_proto.cli.operator.operating import DAY, OperatorCommand
from chutes_proto.collateral.library import Family
from chutes_proto.errors import CollateralUnavailable, ConfigurationError
from chutes_proto.io.collateral.directory import CollateralDirectory
from chutes_proto.io.files import read_file
from chutes_proto.io.server.setup import make_setup
from chutes_proto.quote._errors import PolicyError
from chutes_proto.quote._policy_set import PolicySet, parse_policy_set
from chutes_proto.quote._policy_words import explain_set, policy_notes
from chutes_proto.quote._terms import rfc3339
from chutes_proto.server import ServerConfig
from chutes_proto.server._profiles import EXTRA_KEYS
from chutes_proto.server._whatif import NOT_JUDGED, Judged, judge
from chutes_proto.store._rows import CountRows, NoteWhatIf, Vm, VmRow, WhatIf
from chutes_proto.store._run import Ask
from chutes_proto.units.evidence import ReadEvidence
from chutes_proto.wire import json

if TYPE_CHECKING:
    from chutes_proto.io.server.setup import ServerSetup
    from chutes_proto.quote._collateral import VerifiedCollateral
    from chutes_proto.quote._pck import PckIdentity

command: Group = Group(
    "policy",
    help="""Check an appraisal policy, say what it accepts, and try it on the fleet.

    A policy says which genuine quotes are accepted: `policy` of a server's configuration names its file, and
    `verify --policy` takes the same file. Its language is in docs/reference/policies.md, a complete example in
    examples/policy.toml.

    Examples:
      chutes-proto policy check policy.toml
      chutes-proto policy try policy.toml --config server.toml

    See also: verify, serve, profiles import
    """,
)


class _FileCommand(Command):
    """A command about one policy file."""

    exits = exits("it is a policy", "it is none; the text says which key is wrong")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PolicyError as exc:
            why = f"{ctx.params['file']}: {exc}"
        if wants("json"):
            console.say_json({"ok": False, "error": why})
        console.complain(why, ctx.command_path)
        return console.REFUSED


@command.command("check", cls=_FileCommand)
@click.argument("file", cls=Argument, metavar="FILE", help="the policy, in TOML")
@json_option
def check_command(file: str) -> int:
    """Check a policy file, and say in plain words what it accepts.

    Reads the whole file, with every combination of its exceptions for profiles and hotkeys, and tells what is wrong:
    unknown keys with the nearest known one, values of another type, keys that contradict each other. Notes say what is
    probably not meant, for example a date in the future that refuses every platform. Whether a server has the profiles
    and hotkeys that the file names, `chutes-proto serve --check` says.

    Then there is one sentence for each rule, the defaults too. For a profile or hotkey with an exception: the sentences
    that differ.

    Examples:
      chutes-proto policy check policy.toml

    See also: policy try, serve, verify
    """
    policies = _read(file)
    notes, parts = policy_notes(policies, int(time.time())), explain_set(policies)

    def people() -> None:
        console.say(f"{file}: a policy{_exceptions(policies)}")
        for note in notes:
            output.prose(f"note: {note}", "warn")
        for title, sentences in parts:
            output.prose(f"{title}:")
            for sentence in sentences:
                output.prose(f"  {sentence}", rest=4)

    listed = [{"applies_to": title, "rules": list(sentences)} for title, sentences in parts]
    return answer({"ok": True, "notes": list(notes), "policies": listed}, people)


_STATES: dict[str, output.State] = {"granted": "good", "warned": "warn", "refused": "bad", "not judged": "warn"}
_TRIED: output.Columns = {
    "VM": lambda row: output.vm(row["hotkey"], row["vm"]),
    "STATE": lambda row: output.Cell(
        f"{row['state']}{', was refused' if row['was_refused'] else ''}", _STATES[row["state"]]
    ),
    "REFUSED FROM": lambda row: output.when(row["refused_from"]),
    "CODE": lambda row: row["code"] or "-",
    "REASON": lambda row: row["reason"] or "-",
}
_REASON_LENGTH = 400
_BAR = 40
_LINES = 12


@frozen
class _Tried:
    vm: Vm
    was_refused: bool
    judged: Judged


@command.command("try", cls=OperatorCommand)
@click.argument("file", cls=Argument, metavar="[FILE]", required=False, help="the new policy (default: the server's)")
@click.option("--at", metavar="TIME", callback=parsed(moment), help="the date to judge at (default: now)")
@click.option("--days", metavar="N", callback=parsed(operating.count), default="365", help="look so far ahead of it")
@click.option(
    "--measurements", metavar="FILE", multiple=True, help="other reference values (several times: all of them)"
)
@click.option("--collateral", metavar="DIR", help="another directory than the server's (or its cache)")
@click.option(
    "--update",
    type=click.Choice(("standard", "early")),
    default="standard",
    help="early: the directory `early` in that of the collateral, with what a TCB recovery will demand",
)
@operating.shows
def try_command(
    file: str | None,
    at: int | None,
    days: int,
    measurements: tuple[str, ...],
    collateral: str | None,
    update: str,
    config: str,
) -> int:
    """Say which VMs a policy would refuse, before it is used.

    Judges the newest boot evidence of every VM again, offline: under another policy, with other reference values, at
    another date, or with Intel's early TCB info (`collateral fetch --update early`). Lists the VMs that would be
    refused and why, those that would be granted with a warning, those that will be refused within --days and from which
    date on, and those that were refused since their last grant and would be granted. No VM is touched, and no server
    is asked. A summary is noted in the store, where the admin page shows it.

    Ends with 1 if a VM would be refused at the date, or cannot be judged. Collateral is taken as renewed in time.

    Examples:
      chutes-proto policy try --config server.toml
      chutes-proto policy try policy.toml --at 2026-12-24 --config server.toml --json

    See also: policy check, collateral fetch, vm list
    """
    wanted = ServerConfig.load(config)
    if file is not None:
        wanted = evolve(wanted, policy=str(Path(file).absolute()))
    if measurements:
        wanted = evolve(wanted, measurements=tuple(str(Path(one).absolute()) for one in measurements))
    setup = make_setup(wanted)
    source = _files(setup, collateral, update)
    now = operating.now()
    date = now if at is None else at
    known: dict[Family, VerifiedCollateral] = {}

    def choose(pck: PckIdentity) -> VerifiedCollateral:
        family = Family.of(pck)
        if family not in known:
            known[family] = source.fetch(pck, now)
        return known[family]

    tried: list[_Tried] = []
    refused: dict[Vm, tuple[int, Judged | None]] = {}  # the newest refusal of each VM, and what would be granted of it
    shared: dict[Judged, Judged] = {}  # most VMs have one of a few
    counts, judged_vms, later = Counter[str](), 0, 0
    with operating.opened(config) as (_, store), output.progress("VMs judged") as tell:
        total, after = store.transact(Ask(CountRows(VmRow))), None
        while page := store.transact(ReadEvidence(after, _PAGE)):
            for kept in page:
                row = kept.row
                if row.code is None and not kept.is_bound:
                    continue
                found: Judged | None = None
                if row.code not in NOT_JUDGED:
                    try:
                        found = judge(setup.service, row, choose, date, proven=kept.proven, until=date + days * DAY)
                    except CollateralUnavailable as exc:
                        found = Judged("not judged", "collateral_unavailable", str(exc))
                    found = evolve(found, reason=found.reason[:_REASON_LENGTH])
                    found = shared.setdefault(found, found)
                granted = found if found is not None and found.state in ("granted", "warned") else None
                if row.code is not None:
                    if row.received_at >= refused.get(row.vm, (0, None))[0]:
                        refused[row.vm] = row.received_at, granted
                elif found is not None:
                    if refused.get(row.vm, (row.received_at, None))[0] < row.received_at:
                        del refused[row.vm]  # refusals are read first, by the order of the key
                    counts[found.state] += 1
                    judged_vms += 1
                    later += granted is not None and granted.refused_from is not None
                    if found.state != "granted" or found.refused_from is not None:
                        tried.append(_Tried(row.vm, False, found))
            after = page[-1].row
            tell(judged_vms, max(total, judged_vms))
        tried += [_Tried(vm, True, found) for vm, (_, found) in refused.items() if found is not None]
        tried.sort(key=lambda one: (one.vm.hotkey, one.vm.name))
        is_fine = not counts["refused"] and not counts["not judged"]
        told: dict[str, object] = {"at": date, "judged": judged_vms}
        told |= {"without_evidence": total - judged_vms}
        told |= {name.replace(" ", "_"): counts[name] for name in _STATES} | {"refused_later": later}
        changes = _changes(tried)
        early = ["early TCB info"] if update == "early" else []
        what = ", ".join((file or "the policy of the server", *measurements, *early))
        noted = {"policy": what, "ok": is_fine, **told, "changes": _dated(_few(changes))}
        noted["first"] = [*map(_tried, _first(tried))]
        store.transact(Ask(NoteWhatIf(WhatIf(now, json.encode(noted).decode()))))
    told |= {"changes": _dated(changes)}

    def people() -> None:
        parts = [f"{counts[name]} {name}" for name in _STATES if counts[name]]
        console.say(f"{judged_vms} VMs judged at {rfc3339(date)}: {', '.join(parts) or 'none'}; {later} refused later")
        if total > judged_vms:
            console.say(f"{total - judged_vms} VMs have no evidence yet: they have not booted since it is kept")
        _plot(changes, judged_vms)

    empty = "every VM is granted" if judged_vms else "no VM has evidence to be judged"
    return operating.answer_rows(
        "vms", map(_tried, tried), _TRIED, empty, before=told, after=people, ok=lambda: is_fine
    )


_PAGE = 200


def _files(setup: ServerSetup, collateral: str | None, update: str) -> CollateralDirectory:
    """The directory of collateral, whose files count as renewed in time."""
    named = collateral or setup.config.collateral.directory or setup.config.collateral.cache
    if named is None:
        raise ConfigurationError("collateral: it has neither a directory nor a cache; name one with --collateral DIR")
    path = Path(named) if collateral else setup.base / named
    return CollateralDirectory(path / "early" if update == "early" else path, setup.service.root, grace=_RENEWED)


_RENEWED = 100 * 365 * DAY


def _changes(tried: list[_Tried]) -> list[tuple[int, int]]:
    """The dates from which on more VMs are refused, and how many are refused then."""
    starts = Counter(each.judged.refused_from for each in tried if not each.was_refused)
    dates = sorted(when for when in starts if when is not None)
    return [(when, sum(starts[earlier] for earlier in dates if earlier <= when)) for when in dates]


def _few(changes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first changes and the last one."""
    return changes if len(changes) <= _LINES else [*changes[: _LINES - 1], changes[-1]]


def _dated(changes: list[tuple[int, int]]) -> list[dict[str, int]]:
    return [{"at": when, "refused": count} for when, count in changes]


def _first(tried: list[_Tried]) -> list[_Tried]:
    """The first VMs that are refused, of those that were granted."""
    found = (each for each in tried if each.judged.state == "refused" and not each.was_refused)
    return [*islice(found, _LINES)]


def _plot(changes: list[tuple[int, int]], total: int) -> None:
    """A line for each change."""
    if changes:
        console.say("refused from then on:")
    for when, count in _few(changes):
        bar = "#" * max(1, round(_BAR * count / max(total, 1)))
        console.say(f"  {rfc3339(when)}  {bar:{_BAR}}  {count}")


def _tried(each: _Tried) -> dict[str, object]:
    judged, vm = each.judged, each.vm
    names = {"hotkey": vm.hotkey, "vm": vm.name, "state": judged.state, "was_refused": each.was_refused}
    return {**names, "refused_from": judged.refused_from, "code": judged.code, "reason": judged.reason}


def _read(file: str) -> PolicySet:
    return parse_policy_set(read_file(file), extra_keys=EXTRA_KEYS)


def _exceptions(policies: PolicySet) -> str:
    counts = ((len(policies.profile_names), "profile"), (len(policies.hotkeys), "hotkey"))
    told = [f"{count} {name}{'s' if count > 1 else ''}" for count, name in counts if count]
    return f", with exceptions for {' and '.join(told)}" if told else ""
