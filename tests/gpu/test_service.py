"""A confidential service: quote, GPU evidence, and one value that binds both and a key."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from chutes_proto.gpu import (
    GpuCollateral,
    GpuError,
    GpuPolicy,
    GpuPolicyError,
    Revocation,
    Rims,
    ServiceBinding,
    VerifiedService,
    verify_rim,
    verify_service,
)
from chutes_proto.quote import Policy, VerificationError
from tests.gpu.simulated import GPUS, NONCE, NOW
from tests.quote.simulated import PLATFORM, PROFILE, ROOT, collateral_of

KEY = hashlib.sha256(b"the service's key").digest()


def verified(binding: ServiceBinding, report_data: bytes, gpu_nonce: bytes, **options: Any) -> VerifiedService:
    rims = Rims.of(verify_rim(data, now=NOW, roots=GPUS.roots) for data in GPUS.rims(NOW))
    usual: dict[str, Any] = {
        "now": NOW,
        "policy": Policy(profiles=(PROFILE,)),
        "gpu_policy": GpuPolicy(),
        "gpu_collateral": GpuCollateral(rims, Revocation.of(GPUS.status(NOW))),
        "count": 1,
        "root": ROOT,
        "roots": GPUS.roots,
    }
    quote = PLATFORM.quote(report_data, stage="runtime")
    evidence = GPUS.evidence_json(gpu_nonce)
    return verify_service(quote, collateral_of(PLATFORM), evidence, binding=binding, **{**usual, **options})


def test_a_service_binds_its_tls_key() -> None:
    service = verified(ServiceBinding.of_tls_key(NONCE, KEY), NONCE + KEY, NONCE)
    assert service.verdict.profile.name == PROFILE.name
    assert len(service.gpus.gpus) == 1


def test_an_instance_binds_its_key_for_end_to_end_encryption() -> None:
    binding = ServiceBinding.of_e2e_key("ab" * 32, "a public key")
    digest = hashlib.sha256(b"ab" * 32 + b"a public key").digest()
    assert binding.gpu_nonce == digest
    assert verified(binding, digest + bytes(32), digest).binding == binding
    with pytest.raises(VerificationError, match="step 37"):
        _ = verified(ServiceBinding.of_e2e_key("ab" * 32, "another key"), digest + bytes(32), digest)


@pytest.mark.parametrize(
    ("report_data", "gpu_nonce", "expected"),
    [
        (NONCE + bytes(32), NONCE, VerificationError),
        (bytes(32) + KEY, NONCE, VerificationError),
        (NONCE + KEY, bytes(32), GpuError),
    ],
)
def test_what_binds_something_else_is_refused(report_data: bytes, gpu_nonce: bytes, expected: type[Exception]) -> None:
    with pytest.raises(expected):
        _ = verified(ServiceBinding.of_tls_key(NONCE, KEY), report_data, gpu_nonce)


def test_as_many_gpus_as_expected() -> None:
    with pytest.raises(GpuError, match="another number of GPUs"):
        _ = verified(ServiceBinding.of_tls_key(NONCE, KEY), NONCE + KEY, NONCE, count=8)


def test_a_binding_is_made_of_what_it_says() -> None:
    wrong: Any = NONCE.hex()
    with pytest.raises(TypeError, match=r"^nonce: must be bytes, not str$"):
        _ = ServiceBinding.of_tls_key(wrong, KEY)
    with pytest.raises(TypeError, match=r"^spki_sha256: must be bytes, not str$"):
        _ = ServiceBinding.of_tls_key(NONCE, wrong)
    for arguments in ((NONCE, "a key"), ("ab" * 32, KEY)):
        with pytest.raises(TypeError, match=r"must be a str, as the instance sends it, not bytes$"):
            _ = ServiceBinding.of_e2e_key(*arguments)
    for name in ("binding", "gpu_collateral"):
        with pytest.raises(TypeError, match=f"^{name}: must be "):
            _ = verified(
                **{"binding": ServiceBinding.of_tls_key(NONCE, KEY), name: wrong},
                report_data=NONCE + KEY,
                gpu_nonce=NONCE,
            )


def test_a_binding_has_its_sizes() -> None:
    for sizes in ((31, 32), (48, 32), (64, 31)):
        with pytest.raises(GpuPolicyError):
            _ = ServiceBinding(bytes(sizes[0]), bytes(sizes[1]))


def test_a_binding_of_a_tls_key_has_one() -> None:
    for digest in (b"", KEY[:31]):
        with pytest.raises(GpuPolicyError, match="spki_sha256"):
            _ = ServiceBinding.of_tls_key(NONCE, digest)
