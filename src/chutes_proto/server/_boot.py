"""Operations 1 and 2: a nonce, then a quote over it, then the root passphrase and a token for the next step.

The order of checks of operation 2: ``_evidence.py`` has steps 1 to 6; then

7. a version that may still boot; the claim: a known hotkey in canonical form, which is not blacklisted; the exchange
   that the image speaks, as far as its request shows that; the signature if there is one or must be one; the VM's name
   free or bound to this platform;
8. one transaction: the claim taken, the nonce redeemed, the passphrase read or made, the token issued, the record and
   its audit row written (``units/boot.py``; that the name is free is read there too, first).

Until step 8 nothing is consumed: a boot that is refused, or that the server fails, can be tried again with the same
nonce. A refusal from step 5 on is recorded, capped per platform and day; before that it is a log line, held back when
there are many, because anyone can cause it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal

from attrs import evolve

from chutes_proto.auth.certificates import ClientKey, client_key
from chutes_proto.auth.hotkey import SEED_SIZE, Hotkey, HotkeyError, HotkeyPair
from chutes_proto.auth.signing import ProvenHotkey, check_body_signature
from chutes_proto.effects import Entropy, Flow, Uptime
from chutes_proto.errors import LocalProtocolError, Refused
from chutes_proto.keys.vault import FreshKey
from chutes_proto.log import Level
from chutes_proto.quote._policy import AcceptedVerdict
from chutes_proto.secret import Secret
from chutes_proto.server._call import Call, found_json
from chutes_proto.server._evidence import Evidence, appraise, verify_evidence
from chutes_proto.server._grounds import ACCEPTED, outcome_of
from chutes_proto.server._nonces import RANDOM_SIZE, expires_at
from chutes_proto.server._retry import transact_patiently
from chutes_proto.server._service import Service
from chutes_proto.server._tokens import RANDOM_SIZE as TOKEN_RANDOM_SIZE
from chutes_proto.store._rows import Vm
from chutes_proto.units.boot import DAY, GrantBoot, RecordRefusal, RootRotation
from chutes_proto.units.nonces import Nonce
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import NonceAnswer
from chutes_proto.wire.vms import BootAttestationAnswer, BootAttestationRequest, BootNonceRequest


def issue_boot_nonce(service: Service, call: Call[BootNonceRequest]) -> Flow[NonceAnswer]:
    """Operation 1: issue a nonce, which costs one MAC and writes nothing; balancers ask it whether boots are served."""
    service.readiness.require()
    hotkey, address = call.message.miner_hotkey, call.request.peer_address
    random = yield from Entropy(RANDOM_SIZE)
    value = service.mint.issue("boot", call.now, random, hotkey=hotkey, address=address)
    return NonceAnswer(nonce=value.hex(), expires_at=expires_at(call.now))


def attest_boot(service: Service, call: Call[BootAttestationRequest]) -> Flow[BootAttestationAnswer]:
    """Operation 2: verify and appraise a boot's quote; grant its root passphrase and a token."""
    request, message = call.request, call.message
    hotkey, address = message.miner_hotkey, request.peer_address
    nonce = service.mint.check(message.nonce, "boot", call.now, hotkey=hotkey, address=address)
    with service.proxies.excusing(request):
        key = client_key(request.peer_certificate)
        evidence = yield from verify_evidence(service, nonce.value, key, message.quote, call.now)
    proof = _HotkeyProof(call)
    try:
        return (yield from _claim(service, call, nonce, key, evidence, proof))
    except Refused as exc:
        proven = service.rules.proves(hotkey, proof.hotkey)
        rested_on = evidence.grounds(service, "boot", outcome_of(exc), hotkey_proven=proven)
        yield from record_refusal(service, call, Vm(hotkey, message.vm_name), evidence, exc, "boot", rested_on)
        raise


