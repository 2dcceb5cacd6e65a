"""The seal of a store (``store/_sealing.py``): of a new one as soon as it is opened.

A new epoch of its MACs is begun and ended step by step, after a key-encryption key (KEK) was replaced.

``find_faults`` reads a whole store and says which rows are not authentic.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from typing import Protocol, TypeVar

from chutes_proto.errors import RowNotAuthentic, StoreError
from chutes_proto.io.stores.pages import in_pages
from chutes_proto.keys.vault import Vault
from chutes_proto.secret import Secret
from chutes_proto.store import _rows as rows
from chutes_proto.store._custody import Custody
from chutes_proto.store._inspection import InspectRows, InspectStore, InspectVms
from chutes_proto.store._rows import CountRows
from chutes_proto.store._run import Ask, Store, Unit, untold
from chutes_proto.store._sealing import SEALED, ReadSeal, RenewAudit, RenewHeads, RenewMacs
from chutes_proto.units.custody import (
    ENTROPY_SIZE,
    BeginNewEpoch,
    EndOldEpochs,
    FindGone,
    FindWaitingFaults,
    SealNew,
)

T = TypeVar("T")

_PAGE = 1000
_FIRST = -(1 << 63)
"""A number before that of any audit row: who writes the database can draw one that is negative."""
_VMS = 200
"""VMs of which all rows are in memory at a time."""
_LOGGED = 20
"""VMs of which all entries of the log are visited in one transaction: each may have thousands, and boots wait."""

_LAST = itemgetter(1)
"""Where a unit of a page returns the row to go on after."""


class Opened(Store, Protocol):
    """A store that was opened, perhaps with a KEK."""

    name: str
    custody: Custody


def seal_if_new(store: Store, vault: Vault) -> None:
    """Seal a store that has no rows. Raises `StoreError` for one that has some, and says that it is not sealed."""
    store.transact(SealNew(int(time.time()), vault, _drawn()))


def require_keys(store: Opened) -> None:
    """Raise `StoreError` if a sealed store was opened without its KEK."""
    if store.transact(Ask(ReadSeal())) and not store.custody.has_keys:
        raise StoreError(
            f"store {store.name}: it is sealed, and only the KEK opens the key of its rows; name the server's"
            " configuration with --config"
        )


def begin_epoch(store: Store, vault: Vault, reason: str) -> bool:
    """Begin a new epoch, if the key of the rows is under another KEK than the current one; servers go on meanwhile.

    Returns whether one has begun, now or before, that has not ended: `end_epoch` ends it.
    """
    return len(store.transact(BeginNewEpoch(int(time.time()), vault, _drawn(), reason))) > 1


def end_epoch(store: Store, reason: str, tell: Callable[[int, int], object] = untold) -> tuple[RowNotAuthentic, ...]:
    """Give every row a MAC of the newest epoch, and let the older ones count no more, while servers go on.

    Begun again after an interruption, it passes over what has one. A row that is not authentic is left as it is, and is
    returned; then the older epoch still counts. ``tell`` takes how many rows were looked at, and of about how many.
    """
    # The store's own group last, as every unit reads its head.
    of_store = (rows.RevocationRow, rows.KeyringRow)
    kinds = (*(kind for kind in SEALED if kind not in of_store), *of_store)
    faults: list[RowNotAuthentic] = []
    for found in _pages(store, kinds, lambda kind, last, limit: Ask(RenewMacs(kind, last, limit)), tell):
        faults += found
    for found in _pages_of_vms(store, _PAGE, lambda after, limit: Ask(RenewHeads(after, limit))):
        faults += found
    # An audit row that is not authentic gets no place in the log, and need not be mended.
    _ = sum(_pages_of_waiting(store, lambda after, limit: Ask(RenewAudit(after, limit))))
    if not faults:
        store.transact(EndOldEpochs(int(time.time()), reason))
    return tuple({(fault.table, fault.key): fault for fault in faults}.values())


def find_faults(store: Store, tell: Callable[[int, int], object] = untold) -> Iterator[RowNotAuthentic]:
    """Find the rows of a store that are not authentic, and the VMs whose rows contradict their heads."""
    yield from store.transact(Ask(InspectStore()))
    for faults in _pages(store, SEALED, lambda kind, last, limit: Ask(InspectRows(kind, last, limit)), tell):
        yield from faults
    for faults in _pages_of_waiting(store, FindWaitingFaults):
        yield from faults
    for faults in _pages_of_vms(store, _VMS, lambda after, limit: Ask(InspectVms(after, limit))):
        yield from faults
    for faults in _pages_of_vms(store, _LOGGED, FindGone):
        yield from faults


def _pages(
    store: Store,
    kinds: Iterable[type[rows.Row]],
    page: Callable[[type[rows.Row], rows.Row | None, int], Unit[tuple[T, rows.Row | None]]],
    tell: Callable[[int, int], object],
) -> Iterator[T]:
    """Run a unit for each page of rows of each kind, and yield what it returns."""
    total = sum(store.transact(Ask(CountRows(kind))) for kind in SEALED)
    looked = 0
    for kind in kinds:
        for (found, after), limit in in_pages(store, partial(page, kind), _LAST, _PAGE, None):
            yield found
            if after is not None:
                looked += limit
                _ = tell(min(looked, total), total)


def _pages_of_vms(
    store: Store, limit: int, page: Callable[[rows.Vm | None, int], Unit[tuple[T, rows.Vm | None]]]
) -> Iterator[T]:
    """Run a unit for each page of VMs, and yield what it returns."""
    return (found for (found, _), _ in in_pages(store, page, _LAST, limit, None))


def _pages_of_waiting(store: Store, page: Callable[[int, int], Unit[tuple[T, int | None]]]) -> Iterator[T]:
    """Run a unit for each page of audit rows that are not in the log yet, and yield what it returns."""
    return (found for (found, _), _ in in_pages(store, page, _LAST, _PAGE, _FIRST))


def _drawn() -> Secret:
    return Secret(os.urandom(ENTROPY_SIZE))
