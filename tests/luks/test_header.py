"""The allowed content of a LUKS2 header: all that `cryptsetup` makes of our kind passes, everything else is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any, cast

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.errors import HeaderRejected
from chutes_proto.luks.header import (
    HEAD_SIZE,
    MAX_ITERATIONS,
    MAX_MEMORY,
    MAX_SLOT,
    MAX_SLOTS,
    CheckedHeader,
    check_header,
)
from tests.luks import headers
from tests.luks.headers import AREA, SIZE, both, one_copy, told

Change = Callable[[Any], object]


def check(head: bytes, size: int = SIZE) -> CheckedHeader:
    header = check_header(head, size, "/dev/vdb")
    assert header is not None
    return header


def rejected(head: bytes, size: int = SIZE) -> HeaderRejected:
    with pytest.raises(HeaderRejected) as caught:
        _ = check_header(head, size, "/dev/vdb")
    assert caught.value.device == "/dev/vdb"
    assert str(caught.value).startswith("/dev/vdb: its LUKS2 header is refused")
    return caught.value


def changed(change: Change, slots: int = 1) -> bytes:
    value = told(slots)
    _ = change(value)
    return both(value)


def test_an_ordinary_header() -> None:
    header = check(both(told(2)))
    assert (header.uuid, header.cipher, header.sector_size) == (headers.UUID, "aes-xts-plain64", 4096)
    assert (header.offset, header.keyslots, header.sequence) == (16 << 20, (0, 1), 3)
    assert header.slots == ((32768, 290816), (290816, 548864))
    assert header.whole
    assert len(header.area) == 2 * AREA
    assert header.area[:AREA] == both(told(2))[:AREA]


def test_no_header_is_none() -> None:
    for head in (b"", bytes(HEAD_SIZE), b"\x53\xef" * 4096, b"LUKS", bytes(AREA - 6) + b"SKUL\xba\xbe"):
        assert check_header(head, SIZE, "/dev/vdb") is None


def test_a_checked_header_is_not_made_by_hand() -> None:
    header = check(both(told()))
    with pytest.raises(TypeError):
        _ = CheckedHeader("u", "cipher_null-ecb", 512, 0, (0,), 1, True, (), False, b"")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        _ = attrs.evolve(header, cipher="cipher_null-ecb")


# --- the null cipher, and all other words ---


@pytest.mark.parametrize("name", ["cipher_null-ecb", "cipher_null-ecb-null", "capi:ecb(cipher_null)-plain"])
def test_the_null_cipher_is_named(name: str) -> None:
    error = rejected(changed(lambda value: value["segments"]["0"].update(encryption=name)))
    assert error.reason == "cipher"
    assert error.found == f"{name}, which encrypts nothing"
    assert error.expected == "aes-xts-plain64"
    assert rejected(changed(lambda v: v["keyslots"]["0"]["area"].update(encryption=name))).reason == "keyslot_cipher"


def crypt(**members: object) -> Change:
    return lambda value: value["segments"]["0"].update(members)


def keyslot(*path: str, **members: object) -> Change:
    def change(value: Any) -> None:
        place = value["keyslots"]["0"]
        for name in path:
            place = place[name]
        place.update(members)

    return change


def digest(**members: object) -> Change:
    return lambda value: value["digests"]["0"].update(members)


def config(**members: object) -> Change:
    return lambda value: value["config"].update(members)


ARGON = {**headers.ARGON2ID}

REFUSED: list[tuple[str, Change]] = [
    ("cipher", crypt(encryption="serpent-xts-plain64")),
    ("cipher", crypt(encryption="AES-XTS-PLAIN64")),
    ("cipher", crypt(encryption=None)),
    ("cipher", crypt(encryption=["aes-xts-plain64"])),
    ("segments", lambda v: v["segments"].update({"1": v["segments"]["0"]})),
    ("segments", lambda v: v["segments"].update({"1": {"type": "linear", "offset": "0", "size": "dynamic"}})),
    ("segments", lambda v: v["segments"].clear()),
    ("segments", lambda v: v.update(segments={"1": v["segments"]["0"]})),
    ("segment_type", crypt(type="linear")),
    ("integrity", crypt(integrity={"type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none"})),
    ("segment_flags", crypt(flags=["in-reencryption"])),
    ("iv_tweak", crypt(iv_tweak="1")),
    ("sector_size", crypt(sector_size=1024)),
    ("sector_size", crypt(sector_size="512")),
    ("sector_size", crypt(sector_size=True)),
    ("segment_offset", crypt(offset="0")),
    ("segment_offset", crypt(offset=str((16 << 20) - 4096))),
    ("segment_offset", crypt(offset=str((16 << 20) + 512))),
    ("segment_offset", crypt(offset=str(SIZE))),
    ("offset", crypt(offset=16 << 20)),
    ("offset", crypt(offset="-1")),
    ("offset", crypt(offset="016777216")),
    ("offset", crypt(offset="9" * 100)),
    ("segment_size", crypt(size="0")),
    ("segment_size", crypt(size=str(SIZE - (16 << 20) + 4096))),
    ("segment_size", crypt(size="4608")),
    ("size", crypt(size=None)),
    ("tokens", lambda v: v.update(tokens={"14": {"type": "chutes-first-boot", "keyslots": []}})),
    ("tokens", lambda v: v.update(tokens={"15": {"type": "chutes-first-boot", "keyslots": ["0"]}})),
    ("tokens", lambda v: v.update(tokens={"0": {"type": "luks2-keyring", "keyslots": ["0"], "key_description": "x"}})),
    ("flags", config(flags=["allow-discards"])),
    ("requirements", config(requirements={"mandatory": ["online-reencrypt-v2"]})),
    ("requirements", config(requirements={"mandatory": ["opal"]})),
    ("requirements", config(requirements=["opal"])),
    ("json_size", config(json_size="4096")),
    ("keyslots_size", config(keyslots_size=str(SIZE))),
    ("keyslots_size", config(keyslots_size="4095")),
    ("keyslots", lambda v: v["keyslots"].clear()),
    ("keyslots", lambda v: v["keyslots"].update({"32": headers.slot(1)})),
    ("keyslots", lambda v: v["keyslots"].update({str(n): headers.slot(n) for n in range(MAX_SLOTS + 1)})),
    ("keyslot_type", keyslot(type="reencrypt")),
    ("members", keyslot(mode="reencrypt", direction="forward")),
    ("keyslot_priority", keyslot(priority=0)),
    ("keyslot_priority", keyslot(priority=True)),
    ("key_size", keyslot(key_size=32)),
    ("key_size", keyslot(key_size="64")),
    ("keyslot_key_size", keyslot("area", key_size=32)),
    ("keyslot_cipher", keyslot("area", encryption="aes-cbc-essiv:sha256")),
    ("keyslot_area", keyslot("area", type="none")),
    ("keyslot_area", keyslot("area", offset="0")),
    ("keyslot_area", keyslot("area", offset=str(2 * AREA - 4096))),
    ("keyslot_area", keyslot("area", offset=str(2 * AREA + 512))),
    ("keyslot_area", keyslot("area", offset=str((16 << 20) - 4096))),
    ("keyslot_area", keyslot("area", size="253952")),
    ("keyslot_area", keyslot("area", size=str(258048 + 512))),
    ("keyslot_area", keyslot("area", size=str(MAX_SLOT + 4096))),
    ("keyslot_area", keyslot("area", offset=str((16 << 20) - 258048 + 4096))),
    ("keyslot_area", lambda v: v["keyslots"].update({"1": headers.slot(0)})),
    ("af", keyslot("af", stripes=1)),
    ("af", keyslot("af", type="none")),
    ("af_hash", keyslot("af", hash="md5")),
    ("af_hash", keyslot("af", hash=["sha256"])),
    ("kdf", keyslot("kdf", type="argon2i")),
    ("kdf", keyslot("kdf", type=None)),
    ("kdf_hash", keyslot("kdf", hash="sha1")),
    ("kdf_iterations", keyslot("kdf", iterations=MAX_ITERATIONS + 1)),
    ("kdf_iterations", keyslot("kdf", iterations=MAX_ITERATIONS)),  # with the digest's
    ("kdf_iterations", keyslot("kdf", iterations=0)),
    ("kdf_iterations", keyslot("kdf", iterations=True)),
    ("kdf_salt", keyslot("kdf", salt="")),
    ("kdf_salt", keyslot("kdf", salt="not base64, but long enough to be some")),
    ("kdf_salt", keyslot("kdf", salt="ä" * 44)),
    ("kdf_memory", keyslot(kdf={**ARGON, "memory": MAX_MEMORY + 1})),
    ("kdf_time", keyslot(kdf={**ARGON, "time": 65})),
    ("kdf_time", keyslot(kdf={**ARGON, "time": 1 << 60})),
    ("kdf_cpus", keyslot(kdf={**ARGON, "cpus": 65})),
    ("digests", lambda v: v["digests"].clear()),
    ("digests", lambda v: v["digests"].update({"1": v["digests"]["0"]})),
    ("digest_type", digest(type="none")),
    ("digest_hash", digest(hash="sha1")),
    ("kdf_iterations", digest(iterations=MAX_ITERATIONS + 1)),
    ("digest_segments", digest(segments=[])),
    ("digest_segments", digest(segments=["0", "0"])),
    ("digest_keyslots", digest(keyslots=[])),
    ("digest_keyslots", digest(keyslots=["0", "1"])),
    ("digest_keyslots", digest(keyslots="0")),
    ("digest", digest(digest="AAAA")),
    ("digest_salt", digest(salt=7)),
]


@pytest.mark.parametrize(("reason", "change"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_refused(reason: str, change: Change) -> None:
    assert rejected(changed(change)).reason == reason


def renamed(value: Any) -> None:
    """As a re-encryption leaves it."""
    value["digests"] = {"1": value["digests"]["0"]}


@pytest.mark.parametrize(
    "change",
    [
        crypt(sector_size=512),
        crypt(size="4096"),
        crypt(flags=[]),
        crypt(offset=str(20 << 20)),
        config(flags=[]),
        config(requirements={"mandatory": []}),
        keyslot(priority=1),
        keyslot(kdf=headers.ARGON2ID),
        keyslot("kdf", hash="sha512"),
        keyslot("area", size="262144"),
        renamed,
    ],
)
def test_what_is_taken(change: Change) -> None:
    assert check(changed(change)).whole


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to every object and to every member of what a header says."""
    if isinstance(value, dict):
        for name, part in cast("dict[str, Any]", value).items():
            yield (*path, name)
            yield from places(part, (*path, name))


