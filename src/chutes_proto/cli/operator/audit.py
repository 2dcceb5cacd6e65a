"""``chutes-proto audit``: every decision, for whom and why."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import click
from attrs import evolve

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Group, answer, json_option, parsed
from chutes_proto.cli.console import moment
from chutes_proto.cli.describe import exits
from chutes_proto.cli.operator import operating
from chutes_proto.cli.operator.operating import DAY, OperatorCommand
from chutes_proto.errors import ConfigurationError, LogError, PurgedMeanwhile, Refused, StoreError
from chutes_proto.io.files import is_there
from chutes_proto.io.log_files import (
    CHECKPOINT,
    LogDirectory,
    check_stored,
    export_log,
    read_checkpoint,
)
from chutes_proto.io.server.sequencer import Sequencer
from chutes_proto.io.server.store_setup import StoreSetup
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.io.stores.marks import checkpoint_path
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store._rows import AuditRow, AuditWanted, LogStateRow, Read, ReadAudit
from chutes_proto.store._run import Ask
from chutes_proto.tlog.check import Report
from chutes_proto.tlog.notes import Checkpoint, Note, Verifier
from chutes_proto.units.log import LOG, ProveEntry, ReadLogKeys
from chutes_proto.units.operator import PurgeAudits, ReadAuditPage
from chutes_proto.wire.codes import Code

F = TypeVar("F", bound=Callable[..., Any])

_END = 1 << 62
_EXPORTS = 3
"""How often an export begins that a purge goes on beside."""
_SHOWN = 1000
_STATES: dict[str, output.State] = {"granted": "good", "done": "good", "refused": "bad"}
_COLUMNS: output.Columns = {
    "ENTRY": lambda row: "-" if row["idx"] is None else "forged" if row["idx"] < 0 else str(row["idx"]),
    "TIME": lambda row: output.when(row["at"]),
    "ACTOR": lambda row: row["actor"],
    "EVENT": lambda row: row["event"],
    "VM": lambda row: output.vm(row["hotkey"], row["vm"]) if row["vm"] else "-",
    "DECISION": lambda row: output.Cell(row["decision"], _STATES.get(row["decision"], "")),
    "KEYS": lambda row: row["keys"] or "-",
    "REASON": lambda row: row["reason"] or "-",
}

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
                callback=parsed(operating.at_least_one),
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

    ENTRY is the index in the audit log, which `audit export --proof` takes; a row has one within a second. One that no
    key server wrote has none, and is shown as forged.

    Examples:
      chutes-proto audit list --event boot --last 20 --config server.toml
      chutes-proto audit list --vm vm-1 --since 2026-05-01 --config server.toml --json
      chutes-proto audit list --request-id 541e166f739b0b89a1436895c227b41b --config server.toml

    See also: why, audit export, keys history
    """
    unit = _unit(vm, request_id, event, since, until)
    with operating.opened(config) as (_, store):
        rows = _newest(store, unit, last)
        if event and not rows:
            known = sorted({row.event for row in _newest(store, ReadAuditPage(), operating.PAGE)})
            if event not in known:
                console.tell(f"no row has the event {event!r} here; the newest rows have: {', '.join(known) or 'none'}")
    return operating.answer_rows("rows", map(_members, rows), _COLUMNS, "no audit rows")


