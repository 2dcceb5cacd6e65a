"""Erasures and revocations in a file beside the mark of a store: one that comes back from a backup repeats them.

Rules kept here:

* a server, and each command that erases, revokes or allows, adds what the store has to the file, and does again what
  the file has and the store has not; before a server serves, and before `store restored` lets others go on;
* the file is replaced as a whole or not at all, and loses nothing. A line is one erasure, or the last change of one
  party's revocation; one that cannot be read is an error that names the file: a line that is skipped would bring keys
  back, or a VM;
* of two changes of a party's revocation the later one holds, whether it is in the file or in the store;
* a line has the number of its store. Those of another store stay in the file and erase nothing: the other may have a
  VM of the same name, whose keys were never erased;
* a line has a MAC under a key that is derived from the KEK: a line destroys keys, or lets a revoked party boot. After a
  new KEK all lines get new ones. One that no server wrote stops the start, and is never done.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, get_args

from attrs import asdict, define, frozen

from chutes_proto.errors import ConfigurationError, RowNotAuthentic, StoreError
from chutes_proto.io.files import give_to_owner_of, is_there, read_lines, write_file
from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.store._rows import ErasureRow, Revocable, RevocationRow, Scan, Vm
from chutes_proto.store._run import Ask
from chutes_proto.units.erasure import RepeatErasure, through_of
from chutes_proto.units.revocations import RepeatRevocation

if TYPE_CHECKING:
    from chutes_proto.keys.vault import Vault
    from chutes_proto.secret import Secret

LONGEST: Final = 64 * 1024
"""The most bytes of a line."""
SHORTEST: Final = 32
"""The fewest bytes of a value that is looked for in a file."""
_BLOCK: Final = 1 << 20
_WORD: Final = 8
_ERASURE: Final = {"store", "erasure_id", "hotkey", "vm", "erased_at", "through"}
_REVOCATION: Final = {"store", "kind", "subject", "reason", "created_at", "ends_at", "allowed_at"}
_SEAL: Final = {"kek": re.compile("[0-9a-f]{16}"), "mac": re.compile("[0-9a-f]{64}")}
"""The members that each line has besides: the id of the KEK of its MAC, and the MAC."""
_Party: TypeAlias = tuple[Revocable, str]


@frozen
class Repeated:
    """The erasures and the changes of revocations that were done again, and how many keys that destroyed."""

    vms: int = 0
    keys: int = 0
    revocations: int = 0

    def __bool__(self) -> bool:
        return bool(self.vms or self.revocations)

    def __str__(self) -> str:
        return (
            f"{self.vms} VMs were erased again, {self.keys} keys of them destroyed, and {self.revocations} revocations"
            " or ends of one repeated, because the store had lost that"
        )


@define
class _Noted:
    """The lines of a file: of one store by what they are about, of others as they are."""

    erasures: dict[str, ErasureRow]
    revocations: dict[_Party, RevocationRow]
    others: list[bytes]
    is_of_current: bool = True
    """Whether all lines of the store have MACs under the current KEK."""


def file_beside(mark_file: Path) -> Path:
    """The file of erasures that goes with a mark."""
    return mark_file.with_name(f"{mark_file.name}.erasures")


def check_file(path: Path, vault: Vault) -> None:
    """Read a file of erasures as the start of a server does, if it is there. Raises `StoreError`."""
    _ = _read(path, 0, vault)


def keep_erasures(store: DurableStore, path: Path | None, vault: Vault) -> Repeated:
    """Repeat in ``store`` the erasures and revocations of the file, and add those of the store to it.

    An erasure that the store knows is looked at, too: somebody may have put its record into a store from before.
    ``vault`` has the KEKs of the server; nothing is done without a file. Raises `StoreError` also for
    a file that cannot be read or written, or that has a line of which the MAC is wrong.
    """
    if path is None:
        return Repeated()
    noted = _read(path, store.store_id, vault)
    vms = keys = revocations = 0
    erased = {row.erasure_id: row for row in store.transact(Ask(Scan(ErasureRow)))}
    for record in noted.erasures.values():
        try:
            destroyed = store.transact(RepeatErasure(int(time.time()), 1 + secrets.randbits(62), record))
        except RowNotAuthentic:
            if record.erasure_id not in erased:
                raise
            continue  # that VM gets no key
        vms, keys = vms + (destroyed is not None), keys + (destroyed or 0)
    found = store.transact(Ask(Scan(RevocationRow)))
    changed: dict[_Party, RevocationRow] = {(row.kind, row.subject): row for row in found}
    for party, row in noted.revocations.items():
        there = changed.get(party)
        if there is None or there.changed_at < row.changed_at:
            unit = RepeatRevocation(int(time.time()), 1 + secrets.randbits(62), row)
            revocations += store.transact(unit)
            changed[party] = row
    if erased.keys() - noted.erasures.keys() or changed != noted.revocations or not noted.is_of_current:
        noted.erasures |= erased
        noted.revocations = changed
        _write(path, noted, store.store_id, vault)
    return Repeated(vms, keys, revocations)


def _write(path: Path, noted: _Noted, store_id: int, vault: Vault) -> None:
    told = [_plain(row, store_id) for row in noted.erasures.values()]
    told += [{"store": store_id, **asdict(row)} for row in noted.revocations.values()]
    kek = vault.current.kek_id
    macs = _macs(vault)
    lines = [json.dumps({**each, "kek": kek, "mac": macs[kek](each)}).encode() for each in told]
    try:
        write_file(path, b"".join(line + b"\n" for line in (*noted.others, *lines)), mode=0o600)
        give_to_owner_of(path.parent, path)
    except (ConfigurationError, OSError) as exc:
        raise StoreError(f"erasures: {exc}") from None


def _macs(vault: Vault) -> dict[str, Callable[[Mapping[str, object]], str]]:
    """Functions that make the MAC of a line's other members, by the KEK from which its key is derived."""

    def under(key: Secret) -> Callable[[Mapping[str, object]], str]:
        return lambda told: hmac.digest(key.reveal(), json.dumps(told, sort_keys=True).encode(), "sha256").hex()

    return {kek_id: under(key) for kek_id, key in vault.derive("erasures")}


