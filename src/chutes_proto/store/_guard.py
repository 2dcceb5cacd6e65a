"""The guard of a sealed store, below the units: it checks the rows that a unit reads, and authenticates what it writes.

A store without a key of its own is not sealed, and passes the guard as it is. In a sealed one

* each row has a MAC (``_macs.py``). So a row that was forged, changed or copied to another place is not authentic;
* the rows of a VM on which a release of keys depends are a *group*, and so are those of the store as a whole. Each
  group has a *head*: an authentic list of the tags that its rows have now, and a version, which grows with each
  transaction that writes. So a row that is missing, superfluous, or older than the newest, is not authentic either;
* an audit row has the version of the head that its transaction wrote. A group that went back as a whole contradicts
  the log, as soon as the log has a later entry;
* an audit row has a MAC over all that its unit wrote, which counts until the row has its place in the log. One that is
  not authentic then does not end the unit that reads it: it gets a negative index, which says so.

The groups:

* of a VM: its claim, its live generations (`ReadLiveGenerations`), its volumes, and its boots of the last minutes. An
  older boot has no token that is alive. A settled generation and a volume that a boot was given have a MAC alone, and
  the boot says how many of these there are;
* of the store: facts, revocations and keyring. Other rows release no key: a MAC shows that they were forged, and
  nothing shows that they were deleted.

A fault is a `RowNotAuthentic`, ends the unit and concerns this VM alone; one of the store's group concerns all.

The state of the seal is a fact: twice the epoch of the key, and one more once all rows are sealed. Until then a row
without a MAC, and a VM without a head, are accepted; both are written with every change.

A new epoch begins with a new key, under which all is written from then on, the head of the store first. A MAC of an
older epoch counts as long as that head lists the key of that epoch, so nobody who has an older key alone can say that
it counts. When no row is left under it, it is deleted from the head and the keyring.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import islice
from operator import itemgetter
from typing import Any, ClassVar, Final, TypeAlias, TypeVar, cast

import msgspec
from attrs import define, evolve, field, frozen

from chutes_proto.errors import KeyUnavailable, RowNotAuthentic, SealBroken, StoreError
from chutes_proto.secret import Secret
from chutes_proto.store import rows as store
from chutes_proto.store import sql
from chutes_proto.store._macs import TAG_SIZE, UNSEALED, EpochKey, epoch_of, is_same
from chutes_proto.store.rows import StoreOp
from chutes_proto.store.sql import (
    READS_ROWS,
    Rows,
    Values,
    columns,
    decode,
    decode_rows,
    encode,
    flags,
    kind_read,
    mistyped,
    statement,
)

T_co = TypeVar("T_co", covariant=True)

ROWS_KEY: Final = "rows"
"""The kind of the key of the MACs in `KeyringRow`."""

RECENT_SECONDS: Final = 1200
"""A boot that is older than the newest one of its VM by more than this has nothing that is alive."""
RECENT_BOOTS: Final = 32
"""The most boots in a head; of older ones nothing counts any more."""

_HEADS_HELD: Final = 2000
"""How many heads one transaction has in memory before it writes them."""
_REMEMBERED: Final = 25_000
"""How many heads are remembered from one transaction to the next; one takes 0.7 kB, and 2 of a VM that boots often."""
_WRITTEN: Final = 100
"""How many heads or MACs a statement writes."""
_HEAD_WIDTH: Final = 5
"""How many values a head has as a row."""
_MISSING: Final = 100
"""How many missing generations of a volume are named: a number that somebody has written may have any size."""
_PAGE: Final = 1000

_NOT_ASKED: Final = (
    "it is not what was asked for: an index or an operator of the database was changed, or the search_path"
)

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(dict[str, dict[str, bytes]]).decode

Run = Callable[[StoreOp[Any] | None, str, Values], Rows]
"""Runs a statement, of an operation or of the guard's own, in the transaction of the unit."""

_FACTS: Final = "fact"

_liveness: Final = itemgetter(*map(columns(store.GenerationRow).index, ("state", "provisional", "retirement")))
_GENERATION: Final = {name: at for at, name in enumerate(columns(store.GenerationRow))}
_REVOCATION: Final = {name: at for at, name in enumerate(columns(store.RevocationRow))}
_VM_VERSION: Final = columns(store.AuditRow).index("vm_version")
_AUDIT_HOTKEY: Final = columns(store.AuditRow).index("hotkey")
_AUDIT_VM: Final = columns(store.AuditRow).index("vm")
_IDX: Final = columns(store.AuditRow).index("idx")
_SALT: Final = columns(store.AuditRow).index("salt")
_WRITTEN_WIDTH: Final = len(columns(store.AuditRow)) - 2
"""The number of the columns of an audit row that its unit wrote."""
_BOOT: Final = {name: at for at, name in enumerate(columns(store.BootRow))}
_VM_OF: Final[dict[type[store.Row], Callable[[Sequence[Any]], tuple[str, str]]]] = {
    kind: itemgetter(*map(columns(kind).index, ("hotkey", "vm")))
    for kind in (store.VmRow, store.VolumeRow, store.GenerationRow, store.BootRow)
}
"""Gets the VM of a row of a VM's group."""
_LISTED: Final = frozenset({*_VM_OF, store.RevocationRow, store.KeyringRow})
"""The rows that a head lists."""
_FLAGS: Final = {kind: flags(kind) for kind in store.ROWS}
_WIDTHS: Final = {kind: len(columns(kind)) for kind in store.ROWS}
_PLACE_OF: Final = {kind: {name: at for at, name in enumerate(columns(kind))} for kind in store.ROWS}


# --- keys and heads ---


@define
class SeenHeads:
    """The versions of heads of VMs that this process has seen in committed transactions, the newest of many.

    The log knows them, too, but its entries are rows that an attacker can delete. Several threads may ask for `least`
    at once; the others are called by one at a time.
    """

    _versions: dict[tuple[str, str], tuple[int, float]] = field(factory=dict[tuple[str, str], tuple[int, float]])

    def note(self, heads: Mapping[tuple[str, str], int], at: float) -> None:
        """Note the versions that a transaction wrote, or only read; ``at`` is a time after its commit."""
        for vm, version in heads.items():
            known = self._versions.pop(vm, None)
            self._versions[vm] = (version, at) if known is None or version > known[0] else known
        while len(self._versions) > _REMEMBERED:  # the one that was noted the longest ago
            del self._versions[next(iter(self._versions))]

    def least(self, vm: tuple[str, str], began_at: float) -> int:
        """The least version that a transaction may find which began at that time; 0 if none is known."""
        version, at = self._versions.get(vm, (0, 0.0))
        return version if at <= began_at else 0

    def clear(self) -> None:
        """Forget all: an operator has decided to go on with an older store."""
        self._versions.clear()


