"""The store in a PostgreSQL database, which several server processes share.

Rules kept here:

* nothing is set for a session: behind a pooler each transaction may meet another session of the database. So what
  begins a transaction makes the settings for that transaction alone;
* a unit takes two round trips, if it says what it reads (`Unit.ahead`): the beginning and these reads are one, all its
  writes and the commit the other. A write waits for the next read, or for the commit;
* such a unit needs no thread (`PostgresStore.attempt`): its waits are generators, as psycopg's own, which an event loop
  or a thread drives. Whatever is out of the ordinary needs one;
* an answer leaves only after its transaction is durable: each transaction sets ``synchronous_commit`` to ``on`` at
  least, and is refused where ``fsync`` or ``full_page_writes`` is off at that moment;
* every transaction is SERIALIZABLE, but that of a unit which says that it ``READS_COMMITTED``; one that PostgreSQL
  could not serialize with others runs again, until ``busy_seconds`` are over;
* a transaction whose connection is lost before the commit was sent never was, and runs again on a new connection; one
  whose connection is lost after that, or whose commit came with a notice, is never run again here: it may be
  committed, and a fail-over may lose it, because a cancelled wait for a synchronous standby succeeds with a warning;
* the database cancels a statement of a unit that takes too long; if it does not answer at all, the connection is
  closed; a check and the operations of operators have no such limit;
* the clocks of this machine and of the database are compared in every transaction: rows are dated by both;
* the database is compared with the mark of what was seen of it (``marks.py``), and a change of its timeline is noticed
  in every transaction: a server that goes on with an old primary would grant what the new one does not know;
* at most ``connections`` are open; each is made by the caller that needs it, which gets the reason if that fails;
* fewer transactions run at once while they conflict with each other (``store/_crowding.py``);
* a database without our schema is refused and not changed; only an operator makes it in an empty one;
* a password is in no name, error or log line.

It needs the extra ``chutes-proto[postgres]``, a database or schema of its own with encoding UTF8, and direct
connections or a pooler that keeps a transaction together.

The modules, each of which imports those before it: ``url.py`` the address of a database; ``exchange.py`` statements in
one round trip; ``connection.py`` a connection; ``faults.py`` the errors of PostgreSQL as ours; ``transactions.py`` all
that begins, ends and bounds a transaction; ``pool.py`` the connections of a process; ``store.py``.
"""

from __future__ import annotations

from chutes_proto.errors import ConfigurationError

try:
    from chutes_proto.io.stores.postgres.store import PostgresStore, Replication
    from chutes_proto.io.stores.postgres.url import has_secret, name_of
except ImportError as _missing:
    raise ConfigurationError(
        f"a store in PostgreSQL needs psycopg, which cannot be imported ({_missing});"
        " install it with: pip install 'chutes-proto[postgres]'"
    ) from None

__all__ = ["PostgresStore", "Replication", "has_secret", "name_of"]
