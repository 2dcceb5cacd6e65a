"""Long work on a whole table while servers go on: page by page, each one transaction.

Rule kept here: a page with which other transactions interfere is made smaller, at last one row. A large one has rows of
so many VMs that some of them boot meanwhile, each time that it is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from chutes_proto.errors import StoreAway, StoreBusy
from chutes_proto.store._run import Store, Unit

A = TypeVar("A")
T = TypeVar("T")

_DIVISOR: Final = 8
"""By how much a page is made smaller. A few steps lead to one row, as each takes as long as a store may be busy."""


def in_pages(
    store: Store,
    page: Callable[[A, int], Unit[T]],
    last: Callable[[T], A | None],
    limit: int,
    first: A,
) -> Iterator[tuple[T, int]]:
    """Run ``page(after, limit)`` until ``last`` of what it returns is None, each time after the one before.

    Yields what it returns, and its limit. Raises `StoreBusy` if others get in the way of a single row, too.
    """
    after = first
    while True:
        try:
            found = store.transact(page(after, limit))
        except StoreAway:
            raise
        except StoreBusy:
            if limit == 1:
                raise
            limit = max(1, limit // _DIVISOR)
            continue
        yield found, limit
        if (reached := last(found)) is None:
            return
        after = reached