@define
class Custody:
    """The keys of one open store, and the findings about its rows.

    Several threads may ask for a session at once; `note` is called by one at a time.
    """

    name: str
    faults: Counter[str] = field(factory=Counter[str], init=False)
    """The number of faults, by table."""
    seen: SeenHeads = field(factory=SeenHeads, init=False)
    """The versions of heads of VMs that this process has seen."""
    _unwrap: Callable[[store.KeyringRow], Secret] | None = field(default=None, init=False)
    _keys: dict[int, EpochKey] = field(factory=dict[int, EpochKey], init=False)
    _has_opened: bool = field(default=False, init=False)
    _least: int = field(default=0, init=False)

    def hold(self, unwrap: Callable[[store.KeyringRow], Secret]) -> None:
        """Open keys with ``unwrap`` from now on."""
        self._unwrap = unwrap

    def require_seal(self, epoch: int) -> None:
        """Refuse the store from now on if it says that it is not sealed, or in an older epoch: this was committed."""
        self._least = max(self._least, epoch)

    def forget_keys(self) -> None:
        """Open the keys again: those of a transaction that was not committed are not the store's."""
        self._keys.clear()

    @property
    def has_keys(self) -> bool:
        """Whether keys can be opened."""
        return self._unwrap is not None

    @property
    def is_open(self) -> bool:
        """Whether one was."""
        return bool(self._keys)

    def note(self, exc: BaseException) -> None:
        """Count it, if it is a fault of a row."""
        if isinstance(exc, RowNotAuthentic):
            self.faults[exc.table] += 1

    def session(self, state: object, read: Callable[[str], Rows]) -> Session:
        """The keys for a transaction that found the store in ``state``. Raises `StoreError`.

        ``read`` runs a statement in that transaction.
        """
        epoch, is_final = seal_of(state)
        if self._least and not is_final:
            raise StoreError(
                f"store {self.name}: it says that it is not sealed, and it was: somebody changed it, or it is another"
                " one; restore a backup, or run `chutes-proto store check`"
            )
        if is_final and epoch < self._least:
            raise StoreError(
                f"store {self.name}: it says that its rows are of epoch {epoch}, and they were of epoch {self._least}:"
                " somebody changed it, or it is a backup from before a key-encryption key (KEK) was rotated; after a"
                " restore, move the mark's file away on every server, and start it again"
            )
        if not epoch:
            return Session(None, is_final=False, is_locked=False)
        key = self._keys.get(epoch)
        if key is None and self._unwrap is not None:
            try:
                key = self._keys[epoch] = self._open(epoch, self._unwrap, read)
            except KeyUnavailable as exc:
                # Without its KEK no server starts (`check_keys`), and nobody writes. One that has started would take
                # what it reads now, unchecked, for true later.
                if self._has_opened:
                    raise RowNotAuthentic("keyring", f"{ROWS_KEY}/{epoch}", str(exc)) from None
            except SealBroken as exc:
                raise RowNotAuthentic("keyring", f"{ROWS_KEY}/{epoch}", str(exc)) from None
        if key is None:
            return Session(None, is_final=is_final, is_locked=True)
        self._has_opened = True
        return Session(key, is_final=is_final, is_locked=False, older=self.older, seen=self.seen)

    def older(self, epoch: int, read: Callable[[str], Rows]) -> EpochKey:
        """The key of an older epoch, which the head of the store lists. Raises `RowNotAuthentic`."""
        key = self._keys.get(epoch)
        if key is None and self._unwrap is not None:
            try:
                key = self._keys[epoch] = self._open(epoch, self._unwrap, read)
            except KeyUnavailable as exc:
                raise RowNotAuthentic("keyring", f"{ROWS_KEY}/{epoch}", str(exc)) from None
        if key is None:
            raise RowNotAuthentic("keyring", f"{ROWS_KEY}/{epoch}", "nobody holds its key-encryption key (KEK)")
        return key

    def opened(self, kind: str, read: Callable[[str], Rows]) -> list[Secret]:
        """The keys of this kind that can be opened here, the newest first. ``read`` runs a statement."""
        found: list[Secret] = []
        unwrap = self._unwrap
        if unwrap is None:
            return found
        for row in decode_rows(store.KeyringRow, read(f"{_KEYRING} WHERE kind = '{kind}' ORDER BY epoch DESC")):
            with suppress(KeyUnavailable, SealBroken, TypeError):  # SQLite takes a value of another type
                if row.kind == kind:
                    found.append(unwrap(row))
        return found

    def check_fact(self, name: str, value: int, read: Callable[[str], Rows]) -> None:
        """Compare a fact of the store, which was read without a guard, with the head. Raises `StoreError`.

        ``read`` runs a statement in the transaction that read it.
        """
        session = self.session(read(sql.READ_VERSION)[0][2], read)
        Guard(session, lambda _op, text, _values: read(text)).expect_fact(name, value)

    def check_head(
        self, state: object, stored: Sequence[Any], decided_at: int | None, read: Callable[[str], Rows]
    ) -> None:
        """Check the store's head, and the time of the last decision on a loss, which were read together.

        ``stored`` are its version, contents and MAC, ``state`` the state of the seal. Raises `StoreError`.
        """
        guard = Guard(self.session(state, read), lambda _op, text, _values: read(text))
        _ = guard.store_head(stored)
        guard.expect_fact("loss_decided_at", decided_at)

    def _open(self, epoch: int, unwrap: Callable[[store.KeyringRow], Secret], read: Callable[[str], Rows]) -> EpochKey:
        rows = decode_rows(store.KeyringRow, read(f"{_KEYRING} WHERE kind = '{ROWS_KEY}' AND epoch = {epoch}"))
        if not rows:
            raise RowNotAuthentic("keyring", f"{ROWS_KEY}/{epoch}", "it is missing")
        # It opens as what its row says that it is, and a past holder of a KEK knows the key of an older epoch.
        if (rows[0].kind, rows[0].epoch) != (ROWS_KEY, epoch):
            raise RowNotAuthentic("keyring", f"{rows[0].kind}/{rows[0].epoch}", _NOT_ASKED)
        try:
            return EpochKey(epoch, unwrap(rows[0]))
        except SealBroken as exc:  # somebody altered it in the database
            raise RowNotAuthentic("keyring", f"{ROWS_KEY}/{epoch}", str(exc)) from None


def seal_of(state: object) -> tuple[int, bool]:
    """The epoch of the key, 0 without one, and whether all rows are sealed, as the fact ``seal`` says it.

    Any value that no release writes means that it is not sealed.
    """
    if type(state) is not int or state < 2:
        return 0, False
    return state // 2, state % 2 == 1


_KEYRING: Final = f"SELECT {', '.join(columns(store.KeyringRow))} FROM keyring"  # noqa: S608


@frozen
class Session:
    """The keys of one transaction: none of a store that is not sealed, or ``is_locked``, as nobody has its KEK here."""

    key: EpochKey | None
    is_final: bool
    is_locked: bool
    older: Callable[[int, Callable[[str], Rows]], EpochKey] | None = None
    """Opens the key of an older epoch with a statement of the transaction."""
    least_head: int = 0
    """The version of the store's head that was seen before the transaction began."""
    seen: SeenHeads | None = None
    began_at: float = math.inf
    """A time before the transaction began, by `time.monotonic`: it need not find what was committed later."""

    @property
    def sealed_in(self) -> int:
        """The epoch in which all rows are sealed, as the holder of the key knows; 0 if they are not."""
        return 0 if self.key is None or not self.is_final else self.key.epoch


@define(eq=False)
class Head:
    """The head of a group: for each table, the tag of each row by its key, and more where the rule needs it.

    A generation's tag has one byte more, whether it is live by itself, and a revocation's, whether it was undone; a
    boot's has the time of its grant before it.
    """

    version: int
    contents: dict[str, dict[str, bytes]]
    is_changed: bool = False
    stored: bytes = b""
    """The contents as they are stored, unless ``is_changed``."""

    @classmethod
    def of_stored(cls, version: int, stored: bytes) -> Head:
        """A head as it is stored."""
        return cls(version, _decode(stored), stored=stored)

    def of(self, table: str) -> dict[str, bytes]:
        """The tags of a table's rows, to read or to change."""
        return self.contents.setdefault(table, {})


Remembered: TypeAlias = dict[tuple[str, str], tuple[int, bytes]]
"""The heads of VMs as they are stored: version and contents, which take less memory than a `Head`."""


@frozen
class Boots:
    """The boots in a head: those of the last minutes before the newest one, by the boots' own times.

    When there are too many, the oldest go, and never the one that is entered: the clocks of two servers may differ, and
    many boots may have one second. Of a boot that went for that reason no token is found.
    """

    entries: dict[str, bytes]
    """The time of each, 8 bytes, and the tag of its row, in the order in which they were granted."""

    def enter(self, boot_id: str, created_at: int, tag: bytes) -> None:
        """Enter a boot, or the present state of one, and let those go that no longer count."""
        entries = self.entries
        is_there = boot_id in entries
        entries[boot_id] = _number(created_at) + tag
        if is_there or len(entries) == 1:  # no boot's time is new, so none has become too old, or too many
            return
        times = self._times()
        since = max(times.values()) - RECENT_SECONDS
        for key, at in times.items():
            if at < since:
                del entries[key]
        if len(entries) > RECENT_BOOTS:
            others = sorted((key for key in entries if key != boot_id), key=times.__getitem__)
            for key in others[: 1 - RECENT_BOOTS]:
                del entries[key]

    @property
    def is_full(self) -> bool:
        """Whether others may have gone that are not too old."""
        return len(self.entries) >= RECENT_BOOTS

    def oldest(self) -> int:
        """The time of the oldest."""
        return min(self._times().values())

    def is_expired(self, created_at: int) -> bool:
        """Whether nothing of a boot of that time is alive, as its own times say."""
        return bool(self.entries) and created_at < max(self._times().values()) - RECENT_SECONDS

    def _times(self) -> dict[str, int]:
        return {key: int.from_bytes(entry[:8], "big", signed=True) for key, entry in self.entries.items()}


def _name(vm: tuple[str, str]) -> str:
    return f"{vm[0]}/{vm[1]}"


def _check_types(kind: type[store.Row], rows: Rows) -> None:
    """Check the types of what no MAC authenticates. Raises `RowNotAuthentic`."""
    for row in rows:
        if wrong := mistyped(kind, row):
            named = ", ".join(columns(kind)[at] for at in wrong)
            raise RowNotAuthentic(kind.TABLE, _key_text(kind, row), f"no key server writes such a value of {named}")


def _key_text(kind: type[store.Row], values: Sequence[Any]) -> str:
    key = values[: len(kind.KEY)]
    return "/".join(part.hex() if isinstance(part, bytes) else str(part) for part in key)


_LIVE: Final = {True: b"\1", False: b"\0"}
"""The last byte of a generation's tag in a head."""


def _is_live(values: Sequence[Any]) -> bool:
    """Whether a generation is in its VM's head though it is not the newest of its volume."""
    state, is_provisional, retirement = _liveness(values)
    return state in ("active", "candidate") or bool(is_provisional) or retirement == "prune"


_OfVms = dict[tuple[str, str], Rows]
"""The stored rows of one kind of each VM that has any."""
_Grouped = dict[type[store.Row], _OfVms]

_ALWAYS: Final = -(2**63)


def _pair(vm: store.Vm | None) -> tuple[str, str]:
    """A VM's columns; those of None come before any."""
    return ("", "") if vm is None else (vm.hotkey, vm.name)


def _last(rows: Rows) -> store.Vm:
    return store.Vm(rows[-1][0], rows[-1][1])


def _grouped(kind: type[store.Row], rows: Rows) -> _OfVms:
    found: dict[tuple[str, str], list[Sequence[Any]]] = {}
    for row in rows:
        found.setdefault(_VM_OF[kind](row), []).append(row)
    return dict(found)


def _numbers(rows: Rows) -> dict[str, set[int]]:
    """The numbers of the generations of each volume; one of another type has no MAC that is right."""
    found: dict[str, set[int]] = {}
    for row in rows:
        if type(row[3]) is int:
            found.setdefault(row[2], set()).add(row[3])
    return found


