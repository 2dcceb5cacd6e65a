"""The waits for a connection's peer, and for anything until a deadline, on both loops."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial

import anyio
import anyio.lowlevel
import pytest
import trio
from attrs import define, field

from chutes_proto.io import trio_loop
from chutes_proto.io.loops import AsyncioPeer, call_at, call_next, clock, open_group, peer, reading, wait
from chutes_proto.io.trio_loop import MAX_CANCELLED
from chutes_proto.io.waits import Peer
from chutes_proto.transport.h1 import READ_SIZE
from tests.waiting import async_wait_until

pytestmark = pytest.mark.anyio


@define
class Connection:
    deadline: float = math.inf


@define
class Ends:
    """Both ends of a socket: ours waits for the other one."""

    ours: socket.socket
    other: socket.socket
    connection: Connection = field(factory=Connection)

    @contextmanager
    def peer(self) -> Iterator[Peer]:
        with closing(peer()(self.ours, self.connection)) as waiting:
            yield waiting


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, other = socket.socketpair()
    with ours, other:
        ours.setblocking(False)
        yield Ends(ours, other)


async def received(waiting: Peer, into: list[bytes | None]) -> None:
    into.append(await waiting.receive())


async def test_bytes_that_come_while_nobody_waits_are_kept_and_the_loop_has_its_rest(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    read = AsyncioPeer._read

    def counted(self: AsyncioPeer) -> None:
        nonlocal calls
        calls += 1
        read(self)

    monkeypatch.setattr(AsyncioPeer, "_read", counted)
    with ends.peer() as waiting:
        ends.other.send(b"first")
        assert await waiting.receive() == b"first"
        ends.other.send(b"second")
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        assert calls <= 2  # one that read, one that found nobody waiting
        assert await waiting.receive() == b"second"
        ends.other.send(bytes(READ_SIZE + 1))
        assert [len(await waiting.receive() or b"") for _ in range(2)] == [READ_SIZE, 1]
        ends.other.close()
        assert await waiting.receive() == b""
        assert await waiting.receive() == b""


async def test_a_wait_ends_at_the_deadline_of_the_time_wherever_that_moves(ends: Ends) -> None:
    now = clock()
    with ends.peer() as waiting:
        ends.connection.deadline = now() + 3600
        ends.other.send(b"a")
        assert await waiting.receive() == b"a"
        ends.connection.deadline = now() + 0.01  # sooner, before the wait
        assert await waiting.receive() is None
        assert now() >= ends.connection.deadline

        ends.connection.deadline = before = now() + 0.01
        waiting.look()
        ends.connection.deadline = math.inf  # later, and the time of before passes within the wait
        got: list[bytes | None] = []
        async with anyio.create_task_group() as group:
            group.start_soon(received, waiting, got)
            _ = await async_wait_until(lambda: now() > before)
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            assert got == []
            ends.connection.deadline = -math.inf  # sooner, within the wait
            waiting.look()
        assert got == [None]


async def test_a_wait_that_is_cancelled_takes_nothing_with_it(ends: Ends) -> None:
    with ends.peer() as waiting:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await waiting.receive()
        ends.other.send(b"a")
        assert await waiting.receive() == b"a"


async def test_all_is_sent_by_the_deadline_or_the_wait_ends(ends: Ends) -> None:
    much = bytes(1 << 22)
    with ends.peer() as waiting:
        taken: list[int] = []
        async with anyio.create_task_group() as group:

            async def take() -> None:
                while sum(taken) < len(much):
                    taken.append(len(await anyio.to_thread.run_sync(ends.other.recv, 1 << 20)))

            group.start_soon(take)
            assert await waiting.send(much)
        ends.connection.deadline = clock()() + 0.01
        assert not await waiting.send(much)


async def test_a_read_goes_on_while_it_is_told_to_and_no_longer_than_its_deadline(ends: Ends) -> None:
    now, read = clock(), reading()
    got: list[bytes] = []

    def take() -> bool:
        got.append(ends.ours.recv(1))
        return got[-1] != b"c"

    ends.other.send(b"abcd")
    await read(ends.ours.fileno(), take, math.inf)
    assert got == [b"a", b"b", b"c"]

    for _ in range(10):
        soon = now() + 0.001
        await read(ends.ours.fileno(), lambda: True, soon)  # it leaves the last byte there, and is called all the time
        assert now() >= soon
    assert ends.ours.recv(1) == b"d"

    soon = now() + 0.01
    await read(ends.ours.fileno(), take, soon)  # nothing comes
    assert now() >= soon
    assert got == [b"a", b"b", b"c"]


async def test_a_read_that_ends_leaves_the_descriptor_to_others(
    ends: Ends, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[bytes] = []

    def take() -> bool:
        calls.append(ends.ours.recv(1))
        return False

    async def read(deadline: float) -> None:
        try:
            await reading()(ends.ours.fileno(), take, deadline)
        finally:
            assert loop == "trio" or not asyncio.get_running_loop().remove_reader(ends.ours.fileno())

    ends.other.send(b"a")
    await read(-math.inf)  # on asyncio, byte and deadline come in one round
    with anyio.CancelScope() as scope:
        scope.cancel()
        await read(math.inf)
    assert scope.cancelled_caught
    ends.other.send(b"b")
    called = len(calls)
    await anyio.wait_readable(ends.ours)  # on trio two may not
    assert len(calls) == called
    assert not caplog.records


@pytest.mark.parametrize("loop", ["asyncio"])
async def test_a_caller_that_leaves_reads_nothing_that_came_in_the_same_round(ends: Ends) -> None:
    """On trio it is the caller's own task that reads."""
    calls: list[str] = []

    def go_on() -> bool:
        calls.append("called")
        return False

    async with anyio.create_task_group() as group:
        group.start_soon(reading(), ends.ours.fileno(), go_on, math.inf)
        await anyio.wait_all_tasks_blocked()
        ends.other.send(b"a")
        _ = asyncio.get_running_loop().call_soon(group.cancel_scope.cancel)
    assert not calls


