"""Operations 25 to 29: host profiles, by which host tools learn which images a host of their hardware can boot.

A tool describes the hardware of its host. This server keeps the description, and an operator says which published
measurement profiles such hosts are (``chutes-proto hosts name``); the loaded profiles of that name are the answer.
How the reference system computes its fingerprint of a profile is not known: this server's own is the SHA-256 of the
JSON with sorted members, and an answer has the published one once the operator has named it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, TypeAlias, cast

from chutes_proto.effects import Flow, Transact, Uptime
from chutes_proto.errors import BadRequest, Unavailable, ValidationProblem
from chutes_proto.server._call import Call, SignedCall
from chutes_proto.server._service import Service
from chutes_proto.store._rows import HostProfileRow, Read, ReadHostProfiles
from chutes_proto.store._run import Ask
from chutes_proto.units.fleet import HOSTS, RegisterHost
from chutes_proto.wire import fleet, json
from chutes_proto.wire.codec import plain
from chutes_proto.wire.codes import Code

MAX_PROFILE: Final = 32 * 1024
"""Bytes of a profile that is kept, in compact JSON."""

_Status: TypeAlias = Literal["unknown", "pending", "accepted"]
_DETAILS: Final[Mapping[_Status, str]] = {
    "unknown": "This host's profile is not known here; register it.",
    "pending": "The operator has not accepted hosts like this one.",
    "accepted": "Images of the listed versions are accepted on this host.",
}


def read_status(service: Service, call: SignedCall[fleet.HostProfileRequest]) -> Flow[fleet.HostStatusAnswer]:
    """Operations 25 and 26: look a profile up."""
    fingerprint, _ = _encoded(call.message.profile)
    if call.request.target.startswith("/servers/snp/"):
        text = "SEV-SNP is not served here."
        return fleet.HostStatusAnswer(fingerprint=fingerprint, status="unknown", measurements=(), detail=text)
    row = yield from Transact(Ask(Read(HostProfileRow, fingerprint)))
    status, accepted = _accepted(service, row)
    shown = fingerprint if row is None else _shown(row)
    return fleet.HostStatusAnswer(fingerprint=shown, status=status, measurements=accepted, detail=_DETAILS[status])


def register(service: Service, call: SignedCall[fleet.HostProfileRequest]) -> Flow[fleet.HostRegistrationAnswer]:
    """Operation 27: keep a profile."""
    fingerprint, text = _encoded(call.message.profile)
    hotkey = call.caller.address
    service.check_welcome(call.caller)
    now = yield from Uptime()
    if wait := service.host_rates.take(hotkey, now) or service.all_host_rates.take("", now):
        told = "Rate limit exceeded. Try again later."
        raise Unavailable(Code.RATE_LIMITED, told, retry_after=math.ceil(wait))
    if len(text) > MAX_PROFILE:
        raise BadRequest(Code.BODY_TOO_LARGE, f"A host profile has at most {MAX_PROFILE} bytes")
    new = HostProfileRow(fingerprint, hotkey, text, call.now)
    row, stored = yield from Transact(RegisterHost(new, service.revoked.now))
    status, _ = _accepted(service, row)
    if stored:
        yield from call.log("host_registered", hotkey=hotkey, fingerprint=fingerprint)
    return fleet.HostRegistrationAnswer(fingerprint=_shown(row), status=status, stored=stored, detail=_DETAILS[status])


def publish(service: Service, call: Call[fleet.HostProfilesRequest]) -> Flow[fleet.EncodedHostProfiles]:
    """Operation 28: the profiles, of hosts that are named or of all.

    Anyone may ask for it, and it may be a mebibyte, so the kept JSON of a profile goes out as it is: to decode all and
    encode them again would keep other requests waiting.
    """
    found: list[bytes] = []
    for row in (yield from Transact(Ask(ReadHostProfiles(HOSTS)))):
        status, accepted = _accepted(service, row, public=True)
        if status == "accepted" or call.message.include_pending == "true":
            shown, measured = _shown(row), bool(accepted)
            about = fleet.HostProfile(fingerprint=shown, measured=measured, measurements=accepted, profile={})
            found.append(json.encode(plain(about)).removesuffix(b"{}}") + row.profile.encode() + b"}")
    return fleet.EncodedHostProfiles(profiles=b"[" + b",".join(found) + b"]")


def preflight(service: Service, call: SignedCall[fleet.HostPreflightRequest]) -> Flow[fleet.HostPreflightAnswer]:
    """Operation 29: whether one version is accepted on such a host."""
    fingerprint, _ = _encoded(call.message.profile, known_only=False)
    row = yield from Transact(Ask(Read(HostProfileRow, fingerprint)))
    status, accepted = _accepted(service, row)
    wanted = fleet.HostMeasurement(version=call.message.version or "", rc=call.message.rc == "true")
    detail = _DETAILS[status] if wanted in accepted or status != "accepted" else "This version is not accepted here."
    shown = fingerprint if row is None else _shown(row)
    return fleet.HostPreflightAnswer(fingerprint=shown, launchable=wanted in accepted, detail=detail)


def _encoded(profile: Mapping[str, object], *, known_only: bool = True) -> tuple[str, str]:
    """The fingerprint of a profile, and its JSON with sorted members. Raises `BadRequest` (422)."""
    unknown = sorted(profile.keys() - {*fleet.HOST_PROFILE_KEYS}) if known_only else []
    problems: list[ValidationProblem] = []
    if unknown:
        problems.append({"type": "extra_forbidden", "loc": ["body"], "msg": "Extra inputs are not permitted"})
    wrong = [name for name in fleet.HOST_PROFILE_KEYS if not isinstance(profile.get(name, {}), dict | list)]
    for name in wrong if known_only else ():
        problem: ValidationProblem = {
            "type": "model_type",
            "loc": ["body", name],
            "msg": "Input should be an object or a list",
        }
        problems.append(problem)
    if problems:
        raise BadRequest(Code.VALIDATION_ERROR, problems)
    text = json.encode(_sorted(profile))
    return hashlib.sha256(text).hexdigest(), text.decode("utf-8")


def _sorted(value: Any) -> Any:
    match value:
        case dict():
            members = cast("dict[str, Any]", value)
            return {name: _sorted(members[name]) for name in sorted(members)}
        case list():
            return list(map(_sorted, cast("Iterable[Any]", value)))
        case _:
            return value


def _shown(row: HostProfileRow) -> str:
    return row.published or row.fingerprint


def _accepted(
    service: Service, row: HostProfileRow | None, *, public: bool = False
) -> tuple[_Status, tuple[fleet.HostMeasurement, ...]]:
    """The images that are accepted on hosts of a row; release candidates are not ``public``."""
    if row is None:
        return "unknown", ()
    found = {
        (served.measurements.version, served.rc)
        for served in service.profiles.values()
        if served.measurements.name == row.name and not (public and served.rc)
        if row.published is None
        or not served.measurements.fingerprints
        or bytes.fromhex(row.published) in served.measurements.fingerprints
    }
    accepted = tuple(fleet.HostMeasurement(version=version, rc=rc) for version, rc in sorted(found))
    return ("accepted" if accepted else "pending"), accepted
