"""One flipped bit in every byte of a report, a chain and a RIM: refused, or nothing that is decoded changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

import attrs
import pytest

from chutes_proto.gpu import DeviceEvidence, GenuineDevice, GpuError, authenticate
from chutes_proto.gpu._rim import authenticate_rim
from tests.gpu.simulated import GPUS, NONCE, NOW
from tests.gpu.vectors import COLLECTED_AT, GPU, complete_set, read

SIMULATED: Final = GPUS.evidence(NONCE)[0]


STRIDE: Final = 1 if os.environ.get("CHUTES_PROTO_SOAK") else 97
"""Every byte takes minutes; a prime number leaves no part of a line or of a record out for ever."""


def accepted(data: bytes, check: Callable[[bytes], object], expected: object) -> list[int]:
    """The places whose change is accepted; all that is decoded is the same then."""
    found: list[int] = []
    for place in range(0, len(data), STRIDE):
        altered = bytearray(data)
        altered[place] ^= 1 << place % 8
        try:
            decoded = check(bytes(altered))
        except GpuError:
            continue
        assert decoded == expected, place
        found.append(place)
    return found


def device_of(evidence: DeviceEvidence) -> GenuineDevice:
    if evidence.report[4:36] == NONCE:
        return authenticate(evidence, nonce=None, now=NOW, roots=GPUS.roots)
    return authenticate(evidence, nonce=None, now=COLLECTED_AT)


def check_report(evidence: DeviceEvidence, report: bytes) -> object:
    read = device_of(attrs.evolve(evidence, report=report)).report
    return read.measurements, read.fields, read.nonce


def check_chain(evidence: DeviceEvidence, chain: bytes) -> object:
    device = device_of(attrs.evolve(evidence, chain=chain))
    return device.serial_number, device.device_id, [one.der for one in device.chain.certificates]


def check_rim(data: bytes) -> object:
    rim = authenticate_rim(data) if data.find(b"NVIDIA") >= 0 else authenticate_rim(data, roots=GPUS.roots)
    return rim.product, rim.version, rim.edition, rim.values, [one.der for one in rim.chain.certificates]


def complete() -> DeviceEvidence:
    if not GPU.is_dir():
        pytest.skip("no test vectors")
    return complete_set()


@pytest.mark.parametrize("make", [lambda: SIMULATED, complete], ids=["simulated", "NVIDIA's"])
def test_no_changed_report_is_accepted(make: Callable[[], DeviceEvidence]) -> None:
    evidence = make()
    report = evidence.report
    assert accepted(report, lambda data: check_report(evidence, data), check_report(evidence, report)) == []
    padded = report + bytes(8)
    assert accepted(padded, lambda data: check_report(evidence, data), check_report(evidence, report)) == []


@pytest.mark.parametrize("make", [lambda: SIMULATED, complete], ids=["simulated", "NVIDIA's"])
def test_a_chain_may_change_around_the_root_only(make: Callable[[], DeviceEvidence]) -> None:
    """A changed beginning of the root's block leaves the root out, which a chain may. Text around blocks is none."""
    evidence = make()
    chain = evidence.chain
    armour = range(chain.rindex(b"-----BEGIN CERTIFICATE-----"), len(chain))
    found = accepted(chain, lambda data: check_chain(evidence, data), check_chain(evidence, chain))
    between = [place for place in found if place not in armour]
    assert {chain[place : place + 1] for place in between} <= {b"\n"}, "the end of a line between two blocks"


def rims() -> list[bytes]:
    return [GPUS.rims(NOW)[0], *([read("full-rim-driver.xml")] if GPU.is_dir() else [])]


@pytest.mark.parametrize("data", rims(), ids=["simulated", "NVIDIA's"][: len(rims())])
def test_no_changed_rim_is_accepted(data: bytes) -> None:
    """Every byte counts: what the signature does not cover is the signature itself, the chain, and no white space."""
    expected = check_rim(data)
    found = accepted(data, check_rim, expected)
    assert [data[place : place + 1] for place in found] == []
