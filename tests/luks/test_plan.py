"""The content of a disk, and the steps for it: never a format of what is not blank, or is in use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.errors import DiskError, HeaderRejected, LocalProtocolError
from chutes_proto.luks.disk import LEAST_SIZE, LOOKED_AT, UNFINISHED, Blank, Disk, Foreign, Luks, judge
from chutes_proto.luks.plan import (
    AddKey,
    Format,
    KeepKey,
    Key,
    Open,
    plan_open,
    plan_promoted,
    plan_root,
    plan_rotation,
)
from chutes_proto.luks.volume import Volume
from tests.luks.headers import SIZE, both, told

VOLUME = Volume("storage", "/dev/vdb")
ZEROS = bytes(LOOKED_AT)


def at(place: int, data: bytes) -> bytes:
    return (bytes(place) + data).ljust(LOOKED_AT, b"\0")


BLANK, LUKS, FOREIGN = (judge(head, [ZEROS], SIZE, "/dev/vdb") for head in (ZEROS, both(told()), at(0, b"XFSB")))


# --- disks ---


def test_what_a_disk_holds() -> None:
    assert Blank("/dev/vdb", SIZE) == BLANK
    assert str(BLANK) == f"blank, {SIZE} bytes"
    assert isinstance(LUKS, Luks)
    assert str(LUKS) == f"LUKS2, UUID {LUKS.header.uuid}, 1 key slot"
    assert Foreign("/dev/vdb", SIZE, "XFS") == FOREIGN
    assert str(FOREIGN) == f"neither blank nor LUKS2, but XFS, {SIZE} bytes"


@pytest.mark.parametrize(
    ("place", "data", "found"),
    [
        (0x438, b"\x53\xef", "ext2, ext3 or ext4"),
        (0x10040, b"_BHRfS_M", "Btrfs"),
        (0x218, b"LVM2 001", "LVM"),
        (0x200, b"EFI PART", "a GPT partition table"),
        (0x1FE, b"\x55\xaa", "an MBR partition table, or a FAT or NTFS file system"),
        (7, b"x", "data of an unknown kind"),
    ],
)
def test_what_is_foreign(place: int, data: bytes, found: str) -> None:
    assert judge(at(place, data), [ZEROS], SIZE, "/dev/vdb") == Foreign("/dev/vdb", SIZE, found)


@given(st.integers(0, LOOKED_AT - 1), st.integers(1, 255), st.booleans())
def test_one_byte_makes_a_disk_foreign(place: int, byte: int, at_the_end: bool) -> None:
    some = at(place, bytes([byte]))
    head, tail = (ZEROS, some) if at_the_end else (some, ZEROS)
    assert isinstance(judge(head, [ZEROS, tail], SIZE, "/dev/vdb"), Foreign)


def test_a_format_that_was_cut_off() -> None:
    for head in (at(0, UNFINISHED), at(0, UNFINISHED)[:4096] + both(told())[4096:]):
        disk = judge(head, [ZEROS], SIZE, "/dev/vdb")
        assert disk == Blank("/dev/vdb", SIZE, unfinished=True)
        assert str(disk).endswith("a format of it was interrupted")
    assert isinstance(judge(at(0, UNFINISHED[:-1] + b"x"), [ZEROS], SIZE, "/dev/vdb"), Foreign)


def test_a_header_that_is_not_allowed_is_no_foreign_disk() -> None:
    with pytest.raises(HeaderRejected):
        _ = judge(at(0, b"LUKS\xba\xbe\0\1"), [ZEROS], SIZE, "/dev/vdb")


# --- plans ---


def test_a_disk_with_a_header_is_opened() -> None:
    for in_use in (True, False):
        assert plan_open(VOLUME, LUKS, in_use=in_use) == (Open("storage", "/dev/vdb", "storage", (Key.CURRENT,)),)
        assert plan_rotation(VOLUME, LUKS, in_use=in_use, first=False) == (
            Open("storage", "/dev/vdb", "storage", (Key.CURRENT, Key.NEXT)),
            AddKey("storage", "/dev/vdb", Key.NEXT),
        )
        first = plan_rotation(VOLUME, LUKS, in_use=in_use, first=True)
        assert first == (Open("storage", "/dev/vdb", "storage", (Key.NEXT,)),)
    assert plan_promoted(VOLUME, first=True) == (KeepKey("storage", "/dev/vdb", Key.NEXT),)
    assert plan_promoted(VOLUME, first=False) == (KeepKey("storage", "/dev/vdb", Key.NEXT, Key.CURRENT),)
    assert plan_root(VOLUME, LUKS) == (Open("storage", "/dev/vdb", "storage", (Key.CURRENT,)),)


def test_a_blank_disk_is_formatted_with_consent() -> None:
    formatted = {
        key: (Format("storage", "/dev/vdb", key), Open("storage", "/dev/vdb", "storage", (key,))) for key in Key
    }
    assert plan_open(VOLUME, BLANK, in_use=False) == formatted[Key.CURRENT]
    assert plan_rotation(VOLUME, BLANK, in_use=False, first=True) == formatted[Key.NEXT]
    adding = (*formatted[Key.CURRENT], AddKey("storage", "/dev/vdb", Key.NEXT))
    assert plan_rotation(VOLUME, BLANK, in_use=False, first=False) == adding


@pytest.mark.parametrize(
    ("disk", "in_use", "reason"),
    [
        (BLANK, True, "blank_in_use"),
        (Blank("/dev/vdb", SIZE, unfinished=True), True, "blank_in_use"),
        (Blank("/dev/vdb", LEAST_SIZE - 1), True, "blank_in_use"),
        (Blank("/dev/vdb", LEAST_SIZE - 1), False, "too_small"),
        (FOREIGN, True, "foreign"),
        (FOREIGN, False, "foreign"),
    ],
)
def test_what_stops_a_boot(disk: Disk, in_use: bool, reason: str) -> None:
    for plan in (
        lambda: plan_open(VOLUME, disk, in_use=in_use),
        lambda: plan_rotation(VOLUME, disk, in_use=in_use, first=True),
        lambda: plan_rotation(VOLUME, disk, in_use=in_use, first=False),
    ):
        with pytest.raises(DiskError, match=r"/dev/vdb: the disk of storage (is|has)") as caught:
            _ = plan()
        assert (caught.value.reason, caught.value.device) == (reason, "/dev/vdb")


def test_the_root_disk_is_never_formatted() -> None:
    for disk, reason in ((BLANK, "blank_root"), (FOREIGN, "foreign")):
        with pytest.raises(DiskError) as caught:
            _ = plan_root(VOLUME, disk)
        assert caught.value.reason == reason


def test_a_plan_is_printed() -> None:
    plan = (*plan_rotation(VOLUME, BLANK, in_use=False, first=False), *plan_promoted(VOLUME, first=False))
    assert [str(action) for action in plan] == [
        "storage: format /dev/vdb as LUKS2 with the current key",
        "storage: open /dev/vdb as /dev/mapper/storage with the current key",
        "storage: add the next key to /dev/vdb unless it has it, and test it",
        "storage: take every key but the next and the current one off /dev/vdb",
    ]
    assert plan[0].as_dict() == {
        "volume": "storage",
        "action": "format",
        "device": "/dev/vdb",
        "text": "storage: format /dev/vdb as LUKS2 with the current key",
    }
    assert [action.name for action in plan] == ["format", "open", "add_key", "keep_key"]


@pytest.mark.parametrize(
    ("name", "device", "mapping"),
    [
        ("", "/dev/vdb", "x"),
        ("a/b", "/dev/vdb", ""),
        ("-a", "/dev/vdb", ""),
        ("..", "/dev/vdb", ""),
        ("a" * 65, "/dev/vdb", ""),
        ("a", "vdb", ""),
        ("a", "", ""),
        ("a", "--help", ""),
        ("a", "/dev/vdb", "../sda"),
        ("a", "/dev/vdb", "control"),
    ],
)
def test_names_that_no_volume_has(name: str, device: str, mapping: str) -> None:
    with pytest.raises(LocalProtocolError):
        _ = Volume(name, device, mapping)
