"""Verify a quote and appraise it by a policy, in one call: the verdict returned is genuine and acceptable."""

from __future__ import annotations

from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._layout import BytesLike
from chutes_proto.quote._measurements import Stage
from chutes_proto.quote._policy import AcceptedVerdict, AnyPolicy, check_policy
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
from chutes_proto.quote._verify import verify_genuine


def verify(
    data: BytesLike,
    collateral: Collateral,
    *,
    now: int,
    report_data: bytes | None,
    policy: AnyPolicy,
    root: TrustedRoot = INTEL_ROOT,
    grace: int = 0,
    sgx: bool = False,
    stage: Stage = "boot",
) -> AcceptedVerdict:
    """Verify a quote against Intel's collateral, and return a verdict only if the policy accepts it.

    ``data`` are the bytes of a TDX quote, with ``sgx`` also those of an SGX quote. ``now`` is the time of verification,
    in whole unix seconds. ``report_data`` are the 64 bytes that the quote must bind; pass None only if something else
    binds it to the peer, because a genuine quote of another machine verifies as well. ``root`` is the CA to trust in
    place of Intel's, ``grace`` the seconds for which expired CRLs, TCB info and QE identity are still accepted.
    ``stage`` says which registers of the policy's profiles count.

    Raises `VerificationError` for every refusal, with its step: the quote does not parse, is not genuine, or is not
    accepted by the policy (`AppraisalError`). Raises `TypeError` for arguments of another type.
    """
    check_policy(policy)
    verdict = verify_genuine(data, collateral, now=now, report_data=report_data, root=root, grace=grace, sgx=sgx)
    return policy.appraise(verdict, stage=stage)
