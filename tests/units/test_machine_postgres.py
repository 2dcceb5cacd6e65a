"""The same calls in any order, on PostgreSQL too."""

from __future__ import annotations

from contextlib import ExitStack
from math import inf
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.store._run import Unit
from chutes_proto.testing.store_suite._parts import VAULT, dump
from chutes_proto.wire.codes import Code
from tests.conftest import SOAK
from tests.postgres import schema_with_clock
from tests.units.test_machine import STEPS, Calls, T

pytestmark = pytest.mark.no_cover  # to measure what other tests cover doubles the time of these


class PostgresCalls(Calls):
    """The outcomes on PostgreSQL are those on the other stores."""

    database: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.clock: int | None = None
        url, self.set_clock = self.stack.enter_context(schema_with_clock(self.database))
        self.postgres = PostgresStore(url, clock_difference_seconds=inf, make=True, vault=VAULT)
        self.stores.append(self.postgres)

    def do(self, unit: Unit[T]) -> T | Code | str:
        if self.clock != self.now:  # each change costs as much as a unit
            self.set_clock(self.now)
            self.clock = self.now
        return super().do(unit)

    def teardown(self) -> None:
        found = dump(self.postgres)
        self.postgres.close()
        self.stack.close()
        assert found == dump(self.memory)


@pytest.mark.skipif(not SOAK, reason="it runs in make soak: the model drives SQLite, and the contract both")
@pytest.mark.no_cover
def test_calls(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PostgresCalls, "database", database, raising=False)
    few = settings(settings(), max_examples=settings().max_examples // 2, stateful_step_count=STEPS)
    run_state_machine_as_test(PostgresCalls, settings=few)
