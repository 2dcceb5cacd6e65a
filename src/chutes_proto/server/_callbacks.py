"""Evidence from the host of a server that registers (``registration.evidence = "callback"``).

Rules kept here:

* the address that the host was located at is the one that is asked; its name is not resolved again, no redirect is
  followed, and how long and how large an answer may be is bounded;
* the nonce is drawn for this one request, and is kept nowhere else;
* the quote binds the key of the very connection that it came over, and is verified and appraised as a runtime quote
  (``_evidence.py``);
* every fault of the network has the same text for the caller, who must not be able to scan the server's network.

* a host that names its owner must name the caller, and prove it with the owner's signature.

It shows that an approved TD answers at that address, and whose it is only if its answer has that proof. Its GPU
evidence is appraised as the profile demands (``_gpu_evidence.py``).
"""

from __future__ import annotations

import base64
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from chutes_proto.auth.certificates import ClientKey, client_key
from chutes_proto.auth.hotkey import Hotkey, HotkeyPair
from chutes_proto.auth.signing import check_signature, check_time, purpose_message, signature_headers
from chutes_proto.effects import Entropy, FetchEvidence, Flow, Now, Transact
from chutes_proto.errors import BadRequest, Refusal, Refused, RemoteProtocolError, TransportError, Unavailable
from chutes_proto.secret import Secret
from chutes_proto.server._call import SignedCall
from chutes_proto.server._evidence import appraise, verify_evidence
from chutes_proto.server._gpu_evidence import appraise_gpus
from chutes_proto.server._grounds import ACCEPTED
from chutes_proto.server._service import Callback, Service
from chutes_proto.units.servers import HostQuote, ReadCaller
from chutes_proto.wire.codes import Code
from chutes_proto.wire.evidence import OWNER_PURPOSES, PURPOSE, HostEvidence, decode_evidence, evidence_target
from chutes_proto.wire.miners import RegisterServerRequest

SECONDS: Final = 20.0
"""The time that a host may take: it makes a quote and asks its GPUs."""


def ask_host(
    service: Service, callback: Callback, call: SignedCall[RegisterServerRequest], address: str
) -> Flow[HostQuote]:
    """Ask the host that was located at ``address`` for its quote. Raises `BadRequest`, `Refused`, `Unavailable`."""
    host, hotkey, name = call.message.host, call.caller.address, call.message.name or call.message.id
    caller = yield from Transact(ReadCaller(call.now, hotkey, name, address, service.vault))
    if caller is not None:  # a VM of image 1.4.0 or newer trusts no other
        pair = HotkeyPair.from_secret(Secret(base64.b64decode(caller.seed.reveal())))
        callback = Callback(pair.hotkey, pair.sign, callback.port)
    nonce = yield from Entropy(32)
    given, key, certificate = yield from _fetch(callback, nonce, host, address)
    if given.owner is not None:
        _check_owner(given.owner, call.caller, (yield from Now()), host, address)
    if caller is not None and caller.root_ca is not None:
        _check_issuer(certificate, x509.load_pem_x509_certificate(caller.root_ca.encode()), host, address)
    now = yield from Now()  # the host may have taken `SECONDS`
    try:
        evidence = yield from verify_evidence(service, nonce, key, given.quote, now)
        profile = appraise(service, evidence, "runtime", hotkey, lambda: call.caller).profile
        gpus = yield from appraise_gpus(
            service.gpu_appraisal,
            service.profiles[profile.identity].gpu_evidence,
            profile,
            given.gpus,
            nonce=nonce,
            counts=(len(call.message.gpus),),
            now=now,
        )
    except Unavailable:
        raise
    except Refusal as exc:
        raise _as_registration(exc, host, address) from None
    yield from call.log(
        "host_evidence", host=host, address=address, profile=profile.name, gpus=gpus.text, trust=service.trust
    )
    is_owned = given.owner is not None
    accepted = (evidence.quote_digest, evidence.platform.pin, profile.name, profile.version, evidence.tcb_status)
    rested_on = evidence.grounds(service, "runtime", ACCEPTED, hotkey_proven=True)
    advisories = evidence.advisories
    return HostQuote(*accepted, gpus, is_owned, evidence.platform, advisories=advisories, rested_on=rested_on)


def _fetch(
    callback: Callback, nonce: bytes, host: str, address: str
) -> Flow[tuple[HostEvidence, ClientKey, x509.Certificate]]:
    now = str((yield from Now()))  # finding the host may have taken a while, and hosts look at the time
    signed = purpose_message(callback.hotkey, now, PURPOSE)
    headers = signature_headers(callback.hotkey, now, signed, callback.signer)
    try:
        response, certificate = yield from FetchEvidence(
            address, callback.port, host, evidence_target(nonce), headers, SECONDS
        )
        leaf = x509.load_der_x509_certificate(certificate)
        return decode_evidence(response), client_key(leaf), leaf
    except (TransportError, RemoteProtocolError) as exc:
        why = str(exc)
    except (ValueError, x509.InvalidVersion) as exc:
        why = f"its certificate cannot be read: {exc}"
    except Refused as exc:
        why = f"its certificate: {exc.reason}"
    text = "Server registration failed - Failed to get evidence for attestation."
    raise BadRequest(Code.EVIDENCE_UNAVAILABLE, text, reason=f"host {host} at {address}: {why}")


def _check_owner(owner: tuple[str, str, str], caller: Hotkey, now: int, host: str, address: str) -> None:
    """Check the proof that the host's owner is the ``caller``. Raises `Refused` (401)."""
    named, nonce, signature = owner
    try:
        if named != caller.address:
            raise Refused(Code.SIGNATURE_INVALID, "", reason=f"its owner is {named[:64]!r}, not {caller.address}")
        check_time(nonce, now)
        check_signature(caller, [purpose_message(caller, nonce, word) for word in OWNER_PURPOSES], signature)
    except Refused as exc:
        text = "Server registration failed - the host does not prove that you own it."
        reason = f"host {host} at {address}: {exc.reason}"
        raise Refused(exc.code, text, reason=reason, status=exc.status) from None


def _check_issuer(leaf: x509.Certificate, root_ca: x509.Certificate, host: str, address: str) -> None:
    """Raise `Refused` unless ``root_ca`` is the issuer of the connection's certificate, by name and signature."""
    try:
        if leaf.public_key() == root_ca.public_key():
            raise ValueError("it is the root CA itself")
        leaf.verify_directly_issued_by(root_ca)
    except (ValueError, TypeError, InvalidSignature) as exc:
        text = "Server registration failed - Invalid client certificate provided."
        reason = f"host {host} at {address}: its certificate is not of the VM's root CA: {exc}"
        raise Refused(Code.CERTIFICATE_MISMATCH, text, reason=reason) from None


def _as_registration(refusal: Refusal, host: str, address: str) -> Refusal:
    """The refusal of a host's quote, as one of the registration's."""
    kind = Refused if isinstance(refusal, Refused) else BadRequest
    reason = f"host {host} at {address}: {refusal.reason}"
    return kind(refusal.code, f"Server registration failed - {refusal.detail}", reason=reason)