@pytest.mark.parametrize("path", [*places(told())], ids=".".join)
def test_every_member_is_needed_and_has_its_type(path: tuple[str, ...]) -> None:
    def parent(value: Any) -> Any:
        for name in path[:-1]:
            value = value[name]
        return value

    without = told()
    del parent(without)[path[-1]]
    _ = rejected(both(without))
    others: tuple[Any, ...] = (None, True, 1.5, -1, "x", [], {}, ["0", "0"], 1 << 70)
    for other in others:
        value = told()
        if parent(value)[path[-1]] != other and type(parent(value)[path[-1]]) is not type(other):
            parent(value)[path[-1]] = other
            _ = rejected(both(value))


@pytest.mark.parametrize(
    "path",
    [(), *places(told())],
    ids=lambda path: ".".join(path) or "all",
)
def test_no_member_is_unknown(path: tuple[str, ...]) -> None:
    value: Any = told()
    place = value
    for name in path:
        place = place[name]
    if isinstance(place, dict):
        place["x"] = "x"
        _ = rejected(both(value))


# --- JSON ---


@pytest.mark.parametrize(
    "area",
    [
        b"",
        b"\0",
        b"{",
        b"[]",
        b"null",
        json.dumps(told()).encode().ljust(AREA - 4096),  # ended by nothing
        json.dumps(told()).encode() + b"\0x",
        b" \0" + json.dumps(told()).encode(),
        json.dumps(told()).encode().replace(b'"tokens"', b'"tokens": {}, "tokens"'),
        json.dumps(told()).encode().replace(b'"tokens": {}', b'"tokens": ' + b"[" * 100 + b"]" * 100),
        json.dumps(told()).encode().replace(b"4096", b"4096.0"),
        b"\xff\xfe",
    ],
)
def test_json_that_could_mean_something_else(area: bytes) -> None:
    assert rejected(both(area)).reason in ("json", "members")