async def test_a_deadline_that_passes_ends_a_send_by_no_error(ends: Ends) -> None:
    now = clock()
    sent: list[bool] = []

    async def send() -> None:
        sent.append(await waiting.send(bytes(1 << 22)))

    with ends.peer() as waiting:
        async with anyio.create_task_group() as group:
            group.start_soon(send)
            await anyio.wait_all_tasks_blocked()
            soon = now() + 0.01
            for deadline in (soon, math.inf):  # the timer stays as it is where the deadline moves to a later time
                ends.connection.deadline = deadline
                waiting.look()
            ends.connection.deadline = soon  # as if it passed at the moment at which the timer goes off
            _ = await async_wait_until(lambda: now() > soon)
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            waiting.look()
    assert sent == [False]


async def test_a_peer_that_went_away_is_an_error_of_the_system(ends: Ends) -> None:
    with ends.peer() as waiting:
        ends.ours.send(b"unread")
        ends.other.close()  # with bytes of ours that it has not read: a reset
        with pytest.raises(ConnectionResetError):
            await waiting.receive()
        with pytest.raises(BrokenPipeError):
            await waiting.send(b"a")


async def test_functions_are_called_at_their_times_in_their_order_unless_they_are_cancelled() -> None:
    now, at = clock(), call_at()
    called: list[str] = []
    start = now()
    _ = at(math.inf, lambda: called.append("never"))
    _ = at(start + 0.03, lambda: called.append("last"))
    _ = at(start + 0.02, lambda: called.append("within"))
    at(start + 0.01, lambda: called.append("cancelled")).cancel()
    _ = at(-math.inf, lambda: called.append("at once"))
    _ = await async_wait_until(lambda: called[-1:] == ["last"])
    assert called == ["at once", "within", "last"]
    assert now() >= start + 0.03
    _ = at(now(), lambda: called.append("anew"))
    _ = await async_wait_until(lambda: called[-1:] == ["anew"])


