"""A verdict for others: an EAT Attestation Result (EAR), as JSON or as a signed JSON web token.

Rules kept here:

* what a policy accepted is ``affirming``, but no better than the worst claim of the trustworthiness vector (EAR,
  ``ear.status``); what it refused is ``contraindicated``; a verdict that no policy appraised is ``none``, and affirms
  nothing;
* the trustworthiness vector has a claim only where something was checked: measurements that were left to any value give
  no claim about executables.

Sources: draft-ietf-rats-ear (profile ``tag:github.com,2023:veraison/ear``); draft-ietf-rats-ar4si (the vector, and the
meaning of its values); RFC 9711 (EAT); RFC 7519 (JWT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chutes_proto._extras import missing
from chutes_proto.quote._arguments import check_kind
from chutes_proto.quote._errors import AppraisalError, PolicyError, Refusal
from chutes_proto.quote._layout import SgxAttributes, SgxReport, TdAttributes
from chutes_proto.quote._policy import AcceptedVerdict
from chutes_proto.quote._statements import TcbStatus
from chutes_proto.quote._verify import Verdict

Claims: TypeAlias = "dict[str, Any]"

PROFILE: Final = "tag:github.com,2023:veraison/ear"

_AFFIRMING, _WARNING, _CONTRAINDICATED = 2, 32, 96
_BOOT_ONLY: Final = 3
"""Of "executables": only approved ones were loaded during the boot; later ones were not measured."""
_DEBUG: Final = 96
_GOOD: Final = frozenset({TcbStatus.UP_TO_DATE, TcbStatus.SW_HARDENING_NEEDED})


def make_ear(
    verdict: Verdict, *, policy_id: str, refused: AppraisalError | None = None, nonce: str | None = None
) -> Claims:
    """Make the claims of an EAR for a verdict, or for what a policy ``refused`` of it.

    ``policy_id`` is a URI or name by which readers know the policy, ``nonce`` (8 to 88 characters) that of who asked.
    Issued at the time of verification. Raises `PolicyError` for a nonce of another length.
    """
    check_kind("verdict", verdict, Verdict, "a Verdict, as of verify or verify_genuine")
    check_kind("policy_id", policy_id, str, "a str")
    if refused is not None:
        check_kind("refused", refused, AppraisalError, "an AppraisalError")
    if nonce is not None:
        check_kind("nonce", nonce, str, "a str")
    if nonce is not None and not 8 <= len(nonce) <= 88:
        raise PolicyError("nonce: an EAT nonce has 8 to 88 characters")
    vector = _vector(verdict, None if refused is None else refused.refusals)
    if refused is not None:
        status = "contraindicated"
    else:
        status = _tier(max(vector.values())) if isinstance(verdict, AcceptedVerdict) else "none"
    appraisal: Claims = {
        "ear.status": status,
        "ear.trustworthiness-vector": vector,
        "ear.appraisal-policy-id": policy_id,
        "ear.veraison.annotated-evidence": verdict.to_dict(),
    }
    if refused is not None:
        appraisal["ear.veraison.policy-claims"] = {
            "refusals": [{"part": one.part, "code": one.code, "detail": one.detail} for one in refused.refusals]
        }
    from chutes_proto import __version__

    return {
        "eat_profile": PROFILE,
        "iat": verdict.verified_at,
        **({} if nonce is None else {"eat_nonce": nonce}),
        "ear.verifier-id": {"developer": "chutes-proto", "build": f"chutes-proto {__version__}"},
        "submods": {verdict.quote.tee.lower(): appraisal},
    }


def sign_ear(claims: Claims, key: EllipticCurvePrivateKey | Ed25519PrivateKey, *, key_id: str | None = None) -> str:
    """Sign claims as a JSON web token: ES256, ES384 or ES512 by the key's curve, or EdDSA.

    ``key_id`` tells readers which key it is. Needs the extra ``token``. Raises `PolicyError` for a key of another kind.
    """
    try:
        import jwt
    except ModuleNotFoundError as exc:
        raise missing("token", exc) from None
    curve = getattr(getattr(key, "curve", None), "name", type(key).__name__)
    algorithm = _ALGORITHMS.get(curve)
    if algorithm is None:
        raise PolicyError("key: must be a private key on P-256, P-384 or P-521, or of Ed25519")
    headers = {"typ": "eat+jwt", **({} if key_id is None else {"kid": key_id})}
    return jwt.encode(claims, key, algorithm=algorithm, headers=headers)


_ALGORITHMS: Final = {
    "secp256r1": "ES256",
    "secp384r1": "ES384",
    "secp521r1": "ES512",
    "Ed25519PrivateKey": "EdDSA",
}


def _tier(value: int) -> str:
    """The tier of a claim of the vector."""
    return "affirming" if value < _WARNING else "warning" if value < _CONTRAINDICATED else "contraindicated"


def _vector(verdict: Verdict, refusals: Sequence[Refusal] | None) -> dict[str, int]:
    """The claims of AR4SI that something was checked for; without a policy, that is the hardware, and no debugging."""
    refused = {refusal.part for refusal in refusals or ()}
    is_appraised = refusals is not None or isinstance(verdict, AcceptedVerdict)
    body = verdict.quote.body
    debug = body.flags & SgxAttributes.DEBUG if isinstance(body, SgxReport) else body.td_attributes & TdAttributes.DEBUG
    good = verdict.tcb_status in _GOOD and "tcb" not in refused
    vector = {"hardware": _AFFIRMING if good else _WARNING}
    if debug:
        vector["configuration"] = _DEBUG
    elif is_appraised:
        vector["configuration"] = _WARNING if "attributes" in refused else _AFFIRMING
    if "measurement" in refused:
        vector["executables"] = _CONTRAINDICATED
    elif refusals is None and isinstance(verdict, AcceptedVerdict) and not verdict.unpinned:
        vector["executables"] = _BOOT_ONLY
    return vector
