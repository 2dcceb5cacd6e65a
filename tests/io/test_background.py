"""Work beside a server's requests goes on, whatever stops it for a while."""

from __future__ import annotations

from itertools import pairwise

import anyio
import pytest
import trio
from trio.testing import MockClock

from chutes_proto.io import background
from chutes_proto.log import Record


@pytest.mark.anyio
async def test_work_begins_again_and_each_new_exception_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[Exception] = [KeyError("a row"), KeyError("a row"), OSError("no room"), OSError("no room")]
    told: list[Record] = []
    left = anyio.CancelScope()

    async def work() -> None:
        if len(faults) == 1:
            monkeypatch.setattr(background, "LASTING_SECONDS", -1.0)  # the last one comes long after
        if not faults:
            left.cancel()
            await anyio.sleep_forever()
        raise faults.pop(0)

    monkeypatch.setattr(background, "PAUSE_SECONDS", 0)
    with left:
        await background.keep_at(work, told.append)
    assert [record.event for record in told] == ["background_failed"] * 3
    first, *others = (str(record.fields["error"]) for record in told)
    assert first.startswith("KeyError at ")
    assert "a row" not in first
    assert all(other.startswith("no room; OSError at ") for other in others)


@pytest.mark.trio
async def test_work_that_fails_begins_again_after_a_pause(autojump_clock: MockClock) -> None:
    began: list[float] = []

    async def work() -> None:
        began.append(trio.current_time())
        if len(began) == 3:
            await trio.sleep_forever()
        raise OSError("no room")

    with trio.move_on_after(3600):
        await background.keep_at(work, lambda _: None)
    assert [after - before for before, after in pairwise(began)] == [background.PAUSE_SECONDS] * 2
