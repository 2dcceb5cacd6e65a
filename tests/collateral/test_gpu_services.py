"""RIMs and OCSP answers from services over real HTTP: fetched once, kept on disk, used through an outage."""

from __future__ import annotations

import json
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from attrs import define, evolve, field

from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.collateral.gpus import GpuService, RimCache, StatusCache
from chutes_proto.errors import Unavailable
from chutes_proto.gpu import EvidenceRefusedError, GpuCollateral, GpuPolicy, authenticate, verify
from chutes_proto.io.collateral.aio import open_gpu_collateral
from chutes_proto.io.collateral.gpu_directory import GpuCollateralDirectory, make_gpu_directory
from chutes_proto.io.collateral.gpu_services import GpuServices
from chutes_proto.io.http.tls import context_trusting
from chutes_proto.log import Record
from chutes_proto.server._app import App
from chutes_proto.server._gpu_evidence import GpuAppraisal
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.testing import SimulatedGpus
from chutes_proto.testing._platform import PROFILE
from tests.clients import make_client
from tests.collateral.test_gpus import asked_serial, by_serial
from tests.scenario.operations import LOOPS, SERVER, Site, Vm, close_stores, open_store
from tests.server.world import GPU, MINER, PLATFORM, service
from tests.waiting import async_wait_until

pytestmark = pytest.mark.anyio

GPUS = SimulatedGpus(b"the GPUs of a fetch over HTTP", count=2)
IDS = ("NV_GPU_DRIVER_GH100_600.10.01", "NV_GPU_VBIOS_G520_0280_895_9600FF0001")


@define
class Services:
    """A RIM service and an OCSP service at one address."""

    url: str = ""
    asked: list[str] = field(factory=list)
    down: bool = False
    rims: dict[str, bytes] = field(init=False)
    status: dict[bytes, bytes] = field(init=False)

    def __attrs_post_init__(self) -> None:
        now = int(time.time())
        self.rims = dict(zip(IDS, GPUS.rims(now), strict=True))
        self.status = by_serial(GPUS.status(now))

    def answer(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        self.asked.append(path if body is None else asked_serial(body).hex())
        if self.down:
            return 503, b""
        if body is not None:
            return 200, self.status[asked_serial(body)]
        rim = self.rims.get(path.removeprefix("/v1/rim/"))
        return (404, b"") if rim is None else (200, json.dumps({"rim": b64encode(rim).decode()}).encode())


@contextmanager
def serving() -> Iterator[Services]:
    services = Services()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            assert self.headers["content-type"] == "application/ocsp-request"
            self.answer(self.rfile.read(int(self.headers["content-length"])))

        def answer(self, body: bytes | None) -> None:
            status, data = services.answer(self.path, body)
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            _ = self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of what it replaces
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        services.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield services
        finally:
            server.shutdown()
            thread.join()


def source(services: Services, directory: Path | None = None, **options: Any) -> GpuServices:
    upstreams = [GpuService.parse(services.url)]
    return GpuServices(
        RimCache(upstreams, roots=GPUS.roots), StatusCache(upstreams), context_trusting(None), directory, **options
    )


async def fetched(of: GpuServices, log: list[Record], times: int = 1) -> GpuCollateral:
    now = int(time.time())
    devices = [authenticate(one, nonce=None, now=now, roots=GPUS.roots) for one in GPUS.evidence(bytes(32))]
    found = GpuCollateral()
    async with open_gpu_collateral(of, log=log.append) as fetcher:
        for _ in range(times):
            found = await fetcher.fetch(devices, now)
    return found


def accepted(found: GpuCollateral) -> bool:
    """Whether the evidence is accepted with all of it; if not, what is missing is told."""
    options: dict[str, Any] = {"nonce": bytes(32), "now": int(time.time()), "policy": GpuPolicy(), "roots": GPUS.roots}
    try:
        verdict = verify(GPUS.evidence(bytes(32)), rims=found.rims, revocation=found.revocation, count=2, **options)
    except EvidenceRefusedError as exc:
        assert exc.code in ("rim_missing", "status_missing")
        return False
    return all(device.revocation_checked for device in verdict.devices)


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.glob("*/*")}


