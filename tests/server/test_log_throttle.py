"""Attackers can neither hide lines about a VM in the operator's log, nor fill it."""

from __future__ import annotations

from typing import Any

import pytest

from chutes_proto.effects import FetchCollateral
from chutes_proto.errors import CollateralUnavailable
from chutes_proto.wire.codes import Code
from tests.server.world import CERTIFICATES, World, content, refusal


def lines(world: World, peer: str) -> list[Any]:
    """The request ids in the log of what this peer was refused."""
    return [record.fields["request_id"] for record in world.log if record.fields.get("peer") == peer]


@pytest.mark.parametrize("strangers", [["203.0.113.6"], [f"203.0.113.{n}" for n in range(19)], ["2001:db8::6"]])
def test_a_stranger_hides_no_line_about_a_vm(world: World, strangers: list[str]) -> None:
    body, headers = world.attestation()
    world.certificate = CERTIFICATES[1]
    for _ in range(40):
        for stranger in strangers:
            assert refusal(world.ask("GET", "/x", peer_address=stranger))[0] == 404
    for asked in range(1, 6):
        world.uptime += 1
        for stranger in strangers:
            assert refusal(world.ask("GET", "/x", peer_address=stranger))[0] == 404
        response = world.ask("POST", "/servers/boot/attestation", body, headers=headers, peer_address="203.0.113.200")
        assert refusal(response)[:2] == (403, Code.CERTIFICATE_MISMATCH)
        vm = lines(world, "203.0.113.200")
        assert (len(vm), vm[-1]) == (asked, content(response)["request_id"])
    assert all(len(lines(world, stranger)) <= 21 for stranger in strangers)


def test_nor_one_about_our_own_fault(world: World) -> None:
    body, headers = world.attestation()

    def fail(effect: object) -> None:
        if isinstance(effect, FetchCollateral):
            raise CollateralUnavailable("none for this FMSPC")

    world.before = fail
    for peer in ["203.0.113.6"] * 50 + ["203.0.113.200"]:
        asked = world.ask("POST", "/servers/boot/attestation", body, headers=headers, peer_address=peer)
        assert refusal(asked)[0] == 503
    assert len(lines(world, "203.0.113.6")) == 20
    assert lines(world, "203.0.113.200") == [content(asked)["request_id"]]


@pytest.mark.parametrize("network", ["10.{}.{}.1", "2001:db8:{:x}:{:x}::1"])
def test_many_addresses_make_no_more_lines_than_there_is_allowed_connections(world: World, network: str) -> None:
    asked = [network.format(n // 256, n % 256) for n in range(3000)]
    for peer in asked:
        assert refusal(world.ask("GET", "/x", peer_address=peer))[0] == 404
    assert len(world.log) == 400
    world.uptime += 10
    for peer in asked:
        assert refusal(world.ask("GET", "/x", peer_address=peer))[0] == 404
    assert len(world.log) == 440
    counted = [record.fields["held_back"] for record in world.log if "held_back" in record.fields]
    assert counted == [2600]


def test_a_network_of_ipv6_is_one_address(world: World) -> None:
    for host in range(100):
        assert refusal(world.ask("GET", "/x", peer_address=f"2001:db8::{host:x}"))[0] == 404
    assert len(world.log) == 20
