"""Hotkeys: SS58 addresses of sr25519 keys, and their signatures.

Rules kept here:

* an address has one spelling: network prefix 42, a key of 32 bytes, the checksum of the SS58 format (the first two
  bytes of BLAKE2b-512 over ``SS58PRE``, prefix and key), base58 without anything around it;
* the key of 32 zero bytes, ristretto255's neutral element, is not a hotkey: one constant signature of it would hold for
  every message (RFC 9496, 4.3: the group has no other element of small order);
* signatures are schnorrkel's with the signing context ``substrate``, 64 bytes;
* sr25519 comes from py-sr25519-bindings, which is imported only where a signature is made or checked.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, Protocol, cast

from attrs import Factory, field, frozen

from chutes_proto.errors import LocalProtocolError
from chutes_proto.secret import Secret

PREFIX: Final = 42
KEY_SIZE: Final = 32
SEED_SIZE: Final = 32
PRIVATE_KEY_SIZE: Final = 64
SIGNATURE_SIZE: Final = 64

_ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS: Final = {character: number for number, character in enumerate(_ALPHABET)}
_CHECKSUM_SIZE: Final = 2
_SECRET_TEXT: Final = re.compile(rf"(?:0x)?(?:[0-9a-fA-F]{{{2 * SEED_SIZE}}}|[0-9a-fA-F]{{{2 * PRIVATE_KEY_SIZE}}})")
_LONGEST: Final = 64  # no SS58 address of a 32-byte key is as long; bounds the arithmetic


class HotkeyError(ValueError):
    """A malformed hotkey, or a signature that is not the hotkey's; the text says why."""


def _public_key_size(_: object, __: object, value: bytes) -> None:
    if len(value) != KEY_SIZE:
        raise HotkeyError(f"a public key has {KEY_SIZE} bytes, not {len(value)}")
    if not any(value):
        raise HotkeyError("the public key is all zeros, for which everyone can sign")


@frozen
class Hotkey:
    """A hotkey by its public key, 32 bytes; ``address`` is its one SS58 spelling."""

    public_key: bytes = field(validator=_public_key_size, repr=False)
    address: str = field(init=False, eq=False, default=Factory(lambda self: _address(self.public_key), takes_self=True))

    @classmethod
    @lru_cache(maxsize=1024)
    def parse(cls, address: str) -> Hotkey:
        """Parse an SS58 address. Raises `HotkeyError` for every text but the canonical `address`."""
        if not isinstance(cast("object", address), str):
            raise HotkeyError(f"an address is a text, not {type(address).__name__}")
        data = _unbase58(address)
        # The SS58 format: first bytes 0-63 are a prefix, 64-127 begin one of two bytes, the rest is reserved.
        if not data:
            raise HotkeyError("an empty address")
        if data[0] != PREFIX:
            found = f"network prefix {data[0]}, not" if data[0] < 64 else "another network than prefix"
            raise HotkeyError(f"an address of {found} {PREFIX}")
        if len(data) != 1 + KEY_SIZE + _CHECKSUM_SIZE:
            raise HotkeyError(f"not the address of a {KEY_SIZE}-byte key: it has {len(data)} bytes in all")
        payload, checksum = data[:-_CHECKSUM_SIZE], data[-_CHECKSUM_SIZE:]
        if not hmac.compare_digest(_checksum(payload), checksum):
            raise HotkeyError("the address's checksum does not match")
        return cls(payload[1:])

    def check_signature(self, message: bytes, signature: bytes) -> None:
        """Check that ``signature`` is this hotkey's over ``message``. Raises `HotkeyError`."""
        try:
            holds = _sr25519().verify(signature, message, self.public_key)
        except ValueError:  # not the encoding of a signature or of a key
            holds = False
        if not holds:
            raise HotkeyError(f"not a signature of {self.address} over this message")


