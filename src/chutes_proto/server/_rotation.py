"""Operations 13, 14, 17 and 18: the volumes' keys of a two-phase boot, for a second quote, and the confirmations.

The order of checks of operation 13, and of 17, which is 13 with the proof of the hotkey:

1. the volumes' names; the quote nonce's form; of 17 a known hotkey, and its signature over that nonce; the client
   certificate's key; the quote nonce: of a two-phase boot that this VM, hotkey and client key made, and alive;
2. the quote, over that nonce and the client key, at the runtime stage (``_evidence.py``, steps 2 to 6);
3. one transaction: the nonce checked again and consumed, the platform compared with the boot's and the name's, keys
   handed out, the confirm nonce issued, the record and its audit row written (``units/rotation.py``).

Deployed clients send each of these once, so a busy store is waited for.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from attrs import evolve
from cryptography.hazmat.primitives.serialization import Encoding

from chutes_proto.auth.certificates import client_key
from chutes_proto.auth.signing import ProvenHotkey, check_body_signature
from chutes_proto.effects import Flow, Now
from chutes_proto.errors import Refused
from chutes_proto.keys.generations import K3S_VOLUME, ROOT_VOLUME
from chutes_proto.keys.vault import FreshKey
from chutes_proto.server._boot import known_hotkey, record_refusal, require, token_digest
from chutes_proto.server._call import Call
from chutes_proto.server._evidence import appraise, verify_evidence
from chutes_proto.server._grounds import ACCEPTED, outcome_of
from chutes_proto.server._retry import transact_patiently, verify_with_retries
from chutes_proto.server._service import Service
from chutes_proto.server._volumes import check_names, check_shape, check_volumes, entropy_parts
from chutes_proto.store._rows import Vm
from chutes_proto.units.rotation import AttestVolumes, ConfirmNonce, ConfirmRoot, ConfirmVolumes, FindQuoteNonce, Result
from chutes_proto.wire import vms
from chutes_proto.wire.codes import Code

if TYPE_CHECKING:
    from cryptography.x509 import Certificate


def attest_volumes(service: Service, call: Call[vms.VolumeAttestationRequest]) -> Flow[vms.VolumeAttestationAnswer]:
    """Operations 13 and 17: verify and appraise a second quote; hand out the volumes' keys and a confirm nonce."""
    request, message = call.request, call.message
    is_provisioned = isinstance(message, vms.ProvisionRequest)
    volumes = tuple(dict.fromkeys(message.volumes))
    check_volumes(service, volumes)
    check_names("formatted volume", message.formatted or (), service.volumes)
    if not message.quote_nonce or not message.hotkey:
        raise Refused(Code.QUOTE_NONCE_INVALID, "Quote nonce (X-Quote-Nonce) and hotkey are required")
    nonce = check_shape(message.quote_nonce, Code.QUOTE_NONCE_INVALID, "Quote nonce")
    proof = _prove(service, call, message.quote_nonce)
    proven = None if proof is None else lambda: proof.hotkey
    with service.proxies.excusing(request):
        key = client_key(request.peer_certificate)
    vm = Vm(message.hotkey, message.vm_name)
    digest, body_digest = token_digest(nonce), hashlib.sha256(request.body).digest()
    revoked = service.revoked.now
    known = FindQuoteNonce(call.now, vm, digest, key.digest, body_digest, is_provisioned, revoked)
    _ = yield from transact_patiently(service.waiting(nonce, request), known, request)
    with service.proxies.excusing(request):
        evidence = yield from verify_with_retries(
            lambda: verify_evidence(service, bytes.fromhex(message.quote_nonce or ""), key, message.quote, call.now),
            request.arrived,
        )
    call = evolve(call, now=(yield from Now()))  # collateral may have been waited for
    try:
        profile = appraise(service, evidence, "runtime", vm.hotkey, proven).profile
        *parts, k3s = yield from entropy_parts(len(volumes) + 1)
        fresh = {volume: FreshKey.from_entropy(part) for volume, part in zip(volumes, parts, strict=True)}
        handed = yield from transact_patiently(
            service.attested.of(evidence.platform.pin),
            AttestVolumes(
                now=call.now,
                request_id=call.request_id,
                vm=vm,
                nonce_digest=digest,
                certificate=key.digest,
                body_digest=body_digest,
                quote=evidence.accepted(
                    profile,
                    evidence.grounds(
                        service,
                        "runtime",
                        ACCEPTED,
                        hotkey_proven=service.rules.proves(vm.hotkey, proven),
                    ),
                ),
                peer_address=request.peer_address,
                volumes=volumes,
                formatted=None if message.formatted is None else frozenset(message.formatted),
                fresh={**fresh, K3S_VOLUME: FreshKey.encryption_key(k3s)},
                confirm_nonces=_confirm_nonces(service, nonce),
                vault=service.vault,
                rotate_after=service.rotate_after,
                is_provisioned=is_provisioned,
                root_ca=_pem(request.peer_certificate) if is_provisioned else None,
                revocations=revoked,
            ),
            request,
        )
    except Refused as exc:
        rested_on = evidence.grounds(
            service, "runtime", outcome_of(exc), hotkey_proven=service.rules.proves(vm.hotkey, proven)
        )
        yield from record_refusal(service, call, vm, evidence, exc, "runtime", rested_on)
        raise
    yield from call.log(
        "volumes_attested",
        vm=vm.name,
        hotkey=vm.hotkey,
        volumes=list(volumes),
        replayed=handed.replayed,
        **evidence.fields(service),
    )
    return vms.VolumeAttestationAnswer(
        volumes={volume: vms.VolumePair(current=pair.current, next=pair.next) for volume, pair in handed.volumes},
        confirm_nonce=handed.confirm_nonce,
        k3s_encryption_key=handed.k3s_encryption_key,
        in_use=handed.in_use,
    )


