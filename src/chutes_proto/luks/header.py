"""Check a LUKS2 header: the host can write anything on a disk, so no program reads a header before this check.

    header = check_header(head, size, device)      a CheckedHeader, None without a header, or HeaderRejected

Rules kept here:

* a header is accepted only if all of its content is on an allow-list: one encrypted segment, one cipher,
  key slots whose cost is bounded, no token but `FRESH_IMAGE`, no flag, no requirement, no member that is not known;
* programs then read `CheckedHeader.area` only, which is written again from the checked content, both copies alike:
  nothing else can be read out of it;
* every copy whose checksum holds is checked, so it does not matter which one counts; where they differ, the newer one
  counts as it does for cryptsetup, and only if the older one differs by key slots that were added or taken off;
* whatever the bytes, `check_header` returns or raises `HeaderRejected`.

Source: LUKS2 On-Disk Format Specification, version 1.1.3; the numbers beside the checks are its sections.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Mapping, Sequence
from hashlib import sha256
from hmac import compare_digest
from typing import Any, Final, cast

from attrs import field, frozen

from chutes_proto._proof import PROOF, Proven
from chutes_proto.errors import HeaderRejected
from chutes_proto.quote import _strict_json as strict_json

PRIMARY: Final = b"LUKS\xba\xbe"
SECONDARY: Final = b"SKUL\xba\xbe"
SIZES: Final = (0x4000, 0x8000, 0x10000, 0x20000)
"""Bytes of one copy, binary header and JSON (2.2). The specification goes on to 4 MiB, which nobody uses."""
HEAD_SIZE: Final = 2 * SIZES[-1]
"""So many bytes of a disk have both copies in them."""
MAX_AREA: Final = 64 * 1024 * 1024
"""Bytes of both copies and the key slots; cryptsetup makes it 16 MiB."""

CIPHERS: Final[Mapping[str, int]] = {"aes-xts-plain64": 64}
"""Ciphers of data and of key slots, each with the bytes of its key."""
HASHES: Final = frozenset({"sha256", "sha512"})
SECTOR_SIZES: Final = frozenset({512, 4096})
STRIPES: Final = 4000
MAX_SLOTS: Final = 8
MAX_SLOT: Final = 1024 * 1024
"""Bytes of the material of one key; cryptsetup takes a quarter of it."""
MAX_MEMORY: Final = 1024 * 1024
"""KiB that Argon2 may take, cryptsetup's own bound."""
MAX_PASSES: Final = 64 * MAX_MEMORY
"""KiB × passes of Argon2, for all slots: half a minute or so."""
MAX_ITERATIONS: Final = 50_000_000
"""Iterations of PBKDF2, for all slots and the digest: half a minute or so."""

FRESH_IMAGE_TOKEN: Final = "15"
FRESH_IMAGE: Final[Mapping[str, object]] = {"type": "chutes-first-boot", "keyslots": []}
"""The token that published images have until their first boot, under its number."""

_BINARY: Final = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
_BINARY_SIZE: Final = 4096
_VERSION: Final = 2
_CHECKSUM: Final = slice(448, 512)
_ALGORITHM: Final = b"sha256".ljust(32, b"\0")
_SECTOR: Final = 4096
_UUID: Final = re.compile(rb"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\0{4}")
_DECIMAL: Final = re.compile(r"0|[1-9][0-9]{0,18}")
_SLOT: Final = re.compile(r"[0-9]|[12][0-9]|3[01]")


@frozen
class CheckedHeader(Proven):
    """A header with allowed content only; `check_header` alone makes one.

    ``offset`` is where the encrypted data begins and ``sector_size`` its unit, in bytes. ``whole`` says that both
    copies are present and equal. ``area`` is both copies written again, as they are at the beginning of the disk;
    ``slots`` is where on the disk each key slot begins and ends. ``is_fresh_image``: the token `FRESH_IMAGE` is there.
    """

    uuid: str
    cipher: str
    sector_size: int
    offset: int
    keyslots: tuple[int, ...]
    sequence: int
    whole: bool
    slots: tuple[tuple[int, int], ...]
    is_fresh_image: bool
    area: bytes = field(repr=False)


