"""``chutes-proto store``: the database of a key server, which only its operator migrates, copies and restores."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import TYPE_CHECKING, Any

from chutes_proto.cli import console, operating

if TYPE_CHECKING:
    from chutes_proto.io.stores.address import StorePlace
    from chutes_proto.keys.vault import Vault

NAME = "store"

_COUNTS = ("rows", "keys_sealed_under")


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "make, migrate, copy and check a key server's store",
        """
        Commands for the database of a key server. A server itself never makes or changes the schema of a database in
        PostgreSQL, and never migrates one of another release.
        """,
        "chutes-proto store migrate --config /etc/chutes/server.toml\n"
        "chutes-proto store check --store sqlite:/var/lib/chutes/keys.db --json",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    migrate = console.command(
        actions,
        "migrate",
        "make the schema, or bring an older one to this release",
        """
        Make the schema in an empty database, or bring that of an older release to this one's, in one transaction. Back
        the database up before, and stop the servers of the older release: they refuse a newer schema at their next
        start. Where there is nothing to do, nothing is done. No rows come from another store by this: see `store copy`.

        exit code: 0 the schema is this release's now; 1 it cannot be made so, and was left as it is; 2 usage, or a file
        that cannot be read
        """,
        "chutes-proto store migrate --config /etc/chutes/server.toml\n"
        "chutes-proto store migrate --store 'postgresql://chutes@db.internal/keys?passfile=/etc/chutes/pgpass'",
    )
    copy = console.command(
        actions,
        "copy",
        "fill an empty store with all that is in another one",
        """
        Copy every row of the store --from into the empty one of --config or --store, in one transaction: from a file to
        PostgreSQL, for example, or back. Stop all servers before, and let none start on the old store again: what it
        granted then, the new one would not know. Nothing is changed in the old one, though it must be one that can be
        written, and keys stay sealed as they are. In PostgreSQL make the schema first, with `store migrate`; a file
        that is not there is made.

        exit code: 0 all is there; 1 no row was copied; 2 usage, or a file that cannot be read
        """,
        "chutes-proto store copy --from sqlite:/var/lib/chutes/keys.db --config /etc/chutes/postgres.toml",
    )
    _ = copy.add_argument("--from", dest="source", metavar="URL", required=True, help="the store that has the rows")
    operating.add_reason(copy)
    check = console.command(
        actions,
        "check",
        "read everything and say what is wrong",
        """
        Read the whole store: its schema version, whether it is damaged, how many rows it has, and with --config whether
        the server's key-encryption keys are those that its keys are sealed under. Nothing is changed.

        exit code: 0 nothing is wrong; 1 something is; 2 usage, or a file that cannot be read
        """,
        "chutes-proto store check --config /etc/chutes/server.toml",
    )
    restored = console.command(
        actions,
        "restored",
        "tell the server that its store came back from a backup",
        """
        Say this after a restore from a backup, before a server starts on it: what was spent since the backup is
        unknown, so all nonces and tokens of before are void. VMs boot again; no key is touched.

        Say it too where a clock was ahead and boots wait for a time in the future, once all clocks are right. The time
        after which nonces count is set anew, also back: by the database's clock, and in SQLite by this machine's.

        exit code: 0 done; 1 the store cannot be written; 2 usage, or a file that cannot be read
        """,
        "chutes-proto store restored --config /etc/chutes/server.toml --reason 'disk failure on db1'",
    )
    operating.add_reason(restored)
    for action in (migrate, copy, check, restored):
        which = action.add_mutually_exclusive_group(required=True)
        _ = which.add_argument("--config", metavar="FILE", help="the server's configuration file (TOML)")
        _ = which.add_argument(
            "--store",
            metavar="URL",
            help="sqlite:/path, or postgresql://user@host/database (no password: use passfile)",
        )
        console.add_json(action)
    return parser


def run(options: argparse.Namespace) -> int:
    from chutes_proto.errors import StoreError

    place, vault = _place(options)
    try:
        match options.action:
            case "migrate":
                result = _migrate(place)
            case "copy":
                result = _copy(_named("--from", options.source), place, vault, operating.reason(options))
            case "check":
                result = _check(place, vault)
            case _:
                result = _restored(place, operating.reason(options))
    except StoreError as exc:
        if options.json:
            console.say_json({"ok": False, "error": str(exc)})
        console.tell(f"chutes-proto: {exc}")
        return console.REFUSED
    if options.json:
        console.say_json({"ok": True, **result})
    else:
        for name, value in result.items():
            told = ", ".join(f"{key} {count}" for key, count in value.items()) if name in _COUNTS else value
            console.say(f"{name.replace('_', ' ')}: {told}")
    return console.GRANTED


def _place(options: argparse.Namespace) -> tuple[StorePlace, Vault | None]:
    """The store, and with a configuration the server's key-encryption keys."""
    from chutes_proto.io.server.setup import make_setup
    from chutes_proto.server import ServerConfig

    if options.config:
        setup = make_setup(ServerConfig.load(options.config))
        return setup.store, setup.service.vault
    return _named("--store", options.store), None


