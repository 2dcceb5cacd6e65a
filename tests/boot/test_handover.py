"""The key hand-off to a later agent: it comes back whole or not at all, in this boot, for ten minutes."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.auth.client_identity import ClientIdentity, make_client_identity
from chutes_proto.boot._flows import BootGrant
from chutes_proto.boot._handoff import LIFE, MAX_SIZE, Handoff
from chutes_proto.boot._settings import AgentSettings
from chutes_proto.errors import HandoverRejected
from chutes_proto.secret import Secret
from chutes_proto.wire import json
from tests.boot.talk import HOTKEY, ROOT, TOKEN, VM

SERVERS = ("https://a.example", "https://b.example:8443")
SETTINGS = AgentSettings(SERVERS)
IDENTITY = make_client_identity(1_800_000_000, bytes(32))
BASE = BootGrant(HOTKEY, VM, Secret(ROOT.encode()), Secret(TOKEN.encode()))
TWO_PHASE = BootGrant(HOTKEY, VM, Secret(ROOT.encode()), None, Secret(TOKEN.encode()))
PROVISIONED = attrs.evolve(TWO_PHASE, vm_auth_ss58=HOTKEY)


def handover(grant: BootGrant = BASE, server: str = SERVERS[1]) -> Handoff:
    return Handoff(server, 100.5, "boot-1", grant, IDENTITY)


def read(data: bytes, boot_id: str = "boot-1", uptime: float = 101.0) -> Handoff:
    return Handoff.decode(data, SETTINGS, boot_id=boot_id, uptime=uptime)


def opened(identity: ClientIdentity) -> tuple[bytes, bytes, bytes]:
    return identity.certificate_pem, identity.key_pem.reveal(), identity.spki_sha256


@pytest.mark.parametrize("grant", [BASE, TWO_PHASE, PROVISIONED], ids=["base", "two-phase", "provisioned"])
def test_it_comes_back_without_a_passphrase(grant: BootGrant) -> None:
    data = handover(grant).encode().reveal()
    assert len(data) < MAX_SIZE
    assert ROOT.encode() not in data
    found = read(data)
    assert (found.server, found.granted, found.grant.boot_token, found.grant.luks_quote_nonce) == (
        *(SERVERS[1], 100.5),
        *(grant.boot_token, grant.luks_quote_nonce),
    )
    assert found.grant.is_provisioned == grant.is_provisioned
    assert opened(found.identity) == opened(IDENTITY)
    assert len(found.grant.root_passphrase) == 0


def test_a_wiped_root_passphrase_is_not_missed() -> None:
    grant = attrs.evolve(BASE, root_passphrase=Secret(b"x"))
    grant.root_passphrase.wipe()
    assert read(handover(grant).encode().reveal()).grant.boot_token == BASE.boot_token


@pytest.mark.parametrize(
    ("boot_id", "uptime"), [("boot-2", 101.0), ("boot-1", 100.0), ("boot-1", 100.5 + LIFE)], ids=str
)
def test_it_counts_in_its_boot_and_for_its_time(boot_id: str, uptime: float) -> None:
    data = handover().encode().reveal()
    assert read(data, uptime=100.4 + LIFE).server == SERVERS[1]
    with pytest.raises(HandoverRejected, match="another boot, or more than 600 s ago"):
        _ = read(data, boot_id, uptime)


def test_it_names_no_server_that_the_settings_do_not_name() -> None:
    with pytest.raises(HandoverRejected, match="do not name"):
        _ = read(handover(server="https://evil.example").encode().reveal())


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"server": 1},
        {"granted": "100"},
        {"granted": 100},
        {"boot_token": None},
        {"luks_quote_nonce": TOKEN},
        {"boot_token": "x"},
        {"boot_token": TOKEN.upper()[:-1] + "G"},
        {"spki_sha256": "00"},
        {"more": 1},
    ],
    ids=str,
)
def test_what_is_not_whole_is_not_used(change: dict[str, Any]) -> None:
    members = {**json.decode(handover().encode().reveal()), **change}
    with pytest.raises(HandoverRejected, match="not a file of `agent run`") as raised:
        _ = read(json.encode(members) + b"\n")
    assert TOKEN not in str(raised.value)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_byte_that_changed_is_noticed_or_meant_nothing_else(at: int, flip: int) -> None:
    data = bytearray(handover().encode().reveal())
    data[at % len(data)] ^= flip
    try:
        found = read(bytes(data))
    except HandoverRejected:
        return
    assert found.encode() == Secret(bytes(data))  # a value that differs, said in full


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 5000, bytes(MAX_SIZE)], ids=len)
def test_garbage(data: bytes) -> None:
    with pytest.raises(HandoverRejected):
        _ = read(data)
