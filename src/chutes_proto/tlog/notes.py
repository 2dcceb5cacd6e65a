"""Signed notes and checkpoints: c2sp.org/signed-note and tlog-checkpoint.

Keys are Ed25519. The *verifier key*, ``name+id+base64``, has the name and the public key, which is all that somebody
needs who verifies. A checkpoint here has no extension lines, since no monitor can audit those.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Final

from attrs import field, frozen
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from chutes_proto.errors import ConfigurationError, LogError
from chutes_proto.secret import Secret
from chutes_proto.tlog.merkle import HASH_SIZE

LARGEST_NOTE: Final = 64 * 1024
"""The most bytes of a note that is read."""
MOST_SIGNATURES: Final = 64
LARGEST_SIZE: Final = (1 << 63) - 1
"""The most entries of a log."""

_ED25519: Final = 1
_NAME: Final = re.compile(r"[^\s+\x00-\x1f\x7f]{1,255}")
_VERIFIER: Final = re.compile(r"(?P<name>[^+]+)\+(?P<id>[0-9a-f]{8})\+(?P<key>[A-Za-z0-9+/]+=*)")
_SIGNATURE: Final = re.compile("\N{EM DASH} (?P<name>[^ ]+) (?P<bytes>[A-Za-z0-9+/]+=*)")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,18}")


def check_name(name: str) -> None:
    """Check the name of a key, which is a log's origin. Raises `ConfigurationError`."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError('a name of a log is one word without +, for example "keys.example/audit"')


def _identifier(name: str, key: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + bytes([_ED25519]) + key).digest()[:4]


@frozen
class Verifier:
    """The public key of a log, and its name."""

    name: str
    key: bytes

    @property
    def identifier(self) -> bytes:
        """Four bytes that tell keys of a name apart."""
        return _identifier(self.name, self.key)

    def __str__(self) -> str:
        """The verifier key, in the form of C2SP."""
        return f"{self.name}+{self.identifier.hex()}+{_base64(bytes([_ED25519]) + self.key)}"

    @classmethod
    def parse(cls, text: str) -> Verifier:
        """Read a verifier key. Raises `ConfigurationError`."""
        found = _VERIFIER.fullmatch(text)
        data = b"" if found is None else _bytes(found["key"])
        if found is None or data is None or len(data) != 1 + HASH_SIZE or data[0] != _ED25519:
            raise ConfigurationError("not a verifier key of Ed25519; it has the form name+hex+base64")
        check_name(found["name"])
        made = cls(found["name"], data[1:])
        if made.identifier.hex() != found["id"]:
            raise ConfigurationError(f"verifier key {found['name']}: the id is not the one of this name and key")
        return made

    def verify(self, note: Note) -> None:
        """Verify the note's signature of this key.

        Raises `LogError` if the note has none, or one that does not verify.
        """
        mine = [each for each in note.signatures if (each.name, each.identifier) == (self.name, self.identifier)]
        if not mine:
            raise LogError(f"no signature of {self.name}+{self.identifier.hex()}")
        for each in mine:
            try:
                Ed25519PublicKey.from_public_bytes(self.key).verify(each.value, note.text.encode())
            except (InvalidSignature, ValueError):
                raise LogError(f"the signature of {self.name}+{self.identifier.hex()} does not verify") from None


@frozen
class Signer:
    """The private key of a log; ``seed`` has 32 bytes."""

    name: str
    seed: Secret = field(repr=False)

    @property
    def verifier(self) -> Verifier:
        """The public half."""
        return Verifier(self.name, self._key().public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    def _key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seed.reveal())

    def sign(self, text: str) -> Note:
        """Sign a text of whole lines."""
        return Note(text, (Signature(self.name, self.verifier.identifier, self._key().sign(text.encode())),))


@frozen
class Signature:
    """A line of a note: the name of a key, its identifier of four bytes, and the signature."""

    name: str
    identifier: bytes
    value: bytes

    def __str__(self) -> str:
        return f"\N{EM DASH} {self.name} {_base64(self.identifier + self.value)}\n"

    @classmethod
    def parse(cls, line: str) -> Signature:
        """Read a line, without its end. Raises `LogError`."""
        found = _SIGNATURE.fullmatch(line)
        data = None if found is None else _bytes(found["bytes"])
        if found is None or data is None or len(data) < 5 or not _NAME.fullmatch(found["name"]):
            raise LogError("not a signature line of a note")
        return cls(found["name"], data[:4], data[4:])


@frozen
class Note:
    """A text of whole lines, and signatures under it, of which none is verified yet."""

    text: str
    signatures: tuple[Signature, ...]

    def __str__(self) -> str:
        return f"{self.text}\n{''.join(map(str, self.signatures))}"

    @classmethod
    def parse(cls, data: bytes) -> Note:
        """Read a note. Raises `LogError` for bytes that are not one."""
        if len(data) > LARGEST_NOTE:
            raise LogError(f"a note of more than {LARGEST_NOTE} bytes")
        try:
            whole = data.decode()
        except UnicodeDecodeError:
            raise LogError("not a note: it is not UTF-8") from None
        if re.search(r"[\x00-\x09\x0b-\x1f]", whole):
            raise LogError("not a note: it has control characters")
        text, found, lines = whole.rpartition("\n\n")
        if not found or not lines.endswith("\n") or not text:
            raise LogError("not a note: a text, an empty line and signatures")
        signatures = tuple(map(Signature.parse, lines[:-1].split("\n")))
        if len(signatures) > MOST_SIGNATURES:
            raise LogError(f"a note of more than {MOST_SIGNATURES} signatures")
        return cls(text + "\n", signatures)


@frozen
class Checkpoint:
    """The state of a log: its origin, the number of its entries, and the root hash of their tree."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """The text that is signed."""
        return f"{self.origin}\n{self.size}\n{_base64(self.root)}\n"

    @classmethod
    def of(cls, note: Note) -> Checkpoint:
        """The checkpoint of a note, whose signatures the caller verifies. Raises `LogError`."""
        lines = note.text.split("\n")
        root = _bytes(lines[2]) if len(lines) == 4 else None
        if root is None or len(root) != HASH_SIZE or not _NUMBER.fullmatch(lines[1]):
            raise LogError("not a checkpoint: origin, size and root hash, each a line")
        made = cls(lines[0], int(lines[1]), root)
        if not made.origin or made.size > LARGEST_SIZE:
            raise LogError("not a checkpoint: without an origin, or too large")
        return made


def open_checkpoint(data: bytes, verifier: Verifier) -> tuple[Checkpoint, Note]:
    """Return the checkpoint of a log that ``verifier`` signed, and its note. Raises `LogError` for any other."""
    note = Note.parse(data)
    checkpoint = Checkpoint.of(note)
    if checkpoint.origin != verifier.name:
        raise LogError("it is a checkpoint of another log: its origin is not the name of the key")
    verifier.verify(note)
    return checkpoint, note


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes | None:
    """The bytes of a text in base64 in its one form, otherwise None."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return data if _base64(data) == text else None
