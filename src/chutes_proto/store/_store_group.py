"""The store's own group in one transaction: its head, which says which keys count, and the check of MACs under these.

Guarantees:

* a row has a MAC over its columns and place, under the newest key or under one of an older epoch that the head of the
  store lists. So one that was forged, changed or copied to another place is not authentic;
* the head of the store is under the newest key alone, so nobody who has an older one can say that it counts; and it is
  not older than the mark knew it when the transaction began, nor than one that this process has seen;
* facts, revocations and keyring are those of that head: none is missing, superfluous, or older than the newest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, TypeAlias, cast

from attrs import evolve

from chutes_proto.errors import RowNotAuthentic, StoreError
from chutes_proto.store import _guard_sql
from chutes_proto.store import _rows as store
from chutes_proto.store._answers import check_once, key_text
from chutes_proto.store._columns import Rows, Values, columns, flags
from chutes_proto.store._custody import ROWS_KEY, THE_STORE, Custody, Session, rows_key
from chutes_proto.store._heads import FACTS, PLACE_OF, Head, expect, expect_all, of_number, store_tag
from chutes_proto.store._macs import EpochKey, epoch_of, is_same
from chutes_proto.store._rows import StoreOp
from chutes_proto.store._schema import READ_VERSION

Run: TypeAlias = Callable[[StoreOp[Any] | None, str, Values], Rows]
"""Runs a statement, of an operation or of the guard's own, in the transaction of the unit."""

_FLAGS: Final = {kind: flags(kind) for kind in store.ROWS}
_WIDTHS: Final = {kind: len(columns(kind)) for kind in store.ROWS}


