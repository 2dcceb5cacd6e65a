"""RIMs and OCSP answers from services: what is asked, and what is kept of the answers."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable
from typing import Any

import attrs
import pytest
from msgspec import structs

from chutes_proto._proof import PROOF
from chutes_proto.collateral.cache import Fetch, GiveUp, Refresh, Use, fetch
from chutes_proto.collateral.gpus import (
    GpuFetched,
    GpuService,
    HeldStatus,
    RimCache,
    StatusCache,
    fetch_gpu_collateral,
    ocsp_request,
    read_rim_answer,
    rim_keys,
    status_keys,
)
from chutes_proto.effects import Effect, Get, Log, Now, Post, Sleep, run
from chutes_proto.errors import TransportError, UpstreamError
from chutes_proto.gpu import EvidenceRefusedError, GpuPolicy, Revocation, Rims, authenticate, verify, verify_rim
from chutes_proto.log import Record
from chutes_proto.quote import _der as der
from chutes_proto.testing import SimulatedGpus
from chutes_proto.wire.http import HttpResponse
from tests.gpu.simulated import NONCE, NOW

GPUS = SimulatedGpus(b"the GPUs of a fetch's tests", count=2, switches=1)
IDS = (
    "NV_GPU_DRIVER_GH100_600.10.01",
    "NV_GPU_VBIOS_G520_0280_895_9600FF0001",
    "NV_SWITCH_BIOS_5612_0002_890_9610FF0001",
)


class Services:
    """The RIM service and the OCSP service of simulated GPUs, which answer as ``gpus`` make them."""

    def __init__(self, gpus: SimulatedGpus = GPUS, status: int = 200) -> None:
        self.rims: dict[str, bytes] = dict(zip(IDS, gpus.rims(NOW), strict=True))
        self.answers = by_serial(gpus.status(NOW))
        self.status = status
        self.now = NOW
        self.down = False
        self.asked: list[str] = []
        self.log: list[Record] = []

    def __call__(self, effect: Effect[Any]) -> Any:
        match effect:
            case Now():
                return self.now
            case Sleep(seconds):
                self.now += int(seconds)
                return None
            case Log(record):
                self.log.append(record)
                return None
            case _ if self.down:
                raise TransportError("no route", maybe_delivered=False)
            case Get(url):
                self.asked.append(url)
                rim = self.rims.get(url.rpartition("/")[2])
                if rim is None:
                    return HttpResponse(404, (), b"")
                return HttpResponse(self.status, (), json.dumps({"rim": b64encode(rim).decode(), "id": "x"}).encode())
            case Post(url, headers, body):
                assert url == "https://o/"
                assert dict(headers)["content-type"] == "application/ocsp-request"
                serial = asked_serial(body)
                self.asked.append(serial.hex())
                return HttpResponse(self.status, (), self.answers[serial])
            case _:
                raise AssertionError(effect)


def by_serial(status: Iterable[bytes]) -> dict[bytes, bytes]:
    return {answer.about.serial: data for data in status for answer in _answers(data)}


def _answers(data: bytes) -> Any:
    return Revocation.of([data]).answers[0].answers


def asked_serial(request: bytes) -> bytes:
    start, stop = 0, len(request)
    for _ in range(5):
        start, stop = der.only(request, start, stop, der.SEQUENCE)
    return der.content(request, der.elements(request, start, stop)[3])


def caches() -> tuple[RimCache, StatusCache]:
    return RimCache([GpuService("https://r")], roots=GPUS.roots), StatusCache([GpuService("https://o")])


def fetched(services: Services, gpus: SimulatedGpus = GPUS) -> GpuFetched:
    return run(fetch_gpu_collateral(gpus.evidence(NONCE), *caches(), now=NOW, roots=gpus.roots), services)


def pieces(found: GpuFetched, kind: str) -> list[bytes]:
    return [data for key, data in found.pieces.items() if key.file.startswith(f"{kind}/")]


def test_all_that_evidence_is_verified_with_is_fetched_once() -> None:
    services = Services()
    found = fetched(services)
    assert found.problems == []
    assert [key.file for key in found.pieces][:3] == [f"rims/{rim_id}.xml" for rim_id in IDS]
    assert services.asked[0] == f"https://r/v1/rim/{IDS[0]}"
    assert len(services.asked) == len(set(services.asked))
    rims = Rims.of(verify_rim(data, now=NOW, roots=GPUS.roots) for data in pieces(found, "rims"))
    known = Revocation.of(pieces(found, "status"))
    options: dict[str, Any] = {"nonce": NONCE, "now": NOW, "policy": GpuPolicy(), "roots": GPUS.roots, "count": 2}
    assert verify(GPUS.evidence(NONCE), rims=rims, revocation=known, **options).devices


def test_evidence_that_does_not_verify_causes_no_fetch() -> None:
    one = SimulatedGpus(GPUS.seed).having("report_signature")
    services = Services()
    assert "the device did not sign it" in fetched(services, one).problems[0]
    assert services.asked == []


@pytest.mark.parametrize(
    "fault",
    [
        *("rim_altered", "rim_other_product", "revoked"),
        *("status_signature", "status_unauthorized", "status_responder_expired", "status_unknown"),
    ],
)
def test_an_answer_that_does_not_verify_is_not_kept(fault: str) -> None:
    services = Services()
    faulty = GPUS.having(fault)
    services.rims = dict(zip(IDS, faulty.rims(NOW), strict=True))
    if fault == "status_unauthorized":
        services.answers = dict.fromkeys(services.answers, b"\x30\x03\x0a\x01\x06")
    else:
        services.answers = by_serial(faulty.status(NOW))
    found = fetched(services)
    if fault != "revoked":
        assert found.problems
        assert len(found.pieces) < len(services.rims) + len(services.answers)
        return
    known = Revocation.of(pieces(found, "status"))  # that a certificate is revoked is an answer
    with pytest.raises(EvidenceRefusedError) as caught:
        _ = verify(
            GPUS.evidence(NONCE),
            nonce=NONCE,
            now=NOW,
            rims=Rims(),
            revocation=known,
            policy=GpuPolicy(),
            roots=GPUS.roots,
        )
    assert caught.value.code == "certificate_revoked"


def test_a_service_that_is_down_is_told() -> None:
    services = Services()
    services.down = True
    found = fetched(services)
    assert found.pieces == {}
    assert len(found.problems) >= 6
    assert all("no route" in problem or "left alone" in problem for problem in found.problems)
    assert fetched(Services(status=503)).pieces == {}
    other = Services()
    other.rims = {}
    assert pieces(fetched(other), "rims") == []
    (first, *_) = other.answers
    wrong = Services()
    wrong.answers = dict.fromkeys(wrong.answers, other.answers[first])
    assert any("not about this certificate" in problem for problem in fetched(wrong).problems)
    device = authenticate(GPUS.evidence(NONCE)[0], nonce=None, now=NOW, roots=GPUS.roots)
    first_key, second_key, *_ = status_keys([device])
    assert ocsp_request(first_key) != ocsp_request(second_key)


def test_answers_are_refreshed_ahead_and_used_through_an_outage() -> None:
    """The machine is that of collateral for platforms, whose tests it has; here is what it makes of a day."""
    rims, status = caches()
    services = Services()
    device = authenticate(GPUS.evidence(NONCE)[0], nonce=None, now=NOW, roots=GPUS.roots)
    key = status_keys([device])[0]
    assert isinstance(status.decide(key, NOW), Fetch)
    assert run(fetch(status, key), services) == services.answers[key.serial]
    assert isinstance(status.decide(key, NOW + 40_000), Use)
    late = NOW + 70_000  # of 86400
    assert isinstance(status.decide(key, late), Refresh)
    services.down, services.now = True, late
    assert run(fetch(status, key), services) is None
    assert isinstance(status.decide(key, late + 1), Use)
    assert isinstance(status.decide(key, NOW + 86_400 + 100), Fetch | GiveUp)
    graceful = StatusCache(status.upstreams, grace=3600)
    graceful.restore(key, graceful.read(key, services.answers[key.serial]))
    assert isinstance(graceful.decide(key, NOW + 86_400 + 100), Fetch)
    services.now = NOW + 86_400 + 100
    assert run(fetch(graceful, key), services) is None
    assert isinstance(graceful.decide(key, services.now), Use)
    rim = rim_keys([device])[0]
    services.down, services.now = False, NOW
    assert run(fetch(rims, rim), services) == services.rims[rim.rim_id]
    assert run(fetch(rims, rim), services) is None  # the same again is not kept again


@pytest.mark.parametrize("driver", ["../../1", "1/2", "1 2", "1?x=", "1" * 200, "1\\2"])
def test_what_is_no_word_is_asked_of_no_service_and_names_no_file(driver: str) -> None:
    device = authenticate(GPUS.evidence(NONCE)[0], nonce=None, now=NOW, roots=GPUS.roots)
    assert [key.rim_id for key in rim_keys([device])] == [*IDS[:2]]
    odd = attrs.evolve(device, report=structs.replace(device.report, driver=driver), proof=PROOF)
    assert [key.rim_id for key in rim_keys([odd])] == [IDS[1]]


def test_neither_older_answers_nor_earlier_ends_replace_what_is_held() -> None:
    rims, status = caches()
    device = authenticate(GPUS.evidence(NONCE)[0], nonce=None, now=NOW, roots=GPUS.roots)
    key, rim_key = status_keys([device])[1], rim_keys([device])[0]

    def held(gpus: SimulatedGpus, at: int) -> HeldStatus:
        (data,) = [one for one in gpus.status(at) if _answers(one)[0].about.serial == key.serial]
        return status.read(key, data)

    assert status.take(key, held(GPUS, NOW), NOW)
    with pytest.raises(UpstreamError, match="older"):
        _ = status.take(key, held(GPUS, NOW - 60), NOW)
    assert status.take(key, held(GPUS, NOW + 60), NOW + 60)
    assert status.take(key, held(GPUS.having("revoked"), NOW + 120), NOW + 120)
    with pytest.raises(UpstreamError, match="revocation"):
        _ = status.take(key, held(GPUS, NOW + 180), NOW + 180)
    revoked = held(GPUS.having("revoked"), NOW + 60)
    other = caches()[1]
    assert other.take(key, held(GPUS, NOW + 120), NOW + 120)
    assert other.take(key, revoked, NOW + 120)  # its time does not count
    late = revoked.window[1] + 10**6
    assert isinstance(other.decide(key, late), Fetch)
    assert other.landed(key, late) == Use(revoked)
    assert rims.take(rim_key, rims.read(rim_key, GPUS.rims(NOW)[0]), NOW)
    with pytest.raises(UpstreamError, match="ends before"):
        _ = rims.take(rim_key, rims.read(rim_key, GPUS.rims(NOW - 60)[0]), NOW)
    with pytest.raises(UpstreamError, match="it is of"):
        _ = rims.read(rim_key, GPUS.rims(NOW)[1])


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"rim": 1}', b'{"rim": "*"}'])
def test_what_is_no_rim_answer_is_refused(body: bytes) -> None:
    with pytest.raises(UpstreamError):
        _ = read_rim_answer(body)
