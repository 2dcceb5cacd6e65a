"""The envelope: what it opens to, what it refuses, and that nothing secret shows."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import struct
from typing import Any

import pytest
from attrs import evolve
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.errors import ConfigurationError, KeyUnavailable, LocalProtocolError, SealBroken
from chutes_proto.keys.vault import NONCE_SIZE, Address, FreshKey, KeyEncryptionKey, Sealed, Vault
from chutes_proto.secret import Secret
from chutes_proto.store._rows import GenerationRow, KeyringRow, Vm

OLD = KeyEncryptionKey.from_bytes(b"o" * 32)
NEW = KeyEncryptionKey.from_bytes(b"n" * 32)
VAULT = Vault(NEW, OLD)
ADDRESS = Address(Vm("hotkey", "vm"), "storage", 1)
FRESH = FreshKey.from_entropy(bytes(range(FreshKey.SIZE)))


def row_of(sealed: Sealed, address: Address = ADDRESS) -> GenerationRow:
    return GenerationRow(
        vm=address.vm,
        volume=address.volume,
        generation=address.generation,
        state="active",
        sealed=sealed.sealed,
        kek_id=sealed.kek_id,
        wrapped_key=sealed.wrapped_key,
        provisional=False,
        created_at=0,
        origin="",
    )


ROW = row_of(VAULT.seal(ADDRESS, FRESH))

safe = st.characters(exclude_categories=["Cs"])
addresses = st.builds(
    Address,
    st.builds(Vm, st.text(safe, max_size=40), st.text(safe, max_size=40)),
    st.text(safe, max_size=20),
    st.integers(1, 2**40),
)


@given(addresses, st.binary(min_size=FreshKey.SIZE, max_size=FreshKey.SIZE))
def test_what_is_sealed_opens(address: Address, entropy: bytes) -> None:
    sealed = VAULT.seal(address, FreshKey.from_entropy(entropy))
    passphrase = VAULT.open(address, row_of(sealed, address))
    assert passphrase.reveal() == entropy[:64].hex().encode()
    assert sealed.kek_id == NEW.kek_id


@given(addresses, addresses)
def test_a_row_opens_at_its_own_address_only(address: Address, other: Address) -> None:
    row = row_of(VAULT.seal(address, FRESH), address)
    if other != address:
        with pytest.raises(SealBroken, match="altered or is another's"):
            VAULT.open(other, row)


@pytest.mark.parametrize(
    "other",
    [
        Address(Vm("hotkeyv", "m"), "storage", 1),
        Address(Vm("hotkey", "vmstorage"), "", 1),
        Address(Vm("hotkey", "vm"), "storage\0\0\0\0\0\0\0\1", 1),
        Address(Vm("vm", "hotkey"), "storage", 1),
    ],
)
def test_no_other_cut_of_an_address_is_the_same(other: Address) -> None:
    with pytest.raises(SealBroken):
        VAULT.open(other, ROW)


@given(st.sampled_from(["sealed", "wrapped_key"]), st.data())
def test_no_bit_can_be_changed(name: str, data: st.DataObject) -> None:
    value = ROW.sealed if name == "sealed" else ROW.wrapped_key
    assert value is not None
    bit = data.draw(st.integers(0, 8 * len(value) - 1))
    changed = bytearray(value)
    changed[bit // 8] ^= 1 << bit % 8
    row = evolve(ROW, sealed=bytes(changed)) if name == "sealed" else evolve(ROW, wrapped_key=bytes(changed))
    with pytest.raises(SealBroken):
        VAULT.open(ADDRESS, row)


@pytest.mark.parametrize(
    "changed", [{"kind": b"rows"}, {"epoch": "1"}, {"epoch": -1}, {"wrapped": "text"}, {"kind": "log"}]
)
def test_a_key_of_the_store_opens_as_its_row_was_only(changed: dict[str, Any]) -> None:
    """SQLite takes a value of any type in any column."""
    row = KeyringRow("rows", 1, *VAULT.wrap("rows", 1, Secret(bytes(32)), bytes(NONCE_SIZE)), created_at=0)
    assert VAULT.unwrap(row).reveal() == bytes(32)
    with pytest.raises(SealBroken, match="of the store's own does not open: its row was altered"):
        VAULT.unwrap(evolve(row, **changed))


@given(st.binary(max_size=200), st.binary(max_size=100))
def test_foreign_bytes_do_not_open(sealed: bytes, wrapped: bytes) -> None:
    for row in (evolve(ROW, sealed=sealed), evolve(ROW, wrapped_key=wrapped), evolve(ROW, sealed=ROW.wrapped_key)):
        with pytest.raises(SealBroken):
            VAULT.open(ADDRESS, row)


def test_a_layer_does_not_open_in_the_place_of_the_other() -> None:
    """The envelope by hand, as the documentation has it; and the same with the layers' associated data exchanged."""
    kek, data_key, nonce = NEW.key.reveal(), b"d" * 32, b"n" * 12

    def by_hand(inner: bytes, outer: bytes) -> GenerationRow:
        sealed = nonce + AESGCM(data_key).encrypt(nonce, b"passphrase", associated_data(inner))
        wrapped = nonce + AESGCM(kek).encrypt(nonce, data_key, associated_data(outer))
        return row_of(Sealed(sealed, NEW.kek_id, wrapped))

    def associated_data(layer: bytes) -> bytes:
        parts = (b"chutes-proto " + layer, b"\0\0\0\1", b"hotkey", b"vm", b"storage", b"\0\0\0\0\0\0\0\1")
        return b"".join(struct.pack(">I", len(part)) + part for part in parts)

    assert VAULT.open(ADDRESS, by_hand(b"passphrase", b"data key")).reveal() == b"passphrase"
    for layers in ((b"data key", b"data key"), (b"passphrase", b"passphrase"), (b"data key", b"passphrase")):
        with pytest.raises(SealBroken):
            VAULT.open(ADDRESS, by_hand(*layers))