def _claim(
    service: Service,
    call: Call[BootAttestationRequest],
    nonce: Nonce,
    key: ClientKey,
    evidence: Evidence,
    proof: _HotkeyProof,
) -> Flow[BootAttestationAnswer]:
    """Appraise the evidence, check the claim and grant (steps 5 to 8)."""
    request, message = call.request, call.message
    accepted = appraise(service, evidence, "boot", message.miner_hotkey, proof.hotkey)
    measurements, listed_as = accepted.profile, _listed_as(accepted)
    profile = service.profiles[measurements.identity]
    service.check_version(measurements, call.now)
    hotkey = known_hotkey(service, message.miner_hotkey)
    is_provisioned = profile.exchange == "provisioned"
    if message.first_boot is not None and not is_provisioned:
        raise exchange_mismatch("root_next (its request has first_boot)", str(measurements), profile.exchange)
    # One of a signature's headers alone counts as none, as in deployed servers.
    proven = message.hotkey is not None and message.signature is not None
    if is_provisioned:
        _ = require(proof)
    elif proven or profile.require_hotkey_signature:
        _ = proof()
    image = profile.image_passphrase
    root, rotation, caller, root_confirm = None, None, None, None
    if is_provisioned:
        first_boot = message.first_boot is True
        root_confirm = service.tokens.issue((yield from Entropy(TOKEN_RANDOM_SIZE)))
        caller, rotation = yield from _rotation(image, root_confirm, service.rotate_after, first_boot=first_boot)
        rotation = evolve(rotation, second_key=message.second_key is True)
    elif image is None:
        root = FreshKey.from_entropy((yield from Entropy(FreshKey.SIZE)))
    token = service.tokens.issue((yield from Entropy(TOKEN_RANDOM_SIZE)))
    unit = GrantBoot(
        now=call.now,
        boot_id=call.request_id,
        nonce=nonce,
        vm=Vm(hotkey.address, message.vm_name),
        platform=evidence.platform,
        hotkey_proven=proven,
        certificate=key.digest,
        profile_name=measurements.name,
        profile_version=measurements.version,
        tcb_status=evidence.tcb_status,
        advisories=evidence.advisories,
        kept=evidence.kept,
        rested_on=evidence.grounds(
            service, "boot", ACCEPTED, hotkey_proven=service.rules.proves(message.miner_hotkey, proof.hotkey)
        ),
        profile_state=listed_as,
        exchange="base" if profile.exchange == "base" else "two-phase",
        token_needs_certificate=profile.token_needs_certificate,
        root=root,
        rotation=rotation,
        token_digest=token_digest(token.reveal()),
        quote_digest=evidence.quote_digest,
        peer_address=request.peer_address,
        claims_per_platform=service.limits.claims_per_platform,
        exchange_downgrade=service.exchange_downgrade,
        vault=service.vault,
        revocations=service.revoked.now,
    )
    grant = yield from transact_patiently(
        service.attested.of(evidence.platform.pin), unit, request, is_repeatable=False
    )
    yield from call.log(
        "boot_granted",
        vm=message.vm_name,
        hotkey=hotkey.address,
        hotkey_proven=proven,
        profile=measurements.name,
        **({} if listed_as is None else {"profile_version": measurements.version, "profile_state": listed_as}),
        **evidence.fields(service),
    )
    service.known.note(unit.vm)
    passphrase = image if image is not None and rotation is None else grant.root
    if passphrase is None:
        raise LocalProtocolError("a boot with entropy for a root passphrase was granted none")
    if profile.exchange == "base":
        return BootAttestationAnswer(key=passphrase, boot_token=token)
    return BootAttestationAnswer(
        key=passphrase,
        boot_token=None,
        luks_quote_nonce=token,
        root_next=grant.root_next,
        root_confirm_nonce=root_confirm,
        vm_auth_ss58=None if caller is None else caller.address,
        key_second=grant.root_second,
    )


def _listed_as(accepted: AcceptedVerdict) -> str | None:
    """The state of the profile, if its VMs are to be listed."""
    return None if accepted.profile_state == "enforced" else accepted.profile_state


class _HotkeyProof:
    """A boot's proof of its hotkey. The signature is checked when a rule first asks for it, and once."""

    def __init__(self, call: Call[BootAttestationRequest]) -> None:
        self._call = call
        self._outcome: ProvenHotkey | Refused | None = None

    def __call__(self) -> ProvenHotkey:
        """The proof. Raises `Refused`."""
        if self._outcome is None:
            message = self._call.message
            try:
                self._outcome = check_body_signature(
                    _hotkey(message.miner_hotkey),
                    message.hotkey,
                    message.nonce,
                    self._call.request.body,
                    message.signature,
                )
            except Refused as exc:
                self._outcome = exc
        if isinstance(self._outcome, Refused):
            raise self._outcome
        return self._outcome

    def hotkey(self) -> Hotkey:
        """The hotkey that is proven. Raises `Refused`."""
        return self().hotkey


