"""The three drivers carry out the same effects the same way; what blocks leaves the event loop alone."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import anyio
import anyio.lowlevel
import pytest
import trio
from attrs import define, evolve
from trio.testing import MockClock

from chutes_proto.effects import (
    ActOnDisk,
    CollectGpuEvidence,
    Effect,
    Entropy,
    FetchCollateral,
    Flow,
    Get,
    InspectDisk,
    Log,
    MakeQuote,
    Now,
    Resolve,
    Send,
    Sleep,
    Transact,
    Uptime,
)
from chutes_proto.errors import LocalProtocolError, QuoteUnavailable, StoreBusy, TransportError
from chutes_proto.io.drivers import aio, sync
from chutes_proto.io.drivers.sync import Performer
from chutes_proto.log import LONGEST, Level, Record
from chutes_proto.luks.disk import Blank
from chutes_proto.luks.plan import Action, KeepKey, Key, Keys
from chutes_proto.secret import Secret
from chutes_proto.store._run import Script, Unit
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.loops import on_loop

T = TypeVar("T")
Driver = Callable[..., Any]

REQUEST = HttpRequest("GET", "/")


class Answer(Unit[int]):
    """A unit that no store looks into."""

    def script(self) -> Script[int]:
        raise NotImplementedError


class Store:
    def __init__(self) -> None:
        self.threads: list[int] = []

    def transact(self, unit: Unit[T], /) -> T:
        self.threads.append(threading.get_ident())
        return cast("T", 42)


class SimulatedDisks:
    def __init__(self) -> None:
        self.threads: list[int] = []

    def inspect(self, device: str) -> Blank:
        self.threads.append(threading.get_ident())
        return Blank(device, 512)

    def act(self, action: Action[Any], keys: Keys) -> object:
        self.threads.append(threading.get_ident())
        return action, keys


@define
class Collateral:
    kept: Any = None

    def available(self, identity: Any, now: int) -> Any:
        return self.kept

    def fetch(self, identity: Any, now: int) -> Any:
        return ("collateral", identity, now)


def ask(effect: Effect[T]) -> Flow[T]:
    return (yield from effect)


def by_blocking(flow: Flow[T], send: Any = None, **parts: Any) -> T:
    return Performer(send=send, **parts).run(flow)


def _awaitable(send: Any) -> Callable[[HttpRequest], Awaitable[HttpResponse]] | None:
    async def asynchronous(request: HttpRequest) -> HttpResponse:
        return cast("HttpResponse", send(request))

    return asynchronous if send else None


def by_trio(flow: Flow[T], send: Any = None, **parts: Any) -> T:
    return on_loop("trio", aio.Performer(send=_awaitable(send), **parts).run, flow)


def by_asyncio(flow: Flow[T], send: Any = None, **parts: Any) -> T:
    return on_loop("asyncio", aio.Performer(send=_awaitable(send), **parts).run, flow)


@pytest.fixture(params=[by_blocking, by_trio, by_asyncio])
def drive(request: pytest.FixtureRequest) -> Driver:
    driver: Driver = request.param
    return driver


def test_clocks_and_entropy(drive: Driver) -> None:
    def flow() -> Flow[tuple[int, float, bytes, bytes]]:
        now = yield from Now()
        before = yield from Uptime()
        yield from Sleep(0.05)
        after = yield from Uptime()
        return now, after - before, (yield from Entropy(16)), (yield from Entropy(16))

    now, slept, one, other = drive(flow())
    assert abs(now - time.time()) < 5
    assert isinstance(now, int)
    assert 0.04 < slept < 5
    assert len(one) == len(other) == 16
    assert one != other


def test_a_request_is_sent(drive: Driver) -> None:
    assert drive(ask(Send(REQUEST)), send=lambda request: HttpResponse(200, body=request.target.encode())).body == b"/"


def test_what_sending_raises_is_raised_in_the_flow(drive: Driver) -> None:
    def cut(request: HttpRequest) -> HttpResponse:
        raise TransportError("cut", maybe_delivered=True)

    def flow() -> Flow[str]:
        try:
            _ = yield from Send(REQUEST)
        except TransportError as exc:
            return f"handled: {exc}"
        return "answered"

    assert drive(flow(), send=cut) == "handled: cut"


def test_a_quote_is_made(drive: Driver) -> None:
    assert drive(ask(MakeQuote(b"data")), quoter=lambda data: b"quote of " + data) == b"quote of data"
    with pytest.raises(QuoteUnavailable, match="gave 0 bytes"):
        drive(ask(MakeQuote(b"data")), quoter=lambda data: b"")


def test_a_transaction_is_run(drive: Driver) -> None:
    store = Store()
    assert drive(ask(Transact(Answer())), store=store) == 42
    assert (store.threads == [threading.get_ident()]) == (drive is by_blocking)

    class Busy:
        def transact(self, unit: Unit[T], /) -> T:
            raise StoreBusy("locked")

    with pytest.raises(StoreBusy):
        drive(ask(Transact(Answer())), store=Busy())


def test_disks_are_looked_at_and_acted_on(drive: Driver) -> None:
    disks = SimulatedDisks()
    assert drive(ask(InspectDisk("/dev/vdb")), disks=disks) == Blank("/dev/vdb", 512)
    action, keys = KeepKey("storage", "/dev/vdb", Key.NEXT), {Key.NEXT: Secret(b"n")}
    assert drive(ask(ActOnDisk(action, keys)), disks=disks) == (action, keys)
    assert (disks.threads == [threading.get_ident()] * 2) == (drive is by_blocking)


def test_collateral_is_fetched(drive: Driver) -> None:
    identity: Any = "a platform"
    assert drive(ask(FetchCollateral(identity, 7)), collateral=Collateral()) == ("collateral", "a platform", 7)


def test_available_collateral_is_not_fetched(drive: Driver) -> None:
    source = Collateral("collateral in memory")
    assert drive(ask(FetchCollateral(cast("Any", "a platform"), 7)), collateral=source) == "collateral in memory"


def test_a_name_is_resolved(drive: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    two: Any = [(socket.AF_INET6, 1, 6, "", ("fe80::1%eth0", 0, 0, 2)), (socket.AF_INET, 1, 6, "", ("192.0.2.1", 0))]
    faults = {
        "none": socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        "nothing": socket.gaierror(socket.EAI_NODATA, "No address associated with hostname"),
        "later": socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    }

    def getaddrinfo(name: str, *_: Any, **__: Any) -> Any:
        if name in faults:
            raise faults[name]
        return two * 2

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert drive(ask(Resolve("two"))) == ("fe80::1", "192.0.2.1")
    assert drive(ask(Resolve("none"))) == drive(ask(Resolve("nothing"))) == ()
    with pytest.raises(TransportError, match="later cannot be resolved: Temporary failure"):
        drive(ask(Resolve("later")))


@pytest.mark.parametrize("drive", [by_trio, by_asyncio], indirect=True)
def test_a_loop_does_not_wait_for_a_resolver_for_ever(drive: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [goes_on.wait(60)][1:])
    monkeypatch.setattr(sync, "RESOLVE_SECONDS", 0.05)
    try:
        with pytest.raises(TransportError, match="slow cannot be resolved: no answer within"):
            drive(ask(Resolve("slow")))
    finally:
        goes_on.set()


def test_a_log_that_fails_undoes_nothing(drive: Driver, caplog: pytest.LogCaptureFixture) -> None:
    def full(_: Record) -> None:
        raise OSError("No space left on device")

    def flow() -> Flow[str]:
        yield from Log(Record(Level.INFO, "granted"))
        return "granted"

    assert drive(flow(), log=full) == "granted"
    assert "a log record was lost: granted" in caplog.text


def test_a_record_is_logged(drive: Driver, caplog: pytest.LogCaptureFixture) -> None:
    record = Record(Level.WARNING, "boot_delayed", {"step": "nonce", "wait": 1.5, "volumes": ["a"], "reason": "a\nb"})
    told: list[Record] = []
    assert drive(ask(Log(record)), log=told.append) is None
    assert told == [record]
    drive(ask(Log(record)))
    assert caplog.record_tuples == [
        (
            "chutes_proto",
            logging.WARNING,
            'boot_delayed step="nonce" wait=1.5 volumes=["a"] reason="a\\nb"',
        )
    ]
    drive(ask(Log(evolve(record, fields={"reason": "a" * (2 * LONGEST)}))))
    assert len(caplog.messages[-1]) < LONGEST + 100


@pytest.mark.parametrize(
    ("effect", "part"),
    [
        (Send(REQUEST), "send"),
        (Get("https://localhost"), "get"),
        (MakeQuote(bytes(64)), "quoter"),
        (Transact(Answer()), "store"),
        (FetchCollateral(cast("Any", None), 0), "collateral"),
        (InspectDisk("/dev/vdb"), "disks"),
        (ActOnDisk(KeepKey("storage", "/dev/vdb", Key.NEXT), {}), "disks"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_effect_without_its_part(drive: Driver, effect: Effect[Any], part: str) -> None:
    with pytest.raises(LocalProtocolError, match=f"'{part}'"):
        drive(ask(effect))


def test_the_list_of_effects_is_closed(drive: Driver) -> None:
    class Wish(Effect[None]):
        pass

    with pytest.raises(LocalProtocolError, match="Wish"):
        drive(ask(Wish()))


# --- on an event loop ---


class SlowStore:
    def __init__(self) -> None:
        self.began, self.ended, self.goes_on = threading.Event(), threading.Event(), threading.Event()

    def transact(self, unit: Unit[T], /) -> T:
        self.began.set()
        _ = self.goes_on.wait(60)
        self.ended.set()
        return cast("T", 42)


@pytest.mark.anyio
async def test_a_loop_goes_on_while_a_store_blocks_and_a_cancellation_waits_for_it() -> None:
    store = SlowStore()
    performer = aio.Performer(store=store)
    async with anyio.create_task_group() as group:
        group.start_soon(performer.run, ask(Transact(Answer())))
        _ = await anyio.to_thread.run_sync(store.began.wait, 60)
        group.cancel_scope.cancel()
        store.goes_on.set()
    assert store.ended.is_set()


@pytest.mark.trio
async def test_a_flow_sleeps_on_the_clock_of_its_loop(autojump_clock: MockClock) -> None:
    before = trio.current_time()
    await aio.Performer().run(ask(Sleep(3600.0)))
    assert trio.current_time() - before == pytest.approx(3600)


@pytest.mark.anyio
async def test_a_cancellation_does_not_wait_for_a_quote() -> None:
    began, goes_on = threading.Event(), threading.Event()

    def quoter(report_data: bytes) -> bytes:
        began.set()
        assert goes_on.wait(60)
        return b"late"

    async with anyio.create_task_group() as group:
        group.start_soon(aio.Performer(quoter=quoter).run, ask(MakeQuote(bytes(64))))
        _ = await anyio.to_thread.run_sync(began.wait, 60)
        group.cancel_scope.cancel()
    assert not goes_on.is_set()
    goes_on.set()  # asyncio's thread pool is joined when the loop ends


def test_a_gpu_tool_that_fails_is_a_fault_of_evidence(drive: Driver) -> None:
    """As a quoter's: the flow tries again, and no caller sees an error that is not this project's."""

    def fails(_: bytes) -> bytes:
        raise OSError("no such device")

    ask_for = CollectGpuEvidence(bytes(32))
    assert drive(ask(ask_for), gpu_tool=lambda nonce: b"[%d]" % len(nonce)) == b"[32]"
    with pytest.raises(QuoteUnavailable, match="the GPU tool failed: no such device"):
        drive(ask(ask_for), gpu_tool=fails)
    for nothing in (b"", b" \n"):
        with pytest.raises(QuoteUnavailable, match="no evidence"):
            drive(ask(ask_for), gpu_tool=lambda _, nothing=nothing: nothing)
    for other in ("[]", None):
        with pytest.raises(LocalProtocolError, match=f"gpu_tool: it returned {type(other).__name__}, not the bytes of"):
            drive(ask(ask_for), gpu_tool=lambda _, other=other: other)