@command.command()
@click.argument("directory", cls=Argument, metavar="[DIR]", required=False, help="write the whole log as tiles to DIR")
@click.option("--proof", "entry", metavar="ENTRY", type=int, help="only the proof that the log has this entry")
@_selection(None)
@operating.config_option
def export(
    directory: str | None,
    entry: int | None,
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

    With DIR, writes the whole log as tiles (c2sp.org/tlog-tiles), with its newest checkpoint and its key: any client of
    such logs verifies it offline. A further export to DIR adds what is new.

    With --proof, prints one entry for somebody who may not see the others, with its inclusion proof and a signed
    checkpoint (c2sp.org/tlog-proof). The text of the entry is the extra data.

    Examples:
      chutes-proto audit export --config server.toml > audit.jsonl
      chutes-proto audit export log --config server.toml
      chutes-proto audit export --proof 0 --config server.toml > entry.proof
      chutes-proto audit export --since 2026-05-01 --event boot --config server.toml

    See also: audit list, audit purge
    """
    selects = any((vm, request_id, event, since, until, last))
    if (directory is not None) + (entry is not None) + selects > 1:
        raise ConfigurationError("DIR, --proof: each goes without the other, and without options that select rows")
    if directory is not None:
        return _export(config, Path(directory))
    if entry is not None:
        return _prove(config, entry)
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

    Deletes the first entries of the audit log, as long as each is older than audit_days of the configuration, by its
    own time and this machine's clock: 256 at a time, as the tree has them. So the rest of the log can be verified as
    before. An entry with a wrong, later time holds up what comes after it until it is old, and so does one that was
    changed or removed in the database: no purge hides that. Export the log before.
    Servers may run meanwhile, and the purge may be stopped and begun again. An audit row says who deleted how many.
    Without --yes nothing is deleted, only counted.

    Examples:
      chutes-proto audit purge --config server.toml
      chutes-proto audit purge --older-than 730 --yes --config server.toml

    See also: audit export, keys purge
    """
    with (
        operating.opened(config, in_steps=yes) as (setup, store),
        output.progress("audit rows looked at") as tell,
    ):
        days = operating.kept_days(older_than, "audit_days", setup.config.audit_days, "audit rows")
        began = operating.now()
        before = began - days * DAY
        unit, found = PurgeAudits(began, before, reason, carry_out=yes), 0
        state = store.transact(Ask(Read(LogStateRow, LOG)))
        size = 0 if state is None else state.size
        while True:
            try:
                step = store.transact(unit)
            except LogError as exc:
                what = "nothing from there on is deleted; `chutes-proto audit verify` says more"
                raise StoreError(f"audit log: {exc}; {what}") from None
            found += step.count
            if step.beyond is None:
                break
            unit = evolve(unit, beyond=step.beyond)
            tell(step.beyond, size)
        if yes and found:
            again = PurgeAudits(began, before, reason)
            operating.require_gone(store, AuditRow.TABLE, again, lambda left: left.count)
    if not found:
        told = f"nothing to purge: no whole tile of 256 audit rows is older than {rfc3339(before)}"
    elif yes:
        told = f"audit rows older than {rfc3339(before)} deleted: {found}"
    else:
        told = f"audit rows older than {rfc3339(before)}: {found}; with --yes they are deleted"
    return answer({"ok": True, "purged": yes, "older_than_days": days, "before": before, "rows": found}, told)


def _verifier_keys(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> Any:
    """The keys of a log; a value may have a key in each line, as of `audit key`."""
    return parsed(_verifier_key)(ctx, param, tuple(line for each in value for line in each.split("\n")))


def _verifier_key(text: str) -> Verifier:
    try:
        return Verifier.parse(text)
    except ConfigurationError as exc:
        raise ValueError(str(exc)) from None


@command.command(exits=exits("the log is whole", "something in it was changed, or it cannot be checked"))
@click.argument("directory", cls=Argument, metavar="[DIR]", required=False, help="an exported log, in place of a store")
@click.option(
    "--checkpoint", "files", metavar="FILE", multiple=True, help="a checkpoint that was kept elsewhere; may be repeated"
)
@click.option(
    "--key",
    "keys",
    metavar="KEY",
    multiple=True,
    callback=_verifier_keys,
    help="a verifier key of the log (default: the keys in the store); may be repeated",
)
@click.option("--config", metavar="FILE", help="the server's configuration file (TOML)")
@json_option
def verify(directory: str | None, files: tuple[str, ...], keys: tuple[Verifier, ...], config: str | None) -> int:
    """Check that nothing in the audit log was changed.

    Reads the whole log and compares its entries with the tree that was made of them, and the tree with signed
    checkpoints: the one that the server keeps beside store.mark_file, and those in FILE. A changed, removed or moved
    entry below the newest checkpoint is found: by its index, or, if the tree was changed too, between two checkpoints.
    The root of the tree has a MAC, and counts like a checkpoint; one that was set back does not show.
    So keep checkpoints where nobody who can write the database can write, and name them here: one of them at least must
    be newer than the last purge. Nothing is changed.

    With DIR, which `audit export DIR` wrote, it needs neither server nor store, only --key.

    Examples:
      chutes-proto audit verify --config server.toml
      chutes-proto audit verify --config server.toml --json

    See also: audit checkpoint, audit key, audit export
    """
    paths = [*map(Path, files)]
    try:
        if directory is None:
            if config is None:
                raise ConfigurationError("--config: name the server's configuration file, or an exported log as DIR")
            report, known = _verify_store(config, paths, keys)
            kept = known
        else:
            if config is not None or not keys:
                raise ConfigurationError("DIR: it goes with --key, and without --config")
            kept = [read_checkpoint(path, keys) for path in paths]
            known = [*kept, read_checkpoint(Path(directory) / CHECKPOINT, keys, plain=True)]
            report = LogDirectory(Path(directory), known[-1].size).check(known)
    except LogError as exc:
        raise StoreError(str(exc)) from None
    return _told(report.beside(kept), known)


def _verify_store(config: str, paths: list[Path], keys: tuple[Verifier, ...]) -> tuple[Report, list[Checkpoint]]:
    with operating.opened(config) as (setup, store):
        keys = keys or tuple(signer.verifier for signer in store.transact(ReadLogKeys(setup.vault)))
        known = [read_checkpoint(path, keys) for path in paths]
        file = checkpoint_path(setup.mark_file)  # read before the log: it grows meanwhile
        try:
            if file is not None and is_there(file):
                known.append(read_checkpoint(file, keys, plain=True))
        except LogError as exc:
            raise LogError(f"{exc}; if the log is right, move the file away") from None
        with store.snapshot() as rows, output.waiting("entries checked") as tell:
            state = rows.transact(Ask(Read(LogStateRow, LOG)))
            if state is None:
                return check_stored(rows, 0, known, tell), known
            stated = Checkpoint(state.origin, state.size, state.root)  # it has a MAC
            return check_stored(rows, state.size, known, tell, stated), known


def _told(report: Report, known: list[Checkpoint]) -> int:
    newest = max((each.size for each in known), default=0)
    findings = [{"first": each.first, "last": each.last, "what": each.what} for each in report.findings]
    told = {"ok": not findings, "size": report.size, "first": report.first, "checkpoint": newest, "findings": findings}
    lines = [console.clean(str(each)) for each in report.findings]
    if not findings:
        lines.append(f"the log of {report.size} entries is whole")
        if report.first:
            lines.append(f"an audit row says that the first {report.first} entries were purged: see `audit list`")
        lines.append(
            f"none of the first {newest} entries was changed since their checkpoint was signed"
            if newest
            else "no checkpoint was given: a log that was set back is not found"
        )
    return answer(told, "\n".join(lines), ok=not findings)


@command.command(exits=exits("the checkpoint is printed", "the log cannot be signed"))
@operating.config_option
@json_option
def checkpoint(config: str) -> int:
    """Sign the present state of the audit log, and print it.

    Sequences what is left, and prints a checkpoint: name and size of the log, the root hash of its tree, and a
    signature. Keep it where nobody who can write the database can write; `audit verify` then finds every change of an
    earlier entry. Nothing is signed that does not extend the checkpoint that the server keeps beside store.mark_file.

    Examples:
      chutes-proto audit checkpoint --config server.toml
      chutes-proto audit checkpoint --config server.toml --json

    See also: audit verify, audit key
    """
    with operating.opened(config) as (setup, store):
        _, note, found = _signed(setup, store)
    told = {"ok": True, "origin": found.origin, "size": found.size, "root": found.root.hex()}
    return answer(told | {"checkpoint": str(note)}, str(note))


@command.command()
@operating.config_option
@json_option
def key(config: str) -> int:
    """Print the public keys of the audit log.

    Each line is a verifier key, in the form of C2SP, which every client of such logs reads; the newest is last. An
    exported log and a proof are verified with it: hand it over in another way than the log.

    Examples:
      chutes-proto audit key --config server.toml
      chutes-proto audit key --config server.toml --json

    See also: audit verify, audit checkpoint
    """
    with operating.opened(config) as (setup, store):
        keys = [str(signer.verifier) for signer in store.transact(ReadLogKeys(setup.vault))]
    return answer({"ok": True, "keys": keys}, "\n".join(keys) or "none yet: the first checkpoint makes a key")


def _signed(setup: StoreSetup, store: DurableStore) -> tuple[Verifier, Note, Checkpoint]:
    """Sequence and sign. Raises `StoreError` for a log that cannot be signed."""
    sequencer = Sequencer(store, lambda: setup.vault, setup.config.audit.origin, checkpoint_path(setup.mark_file))
    note: Note | None = None
    try:
        for _ in range(2):  # the first may make the key, which is an entry, too
            sequencer.sequence()
            note = sequencer.checkpoint(writes=False)
    except LogError as exc:
        raise StoreError(f"audit log: {exc}") from None
    if note is None:
        raise StoreError(f"store {store.name}: its audit log is empty")
    return store.transact(ReadLogKeys(setup.vault))[-1].verifier, note, Checkpoint.of(note)


def _prove(config: str, entry: int) -> int:
    with operating.opened(config) as (setup, store):
        _, note, found = _signed(setup, store)
        if not 0 <= entry < found.size:
            what = f"the audit log has no entry {entry}; `chutes-proto audit list` shows all"
            raise Refused(Code.KEY_NOT_FOUND, what)
        try:
            proof = store.transact(ProveEntry(entry, found.size, note))
        except LogError as exc:
            raise StoreError(f"audit log: {exc}; see `chutes-proto audit verify`") from None
    for line in str(proof).splitlines():
        console.say(line)
    return console.GRANTED


def _export(config: str, directory: Path) -> int:
    with operating.opened(config) as (setup, store):
        for _ in range(_EXPORTS - 1):
            with suppress(PurgedMeanwhile):
                return _exported(setup, store, directory)
        return _exported(setup, store, directory)


def _exported(setup: StoreSetup, store: DurableStore, directory: Path) -> int:
    verifier, note, found = _signed(setup, store)
    try:
        with store.snapshot() as rows:
            written = export_log(rows, directory, found, note, verifier)
    except LogError as exc:
        raise StoreError(f"audit log: {exc}") from None
    console.tell(f"{directory}: a log of {found.size} entries, {written} new files; its key is {verifier}")
    return console.GRANTED


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
    return operating.members(row, f"{names} peer_address evidence idx")
