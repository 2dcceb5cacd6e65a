"""Sealing: no passphrase is stored in the clear, and a sealed one opens only as the row it was sealed for.

Each passphrase is sealed with AES-256-GCM under a data key of its own, and the data key with AES-256-GCM under a
key-encryption key. What the two layers look like, byte for byte, is in ``docs/explanation/key-lifecycle.md``.

Rules kept here:

* hotkey, VM, volume and generation are associated data of both layers, so a row that is copied elsewhere does not open;
* a nonce is never used twice under one key, even when a unit runs again and seals another generation from the same
  entropy: nonces are made from that entropy *and* the row's address;
* two key-encryption keys may be live; new rows are sealed under the current one. A row under any other is
  `KeyUnavailable`; nothing falls back to anything;
* nothing secret is in a ``repr`` or in an error's text.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import struct
from typing import TYPE_CHECKING, ClassVar, Final

from attrs import field, frozen
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from chutes_proto.errors import ConfigurationError, KeyUnavailable, LocalProtocolError, SealBroken
from chutes_proto.secret import Secret

if TYPE_CHECKING:
    from chutes_proto.store.rows import GenerationRow, Vm

SEAL_VERSION: Final = 1
KEY_SIZE: Final = 32
NONCE_SIZE: Final = 12

_length = struct.Struct(">I").pack
_generation = struct.Struct(">IQ").pack
_VERSION = struct.pack(">II", 4, SEAL_VERSION)

_HEX_KEY = re.compile(rb"([0-9a-fA-F]{64})\n?")


@frozen
class Address:
    """Which row a passphrase belongs to."""

    vm: Vm
    volume: str
    generation: int

    def associated_data(self, layer: bytes) -> bytes:
        """What binds a layer of the envelope to this row: each part with its length before it."""
        title, hotkey, name = b"chutes-proto " + layer, self.vm.hotkey.encode(), self.vm.name.encode()
        volume = self.volume.encode()
        return b"".join(
            (
                _length(len(title)),
                title,
                _VERSION,
                _length(len(hotkey)),
                hotkey,
                _length(len(name)),
                name,
                _length(len(volume)),
                volume,
                _generation(8, self.generation),
            )
        )


@frozen
class KeyEncryptionKey:
    """A key that wraps data keys; ``kek_id`` names it in the rows and may be known to anyone."""

    key: Secret
    kek_id: str

    @classmethod
    def from_bytes(cls, data: bytes) -> KeyEncryptionKey:
        """The key of a file's content: 32 raw bytes, or 64 hex digits with or without a line end.

        Raises `ConfigurationError` for anything else.
        """
        if len(data) == KEY_SIZE:
            key = data
        elif match := _HEX_KEY.fullmatch(data):
            key = bytes.fromhex(match[1].decode("ascii"))
        else:
            takes = f"{KEY_SIZE} raw bytes or {2 * KEY_SIZE} hex digits"
            raise ConfigurationError(f"a key-encryption key is {takes}; this one has {len(data)} bytes")
        return cls(Secret(key), hashlib.sha256(key).digest()[:8].hex())


@frozen
class FreshKey:
    """The entropy for one row that a unit may come to make: drawn before, so that the unit may run again."""

    SIZE: ClassVar[int] = 64 + KEY_SIZE + 2 * NONCE_SIZE

    passphrase: Secret
    data_key: Secret
    nonce_seeds: Secret

    @classmethod
    def from_entropy(cls, entropy: bytes) -> FreshKey:
        """The key of `SIZE` random bytes, which must serve nothing else. The passphrase is 128 lowercase hex digits."""
        return cls._of(entropy[:64].hex().encode("ascii"), entropy)

    @classmethod
    def encryption_key(cls, entropy: bytes) -> FreshKey:
        """The same, for a key of 32 bytes instead of a passphrase: sealed and handed out as base64."""
        return cls._of(base64.b64encode(entropy[:KEY_SIZE]), entropy)

    @classmethod
    def of_passphrase(cls, passphrase: Secret, entropy: bytes) -> FreshKey:
        """The same, for a passphrase that is there already; of ``entropy`` only the envelope's part is used."""
        return cls._of(passphrase.reveal(), entropy)

    @classmethod
    def _of(cls, passphrase: bytes, entropy: bytes) -> FreshKey:
        if len(entropy) != cls.SIZE:
            raise LocalProtocolError(f"a fresh key takes {cls.SIZE} bytes of entropy, not {len(entropy)}")
        return cls(
            passphrase=Secret(passphrase),
            data_key=Secret(entropy[64 : 64 + KEY_SIZE]),
            nonce_seeds=Secret(entropy[64 + KEY_SIZE :]),
        )