def _in_head(rows: Rows) -> Rows:
    """Those generations of all of a VM that are in its head."""
    newest = {volume: max(numbers) for volume, numbers in _numbers(rows).items()}
    return [row for row in rows if row[3] == newest.get(row[2]) or _is_live(row)]


def _generation_tags(tagged: Iterable[tuple[Sequence[Any], bytes]]) -> dict[str, bytes]:
    """The tags of the live ones of all these generations, as a head has them."""
    rows = list(tagged)
    newest: dict[str, int] = {}
    for values, _ in rows:
        newest[values[2]] = max(values[3], newest.get(values[2], 0))
    found: dict[str, bytes] = {}
    for values, tag in rows:
        live = _is_live(values)
        if live or values[3] == newest[values[2]]:
            found[f"{values[2]}/{values[3]}"] = tag + _LIVE[live]
    return found


# --- the guard ---


class Guard:
    """The guard of one run of one unit; `finish` writes the heads, after the script has ended.

    ``remembered`` are heads that nobody else has changed since, as a store knows them. One that is used is taken out,
    and is remembered again only if the unit ends well.
    """

    def __init__(self, session: Session, run: Run, remembered: Remembered | None = None) -> None:
        self._key = session.key
        self._is_final = session.is_final
        self._is_locked = session.is_locked
        self._older = session.older
        self._least_head = session.least_head
        self._seen, self._began_at = session.seen, session.began_at
        self._run = run
        self._heads: dict[tuple[str, str], Head | None] = {}
        self._remembered: Remembered = {} if remembered is None else remembered
        self._store: Head | None = None
        self._stored: Sequence[Any] | None = None  # the row of that head, if it was read with the times
        self._given: dict[str, int | None] = {}
        self.changed_state: bool = False
        """Whether the unit has changed the state of the seal."""

    @property
    def state(self) -> tuple[bool, bool]:
        """Whether rows get MACs, and whether all have one."""
        return self._key is not None or self._is_locked, self._is_final

    def perform(self, op: StoreOp[Any]) -> Any:
        """Carry out an operation. Raises `RowNotAuthentic`."""
        if self._key is None:
            if isinstance(op, _OfSeal):
                return op.carry_out(self)
            if self._is_locked and (type(op) in _KEYED or type(op) in _CHANGES):
                raise self._locked()
            rows = self._run(op, *statement(op, self._seal if self._is_locked else sql.not_sealed))
            if (kind := kind_read(op)) is not None:
                _check_types(kind, rows)
            return decode(op, rows)
        if len(self._heads) > _HEADS_HELD:
            self.finish()
            self._heads.clear()
        way: _Way = _WAYS.get(type(op), Guard.carry_out)
        return way(self, op)

    def carry_out(self, op: StoreOp[Any]) -> Any:
        if isinstance(op, _OfSeal):
            return op.carry_out(self)
        return self.write(op)

    def write(self, op: StoreOp[Any]) -> Any:
        return decode(op, self._run(op, *statement(op, self._seal)))

    def insert(self, op: store.Insert) -> None:
        if type(op.row) is store.AuditRow:
            text, values = statement(op)
            _ = self._run(op, text, self.audited(op.row, values))
        else:
            _ = self._run(op, *statement(op, self._seal))

    def change(self, op: StoreOp[Any]) -> Any:
        changed: StoreOp[Any] | tuple[RowNotAuthentic, ...] | None = _CHANGES[type(op)](self, op)
        return self.write(changed) if isinstance(changed, StoreOp) else changed

    def read_rows(self, op: StoreOp[Any]) -> Any:
        text, values = statement(op)
        rows, kind = self._run(op, text, values), kind_read(op)
        if kind is not None:
            tags = self.check(kind, rows)
            _check_asked(kind, _asked_by(op, kind), values, rows)
            belongs = _GROUPS.get((type(op), kind))
            if belongs is not None:
                rows = belongs(self, op, rows, tags)
        return decode(op, rows)

    def read_otherwise_sealed(self, op: store.ReadOtherwiseSealed) -> Any:
        return decode(op, self._openable(self._run(op, *statement(op))))

    def read_audit(self, op: StoreOp[Any]) -> Any:
        rows = self._run(op, *statement(op))
        if self._key is not None:
            macs = self._key.of_table("audit", _WRITTEN_WIDTH)
            waiting = [(*row[1 : 1 + _IDX], *row[2 + _SALT :]) for row in rows if row[1 + _IDX] is None]
            if None in macs.tags(waiting, ()):
                rows = [self.judged(row) for row in rows]
        return decode(op, rows)

    def read_unsequenced(self, op: store.ReadUnsequenced) -> Any:
        """Read the rows that the log is about to know.

        A remembered head that is older than one of its VM's was set back before it was read; the next unit reads it
        again, and compares it with the log.
        """
        found: tuple[tuple[int, store.AuditRow], ...] = self.read_audit(op)
        for _, row in found:
            if self._remembered and row.vm is not None and row.vm_version is not None:
                vm = row.vm.hotkey, row.vm.name
                head = self._remembered.get(vm)
                if head is not None and row.vm_version > head[0]:
                    del self._remembered[vm]
        return found

    def read_facts(self, op: StoreOp[Any]) -> Any:
        rows = self._run(op, *statement(op))
        _FACT_READS[type(op)](self, rows)
        return decode(op, rows)

    def finish(self) -> None:
        """Write the heads that have changed."""
        key = self._key
        if key is None:
            return
        values: list[Any] = []
        for vm, head in self._heads.items():
            if head is not None and head.is_changed:
                head.version += 1
                head.is_changed = False
                head.stored = _encode(head.contents)
                values += (*vm, head.version, head.stored, key.mac("head", *vm, head.version, head.stored))
        for first in range(0, len(values), _WRITTEN * _HEAD_WIDTH):
            some = values[first : first + _WRITTEN * _HEAD_WIDTH]
            _ = self._run(None, sql.put_heads(len(some) // _HEAD_WIDTH), tuple(some))
        if (of_store := self._store) is not None and of_store.is_changed:
            of_store.version += 1
            contents = _encode(of_store.contents)
            mac = key.mac("store head", of_store.version, contents)
            _ = self._run(None, sql.PUT_STORE_HEAD, (of_store.version, contents, mac))
            of_store.is_changed = False

    def remember(self) -> None:
        """Remember the heads that were written, or only read, after `finish`: the unit is not undone by itself."""
        for vm, head in self._heads.items():
            if head is not None and head.version:
                self._remembered[vm] = head.version, head.stored
        while len(self._remembered) > _REMEMBERED:  # the one that was used the longest ago
            del self._remembered[next(iter(self._remembered))]

    @property
    def versions(self) -> dict[tuple[str, str], int]:
        """The versions of the heads of VMs that were written, or only read, after `finish`."""
        return {vm: head.version for vm, head in self._heads.items() if head is not None and head.version}

    # --- rows ---

    def check(self, kind: type[store.Row], rows: Rows) -> list[bytes]:
        """The tags of rows, each once, that have authentic MACs; b"" for one without, while these are accepted."""
        if self._key is None:
            return []
        if len(rows) > 1:
            _check_once(kind, rows)
        tags = self._key.of_table(kind.TABLE, _WIDTHS[kind]).tags(rows, _FLAGS[kind])
        if None in tags:
            return [tag or self._otherwise_tagged(kind, row) for tag, row in zip(tags, rows, strict=True)]
        return cast("list[bytes]", tags)

    def _otherwise_tagged(self, kind: type[store.Row], row: Sequence[Any]) -> bytes:
        """The tag of a row whose MAC is not of the newest epoch, as `check` returns it. Raises `RowNotAuthentic`."""
        mac = row[-1]
        if mac is None and not self._is_final:
            _check_types(kind, (row,))
            return b""
        older = self._older_key(mac)
        tag = None if older is None else older.of_table(kind.TABLE, _WIDTHS[kind]).tags((row,), _FLAGS[kind])[0]
        if tag is None:
            why = "it has no MAC" if mac is None else "its MAC is not that of its columns and place"
            raise RowNotAuthentic(kind.TABLE, _key_text(kind, row), why)
        return tag

    def _check_generation(self, row: Sequence[Any]) -> None:
        """Check a generation that is read without the others of its VM, and is about to be written.

        Its head lists it as it is, or, as a settled one, not at all: otherwise the row that is written would be listed
        in place of the newest one. Raises `RowNotAuthentic`.
        """
        (tag,) = self.check(store.GenerationRow, (row,))
        head = self.head((row[0], row[1]))
        if head is not None:
            live = _is_live(row)
            listed = head.of("generation").get(f"{row[2]}/{row[3]}")
            if live or listed is not None:
                self.expect("generation", _key_text(store.GenerationRow, row), tag + bytes((live,)), listed)

    def _openable(self, rows: Rows) -> Rows:
        """Generations to be rewrapped: one that is not authentic does not open, and stops no other one."""
        found: list[Sequence[Any]] = []
        with suppress(RowNotAuthentic):  # the head that is not is read again with its row
            self.fetch_heads((row[0], row[1]) for row in rows)
        for row in rows:
            try:
                self._check_generation(row)
                found.append(row)
            except RowNotAuthentic:
                emptied = list(row)
                for name in ("sealed", "wrapped_key"):
                    emptied[_GENERATION[name]] = None
                found.append(emptied)
        return found

    def _seal(self, kind: type[store.Row], values: Values) -> bytes:
        """The MAC of a row that is written, and its place in the head of its group."""
        if self._key is None:
            raise self._locked()
        mac = self._key.of_row(kind.TABLE, _written(values) if kind is store.AuditRow else values)
        if kind in _LISTED:
            self.enter(kind, values, mac[-TAG_SIZE:])
        return mac

    def enter(self, kind: type[store.Row], values: Values, tag: bytes) -> None:
        """Enter a row that is the newest of its key, and that a head lists, into that head."""
        enter = _ENTRIES.get(kind)
        head = self.store_head() if enter is None else self.head(_VM_OF[kind](values))
        if head is None:
            return
        if enter is None:
            head.of(kind.TABLE)[_key_text(kind, values)] = tag + _is_past(kind, values)
        else:
            enter(head, values, tag)
        head.is_changed = True

    def _locked(self) -> StoreError:
        return StoreError(
            "the store is sealed, and only its KEK opens the key of its rows; name the server's configuration with"
            " --config, and that KEK in it"
        )

    def _older_key(self, mac: object) -> EpochKey | None:
        """The key that a MAC of an older epoch is under; None for any other, or if that epoch no longer counts."""
        epoch = epoch_of(mac)
        if epoch is None or self._key is None or epoch >= self._key.epoch or self._older is None:
            return None
        head = self.store_head()
        if head is None or _rows_key(epoch) not in head.of("keyring"):
            return None
        return self._older(epoch, lambda text: self._run(None, text, ()))

    # --- heads ---

    def _opened(self, vm: tuple[str, str], stored: Sequence[Any]) -> Head | None:
        """A VM's head as it is stored, after the version that the log knows; None where there is neither.

        Raises `RowNotAuthentic`.
        """
        known, version, contents, mac = stored
        least = 0 if self._seen is None else self._seen.least(vm, self._began_at)
        if version is None:
            if known is not None:
                raise RowNotAuthentic("head", _name(vm), _told_missing(known))
            if least:
                raise RowNotAuthentic("head", _name(vm), f"it is missing, and version {least} was seen")
            return None
        key = self._key
        is_right = key is not None and is_same(mac, key.mac("head", *vm, version, contents))
        if not is_right and (older := self._older_key(mac)) is not None:
            is_right = is_same(mac, older.mac("head", *vm, version, contents))
        if not is_right:
            raise RowNotAuthentic("head", _name(vm), "its MAC is not that of its columns and place")
        if known is not None and not (type(known) is int and known <= version):
            raise RowNotAuthentic("head", _name(vm), f"it has version {version}, and the log has version {known}")
        if version < least:
            raise RowNotAuthentic("head", _name(vm), f"it has version {version}, and version {least} was seen")
        return Head.of_stored(version, contents)

    def head(self, vm: tuple[str, str]) -> Head | None:
        """The head of a VM's group, a new one for a VM without rows; None for one that is not sealed yet."""
        heads = self._heads
        if vm in heads:
            return heads[vm]
        if self._key is None:
            return None
        known = self._remembered.pop(vm, None)
        if known is None:
            (stored,) = self._run(None, sql.READ_HEAD, (*vm, *vm))
            found = self._made(vm, self._opened(vm, stored))
        else:
            found = Head.of_stored(*known)
        heads[vm] = found
        return found

    def _hold(self, vm: tuple[str, str], head: Head | None) -> Head | None:
        _ = self._remembered.pop(vm, None)
        self._heads[vm] = head
        return head

    def fetch_heads(self, vms: Iterable[tuple[str, str]]) -> None:
        """Read the heads of VMs at once that are about to be asked for one by one."""
        unread = sorted({*vms} - self._heads.keys(), key=str)
        if self._key is not None and unread:
            for hotkey, name, *stored in self._run(None, *sql.read_heads(unread)):
                vm = (hotkey, name)
                _ = self._hold(vm, self._made(vm, self._opened(vm, stored)))

    def _made(self, vm: tuple[str, str], found: Head | None) -> Head | None:
        """The head, a new one for a VM without rows, and for every VM once all are sealed."""
        if found is None and (self._is_final or not self._run(None, sql.IS_KNOWN, vm * 4)[0][0]):
            return Head(0, {})
        return found

    def store_head(self, stored: Any = None) -> Head | None:
        """The head of the store's own group; None while the store is not sealed. ``stored`` is its row, if known."""
        if self._store is None and self._key is not None and self._is_final:
            stored = stored or self._stored
            if stored is None:
                rows = self._run(None, sql.READ_STORE_HEAD, ())
                stored = rows[0] if rows else (None, None, None)
            version, contents, mac = stored
            if version is None:
                raise RowNotAuthentic("store_head", "store", "it is missing")
            if not is_same(mac, self._key.mac("store head", version, contents)):
                raise RowNotAuthentic("store_head", "store", "its MAC is not that of its columns and place")
            self._require_seen(version)
            self._store = Head(version, _decode(contents))
        return self._store

    def _require_seen(self, version: int) -> None:
        """Refuse a head of the store that is older than one which was seen: the mark may be shown another one."""
        if version < self._least_head:
            why = f"it has version {version}, and version {self._least_head} was seen"
            raise RowNotAuthentic("store_head", "store", why)

    def expect(self, table: str, key: str, found: bytes | None, expected: bytes | None) -> None:
        """Compare a row's tag with its head's. Raises `RowNotAuthentic`."""
        if found == expected:
            return
        if found is None:
            why = "it is missing"
        elif expected is None:
            why = "it was not there when the group was written last"
        else:
            why = "it is not the row that was written last"
        raise RowNotAuthentic(table, key, why)

    def expect_all(
        self, table: str, found: dict[str, bytes], expected: dict[str, bytes], vm: tuple[str, str] | None = None
    ) -> None:
        """Compare all rows of a table, or of a VM there, with their head. Raises for the first that differs."""
        if found == expected:
            return
        prefix = "" if vm is None else f"{_name(vm)}/"
        for key in sorted(found.keys() | expected.keys()):
            self.expect(table, f"{prefix}{key}", found.get(key), expected.get(key))

    def fact(self, name: str, value: int) -> None:
        """Note a fact that is about to be written."""
        head = self.store_head()
        if head is not None:
            head.of(_FACTS)[name] = _number(value)
            head.is_changed = True

    def expect_fact(self, name: str, value: int | None) -> None:
        """Compare a fact with the head. Raises `RowNotAuthentic`."""
        head = self.store_head()
        if head is not None:
            found = None if value is None else _number(value)
            self.expect(_FACTS, name, found, head.of(_FACTS).get(name))

    # --- what operations do to groups ---

    def audited(self, row: store.AuditRow, values: Values) -> Values:
        """The values of an audit row with the version that the head of its VM will have, and its MAC."""
        head = None if row.vm is None else self._heads.get((row.vm.hotkey, row.vm.name))
        written = values[:-1]
        # A refusal alone changes nothing of the VM, and a stranger may cause it.
        if head is not None and (row.decision != "refused" or head.is_changed):
            head.is_changed = True
            written = (*values[:_VM_VERSION], head.version + 1, *values[_VM_VERSION + 1 : -1])
        return (*written, self._seal(store.AuditRow, written))

    def judged(self, row: Sequence[Any]) -> Sequence[Any]:
        """An audit row after its number, with a negative index if it is not sequenced and not authentic."""
        if row[1 + _IDX] is not None or not self._fault_of(row):
            return row
        return (*row[: 1 + _IDX], -1, *row[2 + _IDX :])

    def _fault_of(self, row: Sequence[Any]) -> str:
        """Why an audit row after its number, which has no place yet, is not authentic; or an empty text."""
        mac = row[-1]
        if mac is None:
            return "it has no MAC" if self._is_final else ""
        written = _written(row[1:-1])
        is_right = self._key is not None and is_same(mac, self._key.of_row("audit", written))
        if not is_right and (older := self._older_key(mac)) is not None:
            is_right = is_same(mac, older.of_row("audit", written))
        return "" if is_right else "its MAC is not that of its columns"

    def copied(self, op: store.InsertAll) -> store.InsertAll:
        kind = type(op.rows[0])
        if kind in _ENTRIES:
            self.fetch_heads(_VM_OF[kind](encode(row)) for row in op.rows)
        versions: dict[tuple[str, str], int] = {}
        for row in op.rows:
            if isinstance(row, store.AuditRow) and row.vm is not None and row.vm_version is not None:
                vm = (row.vm.hotkey, row.vm.name)
                versions[vm] = max(row.vm_version, versions.get(vm, 0))
        self.fetch_heads(versions)
        for vm, version in versions.items():
            head = self.head(vm)
            if head is not None and head.version < version:
                head.version, head.is_changed = version, True
        return op

    def rewrapped(self, op: store.RewrapGenerations) -> store.RewrapGenerations:
        self.fetch_heads((row.vm.hotkey, row.vm.name) for row in op.rows)
        return op

    def voided(self, op: store.VoidTokens) -> None:
        """Void all boots; one that is hidden meanwhile would have a live token when it is back."""
        vm = (op.vm.hotkey, op.vm.name)
        rows = self._run(None, sql.READ_UNVOIDED, vm)
        _ = self.check(store.BootRow, rows)
        rows = (*self.listed_boots(vm), *rows)
        for row in {row.boot_id: row for row in decode_rows(store.BootRow, rows) if row.voided_at is None}.values():
            self.perform(store.Put(evolve(row, voided_at=op.at)))

    def doubted(self, _op: store.DoubtCandidates) -> tuple[RowNotAuthentic, ...]:
        """A candidate that is not authentic stops its own VM, and no other one."""
        faults: list[RowNotAuthentic] = []
        after: Sequence[Any] = ("", "", "")
        while rows := self._run(None, sql.READ_CANDIDATES, (*after, _PAGE)):
            after = rows[-1][:3]
            with suppress(RowNotAuthentic):  # the head that is not is read again with its row
                self.fetch_heads((row[0], row[1]) for row in rows)
            for row in rows:
                try:
                    self._check_generation(row)
                    (known,) = decode_rows(store.GenerationRow, (row,))
                    self.perform(store.UpdateGeneration(evolve(known, provisional=True)))
                except RowNotAuthentic as exc:
                    faults.append(exc)
        return tuple(faults)

    def forgot(self, op: store.Forget) -> store.Forget:
        head = self.head((op.vm.hotkey, op.vm.name))
        if head is not None:
            _ = head.contents.pop(op.kind.TABLE, None)
            head.is_changed = True
        return op

    def deleted(self, op: store.Delete) -> store.Delete:
        if op.kind is store.BootRow:
            for boot_id, *vm in self._run(None, sql.vms_of(len(op.keys)), op.keys):
                head = self.head((vm[0], vm[1]))
                if head is not None and head.of("boot").pop(boot_id, None) is not None:
                    head.is_changed = True
        return op

    def set_fact(self, op: Any) -> Any:
        self.fact(_FACT_WRITES[type(op)], op.at if isinstance(op, store.DecideLoss) else op.to)
        return op

    # --- complete reads ---

    def claim(self, op: store.Read[store.VmRow], rows: Rows, tags: list[bytes]) -> Rows:
        if isinstance(op.key, store.Vm):
            self.compare_claim((op.key.hotkey, op.key.name), rows, tags)
        return rows

    def compare_claim(self, vm: tuple[str, str], _rows: Rows, tags: list[bytes]) -> None:
        head = self.head(vm)
        if head is not None:
            self.expect("vm", _name(vm), tags[0] if tags else None, head.of("vm").get(""))

    def generations(self, op: Any, rows: Rows, tags: list[bytes]) -> Rows:
        owner = op.vm if isinstance(op, store.ReadLiveGenerations) else op.owner
        self.compare_generations((owner.hotkey, owner.name), rows, tags)
        return rows

    def compare_generations(self, vm: tuple[str, str], rows: Rows, tags: list[bytes]) -> None:
        head = self.head(vm)
        if head is not None:
            listed = head.of("generation")
            found = {f"{row[2]}/{row[3]}": tag for row, tag in zip(rows, tags, strict=True)}
            if found != {key: entry[:TAG_SIZE] for key, entry in listed.items()}:  # a settled one may be read besides
                self.expect_all("generation", _generation_tags(zip(rows, tags, strict=True)), listed, vm)

    def volumes(self, op: store.ReadAll[store.VolumeRow], rows: Rows, tags: list[bytes]) -> Rows:
        if isinstance(op.owner, store.Vm):
            self.compare_volumes((op.owner.hotkey, op.owner.name), rows, tags)
        return rows

    def compare_volumes(self, vm: tuple[str, str], rows: Rows, tags: list[bytes]) -> None:
        head = self.head(vm)
        if head is not None:
            found = {values[2]: tag for values, tag in zip(rows, tags, strict=True)}
            self.expect_all("volume", found, head.of("volume"), vm)

    def boots(self, op: Any, rows: Rows, tags: list[bytes]) -> Rows:
        """Boots that are as they were written last; the token of one that too many others have followed is not found.

        By its id such a boot is found, as its VM and platform never change: a server that was registered from it stays
        bound to these.
        """
        is_by_id = isinstance(op, store.Read) and not op.by
        return [row for row, tag in zip(rows, tags, strict=True) if self._is_newest(row, tag, is_by_id=is_by_id)]

    def last_boot(self, op: store.FindLastBoot, rows: Rows, tags: list[bytes]) -> Rows:
        """The newest boot; all those of the head are compared: where one was deleted, its token is not just unknown."""
        at = _BOOT["created_at"]
        newest = max(self.listed_boots((op.vm.hotkey, op.vm.name)), key=itemgetter(at), default=None)
        if newest is not None and not (rows and rows[0][at] >= newest[at]):
            raise RowNotAuthentic("boot", newest[0], "it is the newest one, and was not given as such")
        return self.boots(op, rows, tags)

    def listed_boots(self, vm: tuple[str, str]) -> Rows:
        """The boots since the oldest one in the head of their VM, after all were compared with it."""
        head = self.head(vm)
        if head is None or not (entries := head.of("boot")):
            return ()
        stored = self._run(None, sql.READ_BOOTS_SINCE, (*vm, Boots(entries).oldest()))
        self.compare_boots(vm, stored, self.check(store.BootRow, stored))
        return stored

    def compare_boots(self, vm: tuple[str, str], rows: Rows, tags: list[bytes]) -> None:
        """Compare all boots since the oldest one in the head; where it has none, these are all that are stored."""
        head = self.head(vm)
        if head is not None:
            boots = Boots(head.of("boot"))
            found: dict[str, bytes] = {}
            for row, tag in zip(rows, tags, strict=True):
                if row[0] in boots.entries or not boots.is_full:
                    found[row[0]] = _number(row[_BOOT["created_at"]]) + tag
            self.expect_all("boot", found, boots.entries)

    def _is_newest(self, row: Sequence[Any], tag: bytes, *, is_by_id: bool) -> bool:
        head = self.head(_VM_OF[store.BootRow](row))
        self._given[row[0]] = row[_BOOT["given"]]
        if head is None:
            return True
        boots, created_at = Boots(head.of("boot")), row[_BOOT["created_at"]]
        entry = boots.entries.get(row[0])
        if entry is None:
            if is_by_id or boots.is_expired(created_at):
                return True
            if boots.is_full:
                return False
        self.expect("boot", row[0], _number(created_at) + tag, entry)
        return True

    def boot_volumes(self, op: store.ReadBootVolumes, rows: Rows, _tags: list[bytes]) -> Rows:
        given = self._given.get(op.boot_id)
        if given is not None and given != len(rows):
            raise RowNotAuthentic("boot_volume", op.boot_id, _told_given(given, len(rows)))
        return rows

    def whole_table(self, op: Any, rows: Rows, tags: list[bytes]) -> Rows:
        kind = kind_read(op) or store.KeyringRow
        head = self.store_head()
        if head is not None:
            pairs = zip(rows, tags, strict=True)
            found = {_key_text(kind, values): tag + _is_past(kind, values) for values, tag in pairs}
            expected = head.of(kind.TABLE)
            if isinstance(op, store.ReadRevoked):
                expected = {key: tag for key, tag in expected.items() if not tag[-1]}
            self.expect_all(kind.TABLE, found, expected)
        return rows

    def revocation(self, op: store.ReadRevocation, rows: Rows, tags: list[bytes]) -> Rows:
        head = self.store_head()
        if head is not None:
            key = f"{op.kind}/{op.subject}"
            found = tags[0] + _is_past(store.RevocationRow, rows[0]) if tags else None
            self.expect("revocation", key, found, head.of("revocation").get(key))
        return rows

    def times(self, rows: Rows) -> None:
        if not rows or self._key is None or not self._is_final:
            return
        horizon, _, version, *stored = rows[0]
        if self._store is None:
            _check_times(self._key, horizon, version, tuple(stored))
            self._require_seen(stored[0])
            self._stored = stored
        else:  # the unit may have changed it
            self.expect_fact("nonce_horizon", horizon)
            self.expect_fact("revocations", version)

    def loss(self, rows: Rows) -> None:
        self.expect_fact("loss_decided_at", rows[0][0] if rows else None)

    # --- the seal ---

    def begin(self, row: store.KeyringRow, random: Secret) -> None:
        """Write MACs and heads from now on; servers of older releases end."""
        _ = self._run(None, sql.END_COMPATIBILITY, ())
        _ = self._run(None, sql.SET_SEAL, (2 * row.epoch,))
        self.changed_state = True
        self._key, self._is_locked = EpochKey(row.epoch, random), False
        self.perform(store.Insert(row))

    def end(self) -> None:
        """Accept no row without a MAC from now on, and no VM without a head."""
        facts = {name: _number(value) for name, value in self._run(None, sql.READ_FACTS, ())}
        self._store = Head(0, {_FACTS: facts}, is_changed=True)
        for kind in (store.RevocationRow, store.KeyringRow):
            rows = self._run(None, *statement(store.Scan(kind)))
            for values, tag in zip(rows, self.check(kind, rows), strict=True):
                self.enter(kind, tuple(values[:-1]), tag)
        epoch = 0 if self._key is None else self._key.epoch
        _ = self._run(None, sql.SET_SEAL, (2 * epoch + 1,))
        self.changed_state = self._is_final = True

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs of which MACs count, the newest first; none of a store that is not sealed."""
        head = self.store_head()
        listed = {} if head is None else head.of("keyring")
        keys = [key.partition("/") for key in listed]
        return tuple(sorted((int(epoch) for kind, _, epoch in keys if kind == ROWS_KEY), reverse=True))

    def begin_epoch(self, row: store.KeyringRow, random: Secret) -> None:
        """Write all MACs in a new epoch from now on; those of the present one count until `end_epoch`."""
        head = self.store_head()
        if head is None or self._key is None or self.epochs != (row.epoch - 1,):
            raise self._locked()
        _ = self._run(None, sql.SET_SEAL, (2 * row.epoch + 1,))
        self.changed_state = True
        self._key = EpochKey(row.epoch, random)
        self.perform(store.Insert(row))  # the head is written under the new key

    def renew(
        self, kind: type[store.Row], after: store.Row | None, limit: int
    ) -> tuple[tuple[RowNotAuthentic, ...], store.Row | None]:
        """Give the next rows of a kind a MAC of the newest epoch that have one of an older one.

        Returns those that are not authentic and were left, and the last that was looked at. A head that lists
        a row as it was lists it as it is now; a row that it does not list as it was stays a fault.
        """
        if self._key is None:
            raise self._locked()
        rows = self._run(None, *statement(store.ReadPage(kind, after, limit)))
        found = decode_rows(kind, rows)
        stale = [row for row in rows if epoch_of(row[-1]) != self._key.epoch]
        if kind in _ENTRIES:
            with suppress(RowNotAuthentic):  # it is read again, and named, with its rows
                self.fetch_heads(_VM_OF[kind](row) for row in stale)
        faults: list[RowNotAuthentic] = []
        macs: list[Values] = []
        for row in stale:
            try:
                (old,) = self.check(kind, (row,))
                head = self.head(_VM_OF[kind](row)) if kind in _ENTRIES else self._head_of_store(kind)
            except RowNotAuthentic as exc:
                faults.append(exc)
                continue
            values = encode(decode_rows(kind, (row,))[0])
            mac = self._key.of_row(kind.TABLE, values)
            macs.append((*values[: len(kind.KEY)], mac))
            if head is not None:
                place = _PLACES.get(kind, partial(_key_text, kind))(values)
                listed = head.of(kind.TABLE).get(place, b"")
                if old in listed:
                    head.of(kind.TABLE)[place] = listed.replace(old, mac[-TAG_SIZE:])
                    head.is_changed = True
        for first in range(0, len(macs), _WRITTEN):
            _ = self._run(None, *sql.set_macs(kind, macs[first : first + _WRITTEN]))
        return tuple(faults), found[-1] if len(found) == limit else None

    def _head_of_store(self, kind: type[store.Row]) -> Head | None:
        return self.store_head() if kind in (store.RevocationRow, store.KeyringRow) else None

    def renew_heads(self, after: store.Vm | None, limit: int) -> tuple[tuple[RowNotAuthentic, ...], store.Vm | None]:
        """Give the heads of the next VMs a MAC of the newest epoch; returns as `renew` does."""
        if self._key is None:
            raise self._locked()
        stored = self._run(None, *sql.next_heads(_pair(after), limit))
        faults: list[RowNotAuthentic] = []
        for hotkey, name, *head_stored in stored:
            if head_stored[-1] is not None and epoch_of(head_stored[-1]) == self._key.epoch:
                continue
            vm = (hotkey, name)
            try:
                head = self._opened(vm, head_stored)
            except RowNotAuthentic as exc:
                faults.append(exc)
                continue
            if head is not None:
                head.is_changed = True
                _ = self._hold(vm, head)
        return tuple(faults), _last(stored) if len(stored) == limit else None

    def end_epoch(self) -> int:
        """Let no MAC of an older epoch count from now on, and delete their keys; returns the epoch that counts."""
        newest, *older = self.epochs
        head = self.store_head()
        for epoch in older:
            _ = self._run(None, sql.DELETE_ROWS_KEY, (epoch,))
            if head is not None:
                del head.of("keyring")[_rows_key(epoch)]
                head.is_changed = True
        return newest

    def adopt(self, kind: type[store.Row], after: store.Row | None, limit: int) -> tuple[int, store.Row | None]:
        """Give the next rows of a kind a MAC that have none; returns how many, and the last that was looked at."""
        if self._key is None:
            raise StoreError("the store has no key for its rows yet")
        rows = self._run(None, *statement(store.ReadPage(kind, after, limit)))
        found = decode_rows(kind, rows)
        _ = self.check(kind, rows)
        bare = [encode(row) for row, values in zip(found, rows, strict=True) if values[-1] is None]
        for first in range(0, len(bare), _WRITTEN):
            some = [
                (*each[: len(kind.KEY)], self._key.of_row(kind.TABLE, each)) for each in bare[first : first + _WRITTEN]
            ]
            _ = self._run(None, *sql.set_macs(kind, some))
        return len(bare), found[-1] if len(found) == limit else None

    def adopt_audit(self, after: int, limit: int) -> tuple[int, int | None]:
        """Give the next audit rows without a place a MAC of this epoch; returns how many, and the last number.

        One that is not authentic is left as it is.
        """
        if self._key is None:
            raise StoreError("the store has no key for its rows yet")
        rows = self._run(None, sql.READ_QUEUE, (after, limit))
        stale = [row for row in rows if epoch_of(row[-1]) != self._key.epoch and not self._fault_of(row)]
        bare = [(row[0], self._key.of_row("audit", _written(row[1:-1]))) for row in stale]
        for first in range(0, len(bare), _WRITTEN):
            _ = self._run(None, *sql.set_audit_macs(bare[first : first + _WRITTEN]))
        return len(bare), rows[-1][0] if len(rows) == limit else None

    def inspect_audit(self, after: int, limit: int) -> tuple[tuple[RowNotAuthentic, ...], int | None]:
        """The faults of the next audit rows without a place, and the last number."""
        rows = self._run(None, sql.READ_QUEUE, (after, limit))
        faults = [RowNotAuthentic("audit", str(row[0]), why) for row in rows if (why := self._fault_of(row))]
        faults += self._set_back([row for row in rows if row[-1] is not None and not self._fault_of(row)])
        last = rows[-1][0] if len(rows) == limit else None
        if last is None:
            why = "it has a place that the log has not given yet"
            faults += [RowNotAuthentic("audit", str(row[0]), why) for row in self._run(None, sql.READ_BEYOND, ())]
        return tuple(faults), last

    def _set_back(self, waiting: Rows) -> list[RowNotAuthentic]:
        """The heads of VMs that are older than authentic audit rows say, which have no place in the log yet.

        No unit looks at these rows: they are what its neighbours add, so all would conflict with each other.
        """
        newest: dict[tuple[str, str], tuple[int, int]] = {}
        for number, *values in waiting:
            if (version := values[_VM_VERSION]) is not None:
                vm = values[_AUDIT_HOTKEY], values[_AUDIT_VM]
                newest[vm] = max((version, number), newest.get(vm, (0, 0)))
        faults: list[RowNotAuthentic] = []
        for vm, (version, number) in newest.items():
            with suppress(RowNotAuthentic):  # one that is not authentic by itself is found with its VM
                head = self.head(vm)
                if head is not None and head.version < version:
                    why = (
                        f"it has version {head.version}, and audit row {number}, which waits for the log, has {version}"
                    )
                    faults.append(RowNotAuthentic("head", _name(vm), why))
        return faults

    def adopt_vms(self, after: store.Vm | None, limit: int) -> tuple[tuple[store.Vm, ...], store.Vm | None]:
        """Give the next VMs heads that have none, from their rows as they are; returns these, and the last VM."""
        if self._key is None:
            raise StoreError("the store has no key for its rows yet")
        stored = self._run(None, *sql.next_heads(_pair(after), limit))
        bare = [(row[0], row[1]) for row in stored if self._opened((row[0], row[1]), row[2:]) is None]
        found: _Grouped = {}
        if bare:
            found = self._rows_of_vms(after, _last(stored))
            newest = {(row[0], row[1]): row[2] for row in self._run(None, *sql.newest_boots(bare))}
            found[store.BootRow] = self._boots_of({vm: at - RECENT_SECONDS for vm, at in newest.items()})
        for vm in bare:
            head = Head(0, {}, is_changed=True)
            _ = self._hold(vm, head)
            for kind in (store.VmRow, store.VolumeRow, store.BootRow):
                rows = found[kind].get(vm, ())
                for values, tag in zip(rows, self._adopted(kind, rows), strict=True):
                    _ENTRIES[kind](head, tuple(values[:-1]), tag)
            rows = _in_head(found[store.GenerationRow].get(vm, ()))
            tags = self._adopted(store.GenerationRow, rows)
            head.contents["generation"] = _generation_tags(zip(rows, tags, strict=True))
        return tuple(store.Vm(*vm) for vm in bare), _last(stored) if len(stored) == limit else None

    def _adopted(self, kind: type[store.Row], rows: Rows) -> list[bytes]:
        """The tags of rows that have been given MACs."""
        tags = self.check(kind, rows)
        if b"" in tags:
            raise RowNotAuthentic(kind.TABLE, _key_text(kind, rows[tags.index(b"")]), "its MAC was removed meanwhile")
        return tags

    def _rows_of_vms(self, after: store.Vm | None, last: store.Vm) -> _Grouped:
        """The claims, volumes and generations of the VMs after ``after`` until ``last``."""
        return {
            kind: _grouped(kind, self._run(None, sql.READ_OF_VMS[kind], (*_pair(after), *_pair(last))))
            for kind in (store.VmRow, store.VolumeRow, store.GenerationRow)
        }

    def _boots_of(self, since: dict[tuple[str, str], int]) -> _OfVms:
        """The boots of each VM from a time on."""
        return _grouped(store.BootRow, self._run(None, *sql.boots_since(since)) if since else ())

    def inspect(
        self, kind: type[store.Row], after: store.Row | None, limit: int
    ) -> tuple[tuple[RowNotAuthentic, ...], store.Row | None]:
        """The faults of the next rows of a kind, and the last of these rows, None after the last page."""
        rows = self._run(None, *statement(store.ReadPage(kind, after, limit)))
        faults = self._faults(kind, rows)
        if kind is store.BootRow and rows:
            keys = tuple(row[0] for row in rows)
            for boot_id, given, there in self._run(None, sql.count_given(len(keys)), keys):
                faults.append(RowNotAuthentic("boot_volume", boot_id, _told_given(given, there)))
        return tuple(faults), decode_rows(kind, rows[-1:])[0] if len(rows) == limit else None

    def _faults(self, kind: type[store.Row], rows: Rows) -> list[RowNotAuthentic]:
        try:
            _ = self.check(kind, rows)
        except RowNotAuthentic as exc:
            if len(rows) == 1:
                return [exc]
            return [fault for row in rows for fault in self._faults(kind, (row,))] or [exc]
        return []

    def inspect_vms(self, after: store.Vm | None, limit: int) -> tuple[tuple[RowNotAuthentic, ...], store.Vm | None]:
        """The faults of the groups of the next VMs, one for each part of each at most, and the last of these VMs."""
        if self._key is None:
            raise self._locked()
        stored = self._run(None, *sql.next_heads(_pair(after), limit))
        if not stored:
            return (), None
        faults: list[RowNotAuthentic] = []
        since: dict[tuple[str, str], int] = {}
        for hotkey, name, *head_stored in stored:
            vm = (hotkey, name)
            try:
                opened = self._opened(vm, head_stored)
                head = self._hold(vm, opened or (Head(0, {}) if self._is_final else None))
            except RowNotAuthentic as exc:
                faults.append(exc)
            else:
                if head is not None:
                    boots = head.of("boot")
                    since[vm] = Boots(boots).oldest() if boots else _ALWAYS
        found = self._rows_of_vms(after, _last(stored))
        numbers = {vm: _numbers(rows) for vm, rows in found[store.GenerationRow].items()}
        found[store.GenerationRow] = {vm: _in_head(rows) for vm, rows in found[store.GenerationRow].items()}
        found[store.BootRow] = self._boots_of(since)
        for vm in self._heads:
            for kind, compare in _PARTS.items():
                rows = found[kind].get(vm, ())
                try:
                    compare(self, vm, rows, self.check(kind, rows))
                except RowNotAuthentic as exc:
                    faults.append(exc)
            for volume, there in numbers.get(vm, {}).items():
                missing = (number for number in range(1, max(there)) if number not in there)
                for number in islice(missing, _MISSING):
                    key = f"{_name(vm)}/{volume}/{number}"
                    faults.append(RowNotAuthentic("generation", key, "it is missing: no generation is ever deleted"))
        return tuple(faults), _last(stored) if len(stored) == limit else None

    def inspect_logged(self, after: store.Vm | None, limit: int) -> tuple[tuple[RowNotAuthentic, ...], store.Vm | None]:
        """The next VMs of the log of which nothing is left, not even a head, as faults; and the last VM of the page.

        No unit deletes a head: that of a VM that was erased, or whose boots were purged, stays.
        """
        stored = self._run(None, sql.NEXT_LOGGED, (*_pair(after), limit))
        faults = [
            RowNotAuthentic("head", _name((hotkey, name)), _told_missing(known))
            for hotkey, name, known, is_gone in stored
            if is_gone
        ]
        return tuple(faults), _last(stored) if len(stored) == limit else None

    def inspect_store(self) -> tuple[RowNotAuthentic, ...]:
        """The faults of the store's own group, likewise."""
        faults: list[RowNotAuthentic] = []
        if self._is_locked:
            raise self._locked()
        try:
            head = self.store_head()
        except RowNotAuthentic as exc:
            return (exc,)
        if head is not None:
            facts = {name: _number(value) for name, value in self._run(None, sql.READ_FACTS, ())}
            for name in sorted(facts.keys() | head.of(_FACTS).keys(), key=str):
                try:
                    self.expect(_FACTS, name, facts.get(name), head.of(_FACTS).get(name))
                except RowNotAuthentic as exc:
                    faults.append(exc)
        # Not in the head, as a migration has no key. A wrong schema version ends each transaction before this one.
        version, since, _ = self._run(None, sql.READ_VERSION, ())[0]
        if type(since) is not int or not sql.SEALS_SINCE <= since <= version:
            why = "no migration wrote it: servers may be let in that know no MACs"
            faults.append(RowNotAuthentic(_FACTS, "compatible_since", why))
        for op in (store.Scan(store.RevocationRow), store.Scan(store.KeyringRow)):
            try:
                self.perform(op)
            except RowNotAuthentic as exc:
                faults.append(exc)
        return tuple(faults)


@lru_cache(maxsize=4)
def _check_times(key: EpochKey, horizon: int, version: int, stored: tuple[Any, ...]) -> None:
    """Compare the facts that every unit reads with the head of the store, which was read with them.

    They seldom change, so what was found authentic under a key is remembered. Raises `RowNotAuthentic`.
    """
    guard = Guard(Session(key, is_final=True, is_locked=False), lambda _op, _text, _values: ())
    _ = guard.store_head(stored)
    guard.expect_fact("nonce_horizon", horizon)
    guard.expect_fact("revocations", version)


def _asked_by(op: StoreOp[Any], kind: type[store.Row]) -> tuple[str, ...]:
    """The columns by which an operation asks for rows; their values are the first ones of its statement."""
    if isinstance(op, store.Read):
        return (op.by,) if op.by else kind.KEY
    return _ASKED_BY.get(type(op), ())


def _check_asked(kind: type[store.Row], names: tuple[str, ...], values: Values, rows: Rows) -> None:
    """Compare authentic rows with the values by which they were asked for. Raises `RowNotAuthentic`.

    A database finds any row by any value, if its owner has changed an index or an operator.
    """
    places = _PLACE_OF[kind]
    for row in rows:
        for name, value in zip(names, values, strict=False):
            if row[places[name]] != value:
                raise RowNotAuthentic(kind.TABLE, _key_text(kind, row), _NOT_ASKED)


def _check_once(kind: type[store.Row], rows: Rows) -> None:
    """Require that no two rows have one key: of a table that inherits from another one there may be an older row, too.

    Raises `RowNotAuthentic`.
    """
    seen: set[Sequence[Any]] = set()
    for row in rows:
        key = row[: len(kind.KEY)]
        if key in seen:
            raise RowNotAuthentic(kind.TABLE, _key_text(kind, row), "it is there twice")
        seen.add(key)


def statements_ahead(ops: Iterable[StoreOp[Any]], *, with_heads: bool) -> tuple[tuple[str, Values], ...]:
    """The statements of operations, and with them those of the guard that reads the heads of their VMs."""
    found: dict[tuple[str, Values], None] = {}
    for op in ops:
        vm = getattr(op, _VMS[type(op)]) if type(op) in _VMS else None
        if with_heads and isinstance(vm, store.Vm):
            found[sql.READ_HEAD, (vm.hotkey, vm.name) * 2] = None
        found[statement(op)] = None
    return tuple(found)


_VMS: Final[dict[type[StoreOp[Any]], str]] = {
    store.Read: "key",
    store.ReadAll: "owner",
    store.ReadLiveGenerations: "vm",
}
"""Where the operations that are compared with the head of a VM have it."""


def _rows_key(epoch: int) -> str:
    """The key of an epoch in the head of the store."""
    return f"{ROWS_KEY}/{epoch}"


def _written(values: Sequence[Any]) -> Sequence[Any]:
    """The columns of an audit row that its unit wrote: all but those that the sequencer writes."""
    return (*values[:_IDX], *values[_SALT + 1 :])


def _is_past(kind: type[store.Row], values: Sequence[Any]) -> bytes:
    """One byte more for a row of the store's group: 1 for a revocation that was undone."""
    return bytes((kind is store.RevocationRow and values[_REVOCATION["allowed_at"]] is not None,))


def _told_missing(known: object) -> str:
    return f"it is missing, and the log has version {known}"


def _told_given(given: int, there: int) -> str:
    return f"the boot was given {given} volumes, and {there} are there"


def _number(value: int) -> bytes:
    """A number as a head has it; a value of another type, which SQLite takes in any column, is in none."""
    return value.to_bytes(8, "big", signed=True) if type(value) is int else b""


# --- entries of heads ---


def _enter_claim(head: Head, _values: Values, tag: bytes) -> None:
    head.of("vm")[""] = tag


def _enter_volume(head: Head, values: Values, tag: bytes) -> None:
    head.of("volume")[values[2]] = tag


def _enter_generation(head: Head, values: Values, tag: bytes) -> None:
    section, volume, number = head.of("generation"), values[2], values[3]
    section[f"{volume}/{number}"] = tag + _LIVE[_is_live(values)]
    numbers: dict[int, str] = {}
    for key in section:
        of, _, digits = key.rpartition("/")
        if of == volume:
            numbers[int(digits)] = key
    newest = max(numbers)
    for each, key in numbers.items():
        if each != newest and not section[key][-1]:  # settled
            del section[key]


def _enter_boot(head: Head, values: Values, tag: bytes) -> None:
    Boots(head.of("boot")).enter(values[0], values[_BOOT["created_at"]], tag)


_ENTRIES: Final[dict[type[store.Row], Callable[[Head, Values, bytes], None]]] = {
    store.VmRow: _enter_claim,
    store.VolumeRow: _enter_volume,
    store.GenerationRow: _enter_generation,
    store.BootRow: _enter_boot,
}

_PLACES: Final[dict[type[store.Row], Callable[[Sequence[Any]], str]]] = {
    store.VmRow: lambda _values: "",
    store.VolumeRow: itemgetter(2),
    store.GenerationRow: lambda values: f"{values[2]}/{values[3]}",
    store.BootRow: itemgetter(0),
}
"""The key of a row in the head of its VM; in the head of the store it is the row's own."""

_FACT_WRITES: Final[dict[type[StoreOp[Any]], str]] = {
    store.SetHorizon: "nonce_horizon",
    store.SetVersion: "revocations",
    store.DecideLoss: "loss_decided_at",
}

_CHANGES: Final[dict[type[StoreOp[Any]], Callable[[Guard, Any], Any]]] = {
    store.InsertAll: Guard.copied,
    store.RewrapGenerations: Guard.rewrapped,
    store.VoidTokens: Guard.voided,
    store.DoubtCandidates: Guard.doubted,
    store.Forget: Guard.forgot,
    store.Delete: Guard.deleted,
    **dict.fromkeys(_FACT_WRITES, Guard.set_fact),
}
"""Changes of groups before an operation, which is returned, or in place of it, and then its reply."""

_KEYED: Final = frozenset({store.Insert, store.ReadUnsequenced})
"""Operations that need the key of a sealed store, beside changes: a row that is not checked gets no place."""

_GROUPS: Final[dict[tuple[type[StoreOp[Any]], type[store.Row]], Callable[[Guard, Any, Rows, list[bytes]], Rows]]] = {
    (store.Read, store.VmRow): Guard.claim,
    (store.Read, store.BootRow): Guard.boots,
    (store.FindLastBoot, store.BootRow): Guard.last_boot,
    (store.FindLastBootFrom, store.BootRow): Guard.boots,
    (store.ReadAll, store.GenerationRow): Guard.generations,
    (store.ReadLiveGenerations, store.GenerationRow): Guard.generations,
    (store.ReadAll, store.VolumeRow): Guard.volumes,
    (store.ReadBootVolumes, store.BootVolumeRow): Guard.boot_volumes,
    (store.ReadRevoked, store.RevocationRow): Guard.whole_table,
    (store.Scan, store.RevocationRow): Guard.whole_table,
    (store.ReadRevocation, store.RevocationRow): Guard.revocation,
    (store.Scan, store.KeyringRow): Guard.whole_table,
}
"""The operations that read the whole of what a head lists, or one row that it must list."""

_ASKED_BY: Final[dict[type[StoreOp[Any]], tuple[str, ...]]] = {
    **dict.fromkeys((store.ReadAll, store.ReadLiveGenerations, store.FindLastBoot), ("hotkey", "vm")),
    store.FindLastBootFrom: ("hotkey", "peer_address"),
    store.ReadBootVolumes: ("boot_id",),
    store.ReadGpus: ("server_id",),
    store.ReadRevocation: ("kind", "subject"),
}
"""The columns by which operations ask for rows: those on whose reply something depends.

The rows of `ReadClaims` are only shown, and of the log's state, which `LockLog` reads, one row alone has a MAC.
"""

_FACT_READS: Final[dict[type[StoreOp[Any]], Callable[[Guard, Rows], None]]] = {
    store.ReadTimes: Guard.times,
    store.ReadLossDecided: Guard.loss,
}

_Way = Callable[[Guard, Any], Any]

_WAYS: Final[dict[type[StoreOp[Any]], _Way]] = {
    **dict.fromkeys(READS_ROWS, Guard.read_rows),
    **dict.fromkeys(_CHANGES, Guard.change),
    **dict.fromkeys(_FACT_READS, Guard.read_facts),
    store.ReadOtherwiseSealed: Guard.read_otherwise_sealed,
    store.ReadAudit: Guard.read_audit,
    store.ReadUnsequenced: Guard.read_unsequenced,
    store.Insert: Guard.insert,
    store.Put: Guard.write,
}
"""The ways in which operations are carried out in a store whose key is here."""


_PARTS: Final[dict[type[store.Row], Callable[[Guard, tuple[str, str], Rows, list[bytes]], None]]] = {
    store.VmRow: Guard.compare_claim,
    store.GenerationRow: Guard.compare_generations,
    store.VolumeRow: Guard.compare_volumes,
    store.BootRow: Guard.compare_boots,
}
"""The comparison of each part of a VM's group with its head."""


# --- operations of the seal ---


class _OfSeal(StoreOp[T_co]):
    """An operation that the guard itself carries out."""

    __slots__ = ()
    MAY_TAKE_LONG: ClassVar[bool] = True

    def carry_out(self, guard: Guard) -> T_co:
        raise NotImplementedError


@frozen
class ReadSeal(_OfSeal[tuple[bool, bool]]):
    """Whether rows get MACs, and whether all have one."""

    def carry_out(self, guard: Guard) -> tuple[bool, bool]:
        return guard.state


@frozen
class BeginSeal(_OfSeal[None]):
    """Write MACs and heads from now on, under the key ``random``, which ``row`` has wrapped."""

    row: store.KeyringRow
    random: Secret

    def carry_out(self, guard: Guard) -> None:
        guard.begin(self.row, self.random)


@frozen
class AdoptRows(_OfSeal[tuple[int, store.Row | None]]):
    """Give the next rows of a kind a MAC that have none; replies how many, and the row to go on after."""

    kind: type[store.Row]
    after: store.Row | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[int, store.Row | None]:
        return guard.adopt(self.kind, self.after, self.limit)


@frozen
class AdoptVms(_OfSeal[tuple[tuple[store.Vm, ...], store.Vm | None]]):
    """Give the next VMs heads that have none; replies which, and the VM to go on after."""

    after: store.Vm | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[store.Vm, ...], store.Vm | None]:
        return guard.adopt_vms(self.after, self.limit)


@frozen
class AdoptAudit(_OfSeal[tuple[int, int | None]]):
    """Give the next audit rows that are not sequenced a MAC of the newest epoch, if they have none or an older one.

    Replies how many, and the last number.
    """

    after: int
    limit: int

    def carry_out(self, guard: Guard) -> tuple[int, int | None]:
        return guard.adopt_audit(self.after, self.limit)


@frozen
class EndSeal(_OfSeal[None]):
    """Accept no row without a MAC from now on, and no VM without a head."""

    def carry_out(self, guard: Guard) -> None:
        guard.end()


@frozen
class ReadEpochs(_OfSeal[tuple[int, ...]]):
    """The epochs of which MACs count, the newest first; none of a store that is not sealed."""

    def carry_out(self, guard: Guard) -> tuple[int, ...]:
        return guard.epochs


@frozen
class BeginEpoch(_OfSeal[None]):
    """Write all MACs in the epoch of ``row`` from now on, under the key ``random``, which ``row`` has wrapped."""

    row: store.KeyringRow
    random: Secret

    def carry_out(self, guard: Guard) -> None:
        guard.begin_epoch(self.row, self.random)


@frozen
class RenewMacs(_OfSeal[tuple[tuple[RowNotAuthentic, ...], store.Row | None]]):
    """Give the next rows of a kind MACs of the newest epoch.

    Replies those that are not authentic and were left as they are, and the row to go on after.
    """

    kind: type[store.Row]
    after: store.Row | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[RowNotAuthentic, ...], store.Row | None]:
        return guard.renew(self.kind, self.after, self.limit)