@frozen
class _Copy:
    """One copy whose checksum is right, and its content."""

    size: int
    sequence: int
    uuid: str
    binary: bytes
    json: bytes
    content: Mapping[str, Any]


def check_header(head: bytes, size: int, device: str) -> CheckedHeader | None:
    """Check the header at the beginning of a disk of ``size`` bytes; returns None without any trace of one.

    ``head`` is the first `HEAD_SIZE` bytes, or all there are. ``device`` is for the error's text. Raises
    `HeaderRejected`.
    """
    return _Reader(device).read(head, size)


class _Reader:
    """Reads the header of one disk, which its errors name."""

    def __init__(self, device: str) -> None:
        self._device = device

    def read(self, head: bytes, size: int) -> CheckedHeader | None:
        primary = self._copy(head, 0, PRIMARY)
        places = SIZES if primary is None else (primary.size,)
        secondary = next((copy for place in places if (copy := self._copy(head, place, SECONDARY))), None)
        copies = [copy for copy in (primary, secondary) if copy]
        if not copies:
            version = int.from_bytes(head[6:8], "big")
            if head.startswith(PRIMARY) and version != _VERSION:
                raise self._rejected("version", version, _VERSION)
            if head.startswith(PRIMARY) or any(head[place : place + 6] == SECONDARY for place in SIZES):
                sizes = f"{SIZES[0]} to {SIZES[-1]} bytes"
                raise self._rejected("checksum", "none whole", f"a copy of {sizes} whose SHA-256 holds")
            return None
        for copy in copies:
            self._check(copy, size)
        newest = max(copies, key=lambda copy: copy.sequence)
        whole = len(copies) == 2 and self._agree(*copies)
        return self._checked(newest, whole)

    # --- 2.1, 2.2: the binary header ---

    def _copy(self, head: bytes, place: int, magic: bytes) -> _Copy | None:
        """The copy at ``place``, or None if there is none whose checksum holds."""
        binary = head[place : place + _BINARY_SIZE]
        if len(binary) < _BINARY_SIZE or not binary.startswith(magic):
            return None
        _, version, size, sequence, _, algorithm, _, uuid, _, offset, _, checksum = _BINARY.unpack_from(binary)
        if (version, algorithm) != (_VERSION, _ALGORITHM) or size not in SIZES:
            return None
        if place not in (0, size) or len(head) < place + size:
            return None
        json = head[place + _BINARY_SIZE : place + size]
        if not compare_digest(_checksum(binary, json), checksum):
            return None
        if offset != place:
            raise self._rejected("header_offset", offset, place)
        match = _UUID.fullmatch(uuid)
        if match is None:
            raise self._rejected(
                "uuid", repr(uuid.rstrip(b"\0").decode("ascii", "replace"))[:80], "a UUID in lower case"
            )
        return _Copy(size, sequence, match[1].decode(), binary, json, self._json(json))

    def _agree(self, primary: _Copy, secondary: _Copy) -> bool:
        """Whether the copies are equal; False where an update of key slots was interrupted between them."""
        if (primary.sequence, primary.json) == (secondary.sequence, secondary.json):
            if primary.uuid != secondary.uuid:
                raise self._rejected("copies", "two UUIDs", "one")
            return True
        if primary.sequence == secondary.sequence:
            raise self._rejected("copies", f"two contents with the sequence number {primary.sequence}", "one")
        ours, theirs = (copy.content["keyslots"] for copy in (primary, secondary))
        shared = ours.keys() & theirs.keys()
        if (
            _lasting(primary) != _lasting(secondary)
            or shared not in (ours.keys(), theirs.keys())
            or any(ours[slot] != theirs[slot] for slot in shared)
        ):
            raise self._rejected("copies", "two contents", "ones that differ by key slots added or taken off only")
        return False

    def _checked(self, copy: _Copy, whole: bool) -> CheckedHeader:
        segment = copy.content["segments"]["0"]
        return CheckedHeader(
            uuid=copy.uuid,
            cipher=segment["encryption"],
            sector_size=segment["sector_size"],
            offset=int(segment["offset"]),
            keyslots=tuple(sorted(map(int, copy.content["keyslots"]))),
            sequence=copy.sequence,
            whole=whole,
            slots=tuple(sorted(map(_place, copy.content["keyslots"].values()))),
            is_fresh_image=bool(copy.content["tokens"]),
            area=_written(copy, PRIMARY, 0) + _written(copy, SECONDARY, copy.size),
            proof=PROOF,
        )

    # --- 3: the JSON area ---

    def _json(self, area: bytes) -> Mapping[str, Any]:
        text, _, padding = area.partition(b"\0")
        if len(text) == len(area) or padding.strip(b"\0"):
            raise self._rejected("json", "text that is not ended by zeros to the end of its area", "zeros")
        try:
            value = strict_json.decode(text)
        except strict_json.JsonError as exc:
            raise self._rejected("json", exc, "JSON") from None
        return self._object(value, "the JSON area", "config digests keyslots segments tokens")

    def _check(self, copy: _Copy, size: int) -> None:
        content = copy.content
        slots_at = 2 * copy.size
        config = self._object(content["config"], "config", "json_size keyslots_size", "flags requirements")
        self._among("flags", config.get("flags", []), [], called="none")
        self._among("requirements", config.get("requirements", {}), {}, {"mandatory": []}, called="none")
        self._among("json_size", self._decimal(config, "json_size"), copy.size - _BINARY_SIZE)
        end = slots_at + self._decimal(config, "keyslots_size")
        if end > min(MAX_AREA, size) or end % _SECTOR:
            raise self._rejected("keyslots_size", end - slots_at, f"sectors, up to {min(MAX_AREA, size) - slots_at}")
        self._among("tokens", content["tokens"], {}, {FRESH_IMAGE_TOKEN: FRESH_IMAGE}, called="none")
        self._check_segment(content["segments"], end, size)
        slots: Mapping[str, Any] = self._table(content["keyslots"], "keyslots")
        if not 1 <= len(slots) <= MAX_SLOTS or not all(map(_SLOT.fullmatch, slots)):
            raise self._rejected("keyslots", f"{len(slots)}: {', '.join(slots)[:80]}", f"1 to {MAX_SLOTS}")
        areas = sorted(self._check_slot(f"keyslots.{name}", slot) for name, slot in slots.items())
        for (begin, after), (following, _) in zip([(0, slots_at), *areas], [*areas, (end, end)], strict=True):
            if following < after:
                raise self._rejected("keyslot_area", f"{begin} to {after}, then {following}", "areas of their own")
        digest = self._check_digest(content["digests"], set(slots))
        self._check_cost([*(slot["kdf"] for slot in slots.values()), digest])

    # 3.3
    def _check_segment(self, value: object, end: int, size: int) -> None:
        table = self._table(value, "segments")
        if table.keys() != {"0"}:
            raise self._rejected("segments", ", ".join(table)[:80] or "none", "one, named 0")
        kind = self._table(table["0"], "segments.0")
        self._among("segment_type", kind.get("type"), "crypt")
        if "integrity" in kind:
            raise self._rejected("integrity", "an integrity layer", "none")
        names = "encryption iv_tweak offset sector_size size type"
        segment = self._object(kind, "segments.0", names, "flags")
        self._among("segment_flags", segment.get("flags", []), [], called="none")
        _ = self._cipher("cipher", segment)
        self._among("iv_tweak", segment["iv_tweak"], "0")
        self._among("sector_size", unit := segment["sector_size"], *sorted(SECTOR_SIZES))
        offset = self._decimal(segment, "offset")
        if not end <= offset < size or offset % _SECTOR:
            raise self._rejected("segment_offset", offset, f"a sector from {end} to the end of the disk at {size}")
        if segment["size"] != "dynamic":
            length = self._decimal(segment, "size")
            if not 0 < length <= size - offset or length % unit:
                raise self._rejected("segment_size", length, f"sectors of {unit} bytes, {size - offset} at most")

    # 3.2
    def _check_slot(self, where: str, value: object) -> tuple[int, int]:
        """Check a key slot; returns where its key material begins and ends."""
        slot = self._object(value, where, "af area kdf key_size type", "priority")
        self._among("keyslot_type", slot["type"], "luks2")
        self._among("keyslot_priority", slot.get("priority", 1), 1)
        area = self._object(slot["area"], f"{where}.area", "encryption key_size offset size type")
        self._among("keyslot_area", area["type"], "raw")
        self._among("keyslot_key_size", area["key_size"], self._cipher("keyslot_cipher", area))
        self._among("key_size", slot["key_size"], max(CIPHERS.values()))
        splitter = self._object(slot["af"], f"{where}.af", "hash stripes type")
        self._among("af", (splitter["type"], splitter["stripes"]), ("luks1", STRIPES))
        self._among("af_hash", splitter["hash"], *sorted(HASHES))
        kdf = self._table(slot["kdf"], f"{where}.kdf")
        if kdf.get("type") == "pbkdf2":
            _ = self._object(kdf, f"{where}.kdf", "hash iterations salt type")
            self._among("kdf_hash", kdf["hash"], *sorted(HASHES))
        elif kdf.get("type") == "argon2id":
            _ = self._object(kdf, f"{where}.kdf", "cpus memory salt time type")
            _ = self._number("kdf_cpus", kdf["cpus"], 64)
        else:
            raise self._rejected("kdf", str(kdf.get("type"))[:80], "argon2id or pbkdf2")
        self._bytes("kdf_salt", kdf["salt"])
        begin, length = self._decimal(area, "offset"), self._decimal(area, "size")
        least = -(-slot["key_size"] * STRIPES // _SECTOR) * _SECTOR
        if not least <= length <= MAX_SLOT or begin % _SECTOR or length % _SECTOR:
            raise self._rejected("keyslot_area", f"{length} bytes at {begin}", f"sectors, {least} to {MAX_SLOT} bytes")
        return _place(slot)

    # 3.4
    def _check_digest(self, value: object, slots: set[str]) -> Mapping[str, Any]:
        table = self._table(value, "digests")
        if len(table) != 1 or not all(map(_SLOT.fullmatch, table)):
            raise self._rejected("digests", ", ".join(table)[:80] or "none", "one")
        (value,) = table.values()
        digest = self._object(value, "digests", "digest hash iterations keyslots salt segments type")
        self._among("digest_type", digest["type"], "pbkdf2")
        self._among("digest_hash", digest["hash"], *sorted(HASHES))
        self._among("digest_segments", digest["segments"], ["0"])
        named = digest["keyslots"]
        if not isinstance(named, list) or sorted(map(str, cast("list[object]", named))) != sorted(slots):
            raise self._rejected("digest_keyslots", str(cast("object", named))[:80], "every key slot once")
        self._bytes("digest_salt", digest["salt"])
        self._bytes("digest", digest["digest"])
        return digest

    def _check_cost(self, kdfs: Sequence[Mapping[str, Any]]) -> None:
        """Check the cost of all key slots together: each may be tried, for one key after the other."""
        rounds = sum(
            self._number("kdf_iterations", kdf["iterations"], MAX_ITERATIONS) for kdf in kdfs if kdf["type"] == "pbkdf2"
        )
        passes = sum(
            self._number("kdf_memory", kdf["memory"], MAX_MEMORY) * self._number("kdf_time", kdf["time"], MAX_PASSES)
            for kdf in kdfs
            if kdf["type"] == "argon2id"
        )
        if rounds > MAX_ITERATIONS:
            raise self._rejected("kdf_iterations", f"{rounds} for all slots", f"{MAX_ITERATIONS} at most")
        if passes > MAX_PASSES:
            raise self._rejected("kdf_time", f"{passes} KiB in all passes of all slots", f"{MAX_PASSES} at most")

    # --- members ---

    def _table(self, value: object, where: str) -> dict[str, Any]:
        if type(value) is not dict:
            raise self._rejected("json", f"{where} that is not an object", "an object")
        return cast("dict[str, Any]", value)

    def _object(self, value: object, where: str, names: str, more: str = "") -> dict[str, Any]:
        """An object with exactly the members ``names``, and optionally some of ``more``."""
        table = self._table(value, where)
        missing, unknown = {*names.split()} - {*table}, {*table} - {*names.split(), *more.split()}
        if missing or unknown:
            found = [*(f"no {name}" for name in sorted(missing)), *sorted(unknown)]
            raise self._rejected("members", f"{', '.join(found)[:80]} in {where}", names.replace(" ", ", "))
        return table

    def _among(self, reason: str, found: object, *allowed: object, called: str = "") -> None:
        """Check that a value is one of these, and of its type: true is not 1."""
        if not any(type(found) is type(value) and found == value for value in allowed):
            raise self._rejected(reason, str(found)[:80], called or " or ".join(map(str, allowed)))

    def _cipher(self, reason: str, table: Mapping[str, object]) -> int:
        """Check a cipher; returns the bytes of its key."""
        name = table["encryption"]
        if not isinstance(name, str) or name not in CIPHERS:
            what = f"{str(name)[:80]}, which encrypts nothing" if "cipher_null" in str(name) else str(name)[:80]
            raise self._rejected(reason, what, " or ".join(CIPHERS))
        return CIPHERS[name]

    def _number(self, reason: str, value: object, most: int) -> int:
        if type(value) is not int or not 1 <= value <= most:
            raise self._rejected(reason, str(value)[:80], f"a number from 1 to {most}")
        return value

    def _decimal(self, table: Mapping[str, object], name: str) -> int:
        value = table[name]
        if not isinstance(value, str) or not _DECIMAL.fullmatch(value):
            raise self._rejected(name, str(value)[:80], "a decimal number, as a string")
        return int(value)

    def _bytes(self, reason: str, value: object) -> None:
        try:
            size = len(base64.b64decode(value if isinstance(value, str) else "", validate=True))
        except (binascii.Error, ValueError):
            size = 0
        if not 16 <= size <= 64:
            raise self._rejected(reason, str(value)[:80], "16 to 64 bytes in base64")

    def _rejected(self, reason: str, found: object, expected: object) -> HeaderRejected:
        return HeaderRejected(reason, found, expected, self._device)


def _place(slot: Mapping[str, Any]) -> tuple[int, int]:
    begin = int(slot["area"]["offset"])
    return begin, begin + int(slot["area"]["size"])


def _lasting(copy: _Copy) -> object:
    """The content that no update of key slots changes."""
    digests = {name: {**digest, "keyslots": None} for name, digest in copy.content["digests"].items()}
    return copy.uuid, copy.size, copy.content["segments"], copy.content["config"], digests


def _written(copy: _Copy, magic: bytes, offset: int) -> bytes:
    """Write the copy for ``offset``, with its own magic, offset and checksum."""
    binary = bytearray(copy.binary)
    binary[:6] = magic
    binary[256:264] = offset.to_bytes(8, "big")
    binary[_CHECKSUM] = _checksum(binary, copy.json)
    return bytes(binary) + copy.json


def _checksum(binary: bytes | bytearray, json: bytes) -> bytes:
    """2.3, in its field of 64 bytes."""
    blank = binary[: _CHECKSUM.start] + bytes(64) + binary[_CHECKSUM.stop :]
    return sha256(blank + json).digest().ljust(64, b"\0")
