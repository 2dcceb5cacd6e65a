"""GPU evidence at a registration and at a runtime attestation: recorded, or required, as the profile says.

Rules kept here:

* the evidence is over the same nonce as the quote beside it, which the TD that hands it over is measured to ask for;
* only evidence of genuine devices, over the nonce, makes the server fetch what they are verified with;
* ``record`` refuses nothing: the audit row says which devices verified, or why they did not;
* ``require`` refuses evidence that does not verify, or that is missing. RIMs or OCSP answers that are not there, have
  ended or do not verify are a fault of ours (503);
* no boot depends on any of this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, Literal

from attrs import evolve, field, frozen

from chutes_proto.effects import FetchGpuCollateral, Flow, Now
from chutes_proto.errors import CollateralUnavailable, Refused, Unavailable
from chutes_proto.gpu import (
    NVIDIA,
    AcceptedEvidence,
    GenuineDevice,
    GpuCollateral,
    GpuError,
    GpuPolicy,
    GpuRoots,
    GpuVerificationError,
)
from chutes_proto.gpu._policy import EvidenceRefusedError, Opened, accept, open_evidence
from chutes_proto.quote._measurements import Profile
from chutes_proto.units.records import SignedGpu, SignedGpus, legible
from chutes_proto.wire.codes import Code

Demand = Literal["record", "require"]
"""A profile's demand on GPU evidence."""

_OURS: Final = frozenset({*range(1, 9), *range(13, 24), 25, 26, 27})
"""The steps that a genuine device's evidence fails only for want of good RIMs and OCSP answers.

Steps 1 to 8 are then of a RIM's signer or a responder: the device's own chain was verified before.
"""
_REJECTED: Final = "The evidence of the GPUs is not accepted."


@frozen
class GpuAppraisal:
    """The server's means to appraise GPU evidence: its policy, and the roots to trust."""

    policy: GpuPolicy = field(factory=GpuPolicy)
    roots: GpuRoots = NVIDIA


def appraise_gpus(
    appraisal: GpuAppraisal | None,
    demand: Demand,
    profile: Profile,
    text: str | None,
    *,
    nonce: bytes,
    counts: Sequence[int | None],
    now: int,
) -> Flow[SignedGpus]:
    """Appraise GPU evidence, a JSON text, over ``nonce`` (32 bytes); each of ``counts`` is how many GPUs it must be of.

    Raises `Refused` and `Unavailable` only if the profile requires evidence.
    """
    is_required = demand == "require"
    if text is None:
        if is_required:
            raise Refused(Code.GPU_EVIDENCE_REJECTED, f"{_REJECTED} There is none.", reason="no GPU evidence")
        return SignedGpus("no GPU evidence")
    about = f"{len(text)} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"
    if appraisal is None:
        return SignedGpus(f"GPU evidence NOT verified, {about}")
    opened: Opened = []
    try:
        opened = open_evidence(text.encode(), nonce=nonce, now=now, roots=appraisal.roots)
        genuine = tuple(device for device in opened if isinstance(device, GenuineDevice))
        collateral = GpuCollateral()
        if genuine:
            collateral = yield from FetchGpuCollateral(now, genuine)
            now = yield from Now()  # an OCSP answer may have been made just now
        accepted = accept(
            opened,
            nonce=nonce,
            now=now,
            rims=collateral.rims,
            revocation=collateral.revocation,
            policy=_policy(appraisal.policy, profile),
            counts=counts,
        )
    except (GpuError, CollateralUnavailable) as exc:
        reason = legible(f"GPU evidence NOT accepted: {_code(exc)}: {exc}", 1000)  # it repeats the host's words
        if not is_required:
            return SignedGpus(f"{reason}; {about}")
        if _is_ours(exc, opened):
            detail = "No reference values or certificate status for these GPUs now. Retry later."
            raise Unavailable(Code.COLLATERAL_UNAVAILABLE, detail, reason=reason, retry_after=60) from None
        raise Refused(Code.GPU_EVIDENCE_REJECTED, f"{_REJECTED} {_code(exc)}", reason=reason) from None
    devices = tuple(SignedGpu(str(one.device_id), str(one.serial_number)) for one in accepted.devices)
    return SignedGpus(f"{_described(accepted)}; {about}", devices, is_required)


def _policy(policy: GpuPolicy, profile: Profile) -> GpuPolicy:
    """The policy, with the profile's models where it names none of its own."""
    if policy.models is not None or not profile.expected_gpus:
        return policy
    return evolve(policy, models=frozenset(profile.expected_gpus))


def _is_ours(error: GpuError | CollateralUnavailable, opened: Opened) -> bool:
    """Whether reference values or the status of certificates are at fault, and not the evidence."""
    if not isinstance(error, EvidenceRefusedError):
        return isinstance(error, CollateralUnavailable)
    cause = error.error
    return isinstance(cause, GpuVerificationError) and cause.step in _OURS and cause not in opened


def _code(error: GpuError | CollateralUnavailable) -> str:
    return error.code if isinstance(error, GpuError) else "collateral_unavailable"


def _described(accepted: AcceptedEvidence) -> str:
    """The result in words, for the audit."""
    devices = accepted.devices
    kinds = sorted({f"{one.chip} driver {one.driver} VBIOS {one.vbios}" for one in devices})
    against = sorted({one.reference for one in devices})
    digests = sorted({rim.digest.hex()[:16] for one in devices for rim in one.rims})
    checked = "checked" if all(one.revocation_checked for one in devices) else "NOT checked"
    serials = ", ".join(str(one.serial_number) for one in devices)
    return (
        f"GPU evidence verified: {len(devices)} devices ({'; '.join(kinds)}), measurements {'/'.join(against)}"
        f" {' '.join(digests)}, revocation {checked}, serial numbers {serials}"
    )
