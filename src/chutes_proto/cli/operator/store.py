"""``chutes-proto store``: the database of a key server, which only its operator copies and restores."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from attrs import evolve

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Group, answer, json_option, one_of, table_options
from chutes_proto.cli.describe import exits, wrong_usage
from chutes_proto.cli.operator import operating
from chutes_proto.cli.operator.operating import OperatorCommand
from chutes_proto.errors import ConfigurationError, KeyUnavailable, RowNotAuthentic, StoreBusy, StoreError
from chutes_proto.io.files import is_there
from chutes_proto.io.server.store_setup import check_keys, erasures_file, make_store_setup
from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.io.stores.erasures import keep_erasures
from chutes_proto.io.stores.marks import NO_FILE
from chutes_proto.io.stores.sealing import find_faults, require_keys
from chutes_proto.keys.vault import Vault
from chutes_proto.quote._terms import rfc3339
from chutes_proto.server import ServerConfig
from chutes_proto.server._config import check_store_address
from chutes_proto.store._rows import CountRows, GenerationRow, Read, ReadAll, ReadPage, ReadTimes, VmRow, VolumeRow
from chutes_proto.store._run import Ask, Store
from chutes_proto.units.compare import Compare, Difference, Newer, Take
from chutes_proto.units.contents import CountAll, Fill, pages
from chutes_proto.units.operator import StoreRestored

F = TypeVar("F", bound=Callable[..., Any])

command: Group = Group(
    "store",
    of=OperatorCommand,
    help="""Make, copy and check the store of a key server.

    The store is a database: a file of SQLite, or PostgreSQL. In PostgreSQL a server never makes the schema.

    Examples:
      chutes-proto store init --config server.toml
      chutes-proto store check --store sqlite:keys.db --json

    See also: serve, keys rewrap
    """,
)


_config = click.option("--config", metavar="FILE", required=True, help="the server's configuration file (TOML)")


@command.command(exits=exits("the store is there", "it cannot be made, and is unchanged"))
@_config
@json_option
def init(config: str) -> int:
    """Make the store in an empty database.

    A server makes an SQLite file itself at its first start, but no tables in PostgreSQL. Nothing is done to a store
    that is there. For the rows of another store see `store copy`.

    Examples:
      chutes-proto store init --config server.toml
      chutes-proto store init --config server.toml --json

    See also: store copy, store check
    """
    with closing(make_store_setup(ServerConfig.load(config)).store.open(make=True)) as opened:
        if opened.is_new:
            note = "a new store without keys; `chutes-proto store copy` fills it from another one"
        else:
            note = "it was there before; nothing was changed"
        return _told({"store": opened.name, "made": opened.is_new, "note": note})


@command.command(exits=exits("all rows are copied", "no row was copied"))
@click.option("--from", "source", metavar="URL", help="the store that has the rows")
@click.option("--from-config", metavar="FILE", help="the configuration file of its server, instead")
@operating.reason_option
@_config
@json_option
def copy(source: str | None, from_config: str | None, reason: str, config: str) -> int:
    """Fill an empty store with all rows of another one.

    Copies every row of the store --from, or that of --from-config, into the empty store of --config, in one
    transaction: from a file to PostgreSQL, for example, or back. Before, stop all servers, and never start one on the
    old store again: the new store does not know what it would grant. An SQLite file that a server or another command
    has open is refused, and none can open it meanwhile. From PostgreSQL the rows of one moment are copied, and the
    command says if sessions of chutes-proto are connected: a server that still runs, or a pooler that keeps them. The
    old store is not changed, but it must be writable. Keys stay sealed under the same KEK, which --config
    names: the rows are checked, and get new MACs. In PostgreSQL make the store first, with `store init`. A missing
    SQLite file is made, and appears under its name when all rows are in it.

    With --from-config the old store is opened as its server does: under its KEKs, and compared with the mark in its
    store.mark_file. So one that went back is refused. With --from
    it is not compared with a mark, and the command says so.

    Examples:
      chutes-proto store copy --from-config server.toml --config new.toml
      chutes-proto store copy --from sqlite:keys.db --config postgres.toml

    See also: store init, store check
    """
    setup = make_store_setup(ServerConfig.load(config))
    place, vault = setup.store, setup.vault
    origin = _origin(source, from_config, vault)
    if not origin.is_made():
        raise StoreError(f"store {origin.path}: not made yet, so there is nothing to copy; see --from")
    if origin.name == place.name:
        raise ConfigurationError(f"--from: {origin.name} is the store to fill; name another one")
    with closing(origin.open(alone=True)) as old, place.filling() as new:
        require_keys(old)
        for note in old.notes:
            console.tell(note)
        if origin.mark_file is None:
            console.tell(f"{old.name} is not compared with a mark, as --from-config names none: it is taken as it is")
        with output.waiting(f"checking {old.name}") as tell:
            _ = old.check(tell)
        sealed = check_keys(old, vault)
        with old.snapshot() as rows:
            # The new store takes what it gets for true, and makes its own heads.
            with output.waiting(f"checking the rows of {old.name}") as tell:
                for fault in find_faults(rows, tell):
                    raise fault
            total, horizon = rows.transact(CountAll()), rows.transact(Ask(ReadTimes())).horizon
            console.tell(f"copying {total} rows from {old.name} to {place.name}")
            with output.waiting("rows copied", total) as tell:
                new.transact(Fill(horizon, lambda: pages(rows), operating.now(), reason, total, tell))
        with output.waiting(f"checking {place.name}") as tell:
            found: dict[str, Any] = {"store": place.name, "copied_from": old.name, "rows": new.check(tell)}
        if old.notes:
            found["note"] = "; ".join(old.notes)
    return _told(found | {"keys_sealed_under": sealed})


def _origin(source: str | None, from_config: str | None, vault: Vault) -> StorePlace:
    """The store to copy from: as its server opens it, with the mark that it keeps, or by its address alone."""
    one_of(**{"from": source, "from_config": from_config})
    if from_config is None:
        return evolve(_named("--from", str(source)), vault=vault)
    setup = make_store_setup(ServerConfig.load(from_config))
    return evolve(setup.store, mark_file=setup.mark_file)


@command.command(exits=exits("nothing is wrong", "something is wrong"))
@click.option("--config", metavar="FILE", help="the server's configuration file (TOML)")
@click.option(
    "--store", metavar="URL", help="sqlite:/path, or postgresql://user@host/database (no password: use passfile)"
)
@json_option
def check(config: str | None, store: str | None) -> int:
    """Read the whole store and say what is wrong.

    Checks the schema version, looks for damage, counts the rows, and with --config checks that the server has the KEKs
    that its keys are sealed under. With --config it also reads all rows, and names each that is not
    as a key server wrote it last: forged, changed, moved, deleted or rolled back. It compares the store with the mark
    that a server of this machine keeps in store.mark_file, and says if servers refuse it. Nothing is changed. Give one
    of --config and --store.

    Examples:
      chutes-proto store check --config server.toml
      chutes-proto store check --store sqlite:keys.db --json

    See also: serve, keys rewrap
    """
    one_of(config=config, store=store)
    setup = None if config is None else make_store_setup(ServerConfig.load(config))
    place = _named("--store", str(store)) if setup is None else setup.store
    mark_file = None if setup is None else setup.mark_file
    place.require_made(mark_file)
    marked = {} if setup is None else _compared_with_mark(place, mark_file)
    with _told_to_restore(), closing(place.open()) as opened, output.waiting(f"checking {opened.name}") as tell:
        found: dict[str, Any] = {"store": opened.name, "rows": opened.check(tell)}
        found |= marked
        if setup is not None:
            found["keys_sealed_under"] = check_keys(opened, setup.vault)
            # A row is looked at with its table, and again with its VM.
            found["not_authentic"] = [*dict.fromkeys(fault.finding for fault in find_faults(opened, tell))]
            if found["not_authentic"]:
                found["next"] = _RESTORE
    if "ok" in found or found.get("not_authentic"):
        return _told({**found, "ok": False}) or console.REFUSED
    return _told(found)


_RESTORE: Final = "find out who writes the database beside the servers, and restore a backup"


@contextmanager
def _told_to_restore() -> Generator[None]:
    """A row without which no other one can be looked at has the advice of those that are listed."""
    try:
        yield
    except RowNotAuthentic as exc:
        raise StoreError(f"{exc.finding}; {_RESTORE}") from None


def _compared_with_mark(place: StorePlace, mark_file: Path | None) -> dict[str, Any]:
    """The finding of a server that opens the store with its mark."""
    if mark_file is None:
        return {"mark": NO_FILE}
    if not is_there(mark_file):
        return {"mark": f"{mark_file}: not made yet; a server begins it"}
    try:
        with closing(evolve(place, mark_file=mark_file).open()) as opened:
            notes = opened.notes
    except StoreBusy:
        raise
    except StoreError as exc:
        return {"ok": False, "mark": f"servers refuse the store: {exc}"}
    return {"mark": "; ".join([f"{mark_file}: the store is not behind it", *notes])}


@command.command(exits=exits("done", "the store cannot be written"))
@operating.reason_option
@_config
@json_option
def restored(reason: str, config: str) -> int:
    """Go on with a store that came back from a backup, or lost rows in a fail-over.

    Servers that keep a mark refuse the store until then, because it lacks rows that they saw. Tokens that were redeemed
    since are unknown, so all earlier nonces and tokens become void. VMs boot again; no key is changed.

    Run it after a restore. After a fail-over to a standby that was behind, first make sure that this is the primary,
    and that the old one cannot come back: what the log of the servers names is lost for good. Keys that were made in
    that time do not open the disks that were formatted with them. Servers begin a new mark.

    Run it also after a clock was ahead and boots wait for a time in the future, once all clocks are right. It sets the
    time from which nonces count, forward or back: by the clock of PostgreSQL, and with SQLite by this machine's.

    Examples:
      chutes-proto store restored --config server.toml --reason 'fail-over of 3 May, standby was behind'
      chutes-proto store restored --config server.toml --json

    See also: store check, audit list
    """
    setup = make_store_setup(ServerConfig.load(config))
    if not setup.store.is_made():
        raise StoreError(f"store {setup.store.path}: not made yet, so nothing is lost; see --config")
    with closing(setup.store.open()) as opened:
        repeated = keep_erasures(opened, erasures_file(setup.config), setup.vault)
        done = opened.transact(StoreRestored(operating.now(), reason))
        operating.require_kept(opened, ReadTimes())
    again = f"boots are granted again after {rfc3339(done.horizon)}"
    for fault in done.faults:
        console.complain(f"{fault}; its VM gets no key until then")
    return _told(
        {
            "store": opened.name,
            "restored": f"all earlier nonces and tokens are void; {again}",
            "nonce_horizon": rfc3339(done.horizon),
            "nonce_horizon_before": rfc3339(done.before),
            "vms_erased_again": repeated.vms,
            "keys_erased_again": repeated.keys,
            "revocations_repeated": repeated.revocations,
            "not_authentic": [str(fault) for fault in done.faults],
        }
    )


@command.command(
    exits=exits(
        "the older store has every key, or has taken what it lacked",
        "a key is missing, two keys have one number, or a VM is bound elsewhere; or --take was refused",
        wrong_usage("a store that cannot be read or is another server's"),
    )
)
@click.argument("old", cls=Argument, metavar="OLD", help="the store that came back from a backup, as a URL")
@click.argument("new", cls=Argument, metavar="NEW", help="the newer store that it replaces, as a URL")
@click.option("--take", is_flag=True, help="copy the missing keys from NEW to OLD; needs --config")
@click.option("--config", metavar="FILE", help="the server's configuration file, for its KEKs")
@operating.reason_option
@table_options
def compare(old: str, new: str, take: bool, config: str | None, reason: str) -> int:
    """List the keys that a restored store lacks, and take them.

    Compares OLD, a store that came back from a backup, with NEW, the store that it replaces and that can still be read.
    Lists each volume of which OLD lacks a key: its disk may not open. Shows no passphrase.

    With --take, copies the missing keys from NEW, with their states, and with an audit row for each VM. Before, stop
    all servers of both stores. Each key must open with a KEK of --config, current or previous. A volume for which OLD
    has made another key of the same number since differs: it is left as it is. So is one that is elsewhere: OLD binds
    its VM to a platform that NEW does not bind it to, which would get the keys. Rebind it in OLD, and repeat the
    command. NEW is not changed. After an interruption, repeat the command, too.

    Examples:
      chutes-proto store compare sqlite:keys.db sqlite:newer.db
      chutes-proto store compare sqlite:keys.db sqlite:newer.db --take --config server.toml --reason 'disk failure'

    See also: store restored, vm rebind, keys history, keys restore
    """
    if take != (config is not None):
        raise ConfigurationError("--take: it goes with --config, which names the KEKs of the keys to take")
    vault = None if config is None else make_store_setup(ServerConfig.load(config)).vault
    places = [evolve(_named(name, address), vault=vault) for name, address in (("OLD", old), ("NEW", new))]
    if places[0].name == places[1].name:
        raise ConfigurationError(f"NEW: {places[0].name} is OLD; name the newer store")
    wrong: list[Difference] = []

    def rows(older: DurableStore, newer: Store) -> Iterator[Difference]:
        total, compared = newer.transact(Ask(CountRows(VmRow))), 0
        with output.waiting("VMs compared", total) as tell:
            for some in _batches(newer):
                if vault is None:
                    found = tuple(each for one in some for each in older.transact(Compare(one))[1])
                else:
                    found = older.transact(Take(operating.now(), some, vault, reason))
                wrong.extend([each for each in found if each.state != "taken"][:1])
                yield from found
                compared += len(some)
                tell(compared)

    with _readable(places[0], places[1], vault) as (older, newer), operating.resumable() if take else nullcontext():
        return operating.answer_rows(
            "volumes", map(_difference, rows(older, newer)), _DIFFERENCES, "no key is missing", ok=lambda: not wrong
        )


_VMS: Final = 100
"""VMs whose keys are taken in one transaction."""


def _vms(newer: Store) -> Iterator[Newer]:
    """The newer store's VMs that have keys; a page of keys is in memory at a time, however many there are."""
    keys = operating.listing(newer, lambda after: ReadPage(GenerationRow, after, operating.PAGE))
    for vm, rows in groupby(keys, key=lambda row: row.vm):
        found = tuple(rows)
        disks = newer.transact(Ask(ReadAll(VolumeRow, vm)))
        yield Newer(vm, found, disks, newer.transact(Ask(Read(VmRow, vm))))


