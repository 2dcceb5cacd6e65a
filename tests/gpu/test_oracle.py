"""NVIDIA's own verifier beside this one: parsing, report signatures, comparison.

It needs an environment of its own, because it pins an old ``cryptography``:

    python3 -m venv oracle && oracle/bin/pip install nv-local-gpu-verifier==2.7.3
    CHUTES_PROTO_NVIDIA_PYTHON=oracle/bin/python make test PYTEST_ARGS=tests/gpu/test_oracle.py

It knows no time but now, so certificates and the signatures of RIMs are not asked for.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from typing import Any, Final

import attrs
import pytest

from chutes_proto.gpu import GpuError, authenticate, parse_report
from chutes_proto.gpu._measurements import differences
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
    found = {"signed": True}
    if rims:
        one = Verifier(parsed, *(RIM(name, settings, content=rims[name]) for name in ("driver", "vbios")), settings)
        golden = {i: m["measurement"] for i, m in one.golden_measurements.items() if i != 35 or one.is_msr_35_valid}
        values = lambda m: [m.get_value_at_index(n) for n in range(m.get_number_of_alternatives())]
        found["differs"] = sorted(i for i, m in golden.items() if one.runtime_measurements[i] not in values(m))
        found["accepts"] = one.verify(settings)
    return found

asked = json.load(sys.stdin)
leaf = x509.load_pem_x509_certificate(asked["leaf"].encode())
with redirect_stdout(io.StringIO()):
    answers = [answer(bytes.fromhex(report), leaf, asked["rims"]) for report in asked["reports"]]
print(json.dumps(answers))
"""


def oracle(leaf: bytes, reports: list[bytes], rims: dict[str, str]) -> list[dict[str, Any]]:
    asked = json.dumps({"leaf": leaf.decode(), "reports": [report.hex() for report in reports], "rims": rims})
    ended = subprocess.run([PYTHON, "-c", SCRIPT], input=asked, capture_output=True, text=True, check=True, timeout=300)
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
    assert theirs[0] == {"signed": True, "differs": [], "accepts": True}
    assert not [one for one in theirs[1:] if one.get("signed")]
    for report in altered:
        with pytest.raises(GpuError):
            _ = authenticate(attrs.evolve(evidence, report=report), nonce=None, now=COLLECTED_AT)


def test_both_find_the_same_differences() -> None:
    """Reports of simulated devices against NVIDIA's reference values, which none of theirs fits."""
    rims = {kind: read(f"full-rim-{kind}.xml").decode() for kind in ("driver", "vbios")}
    for fault in ((), ("measurement",), ("measurement_35",)):
        (evidence,) = GPUS.having(*fault).evidence(NONCE)
        assert authenticate(evidence, nonce=NONCE, now=NOW, roots=GPUS.roots)
        (theirs,) = oracle(evidence.chain, [evidence.report], rims)
        report = parse_report(evidence.report)
        ours = [one.index for rim in complete_rims().rims for one in differences(report, rim.values, "driver")]
        # theirs compares the decoder's state, bytes, with an enumeration: to it no decoder is ever disabled
        assert {*theirs["differs"]} - {*ours} == {35}
        assert {*ours} <= {*theirs["differs"]}
        assert not theirs["accepts"]
