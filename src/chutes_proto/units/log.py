"""The audit log: audit rows become entries of a Merkle tree, and proofs are made from its tiles.

Rules kept here:

* a unit of a VM only adds its audit rows. `SequenceLog` gives them their places afterwards, in the order in which they
  were written, so no unit waits for another one's row;
* one transaction at a time sequences, and it gives an index to committed rows alone: one that is frozen, killed or
  doubled loses none, and reorders none;
* an entry is the text of its row: canonical JSON (RFC 8785) of its columns, without those that are NULL. So a column
  that a later release adds changes no older entry. Its salt is random, and goes with the row when that is purged;
* a tile's hashes are never computed from rows again: a row that was changed contradicts its tile;
* size and root hash of the log are a row with a MAC: who adds an entry of his own, in its tiles too, has added nothing;
* a row that no unit wrote as it is gets no place: an entry tells of it. It stays, with a negative
  index: what a server's mark has seen must not go.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any, ClassVar, Final, TypeVar

import msgspec
from attrs import define, evolve, field, frozen

from chutes_proto.errors import LogError, StoreBusy
from chutes_proto.keys.vault import NONCE_SIZE, Vault
from chutes_proto.secret import Secret
from chutes_proto.store import _rows as store
from chutes_proto.store._run import Script, Unit
from chutes_proto.store._sql import columns, encode
from chutes_proto.tlog import merkle, tiles
from chutes_proto.tlog.merkle import Read
from chutes_proto.tlog.notes import Checkpoint, Note, Signer
from chutes_proto.tlog.proofs import Proof

T = TypeVar("T")

LOG: Final = "audit"
"""The name of the log in `LogStateRow`, and the kind of its key in `KeyringRow`."""
SALT_SIZE: Final = 16
SEED_SIZE: Final = 32

_COLUMNS: Final = columns(store.AuditRow)
_PLACE: Final = "idx"
"""The column that is not a member of an entry: its index is known from the tree."""
_SALT: Final = _COLUMNS.index("salt")
_IN_HEX: Final = tuple(map(_COLUMNS.index, ("platform_id", "quote_digest", "salt")))
_NAMES: Final = sorted({*_COLUMNS} - {_PLACE})
_in_order: Final = itemgetter(*map(_COLUMNS.index, _NAMES))
_Members: Final = msgspec.defstruct("_Members", [(name, Any, None) for name in _NAMES], omit_defaults=True)
"""The members of an entry in their order; those that are None are left out."""


# RFC 8785 for what there is here: names in ASCII, texts, whole numbers below 2**53.
_canonical: Final = msgspec.json.Encoder(order="deterministic").encode


def entry_text(row: store.AuditRow) -> str:
    """Return the text of a row's entry, of at most 65,535 bytes: a text member that is too long becomes its SHA-256."""
    return _entry(row).decode()


def _entry(row: store.AuditRow, salt: bytes | None = None) -> bytes:
    """The text of a row's entry; with ``salt``, of a row that has none yet."""
    values = list(encode(row))
    if salt is not None:
        values[_SALT] = salt
    # SQLite takes a value of another type in any column: such a one is in a list, as it is in no entry that we wrote.
    for at in _IN_HEX:
        value = values[at]
        if value is not None:
            values[at] = value.hex() if isinstance(value, bytes) else [value]
    if bytes in map(type, values):
        values = [[value.hex()] if isinstance(value, bytes) else value for value in values]
    text = _canonical(_Members(*_in_order(values)))
    if len(text) > tiles.LARGEST_ENTRY:
        members: dict[str, Any] = json.loads(text)
        for name in ("keys", "reason", "evidence"):
            if name in members and len(text) > tiles.LARGEST_ENTRY:
                members[f"{name}_sha256"] = hashlib.sha256(str(members.pop(name)).encode()).hexdigest()
                text = _canonical(members)
    return text


def leaf_of(row: store.AuditRow, salt: bytes | None = None) -> bytes:
    """Return the leaf of a row that is sequenced; with ``salt``, of one that is about to be."""
    return merkle.leaf_hash(_entry(row, salt))