def confirm_volumes(service: Service, call: Call[vms.VolumeConfirmationRequest]) -> Flow[vms.VolumeConfirmationAnswer]:
    """Operations 14 and 18: take the VM's confirmation that its disks open with the keys handed out."""
    message = call.message
    is_provisioned = isinstance(message, vms.ProvisionConfirmationRequest)
    rotated = tuple((volume, confirmation.rotated) for volume, confirmation in message.volumes.items())
    of_root = is_provisioned and {*message.volumes} == {ROOT_VOLUME}
    if not of_root:
        check_volumes(service, [volume for volume, _ in rotated])
    if not message.confirm_nonce or not message.hotkey:
        raise Refused(Code.CONFIRM_NONCE_INVALID, "Confirm nonce (X-Confirm-Nonce) and hotkey are required")
    nonce = check_shape(message.confirm_nonce, Code.CONFIRM_NONCE_INVALID, "Confirm nonce")
    _ = _prove(service, call, message.confirm_nonce)
    vm = Vm(message.hotkey, message.vm_name)
    shared: dict[str, Any] = {
        "now": call.now,
        "request_id": call.request_id,
        "vm": vm,
        "nonce_digest": token_digest(nonce),
        "body_digest": hashlib.sha256(call.request.body).digest(),
        "vault": service.vault,
        "revocations": service.revoked.now,
    }
    place = service.waiting(nonce, call.request)
    results: tuple[tuple[str, Result], ...]
    if of_root:
        root = ConfirmRoot(rotated=message.volumes[ROOT_VOLUME].rotated, **shared)
        results = ((ROOT_VOLUME, (yield from transact_patiently(place, root, call.request))),)
    else:
        unit = ConfirmVolumes(rotated=rotated, is_provisioned=is_provisioned, **shared)
        results = yield from transact_patiently(place, unit, call.request)
    outcomes = [f"{volume}: {result}" for volume, result in results]
    yield from call.log("volumes_confirmed", vm=vm.name, hotkey=vm.hotkey, volumes=outcomes)
    return vms.VolumeConfirmationAnswer(
        status="confirmed", volumes={volume: vms.VolumeResult(result=result) for volume, result in results}
    )


def _prove(service: Service, call: Call[Any], expected: str) -> ProvenHotkey | None:
    """Check the proof of the hotkey that operations 17 and 18 demand, over the nonce ``expected``.

    The others have none. Raises `Refused`.
    """
    message = call.message
    if not isinstance(message, vms.ProvisionRequest | vms.ProvisionConfirmationRequest):
        return None
    hotkey = known_hotkey(service, message.hotkey or "")

    def check() -> ProvenHotkey:
        if message.nonce != expected:
            raise Refused(Code.SIGNATURE_INVALID, "", reason="X-Chutes-Nonce is not the nonce of this step")
        return check_body_signature(hotkey, message.hotkey, message.nonce, call.request.body, message.signature)

    return require(check)


def _pem(certificate: Certificate | None) -> str | None:
    return None if certificate is None else certificate.public_bytes(Encoding.PEM).decode("ascii")


def _confirm_nonces(service: Service, quote_nonce: bytes) -> tuple[ConfirmNonce, ...]:
    """The confirm nonces that belong to a quote nonce, with their digests."""
    nonces = service.tokens.confirm_nonces(quote_nonce)
    return tuple(ConfirmNonce(nonce, token_digest(nonce.reveal())) for nonce in nonces)
