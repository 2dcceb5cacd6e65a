"""The keys of an open store, and of one transaction of it; and the versions of heads that this process has seen.

Rules kept here:

* the fact ``seal`` is the epoch in which the rows of a store are; 0 in one that was made and that nobody has used yet.
  A store of an older epoch than one that was seen is refused (`Custody.require_epoch`);
* the key of an epoch is a row of the keyring, which the KEK opens, and no other row stands in for it;
* a key that was opened is held while the store is open, but not one of a transaction that was not committed;
* a head is not older than one that this process has seen in a committed transaction (`SeenHeads`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Final

from attrs import define, field, frozen

from chutes_proto.errors import KeyUnavailable, RowNotAuthentic, SealBroken, StoreError
from chutes_proto.secret import Secret
from chutes_proto.store import _rows as store
from chutes_proto.store._answers import NOT_ASKED
from chutes_proto.store._columns import Rows, columns, decode_rows
from chutes_proto.store._macs import EpochKey

ROWS_KEY: Final = "rows"
"""The kind of the key of the MACs in `KeyringRow`."""

REMEMBERED: Final = 25_000
"""How many heads are remembered from one transaction to the next; one takes 0.7 kB, and 2 of a VM that boots often."""
THE_STORE: Final = ("", "")
"""The head of the store itself among those of VMs, none of which has such a name."""
_KEYRING: Final = f"SELECT {', '.join(columns(store.KeyringRow))} FROM keyring"  # noqa: S608


@define
class SeenHeads:
    """The versions of heads that this process has seen in committed transactions, the newest of many.

    Of VMs the log knows them, too, but its entries are rows that an attacker can delete; of the store the mark does,
    which is compared once a second. Several threads may ask for `least` at once; the rest is called by one at a time.
    """

    _versions: dict[tuple[str, str], tuple[int, float]] = field(factory=dict[tuple[str, str], tuple[int, float]])

    def note(self, heads: Mapping[tuple[str, str], int], at: float) -> None:
        """Note the versions that a transaction wrote, or only read; ``at`` is a time after its commit."""
        for vm, version in heads.items():
            known = self._versions.pop(vm, None)
            self._versions[vm] = (version, at) if known is None or version > known[0] else known
        while len(self._versions) > REMEMBERED:  # the one that was noted the longest ago
            del self._versions[next(iter(self._versions))]

    def least(self, vm: tuple[str, str], began_at: float) -> int:
        """The least version that a transaction may find which began at that time; 0 if none is known."""
        version, at = self._versions.get(vm, (0, 0.0))
        return version if at <= began_at else 0

    def clear(self) -> None:
        """Forget all: an operator has decided to go on with an older store."""
        self._versions.clear()


def rows_key(epoch: int) -> str:
    """The key of the keyring's row with the key of an epoch."""
    return f"{ROWS_KEY}/{epoch}"


def epoch_of_store(state: object) -> int:
    """The epoch of the key, as the fact ``seal`` says it; 0 for any value that no release writes."""
    return state if type(state) is int and state > 0 else 0


@frozen
class Session:
    """The keys of one transaction; none where nobody has the store's KEK here, or where the ``epoch`` is 0."""

    epoch: int = 0
    key: EpochKey | None = None
    older: Callable[[int, Callable[[str], Rows]], EpochKey] | None = None
    """Opens the key of an older epoch with a statement of the transaction."""
    least_head: int = 0
    """The version of the store's head that was seen before the transaction began."""
    seen: SeenHeads | None = None
    began_at: float = math.inf
    """A time before the transaction began, by `time.monotonic`: it need not find what was committed later."""


@define
class Custody:
    """The keys of one open store, and the findings about its rows.

    Several threads may ask for a session at once; `note` is called by one at a time.
    """

    name: str
    faults: Counter[str] = field(factory=Counter[str], init=False)
    """The number of faults, by table."""
    seen: SeenHeads = field(factory=SeenHeads, init=False)
    """The versions of heads that this process has seen."""
    _unwrap: Callable[[store.KeyringRow], Secret] | None = field(default=None, init=False)
    _keys: dict[int, EpochKey] = field(factory=dict[int, EpochKey], init=False)
    _has_opened: bool = field(default=False, init=False)
    _least: int = field(default=0, init=False)

    def hold(self, unwrap: Callable[[store.KeyringRow], Secret]) -> None:
        """Open keys with ``unwrap`` from now on."""
        self._unwrap = unwrap

    @contextmanager
    def holding(self, unwrap: Callable[[store.KeyringRow], Secret]) -> Generator[None]:
        """Open keys with ``unwrap``, too, in this block."""
        held = self._unwrap

        def either(row: store.KeyringRow) -> Secret:
            try:
                return unwrap(row)
            except KeyUnavailable:
                if held is None:
                    raise
                return held(row)

        self._unwrap = either
        try:
            yield
        finally:
            self._unwrap = held

    def require_epoch(self, epoch: int) -> None:
        """Refuse the store from now on if it says that it is of an older epoch: this one was committed."""
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
        epoch = epoch_of_store(state)
        if epoch < self._least:
            raise StoreError(
                f"store {self.name}: it says that its rows are of epoch {epoch}, and they were of epoch {self._least}:"
                " somebody changed it, or it is a backup from before a key-encryption key (KEK) was rotated; after a"
                " restore, move the mark's file alone away on every server, and start it again"
            )
        key = self._keys.get(epoch)
        if epoch and key is None and self._unwrap is not None:
            try:
                key = self._keys[epoch] = self._open(epoch, self._unwrap, read)
            except KeyUnavailable as exc:
                # Without its KEK no server starts (`check_keys`), and nobody writes. One that has started would take
                # what it reads now, unchecked, for true later.
                if self._has_opened:
                    why = f"{exc}; if you rotated it, reload this server with it, or restart it if its files are copies"
                    raise RowNotAuthentic("keyring", rows_key(epoch), why) from None
        if key is None:
            return Session(epoch)
        self._has_opened = True
        return Session(epoch, key, self.older, seen=self.seen)

    def older(self, epoch: int, read: Callable[[str], Rows]) -> EpochKey:
        """The key of an older epoch, which the head of the store lists. Raises `RowNotAuthentic`."""
        key = self._keys.get(epoch)
        if key is None and self._unwrap is not None:
            try:
                key = self._keys[epoch] = self._open(epoch, self._unwrap, read)
            except KeyUnavailable as exc:
                raise RowNotAuthentic("keyring", rows_key(epoch), str(exc)) from None
        if key is None:
            raise RowNotAuthentic("keyring", rows_key(epoch), "nobody holds its key-encryption key (KEK)")
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

    def _open(self, epoch: int, unwrap: Callable[[store.KeyringRow], Secret], read: Callable[[str], Rows]) -> EpochKey:
        rows = decode_rows(store.KeyringRow, read(f"{_KEYRING} WHERE kind = '{ROWS_KEY}' AND epoch = {epoch}"))
        if not rows:
            raise RowNotAuthentic("keyring", rows_key(epoch), "it is missing")
        # It opens as what its row says that it is, and a past holder of a KEK knows the key of an older epoch.
        if (rows[0].kind, rows[0].epoch) != (ROWS_KEY, epoch):
            raise RowNotAuthentic("keyring", f"{rows[0].kind}/{rows[0].epoch}", NOT_ASKED)
        try:
            return EpochKey(epoch, unwrap(rows[0]))
        except SealBroken as exc:  # somebody altered it in the database
            raise RowNotAuthentic("keyring", rows_key(epoch), str(exc)) from None
