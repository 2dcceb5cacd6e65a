"""The sessions that lock our tables, for the error of one who waited for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chutes_proto.quote._terms import rfc3339

if TYPE_CHECKING:
    from chutes_proto.io.stores.postgres.exchange import Rows

STRANGERS: Final = (
    # A role that is not a monitor sees NULL for what the sessions of others do.
    "SELECT pid, usename, application_name, state, extract(epoch FROM min(xact_start))::bigint,"
    " string_agg(DISTINCT relname, ', ') FROM pg_locks JOIN pg_stat_activity USING (pid)"
    " JOIN pg_class ON pg_class.oid = relation"
    " WHERE mode <> 'AccessShareLock' AND application_name <> current_setting('application_name')"
    " AND pid <> pg_backend_pid() AND relkind = 'r'"
    " AND relnamespace = current_schema()::regnamespace AND datname = current_database()"
    " GROUP BY 1, 2, 3, 4 ORDER BY min(xact_start) LIMIT 3"
)
"""The statement that lists the sessions of other programs that keep units waiting, the oldest transaction first.

Servers call themselves alike: to end the session of one that commits may lose that. One that itself waits for its
lock keeps units waiting, too: PostgreSQL lets nobody pass it. One that only reads does not.
"""


def described(sessions: Rows) -> str:
    """Return what `STRANGERS` has found, for an error; empty for none."""
    return "; ".join(
        f"session {pid} of {user} ({program or 'no name'}, {state or 'its state is hidden from this role'}"
        f"{f', in a transaction since {rfc3339(since)}' if since else ''}) locks {tables}"
        for pid, user, program, state, since, tables in sessions
    )