def _named(option: str, address: str) -> StorePlace:
    """The store at an address on the command line."""
    from pathlib import Path

    from chutes_proto.errors import ConfigurationError
    from chutes_proto.io.stores.address import StorePlace
    from chutes_proto.server._config import check_store_address

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


def _migrate(place: StorePlace) -> dict[str, Any]:
    from chutes_proto.store.sql import SCHEMA_VERSION

    store = place.open(migrate=True)
    store.close()
    found: dict[str, Any] = {
        "store": store.name,
        "schema_version": SCHEMA_VERSION,
        "schema_version_before": store.found_version or 0,
    }
    if store.found_version is None:
        found["made"] = "a new store without keys; `chutes-proto store copy` fills it from another one"
    return found


def _copy(source: StorePlace, place: StorePlace, vault: Vault | None, reason: str) -> dict[str, Any]:
    from chutes_proto.errors import ConfigurationError, StoreError
    from chutes_proto.io.server.setup import check_keys
    from chutes_proto.units.contents import ReadContents, WriteContents

    if not source.is_made():
        raise StoreError(f"store {source.path}: not made yet, so that there is nothing to copy")
    with closing(source.open()) as old, closing(place.open()) as store:
        if store.name == old.name:
            raise ConfigurationError(f"--from: {old.name} is the store to fill")
        _ = old.check()
        sealed = None if vault is None else check_keys(old, vault)
        contents = old.transact(ReadContents())
        console.tell(f"copying {len(contents.rows)} rows from {old.name} to {store.name}")
        store.transact(WriteContents(contents, operating.now(), reason))
        found: dict[str, Any] = {"store": store.name, "copied_from": old.name, "rows": store.check()}
    if sealed is not None:
        found["keys_sealed_under"] = sealed
    return found


def _restored(place: StorePlace, reason: str) -> dict[str, Any]:
    from chutes_proto.errors import StoreError
    from chutes_proto.units.operator import StoreRestored

    if not place.is_made():
        raise StoreError(f"store {place.path}: not made yet, so that there is nothing to restore")
    with closing(place.open()) as store:
        done = store.transact(StoreRestored(operating.now(), reason))
    again = f"boots are granted again after {operating.shown(done.horizon)}"
    return {
        "store": store.name,
        "restored": f"all nonces and tokens of before are void; {again}",
        "nonce_horizon": operating.shown(done.horizon),
        "nonce_horizon_before": operating.shown(done.before),
    }


def _check(place: StorePlace, vault: Vault | None) -> dict[str, Any]:
    from chutes_proto.errors import StoreError
    from chutes_proto.io.server.setup import check_keys
    from chutes_proto.store.sql import SCHEMA_VERSION

    if not place.is_made():
        raise StoreError(f"store {place.path}: not made yet; a server makes it, or `chutes-proto store migrate`")
    with closing(place.open()) as store:
        found: dict[str, Any] = {"store": store.name, "schema_version": SCHEMA_VERSION, "rows": store.check()}
        if vault is not None:
            found["keys_sealed_under"] = check_keys(store, vault)
        return found
