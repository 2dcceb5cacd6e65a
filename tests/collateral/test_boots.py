"""Boots against a key server whose collateral comes over the network: outages, storms, a new CRL; another client."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import dcap_qvl
import pytest
import trio
from attrs import define, evolve, field
from cryptography import x509

from chutes_proto.auth.client_identity import make_client_identity
from chutes_proto.collateral.cache import CachePolicy
from chutes_proto.effects import Effect, FetchCollateral, Now
from chutes_proto.io.collateral.aio import CollateralFetcher, open_collateral
from chutes_proto.quote._errors import VerificationError
from chutes_proto.quote._verify import check_signed, open_quote, verify_quote
from chutes_proto.server._app import App
from chutes_proto.server._limits import Admission
from chutes_proto.testing._service import CollateralService
from chutes_proto.wire.http import HttpResponse
from tests.collateral.network import PLATFORM, ROOT, Upstream, running
from tests.collateral.test_fetch import QUICK, identity, source
from tests.server.world import World, answer, refusal, service
from tests.waiting import async_wait_until

CERTIFICATE = x509.load_pem_x509_certificate(make_client_identity(int(time.time()), bytes(32)).certificate_pem)


@define(eq=False)
class Connected(World):
    """The world of a server whose collateral is fetched for real. Its flows run in threads of a trio loop."""

    fetcher: CollateralFetcher | None = field(default=None, kw_only=True)
    one_at_a_time: threading.Lock = field(factory=threading.Lock, kw_only=True)

    def perform(self, effect: Effect[Any]) -> Any:
        if isinstance(effect, FetchCollateral):
            self.asked.append(effect)
            assert self.fetcher is not None
            return trio.from_thread.run(self.fetcher.fetch, effect.identity, effect.now)
        if isinstance(effect, Now):
            return int(time.time())
        with self.one_at_a_time:  # a world is made for one thread
            return super().perform(effect)


def connected(fetcher: CollateralFetcher) -> Connected:
    app = App(service(root=ROOT, verifications=Admission(200, share=200)))
    return Connected(app=app, platform=PLATFORM, now=int(time.time()), certificate=CERTIFICATE, fetcher=fetcher)


async def boots(fetcher_source: Any, *, times: int = 1) -> list[HttpResponse]:
    """Answers to so many boots at once."""
    found: list[HttpResponse] = []
    async with open_collateral(fetcher_source, log=lambda _: None) as fetcher:
        world = connected(fetcher)
        attestations = [world.attestation(vm_name=f"vm-{number}") for number in range(times)]

        def one(body: Any, headers: Any) -> None:
            found.append(world.ask("POST", "/servers/boot/attestation", body, headers=headers))

        async with trio.open_nursery() as nursery:
            limiter = trio.CapacityLimiter(times)
            for body, headers in attestations:
                nursery.start_soon(partial(trio.to_thread.run_sync, one, body, headers, limiter=limiter))
    return found


@pytest.mark.trio
async def test_an_outage_without_a_warm_cache_is_a_503_and_with_one_nothing() -> None:
    upstream = Upstream()
    with running(upstream):
        of = source(upstream)
    (cold,) = await boots(of)
    assert refusal(cold)[:2] == (503, "collateral_unavailable")
    assert int(cold.header("retry-after") or 0) > 0
    with running(upstream):
        _ = answer((await boots(of))[0])
    for response in await boots(of, times=3):  # the plug is pulled again
        assert answer(response)["key"]


@pytest.mark.trio
async def test_collateral_that_is_younger_than_its_request() -> None:
    with running(Upstream(age=-1)) as upstream:  # made a second after the quote came
        (response,) = await boots(source(upstream))
    assert answer(response)["key"]


@pytest.mark.trio
async def test_a_new_crl_is_always_consulted() -> None:
    quote = PLATFORM.quote(bytes(64))
    with running(Upstream(age=10)) as upstream:
        of = source(upstream, policy=evolve(QUICK, refresh=0))
        async with open_collateral(of, log=lambda _: None) as fetcher:

            async def judge() -> Any:
                now = int(time.time())
                signed = check_signed(open_quote(quote, now=now, root=ROOT))
                return verify_quote(signed, await fetcher.fetch(identity(), now), now=now, report_data=None)

            _ = await judge()
            _ = await judge()  # leaf and quoting enclave were seen
            upstream.age = 0
            revoking = PLATFORM.having("pck_revoked")
            upstream.service = CollateralService((revoking,))

            async def is_revoked() -> bool:
                try:
                    _ = await judge()
                except VerificationError as exc:
                    return exc.code == "pck_revoked"
                return False

            _ = await async_wait_until(is_revoked)


@pytest.mark.anyio
@pytest.mark.parametrize("loop", ["asyncio"])  # it knows no other
async def test_another_verifier_fetches_from_the_simulated_service_and_accepts() -> None:
    quote = PLATFORM.quote(bytes(64))
    with running(Upstream()) as upstream:
        collateral = await dcap_qvl.get_collateral(upstream.url, quote)
    report = dcap_qvl.verify_with_root_ca(quote, collateral, PLATFORM.root_der, int(time.time()))
    assert report.status == "UpToDate"


def test_the_policy_of_a_server_is_quick_to_say_no() -> None:
    assert CachePolicy().wait < 20  # deployed clients that ask once give up after 30 s