_PURGED: Final = re.compile(r"entries below ([0-9]{1,18}): [0-9]+")


def purged_text(below: int, count: int) -> str:
    """Return the text of an audit row that tells of a purge."""
    return f"entries below {below}: {count}"


def announced_minimum(entry: bytes) -> int:
    """Return the index below which entries were purged, if this entry says so; otherwise 0."""
    if b'"event":"audit purged"' not in entry:
        return 0
    try:
        found = _PURGED.fullmatch(json.loads(entry)["keys"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return 0 if found is None else int(found[1])


ROWS_FORGED: Final = "rows forged"
_ROWS_FORGED_MEMBER: Final = f'"event":"{ROWS_FORGED}"'.encode()


# --- forks ---


@define
class VmChains:
    """The versions of VMs' heads, as the entries of a log have them, one after the other.

    Each transaction of a VM has a higher version than the one before. Where it has not, the VM has two histories:
    its rows, or the whole database, were set back, and what was committed before was kept in the log. The entries of
    one transaction have the same version, time and request.
    """

    _last: dict[tuple[str, str], tuple[int, tuple[Any, ...]]] = field(factory=dict[Any, Any])

    def follow(self, vm: tuple[str, str], version: int, of: tuple[Any, ...]) -> str:
        """Go on with an entry of the transaction ``of``; returns a fork in words, or an empty text."""
        last, last_of = self._last.get(vm, (0, of))
        if version > last:
            self._last[vm] = version, of
        if version > last or (version == last and of == last_of):
            return ""
        return f"VM {vm[0]:.128}/{vm[1]:.128} has two histories: version {version} follows version {last}"

    def follow_entry(self, entry: bytes) -> str:
        """The same for the text of an entry, which may be of no VM, or tell of forged rows."""
        if _ROWS_FORGED_MEMBER in entry:
            return "it tells of audit rows that were forged, or changed before they got a place"
        if b'"vm_version":' not in entry:
            return ""
        try:
            members: dict[str, Any] = json.loads(entry)
            vm, of = (members["hotkey"], members["vm"]), (members["at"], members.get("request_id"))
            return self.follow(vm, members["vm_version"], of)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return ""  # it was changed, which is found by its leaf


def find_forks(rows: Iterable[tuple[int, store.AuditRow]]) -> Script[tuple[str, ...]]:
    """The VMs whose next rows, which are not sequenced yet, do not follow those that are, in words."""
    of_vms = [
        ((row.vm.hotkey, row.vm.name), number, row)
        for number, row in rows
        if row.vm is not None and row.vm_version is not None
    ]
    if not of_vms:
        return ()
    vms = {name: row.vm for name, _, row in of_vms if row.vm is not None}
    known = {(vm.hotkey, vm.name): last for vm, last in (yield from store.ReadVmVersions(tuple(vms.values())))}
    chains, found = VmChains(), list[str]()
    for name, number, row in of_vms:
        version, of = row.vm_version or 0, (row.at, row.request_id)
        before = known.pop(name, None)
        if before is not None and before >= version:  # the same transaction, of which a batch had the first rows?
            wanted = store.AuditWanted(hotkey=name[0], name=name[1])
            last = yield from store.ReadAudit(number, 1, backwards=True, wanted=wanted)
            is_same = bool(last) and (last[0][1].vm_version, last[0][1].at, last[0][1].request_id) == (version, *of)
            _ = chains.follow(name, before, of if is_same and before == version else ())
        if fork := chains.follow(name, version, of):
            found.append(fork)
    return tuple(dict.fromkeys(found))


# --- sequencing ---


def _untold(_finding: str, _rows: int) -> None:
    pass


@frozen
class SequenceLog(Unit[int]):
    """Add the next audit rows to the log, as many as there is entropy for; returns their number.

    Repeat it until it returns 0: nothing was left, or another transaction sequences. ``entropy`` is `SALT_SIZE` random
    bytes for each row; ``origin`` names the log if it begins now. Only rows after the number ``beyond`` are looked at,
    so that a long sequencing does not pass by all that it has done before. Raises `LogError` if the log's last tiles
    are not those of its state: then it is damaged, and nothing is changed; see `MendTiles`. ``tell`` gets each finding,
    and how many rows it is about; again, if the transaction runs again. The rows of a VM that has two histories become
    entries like others. Those that are not authentic, and those that have a place which the log has not given, do not:
    they are set apart, and an audit row of the time ``now`` names them by their numbers.
    """

    READS_COMMITTED: ClassVar[bool] = True

    entropy: bytes
    origin: str = ""
    beyond: int = 0
    tell: Callable[[str, int], object] = _untold
    now: int = 0

    def script(self) -> Script[int]:
        state = yield from store.Read(store.LogStateRow, LOG)
        if state is None:
            if (yield from store.FindBeyond(0, 1)):
                raise LogError("the log has entries, and the row that says how many is gone")
            origin = self.origin or f"chutes-proto/{self.entropy[:8].hex()}"
            yield from store.Insert(store.LogStateRow(LOG, origin, 0, merkle.EMPTY_ROOT))
        state = yield from store.LockLog()
        if state is None:
            return 0
        size = state.size
        limit = len(self.entropy) // SALT_SIZE
        waiting = yield from store.ReadUnsequenced(limit, self.beyond)
        forged = [*(yield from store.FindBeyond(size, limit)), *(number for number, row in waiting if row.is_forged)]
        rows = [(number, row) for number, row in waiting if not row.is_forged]
        if not rows and not forged:
            return 0
        for fork in (yield from find_forks(rows)):
            _ = self.tell(fork, 1)
        salts = [self.entropy[at : at + SALT_SIZE] for at in range(0, SALT_SIZE * len(rows), SALT_SIZE)]
        edge: dict[tuple[int, int], bytes] = {}
        for place in tiles.edge(size):
            edge[place.level or 0, place.number] = yield from _tile(place.level or 0, place.number)
        leaves = [leaf_of(row, salt) for (_, row), salt in zip(rows, salts, strict=True)]
        changed = tiles.grow(size, [*edge.values()], leaves)
        require_root(state, _root(edge, size))
        if forged:
            yield from self._set_apart(tuple(forged))
        if not rows:
            return len(waiting)
        given = tuple((number, size + at, salts[at]) for at, (number, _) in enumerate(rows))
        if (yield from store.Sequence(given)) != len(given):
            raise StoreBusy("audit rows went while they were sequenced")
        for (level, number), hashes in changed.items():
            yield from store.Put(store.LogTileRow(level, number, hashes))
        size += len(given)
        yield from store.Put(evolve(state, size=size, root=_root(edge | changed, size)))
        return len(waiting)

    def _set_apart(self, forged: tuple[int, ...]) -> Script[None]:
        yield from store.SetApart(forged)
        numbers = ", ".join(map(str, forged))
        told = store.AuditRow(self.now, "operator", ROWS_FORGED, "done", "no unit wrote them as they are")
        yield from store.Insert(evolve(told, keys=f"audit rows {numbers}"))
        _ = self.tell(f"the rows {numbers} were forged, or changed before they got a place", len(forged))


@frozen
class FindNewest(Unit[int]):
    """The number of the newest row that is sequenced, 0 without one."""

    def script(self) -> Script[int]:
        state = yield from store.Read(store.LogStateRow, LOG)
        return 0 if state is None else (yield from store.FindNumber(state.size - 1))


@frozen
class Waiting:
    """The lowest number of the audit rows that are not sequenced, and the highest number of any."""

    first: int
    newest: int


@frozen
class FindWaiting(Unit[Waiting | None]):
    """The audit rows that are not sequenced now; None if there are none."""

    READS_COMMITTED: ClassVar[bool] = True

    def script(self) -> Script[Waiting | None]:
        waiting = yield from store.ReadUnsequenced(1, -(1 << 63))  # who writes the database can draw any number
        newest = () if not waiting else (yield from store.ReadAudit((1 << 63) - 1, 1, backwards=True))
        return Waiting(waiting[0][0], newest[0][0]) if newest else None


@frozen
class MendTiles(Unit[tuple[str, ...]]):
    """Make the log's last tiles, the partial ones, again: from rows, and from the full tiles below; returns which.

    So a log whose last tile was lost goes on. A tile is only replaced if the log then extends ``held``, a checkpoint
    that was kept outside the store; otherwise raises `LogError`, and nothing is changed.
    """

    READS_COMMITTED: ClassVar[bool] = True

    held: Checkpoint

    def script(self) -> Script[tuple[str, ...]]:
        state = yield from store.LockLog()
        if state is None:
            return ()
        size = state.size
        made: dict[tuple[int, int], bytes] = {}
        mended: list[str] = []
        for place in tiles.edge(size):
            level, first = place.level or 0, place.number * tiles.WIDTH
            if not level:
                rows = yield from store.ReadLog(first, place.width)
                hashes = b"".join(leaf_of(row) for at, row in enumerate(rows) if row.idx == first + at)
            else:
                below: list[bytes] = []
                for number in range(first, first + place.width):
                    full = yield from _tile(level - 1, number)
                    below.append(tiles.fold(full) if len(full) == tiles.WIDTH * merkle.HASH_SIZE else b"")
                hashes = b"".join(below)
            made[level, place.number] = hashes
            if hashes != (yield from _tile(level, place.number)):
                mended.append(str(place))
        held = self.held

        def compute(read: Read) -> tuple[bytes, tuple[bytes, ...]]:
            return merkle.root_hash(read, size), merkle.consistency_proof(read, held.size, size)

        stored: dict[tuple[int, int], bytes] = {}
        for level, number in tiles.needed(compute):
            stored[level, number] = yield from _tile(level, number)
        root, path = compute(tiles.reader(lambda level, number: made.get((level, number), stored[level, number])))
        merkle.verify_consistency(held.size, held.root, size, root, path)
        require_root(state, root)
        for (level, number), hashes in made.items():
            yield from store.Put(store.LogTileRow(level, number, hashes))
        return tuple(mended)


def require_root(state: store.LogStateRow, root: bytes) -> None:
    """Compare the root hash of the log's tiles with that of its state. Raises `LogError`."""
    if root != state.root:
        raise LogError(f"the tiles of the log's {state.size} entries are not those that the server wrote")


def _root(held: Mapping[tuple[int, int], bytes], size: int) -> bytes:
    return merkle.root_hash(tiles.reader(lambda level, number: held[level, number]), size)


def _tile(level: int, number: int) -> Script[bytes]:
    row = yield from store.ReadTile(level, number)
    return row.hashes if row is not None and type(row.hashes) is bytes else b""  # SQLite takes any type


# --- reading ---


def from_tiles(compute: Callable[[Read], T]) -> Script[T]:
    """Compute something from hashes of the tree, after reading the tiles that it needs. Raises `LogError`."""
    held: dict[tuple[int, int], bytes] = {}
    for level, number in tiles.needed(compute):
        held[level, number] = yield from _tile(level, number)
    return compute(tiles.reader(lambda level, number: held[level, number]))


def require_entries(state: store.LogStateRow, tile: int) -> Script[None]:
    """Require that the entries of a full tile are there as they were written. Raises `LogError`."""
    first = tile * tiles.WIDTH
    rows = yield from store.ReadLog(first, tiles.WIDTH)
    leaves = [leaf_of(row) for at, row in enumerate(rows, first) if row.idx == at]
    if len(leaves) != tiles.WIDTH or b"".join(leaves) != (yield from _tile(0, tile)):
        raise LogError(
            f"one of the entries {first} to {first + tiles.WIDTH - 1} was changed or removed, or their tile was"
        )
    # The proof of one leaf of a tile has all of its hashes.
    path = yield from from_tiles(lambda read: merkle.inclusion_proof(read, first, state.size))
    merkle.verify_inclusion(leaves[0], first, state.size, path, state.root)


@frozen
class ReadCheckpoint(Unit[Checkpoint | None]):
    """The present state of the log, None if it has not begun. Raises `LogError` if it does not extend ``held``."""

    held: Checkpoint | None = None

    def script(self) -> Script[Checkpoint | None]:
        state = yield from store.Read(store.LogStateRow, LOG)
        if state is None:
            if self.held is not None and self.held.size:
                raise LogError(f"the store has no log, and one of {self.held.size} entries was signed")
            return None
        size = state.size
        found = Checkpoint(state.origin, size, (yield from from_tiles(lambda read: merkle.root_hash(read, size))))
        require_root(state, found.root)
        if (held := self.held) is not None:
            if held.origin != state.origin:
                raise LogError(f"the log's origin is {state.origin}, and {held.origin} was signed")
            path = yield from from_tiles(lambda read: merkle.consistency_proof(read, held.size, size))
            merkle.verify_consistency(held.size, held.root, size, found.root, path)
        return found


@frozen
class ProveEntry(Unit[Proof]):
    """Prove the entry at ``index`` to be in the tree of ``size`` entries that ``note`` signs. Raises `LogError`."""

    index: int
    size: int
    note: Note

    def script(self) -> Script[Proof]:
        rows = yield from store.ReadLog(self.index, 1)
        if not rows or rows[0].idx != self.index:
            raise LogError(f"entry {self.index} is not there: it was purged, or removed")
        path = yield from from_tiles(lambda read: merkle.inclusion_proof(read, self.index, self.size))
        checkpoint = Checkpoint.of(self.note)
        merkle.verify_inclusion(leaf_of(rows[0]), self.index, self.size, path, checkpoint.root)
        return Proof(_entry(rows[0]), self.index, path, self.note)


# --- the key ---


@frozen
class OpenLogKey(Unit[Signer | None]):
    """The key that signs the log's checkpoints, made if there is none; None if the log has not begun.

    A key made at or before ``lost_at`` is not used further: what it has signed is in no log any more. Nor is one that
    was made after ``now``, by a clock that was ahead, if ``lost_at`` is not 0. ``entropy`` is `SEED_SIZE` and
    `NONCE_SIZE` random bytes. Raises `KeyUnavailable` and `SealBroken`.
    """

    now: int
    vault: Vault
    entropy: Secret
    lost_at: int = 0

    def script(self) -> Script[Signer | None]:
        state = yield from store.Read(store.LogStateRow, LOG)
        if state is None:
            return None
        row = max((yield from _keys()), key=lambda row: row.epoch, default=None)
        if row is not None and (not self.lost_at or self.lost_at < row.created_at <= self.now):
            return Signer(state.origin, self.vault.unwrap(row))
        entropy = self.entropy.reveal()
        seed, epoch = Secret(entropy[:SEED_SIZE]), 1 if row is None else row.epoch + 1
        kek_id, wrapped = self.vault.wrap(LOG, epoch, seed, entropy[SEED_SIZE : SEED_SIZE + NONCE_SIZE])
        yield from store.Insert(store.KeyringRow(LOG, epoch, kek_id, wrapped, self.now))
        signer = Signer(state.origin, seed)
        told = store.AuditRow(self.now, "operator", "log key made", "done", f"key {epoch} of the audit log")
        yield from store.Insert(evolve(told, keys=str(signer.verifier)))
        return signer


@frozen
class ReadLogKeys(Unit[tuple[Signer, ...]]):
    """All keys of the log, the newest last. Raises `KeyUnavailable` and `SealBroken`."""

    vault: Vault

    def script(self) -> Script[tuple[Signer, ...]]:
        state = yield from store.Read(store.LogStateRow, LOG)
        rows = sorted((yield from _keys()), key=lambda row: row.epoch)
        return () if state is None else tuple(Signer(state.origin, self.vault.unwrap(row)) for row in rows)


def _keys() -> Script[list[store.KeyringRow]]:
    return [row for row in (yield from store.Scan(store.KeyringRow)) if row.kind == LOG]
