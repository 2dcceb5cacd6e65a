"""The connections of one process to a database in PostgreSQL: at most so many, made by the callers that need them.

No more transactions run at once than conflicts allow (``store/_crowding.py``).
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING

from psycopg.pq import TransactionStatus

from chutes_proto.errors import StoreBusy
from chutes_proto.io.stores.postgres.faults import CONFLICTS, Again, fault_of

if TYPE_CHECKING:
    from chutes_proto.io.stores.postgres.connection import Connection
    from chutes_proto.io.stores.postgres.transactions import Database
    from chutes_proto.store._crowding import Crowding


class _Slots:
    """The transactions that run at once, as many as ``crowding`` allows; the others wait, the first come first."""

    def __init__(self, crowding: Crowding) -> None:
        self.crowding = crowding
        self._lock = threading.Lock()
        self._held = 0
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, timeout: float) -> bool:
        """Wait for a slot; return whether there was one in time."""
        turn = threading.Lock()
        _ = turn.acquire()
        with self._lock:
            self._waiting.append(turn)
            self._hand_out()
        if turn.acquire(timeout=timeout):
            return True
        with self._lock:
            if turn not in self._waiting:  # it was handed out just now
                return True
            self._waiting.remove(turn)
            return False

    def release(self, *, committed: bool, conflicted: bool) -> None:
        """Give a slot back, with what became of its transaction."""
        with self._lock:
            self._held -= 1
            if committed:
                self.crowding.committed()
            elif conflicted:
                self.crowding.conflicted()
            self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._held < self.crowding.allowed:
            self._held += 1
            self._waiting.popleft().release()


class Pool:
    """Idle connections to a database, the latest first, and the slots of those in use."""

    def __init__(self, database: Database, crowding: Crowding, busy_seconds: float) -> None:
        self._database = database
        self._busy_seconds = busy_seconds
        self.slots: _Slots = _Slots(crowding)
        self.idle: list[Connection] = []
        self._closed = False

    @property
    def allowed(self) -> int:
        """The number of transactions that may run at once now."""
        return self.slots.crowding.allowed

    @contextlib.contextmanager
    def reserve(self) -> Generator[Connection]:
        """Reserve a connection, which is made if none is free."""
        if self._closed:
            raise fault_of(self._database.name, "it was closed")
        if not self.slots.acquire(timeout=self._busy_seconds):
            raise StoreBusy(f"store {self._database.name}: other transactions take too long")
        committed = conflicted = False
        try:
            try:
                connection = self.idle.pop()
            except IndexError:
                connection = self._database.connect()
            try:
                yield connection
                committed = True
            except Again as exc:
                conflicted = isinstance(exc.__cause__, CONFLICTS)
                raise
            finally:
                if connection.closed:
                    self.drop()  # the same fault has most likely ended them all
                elif self._closed or connection.info.transaction_status != TransactionStatus.IDLE:
                    connection.close()
                else:
                    self.idle.append(connection)
        finally:
            self.slots.release(committed=committed, conflicted=conflicted)

    def close(self) -> None:
        """Close idle connections, and each that is in use at its end."""
        self._closed = True
        self.drop()

    def drop(self) -> None:
        """Close idle connections."""
        while self.idle:
            with contextlib.suppress(IndexError):
                self.idle.pop().close()
