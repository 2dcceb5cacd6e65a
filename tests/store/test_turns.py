"""Whose turn it is at a store, and a real PostgreSQL that hangs while two hundred requests want it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from attrs import define, evolve, field
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chutes_proto.effects import Transact
from chutes_proto.errors import FateUnknown, StoreAway, StoreBusy
from chutes_proto.io.collateral.aio import open_performer
from chutes_proto.io.drivers.aio import Performer
from chutes_proto.io.loops import Threads
from chutes_proto.io.stores.postgres import PostgresStore, transactions
from chutes_proto.io.stores.turns import open_turns
from chutes_proto.log import Record
from chutes_proto.server import _retry
from chutes_proto.server._app import App
from chutes_proto.server._boot import token_digest
from chutes_proto.server._service import Service
from chutes_proto.server._tokens import RANDOM_SIZE
from chutes_proto.store._rows import ReadTimes, Times, Vm
from chutes_proto.store._run import Ask, Unit
from chutes_proto.store._turns import Turn, Turns
from chutes_proto.testing.store_suite._parts import VAULT, VM, boot, platform
from chutes_proto.wire import json
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.postgres import Cluster, schema
from tests.scenario.operations import FreshCollateral
from tests.server.world import MINER, service
from tests.store.test_postgres_silent import Proxy
from tests.waiting import async_wait_until


class TurnsMachine(RuleBasedStateMachine):
    """Callers come, go and end in any order, beside a model of who runs."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = Turns()
        self.waiting: list[Turn] = []
        self.running: dict[Turn, int] = {}  # and how many had been answered when it began
        self.answered = 0
        self.away = False
        self.asking: set[Turn] = set()

    def begin(self) -> None:
        for turn in self.turns.begin(3):
            assert turn is self.waiting.pop(0)  # the first come first
            self.running[turn] = self.answered
            if self.away:
                self.asking.add(turn)

    @rule()
    def come(self) -> None:
        self.waiting.append(self.turns.ask())
        self.begin()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        turn = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(turn)
        self.turns.leave(turn)
        self.begin()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), found=st.sampled_from(["answered", "away", "unknown"]))
    def end(self, data: st.DataObject, found: Any) -> None:
        turn = data.draw(st.sampled_from([*self.running]))
        began_after = self.running.pop(turn)
        self.asking.discard(turn)
        if found == "answered":
            self.answered, self.away = self.answered + 1, False
        elif found == "away" and began_after == self.answered:
            self.away = True
        self.turns.end(turn, found)
        self.begin()

    @invariant()
    def as_many_run_as_may(self) -> None:
        assert len(self.asking) <= 1
        assert len(self.running) <= 3 + 1
        if self.waiting:
            assert self.asking if self.away else len(self.running) >= 3


TestTurns = TurnsMachine.TestCase
TestTurns.settings = settings(max_examples=50, stateful_step_count=30)


# --- on an event loop ---


@define
class Scripted:
    """A store whose transactions end as the test says."""

    name: str = "scripted"
    callers: int = 2
    outcomes: list[BaseException | None] = field(factory=list[BaseException | None])
    began: list[threading.Event] = field(factory=list[threading.Event])
    goes_on: threading.Event = field(factory=threading.Event)

    def transact(self, unit: Unit[Any]) -> Any:
        outcome = self.outcomes.pop(0) if self.outcomes else None
        mine = threading.Event()
        self.began.append(mine)
        if outcome is None:
            assert self.goes_on.wait(60)
            return 42
        raise outcome


ASK = Ask(ReadTimes())


@pytest.mark.anyio
async def test_who_waits_for_a_turn_holds_no_thread_and_hears_in_time() -> None:
    store: Any = Scripted()
    outcomes: list[object] = []

    async def ask(effect: Transact[Any]) -> None:
        try:
            outcomes.append(await turns.transact(effect))
        except StoreBusy as exc:
            outcomes.append(exc)

    async with open_turns(store) as turns, anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(ask, Transact(ASK, turn_seconds=60, seconds=60))
        await async_wait_until(lambda: len(store.began) == 2)
        with pytest.raises(StoreBusy, match=r"no turn within 0\.0 s"):
            await turns.transact(Transact(ASK, turn_seconds=0.01, seconds=60))
        with anyio.CancelScope() as left:
            left.cancel()
            await turns.transact(Transact(ASK, turn_seconds=60, seconds=60))
        assert len(store.began) == 2
        store.goes_on.set()
    assert outcomes == [42, 42]
    assert len(store.began) == 2


