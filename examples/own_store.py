"""A store of one's own: one method, `transact`, that runs a unit as one serializable transaction.

This one keeps rows in SQLite in memory and forgets them, which suits tests. ``chutes_proto.store`` has every operation
as SQL for two dialects. Run the cases of ``chutes_proto.testing.store_suite`` against yours, as
``tests/store/test_suite.py`` does.
"""

import sqlite3
import threading

from chutes_proto.errors import StoreError
from chutes_proto.store import decode, for_driver, run_script, schema, statement


class OwnStore:
    def __init__(self):
        self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._lock = threading.Lock()
        for text in schema("sqlite"):
            self._connection.execute(text)
        self._connection.execute("PRAGMA foreign_keys = 1")

    def close(self):
        self._connection.close()

    def transact(self, unit):
        with self._lock:
            self._connection.execute("BEGIN")
            try:
                result = run_script(unit.script(), self._perform)
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")  # an answer leaves only after this
            return result

    def _perform(self, operation):
        text, values = statement(operation)
        try:
            rows = self._connection.execute(for_driver(text, "sqlite"), values).fetchall()
        except sqlite3.Error as exc:
            raise StoreError(str(exc)) from exc
        return decode(operation, rows)
