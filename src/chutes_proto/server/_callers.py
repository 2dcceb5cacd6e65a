"""The check of a signed request's caller, before anything else in it is read:

1. hotkey, nonce and signature are there; none of the headers comes twice (400);
2. the nonce is the present time (of a runtime attestation it is the server's nonce, which is checked later);
3. the signature: its form, then that it is the hotkey's over one of the messages that the operation takes;
4. the hotkey is known here.
"""

from __future__ import annotations

from typing import Final

from chutes_proto.auth.hotkey import Hotkey, HotkeyError
from chutes_proto.auth.signing import check_signature, check_time, messages_to_sign
from chutes_proto.errors import Refused
from chutes_proto.server._service import Service
from chutes_proto.wire.codec import decode_headers
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import Coverage
from chutes_proto.wire.http import HttpRequest
from chutes_proto.wire.names import HEX_32

_HEADERS: Final = ("X-Chutes-Hotkey", "X-Chutes-Nonce", "X-Chutes-Signature")


def check_caller(service: Service, request: HttpRequest, coverage: Coverage, purpose: str, now: int) -> Hotkey:
    """The hotkey that signed ``request``. Raises `BadRequest` and `Refused`."""
    found = decode_headers(request, _HEADERS)
    if len(found) < len(_HEADERS):
        raise Refused(Code.SIGNATURE_INVALID, "Invalid nonce!", reason="a header of the signature is missing")
    address, nonce, signature = (found[name] for name in _HEADERS)
    if coverage != "nonce":
        check_time(nonce, now)
    elif not HEX_32.fullmatch(nonce):
        raise Refused(Code.NONCE_INVALID, "Invalid nonce supplied", reason="nonce is not 64 lowercase hex digits")
    try:
        hotkey = Hotkey.parse(address)
    except HotkeyError as exc:
        raise Refused(Code.SIGNATURE_INVALID, "Invalid request signature.", reason=f"hotkey: {exc}") from None
    parts = (request.method, request.target, request.body, purpose)
    taken = messages_to_sign(coverage, service.signatures, hotkey, nonce, *parts)
    check_signature(hotkey, taken, signature)
    service.check_known(hotkey, Code.HOTKEY_UNKNOWN)
    return hotkey
