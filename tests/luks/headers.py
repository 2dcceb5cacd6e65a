"""LUKS2 headers for tests, as ``cryptsetup`` writes them, and with whatever else in them."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from pathlib import Path
from typing import Any, Final

from chutes_proto.io.disks.cryptsetup import Disks
from chutes_proto.luks.plan import Format, Key
from chutes_proto.secret import Secret

SIZE: Final = 64 * 1024 * 1024
"""The bytes of the disk that the headers say they are on."""
UUID: Final = "f22a7ab9-f2b6-402d-8e7b-16d8c3138aba"
AREA: Final = 0x4000

_SALT: Final = "U/KRxZhMuKYKfkwz/h9mFzRZM3mW5SSWdZf6fYdhW4E="
_PBKDF2: Final = {"type": "pbkdf2", "hash": "sha256", "iterations": 1000, "salt": _SALT}
ARGON2ID: Final = {"type": "argon2id", "time": 4, "memory": 1048576, "cpus": 4, "salt": _SALT}


def image(path: Path, content: bytes = b"") -> str:
    """Make an image file of such a disk, which begins with the content; return its path."""
    with path.open("wb") as file:
        _ = file.truncate(SIZE)
        _ = file.write(content)
    return str(path)


def make_root(path: str, passphrase: Secret) -> None:
    """Make the image a disk with this passphrase, by the real `cryptsetup`."""
    Disks(images=True).act(Format("root", path, Key.CURRENT), {Key.CURRENT: passphrase})


def slot(number: int = 0, kdf: Any = _PBKDF2) -> dict[str, Any]:
    """The key slot that is made as the so-manyth."""
    return {
        "type": "luks2",
        "key_size": 64,
        "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
        "area": {
            "type": "raw",
            "offset": str(2 * AREA + number * 258048),
            "size": "258048",
            "encryption": "aes-xts-plain64",
            "key_size": 64,
        },
        "kdf": dict(kdf),
    }


def told(slots: int = 1) -> dict[str, Any]:
    """The content of an ordinary header, for a test to alter."""
    return copy.deepcopy(
        {
            "keyslots": {str(number): slot(number) for number in range(slots)},
            "tokens": {},
            "segments": {
                "0": {
                    "type": "crypt",
                    "offset": "16777216",
                    "size": "dynamic",
                    "iv_tweak": "0",
                    "encryption": "aes-xts-plain64",
                    "sector_size": 4096,
                }
            },
            "digests": {
                "0": {
                    **_PBKDF2,
                    "keyslots": [str(number) for number in range(slots)],
                    "segments": ["0"],
                    "digest": "PR+/Ces0VHhq9cSULEHoJq4ykHzJ1+GyDzGOc62swmY=",
                }
            },
            "config": {"json_size": str(AREA - 4096), "keyslots_size": str(16 * 1024 * 1024 - 2 * AREA)},
        }
    )


def one_copy(
    area: bytes,
    *,
    second: bool = False,
    sequence: int = 3,
    uuid: str = UUID,
    version: int = 2,
    size: int = AREA,
    offset: int | None = None,
    algorithm: bytes = b"sha256",
) -> bytes:
    """One copy of a header with this JSON area, and a checksum that holds."""
    binary = struct.pack(
        ">6sHQQ48s32s64s40s48sQ184x64x3584x",
        b"SKUL\xba\xbe" if second else b"LUKS\xba\xbe",
        version,
        size,
        sequence,
        b"",
        algorithm,
        bytes(range(64)),
        uuid.encode(),
        b"",
        size * second if offset is None else offset,
    )
    whole = binary + area.ljust(AREA - 4096, b"\0")
    return whole[:448] + hashlib.sha256(whole).digest().ljust(64, b"\0") + whole[512:]


def both(value: object, **binary: Any) -> bytes:
    """The beginning of a disk whose two copies say ``value``."""
    area = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()
    return (one_copy(area, **binary) + one_copy(area, second=True, **binary)).ljust(1024 * 1024, b"\0")
