"""Operations 10 to 12: a nonce for one server, a runtime quote over it, and what came of the newest one.

The order of checks of operation 11, after the signature (``callers.py``): the body; the server is the caller's; the
nonce was issued for it; then as at a boot (``evidence.py``), at the runtime stage; then one transaction: the platform
is the one that the server is bound to, the nonce redeemed, the verdict recorded (``units/servers.py``).

A refusal of a quote is recorded if the nonce has held and was not redeemed before: it is the owner's own, so nobody who
sends again what the owner sent can make a server look failed.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from chutes_proto.auth.certificates import client_key
from chutes_proto.effects import Entropy, Log, Now, Transact
from chutes_proto.errors import BadRequest, Refused, StoreError
from chutes_proto.log import Level, Record
from chutes_proto.server._boot import platform_of
from chutes_proto.server._evidence import appraise, verify_evidence
from chutes_proto.server._nonces import RANDOM_SIZE, expires_at
from chutes_proto.units.servers import GrantRuntime, ReadOwnServer, RecordRuntimeRefusal
from chutes_proto.wire.endpoint import NonceAnswer
from chutes_proto.wire.miners import (
    AttestationStatusAnswer,
    AttestationStatusRequest,
    LastAttestation,
    RuntimeAttestationAnswer,
    RuntimeAttestationRequest,
    RuntimeNonceRequest,
)
from chutes_proto.wire.times import timestamp

if TYPE_CHECKING:
    from chutes_proto.auth.hotkey import Hotkey
    from chutes_proto.effects import Flow
    from chutes_proto.server._evidence import Evidence
    from chutes_proto.server._nonces import Nonce
    from chutes_proto.server._service import Service
    from chutes_proto.store.rows import AttestationRow, ServerRow
    from chutes_proto.wire.http import HttpRequest


def issue_runtime_nonce(
    service: Service, request: HttpRequest, message: RuntimeNonceRequest, request_id: str, caller: Hotkey
) -> Flow[NonceAnswer]:
    """Operation 10."""
    server, _ = yield from Transact(ReadOwnServer(caller.address, message.server_id))
    now = yield from Now()
    random = yield from Entropy(RANDOM_SIZE)
    value = service.mint.issue(
        "runtime", now, random, hotkey=caller.address, address=request.peer_address, scope=server.server_id
    )
    return NonceAnswer(nonce=value.hex(), expires_at=expires_at(now))


def attest_runtime(
    service: Service, request: HttpRequest, message: RuntimeAttestationRequest, request_id: str, caller: Hotkey
) -> Flow[RuntimeAttestationAnswer]:
    """Operation 11."""
    server, _ = yield from Transact(ReadOwnServer(caller.address, message.server_id))
    now = yield from Now()
    nonce = service.mint.check(
        message.nonce, "runtime", now, hotkey=caller.address, address=request.peer_address, scope=server.server_id
    )
    with service.proxies.excusing(request):
        key = client_key(request.peer_certificate)
    evidence: Evidence | None = None
    try:
        with service.proxies.excusing(request):
            evidence = yield from verify_evidence(service, nonce.value, key, message.quote, now)
        yield from _grant(service, request, request_id, server, nonce, evidence, now)
    except (Refused, BadRequest) as exc:
        yield from _record(request, message, request_id, server, nonce, evidence, exc, now)
        raise
    return RuntimeAttestationAnswer(attestation_id=request_id, verified_at=timestamp(now), status="verified")


def read_status(
    service: Service, request: HttpRequest, message: AttestationStatusRequest, request_id: str, caller: Hotkey
) -> Flow[AttestationStatusAnswer]:
    """Operation 12."""
    server, last = yield from Transact(ReadOwnServer(caller.address, message.server_id))
    now = yield from Now()
    age = None if last is None else max(0, now - last.created_at)
    verified = last is not None and last.code is None
    return AttestationStatusAnswer(
        server_id=server.server_id,
        last_attestation=None if last is None else _last(last),
        attestation_status="never_attested" if last is None else "verified" if verified else "failed",
        name=server.name,
        fresh=verified and age is not None and age <= service.fresh_seconds,
        age_seconds=age,
    )


def _last(row: AttestationRow) -> LastAttestation:
    at = timestamp(row.created_at)
    verified = row.code is None
    return LastAttestation(
        attestation_id=row.attestation_id,
        verified=verified,
        created_at=at,
        verified_at=at if verified else None,
        verification_error=None if verified else row.reason,
    )


def _grant(
    service: Service,
    request: HttpRequest,
    request_id: str,
    server: ServerRow,
    nonce: Nonce,
    evidence: Evidence,
    now: int,
) -> Flow[None]:
    profile = appraise(service, evidence, "runtime").profile
    pin = platform_of(evidence).pin
    yield from Transact(
        GrantRuntime(
            now=now,
            request_id=request_id,
            server=server,
            pin=pin,
            nonce=nonce.value,
            nonce_purpose=nonce.purpose,
            nonce_issued_at=nonce.issued_at,
            profile_name=profile.name,
            profile_version=profile.version,
            quote_digest=hashlib.sha256(evidence.quote).digest(),
            peer_address=request.peer_address,
            platform_binding=service.platform_binding,
        )
    )
    fields = {
        "request_id": request_id,
        "server": server.server_id,
        "hotkey": server.hotkey,
        "profile": profile.name,
        "tcb_status": str(evidence.verdict.tcb_status),
        "platform": str(pin),
        "trust": service.trust,
    }
    yield from Log(Record(Level.INFO, "server_attested", fields))


def _record(
    request: HttpRequest,
    message: RuntimeAttestationRequest,
    request_id: str,
    server: ServerRow,
    nonce: Nonce,
    evidence: Evidence | None,
    refusal: Refused | BadRequest,
    now: int,
) -> Flow[None]:
    """Keep the verdict. That it cannot be written does not change the refusal."""
    quote = message.quote.encode() if evidence is None else evidence.quote
    unit = RecordRuntimeRefusal(
        now=now,
        request_id=request_id,
        server=server,
        nonce=nonce.value,
        pin=None if evidence is None else platform_of(evidence).pin,
        code=str(refusal.code),
        detail=str(refusal.detail),
        reason=refusal.reason,
        quote_digest=hashlib.sha256(quote).digest(),
        peer_address=request.peer_address,
    )
    try:
        _ = yield from Transact(unit)
    except (StoreError, Refused) as exc:
        fields = {"request_id": request_id, "error": str(exc)}
        yield from Log(Record(Level.WARNING, "refusal_not_recorded", fields))
