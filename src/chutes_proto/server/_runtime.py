"""Operations 10 to 12: a nonce for one server, a runtime quote over it, and the verdict on the newest one.

The order of checks of operation 11, after the signature (``_callers.py``): the body; the server is the caller's; the
nonce was issued for it; then as at a boot (``_evidence.py``), at the runtime stage; then one transaction: the platform
is the one that the server is bound to, the nonce redeemed, the verdict recorded (``units/servers.py``).

A refusal of a quote is recorded if the nonce has held and was not redeemed before: an attacker who sends the owner's
request again cannot make a server look failed.
"""

from __future__ import annotations

import hashlib

from chutes_proto.auth.certificates import client_key
from chutes_proto.effects import Entropy, Flow, Transact
from chutes_proto.errors import BadRequest, Refused
from chutes_proto.server._call import SignedCall, found_json
from chutes_proto.server._evidence import Evidence, appraise, verify_evidence
from chutes_proto.server._gpu_evidence import appraise_gpus
from chutes_proto.server._grounds import ACCEPTED, outcome_of
from chutes_proto.server._nonces import RANDOM_SIZE, expires_at
from chutes_proto.server._service import Service
from chutes_proto.store._rows import AttestationRow, ServerRow
from chutes_proto.units.nonces import Nonce
from chutes_proto.units.records import Quote
from chutes_proto.units.servers import GrantRuntime, ReadDeclared, ReadOwnServer, ReadStatus, RecordRuntimeRefusal
from chutes_proto.wire import miners
from chutes_proto.wire.endpoint import NonceAnswer
from chutes_proto.wire.names import timestamp


def issue_runtime_nonce(service: Service, call: SignedCall[miners.ServerRequest]) -> Flow[NonceAnswer]:
    """Operation 10: issue a nonce for a runtime quote of the caller's server."""
    hotkey, address = call.caller.address, call.request.peer_address
    server, _ = yield from Transact(ReadOwnServer(hotkey, call.message.server_id))
    random = yield from Entropy(RANDOM_SIZE)
    value = service.mint.issue("runtime", call.now, random, hotkey=hotkey, address=address, scope=server.server_id)
    return NonceAnswer(nonce=value.hex(), expires_at=expires_at(call.now))


def attest_runtime(
    service: Service, call: SignedCall[miners.RuntimeAttestationRequest]
) -> Flow[miners.RuntimeAttestationAnswer]:
    """Operation 11: verify, appraise and record a runtime quote of the caller's server."""
    request, message = call.request, call.message
    hotkey, address = call.caller.address, request.peer_address
    server, declared = yield from Transact(ReadDeclared(hotkey, message.server_id))
    nonce = service.mint.check(
        message.nonce, "runtime", call.now, hotkey=hotkey, address=address, scope=server.server_id
    )
    with service.proxies.excusing(request):
        key = client_key(request.peer_certificate)
    evidence: Evidence | None = None
    try:
        with service.proxies.excusing(request):
            evidence = yield from verify_evidence(service, nonce.value, key, message.quote, call.now)
        profile = appraise(service, evidence, "runtime", hotkey, lambda: call.caller).profile
        gpus = yield from appraise_gpus(
            service.gpu_appraisal,
            service.profiles[profile.identity].gpu_evidence,
            profile,
            message.gpu_evidence,
            nonce=nonce.value,
            counts=(len(declared), profile.gpu_count),
            now=call.now,
        )
        yield from Transact(
            GrantRuntime(
                now=call.now,
                request_id=call.request_id,
                server=server,
                nonce=nonce,
                quote=evidence.accepted(profile, evidence.grounds(service, "runtime", ACCEPTED, hotkey_proven=True)),
                peer_address=address,
                gpus=gpus,
                platform=evidence.platform,
                revocations=service.revoked.now,
            )
        )
    except (Refused, BadRequest) as exc:
        rested_on = None
        if evidence is not None and isinstance(exc, Refused):
            rested_on = evidence.grounds(service, "runtime", outcome_of(exc), hotkey_proven=True)
        yield from _record(call, server, nonce, evidence, exc, rested_on)
        raise
    yield from call.log(
        "server_attested",
        server=server.server_id,
        hotkey=server.hotkey,
        profile=profile.name,
        gpus=gpus.text,
        **evidence.fields(service),
    )
    return miners.RuntimeAttestationAnswer(
        attestation_id=call.request_id, verified_at=timestamp(call.now), status="verified"
    )


def read_status(service: Service, call: SignedCall[miners.ServerRequest]) -> Flow[miners.AttestationStatusAnswer]:
    """Operation 12: report the newest verdict on the caller's server."""
    unit = ReadStatus(call.now, call.caller.address, call.message.server_id, service.revoked.now)
    server, last, revoked = yield from Transact(unit)
    age = None if last is None else max(0, call.now - last.created_at)
    verified = last is not None and last.code is None
    return miners.AttestationStatusAnswer(
        server_id=server.server_id,
        last_attestation=None if last is None else _last(last),
        attestation_status="never_attested" if last is None else "verified" if verified else "failed",
        name=server.name,
        fresh=verified and age is not None and age <= service.fresh_seconds and revoked is None,
        age_seconds=age,
    )


def _last(row: AttestationRow) -> miners.LastAttestation:
    at = timestamp(row.created_at)
    verified = row.code is None
    return miners.LastAttestation(
        attestation_id=row.attestation_id,
        verified=verified,
        created_at=at,
        verified_at=at if verified else None,
        verification_error=None if verified else row.reason,
    )


def _record(
    call: SignedCall[miners.RuntimeAttestationRequest],
    server: ServerRow,
    nonce: Nonce,
    evidence: Evidence | None,
    refusal: Refused | BadRequest,
    rested_on: str | None,
) -> Flow[None]:
    if evidence is None:
        quote = Quote.refused(hashlib.sha256(call.message.quote.encode()).digest())
    else:
        quote = Quote.refused(evidence.quote_digest, evidence.platform.pin, rested_on)
    unit = RecordRuntimeRefusal(
        now=call.now,
        request_id=call.request_id,
        server=server,
        nonce=nonce.value,
        quote=quote,
        code=str(refusal.code),
        detail=str(refusal.detail),
        reason=refusal.reason,
        peer_address=call.request.peer_address,
        finding=found_json(refusal),
    )
    _ = yield from call.record_refusal(unit)
