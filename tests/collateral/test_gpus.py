"""RIMs and OCSP answers from services: what is asked, and what is kept of the answers."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import pytest

from chutes_proto.collateral.gpus import GpuFetched, fetch_gpu_collateral, ocsp_request, read_rim_answer
from chutes_proto.effects import Effect, Get, Send, run
from chutes_proto.errors import TransportError, UpstreamError
from chutes_proto.gpu import GpuPolicy, Revocation, Rims, authenticate, verify, verify_rim
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
        self.answers = {answer.about.serial: data for data in gpus.status(NOW) for answer in _answers(data)}
        self.status = status
        self.asked: list[str] = []

    def __call__(self, effect: Effect[Any]) -> Any:
        match effect:
            case Get(url):
                self.asked.append(url)
                rim = self.rims.get(url.rpartition("/")[2])
                if rim is None:
                    return HttpResponse(404, (), b"")
                return HttpResponse(self.status, (), json.dumps({"rim": b64encode(rim).decode(), "id": "x"}).encode())
            case Send(request):
                assert dict(request.headers)["content-type"] == "application/ocsp-request"
                serial = _asked_serial(request.body)
                self.asked.append(serial.hex())
                return HttpResponse(self.status, (), self.answers[serial])
            case _:
                raise AssertionError(effect)


def _answers(data: bytes) -> Any:
    return Revocation.of([data]).answers[0].answers


def _asked_serial(request: bytes) -> bytes:
    start, stop = 0, len(request)
    for _ in range(5):
        start, stop = der.only(request, start, stop, der.SEQUENCE)
    return der.content(request, der.elements(request, start, stop)[3])


def fetched(services: Services, gpus: SimulatedGpus = GPUS) -> GpuFetched:
    return run(fetch_gpu_collateral(gpus.evidence(NONCE), now=NOW, roots=gpus.roots, rim_service="https://r"), services)


def test_all_that_evidence_is_verified_with_is_fetched_once() -> None:
    services = Services()
    found = fetched(services)
    assert found.problems == []
    assert set(found.rims) == set(IDS)
    assert services.asked[0] == f"https://r/v1/rim/{IDS[0]}"
    assert len(services.asked) == len(set(services.asked))
    rims = Rims.of(verify_rim(data, now=NOW, roots=GPUS.roots) for data in found.rims.values())
    known = Revocation.of(found.status.values())
    options: dict[str, Any] = {"nonce": NONCE, "now": NOW, "policy": GpuPolicy(), "roots": GPUS.roots, "count": 2}
    assert verify(GPUS.evidence(NONCE), rims=rims, revocation=known, **options).devices


def test_evidence_that_does_not_verify_causes_no_fetch() -> None:
    one = SimulatedGpus(GPUS.seed).having("report_signature")
    services = Services()
    assert "report_signature" in fetched(services, one).problems[0] or services.asked == []
    assert services.asked == []


@pytest.mark.parametrize(
    "fault", ["rim_altered", "rim_other_product", "status_signature", "revoked", "status_unauthorized"]
)
def test_an_answer_that_does_not_verify_is_not_kept(fault: str) -> None:
    services = Services()
    faulty = GPUS.having(fault)
    services.rims = dict(zip(IDS, faulty.rims(NOW), strict=True))
    if fault == "status_unauthorized":
        services.answers = dict.fromkeys(services.answers, b"\x30\x03\x0a\x01\x06")
    else:
        services.answers = {answer.about.serial: data for data in faulty.status(NOW) for answer in _answers(data)}
    found = fetched(services)
    assert found.problems
    assert len(found.rims) + len(found.status) < len(services.rims) + len(services.answers)


def test_a_service_that_is_down_is_told() -> None:
    def down(_: Effect[Any]) -> Any:
        raise TransportError("no route", maybe_delivered=False)

    found = run(fetch_gpu_collateral(GPUS.evidence(NONCE), now=NOW, roots=GPUS.roots), down)
    assert (found.rims, found.status) == ({}, {})
    assert len(found.problems) >= 6
    assert fetched(Services(status=503)).rims == {}
    other = Services()
    other.rims = {}
    assert len(fetched(other).rims) == 0
    device = authenticate(GPUS.evidence(NONCE)[0], nonce=None, now=NOW, roots=GPUS.roots)
    (first, *_) = other.answers
    wrong = Services()
    wrong.answers = dict.fromkeys(wrong.answers, other.answers[first])
    assert any("not about this certificate" in problem for problem in fetched(wrong).problems)
    assert ocsp_request(device.chain, 1) != ocsp_request(device.chain, 2)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"rim": 1}', b'{"rim": "*"}'])
def test_what_is_no_rim_answer_is_refused(body: bytes) -> None:
    with pytest.raises(UpstreamError):
        _ = read_rim_answer(body)
