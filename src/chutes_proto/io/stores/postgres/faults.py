"""The errors of PostgreSQL as errors of a store, and whether the same transaction may be run again."""

from __future__ import annotations

import re
from typing import Final

import psycopg
from psycopg import errors

from chutes_proto.errors import StoreAway, StoreBusy, StoreError
from chutes_proto.io.stores import MAKE_SPACE

TEMPORARY: Final = {
    "": "the connection to the database failed",
    "40001": "other transactions got in the way every time",
    "40P01": "other transactions got in the way every time",
    "55P03": "another transaction takes too long",
    "57014": "a statement was cancelled",
    "57P01": "the database is shutting down",
    "57P02": "the database is shutting down",
    "57P03": "the database is starting up or shutting down",
    "57P05": "the session was idle for too long",
    "25P03": "the session was idle for too long",
    "53300": "the database has no connection left",
    "08P01": "the connection pooler lost the database, or refused",
}
"""SQLSTATEs of temporary faults."""

_AWAY: Final = frozenset({"", "57P01", "57P02", "57P03", "08P01"})
"""Those of a database that answers nobody now; without one the driver says so, not the database."""

_WAITED: Final = frozenset({"55P03", "57014"})
"""Those of a statement that was cancelled because it waited for another transaction, which may wait for a standby."""

FAULTS: Final = {
    "53100": f"the database's disk is full; this transaction changed nothing; {MAKE_SPACE}",
    "25006": "the database is read-only, and this transaction changed nothing; is its disk full, or"
    " default_transaction_read_only set?",
    "42501": "the database's user may not do that; it must own the tables, or be granted to read and write them",
    "42P01": "a table is missing; stop the server and restore a backup",
    "XX001": "the database is damaged; stop the server and restore a backup",
    "XX002": "the database is damaged; stop the server and restore a backup",
}
"""SQLSTATEs of faults that an operator must repair."""

_OF_CERTIFICATE: Final = (
    "the certificate must be valid now, name this host, and lead to a CA in the file that sslrootcert of the URL names;"
    " a new file is read without a restart"
)

_ADVICE: Final = {
    "no password supplied": "give a password file of mode 0600, with a line for this host, port and database",
    "certificate verify failed": _OF_CERTIFICATE,
    "does not match host name": _OF_CERTIFICATE,
    "root certificate file": _OF_CERTIFICATE,
    "session is read-only": "is it a standby, its disk full, or default_transaction_read_only set?",
}
"""Advice on a connection that is refused, by a part of libpq's text, which no program of ours translates."""

_ADVICE_OF_LIBPQ: Final = re.compile(r" Either provide the file\b.*?\bdisable server certificate verification\.")
"""libpq's own advice. Without verification any party in the network gets the password, and is the database."""

AGAIN: Final = (errors.SerializationFailure, errors.DeadlockDetected, errors.UniqueViolation)
"""Errors that only concurrent transactions cause. A row that exists already may be one of another transaction of the
same moment: then the next run sees it. If it is not, the next run fails in the same way. See "Serialization Failure
Handling" in PostgreSQL's documentation."""

NOT_PREPARED: Final = (errors.InvalidSqlStatementName, errors.DuplicatePreparedStatement)
"""Errors of a session that is not the one in which statements were prepared."""

CONFLICTS: Final = (errors.SerializationFailure, errors.DeadlockDetected)

_STATEMENT_MODE: Final = "statement pooling mode"
"""Part of pgbouncer's error for a BEGIN, which is not translated and has no SQLSTATE of its own."""


class Again(Exception):
    """A transaction that left no trace and may be run again; ``fault`` is raised when no time is left.

    ``is_ahead``: with nothing read ahead, where the fault may lie.
    """

    def __init__(self, fault: StoreError, *, is_ahead: bool = False) -> None:
        super().__init__(fault)
        self.fault = fault
        self.is_ahead = is_ahead


def translated(name: str, exc: psycopg.Error, hint: str = "") -> StoreError:
    """Return our error for PostgreSQL's; with only the first line of its text, because others quote rows.

    ``hint`` is added where a statement has waited for too long.
    """
    state = exc.sqlstate or ""
    lines = str(exc).splitlines()
    text = exc.diag.message_primary or (lines[0] if lines else type(exc).__name__)
    if _STATEMENT_MODE in text:
        return fault_of(name, f"{text}; set pool_mode of the connection pooler to transaction or session")
    if fault := TEMPORARY.get(state):
        kind = StoreAway if state in _AWAY else StoreBusy
        return kind(f"store {name}: {fault} ({text}){hint if state in _WAITED else ''}")
    # The text names another file each time, and a server logs each new text as a new fault.
    if isinstance(exc, errors.DiskFull):
        return fault_of(name, FAULTS[state])
    return fault_of(name, f"{FAULTS.get(state, 'PostgreSQL refused')} ({text})")


def not_connected(name: str, exc: psycopg.Error) -> StoreAway:
    """Return the error of a connection that was refused, or not answered, with what to do."""
    text = _ADVICE_OF_LIBPQ.sub("", " ".join(str(exc).split()))
    advice = dict.fromkeys(advice for part, advice in _ADVICE.items() if part in text)
    return StoreAway(f"store {name}: {'; '.join([f'no connection to the database: {text}', *advice])}")


def standby(name: str) -> StoreAway:
    """Return the error where a pooler leads to a standby, as it may for seconds while the primary changes."""
    return StoreAway(f"store {name}: it leads to a standby, which only reads")


def fault_of(name: str, what: str) -> StoreError:
    """Return the error of the store with this name, for which something is wrong."""
    return StoreError(f"store {name}: {what}")