def test_two_keys_may_be_live_and_the_current_one_seals() -> None:
    old = row_of(Vault(OLD).seal(ADDRESS, FRESH))
    assert VAULT.open(ADDRESS, old) == VAULT.open(ADDRESS, ROW) == FRESH.passphrase
    assert (old.kek_id, ROW.kek_id) == (OLD.kek_id, NEW.kek_id)
    with pytest.raises(KeyUnavailable, match=rf"\(KEK\) {NEW.kek_id}; available: {OLD.kek_id}"):
        Vault(OLD).open(ADDRESS, ROW)


def test_a_kek_id_that_lies_is_a_broken_seal() -> None:
    with pytest.raises(SealBroken):
        VAULT.open(ADDRESS, evolve(ROW, kek_id=OLD.kek_id))


def test_a_purged_row_says_so() -> None:
    with pytest.raises(SealBroken, match="purged"):
        VAULT.open(ADDRESS, evolve(ROW, state="purged", sealed=None, kek_id=None, wrapped_key=None))


def test_one_entropy_never_seals_two_rows_under_one_nonce() -> None:
    """A unit that runs again may seal another generation from the same entropy: nothing may repeat but the text."""
    other = VAULT.seal(evolve(ADDRESS, generation=2), FRESH)
    first = VAULT.seal(ADDRESS, FRESH)
    assert first == VAULT.seal(ADDRESS, FRESH)
    assert first.sealed[:12] != other.sealed[:12]
    assert first.wrapped_key[:12] != other.wrapped_key[:12]
    assert not set(chunks(first.sealed[12:])) & set(chunks(other.sealed[12:]))


def chunks(data: bytes) -> list[bytes]:
    return [data[index : index + 16] for index in range(0, len(data), 16)]