def _batches(newer: Store) -> Iterator[tuple[Newer, ...]]:
    found = _vms(newer)
    while batch := tuple(islice(found, _VMS)):
        yield batch


_DIFFERENCES: output.Columns = {
    "VM": lambda row: output.vm(row["hotkey"], row["vm"]),
    "VOLUME": lambda row: row["volume"],
    "GENERATIONS": lambda row: ", ".join(map(str, row["generations"])),
    "STATE": lambda row: output.Cell(row["state"], "good" if row["state"] == "taken" else "warn"),
}


def _difference(row: Difference) -> dict[str, object]:
    names = {"hotkey": row.vm.hotkey, "vm": row.vm.name, "volume": row.volume}
    return {**names, "generations": list(row.generations), "state": row.state}


@contextmanager
def _readable(old: StorePlace, new: StorePlace, vault: Vault | None) -> Generator[tuple[DurableStore, Store]]:
    """Both stores, which must be one server's. Raises `ConfigurationError` if one cannot be read.

    With a ``vault``, all keys of the newer one must be sealed under its KEKs. Raises `KeyUnavailable`.
    """
    try:
        for place in (old, new):
            if not place.is_made():
                raise StoreError(f"store {place.path}: not made yet, so there is nothing to compare")
        with closing(old.open()) as older, closing(new.open()) as opened:
            if vault is not None:
                try:
                    _ = check_keys(opened, vault)
                except StoreError as exc:
                    raise KeyUnavailable(str(exc)) from None
            with opened.snapshot() as newer:
                is_empty = next(_vms(newer), None) is None
                if not is_empty and not any(older.transact(Compare(one))[0] for one in _vms(newer)):
                    text = f"stores {old.name} and {new.name}: they share no key, so they are not of one server"
                    raise StoreError(text)
                yield older, newer
    except StoreError as exc:
        raise ConfigurationError(str(exc)) from exc


def _told(found: dict[str, Any]) -> int:
    def people() -> None:
        for name, value in found.items():
            if name == "ok":
                continue
            if name in ("rows", "keys_sealed_under"):
                value = ", ".join(f"{key} {count}" for key, count in value.items())
            for each in value if name == "not_authentic" else [value]:
                output.prose(f"{name.replace('_', ' ')}: {each}", rest=2)

    return answer({"ok": True, **found}, people)


def _named(option: str, address: str) -> StorePlace:
    """The store at an address on the command line."""
    if problem := check_store_address(address):
        raise ConfigurationError(f"{option}: {problem}")
    if address.startswith("postgresql:"):
        from chutes_proto.io.stores.postgres import has_secret

        try:
            told = has_secret(address)
        except ConfigurationError as exc:
            raise ConfigurationError(f"{option}: {exc}") from None
        if told:
            raise ConfigurationError(
                f"{option}: other users can read a command line; leave the password out, and say ?passfile=/path"
            )
    return StorePlace(address, Path.cwd())