@pytest.mark.parametrize("loop", ["trio"])
async def test_the_timers_of_trio_let_go_of_those_that_are_cancelled() -> None:
    timers = trio_loop.timers()
    called: list[int] = []
    start = trio.current_time()
    for _ in range(2000):  # these are not in the heap, whether they were called or have no time
        timers.call_at(math.inf, called.clear).cancel()
    over = [timers.call_at(start, called.clear) for _ in range(2000)]
    _ = await async_wait_until(lambda: not timers._heap)
    for timer in over:
        timer.cancel()
    left = [timers.call_at(start + 3600 - i, partial(called.append, i)) for i in range(100)]
    most = 0
    for i in range(20_000):
        timers.call_at(start + 3600 + i, called.clear).cancel()
        most = max(most, len(timers._heap))
    assert most == len(left) + MAX_CANCELLED

    soon = trio.current_time() + 0.01
    for i in range(1500):  # some of them within the time of others
        timers.call_at(soon, called.clear).cancel()
        _ = timers.call_at(soon + i * 1e-6, partial(called.append, i))
    _ = await async_wait_until(lambda: called[-1:] == [1499])
    assert called == list(range(1500))


@pytest.mark.parametrize("loop", ["trio"])
async def test_a_call_that_fails_ends_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """On asyncio the loop sees to that."""
    called: list[str] = []

    def fail() -> None:
        raise LookupError("a defect")

    for later in (partial(call_at(), -math.inf), call_next()):
        _ = later(fail)
        _ = later(partial(called.append, "called"))
    _ = await async_wait_until(lambda: len(called) == 2)
    assert caplog.text.count("LookupError: a defect") == 2


async def test_a_wait_ends_when_it_is_told_to_or_at_its_deadline() -> None:
    now, waiting = clock(), wait()()
    ended: list[float] = []

    async def wait_until(deadline: float) -> None:
        await waiting.until(deadline)
        ended.append(deadline)

    waiting.end()  # nobody waits yet
    for deadline in (-math.inf, now() + 0.01):
        await wait_until(deadline)
        assert now() >= deadline
    soon = now() + 0.1
    async with anyio.create_task_group() as group:
        group.start_soon(wait_until, soon)
        await anyio.lowlevel.checkpoint()
        waiting.end()
        waiting.end()  # the second before the task goes on
    async with anyio.create_task_group() as group:
        group.start_soon(wait_until, math.inf)
        _ = await async_wait_until(lambda: now() > soon)  # the deadline of the wait before
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        assert math.inf not in ended
        waiting.end()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await wait_until(math.inf)
    waiting.end()
    assert scope.cancelled_caught
    await wait_until(now() + 0.01)  # none of all that ended this one
    assert now() >= ended[-1]


@pytest.mark.parametrize("tasks", [1, 2, 5])
async def test_a_group_that_is_cancelled_raises_one_cancellation(tasks: int) -> None:
    raised: list[type[BaseException]] = []

    async def serve() -> None:
        try:
            async with open_group() as group:
                for _ in range(tasks):
                    _ = group.start_soon(anyio.sleep_forever)
                await anyio.sleep_forever()
        except BaseException as exc:
            raised.append(type(exc))
            raise

    async with anyio.create_task_group() as group:
        group.start_soon(serve)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert raised == [anyio.get_cancelled_exc_class()]


async def test_a_call_comes_in_the_next_round_of_the_loop() -> None:
    called: list[int] = []
    call = call_next()

    def first() -> None:
        called.append(1)
        call(lambda: called.append(3))

    for _ in range(2):
        call(first)
        call(lambda: called.append(2))
        assert called == []
        await async_wait_until(lambda: len(called) == 3)
        assert called == [1, 2, 3]
        called.clear()
