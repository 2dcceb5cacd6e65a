"""Classify a disk: blank, a LUKS2 volume, or foreign data that must not be touched.

Rules kept here:

* a disk counts as blank only if its first and its last `LOOKED_AT` bytes are zero.
  Partition tables, file systems, RAID, LVM, ZFS and LUKS all keep their signatures within these;
* a disk that begins with `UNFINISHED` is blank too, because a format of it was interrupted. A host
  can write that, as it can write zeros; a disk that the server knows to be in use is formatted in neither case.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

from attrs import frozen

from chutes_proto.luks.header import CheckedHeader, check_header

LOOKED_AT: Final = 1024 * 1024
DATA_OFFSET: Final = 16 * 1024 * 1024
"""Offset of the data on a disk that is formatted here: the default of `cryptsetup`."""
LEAST_SIZE: Final = DATA_OFFSET + LOOKED_AT
"""The least size of a disk that is formatted here."""
UNFINISHED: Final = b"chutes-proto: a format of this disk was begun; it holds nothing\n".ljust(512, b"\0")
"""The first sector while a disk is being formatted."""

_SIGNATURES: Final = (
    (0, b"XFSB", "XFS"),
    (0x438, b"\x53\xef", "ext2, ext3 or ext4"),
    (0x10040, b"_BHRfS_M", "Btrfs"),
    (0x218, b"LVM2 001", "LVM"),
    (0x200, b"EFI PART", "a GPT partition table"),
    (0x1FE, b"\x55\xaa", "an MBR partition table, or a FAT or NTFS file system"),
)


@frozen
class Blank:
    """A blank disk. ``unfinished``: a format of it was interrupted."""

    device: str
    size: int
    unfinished: bool = False

    def __str__(self) -> str:
        return f"blank, {self.size} bytes{'; a format of it was interrupted' if self.unfinished else ''}"


@frozen
class Luks:
    """A LUKS2 volume whose header was checked."""

    device: str
    size: int
    header: CheckedHeader

    def __str__(self) -> str:
        slots = len(self.header.keyslots)
        torn = "" if self.header.whole else "; an update of its header was interrupted, the newest copy counts"
        return f"LUKS2, UUID {self.header.uuid}, {slots} key slot{'s' * (slots != 1)}{torn}"


@frozen
class Foreign:
    """A disk with other data, which is never formatted. ``found`` describes them."""

    device: str
    size: int
    found: str

    def __str__(self) -> str:
        return f"neither blank nor LUKS2, but {self.found}, {self.size} bytes"


Disk: TypeAlias = Blank | Luks | Foreign


def judge(head: bytes, rest: Iterable[bytes], size: int, device: str) -> Disk:
    """Classify a disk of ``size`` bytes.

    ``head`` is its first `HEAD_SIZE` bytes, or all there are; ``rest``, in pieces, is what else is in the first and the
    last `LOOKED_AT` bytes, and is asked for only where nothing is in the head. Raises `HeaderRejected` for a LUKS
    header that is not allowed.
    """
    if head.startswith(UNFINISHED):
        return Blank(device, size, unfinished=True)
    header = check_header(head, size, device)
    if header is not None:
        return Luks(device, size, header)
    if _is_zero(head) and all(map(_is_zero, rest)):
        return Blank(device, size)
    known = (name for place, magic, name in _SIGNATURES if head[place : place + len(magic)] == magic)
    return Foreign(device, size, next(known, "data of an unknown kind"))


def _is_zero(data: bytes) -> bool:
    return data.count(0) == len(data)  # many times as quick as any()
