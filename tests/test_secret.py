"""A secret does not show, is compared and wiped, and gives nothing when it was."""

from __future__ import annotations

import pickle

import pytest

from chutes_proto.secret import Secret


def test_it_gives_its_bytes_to_who_asks_and_shows_them_to_nobody() -> None:
    secret = Secret(b"pass")
    assert secret.reveal() == b"pass"
    assert len(secret) == 4
    assert repr(secret) == str(secret) == f"{secret}" == "***"
    for leak in (pickle.dumps, hash):
        with pytest.raises(TypeError):
            _ = leak(secret)


def test_it_is_equal_to_a_secret_of_the_same_bytes() -> None:
    assert Secret(b"a") == Secret(b"a")
    assert Secret(b"a") != Secret(b"b")
    assert Secret(b"a") != b"a"


def test_wiped_it_gives_nothing_and_its_memory_is_zeros() -> None:
    secret = Secret(b"pass")
    held = secret._value
    assert held is not None
    secret.wipe()
    secret.wipe()
    assert held == bytes(4)
    for use in (secret.reveal, lambda: len(secret), lambda: secret == Secret(b"")):
        with pytest.raises(ValueError, match="the secret was wiped"):
            _ = use()
    assert repr(secret) == "***"


def test_what_it_was_made_of_and_what_it_gave_are_copies() -> None:
    made = bytearray(b"pass")
    secret = Secret(bytes(made))
    given = secret.reveal()
    secret.wipe()
    assert (made, given) == (bytearray(b"pass"), b"pass")
