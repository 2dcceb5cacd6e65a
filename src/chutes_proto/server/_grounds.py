"""The grounds of a decision: what an audit row says that the verdict on a quote rested on, and judging it again.

Rules kept here:

* an audit row has the SHA-256 of each document (collateral, policy, reference values), the verdict and its time, as
  the JSON object of `grounds`; the digest of the quote is a column of the row;
* anybody who has the documents can judge again, without the server: the same rules give the same verdict at that time;
* a verdict that was accepted may still belong to a refusal: the claim, the nonce or a key decided that.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from functools import cached_property
from hashlib import sha256
from typing import Any, Final, cast, get_args

import attrs
from attrs import evolve, frozen
from msgspec.structs import asdict

from chutes_proto import __version__
from chutes_proto.auth.hotkey import Hotkey
from chutes_proto.errors import DigestError, Refused, VerdictError
from chutes_proto.quote._certificates import read_pem
from chutes_proto.quote._collateral import Collateral, CollateralDigests
from chutes_proto.quote._der import DerError
from chutes_proto.quote._errors import AppraisalError, PolicyError, QuoteError
from chutes_proto.quote._measurements import Profile, Schedule, Stage
from chutes_proto.quote._policy import AcceptedVerdict
from chutes_proto.quote._policy_set import BoundPolicies, parse_policy_set
from chutes_proto.quote._published import parse_profile_file
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._verify import Verdict, check_signed, open_quote, verify_collateral, verify_quote
from chutes_proto.server._profiles import EXTRA_KEYS, ServedProfile
from chutes_proto.store.rows import Platform
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


_LAST: Final = 253_402_300_799
"""The end of the year 9999."""
_MIDNIGHT: Final = datetime.min.replace(tzinfo=UTC).timetz()


def _with_times(value: dict[str, Any]) -> object:
    return datetime.fromtimestamp(value[_TIME], UTC) if value.keys() == {_TIME} else value


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


# --- judging again ---

JUDGED_WITHIN_SECONDS: Final = 600
"""How far the time of an entry may be from that of its verdict: an entry has the time at which its request began, and
the verdict that at which there was collateral. A request takes far less, and a nonce is valid for as long."""
_STAGES: Final = {
    "boot": "boot",
    "attest volumes": "runtime",
    "attest server": "runtime",
    "register server": "runtime",
}
"""The events of all entries that rest on a quote, and the stage that each judges."""
_DECISIONS: Final = ("granted", "replayed", "refused")
"""The decisions of such entries."""


@frozen
class Bundle:
    """The evidence of a decision: the quote, and the documents by which it was judged."""

    quote: bytes
    collateral: Collateral
    documents: Documents

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each document that an entry names."""
        return digests_of(self.quote, self.documents, self.collateral)

    @property
    def evidence(self) -> dict[str, bytes]:
        """The documents by the names that a receipt has. Raises `DigestError` for a chain that cannot be read."""
        pieces: dict[str, bytes] = {f"collateral.{name}": getattr(self.collateral, name) for name in _PIECES}
        pieces |= {name: _respelt(name, data) for name, data in pieces.items() if name.endswith(_CHAIN)}
        documents = {"policy": self.documents.policy, "reference_values": self.documents.reference_values}
        return {"quote": self.quote, **documents, **pieces}

    @classmethod
    def of(cls, evidence: Mapping[str, bytes]) -> Bundle:
        """The documents of a receipt. Raises `DigestError` for others than those of `evidence`.

        An entry has no digest of a chain, and PEM has bits of no meaning: a chain is as `evidence` writes it.
        """
        wanted = {"quote", "policy", "reference_values", *(f"collateral.{name}" for name in _PIECES)}
        if wrong := sorted(wanted ^ evidence.keys()):
            raise DigestError(f"the evidence lacks a document, or has one that is unknown: {wrong[0]}")
        for name in sorted(evidence):
            if name.endswith(_CHAIN) and evidence[name] != _respelt(name, evidence[name]):
                raise DigestError(f"{name} is not written as one")
        pieces: dict[str, Any] = {name: evidence[f"collateral.{name}"] for name in _PIECES}
        return cls(evidence["quote"], Collateral(**pieces), Documents(evidence["policy"], evidence["reference_values"]))


