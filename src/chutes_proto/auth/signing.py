"""Signed requests: the message that a hotkey signs, and its check.

A signed message is ``{hotkey}:{nonce}:{third}``. Three schemes differ in what the third part covers:

* a purpose: one word of the endpoint's, nothing of the request;
* a body: SHA-256 of the raw body, in lowercase hex;
* a request: ``request:`` and SHA-256, in lowercase hex, of ``{METHOD} {target}``, a line feed and the raw body.

The endpoint table says for each operation what its signature must cover at least (`Coverage`); one over the whole
request is always accepted.

Rules kept here:

* the nonce of a signed request is the time in unix seconds, in ASCII digits, less than 600 s away from ours; only that
  of a runtime attestation is the server's, and its age is the mint's to check;
* a signature is 64 bytes as 128 ASCII hex digits of either case, without ``0x``;
* a refusal never repeats the message or the signature.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias, cast

from attrs import frozen

from chutes_proto._proof import PROOF, Proven
from chutes_proto.auth.hotkey import SIGNATURE_SIZE, Hotkey, HotkeyError
from chutes_proto.errors import LocalProtocolError, Refused
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import Coverage

_SIGNATURE: Final = re.compile(rf"[0-9A-Fa-f]{{{2 * SIGNATURE_SIZE}}}")


WINDOW: Final = 600
"""Seconds that a signed request's time may be away from the server's."""

_SECONDS: Final = re.compile(r"[0-9]{1,15}")

SigningPolicy: TypeAlias = Literal["compatible", "request"]
"""Whether signatures over less than the whole request are accepted, or made."""

Signer: TypeAlias = Callable[[bytes], bytes]
"""Signs a message with the hotkey (sr25519, Substrate context): message in, 64 bytes of signature out."""


def purpose_message(hotkey: Hotkey, nonce: str, purpose: str) -> bytes:
    """Make the message that covers the endpoint's purpose, but neither method, path nor body."""
    return f"{hotkey.address}:{nonce}:{purpose}".encode()


def body_message(hotkey: Hotkey, nonce: str, body: bytes) -> bytes:
    """Make the message that covers a raw body, which may be empty."""
    return purpose_message(hotkey, nonce, hashlib.sha256(body).hexdigest())


def request_message(hotkey: Hotkey, nonce: str, method: str, target: str, body: bytes) -> bytes:
    """Make the message that covers a whole request; ``target`` is the origin form as it is sent, with its query."""
    digest = hashlib.sha256(f"{method} {target}\n".encode() + body).hexdigest()
    return purpose_message(hotkey, nonce, f"request:{digest}")


def messages_to_sign(
    coverage: Coverage,
    policy: SigningPolicy,
    hotkey: Hotkey,
    nonce: str,
    method: str,
    target: str,
    body: bytes,
    purpose: str,
) -> tuple[bytes, ...]:
    """List the messages of which one must be signed. A client signs the first, a server accepts any.

    Raises `LocalProtocolError` for another policy: a mistyped ``request`` must not sign less.
    """
    whole = request_message(hotkey, nonce, method, target, body)
    if policy == "request":
        return (whole,)
    if policy != "compatible":
        raise LocalProtocolError(f"signatures: must be 'compatible' or 'request', not {policy!r}")
    over_body, over_purpose = body_message(hotkey, nonce, body), purpose_message(hotkey, nonce, purpose)
    least = {"body": (over_body,), "purpose": (over_purpose,), "nonce": (over_body, over_purpose)}
    return (*least[coverage], whole)


def sign(signer: Signer, message: bytes) -> bytes:
    """Call a signer, which is the caller's own. Raises `LocalProtocolError` if it returns anything but bytes."""
    signature = cast("object", signer(message))
    if not isinstance(signature, bytes | bytearray):
        raise LocalProtocolError(
            f"signer: it returned {type(signature).__name__}, not the bytes of a signature; it is called, never awaited"
        )
    return bytes(signature)


def signature_headers(hotkey: Hotkey, nonce: str, message: bytes, signer: Signer) -> tuple[tuple[str, str], ...]:
    """Make the three headers of a signed request, names in lower case."""
    return (
        ("x-chutes-hotkey", hotkey.address),
        ("x-chutes-nonce", nonce),
        ("x-chutes-signature", sign(signer, message).hex()),
    )


def check_time(nonce: str, now: int) -> None:
    """Check that ``nonce`` is a time in unix seconds less than `WINDOW` from ``now``. Raises `Refused`."""
    if not _SECONDS.fullmatch(nonce) or abs(now - int(nonce)) >= WINDOW:
        raise Refused(
            Code.SIGNATURE_STALE,
            "Invalid nonce!",
            reason=f"X-Chutes-Nonce is not a time in unix seconds less than {WINDOW} s away",
        )


def check_signature(hotkey: Hotkey, messages: Sequence[bytes], signature: str) -> None:
    """Check that ``signature``, in hex, is the hotkey's over one of ``messages``. Raises `Refused`."""
    if not _SIGNATURE.fullmatch(signature):
        raise Refused(
            Code.SIGNATURE_INVALID,
            "Invalid signature",
            reason=f"the signature of {hotkey.address} is not {2 * SIGNATURE_SIZE} hex digits",
        )
    reason = ""
    for message in messages:
        try:
            hotkey.check_signature(message, bytes.fromhex(signature))
        except HotkeyError as exc:
            reason = str(exc)
        else:
            return
    raise _refused(hotkey, reason)


@frozen(kw_only=True, eq=False)
class ProvenHotkey(Proven):
    """A hotkey that a request's signature proves. Only `check_body_signature` makes it."""

    hotkey: Hotkey


def check_body_signature(
    hotkey: Hotkey, named: str | None, nonce: str | None, body: bytes, signature: str | None
) -> ProvenHotkey:
    """Check that ``signature`` is the hotkey's over ``nonce`` and ``body``. Raises `Refused`.

    ``named`` (the address in the request's header), ``nonce`` and ``signature`` are the texts of the request's headers.
    Shape and age of the nonce are for the caller to check.
    """
    if named != hotkey.address:
        raise _refused(hotkey, "the signature's hotkey is not the one that the request speaks for")
    if nonce is None or signature is None:
        raise _refused(hotkey, "the signature or its nonce is missing")
    check_signature(hotkey, (body_message(hotkey, nonce, body),), signature)
    return ProvenHotkey(hotkey=hotkey, proof=PROOF)


def _refused(hotkey: Hotkey, reason: str) -> Refused:
    return Refused(Code.SIGNATURE_INVALID, f"Invalid request signature for hotkey {hotkey.address}.", reason=reason)
