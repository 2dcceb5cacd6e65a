"""What the memory store adds to the contract: it says when it is misused."""

from __future__ import annotations

import pytest
from attrs import frozen

from chutes_proto.errors import LocalProtocolError
from chutes_proto.store._memory import MemoryStore
from chutes_proto.store._run import Script, Unit
from chutes_proto.store.rows import RaiseHorizon, ReadTimes, StoreOp
from chutes_proto.testing.store_suite import Ask


def test_a_transaction_inside_a_transaction_is_refused() -> None:
    store = MemoryStore()

    @frozen
    class Outer(Unit[None]):
        def script(self) -> Script[None]:
            yield from RaiseHorizon(5)
            store.transact(Ask(ReadTimes()))

    with pytest.raises(LocalProtocolError, match="one transaction at a time"):
        store.transact(Outer())
    assert store.transact(Ask(ReadTimes())).horizon == 0


def test_a_stranger_is_no_operation() -> None:
    @frozen
    class Stranger(StoreOp[None]):
        pass

    with pytest.raises(TypeError, match="Stranger is not a row operation"):
        MemoryStore().transact(Ask(Stranger()))


def test_a_unit_without_a_script_says_so() -> None:
    with pytest.raises(NotImplementedError):
        MemoryStore().transact(Unit[None]())
