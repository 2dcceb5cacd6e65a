"""What the admin page says of boots, denials and VMs: complete, once each, and of bounded size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import evolve

from chutes_proto.server import _overview as overview
from chutes_proto.server._overview import DAY, DENIALS, HALF_HOUR, Fleet, Recent, fleet_members, recent_members
from chutes_proto.store._rows import AuditRow, Insert, InsertAll, Platform, Vm, VmRow, WhatIf
from chutes_proto.store._run import Ask
from chutes_proto.testing.store_suite._parts import NOW, VM, boot
from tests.store.memory import MemoryStore

BOOT = AuditRow(NOW, "vm", "boot", "granted", "bound to this platform", VM)
DENIAL = evolve(BOOT, decision="refused", reason="measurement_mismatch: RTMR1 differs", request_id="r1")


def add(store: MemoryStore, *rows: AuditRow) -> None:
    for begin in range(0, len(rows), 1000):
        store.transact(Ask(InsertAll(rows[begin : begin + 1000])))


def read(part: Recent | Fleet, store: MemoryStore, now: int = NOW) -> None:
    while part.read(store, now):
        pass


def counts(recent: Recent, now: int = NOW) -> tuple[int, int]:
    halves = recent.halves(now)
    assert len(halves) == 48
    return sum(half["boots"] for half in halves), sum(half["denials"] for half in halves)


def test_every_decision_of_the_day_is_counted_once_however_it_comes() -> None:
    store, recent = MemoryStore(), Recent()
    read(recent, store)
    assert (counts(recent), recent.is_complete) == ((0, 0), True)
    add(store, *[BOOT] * 3, DENIAL, evolve(BOOT, event="sync volumes"), evolve(BOOT, decision="replayed"))
    read(recent, store)
    assert counts(recent) == (3, 1)
    read(recent, store)
    assert counts(recent) == (3, 1)
    add(store, *[BOOT] * 2000)
    read(recent, store)
    assert counts(recent) == (2003, 1)


def test_who_looks_again_after_days_is_not_told_that_the_day_is_complete_before_it_is() -> None:
    store, recent = MemoryStore(), Recent()
    add(store, BOOT)
    read(recent, store)
    assert recent_members(recent, NOW)["complete"] is True
    later = NOW + 3 * DAY
    add(store, *[evolve(BOOT, at=later)] * 3000)
    assert recent.read(store, later)
    told = recent_members(recent, later)
    assert (told["complete"], told["from"]) == (False, None)
    read(recent, store, later)
    assert recent_members(recent, later)["complete"] is True
    assert counts(recent, later) == (3000, 0)


def test_a_row_that_is_committed_after_a_later_one_is_not_missed() -> None:
    store, recent = MemoryStore(), Recent()
    add(store, *[BOOT] * 10)
    _ = store.connection.execute("DELETE FROM audit WHERE id = 7")  # given out, and not committed yet
    read(recent, store)
    add(store, DENIAL)
    _ = store.connection.execute("UPDATE audit SET id = 7 WHERE id = 11")
    for _ in range(2):
        read(recent, store)
        assert counts(recent) == (9, 1)


def test_only_the_last_day_counts_and_reading_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "PAGE", 10)
    store, recent = MemoryStore(), Recent()
    add(store, *[evolve(BOOT, at=NOW - 2 * DAY)] * 95, evolve(BOOT, at=NOW - DAY + HALF_HOUR), BOOT)
    assert recent.read(store, NOW) is False
    assert (counts(recent), recent.is_complete, recent.since) == ((2, 0), True, NOW - 2 * DAY)
    assert counts(recent, NOW + DAY - HALF_HOUR) == (1, 0)  # the older one has gone
    assert counts(recent, NOW + 2 * DAY) == (0, 0)


def test_a_server_that_begins_late_in_a_busy_day_says_from_when_on_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "PAGE", 10)
    monkeypatch.setattr(overview, "_MOST", 30)
    store, recent = MemoryStore(), Recent()
    add(store, *[evolve(BOOT, at=NOW - number) for number in range(99, -1, -1)])
    read(recent, store)
    assert (counts(recent), recent.is_complete, recent.since) == ((30, 0), False, NOW - 29)
    add(store, *[BOOT] * 300)
    read(recent, store)
    assert counts(recent) == (330, 0)


def test_the_newest_denials_are_kept_with_code_and_reason() -> None:
    store, recent = MemoryStore(), Recent()
    add(store, *[evolve(DENIAL, request_id=f"r{number}") for number in range(3 * DENIALS)])
    add(store, evolve(DENIAL, vm=None, reason="server s1: nonce is unknown", event="attest server"))
    read(recent, store)
    shown = recent_members(recent, NOW)["denied"]
    assert isinstance(shown, list)
    assert len(shown) == DENIALS
    assert [each["request_id"] for each in shown[:3]] == ["r1", "r149", "r148"]
    assert (shown[0]["code"], shown[0]["vm"]) == ("", "")
    assert "the server's own check: server s1: nonce is unknown" in shown[0]["why"]
    assert (shown[1]["code"], shown[1]["vm"]) == ("measurement_mismatch", VM.name)
    assert shown[1]["why"][1] == "the server's own check: RTMR1 differs"
    assert shown[1]["why"][-1].startswith("do: if you rolled this image")


@pytest.mark.parametrize("page", [1, 2, 500])
def test_vms_are_counted_by_what_their_last_boot_ran_on(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "PAGE", page)
    store, fleet = MemoryStore(), Fleet()
    for number in range(4):
        _ = store.transact(boot(f"{number}", vm=Vm(VM.hotkey, f"vm-{number}")))
    _ = store.transact(evolve(boot("again"), vm=Vm(VM.hotkey, "vm-0"), now=NOW + 2 * DAY, profile_version="2.0"))
    _ = store.transact(
        evolve(boot("late"), vm=Vm(VM.hotkey, "vm-1"), now=NOW + 2 * DAY, tcb_status="SWHardeningNeeded")
    )
    bound = VmRow.of(Vm(VM.hotkey, "bound"), Platform(None, bytes(16)), NOW)
    store.transact(Ask(Insert(bound)))
    read(fleet, store, NOW + 2 * DAY)
    assert fleet.counted is not None
    assert fleet.counted.vms == 5
    assert set(fleet.counted.groups) == {
        (("profile", "1.0", "UpToDate"), 2, 0),
        (("profile", "2.0", "UpToDate"), 1, 1),
        (("profile", "1.0", "SWHardeningNeeded"), 1, 1),
        ((None, None, None), 1, 0),
    }


def test_many_groups_are_shown_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "GROUPS", 2)
    store, fleet = MemoryStore(), Fleet()
    for number in range(5):
        unit = evolve(boot(f"{number}", vm=Vm(VM.hotkey, f"vm-{number}")), profile_version=str(number))
        _ = store.transact(unit)
    read(fleet, store)
    shown = fleet_members(fleet)
    assert isinstance(shown["groups"], list)
    assert shown["vms"] == sum(group["vms"] for group in shown["groups"]) == 5
    assert shown["groups"][-1]["profile"] == "3 other groups"


@pytest.mark.parametrize("make", [Recent, Fleet])
def test_one_read_is_one_short_transaction(make: Callable[[], Recent | Fleet], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "PAGE", 2)
    store = MemoryStore()
    for number in range(5):
        _ = store.transact(boot(f"{number}", vm=Vm(VM.hotkey, f"vm-{number}")))
    statements: list[str] = []
    store.connection.set_trace_callback(statements.append)
    assert make().read(store, NOW) is True
    assert len([text for text in statements if text.startswith("SELECT")]) == 1
    assert all("LIMIT 2" in text for text in statements if text.startswith("SELECT"))


@pytest.mark.parametrize("found", ["", "{", "[]", "{}", '{"policy":1,"at":"x"}', "1", "\ud800"])
def test_a_what_if_of_another_form_is_not_shown(found: str) -> None:
    assert overview.what_if_lines(WhatIf(NOW, found)) is None
    assert overview.what_if_lines(None) is None
