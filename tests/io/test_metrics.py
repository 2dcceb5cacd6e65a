"""The metrics of a process follow what they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from chutes_proto.errors import Refused, StoreBusy, StoreError
from chutes_proto.io.server.health import Counts
from chutes_proto.io.server.metrics import Metrics
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.server._config import LimitOptions
from chutes_proto.store._rows import CountStates
from chutes_proto.store._run import Ask, unit_name
from chutes_proto.testing.store_suite._parts import VAULT
from chutes_proto.wire.codes import Code
from tests.server.world import service


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with closing(SqliteStore(tmp_path / "keys.db", vault=VAULT)) as opened:
        yield opened


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"chutes_proto_{name}", labels)


def test_what_is_no_longer_in_the_store_is_counted_as_nothing() -> None:
    metrics = Metrics()
    metrics.count(Counts({"pending": 2, "active": 1}, {"old": 2, "new": 1}, 7))
    metrics.count(Counts({"active": 3}, {"new": 3}, 9))
    assert [value(metrics, "keys", state=state) for state in ("pending", "active")] == [0, 3]
    assert [value(metrics, "sealed_keys", kek=kek) for kek in ("old", "new")] == [0, 3]
    assert value(metrics, "audit_position") == 9


def test_queues_and_conflicts_are_told_while_they_last(store: SqliteStore) -> None:
    metrics, here = Metrics(), service(limits=LimitOptions(verifications=6))
    gauges = ("store_waits", "verifications", "verifications_limit", "host_calls", "connections", "draining")
    store.audit_waits = 12.5
    counts = {"rollbacks_total": {"unit": "grant boot"}, "rows_not_authentic_total": {"table": "vm"}}

    def look(*, draining: bool = False) -> list[float | None]:
        metrics.look(here, store, 5, draining=draining)
        return [value(metrics, name) for name in gauges]

    assert look() == [0, 0, 6, 0, 5, 0]
    assert value(metrics, "audit_waiting_seconds") == 12.5
    with ExitStack() as held:
        for admission, number in ((here.attested, 1), (here.strangers, 2), (here.verifications, 2), (here.hosts, 3)):
            for party in range(number):
                held.enter_context(admission.of(party))
        store.rollbacks["grant boot"] += 2
        store.custody.faults["vm"] += 1
        assert look(draining=True) == [3, 2, 6, 3, 5, 1]
    for _ in range(2):  # a second look counts nothing twice
        assert look()[:4] == [0, 0, 6, 0]
        assert [value(metrics, name, **labels) for name, labels in counts.items()] == [2, 1]


def test_the_ends_of_transactions_are_told_apart() -> None:
    metrics, unit = Metrics(), Ask(CountStates())
    errors = {
        "committed": None,
        "refused": Refused(Code.NONCE_INVALID, "x"),
        "busy": StoreBusy("x"),
        "failed": StoreError("x"),
        "defect": RuntimeError("x"),
    }
    for error in errors.values():
        metrics.transaction(unit, error)
    assert [value(metrics, "transactions_total", unit=unit_name(unit), result=each) for each in errors] == [1] * 5
