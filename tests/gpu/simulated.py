"""Simulated GPUs and everything that they need to be verified, for the tests of this room."""

from __future__ import annotations

from typing import Any, Final

from chutes_proto.gpu import AcceptedEvidence, EvidenceRefusedError, GpuPolicy, Revocation, Rims, verify, verify_rim
from chutes_proto.testing import SimulatedGpus

NOW: Final = 1_800_000_000
NONCE: Final = bytes(range(32))
GPUS: Final = SimulatedGpus(b"the world of the GPU verifier's tests")
MACHINE: Final = SimulatedGpus(GPUS.seed, count=3, switches=1)


def verified(gpus: SimulatedGpus, **options: Any) -> AcceptedEvidence:
    """The evidence of a machine, verified with all that belongs to it, unless ``options`` say otherwise."""
    usual: dict[str, Any] = {"nonce": NONCE, "now": NOW, "policy": GpuPolicy(), "roots": gpus.roots}
    if "rims" not in options:
        usual["rims"] = Rims.of(verify_rim(data, now=NOW, roots=gpus.roots) for data in gpus.rims(NOW))
    if "revocation" not in options:
        usual["revocation"] = Revocation.of(gpus.status(NOW))
    return verify(gpus.evidence_json(NONCE), **{**usual, **options})


def refused(gpus: SimulatedGpus, **options: Any) -> EvidenceRefusedError:
    """The refusal of a machine's evidence."""
    try:
        _ = verified(gpus, **options)
    except EvidenceRefusedError as exc:
        return exc
    raise AssertionError("accepted")