@pytest.mark.anyio
async def test_an_answer_that_does_not_come_in_time_leaves_the_fate_unknown_and_the_end_waits_for_it() -> None:
    store: Any = Scripted()
    async with open_turns(store) as turns:
        with pytest.raises(FateUnknown, match="may be committed or not"):
            await turns.transact(Transact(ASK, turn_seconds=0.01, seconds=0.05))
        assert turns._turns._running
        store.goes_on.set()
    assert not turns._turns._running


class NoThread(threading.Thread):
    """A thread of which the system allows no more."""

    def start(self) -> None:
        raise RuntimeError("can't start new thread")


@pytest.mark.anyio
async def test_where_no_thread_can_be_started_a_transaction_waits_for_one_or_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store: Any = Scripted()
    effect = Transact(ASK, turn_seconds=60, seconds=60)
    outcomes: list[object] = []

    async def ask() -> None:
        outcomes.append(await turns.transact(effect))

    async with open_turns(store) as turns:
        with monkeypatch.context() as patch:
            patch.setattr("chutes_proto.io.loops.Thread", NoThread)
            with pytest.raises(StoreAway, match="store scripted: can't start new thread"):
                await turns.transact(effect)
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await async_wait_until(lambda: len(store.began) == 1)
            with monkeypatch.context() as patch:
                patch.setattr("chutes_proto.io.loops.Thread", NoThread)
                group.start_soon(ask)
                await async_wait_until(lambda: turns._running == 2)
            store.goes_on.set()
    assert outcomes == [42, 42]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_work_may_end_after_its_loop(backend: str) -> None:
    goes_on = threading.Event()

    async def leave() -> None:
        threads = Threads("left")
        threads.run(goes_on.wait, lambda _: None)
        threads.close()

    anyio.run(leave, backend=backend)
    (left,) = (each for each in threading.enumerate() if each.name == "left")
    goes_on.set()
    left.join()


@pytest.mark.anyio
async def test_the_thread_that_was_free_last_does_the_next_work() -> None:
    threads = Threads("free")
    both = threading.Barrier(2)
    done: list[int] = []

    def meet() -> int:
        _ = both.wait(60)
        return threading.get_ident()

    async def do(*works: Callable[[], int]) -> None:
        so_many = len(done) + len(works)
        for work in works:
            threads.run(work, done.append)
        await async_wait_until(lambda: len(done) == so_many)

    await do(meet, meet)
    for _ in range(4):
        await do(threading.get_ident)
    threads.close()
    assert len({*done[:2]}) == 2
    assert done[1:] == [done[1]] * 5


@pytest.mark.anyio
async def test_a_thread_that_waits_for_work_keeps_nothing_of_the_last_one() -> None:
    class HasSecrets:
        pass

    async def do() -> weakref.ref[HasSecrets]:
        unit, done = HasSecrets(), list[object]()
        threads.run(lambda: hash(unit), done.append)
        await async_wait_until(lambda: done)
        return weakref.ref(unit)

    threads = Threads("idle")
    kept = await do()
    await async_wait_until(lambda: kept() is None)
    threads.close()


@pytest.mark.anyio
async def test_one_caller_asks_a_store_that_is_away_and_the_others_follow_its_answer() -> None:
    store: Any = Scripted(outcomes=[StoreAway("away")] * 4)
    store.goes_on.set()
    outcomes: list[object] = []

    async def ask() -> None:
        try:
            outcomes.append(await turns.transact(Transact(ASK, turn_seconds=60, seconds=60)))
        except StoreAway as exc:
            outcomes.append(exc)

    async with open_turns(store) as turns, anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(ask)
    assert len([outcome for outcome in outcomes if outcome == 42]) == 16
    assert len(store.began) == 20


@define
class Gathering(Scripted):
    """A store that is handed several units at once."""

    callers: int = 4
    handed: list[int] = field(factory=list[int])

    def transact_all(self, units: Sequence[Unit[Any]]) -> list[tuple[Any, BaseException | None]]:
        self.handed.append(len(units))
        return [(self.transact(unit), None) for unit in units]