def _plain(row: ErasureRow, store_id: int) -> dict[str, object]:
    members = {"store": store_id, "erasure_id": row.erasure_id, "hotkey": row.vm.hotkey, "vm": row.vm.name}
    return {**members, "erased_at": row.erased_at, "through": row.through}


def _read(path: Path, store_id: int, vault: Vault) -> _Noted:
    """Read the lines of a store, and keep those of other stores as they are."""
    try:
        lines = [*read_lines(path, limit=LONGEST, plain=True)] if is_there(path) else []
    except (ConfigurationError, OSError) as exc:
        raise StoreError(f"erasures: {exc}") from None
    noted, macs = _Noted({}, {}, []), _macs(vault)
    for number, line in enumerate(lines, 1):
        place = f"erasures: {path}, line {number}"
        try:
            told: Any = json.loads(line)
            kek, mac = (told.pop(name) for name, form in _SEAL.items() if form.fullmatch(told[name]))
            row = _erasure(told) if "erasure_id" in told else _revocation(told)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise StoreError(f"{place}: neither an erasure nor a revocation; {_REMEDY}") from None
        if kek in macs and not hmac.compare_digest(mac, macs[kek](told)):
            raise StoreError(f"{place}: its MAC is not that of a server, so somebody else wrote it; {_REMEDY}")
        if told["store"] != store_id:
            noted.others.append(line.strip())
            continue
        if kek not in macs:
            raise StoreError(
                f"{place}: it was written under the key-encryption key (KEK) {kek}; name that KEK in kek_previous_file,"
                " and start the server once: it writes the file under the new one; if it is destroyed, move the file"
                " away: the store knows what was erased and revoked, unless it was restored since"
            )
        noted.is_of_current &= kek == vault.current.kek_id
        if isinstance(row, ErasureRow):
            noted.erasures[row.erasure_id] = row
        else:
            noted.revocations[row.kind, row.subject] = row
    return noted


_REMEDY: Final = "restore the file, or remove the line if you know what it was"


def _erasure(told: Any) -> ErasureRow:
    """The erasure of a line. Raises `ValueError`, or as Python does, for another form."""
    _check(told, _ERASURE, "erasure_id hotkey vm through", "store erased_at")
    row = ErasureRow(told["erasure_id"], Vm(told["hotkey"], told["vm"]), told["erased_at"], told["through"])
    _ = through_of(row)
    return row


def _revocation(told: Any) -> RevocationRow:
    """The revocation of a line. Raises as `_erasure` does."""
    times = [name for name in ("ends_at", "allowed_at") if told[name] is not None]
    _check(told, _REVOCATION, "kind subject reason", " ".join(("store", "created_at", *times)))
    if told["kind"] not in get_args(Revocable):
        raise ValueError(told)
    return RevocationRow(**{name: value for name, value in told.items() if name != "store"})


def _check(told: Any, members: set[str], texts: str, numbers: str) -> None:
    if told.keys() != members or not all(type(told[name]) is str for name in texts.split()):
        raise ValueError(told)
    if not all(type(told[name]) is int for name in numbers.split()):
        raise ValueError(told)


def scrub(place: StorePlace, erased: Sequence[bytes]) -> list[Path]:
    """Remove what deleted values left in an SQLite file and its log; return the files that still hold one of them.

    SQLite overwrites what it deletes, and its log is emptied here. Another program may have left older copies in free
    pages: then the file is rewritten as a whole, which takes as much space again. So it is without values: they were
    erased before, and nobody knows any more what to look for.
    """
    path = place.path
    if path is None:
        return []
    left: list[Path] = []
    for rewrite in (False, True) if erased else (True,):
        with closing(SqliteStore(path)) as store:
            store.empty_log(rewrite=rewrite)
        # After it is closed: closing another descriptor of the file would drop SQLite's locks of this process.
        left = [file for file in (path, path.with_name(f"{path.name}-wal")) if holds(file, erased)]
        if not left:
            break
    return left


def holds(path: Path, values: Sequence[bytes]) -> bool:
    """Return whether a file holds one of these values, wherever in it; each has `SHORTEST` bytes or more.

    The file is read once, and compared once with all values: of every so many words of 8 bytes, one is a word of each
    value that is there, wherever it begins.
    """
    step = min(map(len, values), default=SHORTEST) // _WORD - 1
    wanted = {int.from_bytes(value[at : at + _WORD], sys.byteorder) for value in values for at in range(step * _WORD)}
    overlap = max(map(len, values), default=1) - 1
    before = b""
    with suppress(FileNotFoundError), path.open("rb") as file:
        while block := file.read(_BLOCK):
            block = before + block
            words = memoryview(block + bytes(-len(block) % _WORD)).cast("Q")[::step]
            if not wanted.isdisjoint(words) and any(value in block for value in values):
                return True
            before = block[-overlap:] if overlap else b""
    return False