def test_the_passphrase_is_not_in_the_row() -> None:
    text = FRESH.passphrase.reveal()
    assert len(text) == 128
    assert text == text.lower()
    for value in (ROW.sealed, ROW.wrapped_key, repr(ROW).encode()):
        assert value is not None
        assert text not in value
        assert bytes.fromhex(text.decode()) not in value
    assert FRESH.data_key.reveal() not in ROW.wrapped_key + ROW.sealed  # type: ignore[operator]


@pytest.mark.parametrize("size", [0, 1, FreshKey.SIZE - 1, FreshKey.SIZE + 1])
def test_a_fresh_key_takes_its_entropy_whole(size: int) -> None:
    with pytest.raises(LocalProtocolError, match="120 bytes of entropy"):
        FreshKey.from_entropy(bytes(size))


# --- key-encryption keys ---


def test_a_key_is_raw_or_hex() -> None:
    raw = bytes(range(224, 256))
    for data in (raw, raw.hex().encode(), raw.hex().upper().encode(), raw.hex().encode() + b"\n"):
        key = KeyEncryptionKey.from_bytes(data)
        assert key.key.reveal() == raw
        assert key.kek_id == hashlib.sha256(raw).hexdigest()[:16]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"k" * 31,
        b"k" * 33,
        b"k" * 32 + b"\n",
        b"g" * 64,
        b"0" * 63,
        b"0" * 65,
        b"0" * 64 + b"\n\n",
        b"0" * 64 + b"\r\n",
        b" " + b"0" * 64,
        b"0x" + b"0" * 62,
        b"0" * 64 + b"\0",
        "٠".encode() * 64,
    ],
)
def test_anything_else_is_no_key(data: bytes) -> None:
    with pytest.raises(ConfigurationError, match=f"32 raw bytes or 64 hex digits; this one has {len(data)} bytes"):
        KeyEncryptionKey.from_bytes(data)


@given(st.binary(max_size=100))
def test_any_bytes_are_a_key_or_refused(data: bytes) -> None:
    with contextlib.suppress(ConfigurationError):
        assert len(KeyEncryptionKey.from_bytes(data).key) == 32


def test_nothing_secret_shows() -> None:
    text = f"{VAULT!r} {FRESH!r} {OLD!r} {VAULT.derive('label')!r}"
    assert "***" in text
    for secret in (b"o" * 32, b"n" * 32, FRESH.data_key.reveal(), FRESH.passphrase.reveal()):
        assert repr(secret)[2:-1] not in text
        assert secret.hex() not in text


# --- derived keys ---


def test_derived_keys_differ_by_label_and_key_and_agree_between_processes() -> None:
    derived = VAULT.derive("nonce", 33)
    assert [kek_id for kek_id, _ in derived] == [NEW.kek_id, OLD.kek_id]
    assert derived == Vault(KeyEncryptionKey.from_bytes(b"n" * 32), OLD).derive("nonce", 33)
    secrets = [key.reveal() for _, key in (*derived, *VAULT.derive("other", 33))]
    assert len(set(secrets)) == 4
    assert {len(secret) for secret in secrets} == {33}
    assert Vault(OLD).derive("nonce", 33) == derived[1:]


def test_derived_keys_are_hkdf() -> None:
    """RFC 5869 by hand: extract with an empty salt, expand one block."""
    pseudo_random_key = hmac.digest(bytes(32), b"n" * 32, "sha256")
    wanted = hmac.digest(pseudo_random_key, b"chutes-proto derive label" + b"\x01", "sha256")
    assert VAULT.derive("label")[0][1] == Secret(wanted)


def test_a_purged_key_is_neither_wrapped_anew_nor_opened() -> None:
    purged = evolve(ROW, sealed=None, kek_id=None, wrapped_key=None, state="purged")
    with pytest.raises(SealBroken, match="was purged"):
        _ = VAULT.rewrap(ADDRESS, purged, bytes(12))
    with pytest.raises(SealBroken, match="was purged"):
        _ = VAULT.open(ADDRESS, evolve(ROW, wrapped_key=None))
