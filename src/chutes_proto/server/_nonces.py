"""Nonces: issued for one MAC, without memory or a row, and checked.

A nonce is 32 bytes, on the wire 64 lowercase hex digits::

    0   flags and key id     bit 7: bound to a hotkey; bit 6: bound to an address; bits 0-5: id of the MAC key
    1   issued at            5 bytes, big-endian unix seconds
    6   random               10 bytes
    16  tag                  HMAC-SHA-256 cut to 16 bytes

The tag covers the 16 bytes before it and, each with its length before it, the purpose and the hotkey, address and
server that the nonce is bound to.

Rules kept here:

* one nonce is accepted at an age of -60 to 600 s, by the purpose and the caller it was issued for; one whose tag holds
  and that is from the future is our clocks' fault (503);
* the tag is compared in constant time, before anything else in the nonce is believed;
* MAC keys come from the key-encryption keys by label, so all processes of one server agree; an id whose key this
  process lacks is an invalid nonce, unless the configuration expects that id: then the fault is ours (503).

The store sees to it that a nonce is redeemed once (``units/nonces.py``).
"""

from __future__ import annotations

from hmac import compare_digest
from typing import Literal

from attrs import frozen

from chutes_proto.errors import Refused
from chutes_proto.keys.vault import Vault
from chutes_proto.secret import Secret
from chutes_proto.server._tags import TagKey
from chutes_proto.units.nonces import SKEW, Nonce, from_future
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import address_prefix
from chutes_proto.wire.names import HEX_32, timestamp

Purpose = Literal["boot", "runtime"]

LIFETIME = 600
RANDOM_SIZE = 10

_HOTKEY_BOUND = 0x80
_ADDRESS_BOUND = 0x40
_KEY_ID = 0x3F
_LABEL = "chutes-proto nonce v1"


@frozen
class MacKey:
    """One MAC key and the id (0 to 63) that stands in the nonces it made."""

    key_id: int
    key: TagKey


@frozen
class NonceMint:
    """Issues and checks nonces. ``keys`` has the current MAC key first, then the previous one, if two are live."""

    keys: tuple[MacKey, ...]
    bind_address: bool = False

    @classmethod
    def of(cls, vault: Vault, *, bind_address: bool = False) -> NonceMint:
        """The mint whose MAC keys come from the live key-encryption keys of ``vault``."""
        derived = [key.reveal() for _, key in vault.derive(_LABEL, 33)]
        keys = tuple(MacKey(material[32] & _KEY_ID, TagKey(Secret(material[:32]))) for material in derived)
        return cls(keys, bind_address=bind_address)

    def issue(
        self,
        purpose: Purpose,
        now: int,
        random: bytes,
        *,
        hotkey: str | None = None,
        address: str = "",
        scope: str = "",
    ) -> bytes:
        """Make a nonce (32 bytes) from `RANDOM_SIZE` fresh bytes; ``scope`` is the server id of a runtime nonce."""
        bound = address if self.bind_address else ""
        key = self.keys[0]
        flags = (_HOTKEY_BOUND if hotkey is not None else 0) | (_ADDRESS_BOUND if bound else 0)
        head = bytes([flags | key.key_id]) + now.to_bytes(5, "big") + random
        return head + _tag(key, head, purpose, hotkey, bound, scope)

    def check(
        self,
        text: str | None,
        purpose: Purpose,
        now: int,
        *,
        hotkey: str | None = None,
        address: str = "",
        scope: str = "",
    ) -> Nonce:
        """Check ``text``, a nonce in hex.

        Raises `Refused`, and `Unavailable` for one from the future.
        """
        if text is None or not HEX_32.fullmatch(text):
            raise _invalid("missing or not 64 lowercase hex digits")
        value = bytes.fromhex(text)
        head, tag = value[:16], value[16:]
        key_id = head[0] & _KEY_ID
        candidates = [key for key in self.keys if key.key_id == key_id]
        if not candidates:
            raise _invalid(f"made under key id {key_id}, which is not one of this server's")
        bound_hotkey = hotkey if head[0] & _HOTKEY_BOUND else None
        bound_address = address if head[0] & _ADDRESS_BOUND else ""
        tags = [_tag(key, head, purpose, bound_hotkey, bound_address, scope) for key in candidates]
        if not any(compare_digest(tag, expected) for expected in tags):
            raise _invalid("tag does not hold: forged, or bound to another purpose, hotkey, address or server")
        issued_at = int.from_bytes(head[1:6], "big")
        if issued_at > now + SKEW:
            raise from_future("nonce was issued", issued_at, now, "this server's")
        if now - issued_at > LIFETIME:
            raise _invalid(f"{now - issued_at} s old, and valid for {LIFETIME} s")
        return Nonce(value, purpose, issued_at)


def expires_at(issued_at: int) -> str:
    """The time at which a nonce expires, as RFC 3339 in UTC with whole seconds."""
    return timestamp(issued_at + LIFETIME)


def _tag(key: MacKey, head: bytes, purpose: str, hotkey: str | None, address: str, scope: str) -> bytes:
    parts = (purpose.encode(), (hotkey or "").encode(), address_prefix(address), scope.encode())
    message = head + b"".join([len(part).to_bytes(4, "big") + part for part in parts])
    return key.key.tag(message)


def _invalid(reason: str) -> Refused:
    return Refused(Code.NONCE_INVALID, "Invalid nonce supplied", reason=f"nonce {reason}")
