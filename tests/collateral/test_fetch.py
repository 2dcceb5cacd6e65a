"""Collateral over real HTTP, from the simulated service, on both bindings."""

from __future__ import annotations

import re
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest
from attrs import evolve, frozen

from chutes_proto.collateral import pcs
from chutes_proto.collateral.cache import CachePolicy
from chutes_proto.collateral.platforms import PlatformCache
from chutes_proto.effects import FetchCollateral
from chutes_proto.errors import CollateralUnavailable
from chutes_proto.io.collateral.aio import open_collateral, open_performer
from chutes_proto.io.collateral.directory import CollateralDirectory
from chutes_proto.io.collateral.upstream import UpstreamCollateral
from chutes_proto.io.files import write_file
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.http.tls import client_context
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.log import Record
from chutes_proto.quote._collateral import VerifiedCollateral
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.quote._verify import open_quote
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import VAULT
from chutes_proto.wire.http import TRACEPARENT, HttpResponse
from tests.collateral import network
from tests.collateral.network import PLATFORM, ROOT, Fault, Upstream, running
from tests.io.peers import Credentials, make_credentials
from tests.loops import on_loop
from tests.waiting import async_wait_until, wait_until

PATIENT = TimeLimits(connect=10.0, read=10.0, total=10.0)  # an answer that comes is taken, however busy the machine is
HASTY = TimeLimits(connect=0.4, read=0.4, total=0.5)  # for faults that are a matter of time
UNHEARD = TimeLimits(connect=10.0, read=0.4, total=10.0)  # for silence alone
QUICK = CachePolicy(retry=0, retry_most=0, unknown=600, wait=5.0)
"""Tries again at once, so that each call of a test is a fetch if it needs one."""


def identity(platform: SimulatedPlatform = PLATFORM) -> PckIdentity:
    return open_quote(platform.quote(bytes(64)), now=int(time.time()), root=ROOT).pck


def source(
    *upstreams: Upstream,
    policy: CachePolicy = QUICK,
    directory: Path | None = None,
    context: Any = None,
    limits: TimeLimits = PATIENT,
) -> UpstreamCollateral:
    parsed = [pcs.Upstream.parse(upstream.url) for upstream in upstreams]
    cache = PlatformCache(parsed, root=ROOT, policy=policy, seed=b"of this test")
    return UpstreamCollateral(cache, context or client_context(), directory, limits)


Ask = Callable[..., Awaitable[Any]]


@frozen
class Loop:
    """One of the event loops: runs ``main(fetcher)``, with `together` for many at once."""

    name: str

    def run(self, of: UpstreamCollateral, main: Callable[[Any], Awaitable[Any]]) -> tuple[Any, list[Record]]:
        log: list[Record] = []

        async def opened() -> Any:
            async with open_collateral(of, log=log.append) as fetcher:
                return await main(fetcher)

        return on_loop(self.name, opened), log

    def fetch(self, of: UpstreamCollateral, *platforms: SimulatedPlatform) -> list[Any]:
        """The outcome for each platform, one after the other."""

        async def main(fetcher: Any) -> list[Any]:
            return [await outcome(fetcher, platform) for platform in platforms or (PLATFORM,)]

        result: list[Any] = self.run(of, main)[0]
        return result

    async def together(self, fetcher: Any, platforms: list[SimulatedPlatform]) -> list[Any]:
        outcomes: list[Any] = []

        async def one(who: PckIdentity) -> None:
            outcomes.append(await outcome(fetcher, who))

        identities = {platform.fmspc: identity(platform) for platform in platforms}
        async with anyio.create_task_group() as tasks:
            for platform in platforms:
                tasks.start_soon(one, identities[platform.fmspc])
        return outcomes


async def outcome(fetcher: Any, platform: SimulatedPlatform | PckIdentity) -> VerifiedCollateral | str:
    who = identity(platform) if isinstance(platform, SimulatedPlatform) else platform
    try:
        collateral: VerifiedCollateral = await fetcher.fetch(who, int(time.time()))
    except CollateralUnavailable as exc:
        return str(exc)
    return collateral


