"""Why a VM was refused: in the log, which names it, and in the row of the verdict; strangers hide no such line."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from chutes_proto.effects import Sleep, run
from chutes_proto.quote._steps import QuoteSignatureError
from chutes_proto.server._app import App
from chutes_proto.server._known import learn_vms
from chutes_proto.server._why import Denial, Difference, Finding, explain, remedy
from chutes_proto.store._rows import AttestationRow
from chutes_proto.testing._platform import PROFILE
from chutes_proto.wire.codes import Code
from chutes_proto.wire.miners import RUNTIME_ATTESTATION
from tests.server.world import HOTKEY, MINER, World, answer, content, refusal, service


def refused(world: World) -> Any:
    return [record for record in world.log if record.event == "refused"][-1].fields


def test_a_measurement_that_differs_is_named_with_both_values_and_the_nearest_profile(world: World) -> None:
    world.platform = world.platform.having("rtmr1")
    request_id = content(world.boot())["request_id"]
    told = refused(world)
    assert (told["vm"], told["hotkey"], told["step"]) == ("vm-1", HOTKEY, 38)
    (row,) = world.rows(AttestationRow)
    finding = Finding.from_json(row.finding)
    assert finding is not None
    (difference,) = finding.differences
    assert (difference.what, difference.expected) == ("RTMR1", PROFILE.boot[1].hex())
    assert (finding.profile, finding.stage) == (str(PROFILE), "boot")
    why = explain(Denial(row.code, row.reason, request_id, HOTKEY, "vm-1", "", finding))
    assert str(why) == told["why"]
    assert f"RTMR1: found {difference.found}, expected {difference.expected}" in why.lines()
    assert "chutes-proto why --event-log" in why.lines()[-1]


def test_a_quote_that_does_not_verify_is_named_by_its_step(world: World) -> None:
    world.platform = world.platform.having("quote_signature")
    assert refusal(world.boot())[0] == 403
    assert (refused(world)["step"], refused(world)["code"]) == (QuoteSignatureError.step, "quote_rejected")
    assert "(quote_signature)" in refused(world)["why"]


@pytest.mark.parametrize(
    ("ask", "vm"),
    [
        (lambda world: world.boot("0" * 64), ("vm-1", HOTKEY)),
        (lambda world: world.sync("0" * 64, {"volumes": ["storage"]}), ("vm-1", HOTKEY)),
        (lambda world: world.ask("GET", f"/servers/vm-2/luks?hotkey={HOTKEY}"), ("vm-2", HOTKEY)),
        (lambda world: world.ask_signed("GET", "/servers/n1/nonce"), ("n1", MINER.hotkey.address)),
        (lambda world: world.ask_signed("GET", "/servers/n1/nonce", nonce="1"), ("n1", MINER.hotkey.address)),
        (lambda world: world.ask("GET", "/nowhere"), ("", "")),
        (lambda world: world.boot(miner_hotkey="5\n\x1b[31m"), ("vm-1", "5\ufffd\ufffd[31m")),
    ],
)
def test_every_refusal_names_what_the_request_names(world: World, ask: Any, vm: tuple[str, str]) -> None:
    assert refusal(ask(world))
    assert (refused(world)["vm"], refused(world)["hotkey"]) == vm


def test_strangers_hide_no_line_about_a_known_vm(world: World) -> None:
    """Neither from more addresses than the log takes lines of, nor after a restart, nor from the VM's own address."""
    assert answer(world.boot())
    for app in (world.app, App(service())):
        world.app = app
        learn_all(world)
        for n in range(2000):
            assert refusal(world.ask("GET", "/x", peer_address=f"10.0.{n // 250}.{n % 250}"))[0] == 404
        for _ in range(5):
            request_id = content(world.boot("0" * 64, vm_name="vm-1"))["request_id"]
            assert refused(world)["request_id"] == request_id
    assert not world.log[-1].is_noise
    for _ in range(100):
        assert refusal(world.boot("0" * 64, vm_name="vm-1"))
    assert sum(record.fields.get("vm") == "vm-1" for record in world.log) < 45  # a known name fills no log