def _respelt(name: str, chain: bytes) -> bytes:
    """A chain as PEM in its one spelling: lines of 64 characters, and nothing around them."""
    try:
        ders = read_pem(chain)
    except DerError as exc:
        raise DigestError(f"{name}: {exc}") from None
    return b"".join(map(_written, ders))


def _written(der: bytes) -> bytes:
    text = base64.b64encode(der)
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return b"\n".join((b"-----BEGIN CERTIFICATE-----", *lines, b"-----END CERTIFICATE-----", b""))


_CHAIN: Final = "_chain"
_PIECES: Final = tuple(piece.name for piece in attrs.fields(Collateral) if piece.name != "pck_certificate_chain")


def digests_of(quote: bytes, documents: Documents, collateral: Collateral | None = None) -> dict[str, str]:
    """The SHA-256 of each document by the name that `missing_digests` has; of collateral the ones that are signed."""
    found = {"quote": _digest(quote), **documents.digests}
    if collateral is not None:
        digests = asdict(CollateralDigests.of(collateral))
        found |= {f"collateral.{name}": value.hex() for name, value in digests.items()}
    return found


def missing_digests(entry: Mapping[str, Any], found: Mapping[str, str]) -> dict[str, str]:
    """The documents that an entry names and are not ``found``, with the SHA-256 that each has.

    Raises `DigestError` if it names none.
    """
    told = _grounds_of(entry)
    of_collateral: object = told.get("collateral")
    by_name: Mapping[str, object] = cast("Any", of_collateral) if isinstance(of_collateral, dict) else {}
    named: dict[str, object] = {
        "quote": entry.get("quote_digest"),
        **{name: told.get(name) for name in ("policy", "reference_values")},
        **{f"collateral.{name}": by_name.get(name) for name in CollateralDigests.__struct_fields__},
    }
    return {name: str(digest) for name, digest in named.items() if digest is None or found.get(name) != digest}


def names_evidence(entry: Mapping[str, Any]) -> bool:
    """Whether an entry names documents that it rests on."""
    try:
        _ = _grounds_of(entry)
    except DigestError:
        return False
    return True


