"""The messages that are signed, and that nothing else passes; with signatures that a real wallet made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chutes_proto.auth.hotkey import Hotkey, HotkeyError, HotkeyPair
from chutes_proto.auth.signing import (
    WINDOW,
    body_message,
    check_body_signature,
    check_time,
    purpose_message,
    request_message,
    sign,
)
from chutes_proto.errors import LocalProtocolError, Refused
from chutes_proto.secret import Secret
from chutes_proto.wire.codes import Code

PAIR = HotkeyPair.from_secret(Secret(b"\x07" * 32))
HOTKEY = PAIR.hotkey
NONCE = "ab" * 32
BODY = b'{"quote":"AA=="}'
SIGNATURE = PAIR.sign(body_message(HOTKEY, NONCE, BODY)).hex()


def test_messages() -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert purpose_message(HOTKEY, "1767225600", "tee") == f"{HOTKEY.address}:1767225600:tee".encode()
    assert body_message(HOTKEY, "1767225600", b"") == f"{HOTKEY.address}:1767225600:{empty}".encode()
    digest = hashlib.sha256(b"PATCH /servers/a?server_name=b\nbody").hexdigest()
    assert (
        request_message(HOTKEY, "1767225600", "PATCH", "/servers/a?server_name=b", b"body")
        == f"{HOTKEY.address}:1767225600:request:{digest}".encode()
    )


@pytest.mark.parametrize("signature", [SIGNATURE, SIGNATURE.upper()])
def test_a_signature_over_the_body_holds(signature: str) -> None:
    check_body_signature(HOTKEY, HOTKEY.address, NONCE, BODY, signature)


def refusal(*arguments: Any) -> Refused:
    with pytest.raises(Refused) as refused:
        check_body_signature(*arguments)
    assert refused.value.code is Code.SIGNATURE_INVALID
    assert SIGNATURE not in f"{refused.value} {refused.value.reason}"
    assert NONCE not in f"{refused.value} {refused.value.reason}"
    return refused.value


OTHER = Hotkey(bytes(range(32)))


@pytest.mark.parametrize(
    "arguments",
    [
        (HOTKEY, None, NONCE, BODY, SIGNATURE),
        (HOTKEY, OTHER.address, NONCE, BODY, SIGNATURE),
        (HOTKEY, HOTKEY.address + " ", NONCE, BODY, SIGNATURE),
        (OTHER, HOTKEY.address, NONCE, BODY, SIGNATURE),
        (HOTKEY, HOTKEY.address, None, BODY, SIGNATURE),
        (HOTKEY, HOTKEY.address, NONCE.upper(), BODY, SIGNATURE),
        (HOTKEY, HOTKEY.address, NONCE, BODY + b" ", SIGNATURE),
        (HOTKEY, HOTKEY.address, NONCE, BODY, None),
        (HOTKEY, HOTKEY.address, NONCE, BODY, "00" * 64),
        (HOTKEY, HOTKEY.address, NONCE, BODY, PAIR.sign(purpose_message(HOTKEY, NONCE, "tee")).hex()),
    ],
)
def test_anything_else_is_refused(arguments: tuple[Any, ...]) -> None:
    detail = refusal(*arguments).detail
    assert detail == f"Invalid request signature for hotkey {arguments[0].address}."


@given(st.text(max_size=140))
@example("")
@example("0x" + SIGNATURE)
@example(SIGNATURE + "\n")
@example(" " + SIGNATURE)
@example(SIGNATURE[:-2])
@example(SIGNATURE + "00")
@example("\uff10" + SIGNATURE[1:])
@example("\u0660" * 128)
@example("g" + SIGNATURE[1:])
def test_signatures_are_128_ascii_hex_digits(signature: str) -> None:
    assert refusal(HOTKEY, HOTKEY.address, NONCE, BODY, signature).detail == "Invalid signature"


@pytest.mark.parametrize("off", [-1, 1])
def test_a_signed_time_is_close_to_ours_on_either_side(off: int) -> None:
    now = 1_767_225_600
    check_time(str(now + off * (WINDOW - 1)), now)
    with pytest.raises(Refused) as refused:
        check_time(str(now + off * WINDOW), now)
    assert refused.value.code is Code.SIGNATURE_STALE


@pytest.fixture(scope="module")
def wallet(vectors: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((vectors / "signing.json").read_text())
    return content


def test_signatures_of_a_real_wallet(wallet: dict[str, Any]) -> None:
    for row in wallet["rows"]:
        hotkey = Hotkey.parse(row["hotkey"])
        assert hotkey.public_key.hex() == row["public_key"]
        message = row["message"].encode()
        if row["valid"]:
            if row["purpose"] is not None:
                assert message == purpose_message(hotkey, row["nonce"], row["purpose"])
            else:
                assert message == body_message(hotkey, row["nonce"], row["body"].encode())
            hotkey.check_signature(message, bytes.fromhex(row["signature"]))
        else:
            with pytest.raises(HotkeyError):
                hotkey.check_signature(message, bytes.fromhex(row["signature"]))


def test_body_signatures_of_a_real_wallet(wallet: dict[str, Any]) -> None:
    rows = [row for row in wallet["rows"] if row["body"] is not None]
    assert {row["valid"] for row in rows} == {True, False}
    for row in rows:
        arguments = (row["hotkey"], row["nonce"], row["body"].encode(), row["signature"])
        if row["valid"]:
            check_body_signature(Hotkey.parse(row["hotkey"]), *arguments)
        else:
            with pytest.raises(Refused):
                check_body_signature(Hotkey.parse(row["hotkey"]), *arguments)


def test_bad_addresses(wallet: dict[str, Any]) -> None:
    for address in wallet["bad_addresses"]:
        with pytest.raises(HotkeyError):
            Hotkey.parse(address)


async def awaited(message: bytes) -> bytes:
    return message


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize(
    ("signer", "told"), [(bytes.hex, "str, not the bytes"), (print, "NoneType"), (awaited, "coroutine.*never awaited")]
)
def test_a_signer_that_returns_something_else_is_told(signer: Any, told: str) -> None:
    with pytest.raises(LocalProtocolError, match=f"signer: it returned {told}"):
        _ = sign(signer, b"message")
    assert sign(PAIR.sign, b"message")
