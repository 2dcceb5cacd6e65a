"""Seal passphrases: none is stored in the clear, and a sealed one opens only as the row it was sealed for.

Each passphrase is encrypted with AES-256-GCM (NIST SP 800-38D) under a data-encryption key (DEK) of its own, and the
DEK with AES-256-GCM under a key-encryption key (KEK); ``docs/explanation/key-lifecycle.md`` has them byte by byte.

Rules kept here:

* hotkey, VM, volume and generation are associated data of both layers, so a row that is copied elsewhere does not open;
* a nonce is never used twice under one key, even when a unit runs again and seals another generation from the same
  entropy: nonces are made from that entropy *and* the row's address;
* two KEKs may be in use while one is rotated; new rows are sealed under the current one. A row under any other is
  `KeyUnavailable`; nothing falls back to another key;
* nothing secret is in a ``repr`` or in an error's text.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import struct
from typing import TYPE_CHECKING, ClassVar, Final

from attrs import Factory, field, frozen
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from chutes_proto.errors import ConfigurationError, KeyUnavailable, LocalProtocolError, SealBroken
from chutes_proto.secret import Secret

if TYPE_CHECKING:
    from chutes_proto.store._rows import GenerationRow, KeyringRow, Vm

SEAL_VERSION: Final = 1
KEY_SIZE: Final = 32
NONCE_SIZE: Final = 12

_length = struct.Struct(">I").pack

_HEX_KEY = re.compile(rb"([0-9a-fA-F]{64})\n?")


def _joined(*parts: bytes) -> bytes:
    """Each part after its length."""
    return b"".join([_length(len(part)) + part for part in parts])


_LAYERS: Final = {
    layer: _joined(b"chutes-proto " + layer, _length(SEAL_VERSION)) for layer in (b"passphrase", b"data key")
}
"""The beginning of the associated data of each layer."""


def _parts(address: Address) -> bytes:
    names = (address.vm.hotkey.encode(), address.vm.name.encode(), address.volume.encode())
    return _joined(*names, address.generation.to_bytes(8, "big"))


@frozen
class Address:
    """The address of a passphrase's row."""

    vm: Vm
    volume: str
    generation: int
    _parts: bytes = field(init=False, repr=False, eq=False, default=Factory(_parts, takes_self=True))

    def __str__(self) -> str:
        return f"{self.vm.hotkey}/{self.vm.name}/{self.volume}/{self.generation}"

    def associated_data(self, layer: bytes) -> bytes:
        """The associated data that bind a layer of the envelope to this row: each part after its length."""
        return _LAYERS[layer] + self._parts


