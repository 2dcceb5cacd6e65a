"""The grounds of a decision: what an audit row says that the verdict on a quote rested on.

Rules kept here:

* an audit row has the SHA-256 of each document (collateral, policy, reference values), the verdict and its time, as
  the JSON object of `grounds`; the digest of the quote is a column of the row;
* a verdict that was accepted may still belong to a refusal: the claim, the nonce or a key decided that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from functools import cached_property
from hashlib import sha256
from typing import Final, cast

import attrs
from attrs import evolve, frozen
from msgspec.structs import asdict

from chutes_proto import __version__
from chutes_proto.auth.hotkey import Hotkey
from chutes_proto.errors import Refused
from chutes_proto.quote._errors import AppraisalError
from chutes_proto.quote._measurements import Profile, Schedule, Stage
from chutes_proto.quote._policy import AcceptedVerdict
from chutes_proto.quote._policy_set import BoundPolicies
from chutes_proto.quote._verify import Verdict
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.store._rows import Platform
from chutes_proto.wire.codes import Code

ACCEPTED: Final = "accepted"
"""The verdict of a quote that the policy accepts; of others it is the code of the refusal."""

_TIME: Final = "unix_time"


# --- the documents ---


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()


@frozen
class Documents:
    """The documents of an operator: the policy file (empty: the default policy), `reference_values_document`."""

    policy: bytes = b""
    reference_values: bytes = b""

    @cached_property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each, by the name that grounds have."""
        return {"policy": _digest(self.policy), "reference_values": _digest(self.reference_values)}


def policy_document(policy: bytes | None, collateral_grace: int) -> bytes:
    """The document of a policy: that of the file, or the default policy with the configuration's grace."""
    if policy is not None:
        return policy
    return f"[tcb]\ncollateral_grace = {collateral_grace}\n".encode() if collateral_grace else b""


def reference_values_document(
    files: list[bytes], defaults: Mapping[str, object], schedules: Mapping[str, Schedule]
) -> bytes:
    """One document of the files of measurement profiles and what the configuration adds to them.

    It has no secret: the files name those of passphrases.
    """
    members = {
        "files": [data.decode("utf-8", "surrogateescape") for data in files],
        "defaults": dict(defaults),
        "schedules": {name: attrs.asdict(schedule) for name, schedule in schedules.items()},
    }
    return json.dumps(members, sort_keys=True, default=_time).encode()


def _time(value: object) -> dict[str, int]:
    """A date or time of a TOML file."""
    at = value if isinstance(value, datetime) else datetime.combine(cast("date", value), _MIDNIGHT)
    return {_TIME: int(at.timestamp())}


_MIDNIGHT: Final = datetime.min.replace(tzinfo=UTC).timetz()


def scheduled(profiles: list[ServedProfile], schedules: Mapping[str, Schedule]) -> list[ServedProfile]:
    """The profiles with the schedules that a configuration has for them; the most special name counts."""
    found: list[ServedProfile] = []
    for one in profiles:
        for name in names_of(one.measurements):
            if name in schedules:
                one = evolve(one, measurements=evolve(one.measurements, schedule=schedules[name]))
        found.append(one)
    return found


def names_of(profile: Profile) -> tuple[str, str, str]:
    """The names of a profile, the most special one last."""
    return profile.version, profile.name, str(profile)


# --- the judgement ---


@frozen
class Rules:
    """The policies and profiles by which a server judges; ``public`` is without release candidates."""

    policy: BoundPolicies
    public: BoundPolicies
    profiles: Mapping[tuple[str, str], ServedProfile]

    def accept(
        self, verdict: Verdict, stage: Stage, claimed: str, proven: Callable[[], Hotkey] | None
    ) -> AcceptedVerdict:
        """Accept a verdict of this request. Raises `AppraisalError`.

        The error has a note if only a release candidate's profile matches. ``claimed`` is the hotkey that the caller
        names; ``proven`` returns the one that it proves, or raises `Refused`.
        """
        own = _proven(proven) if claimed in self.policy.hotkeys else None
        now = verdict.verified_at  # an audit row has one time, by which the decision can be made again
        accepted = self.policy.appraise(verdict, now=now, stage=stage, claimed=claimed, proven=own)
        served = self.profiles.get(accepted.profile.identity)
        if served is None or not served.rc or _proven(proven) in served.authorized_hotkeys:
            return accepted
        try:
            return self.public.appraise(verdict, now=now, stage=stage, claimed=claimed, proven=own)
        except AppraisalError as exc:
            exc.add_note(f"release candidate {accepted.profile}, and no authorized hotkey is proven")
            raise

    def proves(self, claimed: str, proven: Callable[[], Hotkey] | None) -> bool | None:
        """Whether the caller proves its hotkey; None where no rule asks for that, so it is not looked at."""
        if claimed not in self.policy.hotkeys and not any(served.rc for served in self.profiles.values()):
            return None
        return _proven(proven) is not None


def _proven(proven: Callable[[], Hotkey] | None) -> str | None:
    """The hotkey that the caller proves; None without a proof that holds, which is not refused for that here."""
    try:
        return None if proven is None else proven().address
    except Refused:
        return None


def platform_of(verdict: Verdict) -> Platform:
    """The platform that a quote comes from."""
    return Platform(instance_id=verdict.pck.platform_instance_id, ppid=verdict.pck.ppid)


def outcome_of(refusal: Refused) -> str:
    """The verdict that a refusal tells of."""
    of_policy = (Code.TCB_REJECTED, Code.ATTRIBUTES_REJECTED, Code.MEASUREMENT_MISMATCH)
    return str(refusal.code) if refusal.code in of_policy else ACCEPTED


def refusal_code(error: AppraisalError) -> Code | None:
    """The code of a refusal by the policy; None where it refuses the collateral, which is a fault of ours."""
    parts = {refusal.part for refusal in error.refusals}
    if parts & {"collateral", "verdict"}:
        return None
    if "tcb" in parts:
        return Code.TCB_REJECTED
    return Code.ATTRIBUTES_REJECTED if "attributes" in parts else Code.MEASUREMENT_MISMATCH


def grounds(verdict: Verdict, documents: Documents, stage: Stage, outcome: str, *, hotkey_proven: bool | None) -> str:
    """The grounds of a decision on a quote, as an audit row has them: one JSON object, in canonical form."""
    digests = asdict(verdict.verified.digests)
    members: dict[str, object] = {
        "advisories": list(verdict.advisory_ids),
        "collateral": {name: value.hex() for name, value in digests.items()},
        "judged_at": verdict.verified_at,
        "stage": stage,
        "tcb_date": verdict.tcb_date,
        "tcb_status": str(verdict.tcb_status),
        "verdict": outcome,
        "verifier": f"chutes-proto {__version__}",
        **documents.digests,
    }
    if hotkey_proven is not None:
        members["hotkey_proven"] = hotkey_proven
    return _canonical(members)


_canonical: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode  # dumps makes an encoder each time