def test_a_stranger_who_uses_the_name_of_a_vm_hides_no_line_about_it(world: World) -> None:
    assert answer(world.boot())
    body, headers = world.attestation("0" * 64)

    def ask(peer: str) -> str:
        asked = world.ask("POST", "/servers/boot/attestation", body, headers=headers, peer_address=peer)
        return str(content(asked)["request_id"])

    for _ in range(100):
        _ = ask("203.0.113.6")
    assert len(world.log) < 45
    for _ in range(3):
        assert refused(world)["request_id"] != (request_id := ask("203.0.113.200"))
        assert refused(world)["request_id"] == request_id


def learn_all(world: World) -> None:
    """Read all names, as a server does beside its requests."""

    class Over(Exception):
        pass

    def end(effect: object) -> None:
        if isinstance(effect, Sleep):
            raise Over

    world.before = end
    with pytest.raises(Over):
        run(learn_vms(world.app.service.known), world.perform)
    world.before = lambda _: None


def test_a_row_of_another_release_explains_what_it_can() -> None:
    assert Finding.from_json('{"step":38}') is None
    assert Finding.from_json("nothing") is None
    made = Finding(38, "rtmr", "a rule", "boot", "image 1.0", (Difference("RTMR1", "00", "11"),))
    assert Finding.from_json(made.to_json()) == made
    assert explain(Denial("tcb_rejected", "too old")).lines()[1] == "the server's own check: too old"


@pytest.mark.parametrize("what", ["profile_ended", "profile_not_yet"])
def test_the_remedy_for_a_schedule_is_not_to_accept_an_image(what: str) -> None:
    """But where registers differ, too, the schedule of the nearest profile is of no matter."""
    differs = (Difference(what, "now", "another time"),)
    finding = Finding(38, what, "a rule", "boot", "image 1.0", differs)
    denial = Denial("measurement_mismatch", "", finding=finding)
    assert "profiles list` shows the schedule" in explain(denial).remedy
    both = evolve(finding, differences=(*differs, Difference("RTMR1", "00", "11")))
    assert explain(evolve(denial, finding=both)).remedy == remedy("measurement_mismatch")


def test_nobody_is_told_to_configure_a_text_that_is_not_a_hotkey(world: World) -> None:
    """One that is a hotkey, and not known here, may be a new owner's."""
    assert refusal(world.boot(miner_hotkey=HOTKEY[:-1] + "Z"))[1] == "hotkey_rejected"
    told = refused(world)
    assert "checksum" in told["reason"]
    assert "not an SS58 address of prefix 42: correct it in the VM's settings" in told["why"]
    assert "`hotkeys`" not in told["why"]
    assert explain(Denial("hotkey_rejected", "", hotkey=HOTKEY)).remedy == remedy("hotkey_rejected")


def test_nobody_is_told_to_boot_a_server_that_only_attests() -> None:
    """A reboot ends what runs on it, and mends nothing: another attestation does."""
    for code in RUNTIME_ATTESTATION.codes:
        told = remedy(code)
        assert "boot the VM again" not in told or "attest" in told, code
        assert "vm rebind" not in told or "register it again" in told, code


FOR_OPERATORS = {Code.EVIDENCE_UNAVAILABLE, Code.HOST_INVALID}
"""Refusals with 400 that no other request of the client mends: the host must answer, or be another."""


@pytest.mark.parametrize(
    "code", [code for code in Code if code.status in (401, 403, 404, 409, 503) or code in FOR_OPERATORS]
)
def test_every_refusal_that_ends_a_boot_or_a_registration_has_a_remedy(code: Code) -> None:
    generic = remedy("volumes_required")
    assert remedy(code) != generic or code == Code.NOT_FOUND
