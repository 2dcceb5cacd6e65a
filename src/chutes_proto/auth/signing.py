"""Signed requests: what a hotkey signs, and the check of it.

A signed message is ``{hotkey}:{nonce}:{third}``. Three schemes differ in what the third part covers:

* a purpose: one word of the endpoint's, nothing of the request;
* a body: SHA-256 of the raw body, in lowercase hex;
* a request: ``request:`` and SHA-256, in lowercase hex, of ``{METHOD} {target}``, a line feed and the raw body.

Rules kept here:

* a signature is 64 bytes as 128 ASCII hex digits of either case, without ``0x``;
* a refusal never repeats the message or the signature.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from chutes_proto.auth.hotkey import SIGNATURE_SIZE, Hotkey, HotkeyError
from chutes_proto.codes import Code
from chutes_proto.errors import Refused

_SIGNATURE: Final = re.compile(rf"[0-9A-Fa-f]{{{2 * SIGNATURE_SIZE}}}")


def purpose_message(hotkey: Hotkey, nonce: str, purpose: str) -> bytes:
    """What is signed where the endpoint has a purpose. It covers neither method, path nor body."""
    return f"{hotkey.address}:{nonce}:{purpose}".encode()


def body_message(hotkey: Hotkey, nonce: str, body: bytes) -> bytes:
    """What is signed over a raw body, which may be empty."""
    return purpose_message(hotkey, nonce, hashlib.sha256(body).hexdigest())


def request_message(hotkey: Hotkey, nonce: str, method: str, target: str, body: bytes) -> bytes:
    """What is signed over a whole request: ``target`` is the origin form as it is sent, query included."""
    digest = hashlib.sha256(f"{method} {target}\n".encode() + body).hexdigest()
    return purpose_message(hotkey, nonce, f"request:{digest}")


def check_body_signature(
    hotkey: Hotkey, named: str | None, nonce: str | None, body: bytes, signature: str | None
) -> None:
    """Raises `Refused` unless ``signature`` is the hotkey's over ``nonce`` and ``body``.

    ``named`` (the address in the request's header), ``nonce`` and ``signature`` are the texts of the request's headers.
    Shape and age of the nonce are for the caller to check.
    """
    if named != hotkey.address:
        raise _refused(hotkey, "the signature's hotkey is not the one that the request speaks for")
    if nonce is None or signature is None:
        raise _refused(hotkey, "the signature or its nonce is missing")
    if not _SIGNATURE.fullmatch(signature):
        raise Refused(
            Code.SIGNATURE_INVALID,
            "Invalid signature",
            reason=f"the signature of {hotkey.address} is not {2 * SIGNATURE_SIZE} hex digits",
        )
    try:
        hotkey.check_signature(body_message(hotkey, nonce, body), bytes.fromhex(signature))
    except HotkeyError as exc:
        raise _refused(hotkey, str(exc)) from None


def _refused(hotkey: Hotkey, reason: str) -> Refused:
    return Refused(Code.SIGNATURE_INVALID, f"Invalid request signature for hotkey {hotkey.address}.", reason=reason)
