"""The verifier of GPU evidence beside its bare signature checks, and beside NVIDIA's own Python.

``a GPU`` is one device that was not seen before, with RIMs verified before: its two certificates, report, comparison.
The bare checks are the same three signatures with their keys loaded. Eight GPUs are one registration's. NVIDIA's own
parses a report and verifies its signature, no more, if ``CHUTES_PROTO_NVIDIA_PYTHON`` names the Python of an
environment with ``nv-local-gpu-verifier``.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

from bench.measure import microseconds, one_core
from bench.verifier import VECTORS
from chutes_proto.gpu import (
    NVIDIA,
    DeviceEvidence,
    GpuPolicy,
    GpuRoots,
    Revocation,
    Rims,
    authenticate,
    verify,
    verify_rim,
)
from chutes_proto.gpu import _certificates as certificates
from chutes_proto.gpu import _rim as rim_module
from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.quote._ecdsa import P384
from chutes_proto.testing import SimulatedGpus

NOW = 1_800_000_000
COLLECTED_AT = 1_755_777_600  # 2025-08-21
POLICY = GpuPolicy(revocation="off")
REMEMBERED = (certificates.verify_chain, certificates.read, certificates._link, certificates.load_key)

_THEIRS = """
import hashlib, sys, time
from cryptography import x509
from verifier.attestation import AttestationReport
from verifier.config import HopperSettings
report, leaf = open(sys.argv[1], "rb").read(), x509.load_pem_x509_certificate(open(sys.argv[2], "rb").read())
settings, times = HopperSettings(), []
for _ in range(100):
    start = time.perf_counter()
    assert AttestationReport(report, settings).verify_signature(leaf, settings.signature_length, hashlib.sha384)
    times.append(time.perf_counter() - start)
print(sorted(times)[50] * 1e6)
"""


def run() -> None:
    one_core()
    gpus = SimulatedGpus(b"a world of GPUs to measure in", count=9)
    *eight, other = gpus.evidence(bytes(32))
    files = gpus.rims(NOW)
    rims = Rims.of(verify_rim(data, now=NOW, roots=gpus.roots) for data in files)
    _table("a simulated Hopper", tuple(eight), other, rims, files[0], gpus.roots, NOW)
    folder = VECTORS / "gpu"
    if folder.is_dir():
        real = DeviceEvidence((folder / "full-report.bin").read_bytes(), (folder / "full-chain.pem").read_bytes())
        files = tuple((folder / f"full-rim-{kind}.xml").read_bytes() for kind in ("driver", "vbios"))
        rims = Rims.of(verify_rim(data, now=COLLECTED_AT) for data in files)
        _table("a Hopper with driver 550.90.07", (real,), None, rims, files[0], NVIDIA, COLLECTED_AT)
        if python := os.environ.get("CHUTES_PROTO_NVIDIA_PYTHON"):
            paths = (str(folder / "full-report.bin"), str(folder / "full-chain.pem"))
            theirs = subprocess.run((python, "-c", _THEIRS, *paths), capture_output=True, text=True, check=True)
            print(f"  {'NVIDIA, parsing and report signature':40} {float(theirs.stdout.split()[-1]):9.0f} us\n")


def _table(
    title: str,
    devices: tuple[DeviceEvidence, ...],
    other: DeviceEvidence | None,
    rims: Rims,
    rim: bytes,
    roots: GpuRoots,
    now: int,
) -> None:
    def whole(evidence: tuple[DeviceEvidence, ...]) -> Callable[[], object]:
        return lambda: verify(
            evidence, nonce=None, now=now, rims=rims, revocation=Revocation(), policy=POLICY, roots=roots
        )

    def new() -> None:
        """The CAs are known, and the device is not."""
        for remembered in REMEMBERED:
            remembered.cache_clear()
        if other is not None:
            _ = authenticate(other, nonce=None, now=now, roots=roots)
            certificates.verify_chain.cache_clear()

    device = authenticate(devices[0], nonce=None, now=now, roots=roots)
    leaf, brom, ica = device.chain.certificates[:3]

    def bare() -> None:
        ecdsa.verify(ecdsa.load_point(ica.point, P384), brom.signature, brom.signed, P384)
        ecdsa.verify(ecdsa.load_point(brom.point, P384), leaf.signature, leaf.signed, P384)
        report = device.report
        ecdsa.verify_raw(ecdsa.load_point(leaf.point, P384), report.signature, report.signed, P384)

    def verify_one_rim() -> object:
        return verify_rim(rim, now=now, roots=roots)

    works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "bare signature checks": (lambda: None, bare),
        "a GPU" if other is not None else "a GPU, nothing known": (new, whole(devices[:1])),
        "a GPU, seen before": (lambda: None, whole(devices[:1])),
        "a RIM, once": (rim_module._authentic.cache_clear, verify_one_rim),
    }
    if len(devices) > 1:
        works[f"{len(devices)} GPUs"] = (new, whole(devices))
    found = microseconds(works, turns=5, each=20)
    print(title)
    for name, time in found.items():
        print(f"  {name:40} {time:9.0f} us   {time / found['bare signature checks']:5.2f} x")
    print()
