"""A client of a confidential service verifies quote, GPUs and their binding with one call, here with simulated ones.

pytest examples/test_confidential_service.py
"""

import pytest

from chutes_proto.gpu import (
    GpuCollateral,
    GpuError,
    GpuPolicy,
    Revocation,
    Rims,
    ServiceBinding,
    verify_rim,
    verify_service,
)
from chutes_proto.quote import Policy
from chutes_proto.testing import SimulatedGpus, SimulatedPlatform

NOW = 1_800_000_000
PLATFORM = SimulatedPlatform(b"the world of my service's tests")
GPUS = SimulatedGpus(b"the world of my service's tests", count=2)


def verify(nonce: str, e2e_pubkey: str, quote: bytes, evidence: bytes):
    """Accept an instance that binds SHA-256(nonce ‖ e2e_pubkey), or raise."""
    rims = Rims.of(verify_rim(data, now=NOW, roots=GPUS.roots) for data in GPUS.rims(NOW))  # keep it for the next one
    return verify_service(
        quote,
        PLATFORM.collateral(NOW),
        evidence,
        binding=ServiceBinding.of_e2e_key(nonce, e2e_pubkey),
        now=NOW,
        policy=Policy(profiles=(PLATFORM.profile,)),
        gpu_policy=GpuPolicy(),
        gpu_collateral=GpuCollateral(rims, Revocation.of(GPUS.status(NOW))),
        count=2,
        root=PLATFORM.root,  # leave both out for Intel's and NVIDIA's
        roots=GPUS.roots,
    )


def instance(nonce: str, e2e_pubkey: str, gpus: SimulatedGpus = GPUS):
    bound = ServiceBinding.of_e2e_key(nonce, e2e_pubkey).gpu_nonce
    return PLATFORM.quote(bound + bytes(32), stage="runtime"), gpus.evidence_json(bound)


def test_an_honest_instance():
    service = verify("ab" * 32, "its key", *instance("ab" * 32, "its key"))
    assert [gpu.model for gpu in service.gpus.gpus] == ["h200", "h200"]


def test_a_gpu_with_other_firmware():
    with pytest.raises(GpuError) as caught:
        verify("ab" * 32, "its key", *instance("ab" * 32, "its key", GPUS.having("measurement")))
    assert "index 9" in str(caught.value)
