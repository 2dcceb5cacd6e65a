"""A PostgreSQL with a synchronous standby: what was acknowledged is there after a fail-over."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest
import trio

import chutes_proto_trio
from chutes_proto.errors import FateUnknown, StoreBusy
from chutes_proto.io.stores.postgres import PostgresStore, transactions
from chutes_proto.secret import Secret
from chutes_proto.store._rows import ReadTimes, Vm
from chutes_proto.store._run import Ask
from chutes_proto.testing.store_suite._parts import VAULT, VM, boot
from tests.postgres import PASSWORD, Cluster
from tests.scenario import operations
from tests.scenario.operations import Site, code
from tests.store.harness import together
from tests.store.test_postgres import ask, told
from tests.waiting import wait_until

STREAMING = {"wal_level": "replica", "max_wal_senders": "4", "wal_keep_size": "256MB"}


@pytest.fixture
def clusters(postgres_programs: Path) -> Iterator[tuple[Cluster, Cluster]]:
    """A primary, and its standby, which is not synchronous yet."""
    with ExitStack() as stack:
        primary = Cluster(postgres_programs, None, STREAMING)
        stack.callback(primary.remove)
        standby = Cluster(postgres_programs, primary, STREAMING)
        stack.callback(standby.remove)
        yield primary, standby


def make_synchronous(url: str) -> None:
    """Let every commit from now on wait for the standby."""
    ask(url, "ALTER SYSTEM SET synchronous_standby_names = 'standby'")
    ask(url, "SELECT pg_reload_conf()")
    _ = wait_until(lambda: ask(url, "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))


def end_the_wait(url: str, how: str = "pg_cancel_backend") -> None:
    """Wait for a commit that waits for the standby, and end that."""
    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    _ = wait_until(lambda: ask(url, waiting))
    ask(url, f"SELECT {how}(pid) FROM ({waiting}) AS waiting")


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

    with closing(PostgresStore(url, busy_seconds=60, make=True, vault=VAULT)) as store:
        make_synchronous(url)
        for number in range(8):  # the driver has prepared its statements then
            boots(store, f"vm-{number}")
        standby.stop()
        calls: list[Callable[[], None]] = [partial(boots, store, "vm-lost"), partial(end_the_wait, url, how)]
        (outcome,) = together(calls)
        assert type(outcome) is FateUnknown
        assert re.search(rf"{text} at the commit.*; the change may be committed or not", str(outcome))
        assert PASSWORD not in str(outcome)
        assert (store.retries, store._pool.idle) == (0, [])
    primary.stop(signal.SIGQUIT)
    standby.start()
    ask(standby.url(), "SELECT pg_promote()")
    assert ask(standby.url(), "SELECT 1 FROM vm WHERE vm = 'vm-lost'") == []
    with closing(PostgresStore(standby.url(), vault=VAULT)) as store:
        for name in list(acknowledged):
            boots(store, name)


def test_what_waits_for_a_standby_that_is_away_names_it(
    clusters: tuple[Cluster, Cluster], postgres_programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as `pg_receivewal`. PostgreSQL says only that the commit, or a lock that it holds, takes too long.

    A base backup, which is made meanwhile, is no standby.
    """
    primary, standby = clusters
    url = primary.url()
    back_up = f"{postgres_programs}/pg_basebackup --pgdata backup --max-rate 32 --checkpoint fast --no-sync"
    monkeypatch.setattr(transactions, "_SILENCE", 1)
    with closing(PostgresStore(url, busy_seconds=0.5, make=True, vault=VAULT)) as store:
        make_synchronous(url)
        assert not store.replication.missing
        standby.stop()
        backing_up = primary.begin(f"exec {back_up} --dbname '{url}'")
        _ = wait_until(lambda: ask(url, "SELECT 1 FROM pg_stat_replication"))
        _ = wait_until(lambda: store.transact(Ask(ReadTimes())) and store.replication.missing)
        names = r".*no standby streams, and synchronous_standby_names names one: .*start it"
        told(lambda: store.transact(boot("1")), f"lost at the commit.*{names}", FateUnknown)
        told(lambda: store.transact(boot("2")), f"another transaction takes too long.*{names}", StoreBusy)
        (note,) = store.notes
        assert note == store.replication_warning
        assert note.startswith("store: no standby streams, and synchronous_standby_names names one")
        ask(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_replication")
        assert backing_up.wait()
        standby.start()
        _ = wait_until(lambda: ask(url, "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))
        assert store.transact(boot("3")).root is not None
        _ = wait_until(lambda: store.transact(Ask(ReadTimes())) and not store.notes)


@pytest.mark.trio
async def test_a_client_hears_503_where_a_commit_was_cancelled_and_boots_again(
    clusters: tuple[Cluster, Cluster],
) -> None:
    """Over HTTPS. Nobody knows what became of that boot, so that it is not answered with a key."""
    primary, standby = clusters
    url = primary.url()
    with closing(PostgresStore(url, busy_seconds=60, make=True, vault=VAULT)) as store:
        make_synchronous(url)
        site = Site(chutes_proto_trio, store)
        async with site.serving(), operations.Vm(site) as vm, vm.stranger() as again:
            key = (await vm.boot())["key"]
            nonce = await vm.nonce()
            standby.stop()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, partial(end_the_wait, url))
                answer = await vm.attest(nonce)
            assert code(answer) == (503, "store_unavailable")
            assert int(answer.headers["retry-after"]) > 0
            assert store._pool.idle == []  # the session whose commit it was is closed
            (refused,) = [record.fields for record in site.log if record.event == "refused"]
            assert "the database warned" in str(refused["reason"])
            assert PASSWORD not in str(refused)
            standby.start()
            assert (await again.boot())["key"] == key
