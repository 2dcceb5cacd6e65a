"""Verify a confidential service: its quote, its GPUs' evidence, and that both are bound to one nonce and one key.

    verified = verify_service(
        quote, collateral, evidence, binding=ServiceBinding.of_tls_key(nonce, spki_sha256), now=now, …
    )

Rules kept here:

* both are over the same value, or nothing says that they come from one machine;
* the key is in that value or beside it, or somebody in between could hand both on and answer in the service's place;
* evidence of GPUs may still be relayed by the measured VM's software: trust is in that software.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from hmac import compare_digest

from attrs import frozen

from chutes_proto._proof import PROOF, Proven
from chutes_proto.gpu._certificates import NVIDIA, GpuRoots
from chutes_proto.gpu._collateral import GpuCollateral
from chutes_proto.gpu._errors import GpuPolicyError
from chutes_proto.gpu._evidence import DeviceEvidence
from chutes_proto.gpu._policy import AcceptedEvidence, GpuPolicy, check_count, check_evidence
from chutes_proto.gpu._policy import verify as verify_gpus
from chutes_proto.quote import _policy as quotes
from chutes_proto.quote._arguments import BytesLike, as_bytes, check_kind
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
from chutes_proto.quote._measurements import Stage
from chutes_proto.quote._policy import AcceptedVerdict, AnyPolicy
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
from chutes_proto.quote._steps import ReportDataMismatchError

_SIZE = 32


@frozen
class ServiceBinding:
    """The values that quote and GPU evidence must be over.

    ``report_data`` are the first 32 or all 64 bytes of the quote's, ``gpu_nonce`` the 32 bytes of the reports.
    """

    report_data: bytes
    gpu_nonce: bytes

    def __attrs_post_init__(self) -> None:
        check_kind("report_data", self.report_data, bytes, "bytes")
        check_kind("gpu_nonce", self.gpu_nonce, bytes, "bytes")
        if len(self.report_data) not in (_SIZE, 2 * _SIZE) or len(self.gpu_nonce) != _SIZE:
            raise GpuPolicyError("binding: must be 32 or 64 bytes of report data, and 32 of nonce")

    @classmethod
    def of_tls_key(cls, nonce: bytes, spki_sha256: bytes) -> ServiceBinding:
        """A service that binds its TLS key: nonce (32 bytes) ‖ SHA-256 of the key's SubjectPublicKeyInfo (32 bytes)."""
        check_kind("nonce", nonce, bytes, "bytes")
        check_kind("spki_sha256", spki_sha256, bytes, "bytes")
        if len(spki_sha256) != _SIZE:  # without it only the nonce would be compared, which any key can stand beside
            raise GpuPolicyError("binding: spki_sha256 must be the 32 bytes of SHA-256 of the TLS key")
        return cls(nonce + spki_sha256, nonce)

    @classmethod
    def of_e2e_key(cls, nonce: str, e2e_pubkey: str) -> ServiceBinding:
        """An instance that binds its key for end-to-end encryption: SHA-256(nonce ‖ e2e_pubkey), both as it sends them.

        The second half of its report data is not compared. This says less than `of_tls_key`: the digest stands where
        others have a nonce, so anyone for whom the VM attests over a nonce of theirs can bind a key of their own.
        """
        check_kind("nonce", nonce, str, "a str, as the instance sends it")
        check_kind("e2e_pubkey", e2e_pubkey, str, "a str, as the instance sends it")
        digest = hashlib.sha256((nonce + e2e_pubkey).encode()).digest()
        return cls(digest, digest)


@frozen(kw_only=True, eq=False)
class VerifiedService(Proven):
    """A service whose quote and GPU evidence are accepted, and bound to one value."""

    verdict: AcceptedVerdict
    gpus: AcceptedEvidence
    binding: ServiceBinding


def verify_service(
    quote: BytesLike,
    collateral: Collateral | VerifiedCollateral,
    evidence: bytes | Sequence[DeviceEvidence],
    *,
    binding: ServiceBinding,
    now: int,
    policy: AnyPolicy,
    gpu_policy: GpuPolicy,
    gpu_collateral: GpuCollateral,
    count: int | None,
    stage: Stage = "runtime",
    root: TrustedRoot = INTEL_ROOT,
    roots: GpuRoots = NVIDIA,
) -> VerifiedService:
    """Verify a quote, GPU evidence and their binding, in this order, and return them only if all of it is accepted.

    ``count`` is how many GPUs the service must have. None accepts any number but 0: a machine's software chooses what
    it hands over, so pass the number that you rely on. Raises
    `chutes_proto.quote.VerificationError` for the quote and its report data, and `GpuError` for the GPUs.
    """
    check_kind("binding", binding, ServiceBinding, "a ServiceBinding")
    check_kind("gpu_collateral", gpu_collateral, GpuCollateral, "GpuCollateral")
    check_kind("gpu_policy", gpu_policy, GpuPolicy, "GpuPolicy")
    check_kind("roots", roots, GpuRoots, "GpuRoots")
    check_count(count)
    check_evidence("evidence", evidence)
    quote = as_bytes(quote, "the bytes of a quote", "quote")
    verdict = quotes.verify(quote, collateral, now=now, report_data=None, policy=policy, root=root, stage=stage)
    quoted = verdict.quote.body.report_data[: len(binding.report_data)]
    if not compare_digest(quoted, binding.report_data):
        raise ReportDataMismatchError(
            "report data", "it binds something else", got=quoted, expected=binding.report_data
        )
    gpus = verify_gpus(
        evidence,
        nonce=binding.gpu_nonce,
        now=now,
        rims=gpu_collateral.rims,
        revocation=gpu_collateral.revocation,
        policy=gpu_policy,
        count=count,
        roots=roots,
    )
    return VerifiedService(verdict=verdict, gpus=gpus, binding=binding, proof=PROOF)
