"""The verifier of GPU evidence beside its bare signature checks, and beside NVIDIA's own Python.

``a GPU`` is one device that was not seen before, with RIMs verified before: its two certificates, report, comparison.
The bare checks are the same three signatures with their keys loaded, of one device or of all eight. Eight GPUs are one
registration's; with OCSP answers, their status is verified, too, and is as new as the devices.

Each ratio is to the bare checks beside it, with the limit that it is held to. The limits are 3 times for a GPU, and for
eight the 20 ms that a registration may take longer, where the bare checks of eight took 12.7 ms.

NVIDIA's own parses a report and verifies its signature, no more, if ``CHUTES_PROTO_NVIDIA_PYTHON`` names the Python of
an environment with ``nv-local-gpu-verifier``.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import thread_time
from typing import Any

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
from chutes_proto.gpu import _rim as rim_module
from chutes_proto.quote import _certificates as certificates
from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.quote._ecdsa import P384
from chutes_proto.testing import SimulatedGpus

NOW = 1_800_000_000
COLLECTED_AT = 1_755_777_600  # 2025-08-21
POLICY = GpuPolicy(revocation="off")
REMEMBERED: tuple[Any, ...] = (certificates.read_certificate, ecdsa.load_point, ecdsa.recall)

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


LIMIT_ONE = 3.0
LIMIT_EIGHT = 20 / 12.7


def run() -> None:
    one_core()
    gpus = SimulatedGpus(b"a world of GPUs to measure in", count=9)
    *eight, other = gpus.evidence(bytes(32))
    files, status, roots = gpus.rims(NOW), Revocation.of(gpus.status(NOW)), gpus.roots
    rims = Rims.of(verify_rim(data, now=NOW, roots=roots) for data in files)
    _table("a simulated Hopper", tuple(eight), other, rims, files[0], status, roots, NOW)
    folder = VECTORS / "gpu"
    if folder.is_dir():
        real = DeviceEvidence((folder / "full-report.bin").read_bytes(), (folder / "full-chain.pem").read_bytes())
        files = tuple((folder / f"full-rim-{kind}.xml").read_bytes() for kind in ("driver", "vbios"))
        rims = Rims.of(verify_rim(data, now=COLLECTED_AT) for data in files)
        _table("a Hopper with driver 550.90.07", (real,), None, rims, files[0], None, NVIDIA, COLLECTED_AT)
        if python := os.environ.get("CHUTES_PROTO_NVIDIA_PYTHON"):
            paths = (str(folder / "full-report.bin"), str(folder / "full-chain.pem"))
            command = (str(Path(python).absolute()), "-c", _THEIRS, *paths)
            with TemporaryDirectory() as cwd:  # it writes a log
                theirs = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd)
            print(f"  {'NVIDIA, parsing and report signature':40} {float(theirs.stdout.split()[-1]):9.0f} us\n")


def _table(
    title: str,
    devices: tuple[DeviceEvidence, ...],
    other: DeviceEvidence | None,
    rims: Rims,
    rim: bytes,
    status: Revocation | None,
    roots: GpuRoots,
    now: int,
) -> None:
    def whole(
        evidence: tuple[DeviceEvidence, ...], known: Revocation = Revocation(), policy: GpuPolicy = POLICY
    ) -> Callable[[], object]:
        return lambda: verify(evidence, nonce=None, now=now, rims=rims, revocation=known, policy=policy, roots=roots)

    def new() -> None:
        """The CAs are known, and the device is not."""
        for remembered in REMEMBERED:
            remembered.cache_clear()
        if other is not None:
            _ = whole((other,), status or Revocation(), POLICY if status is None else GpuPolicy())()

    opened = [authenticate(device, nonce=None, now=now, roots=roots) for device in devices]

    load = ecdsa.load_point.__wrapped__  # which remembers nothing

    def bare(count: int) -> None:
        for device in opened[:count]:
            leaf, brom, ica = device.chain.certificates[:3]
            ecdsa.verify(load(ica.point, P384), brom.signature, brom.signed, P384)
            ecdsa.verify(load(brom.point, P384), leaf.signature, leaf.signed, P384)
            report = device.report
            ecdsa.verify_raw(load(leaf.point, P384), report.signature, report.signed, P384)

    def verify_one_rim() -> object:
        return verify_rim(rim, now=now, roots=roots)

    def nothing() -> None:
        pass

    one, many = "bare signature checks", f"bare signature checks of {len(devices)}"
    works: dict[str, tuple[Callable[[], object], Callable[[], object], str, float | None]] = {
        one: (nothing, lambda: bare(1), one, None),
        "a GPU" if other is not None else "a GPU, nothing known": (new, whole(devices[:1]), one, LIMIT_ONE),
        "a GPU, seen before": (nothing, whole(devices[:1]), one, None),
        "a RIM, once": (rim_module._authentic.cache_clear, verify_one_rim, one, None),
    }
    if len(devices) > 1 and status is not None:
        works[many] = (nothing, lambda: bare(len(devices)), many, None)
        works[f"{len(devices)} GPUs"] = (new, whole(devices), many, LIMIT_EIGHT)
        works[f"{len(devices)} GPUs and OCSP answers"] = (new, whole(devices, status, GpuPolicy()), many, LIMIT_EIGHT)
    pairs = {name: (prepare, work) for name, (prepare, work, _, _) in works.items()}
    found = microseconds(pairs, turns=20, each=5, clock=thread_time)
    print(title)
    for name, (_, _, beside, limit) in works.items():
        ratio = found[name] / found[beside]
        held = "" if limit is None else f"   limit {limit:.2f}: {'held' if ratio <= limit else 'NOT HELD'}"
        print(f"  {name:40} {found[name]:9.0f} us   {ratio:5.2f} x{held}")
    print()
