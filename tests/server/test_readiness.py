"""The look at the store beside the requests: what makes a server unready, and ready again."""

from __future__ import annotations

import pytest

from chutes_proto.effects import Log, Now, Sleep, Transact, Uptime
from chutes_proto.errors import StoreAway, StoreBusy, StoreError, Unavailable
from chutes_proto.server._readiness import Readiness, Revoked, watch_store
from chutes_proto.store._rows import KeyServer, NoteKeyServer
from chutes_proto.store._run import Ask
from chutes_proto.units.revocations import ReadRevocations, Revocations


def test_only_a_fault_that_an_operator_must_mend_makes_a_server_unready() -> None:
    """But that the store is away is logged, too: no boot may come meanwhile that says so."""
    readiness = Readiness()
    revoked, read = Revoked(), Revocations(7)
    flow = watch_store(readiness, revoked)
    faults: list[StoreError | None] = [None, StoreBusy("busy"), StoreAway("away"), StoreBusy("busy"), StoreAway("it")]
    faults += [StoreError("newer"), StoreBusy("busy"), None]
    seen, told = [], []
    effect = next(flow)
    for fault in faults:
        assert isinstance(effect, Now)
        assert isinstance(flow.send(100), Uptime)
        assert flow.send(1.0) == Transact(ReadRevocations(revoked.now))
        effect = flow.send(read) if fault is None else flow.throw(fault)
        seen.append(readiness.fault)
        assert revoked.now is read
        while isinstance(effect, Log):
            told.append((effect.record.event, dict(effect.record.fields)))
            effect = flow.send(None)
        assert effect == Sleep(1.0)
        effect = flow.send(None)
    assert seen == [None, None, None, None, None, "newer", "newer", None]
    away, refused = ("store_away", {"error": "away"}), ("store_refused", {"error": "newer"})
    assert told == [away, refused, ("store_back", {}), ("store_accepted", {})]
    flow.close()
    readiness.fault = "newer"
    with pytest.raises(Unavailable, match="cannot be used"):
        readiness.require()


def test_a_store_that_is_read_and_takes_no_change_makes_a_server_unready() -> None:
    readiness, note = Readiness(), NoteKeyServer(KeyServer("one", "1", "{}", 0))
    faults: list[StoreError | None] = [StoreBusy("away"), StoreError("read-only"), StoreBusy("away"), None]
    seen = []
    for fault in faults:
        writing = readiness.attempt_writing(note)
        assert next(writing) == Transact(Ask(note))
        with pytest.raises(StopIteration if fault is None else type(fault)):
            _ = writing.send(None) if fault is None else writing.throw(fault)
        look = watch_store(readiness, Revoked())
        assert isinstance(next(look), Now)
        assert isinstance(look.send(100), Uptime)
        _ = look.send(1.0)
        _ = look.send(Revocations(7))
        seen.append(readiness.fault)
        look.close()
    assert seen == [None, "read-only", "read-only", None]