@frozen
class Sealed:
    """A passphrase in its envelope, as a row keeps it."""

    sealed: bytes
    kek_id: str
    wrapped_key: bytes


@frozen
class Vault:
    """Seals and opens passphrases under the live key-encryption keys."""

    current: KeyEncryptionKey = field()
    previous: KeyEncryptionKey | None = None

    @property
    def live(self) -> tuple[KeyEncryptionKey, ...]:
        """The current key first."""
        return (self.current,) if self.previous is None else (self.current, self.previous)

    def seal(self, address: Address, fresh: FreshKey) -> Sealed:
        """``fresh.passphrase`` for the row at ``address``, under the current key-encryption key."""
        passphrase_data, key_data = address.associated_data(b"passphrase"), address.associated_data(b"data key")
        seeds = fresh.nonce_seeds.reveal()
        data_key = fresh.data_key.reveal()
        inner = hmac.digest(seeds[:NONCE_SIZE], passphrase_data, "sha256")[:NONCE_SIZE]
        outer = hmac.digest(seeds[NONCE_SIZE:], key_data, "sha256")[:NONCE_SIZE]
        return Sealed(
            sealed=inner + AESGCM(data_key).encrypt(inner, fresh.passphrase.reveal(), passphrase_data),
            kek_id=self.current.kek_id,
            wrapped_key=outer + AESGCM(self.current.key.reveal()).encrypt(outer, data_key, key_data),
        )

    def open(self, address: Address, row: GenerationRow) -> Secret:
        """The passphrase of ``row``, which must be the row at ``address``.

        Raises `KeyUnavailable` if the row's key-encryption key is not live, and `SealBroken` if the row does not open:
        its bytes were altered, it is the row of another address, or it was purged.
        """
        if row.sealed is None:
            raise SealBroken(f"the key {_where(address)} was purged")
        data_key = self._data_key(address, row)
        try:
            return Secret(_decrypt(data_key, row.sealed, address.associated_data(b"passphrase")))
        except (InvalidTag, ValueError):
            raise _broken(address) from None

    def rewrap(self, address: Address, row: GenerationRow, nonce_seed: bytes) -> Sealed:
        """The envelope of ``row`` with its data key wrapped under the current key-encryption key.

        ``nonce_seed`` is `NONCE_SIZE` random bytes. The passphrase is not opened, and its layer stays as it is. Raises
        as `open` does.
        """
        if row.sealed is None:
            raise SealBroken(f"the key {_where(address)} was purged")
        key_data = address.associated_data(b"data key")
        data_key = self._data_key(address, row)
        # the old wrapping is in the nonce, so that the same seed for the same row cannot meet another data key
        nonce = hmac.digest(nonce_seed, key_data + (row.wrapped_key or b""), "sha256")[:NONCE_SIZE]
        wrapped = nonce + AESGCM(self.current.key.reveal()).encrypt(nonce, data_key, key_data)
        return Sealed(row.sealed, self.current.kek_id, wrapped)

    def _data_key(self, address: Address, row: GenerationRow) -> bytes:
        if row.wrapped_key is None or row.kek_id is None:
            raise SealBroken(f"the key {_where(address)} was purged")
        key = next((key.key for key in self.live if key.kek_id == row.kek_id), None)
        if key is None:
            live = ", ".join(key.kek_id for key in self.live)
            raise KeyUnavailable(
                f"the key {_where(address)} is sealed under key-encryption key {row.kek_id}; at hand: {live}"
            )
        try:
            return _decrypt(key.reveal(), row.wrapped_key, address.associated_data(b"data key"))
        except (InvalidTag, ValueError):
            raise _broken(address) from None

    def derive(self, label: str, size: int = KEY_SIZE) -> tuple[tuple[str, Secret], ...]:
        """For each live key-encryption key, the current one first: its id, and ``size`` bytes of its own for ``label``.

        HKDF-SHA256 (RFC 5869) without salt; what is derived says nothing about the key or about another label's.
        """
        info = b"chutes-proto derive " + label.encode()
        return tuple(
            (key.kek_id, Secret(HKDF(SHA256(), size, None, info).derive(key.key.reveal()))) for key in self.live
        )


def _where(address: Address) -> str:
    return f"{address.vm.hotkey}/{address.vm.name}/{address.volume}/{address.generation}"


def _broken(address: Address) -> SealBroken:
    return SealBroken(f"the key {_where(address)} does not open: its row was altered or is another's")


def _decrypt(key: bytes, box: bytes, associated_data: bytes) -> bytes:
    return AESGCM(key).decrypt(box[:NONCE_SIZE], box[NONCE_SIZE:], associated_data)