@frozen
class KeyEncryptionKey:
    """A key-encryption key (KEK), which wraps DEKs; ``kek_id`` names it in the rows and is not secret."""

    key: Secret
    kek_id: str

    @classmethod
    def from_bytes(cls, data: bytes) -> KeyEncryptionKey:
        """Read the key from a file's content: 32 raw bytes, or 64 hex digits with or without a line end.

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
    """The entropy for one row that a unit may make: drawn before, so that the unit may run again."""

    SIZE: ClassVar[int] = 64 + KEY_SIZE + 2 * NONCE_SIZE

    passphrase: Secret
    data_key: Secret
    nonce_seeds: Secret

    @classmethod
    def from_entropy(cls, entropy: bytes) -> FreshKey:
        """Make a passphrase of 128 lowercase hex digits from `SIZE` random bytes, which must serve nothing else."""
        return cls._of(entropy[:64].hex().encode("ascii"), entropy)

    @classmethod
    def encryption_key(cls, entropy: bytes) -> FreshKey:
        """Make a key of 32 bytes instead of a passphrase: it is sealed and handed out in base64."""
        return cls._of(base64.b64encode(entropy[:KEY_SIZE]), entropy)

    @classmethod
    def of_passphrase(cls, passphrase: Secret, entropy: bytes) -> FreshKey:
        """Take an existing passphrase; of ``entropy`` only the envelope's part is used."""
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
    """Seals and opens passphrases under the current KEK and, while it is rotated, the previous one."""

    current: KeyEncryptionKey = field()
    previous: KeyEncryptionKey | None = None

    @property
    def live(self) -> tuple[KeyEncryptionKey, ...]:
        """The KEKs in use, the current one first."""
        return (self.current,) if self.previous is None else (self.current, self.previous)

    def seal(self, address: Address, fresh: FreshKey) -> Sealed:
        """Seal ``fresh.passphrase`` for the row at ``address``, under the current KEK."""
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
        """Open the passphrase of ``row``, which must be the row at ``address``.

        Raises `KeyUnavailable` if the row's KEK is not in use, and `SealBroken` if the row does not open:
        its bytes were altered, it is the row of another address, or it was purged.
        """
        data_key, sealed = self._data_key(address, row)
        return Secret(_open(address, b"passphrase", data_key, sealed))

    def rewrap(self, address: Address, row: GenerationRow, nonce_seed: bytes) -> Sealed:
        """Wrap the DEK of ``row`` under the current KEK.

        ``nonce_seed`` is `NONCE_SIZE` random bytes. The passphrase is not opened, and its layer does not change. Raises
        as `open` does.
        """
        key_data = address.associated_data(b"data key")
        data_key, sealed = self._data_key(address, row)
        # the old wrapping is in the nonce, so that the same seed for the same row cannot meet another DEK
        nonce = hmac.digest(nonce_seed, key_data + (row.wrapped_key or b""), "sha256")[:NONCE_SIZE]
        wrapped = nonce + AESGCM(self.current.key.reveal()).encrypt(nonce, data_key, key_data)
        return Sealed(sealed, self.current.kek_id, wrapped)

    def wrap(self, kind: str, epoch: int, key: Secret, nonce: bytes) -> tuple[str, bytes]:
        """Wrap a key of the store's own under the current KEK; returns its ``kek_id``, and what a `KeyringRow` keeps.

        ``nonce`` is `NONCE_SIZE` random bytes. Kind and epoch are associated data.
        """
        kek = self.current
        return kek.kek_id, nonce + AESGCM(kek.key.reveal()).encrypt(nonce, key.reveal(), _keyring_data(kind, epoch))

    def unwrap(self, row: KeyringRow) -> Secret:
        """Open a key of the store's own. Raises `KeyUnavailable` and `SealBroken`, as `open` does."""
        name = f"{row.kind}/{row.epoch} of the store's own"
        kek = self._kek(name, row.kek_id)
        if type(row.kind) is not str or type(row.epoch) is not int or row.epoch < 0:  # SQLite takes any type
            raise SealBroken(f"the key {name} does not open: its row was altered")
        return Secret(_decrypt(name, _keyring_data(row.kind, row.epoch), kek.reveal(), row.wrapped))

    def _kek(self, name: object, kek_id: str) -> Secret:
        for key in self.live:
            if key.kek_id == kek_id:
                return key.key
        live = ", ".join(key.kek_id for key in self.live)
        raise KeyUnavailable(f"the key {name} is sealed under key-encryption key (KEK) {kek_id}; available: {live}")

    def _data_key(self, address: Address, row: GenerationRow) -> tuple[bytes, bytes]:
        """The DEK of a row, and the passphrase that is sealed under it."""
        if row.sealed is None or row.wrapped_key is None or row.kek_id is None:
            raise SealBroken(f"the key {address} was purged")
        key = self._kek(address, row.kek_id)
        return _open(address, b"data key", key.reveal(), row.wrapped_key), row.sealed

    def derive(self, label: str, size: int = KEY_SIZE) -> tuple[tuple[str, Secret], ...]:
        """Derive ``size`` bytes for ``label`` from each KEK, the current one first; returns them with the KEK's id.

        HKDF-SHA256 (RFC 5869) without salt; the bytes reveal nothing about the KEK or about another label's.
        """
        info = b"chutes-proto derive " + label.encode()
        return tuple(
            (key.kek_id, Secret(HKDF(SHA256(), size, None, info).derive(key.key.reveal()))) for key in self.live
        )


def _open(address: Address, layer: bytes, key: bytes, box: bytes) -> bytes:
    """Open a layer of an envelope. Raises `SealBroken`."""
    return _decrypt(address, address.associated_data(layer), key, box)


def _keyring_data(kind: str, epoch: int) -> bytes:
    return _joined(b"chutes-proto keyring", _length(SEAL_VERSION), kind.encode(), epoch.to_bytes(8, "big"))


def _decrypt(name: object, data: bytes, key: bytes, box: bytes) -> bytes:
    """Open a box with its associated data. Raises `SealBroken`."""
    try:
        return AESGCM(key).decrypt(box[:NONCE_SIZE], box[NONCE_SIZE:], data)
    except (InvalidTag, ValueError, TypeError):  # SQLite takes a value of another type in any column
        raise SealBroken(f"the key {name} does not open: its row was altered or is another's") from None