# --- the binary header and its copies ---


def test_luks1_is_refused() -> None:
    error = rejected(one_copy(b"", version=1).ljust(HEAD_SIZE, b"\0"))
    assert (error.reason, error.found, error.expected) == ("version", "1", "2")


@pytest.mark.parametrize(
    ("reason", "binary"),
    [
        ("checksum", {"algorithm": b"sha1"}),
        ("checksum", {"algorithm": b"sha256\0x"}),
        ("header_offset", {"offset": 4096}),
        ("uuid", {"uuid": ""}),
        ("uuid", {"uuid": "\x1b[31m"}),
        ("uuid", {"uuid": headers.UUID.upper()}),
        ("checksum", {"size": 4096}),
        ("checksum", {"size": 1 << 63}),
        ("checksum", {"size": 0x8000}),
    ],
)
def test_the_binary_header(reason: str, binary: dict[str, Any]) -> None:
    assert rejected(both(told(), **binary)).reason == reason


@given(st.integers(0, 2 * AREA - 1), st.integers(1, 255))
def test_one_wrong_byte_leaves_the_other_copy(place: int, flip: int) -> None:
    head = bytearray(both(told()))
    head[place] ^= flip
    header = check(bytes(head))
    assert not header.whole
    assert header.area == check(both(told())).area
    head[(place + AREA) % (2 * AREA)] ^= flip
    try:
        assert check_header(bytes(head), SIZE, "/dev/vdb") is None  # neither begins as a header does
    except HeaderRejected:
        assert place % AREA >= 6
    else:
        assert place % AREA < 6


