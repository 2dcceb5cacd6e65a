"""The entries that the server writes about quotes are as a receipt of each is checked."""

from __future__ import annotations

import json

import attrs

from chutes_proto.server._app import App
from chutes_proto.server._grounds import check_written
from chutes_proto.store.rows import AuditRow
from tests.server import test_callbacks, test_rotation, test_runtime
from tests.server.test_servers import boot, register, registered
from tests.server.world import PLATFORM, World, answer, service


def entries(world: World) -> set[tuple[str, str]]:
    """The event and decision of each entry with grounds, which is checked."""
    found: set[tuple[str, str]] = set()
    for row in world.rows(AuditRow):
        if row.evidence is not None:
            told = json.loads(row.evidence)
            check_written(attrs.asdict(row, recurse=False), told["judged_at"], told["stage"])
            assert (row.profile is None) == (row.decision == "refused")
            found.add((row.event, row.decision))
    return found


def test_entries_of_boots_are_as_a_receipt_is_checked() -> None:
    world = World(App(test_rotation.two_phase()))
    nonce = test_rotation.quote_nonce(world)
    for _ in range(2):
        _ = answer(test_rotation.attest(world, nonce))
    other = test_rotation.quote_nonce(world)
    world.platform = PLATFORM.having("tcb_out_of_date")
    assert test_rotation.attest(world, other).status == 403
    assert world.boot().status == 403
    of_volumes = {("attest volumes", decision) for decision in ("granted", "replayed", "refused")}
    assert entries(world) == {("boot", "granted"), ("boot", "refused"), *of_volumes}


def test_entries_of_servers_are_as_a_receipt_is_checked() -> None:
    world = World(App(service()))
    boot(world)
    registered(register(world))
    _ = answer(test_runtime.attest(world))
    world.platform = PLATFORM.having("tcb_out_of_date")
    assert test_runtime.attest(world).status == 403
    assert entries(world) == {("boot", "granted"), ("attest server", "granted"), ("attest server", "refused")}
    hosted = test_callbacks.make_world()
    registered(register(hosted))
    assert entries(hosted) == {("register server", "granted")}
