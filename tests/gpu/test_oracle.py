"""NVIDIA's own verifier beside this one: parsing, report signatures, RIM signatures, comparison.

It needs an environment of its own, because it pins an old ``cryptography``:

    python3 -m venv oracle && oracle/bin/pip install nv-local-gpu-verifier==2.7.3
    CHUTES_PROTO_NVIDIA_PYTHON=oracle/bin/python make test PYTEST_ARGS=tests/gpu/test_oracle.py

It knows no time but now: RIMs whose signers' certificates have ended are refused there for that.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import attrs
import pytest

from chutes_proto.gpu import GpuError, authenticate, parse_report
from chutes_proto.gpu._measurements import differences
from chutes_proto.gpu._rim import authenticate_rim
from tests.gpu.simulated import GPUS, NONCE, NOW
from tests.gpu.vectors import COLLECTED_AT, GPU, complete_rims, complete_set, read

PYTHON: Final = os.environ.get("CHUTES_PROTO_NVIDIA_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON or not GPU.is_dir(), reason="CHUTES_PROTO_NVIDIA_PYTHON is not set")

SCRIPT: Final = """
import hashlib, io, json, sys
from contextlib import redirect_stdout
from cryptography import x509
from verifier.attestation import AttestationReport
from verifier.config import HopperSettings
from verifier.rim import RIM
from verifier.verifier import Verifier

def answer(report, leaf, rims):
    settings = HopperSettings()
    try:
        parsed = AttestationReport(report, settings)
        if not parsed.verify_signature(leaf, settings.signature_length, hashlib.sha384):
            return {"signed": False}
    except BaseException as exc:
        return {"error": repr(exc)}
    response = parsed.get_response_message()
    opaque = response.get_opaque_data()
    names = ("DRIVER_VERSION", "VBIOS_VERSION", "PROJECT", "PROJECT_SKU", "CHIP_SKU", "FWID")
    fields = {name: opaque.get_data(f"OPAQUE_FIELD_ID_{name}") for name in names}
    found = {
        "signed": True,
        "measurements": parsed.get_measurements(),
        "fields": {name: value.hex() for name, value in fields.items() if isinstance(value, bytes)},
        "nonce": parsed.get_request_message().get_nonce().hex(),
        "signature": response.get_signature().hex(),
    }
    if rims:
        one = Verifier(parsed, *(RIM(name, settings, content=rims[name]) for name in ("driver", "vbios")), settings)
        golden = {i: m["measurement"] for i, m in one.golden_measurements.items() if i != 35 or one.is_msr_35_valid}
        values = lambda m: [m.get_value_at_index(n) for n in range(m.get_number_of_alternatives())]
        found["differs"] = sorted(i for i, m in golden.items() if one.runtime_measurements[i] not in values(m))
        found["accepts"] = one.verify(settings)
    return found

def rim_holds(content):
    settings = HopperSettings()
    try:
        return RIM("driver", settings, content=content).verify_signature(settings)
    except BaseException:
        return False

asked = json.load(sys.stdin)
leaf = x509.load_pem_x509_certificate(asked["leaf"].encode())
with redirect_stdout(io.StringIO()):
    answers = [answer(bytes.fromhex(report), leaf, asked["rims"]) for report in asked["reports"]]
    answers += map(rim_holds, asked["signed_rims"])