class StoreGroup:
    """The store's own group in the transaction of ``session``, whose statements ``run`` runs."""

    def __init__(self, session: Session, run: Run) -> None:
        self.key: EpochKey | None = session.key
        """The key of the newest epoch; None where nobody has it, or where the ``epoch`` is 0."""
        self.epoch: int = session.epoch
        self.run: Run = run
        self._older = session.older
        self._least_head = session.least_head
        if session.seen is not None:
            self._least_head = max(self._least_head, session.seen.least(THE_STORE, session.began_at))
        self._head: Head | None = None
        self._stored: Sequence[Any] | None = None  # the row of that head, if it was read with the times

    def needed_key(self) -> EpochKey:
        """The key of the newest epoch. Raises `StoreError` where nobody has it."""
        if self.key is None:
            raise StoreError(
                "the store is sealed, and only its KEK opens the key of its rows; name the server's configuration with"
                " --config, and that KEK in it"
            )
        return self.key

    # --- MACs ---

    def check(self, kind: type[store.Row], rows: Rows) -> list[bytes]:
        """The tags of rows, each once, that have authentic MACs. Raises `RowNotAuthentic`."""
        key = self.needed_key()
        if len(rows) > 1:
            check_once(kind, rows)
        tags = key.of_table(kind.TABLE, _WIDTHS[kind]).tags(rows, _FLAGS[kind])
        if None in tags:
            return [tag or self._otherwise_tagged(kind, row) for tag, row in zip(tags, rows, strict=True)]
        return cast("list[bytes]", tags)

    def _otherwise_tagged(self, kind: type[store.Row], row: Sequence[Any]) -> bytes:
        """The tag of a row whose MAC is not of the newest epoch, as `check` returns it. Raises `RowNotAuthentic`."""
        mac = row[-1]
        older = self.older_key(mac)
        tag = None if older is None else older.of_table(kind.TABLE, _WIDTHS[kind]).tags((row,), _FLAGS[kind])[0]
        if tag is None:
            why = "it has no MAC" if mac is None else "its MAC is not that of its columns and place"
            raise RowNotAuthentic(kind.TABLE, key_text(kind, row), why)
        return tag

    def older_key(self, mac: object) -> EpochKey | None:
        """The key that a MAC of an older epoch is under; None for any other, or if that epoch no longer counts."""
        epoch = epoch_of(mac)
        if epoch is None or self.key is None or epoch >= self.key.epoch or self._older is None:
            return None
        if rows_key(epoch) not in self.head().of("keyring"):
            return None
        return self._older(epoch, lambda text: self.run(None, text, ()))

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs of which MACs count, the newest first."""
        keys = [key.partition("/") for key in self.head().of("keyring")]
        return tuple(sorted((int(epoch) for kind, _, epoch in keys if kind == ROWS_KEY), reverse=True))

    # --- the head ---

    def head(self, stored: Any = None) -> Head:
        """The head of the store. ``stored`` is its row, if known. Raises `StoreError`."""
        if self._head is None:
            key = self.needed_key()
            stored = stored or self._stored
            if stored is None:
                rows = self.run(None, _guard_sql.READ_STORE_HEAD, ())
                stored = rows[0] if rows else (None, None, None)
            version, contents, mac = stored
            if version is None:
                raise RowNotAuthentic("store_head", "store", "it is missing")
            if not is_same(mac, key.mac("store head", version, contents)):
                raise RowNotAuthentic("store_head", "store", "its MAC is not that of its columns and place")
            self._require_seen(version)
            self._head = Head.of_stored(version, contents)
        return self._head

    def _require_seen(self, version: int) -> None:
        """Refuse a head of the store that is older than one which was seen: the mark may be shown another one."""
        if version < self._least_head:
            why = f"it has version {version}, and version {self._least_head} was seen"
            raise RowNotAuthentic("store_head", "store", why)

    def begin(self) -> None:
        """Begin the head of a store without rows, with its facts."""
        facts = {name: of_number(value) for name, value in self.run(None, _guard_sql.READ_FACTS, ())}
        self._head = Head(0, {FACTS: facts}, is_changed=True)

    def enter(self, kind: type[store.Row], values: Values, tag: bytes) -> None:
        """Enter a row that is the newest of its key."""
        head = self.head()
        head.of(kind.TABLE)[PLACE_OF[kind](values)] = store_tag(kind, values, tag)
        head.is_changed = True

    def note_fact(self, name: str, value: int) -> None:
        """Note a fact that is about to be written."""
        head = self.head()
        head.of(FACTS)[name] = of_number(value)
        head.is_changed = True

    def finish(self) -> None:
        """Write the head if it has changed."""
        head = self._head
        if head is not None and head.is_changed:
            head.advance()
            mac = self.needed_key().mac("store head", head.version, head.stored)
            _ = self.run(None, _guard_sql.PUT_STORE_HEAD, (head.version, head.stored, mac))

    @property
    def versions(self) -> dict[tuple[str, str], int]:
        """The version of the head that was written, or only read, after `finish`, as `VmGroups.versions` has them."""
        if self._head is not None:
            return {THE_STORE: self._head.version}
        return {} if self._stored is None else {THE_STORE: self._stored[0]}

    # --- comparisons with the head ---

    def expect_fact(self, name: str, value: int | None) -> None:
        """Compare a fact with the head. Raises `RowNotAuthentic`."""
        found = None if value is None else of_number(value)
        expect(FACTS, name, found, self.head().of(FACTS).get(name))

    def compare_times(self, rows: Rows) -> None:
        """Compare the facts that every unit reads; the row of the head was read with them."""
        if not rows:
            return
        horizon, _, version, *stored = rows[0]
        if self._head is None:
            _check_times(self.needed_key(), horizon, version, tuple(stored))
            self._require_seen(stored[0])
            self._stored = stored
        else:  # the unit may have changed it
            self.expect_fact("nonce_horizon", horizon)
            self.expect_fact("revocations", version)

    def compare_loss(self, rows: Rows) -> None:
        """Compare the time of the last decision on a loss."""
        self.expect_fact("loss_decided_at", rows[0][0] if rows else None)

    def compare_table(self, kind: type[store.Row], rows: Rows, tags: list[bytes], *, with_undone: bool = True) -> None:
        """Compare all rows of a kind, of revocations perhaps without those that were undone."""
        pairs = zip(rows, tags, strict=True)
        found = {PLACE_OF[kind](values): store_tag(kind, values, tag) for values, tag in pairs}
        expected = self.head().of(kind.TABLE)
        if not with_undone:
            expected = {key: tag for key, tag in expected.items() if not tag[-1]}
        expect_all(kind.TABLE, found, expected)

    def compare_revocation(self, key: str, rows: Rows, tags: list[bytes]) -> None:
        """Compare the one revocation of a party, or none."""
        found = store_tag(store.RevocationRow, rows[0], tags[0]) if tags else None
        expect("revocation", key, found, self.head().of("revocation").get(key))


@lru_cache(maxsize=4)
def _check_times(key: EpochKey, horizon: int, version: int, stored: tuple[Any, ...]) -> None:
    """Compare the facts that every unit reads with the head of the store, which was read with them.

    They seldom change, so what was found authentic under a key is remembered. Raises `RowNotAuthentic`.
    """
    group = StoreGroup(Session(key.epoch, key), lambda _op, _text, _values: ())
    _ = group.head(stored)
    group.expect_fact("nonce_horizon", horizon)
    group.expect_fact("revocations", version)


def check_fact(custody: Custody, name: str, value: int, read: Callable[[str], Rows]) -> None:
    """Compare a fact of a store, which was read without a guard, with its head, if the key is here.

    ``read`` runs a statement in the transaction that read it. Raises `StoreError`.
    """
    group = _as_found(custody, read(READ_VERSION)[0][1], read)
    if group.key is not None:
        group.expect_fact(name, value)


def check_head(
    custody: Custody, state: object, stored: Sequence[Any], decided_at: int | None, read: Callable[[str], Rows]
) -> None:
    """Check a store's head, and the time of the last decision on a loss, which were read together, if the key is here.

    ``stored`` are its version, contents and MAC, ``state`` is the fact ``seal``. Raises `StoreError`.
    """
    group = _as_found(custody, state, read)
    if group.key is not None:
        _ = group.head(stored)
        group.expect_fact("loss_decided_at", decided_at)


def _as_found(custody: Custody, state: object, read: Callable[[str], Rows]) -> StoreGroup:
    """The store's own rows, whatever was seen before: an operator may have decided to go on with older ones."""
    return StoreGroup(evolve(custody.session(state, read), seen=None), lambda _op, text, _values: read(text))