async def changed(fetcher: Any, before: VerifiedCollateral | str) -> VerifiedCollateral | str:
    """The collateral for the platform once it is no longer ``before``."""

    async def other() -> list[VerifiedCollateral | str]:
        found = await outcome(fetcher, PLATFORM)
        return [] if found is before else [found]

    found: list[VerifiedCollateral | str] = await async_wait_until(other)
    return found[0]


@pytest.fixture
def each(loop: str) -> Loop:
    return Loop(loop)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with running(Upstream()) as one:
        yield one


@pytest.fixture
def other() -> Iterator[Upstream]:
    with running(Upstream()) as one:
        yield one


def test_fetched_once_and_used_again(each: Loop, upstream: Upstream) -> None:
    first, second, another = each.fetch(source(upstream), PLATFORM, PLATFORM, PLATFORM.another(1))
    assert first is second
    assert (first.fmspc, first.ca, first.tee, first.root) == (PLATFORM.fmspc, "platform", "TDX", ROOT)
    assert another.fmspc == PLATFORM.another(1).fmspc
    assert upstream.asked[:4] == [
        f"/tdx/certification/v4/tcb?fmspc={PLATFORM.fmspc.hex()}",
        "/tdx/certification/v4/qe/identity",
        "/sgx/certification/v4/pckcrl?ca=platform&encoding=der",
        "/sgx/certification/v4/rootcacrl",
    ]
    assert upstream.rounds() == 2
    assert len(upstream.asked) == 8


def test_a_fetch_belongs_to_the_trace_of_the_request_that_caused_it(each: Loop, upstream: Upstream) -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

    async def main(fetcher: Any) -> None:
        _ = TRACEPARENT.set(parent)
        _ = await outcome(fetcher, PLATFORM)
        _ = TRACEPARENT.set("")
        _ = await outcome(fetcher, PLATFORM.another(1))

    _ = each.run(source(upstream), main)
    assert upstream.traces == [parent] * 4 + [None] * 4