@frozen
class RenewHeads(_OfSeal[tuple[tuple[RowNotAuthentic, ...], store.Vm | None]]):
    """Give the heads of the next VMs MACs of the newest epoch; replies as `RenewMacs` does."""

    after: store.Vm | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[RowNotAuthentic, ...], store.Vm | None]:
        return guard.renew_heads(self.after, self.limit)


@frozen
class EndEpoch(_OfSeal[int]):
    """Let no MAC of an older epoch count from now on; replies the epoch that counts."""

    def carry_out(self, guard: Guard) -> int:
        return guard.end_epoch()


@frozen
class InspectRows(_OfSeal[tuple[tuple[RowNotAuthentic, ...], store.Row | None]]):
    """The faults of the next rows of a kind, and the row to go on after."""

    kind: type[store.Row]
    after: store.Row | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[RowNotAuthentic, ...], store.Row | None]:
        return guard.inspect(self.kind, self.after, self.limit)


@frozen
class InspectAudit(_OfSeal[tuple[tuple[RowNotAuthentic, ...], int | None]]):
    """The faults of the next audit rows that are not sequenced, by number, and the last number."""

    after: int
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[RowNotAuthentic, ...], int | None]:
        return guard.inspect_audit(self.after, self.limit)


@frozen
class InspectVms(_OfSeal[tuple[tuple[RowNotAuthentic, ...], store.Vm | None]]):
    """The faults of the groups of the next VMs of which there is any row, or a head; and the VM to go on after."""

    after: store.Vm | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[RowNotAuthentic, ...], store.Vm | None]:
        return guard.inspect_vms(self.after, self.limit)


@frozen
class InspectLogged(_OfSeal[tuple[tuple[RowNotAuthentic, ...], store.Vm | None]]):
    """The next VMs of the log of which neither a row nor a head is left; and the VM to go on after."""

    after: store.Vm | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[RowNotAuthentic, ...], store.Vm | None]:
        return guard.inspect_logged(self.after, self.limit)


@frozen
class InspectStore(_OfSeal[tuple[RowNotAuthentic, ...]]):
    """The faults of the store's own group."""

    def carry_out(self, guard: Guard) -> tuple[RowNotAuthentic, ...]:
        return guard.inspect_store()


SEALED: Final = tuple(kind for kind in store.ROWS if kind not in UNSEALED and kind is not store.AuditRow)
"""The kinds of rows that have MACs, but for audit rows, whose MACs count until they are sequenced."""
