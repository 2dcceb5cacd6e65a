"""A PostgreSQL with a synchronous standby: what was acknowledged is there after a fail-over."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest

from chutes_proto.errors import StoreError
from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.secret import Secret
from chutes_proto.store.rows import Vm
from chutes_proto.testing.store_suite import VM, boot
from tests.postgres import PASSWORD, Cluster
from tests.store.harness import together
from tests.store.test_postgres import ask
from tests.waiting import wait_until

STREAMING = {"wal_level": "replica", "max_wal_senders": "4"}


@pytest.fixture
def clusters(postgres_programs: Path) -> Iterator[tuple[Cluster, Cluster]]:
    """A primary, and its standby, which is not synchronous yet."""
    with ExitStack() as stack:
        primary = Cluster(postgres_programs, None, STREAMING)
        stack.callback(primary.remove)
        standby = Cluster(postgres_programs, primary, STREAMING)
        stack.callback(standby.remove)
        yield primary, standby


@pytest.mark.parametrize(
    ("how", "options", "text"),
    [
        ("pg_cancel_backend", "", "the database warned"),
        ("pg_cancel_backend", "-cclient_min_messages=error", "the database warned"),
        ("pg_terminate_backend", "", "the connection was lost"),
    ],
)
def test_a_commit_whose_wait_for_the_standby_ended_early_is_not_acknowledged(
    clusters: tuple[Cluster, Cluster], how: str, options: str, text: str
) -> None:
    """PostgreSQL has committed then, with a warning, and the standby knows nothing of it."""
    primary, standby = clusters
    url = primary.url(options=options)
    acknowledged: dict[str, Secret] = {}

    def boots(store: PostgresStore, name: str) -> None:
        root = store.transact(boot(f"{store.name} {name}", vm=Vm(VM.hotkey, name))).root
        assert root is not None
        acknowledged.setdefault(name, root)
        assert root == acknowledged[name]

    def end_the_wait() -> None:
        waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        _ = wait_until(lambda: ask(url, waiting))
        ask(url, f"SELECT {how}(pid) FROM ({waiting}) AS waiting")

    with closing(PostgresStore(url, busy_seconds=60, migrate=True)) as store:
        ask(url, "ALTER SYSTEM SET synchronous_standby_names = 'standby'")
        ask(url, "SELECT pg_reload_conf()")
        _ = wait_until(lambda: ask(url, "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))
        for number in range(8):  # the driver has prepared its statements then
            boots(store, f"vm-{number}")
        standby.stop()
        calls: list[Callable[[], None]] = [partial(boots, store, "vm-lost"), end_the_wait]
        (outcome,) = together(calls)
        assert type(outcome) is StoreError
        assert re.search(rf"{text} at the commit.*; what was to be changed may be changed or not", str(outcome))
        assert PASSWORD not in str(outcome)
        assert (store.retries, store._pool.idle) == (0, [])
    primary.stop(signal.SIGQUIT)
    standby.start()
    ask(standby.url(), "SELECT pg_promote()")
    assert ask(standby.url(), "SELECT 1 FROM vm WHERE vm = 'vm-lost'") == []
    with closing(PostgresStore(standby.url())) as store:
        for name in list(acknowledged):
            boots(store, name)