def judge_again(
    entry: Mapping[str, Any], bundle: Bundle, read_yaml: Callable[[bytes], object], root: TrustedRoot
) -> str:
    """Judge the evidence of an entry again, and return the verdict, which is the entry's.

    It is checked that the entry has the same verdict, platform and profile, of that time, and no grant for a quote that
    is rejected. The names of VM and hotkey are in no quote.

    ``entry`` has the members of an audit row, ``read_yaml`` is that of `parse_profile_file`. Raises `DigestError` for a
    document that the entry does not name, and `VerdictError` for an entry that says something else.
    """
    if wrong := missing_digests(entry, bundle.digests):
        raise DigestError(f"not what the entry names: {', '.join(wrong)}")
    told = _grounds_of(entry)
    try:
        found = _judged(entry, told, bundle, read_yaml, root)
    except QuoteError as exc:
        raise VerdictError(f"it is refused: {exc}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as exc:
        raise VerdictError(f"the entry or a document cannot be read: {exc}") from None
    for name, value in found.items():
        if told.get(name) != value:
            raise VerdictError(f"{name} is {_words(value)}, and the entry says {_words(told.get(name))}")
    if entry.get("decision") != "refused" and found["verdict"] != ACCEPTED:
        raise VerdictError(f"verdict is {found['verdict']}, and the entry says {entry.get('decision')}")
    return str(found["verdict"])


def _judged(
    entry: Mapping[str, Any],
    told: Mapping[str, Any],
    bundle: Bundle,
    read_yaml: Callable[[bytes], object],
    root: TrustedRoot,
) -> dict[str, object]:
    at, stage, claimed = told["judged_at"], told["stage"], str(entry.get("hotkey"))
    if type(at) is not int or not 0 <= at <= _LAST or stage not in get_args(Stage):
        raise VerdictError("the entry has another judged_at or stage than any that is written")
    check_written(entry, at, stage)
    policies = parse_policy_set(bundle.documents.policy)
    profiles = _profiles(bundle.documents.reference_values, read_yaml)
    rules = Rules(
        policies.bind(one.measurements for one in profiles),
        policies.bind(one.measurements for one in profiles if not one.rc),
        {one.measurements.identity: one for one in profiles},
    )
    signed = check_signed(open_quote(bundle.quote, now=at, root=root))
    without = evolve(bundle.collateral, pck_certificate_chain=None)
    verified = verify_collateral(without, now=at, root=root, grace=policies.collateral_grace)
    verdict = verify_quote(signed, verified, now=at, report_data=None)

    def proven() -> Hotkey:
        if not told.get("hotkey_proven"):
            raise Refused(Code.SIGNATURE_INVALID, "", reason="the hotkey was not proven")
        return Hotkey.parse(claimed)

    pin, of_entry = platform_of(verdict).pin, (entry.get("platform_kind"), entry.get("platform_id"))
    if of_entry != (pin.kind, pin.value.hex()):
        raise VerdictError(f"it is of platform {pin}, and the entry says {of_entry[0]}:{of_entry[1]}")
    found: dict[str, object] = {
        "advisories": list(verdict.advisory_ids),
        "tcb_date": verdict.tcb_date,
        "tcb_status": str(verdict.tcb_status),
    }
    named: object = entry.get("profile")
    profile: str | None = None
    try:
        profile, outcome = str(rules.accept(verdict, stage, claimed, proven).profile), ACCEPTED
    except AppraisalError as exc:
        outcome = str(refusal_code(exc))
    if named != profile and not (named is None and entry["decision"] == "refused"):  # which names none
        raise VerdictError(f"it matches {profile}, and the entry says {named}")
    return found | {"verdict": outcome}


def check_written(entry: Mapping[str, Any], judged_at: int, stage: str) -> None:
    """Raise `VerdictError` for an entry as no server writes it beside a verdict of this time and stage."""
    at, event, decision = entry["at"], entry["event"], entry["decision"]
    if type(at) is not int or abs(at - judged_at) > JUDGED_WITHIN_SECONDS:
        raise VerdictError(f"it was judged at {judged_at}, and the entry is of {str(at)[:64]}")
    if _STAGES.get(event) != stage:
        raise VerdictError(f"it was judged for stage {stage}, and the entry says {event}")
    if decision not in _DECISIONS:
        raise VerdictError(f"it is a decision on a quote, and the entry says {decision}")


def _grounds_of(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        told = json.loads(entry["evidence"])
    except (KeyError, TypeError, ValueError, RecursionError):
        told = None
    if not isinstance(told, dict) or "judged_at" not in told:
        raise DigestError("the entry names no evidence: it is not about a quote, or older than this")
    return cast("Mapping[str, Any]", told)


def _words(value: object) -> str:
    return " ".join(map(str, cast("list[object]", value))) if isinstance(value, list) else str(value)


def _profiles(document: bytes, read_yaml: Callable[[bytes], object]) -> list[ServedProfile]:
    if not document:
        return []
    members: dict[str, Any] = json.loads(document, object_hook=_with_times)
    every: dict[str, object] = members["defaults"]
    defaults = {key: value for key, value in every.items() if key not in EXTRA_KEYS}
    found: list[ServedProfile] = []
    for text in members["files"]:
        data = text.encode("utf-8", "surrogateescape")
        for profile, extras in parse_profile_file(data, read_yaml, extra_keys=EXTRA_KEYS, defaults=defaults).profiles:
            own = {**every, **extras}
            candidate, allowed = own.get("rc") is True, frozenset(cast("Any", own.get("authorized_hotkeys", ())))
            if allowed or not candidate:
                found.append(ServedProfile(profile, None, False, False, rc=candidate, authorized_hotkeys=allowed))
    try:
        return scheduled(found, {name: Schedule(**table) for name, table in members["schedules"].items()})
    except PolicyError as exc:
        raise VerdictError(f"reference values: {exc}") from None