print(json.dumps(answers))
"""


def oracle(
    leaf: bytes, reports: list[bytes], rims: dict[str, str] | None = None, signed_rims: list[str] | None = None
) -> list[Any]:
    """Its answer about each report, and then about each of the ``signed_rims``."""
    asked = json.dumps(
        {
            "leaf": leaf.decode(),
            "reports": [report.hex() for report in reports],
            "rims": rims or {},
            "signed_rims": signed_rims or [],
        }
    )
    command = [str(Path(PYTHON).absolute()), "-c", SCRIPT]
    with TemporaryDirectory() as cwd:  # it writes a log
        ended = subprocess.run(command, input=asked, capture_output=True, text=True, check=True, timeout=300, cwd=cwd)
    return list(json.loads(ended.stdout.splitlines()[-1]))


def test_both_accept_the_complete_set_and_refuse_every_altered_report() -> None:
    evidence = complete_set()
    place = random.Random(3)
    altered: list[bytes] = []
    for _ in range(100):
        flipped = bytearray(evidence.report)
        flipped[place.randrange(len(flipped))] ^= 1 << place.randrange(8)
        altered.append(bytes(flipped))
    rims = {kind: read(f"full-rim-{kind}.xml").decode() for kind in ("driver", "vbios")}
    theirs = oracle(evidence.chain, [evidence.report, *altered], rims)
    assert {name: theirs[0][name] for name in ("signed", "differs", "accepts")} == {
        "signed": True,
        "differs": [],
        "accepts": True,
    }
    assert not [one for one in theirs[1:] if one.get("signed")]
    for report in altered:
        with pytest.raises(GpuError):
            _ = authenticate(attrs.evolve(evidence, report=report), nonce=None, now=COLLECTED_AT)


def test_both_find_the_same_differences() -> None:
    """Reports of simulated devices against NVIDIA's reference values, which none of theirs fits."""
    rims = {kind: read(f"full-rim-{kind}.xml").decode() for kind in ("driver", "vbios")}
    for fault in ((), ("measurement",), ("measurement_35",)):
        (evidence,) = GPUS.having(*fault).evidence(NONCE)
        _ = authenticate(evidence, nonce=NONCE, now=NOW, roots=GPUS.roots)
        (theirs,) = oracle(evidence.chain, [evidence.report], rims)
        report = parse_report(evidence.report)
        ours = [one.index for rim in complete_rims().rims for one in differences(report, rim.values, "driver")]
        # theirs compares the decoder's state, bytes, with an enumeration: to it no decoder is ever disabled
        assert {*theirs["differs"]} - {*ours} == {35}
        assert {*ours} <= {*theirs["differs"]}
        assert not theirs["accepts"]


def test_both_read_the_same_from_a_report() -> None:
    (simulated,) = GPUS.evidence(NONCE)
    for evidence in (complete_set(), simulated):
        (theirs,) = oracle(evidence.chain, [evidence.report])
        ours = parse_report(evidence.report)
        read_here = [ours.measurements.get(index, b"").hex() for index in range(1, len(theirs["measurements"]) + 1)]
        assert [str(value) for value in theirs["measurements"]] == read_here
        numbers = {
            "DRIVER_VERSION": 3,
            "VBIOS_VERSION": 6,
            "PROJECT": 17,
            "PROJECT_SKU": 18,
            "CHIP_SKU": 15,
            "FWID": 20,
        }
        assert theirs["fields"] == {name: ours.fields[number].hex() for name, number in numbers.items()}
        assert (theirs["nonce"], theirs["signature"]) == (ours.nonce.hex(), ours.signature.hex())


def test_both_decide_alike_about_signatures_of_rims() -> None:
    """NVIDIA's own, as long as its signer's certificate is valid now; an altered one, and one under another key."""
    genuine = read("rim-26-NV_GPU_DRIVER_GH100_550.144.03.xml")
    altered = genuine.replace(b"550.144.03", b"550.144.04", 1)
    assert altered != genuine
    files = [genuine, altered, read("rim-28-incorrect_signature_driver_rim.xml")]
    if authenticate_rim(genuine).window[1] < time.time():
        pytest.skip("the RIM's signer's certificate has ended, so theirs would refuse everything")
    expected = [True, False, False]
    assert oracle(complete_set().chain, [], signed_rims=[data.decode() for data in files]) == expected
    for data in files[1:]:
        with pytest.raises(GpuError):
            _ = authenticate_rim(data)