@pytest.mark.anyio
async def test_a_store_that_shares_commits_is_handed_all_that_gathered_meanwhile() -> None:
    store = Gathering()
    durable: Any = store
    answers: list[object] = []

    async def ask() -> None:
        answers.append(await turns.transact(Transact(ASK, turn_seconds=60, seconds=60)))

    async with open_turns(durable) as turns, anyio.create_task_group() as group:
        group.start_soon(ask)
        await async_wait_until(lambda: store.handed == [1])
        for _ in range(8):
            group.start_soon(ask)
        await async_wait_until(lambda: len(turns._ready) + len(turns._waiting) == 8)
        store.goes_on.set()
    assert answers == [42] * 9
    assert store.handed == [1, 4, 4]


@pytest.mark.anyio
async def test_transactions_of_one_round_of_the_loop_share_a_commit_once_several_callers_come() -> None:
    store: Any = Gathering()
    store.goes_on.set()
    async with open_turns(store) as turns:
        for at_once in (1, 3, 3, 1, 1):
            async with anyio.create_task_group() as group:
                for _ in range(at_once):
                    group.start_soon(turns.transact, Transact(ASK, turn_seconds=60, seconds=60))
    assert store.handed == [1, 1, 2, 3, 1, 1]


# --- a database that hangs, and many requests ---

CALLERS = 200
REQUESTS = 16
"""Threads of one process for the store."""
SLOW_SECONDS = 15.0
"""How much later than it decided a loaded machine may answer."""


@define
class Asked:
    """What became of each request, and after how many seconds."""

    answers: list[tuple[HttpResponse, float]] = field(factory=list)
    log: list[Record] = field(factory=list)

    def statuses(self) -> list[int]:
        return sorted({response.status for response, _ in self.answers})


@define
class Counted:
    """A store, and in how many threads it is."""

    store: PostgresStore
    now: int = 0
    most: int = 0
    _lock: Any = field(factory=threading.Lock)

    def transact(self, unit: Unit[Any]) -> Any:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            return self.store.transact(unit)
        finally:
            with self._lock:
                self.now -= 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@pytest.fixture
def url(cluster: Cluster) -> Iterator[str]:
    with schema(cluster.url()) as url:
        PostgresStore(url, make=True, vault=VAULT).close()
        yield url


@contextmanager
def hanging(cluster: Cluster) -> Iterator[Callable[[], None]]:
    """The database's processes stand still."""
    processes = cluster.processes()

    def send(number: signal.Signals) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # the database ends some of its own
                os.kill(process, number)

    try:
        send(signal.SIGSTOP)
        yield lambda: send(signal.SIGCONT)
    finally:
        send(signal.SIGCONT)


TOKENS = service().tokens


def token_of(number: int) -> bytes:
    """A token that the server recognises as its own: strangers have fewer places to wait than there are callers."""
    return TOKENS.issue(number.to_bytes(RANDOM_SIZE, "big")).reveal()


def sync(number: int, hotkey: str = VM.hotkey) -> HttpRequest:
    """A sync by the boot token of a VM."""
    body = json.encode({"volumes": ["storage", "tdx-cache"]})
    headers = {"host": "keys", "x-boot-token": token_of(number).decode(), "x-chutes-hotkey": hotkey}
    return HttpRequest("POST", f"/servers/vm-{number}/luks", tuple(headers.items()), body, peer_address="192.0.2.1")


def listing() -> HttpRequest:
    """Operation 6, which clients ask for again."""
    nonce = str(int(time.time()))
    message = f"{MINER.hotkey.address}:{nonce}:tee".encode()
    headers = {"x-chutes-hotkey": MINER.hotkey.address, "x-chutes-nonce": nonce}
    headers["x-chutes-signature"] = MINER.sign(message).hex()
    return HttpRequest("GET", "/servers/", tuple(headers.items()), peer_address="192.0.2.2")


async def ask(performer: Performer, app: App, request: HttpRequest, asked: Asked) -> None:
    arrived = anyio.current_time()
    response = await performer.run(app.handle(evolve(request, arrived=arrived)))
    asked.answers.append((response, anyio.current_time() - arrived))


@asynccontextmanager
async def served(store: PostgresStore, served: Service, asked: Asked) -> AsyncIterator[Callable[..., None]]:
    """What lets the server answer a request in a task of its own; the end waits for all answers."""
    app = App(served)
    async with (
        open_performer(store, FreshCollateral(), log=asked.log.append) as performer,
        anyio.create_task_group() as group,
    ):

        def answer(request: HttpRequest, into: Asked = asked) -> None:
            _ = group.start_soon(ask, performer, app, request, into)

        yield answer


