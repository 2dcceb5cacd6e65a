"""When a server that was told to stop ends: as soon as none of its boots is open, and in any case in time."""

from __future__ import annotations

from typing import Any

from attrs import evolve

from chutes_proto.auth.binding import report_data
from chutes_proto.auth.certificates import spki_sha256
from chutes_proto.effects import Effect, Transact
from chutes_proto.server._app import App
from chutes_proto.server._config import LimitOptions
from chutes_proto.server._open_boots import OpenBoots
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.testing._platform import PROFILE
from chutes_proto.wire.codec import encode_quote
from chutes_proto.wire.http import HttpResponse
from chutes_proto.wire.names import Name
from chutes_proto.wire.vms import BootAttestationRequest, VolumeAttestationRequest
from tests.server.world import CERTIFICATES, HOTKEY, World, answer, refusal, service

DRAIN = 25
BASE, TWO_PHASE = (
    {PROFILE.identity: ServedProfile(PROFILE, None, False, False, form)} for form in ("base", "two-phase")
)


def world(profiles: dict[tuple[str, str], ServedProfile] = BASE) -> World:
    return World(App(service(profiles=profiles, limits=LimitOptions(drain_seconds=DRAIN))))


def seconds_left(here: World) -> float:
    return here.app.ends_at(here.uptime) - here.uptime


def stopped(here: World) -> World:
    assert here.app.stop(here.uptime) == here.uptime + DRAIN
    return here


def sent(here: World, response: HttpResponse) -> Any:
    """The members of an answer that the peer was sent."""
    members = answer(response)
    here.app.sent(response)
    return members


def read(here: World, token: str) -> HttpResponse:
    return here.ask("GET", f"/servers/vm-1/luks?hotkey={HOTKEY}", headers={"x-boot-token": token})


def attest(here: World, nonce: str) -> HttpResponse:
    quote = here.platform.quote(report_data(bytes.fromhex(nonce), spki_sha256(CERTIFICATES[0])), stage="runtime")
    headers = {"x-quote-nonce": nonce, "x-chutes-hotkey": HOTKEY, "content-type": "application/json"}
    body = {"quote": encode_quote(quote), "volumes": ["storage"]}
    return here.ask("POST", "/servers/vm-1/luks/attest", body, headers=headers)


def confirm(here: World, nonce: str) -> HttpResponse:
    headers = {"x-confirm-nonce": nonce, "x-chutes-hotkey": HOTKEY, "content-type": "application/json"}
    body = {"volumes": {"storage": {"rotated": True}}}
    return here.ask("POST", "/servers/vm-1/luks/confirm", body, headers=headers)


def test_a_server_that_was_not_told_to_stop_does_not_end() -> None:
    here = world()
    assert seconds_left(here) == float("inf")


def test_with_nothing_open_it_ends_at_once() -> None:
    here = world()
    _ = here.nonce()  # who has but a boot nonce boots elsewhere
    assert seconds_left(stopped(here)) == 0


def test_told_again_it_ends_at_once() -> None:
    here = world()
    _ = here.token()
    _ = stopped(here)
    here.uptime += 1
    assert here.app.stop(here.uptime) == here.uptime
    assert seconds_left(here) == 0


def test_once_another_process_has_its_listeners_it_ends_at_once_and_serves_what_it_accepted() -> None:
    here = world()
    token = here.token()
    assert here.app.stop(here.uptime, handed_over=True) == here.uptime + DRAIN
    assert seconds_left(here) == 0
    _ = answer(here.sync(token, {"volumes": ["storage"]}))
    granted = here.boot()  # to send it away would cost the VM an attempt
    assert granted.status == 200
    assert granted.header("connection") == "close"


def test_a_server_that_drains_and_is_taken_over_still_answers_what_it_accepted() -> None:
    here = world()
    _ = here.token()
    end = here.app.stop(here.uptime)
    here.uptime += 1
    assert here.app.stop(here.uptime, handed_over=True) == end
    assert here.app.stop(here.uptime, handed_over=True) == here.uptime


def test_a_boot_token_is_open_until_the_answer_to_its_sync_is_sent() -> None:
    here = world()
    token = here.token()
    assert seconds_left(stopped(here)) == DRAIN
    assert refusal(here.sync(token, {"volumes": ["none"]}))[0] == 400
    synced = here.sync(token, {"volumes": ["storage"]})
    assert seconds_left(here) == DRAIN  # the answer may be lost, and the caller ask again
    _ = sent(here, synced)
    assert seconds_left(here) == 0