def spoil(directory: Path) -> None:
    for path in [*directory.glob("*/*")]:
        _ = path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.fixture(params=["trio", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_fetched_once_and_kept_on_disk_for_the_next_process(tmp_path: Path) -> None:
    log: list[Record] = []
    with serving() as services:
        assert accepted(await fetched(source(services, tmp_path), log, times=3))
        assert len(services.asked) == len(set(services.asked)) > 6
        assert {record.event for record in log} == {"collateral_fetched"}
        directory = GpuCollateralDirectory(tmp_path, GPUS.roots)
        assert accepted(directory.fetch())
        assert directory.problems == ()
        services.down = True
        assert accepted(await fetched(source(services, tmp_path), log))
        spoil(tmp_path)
        log.clear()
        assert not accepted(await fetched(source(services, tmp_path), log))
        assert "collateral_not_restored" in {record.event for record in log}


async def test_what_has_ended_is_removed_from_the_cache(tmp_path: Path) -> None:
    """OCSP answers are one for each machine that was ever seen. A revocation is for ever, and the rest is not ours."""
    now = int(time.time())
    directory = make_gpu_directory(tmp_path)
    revoked = GPUS.having("revoked")
    pieces = {
        "rims/ended.xml": GPUS.having("rim_signer_expired").rims(now)[0],
        "rims/in-use.xml": GPUS.rims(now)[0],
        "status/in-use.der": GPUS.status(now)[0],
        "status/text": b"not an OCSP answer",
    }
    pieces |= {f"status/old-{at}.der": data for at, data in enumerate(GPUS.status(now - 3 * 86_400))}
    pieces |= {f"status/revoked-{at}.der": data for at, data in enumerate(revoked.status(now - 3 * 86_400))}
    for name, data in pieces.items():
        _ = (directory / name).write_bytes(data)
    log: list[Record] = []
    with serving() as services:
        async with open_gpu_collateral(source(services, tmp_path), log=log.append):
            _ = await async_wait_until(lambda: [record.event for record in log] == ["collateral_pruned"])
    left = files(tmp_path)
    assert {"rims/in-use.xml", "status/in-use.der", "status/text"} == {name for name in left if "revoked" not in name}
    assert len(left) == 4  # and the one revocation


async def test_files_beside_count_while_the_services_are_down(tmp_path: Path) -> None:
    log: list[Record] = []
    with serving() as services:
        assert accepted(await fetched(source(services, tmp_path), log))
        services.down = True
        beside = GpuCollateralDirectory(tmp_path, GPUS.roots)
        assert not accepted(await fetched(source(services), log))
        assert accepted(await fetched(source(services, beside=beside), log))


async def test_the_signers_of_rims_in_files_are_asked_about(tmp_path: Path) -> None:
    with serving() as services:
        _ = await fetched(source(services, tmp_path), [])
        for path in (tmp_path / "status").iterdir():
            path.unlink()
        beside = GpuCollateralDirectory(tmp_path, GPUS.roots)
        assert accepted(await fetched(evolve(source(services, beside=beside), rims=None), []))


async def test_a_cache_that_cannot_be_used_is_told_and_stops_nothing() -> None:
    log: list[Record] = []
    with serving() as services:
        assert accepted(await fetched(source(services, Path("x" * 300)), log))
    assert {record.event for record in log} >= {"collateral_not_restored", "collateral_not_kept"}


async def test_what_nothing_needs_is_not_asked_for(tmp_path: Path) -> None:
    with serving() as services:
        found = await fetched(evolve(source(services), rims=None), [])
        assert found.rims.rims == ()
        assert not [path for path in services.asked if "rim" in path]
        _ = await fetched(evolve(source(services, tmp_path), status=None), [])
        assert GpuCollateralDirectory(tmp_path, GPUS.roots).fetch().rims.rims
        services.asked.clear()
        assert (await fetched(evolve(source(services), status=None), [])).revocation.answers == ()
        assert sorted(services.asked) == [f"/v1/rim/{rim_id}" for rim_id in IDS]


async def test_an_outage_stops_no_boot(tmp_path: Path, anyio_backend: str) -> None:
    """The profile requires evidence: registrations and attestations wait, and boots are granted."""
    profile = evolve(PROFILE, gpu_count=2)
    served = {profile.identity: ServedProfile(profile, None, False, False, gpu_evidence="require")}
    app = App(service(profiles=served, gpu_appraisal=GpuAppraisal(roots=GPUS.roots)))
    site = Site(LOOPS[anyio_backend], open_store(tmp_path), app)
    settings: dict[str, Any] = {"signer": MINER.sign, "ca_pem": SERVER.ca_pem, "gpu_tool": GPUS.evidence_json}
    settings |= {"quoter": partial(PLATFORM.quote, stage="runtime"), "retry": RetryPolicy(attempts=1)}
    with serving() as services:
        services.down = True
        async with open_gpu_collateral(source(services), log=site.log.append) as fetcher:
            site.fetch_gpus = fetcher.fetch
            async with site.serving(), Vm(site) as vm:
                miner = make_client(anyio_backend, "MinerClient", site.url, hotkey=MINER.hotkey.address, **settings)
                async with miner:
                    await miner.register("n1", host="1.2.3.4", gpus=[GPU, evolve(GPU, uuid="GPU-2")], name="vm-1")
                    with pytest.raises(Unavailable, match="No reference values"):
                        await miner.attest("n1")
                    assert (await vm.attest(await vm.nonce())).status_code == 200
        services.down = False
        async with open_gpu_collateral(source(services), log=site.log.append) as fetcher:
            site.fetch_gpus = fetcher.fetch
            async with site.serving():
                miner = make_client(anyio_backend, "MinerClient", site.url, hotkey=MINER.hotkey.address, **settings)
                async with miner:
                    _ = await miner.attest("n1")
    close_stores()