def _rotation(
    image: Secret | None, confirm: Secret, rotate_after: int, *, first_boot: bool
) -> Flow[tuple[Hotkey, RootRotation]]:
    """Draw what a provisioned boot takes besides its ``confirm`` nonce; returns it with the hotkey for the answer."""
    entropy = yield from Entropy(3 * FreshKey.SIZE)
    build, following, seed = (entropy[index * FreshKey.SIZE :][: FreshKey.SIZE] for index in range(3))
    rotation = RootRotation(
        build=FreshKey.from_entropy(build) if image is None else FreshKey.of_passphrase(image, build),
        following=FreshKey.from_entropy(following),
        caller=FreshKey.encryption_key(seed),
        confirm_digest=token_digest(confirm.reveal()),
        first_boot=first_boot,
        rotate_after=rotate_after,
    )
    return HotkeyPair.from_secret(Secret(seed[:SEED_SIZE])).hotkey, rotation


def require(proof: Callable[[], ProvenHotkey]) -> ProvenHotkey:
    """The proof of the hotkey that a step of the provisioned exchange demands. Raises `Refused`."""
    try:
        return proof()
    except Refused as exc:
        text = "Hotkey authentication is missing or invalid. Sign with the miner's hotkey."
        raise Refused(Code.SIGNATURE_INVALID, text, reason=exc.reason) from None


def exchange_mismatch(asked_for: str, profile: str, exchange: str) -> Refused:
    """The refusal of an image that speaks another exchange than its profile grants: an operator's mistake."""
    text = "This image speaks another exchange than its measurement profile grants."
    reason = f"image asked for {asked_for}; profile {profile} has exchange {exchange}"
    return Refused(Code.EXCHANGE_MISMATCH, text, reason=reason)


def token_digest(token: bytes) -> bytes:
    """The SHA-256 of a token or nonce as text: the store never has the token itself."""
    return hashlib.sha256(token).digest()


def known_hotkey(service: Service, address: str) -> Hotkey:
    """The hotkey of ``address``. Raises `Refused` for one that is not canonical, not known here, or blacklisted."""
    hotkey = _hotkey(address)
    service.check_known(hotkey, Code.HOTKEY_REJECTED, "Your hotkey is not registered on {netuid}")
    service.check_welcome(hotkey)
    return hotkey


def _hotkey(address: str) -> Hotkey:
    try:
        return Hotkey.parse(address)
    except HotkeyError as exc:
        raise Refused(Code.HOTKEY_REJECTED, "Invalid miner hotkey", reason=str(exc)) from None


def record_refusal(
    service: Service,
    call: Call[Any],
    vm: Vm,
    evidence: Evidence,
    refusal: Refused,
    stage: Literal["boot", "runtime"],
    rested_on: str,
) -> Flow[None]:
    """Record the refusal of a genuine TD.

    At the limit of a day the log says once that further ones of this platform are not recorded: an attacker who can
    write the database could use it up with rows of his own.
    """
    unit = RecordRefusal(
        now=call.now,
        request_id=call.request_id,
        vm=vm,
        platform=evidence.platform,
        code=str(refusal.code),
        reason=refusal.reason,
        quote_digest=evidence.quote_digest,
        peer_address=call.request.peer_address,
        stage=stage,
        finding=found_json(refusal),
        kept=evidence.kept if stage == "boot" else None,
        rested_on=rested_on,
    )
    done = yield from call.record_refusal(unit)
    refusal.recorded = done is True
    pin = evidence.platform.pin
    if done is False and not service.unrecorded.take(f"{pin} {call.now // DAY}", (yield from Uptime())):
        told = f"platform {pin} has its {unit.per_day} denials of this day (UTC); further ones are lines of the log"
        check = "if `chutes-proto audit list` shows fewer, rows were forged: `chutes-proto store check`"
        yield from call.log("refusal_not_recorded", Level.WARNING, error=f"{told}; {check}")
