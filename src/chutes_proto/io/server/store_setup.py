"""Set-up of the part of a server that its operator's commands need: the store, and the KEKs of its rows.

Rules kept here:

* all problems are reported together, one a line, with the key and the file;
* relative paths begin at the configuration file's directory, or at the working directory if it has no file;
* nothing is made or changed: a check leaves no trace;
* nothing here needs an extra, but for a store in PostgreSQL.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from attrs import evolve, frozen

from chutes_proto.errors import ConfigurationError, FileUnavailable, QuoteError, StoreError
from chutes_proto.io.files import Files, check_private, is_credential, is_there
from chutes_proto.io.finding import Finding
from chutes_proto.io.server.sinks import FileSink, JournalSink, Sink, Sinks
from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.io.stores.erasures import file_beside
from chutes_proto.io.stores.marks import NO_FILE
from chutes_proto.keys.vault import KeyEncryptionKey, Vault
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
from chutes_proto.server._alike import LIVE_SECONDS, Alike, Difference
from chutes_proto.server._config import ServerConfig
from chutes_proto.store._rows import CountSealed, KeyringRow, ReadKeyServers, ReadTimes, Scan, Times
from chutes_proto.store._run import Ask, Store
from chutes_proto.units.nonces import lies_ahead, why_void

T = TypeVar("T")


@frozen
class StoreSetup:
    """The store of a configuration, and its key-encryption keys; ``root`` is the one that quotes must lead to."""

    config: ServerConfig
    store: StorePlace
    vault: Vault
    root: TrustedRoot

    @property
    def mark_file(self) -> Path | None:
        """The file of the mark that the server keeps."""
        name = self.config.store.mark_file
        return None if name is None else self.store.base / name


def make_store_setup(config: ServerConfig) -> StoreSetup:
    """Read the files that these parts need. Raises `ConfigurationError` with all problems, one a line."""
    problems = Problems()
    base = Path.cwd() if config.path is None else Path(config.path).parent
    _ = problems.attempt("store", lambda: check_configuration(config))
    files = Files()
    root = problems.attempt("roots", lambda: read_root(config, base, files))
    vault = read_vault(config, base, files, problems)
    if root is None or vault is None or problems.found:
        raise problems.error()
    return StoreSetup(config, evolve(store_place(config, base), vault=vault), vault, root)


def store_place(config: ServerConfig, base: Path, *, with_mark: bool = False) -> StorePlace:
    """The address of the configured store, and how it is opened; a server compares it with its mark.

    The commands of an operator do not: they are how he says what happened to the store.
    """
    options = config.store
    return StorePlace(
        options.url,
        base,
        connections=config.limits.store_connections,
        clock_difference_seconds=options.clock_difference_seconds,
        require_synchronous=options.require_synchronous and with_mark,
        mark_file=base / options.mark_file if with_mark and options.mark_file is not None else None,
    )


def erasures_file(config: ServerConfig) -> Path | None:
    """The file of erasures of this server, beside its mark; None without a mark."""
    base = Path.cwd() if config.path is None else Path(config.path).parent
    return None if config.store.mark_file is None else file_beside(base / config.store.mark_file)


def check_store(place: StorePlace, vault: Vault, alike: Alike | None = None) -> Iterator[Finding]:
    """Describe the store, without making or changing it; with ``alike``, compare the servers that use it, too.

    Raises `StoreError` for one that cannot be used, or that holds keys that ``vault`` cannot open.
    """
    if not place.is_made():
        yield Finding("ok", "store", f"{place.path}: not made yet")
        return
    with closing(place.open()) as store:
        _ = store.check()
        store.check_writing()
        count = sum(check_keys(store, vault).values())
        yield Finding("ok", "store", f"{store.name}: sealed keys: {count}, its own included")
        yield from store_findings(store)
        if place.mark_file is None:
            what, _, detail = NO_FILE.partition(": ")
            yield Finding("note", what, detail)
        elif count > 1 and not is_there(place.mark_file):  # a new store has one key, that of its rows
            detail = (
                f"{place.mark_file} does not exist, and the store is in use; a server begins another mark at its start;"
                " if the store was moved here, move the mark, too, and the files beside it"
            )
            yield Finding("note", "store.mark_file", detail)
        for each in find_differences(store, alike) if alike is not None else ():
            yield Finding("note", "configuration", f"{each}; make them equal, or stop that server and wait a minute")


def store_findings(store: DurableStore) -> Iterator[Finding]:
    """Findings about an open store that can be used."""
    for note in store.notes:
        what, _, detail = note.partition(": ")
        yield Finding("note", what, detail)
    times = store.transact(Ask(ReadTimes()))
    if (void := finding_of_void(times, int(time.time()))) is not None:
        yield void


def finding_of_void(times: Times, now: int) -> Finding | None:
    """Why no boot is granted, where all nonces are void: a problem if a clock was ahead, or else it ends by itself."""
    if (why := why_void(times, now)) is None:
        return None
    return Finding("problem" if lies_ahead(times, now) else "note", "store", f"no boot is granted: {why}")


def find_differences(store: Store, alike: Alike) -> list[Difference]:
    """The servers that use the store now and are configured otherwise than ``alike`` says."""
    alike.note(store.transact(Ask(ReadKeyServers(int(time.time()) - LIVE_SECONDS))))
    return alike.differences()


def count_sealed(store: Store) -> dict[str, int]:
    """Return how many keys are sealed under each KEK: passphrases, and keys of the store's own."""
    sealed = Counter(dict(store.transact(Ask(CountSealed()))))
    sealed.update(row.kek_id for row in store.transact(Ask(Scan(KeyringRow))))
    return dict(sorted(sealed.items(), key=str))  # SQLite takes a value of another type in any column


