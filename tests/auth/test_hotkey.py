"""SS58 addresses have one spelling; signatures hold or raise."""

from __future__ import annotations

import hashlib
import sys
from contextlib import suppress
from typing import cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chutes_proto.auth import hotkey as room
from chutes_proto.auth.hotkey import Hotkey, HotkeyError, HotkeyPair
from chutes_proto.errors import LocalProtocolError
from chutes_proto.secret import Secret

ADDRESS = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"  # the well-known development key
PUBLIC_KEY = bytes.fromhex("d43593c715fdd31c61141abd04a99fd6822c8558854ccde39a5684e7a56da27d")
PAIR = HotkeyPair.from_secret(Secret(bytes(range(32))))


def address_of(payload: bytes, checksum_size: int = 2) -> str:
    """SS58 with any prefix, key length and checksum length."""
    return room._base58(payload + hashlib.blake2b(b"SS58PRE" + payload).digest()[:checksum_size])


def test_known_address() -> None:
    hotkey = Hotkey.parse(ADDRESS)
    assert hotkey.public_key == PUBLIC_KEY
    assert hotkey == Hotkey(PUBLIC_KEY)
    assert hotkey.address == ADDRESS


@given(st.binary(min_size=32, max_size=32).filter(any))
@example(b"\xff" * 32)
def test_every_key_has_an_address_that_parses_to_it(public_key: bytes) -> None:
    address = Hotkey(public_key).address
    assert Hotkey.parse(address) == Hotkey(public_key)
    assert len(address) == 48


@given(st.binary(max_size=40).filter(lambda key: len(key) != 32))
def test_keys_have_32_bytes(public_key: bytes) -> None:
    with pytest.raises(HotkeyError, match="32 bytes"):
        Hotkey(public_key)


def test_an_address_is_a_text() -> None:
    """What an unset variable of the environment gives."""
    with pytest.raises(HotkeyError, match="NoneType"):
        _ = Hotkey.parse(cast("str", None))


def test_the_neutral_element_is_no_hotkey() -> None:
    for nobody in (lambda: Hotkey(bytes(32)), lambda: Hotkey.parse(address_of(bytes([42]) + bytes(32)))):
        with pytest.raises(HotkeyError, match="everyone can sign"):
            nobody()
    # A signature that it would let pass: R and s of zeros, with the mark of the signature's kind.
    assert room._sr25519().verify(bytes(63) + b"\x80", b"whatever it is", bytes(32))


@given(st.text(max_size=70) | st.text(alphabet=room._ALPHABET, min_size=40, max_size=70))
@example("")
@example("1" * 48)
@example("1" + ADDRESS)
@example(ADDRESS + "\n")
@example("\uff15" + ADDRESS[1:])
@example("z" * 10_000)
def test_a_text_is_refused_or_canonical(text: str) -> None:
    with suppress(HotkeyError):
        assert Hotkey.parse(text).address == text


def test_a_long_text_is_not_computed_with() -> None:
    """Of a million characters that would take minutes."""
    with pytest.raises(HotkeyError, match="longer than"):
        Hotkey.parse("z" * 10_000)


@given(st.integers(0, 47), st.sampled_from(room._ALPHABET))
def test_one_changed_character_is_refused(index: int, character: str) -> None:
    changed = ADDRESS[:index] + character + ADDRESS[index + 1 :]
    if changed != ADDRESS:
        with pytest.raises(HotkeyError):
            Hotkey.parse(changed)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (bytes([0]) + PUBLIC_KEY, "network prefix 0, not 42"),
        (bytes([2]) + PUBLIC_KEY, "network prefix 2, not 42"),
        (bytes([63]) + PUBLIC_KEY, "network prefix 63, not 42"),
        (bytes([64, 1]) + PUBLIC_KEY, "another network"),
        (bytes([200]) + PUBLIC_KEY, "another network"),
        (bytes([42]) + PUBLIC_KEY[:16], "32-byte key"),
        (bytes([42]) + PUBLIC_KEY + b"\0", "32-byte key"),
    ],
)
def test_other_addresses_are_refused_with_a_reason(payload: bytes, why: str) -> None:
    with pytest.raises(HotkeyError, match=why):
        Hotkey.parse(address_of(payload))


def test_other_checksum_lengths_are_refused() -> None:
    assert address_of(b"\x2a" + PUBLIC_KEY) == ADDRESS
    for size in (0, 1, 3, 8):
        with pytest.raises(HotkeyError):
            Hotkey.parse(address_of(b"\x2a" + PUBLIC_KEY, size))


@given(st.binary(max_size=200))
def test_a_signature_holds_for_its_message_and_key_alone(message: bytes) -> None:
    signature = PAIR.sign(message)
    PAIR.hotkey.check_signature(message, signature)
    with pytest.raises(HotkeyError):
        PAIR.hotkey.check_signature(message + b"!", signature)
    with pytest.raises(HotkeyError):
        Hotkey(PUBLIC_KEY).check_signature(message, signature)


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=70) | st.binary(min_size=64, max_size=64))
@example(b"\xff" * 32, bytes(64))
def test_arbitrary_keys_and_signatures_are_refused(public_key: bytes, signature: bytes) -> None:
    with pytest.raises(HotkeyError):
        Hotkey(public_key).check_signature(b"message", signature)


@pytest.mark.parametrize("size", [0, 31, 33, 63, 65])
def test_a_secret_has_the_size_of_a_seed_or_of_a_private_key(size: int) -> None:
    with pytest.raises(HotkeyError, match=r"32 bytes \(a seed\) or 64"):
        HotkeyPair.from_secret(Secret(bytes(size)))


def test_a_private_key_makes_the_pair_of_its_seed() -> None:
    pair = HotkeyPair.from_secret(PAIR.secret_key)
    assert pair == PAIR
    PAIR.hotkey.check_signature(b"message", pair.sign(b"message"))


@given(st.binary(min_size=64, max_size=64))
@example(bytes(64))
@example(b"\xff" * 64)
def test_64_bytes_make_a_pair_that_signs_or_are_refused(secret: bytes) -> None:
    try:
        pair = HotkeyPair.from_secret(Secret(secret))
    except HotkeyError as exc:
        assert secret.hex() not in str(exc)
        return
    pair.hotkey.check_signature(b"message", pair.sign(b"message"))


def test_a_pair_does_not_show_its_secret() -> None:
    assert PAIR.secret_key.reveal().hex() not in repr(PAIR)
    assert "***" in repr(PAIR)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sr25519", None)
    with pytest.raises(LocalProtocolError, match=r"chutes-proto\[hotkey\]"):
        PAIR.sign(b"")
    with pytest.raises(LocalProtocolError, match=r"chutes-proto\[hotkey\]"):
        PAIR.hotkey.check_signature(b"", bytes(64))