def copies(first: object, second: object, *, sequences: tuple[int, int] = (4, 3), **other: Any) -> bytes:
    one, two = (json.dumps(value).encode() for value in (first, second))
    return one_copy(one, sequence=sequences[0]) + one_copy(two, second=True, sequence=sequences[1], **other)


@pytest.mark.parametrize("sequences", [(4, 3), (3, 4), (9, 3)])
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2), (3, 1), (1, 1)])
def test_an_update_that_was_cut_off(first: int, second: int, sequences: tuple[int, int]) -> None:
    header = check(copies(told(first), told(second), sequences=sequences))
    assert header.sequence == max(sequences)
    assert len(header.keyslots) == (first if sequences[0] > sequences[1] else second)
    assert not header.whole
    assert check(header.area).whole


def test_copies_that_are_not_one_update_apart() -> None:
    def other(change: Change, slots: int = 1) -> Any:
        value = told(slots)
        _ = change(value)
        return value

    moved = other(
        lambda v: (v["keyslots"].update({"1": v["keyslots"].pop("0")}), v["digests"]["0"].update(keyslots=["1"]))
    )
    for second in (
        other(crypt(sector_size=512)),
        other(crypt(offset=str(20 << 20))),
        other(digest(salt=headers.told()["digests"]["0"]["digest"])),
        other(keyslot("kdf", iterations=1001)),
        other(keyslot("kdf", iterations=1001), slots=2),
        moved,
    ):
        assert rejected(copies(told(), second)).reason == "copies"
    for sequences in ((4, 3), (3, 3)):
        renamed = copies(told(), told(), uuid=headers.UUID.replace("f", "e"), sequences=sequences)
        assert rejected(renamed).reason == "copies"
    assert rejected(copies(told(2), told(1), sequences=(3, 3))).reason == "copies"


def test_a_copy_that_does_not_count_is_checked_too() -> None:
    null = told()
    null["segments"]["0"]["encryption"] = "cipher_null-ecb"
    for head in (copies(told(), null), copies(null, told()), copies(told(), null, sequences=(3, 4))):
        assert rejected(head).reason == "cipher"


def test_the_second_copy_is_found_without_the_first() -> None:
    head = bytes(AREA) + both(told())[AREA:]
    header = check(head)
    assert not header.whole
    assert header.area == check(both(told())).area
    damaged = bytearray(head)
    damaged[AREA + 600] ^= 1
    assert rejected(bytes(damaged)).reason == "checksum", "it is no blank disk"


def test_a_disk_that_is_smaller_than_its_header_says() -> None:
    for size, reason in (
        ((16 << 20), "segment_offset"),
        ((16 << 20) - 4096, "keyslots_size"),
        (2 * AREA, "keyslots_size"),
    ):
        assert rejected(both(told()), size).reason == reason
    assert rejected(both(told())[: 2 * AREA - 1][:AREA] + b"SKUL\xba\xbe", 2 * AREA).reason


# --- any bytes ---


@given(st.data())
def test_any_value_anywhere(data: st.DataObject) -> None:
    """Whatever one member is replaced by, the header is as it was, or refused."""
    value: Any = told(2)
    path = data.draw(st.sampled_from([*places(value)]))
    place = value
    for name in path[:-1]:
        place = place[name]
    leaves = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["0", "1"])
    )
    place[path[-1]] = data.draw(
        st.recursive(leaves, lambda some: st.lists(some) | st.dictionaries(st.text(), some), max_leaves=5)
    )
    try:
        header = check_header(both(copy.deepcopy(value)), SIZE, "/dev/vdb")
    except HeaderRejected:
        return
    assert header is not None
    assert header.cipher == "aes-xts-plain64"
    assert header.keyslots == (0, 1)