@pytest.mark.anyio
async def test_a_database_that_hangs_for_a_while_serves_all_that_waited(
    url: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clients' patience is longer here: a loaded machine takes its time for so many answers."""
    monkeypatch.setattr(_retry, "LAST_START_SECONDS", 100.0)
    monkeypatch.setattr(_retry, "LATEST_ANSWER_SECONDS", 100.0)
    asked, quick = Asked(), Asked()
    with closing(PostgresStore(url, connections=REQUESTS, vault=VAULT)) as store:
        the_service = service()
        for number in range(CALLERS):
            granted = evolve(boot(f"{number}", vm=Vm(VM.hotkey, f"vm-{number}")), platform=platform(f"{number}"))
            digest = token_digest(token_of(number))
            _ = store.transact(evolve(granted, now=int(time.time()), vault=the_service.vault, token_digest=digest))
        counted: Any = Counted(store)
        with hanging(cluster) as go_on:
            async with served(counted, the_service, asked) as answer:
                for number in range(CALLERS):
                    answer(sync(number))
                # How many are in the store at once says nothing: after two seconds, it is found away.
                await async_wait_until(lambda: counted.most)
                for _ in range(20):
                    answer(listing(), quick)
                await async_wait_until(lambda: len(quick.answers) == 20)
                assert not asked.answers
                go_on()
        assert counted.most <= REQUESTS
    assert quick.statuses() == [503]
    assert all(response.header("retry-after") for response, _ in quick.answers)
    assert asked.statuses() == [200]


@pytest.mark.anyio
async def test_a_paused_database_is_asked_by_one_probe_once_it_is_known_to_be_away(
    url: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "_SILENCE", 0.2)
    outcomes: list[object] = []

    async def ask_in_turn() -> None:
        try:
            outcomes.append(await turns.transact(Transact(ASK, turn_seconds=120, seconds=120)))
        except (StoreAway, StoreBusy) as exc:
            outcomes.append(exc)

    with (
        closing(PostgresStore(url, connections=REQUESTS, busy_seconds=0.2, vault=VAULT)) as store,
        hanging(cluster) as go_on,
    ):
        counted: Any = Counted(store)
        first = store.callers
        async with open_turns(counted) as turns, anyio.create_task_group() as group:
            for _ in range(first):
                group.start_soon(ask_in_turn)
            await async_wait_until(lambda: len(outcomes) == first)
            assert any(isinstance(each, StoreAway) for each in outcomes)
            counted.most = 0
            for _ in range(CALLERS):
                group.start_soon(ask_in_turn)
            await async_wait_until(lambda: len(outcomes) == first + 2)
            assert counted.most == 1
            go_on()
    assert len(outcomes) == first + CALLERS
    assert any(isinstance(each, Times) for each in outcomes)


@pytest.mark.anyio
async def test_a_database_that_stays_away_is_asked_by_one_and_nobody_is_answered_late(
    url: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a proxy that swallows everything; its clients' patience is shorter here, so that the test is."""
    last_start, latest = 6.0, 8.0
    monkeypatch.setattr(_retry, "LAST_START_SECONDS", last_start)
    monkeypatch.setattr(_retry, "LATEST_ANSWER_SECONDS", latest)
    monkeypatch.setattr(transactions, "_SILENCE", 0.5)
    asked = Asked()
    with (
        closing(Proxy(cluster)) as proxy,
        closing(PostgresStore(proxy.url(url, cluster), connections=REQUESTS, busy_seconds=0.5, vault=VAULT)) as store,
    ):
        store.transact(ASK)
        proxy.mute.set()
        before = proxy.connections
        async with served(store, service(), asked) as answer:
            for number in range(CALLERS):
                answer(sync(number))
    assert asked.statuses() == [503]
    assert all(response.header("retry-after") for response, _ in asked.answers)
    assert last_start - 1 < min(took for _, took in asked.answers)
    assert max(took for _, took in asked.answers) < latest + SLOW_SECONDS
    # Those that began before it was found away, and then one every two seconds, which is the time to connect.
    assert proxy.connections - before <= REQUESTS + 1 + (latest + SLOW_SECONDS) / 2