def check_keys(store: DurableStore, vault: Vault) -> dict[str, int]:
    """Return how many keys are sealed under each KEK. Raises `StoreError` for a KEK that ``vault`` does not have."""
    sealed = count_sealed(store)
    live = {key.kek_id for key in vault.live}
    if lost := {kek_id: count for kek_id, count in sealed.items() if kek_id not in live}:
        counts = ", ".join(f"{count} under {kek_id}" for kek_id, count in lost.items())
        raise StoreError(
            f"store {store.name}: keys are sealed under a key-encryption key (KEK) that is neither kek_file nor"
            f" kek_previous_file ({', '.join(sorted(live))}): {counts}; name the file of that KEK, and"
            " get it back from its backup if it is lost"
        )
    return sealed


def read_sinks(config: ServerConfig, base: Path) -> list[Sink]:
    """The sinks of a configuration."""
    audit = config.audit
    sinks: list[Sink] = []
    if audit.file is not None:
        sinks.append(FileSink(base / audit.file, is_durable=audit.required))
    if audit.journal:
        sinks.append(JournalSink())
    return sinks


def copy_audit(config: ServerConfig, base: Path, store: DurableStore) -> None:
    """Have the audit rows of an operator's command copied at once to where a configuration says."""
    if sinks := read_sinks(config, base):
        made = Sinks(sinks, required=config.audit.required, tell=store.add_note, copies=store.copies)
        store.copy_rows(made.rows)


# --- the parts ---


class Problems:
    """The problems that were found so far."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def attempt(self, key: str, make: Callable[[], T]) -> T | None:
        """Return the result of ``make``; add a problem and return None if it fails."""
        try:
            return make()
        except (ConfigurationError, QuoteError) as exc:
            self.found.append(f"{key}: {exc}")
            return None

    def error(self) -> ConfigurationError:
        return ConfigurationError("\n".join(self.found))


def read_root(config: ServerConfig, base: Path, files: Files) -> TrustedRoot:
    """The root of trust that ``roots`` names."""
    if config.roots == "intel":
        return INTEL_ROOT
    data = files.read(base / config.roots)
    try:
        return TrustedRoot.from_der(data)
    except QuoteError as exc:
        raise ConfigurationError(f'{base / config.roots}: {exc}; say "intel", or name a DER file') from None


def check_configuration(config: ServerConfig) -> None:
    """Check that a configuration file that holds the database's password is not for everybody to read."""
    if not config.store.url.startswith("postgresql:"):
        return
    from chutes_proto.io.stores.postgres import has_secret

    if has_secret(config.store.url) and config.path is not None:
        check_private(config.path)


def read_vault(config: ServerConfig, base: Path, files: Files, problems: Problems) -> Vault | None:
    """The key-encryption keys, or None and problems more."""
    current = problems.attempt("kek_file", lambda: _kek(base / config.kek_file, files))
    previous = None
    if config.kek_previous_file is not None:
        previous_path = base / config.kek_previous_file
        previous = problems.attempt("kek_previous_file", lambda: _kek(previous_path, files))
    if previous is not None and previous == current:
        text = f"kek_previous_file: {base / str(config.kek_previous_file)} holds the same key as kek_file"
        problems.found.append(text)
    return None if current is None else Vault(current, previous)


def _kek(path: Path, files: Files) -> KeyEncryptionKey:
    try:
        data = files.read_private(path)
    except FileUnavailable as exc:
        if os.path.lexists(path) or is_credential(path):
            raise
        raise FileUnavailable(f"{exc}; get it back from its backup: a new one is for a new store only") from None
    try:
        return KeyEncryptionKey.from_bytes(data)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{path}: {exc}") from None