@frozen
class HotkeyPair:
    """A hotkey with its expanded secret key (64 bytes), which signs."""

    hotkey: Hotkey
    secret_key: Secret

    @classmethod
    def from_secret(cls, secret: Secret) -> HotkeyPair:
        """Make the pair of a 32-byte seed (a "mini secret key") or of a 64-byte private key, as schnorrkel has it.

        Raises `HotkeyError` for another size, and for 64 bytes that are no private key.
        """
        if len(secret) == SEED_SIZE:
            public_key, secret_key = _sr25519().pair_from_seed(secret.reveal())
            return cls(Hotkey(public_key), Secret(secret_key))
        if len(secret) != PRIVATE_KEY_SIZE:
            sizes = f"{SEED_SIZE} bytes (a seed) or {PRIVATE_KEY_SIZE} (a private key)"
            raise HotkeyError(f"a hotkey's secret has {sizes}, not {len(secret)}")
        try:
            public_key = _sr25519().public_from_secret_key(secret.reveal())
        except ValueError:  # its scalar is out of range; the text of the library is not ours to repeat
            raise HotkeyError("not a private key of sr25519: its scalar is out of range") from None
        return cls(Hotkey(public_key), secret)

    @classmethod
    def from_json(cls, data: bytes) -> HotkeyPair:
        """Read the pair from a wallet's hotkey file: JSON with ``ss58Address``, and ``privateKey`` or ``secretSeed``.

        Both are hex; where both are there, the private key counts, as in deployed tools.
        Raises `HotkeyError`, whose text repeats nothing of the file, also where the address is another key's.
        """
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            raise HotkeyError("not a hotkey file: not JSON; an encrypted file must be decrypted first") from None
        members = cast("dict[str, object]", content) if isinstance(content, dict) else {}
        text = wallet_secret(members)
        if text is None:
            raise HotkeyError("not a hotkey file: it has neither privateKey nor secretSeed, as texts in hex")
        pair = cls.from_secret(secret_from_hex(text))
        if members.get("ss58Address") != pair.hotkey.address:
            raise HotkeyError("the hotkey file's ss58Address is not that of its privateKey or secretSeed")
        return pair

    def sign(self, message: bytes) -> bytes:
        """Sign ``message``: 64 bytes, different each time."""
        return _sr25519().sign((self.hotkey.public_key, self.secret_key.reveal()), message)


def wallet_secret(members: Mapping[str, object]) -> str | None:
    """The text of a wallet's private key, or else of its seed; None if it has neither."""
    for name in ("privateKey", "secretSeed"):
        if isinstance(text := members.get(name), str):
            return text
    return None


def secret_from_hex(text: str) -> Secret:
    """Parse a seed or a private key in hex, with or without ``0x``. Raises `HotkeyError`, which repeats nothing."""
    if not _SECRET_TEXT.fullmatch(text):
        raise HotkeyError(f"a seed is {SEED_SIZE} bytes in hex, a private key {PRIVATE_KEY_SIZE}")
    return Secret(bytes.fromhex(text.removeprefix("0x")))


class _Sr25519(Protocol):
    """The functions used of an sr25519 implementation."""

    def verify(self, signature: bytes, message: bytes, pubkey: bytes, /) -> bool: ...

    def sign(self, keypair: tuple[bytes, bytes], message: bytes, /) -> bytes: ...

    def pair_from_seed(self, seed: bytes, /) -> tuple[bytes, bytes]: ...

    def public_from_secret_key(self, secret_key: bytes, /) -> bytes: ...


def check_installed() -> None:
    """Check that signatures can be made and checked. Raises `LocalProtocolError`, which names the missing package."""
    _ = _sr25519()


def _sr25519() -> _Sr25519:
    try:
        import sr25519  # pyright: ignore[reportMissingTypeStubs] - `_Sr25519` is what it has
    except ImportError:
        raise LocalProtocolError(
            "signatures of hotkeys need py-sr25519-bindings: pip install 'chutes-proto[hotkey]'"
        ) from None
    return cast("_Sr25519", sr25519)


def _address(public_key: bytes) -> str:
    payload = bytes([PREFIX]) + public_key
    return _base58(payload + _checksum(payload))


def _checksum(payload: bytes) -> bytes:
    return hashlib.blake2b(b"SS58PRE" + payload, digest_size=64).digest()[:_CHECKSUM_SIZE]


def _base58(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    characters: list[str] = []
    while number:
        number, digit = divmod(number, 58)
        characters.append(_ALPHABET[digit])
    zeros = len(data) - len(data.lstrip(b"\0"))
    return _ALPHABET[0] * zeros + "".join(reversed(characters))


def _unbase58(text: str) -> bytes:
    if len(text) > _LONGEST:
        raise HotkeyError(f"longer than {_LONGEST} characters")
    number = 0
    for character in text:
        digit = _DIGITS.get(character)
        if digit is None:
            raise HotkeyError("has a character that is not base58")
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip(_ALPHABET[0]))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