def test_reading_the_cache_passphrase_completes_the_boot_of_an_older_image() -> None:
    here = world()
    _ = here.sync(here.token(), {"volumes": ["storage"]})
    token = here.token()
    _ = stopped(here)
    assert seconds_left(here) == DRAIN
    _ = sent(here, read(here, token))
    assert seconds_left(here) == 0


def test_a_two_phase_boot_is_open_until_the_answer_to_its_confirmation_is_sent() -> None:
    here = world(TWO_PHASE)
    nonce = answer(here.boot())["luks_quote_nonce"]
    assert seconds_left(stopped(here)) == DRAIN
    confirm_nonce = sent(here, attest(here, nonce))["confirm_nonce"]
    assert seconds_left(here) == DRAIN
    assert refusal(confirm(here, "0" * 64))[0] == 401
    assert seconds_left(here) == DRAIN
    _ = sent(here, confirm(here, confirm_nonce))
    assert seconds_left(here) == 0


def stop_meanwhile(here: World) -> list[float]:
    """Tell it to stop before its next transaction; returns how many seconds were left at each."""
    seen: list[float] = []

    def meanwhile(effect: Effect[Any]) -> None:
        if isinstance(effect, Transact):
            if not here.app.draining:
                _ = stopped(here)
            seen.append(seconds_left(here))

    here.before = meanwhile
    return seen


def test_a_boot_that_is_under_way_is_waited_for_and_then_open() -> None:
    here = world()
    seen = stop_meanwhile(here)
    _ = sent(here, here.boot())
    assert seen == [DRAIN]
    assert seconds_left(here) == DRAIN


def test_a_boot_that_is_under_way_and_refused_is_not_open() -> None:
    here = world()
    nonce = here.nonce()
    _ = sent(here, here.sync(answer(here.boot(nonce))["boot_token"], {"volumes": ["storage"]}))
    seen = stop_meanwhile(here)
    assert refusal(here.boot(nonce))[0] == 401
    assert set(seen) == {DRAIN}
    assert seconds_left(here) == 0


def test_what_another_process_granted_is_open_from_its_attestation_on() -> None:
    there = world(TWO_PHASE)
    nonce = answer(there.boot())["luks_quote_nonce"]
    here = evolve(there, app=world(TWO_PHASE).app)
    seen = stop_meanwhile(here)
    _ = sent(here, attest(here, nonce))
    assert set(seen) == {DRAIN}
    assert seconds_left(here) == DRAIN


def test_what_expires_is_open_no_more() -> None:
    here = world()
    _ = here.token(vm_name="vm-1")
    here.uptime += 10
    _ = here.token(vm_name="vm-2")
    here.uptime += 580
    assert seconds_left(stopped(here)) == 20  # when the last one expires
    here.uptime += 20
    assert seconds_left(here) == 0


def test_a_vm_that_never_comes_back_holds_no_server_for_longer_than_it_may_drain() -> None:
    here = world()
    _ = here.token()
    _ = stopped(here)
    here.uptime += DRAIN - 1
    assert seconds_left(here) == 1
    here.uptime += 1
    assert seconds_left(here) == 0


def test_a_vm_that_boots_again_has_one_open_boot() -> None:
    here = world()
    _ = here.token(), here.token(vm_name="vm-2")
    here.uptime += 590
    token = here.token()
    assert seconds_left(stopped(here)) == DRAIN
    here.uptime += 10
    assert seconds_left(here) == DRAIN - 10
    _ = sent(here, here.sync(token, {"volumes": ["storage"]}))
    assert seconds_left(here) == 0


def test_no_more_are_remembered_than_there_is_allowed_connections() -> None:
    boots = OpenBoots(most=3)
    for number in range(9):
        boots.note_granted(BootAttestationRequest(quote="", vm_name=Name(f"vm-{number}"), miner_hotkey=HOTKEY), number)
        confirmed = VolumeAttestationRequest(vm_name=Name(f"confirmed-{number}"), hotkey=HOTKEY, quote="", volumes=())
        boots.note_granted(confirmed, number)
    assert len(boots) == 6
    assert boots.last_expiry(9) == 608
    assert boots.last_expiry(308) == 608
    assert len(boots) == 3  # confirmations expire sooner
    assert boots.last_expiry(608) == 608
    assert len(boots) == 0