FAULTS: dict[str, tuple[Fault, str, str]] = {
    "slow": (network.slow, "", "the server was silent for"),
    "dripping": (network.dripping, "", r"no whole answer within 0\.5 s"),
    "truncated": (network.truncated, "tcb", "the connection broke"),
    "truncated CRL": (network.truncated, "pckcrl", "the connection broke"),
    "oversized": (network.oversized, "", "more than 1048576 bytes"),
    "redirect": (network.redirecting, "tcb", "TCB info: status 307"),
    "garbage": (network.garbage, "tcb", "tcbInfo: not JSON"),
    "garbage identity": (network.garbage, "identity", "enclaveIdentity: not JSON"),
    "garbage CRL": (network.garbage, "pckcrl", "neither DER nor PEM"),
    "altered": (network.altered, "tcb", "the TCB signing key did not sign it"),
    "altered CRL": (network.altered, "pckcrl", "PCK CRL"),
    "no chain": (network.no_chain, "tcb", "the header is missing"),
    "of another FMSPC": (network.of_another, "tcb", f"it is for FMSPC {PLATFORM.another(1).fmspc.hex()}"),
    "404": (network.status(404), "tcb", "TCB info: status 404"),
    "404 of the CRL": (network.status(404), "rootcacrl", "root CA CRL: status 404"),
    "429": (network.status(429, ("retry-after", "7")), "", "status 429"),
    "500": (network.status(500), "", "status 500"),
    "503 of the identity": (network.status(503), "identity", "QE identity: status 503"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_and_the_next_upstream_asked(
    each: Loop, upstream: Upstream, other: Upstream, name: str
) -> None:
    upstream.fault, upstream.only, told = FAULTS[name]
    limits = {"slow": UNHEARD, "dripping": HASTY}.get(name, PATIENT)
    (alone,) = each.fetch(source(upstream, limits=limits))
    assert isinstance(alone, str)
    assert re.search(f"{re.escape(upstream.url)}: .*{told}", alone)

    def is_found() -> bool:
        (found,) = each.fetch(source(upstream, other, limits=limits))
        return isinstance(found, VerifiedCollateral)

    if limits is PATIENT:
        assert is_found()
        assert other.rounds() == 1
    else:  # the other one may be late, too, on a machine that is busy
        _ = wait_until(is_found)


def test_a_hundred_boots_of_a_known_family_are_one_fetch(each: Loop, upstream: Upstream) -> None:
    found, log = each.run(source(upstream), lambda fetcher: each.together(fetcher, [PLATFORM] * 100))
    assert len(found) == 100
    assert len(set(map(id, found))) == 1
    assert isinstance(found[0], VerifiedCollateral)
    assert len(upstream.asked) == 4
    assert [record.event for record in log] == ["collateral_fetched"]


def test_it_dies_and_comes_back(each: Loop) -> None:
    upstream = Upstream()
    with running(upstream):
        of = source(upstream)
    assert "no connection to " in each.fetch(of)[0]  # without cached collateral: a 503
    with running(upstream):
        (warm,) = each.fetch(of)
        assert isinstance(warm, VerifiedCollateral)
    cold, still = each.fetch(of, PLATFORM.another(1), PLATFORM)  # cached collateral outlives its upstream
    assert "no connection to " in cold
    assert still is warm
    with running(upstream):
        assert isinstance(each.fetch(of, PLATFORM.another(1))[0], VerifiedCollateral)


def test_refreshed_ahead_in_the_background(each: Loop, upstream: Upstream) -> None:
    upstream.age = 10
    of = source(upstream, policy=evolve(QUICK, refresh=0))

    async def main(fetcher: Any) -> None:
        first = await outcome(fetcher, PLATFORM)
        upstream.age = 0
        upstream.fault = network.slow if each.name == "trio" else None
        assert await outcome(fetcher, PLATFORM) is first  # a caller does not wait
        upstream.fault = None
        now = await changed(fetcher, first)
        assert isinstance(now, VerifiedCollateral)
        assert isinstance(first, VerifiedCollateral)
        assert now.window[0] >= first.window[0] + 10

    _ = each.run(of, main)


def test_kept_on_disk_and_verified_again(each: Loop, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with running(Upstream()) as upstream:
        (first,) = each.fetch(source(upstream, directory=kept))
    name = f"{PLATFORM.fmspc.hex()}-platform-tdx.json"
    assert [path.name for path in kept.iterdir()] == [name]

    async def main(fetcher: Any) -> list[Any]:
        return [await outcome(fetcher, PLATFORM), await outcome(fetcher, PLATFORM.another(1))]

    (again, none), log = each.run(source(upstream, directory=kept), main)  # an outage, with a warm cache and without
    assert (again.window, again.tcb_info) == (first.window, first.tcb_info)
    assert "no connection to " in none
    assert log[0].fields["files"] == 1
    assert "collateral_not_restored" not in [record.event for record in log]
    text = (kept / name).read_bytes()
    (kept / name).write_bytes(text.replace(b"UpToDate", b"UptoDate"))
    (_, told), log = each.run(source(upstream, directory=kept), main)
    assert "no connection to " in told
    assert [record.event for record in log][:2] == ["collateral_restored", "collateral_not_restored"]
    assert "did not sign" in str(log[1].fields["error"])


def test_a_disk_that_fails_costs_nothing_but_a_line(each: Loop, upstream: Upstream, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    of = source(upstream, directory=kept)

    async def main(fetcher: Any) -> Any:
        kept.rmdir()
        kept.write_bytes(b"")
        found = await outcome(fetcher, PLATFORM)
        _ = await async_wait_until(lambda: "collateral_not_kept" in [record.event for record in log])
        return found

    log: list[Record] = []

    async def opened() -> Any:
        async with open_collateral(of, log=log.append) as fetcher:
            return await main(fetcher)

    assert isinstance(on_loop(each.name, opened), VerifiedCollateral)
    assert log[-1].event == "collateral_not_kept"


def test_a_slow_fetch_is_waited_for_so_long_and_goes_on(each: Loop, upstream: Upstream) -> None:
    upstream.fault, upstream.only = network.slow, "rootcacrl"
    of = source(upstream, policy=evolve(QUICK, wait=0.1))

    async def main(fetcher: Any) -> None:
        assert "still being fetched" in str(await outcome(fetcher, PLATFORM))

        async def is_there() -> bool:
            return isinstance(await outcome(fetcher, PLATFORM), VerifiedCollateral)

        _ = await async_wait_until(is_there)
        assert upstream.rounds() == 1

    _ = each.run(of, main)


def test_who_is_cancelled_does_not_end_the_fetch_of_others(each: Loop, upstream: Upstream) -> None:
    asked, goes_on = threading.Event(), threading.Event()

    def held(_: network.Handler, honest: HttpResponse) -> HttpResponse:
        asked.set()
        assert goes_on.wait(60)
        return honest

    upstream.fault, upstream.only = held, "rootcacrl"
    of = source(upstream)

    async def main(fetcher: Any) -> None:
        async with anyio.create_task_group() as impatient:
            impatient.start_soon(outcome, fetcher, PLATFORM)
            _ = await anyio.to_thread.run_sync(asked.wait, 60)
            impatient.cancel_scope.cancel()
        goes_on.set()
        assert isinstance(await outcome(fetcher, PLATFORM), VerifiedCollateral)
        assert upstream.rounds() == 1

    _ = each.run(of, main)


def test_a_defect_ends_one_fetch(each: Loop, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    of = source(upstream)
    with monkeypatch.context() as patch:
        patch.setattr(of.cache, "begin", broken)
        told, log = each.run(of, lambda fetcher: outcome(fetcher, PLATFORM))
    assert "still being fetched" in told
    assert log[0].event == "collateral_fetch_failed"
    assert isinstance(each.fetch(of)[0], VerifiedCollateral)


def test_what_cannot_be_kept_is_used(each: Loop, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def broken(*_: object) -> None:
        tried.append("tried")
        raise RuntimeError("can't start new thread")

    async def main(fetcher: Any) -> None:
        assert isinstance(await outcome(fetcher, PLATFORM), VerifiedCollateral)
        await async_wait_until(lambda: tried)
        assert isinstance(await outcome(fetcher, PLATFORM), VerifiedCollateral)

    of = source(upstream)
    monkeypatch.setattr(type(of), "keep", broken)
    _, log = each.run(of, main)
    assert log[-1].fields["error"] == "RuntimeError: can't start new thread"


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return make_credentials(tmp_path_factory.mktemp("tls"))


def test_tls_is_checked(each: Loop, credentials: Credentials) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(credentials.chain)
    with running(Upstream(), context) as upstream:
        (told,) = each.fetch(source(upstream))
        assert "certificate does not verify" in told
        assert upstream.asked == []
        (found,) = each.fetch(source(upstream, context=client_context(None, credentials.ca_pem)))
        assert isinstance(found, VerifiedCollateral)


def test_threads_are_left_alone(each: Loop, upstream: Upstream) -> None:
    before = threading.active_count()
    upstream.fault, upstream.only = network.slow, "rootcacrl"
    of = source(upstream)
    counted: list[int] = []

    async def main(fetcher: Any) -> None:
        async def count() -> None:
            _ = await async_wait_until(lambda: "rootcacrl" in "".join(upstream.asked))  # which is slow to be answered
            counted.append(threading.active_count())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            tasks.start_soon(each.together, fetcher, [PLATFORM] * 100)

    _ = each.run(of, main)
    assert counted[0] <= before + 3  # a fetch needs no thread, nor do a hundred who wait for it


@pytest.mark.anyio
async def test_a_performer_for_files_or_for_services(upstream: Upstream, tmp_path: Path) -> None:
    write_file(tmp_path / "a.json", PLATFORM.collateral_json(int(time.time())))
    with closing(SqliteStore(tmp_path / "keys.db", vault=VAULT)) as durable:
        for collateral in (CollateralDirectory(tmp_path, ROOT), source(upstream)):
            async with open_performer(durable, collateral, log=lambda _: None) as performer:
                effect = FetchCollateral(identity(), int(time.time()) + 1)
                found: Any = await performer.perform(effect)
                assert found.fmspc == PLATFORM.fmspc
    assert upstream.rounds() == 1
