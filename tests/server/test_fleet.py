"""Maintenance windows, a miner's inventory and host profiles in process: the order of checks, and what is answered."""

import hashlib
from typing import Any

import pytest
from attrs import evolve

from chutes_proto.effects import Effect, Transact
from chutes_proto.errors import StoreError, Unavailable
from chutes_proto.server._app import App
from chutes_proto.server._config import MaintenanceOptions
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.store._rows import AuditRow, HostProfileRow, ServerRow
from chutes_proto.testing._platform import PROFILE
from chutes_proto.units.fleet import HOSTS, HOSTS_BYTES, HOSTS_OF_HOTKEY, NameHost, RegisterHost, Window, is_older
from chutes_proto.units.revocations import Allow, Revoke
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import HttpResponse
from tests.server.test_servers import boot, gpu, register
from tests.server.world import MINER, NOW, OTHER, World, answer, refusal, service

WINDOW = Window("w1", "2.0", NOW, NOW + 86_400, 1)
HOST = {"gpus": [{"vendor": "10de", "bars": [{"index": 0, "size_mb": 64}]}], "cpu": {"count": 2}}
HOSTS_PATH = "/servers/tdx/host_profiles"


def at(version: str, window: Window | None = WINDOW) -> App:
    """A server whose platform boots this version."""
    profile = evolve(PROFILE, version=version)
    served = ServedProfile(profile, None, False, False)
    return App(service(profiles={profile.identity: served}, maintenance=window, hotkeys="*"))


@pytest.fixture
def world() -> World:
    """Three servers of one miner, of which two have booted."""
    world = World(at("1.0"))
    for number in range(3):
        if number < 2:
            boot(world, vm=f"vm-{number}")
        changes: dict[str, Any] = {"id": f"n{number}", "name": f"vm-{number}", "host": f"1.2.3.{number}"}
        response = register(world, gpus=[gpu(uuid=f"GPU-{number}")], **changes)
        assert response.status == 201, response.body
        world.now += 1
    return world


def tee(world: World, method: str, path: str, **more: Any) -> HttpResponse:
    return world.ask_signed(method, path, **more)


# --- maintenance ---


def test_a_fleet_moves_to_a_new_image(world):
    policy = answer(tee(world, "GET", "/servers/maintenance/policy"))
    assert list(policy) == ["active_window", "window_open", "current_slots", "servers"]
    assert policy["active_window"] == {
        "id": "w1",
        "target_measurement_version": "2.0",
        "upgrade_window_start": "2027-01-15 08:00:00+00:00",
        "upgrade_window_end": "2027-01-16 08:00:00+00:00",
        "max_concurrent_per_miner": 1,
    }
    assert [(one["server_id"], one["version"], one["needs_upgrade"]) for one in policy["servers"]] == [
        ("n2", None, True),
        ("n1", "1.0", True),
        ("n0", "1.0", True),
    ]
    assert answer(tee(world, "GET", "/servers/vm-0/maintenance/preflight")) == {
        "eligible": True,
        "denial_reasons": [],
        "blocking_chute_ids": [],
        "current_slots": 0,
        "limit": 1,
    }
    begun = answer(tee(world, "PUT", "/servers/vm-0/maintenance"))
    assert begun == {"server_id": "n0", "purged_instance_ids": [], "window": policy["active_window"]}
    details = answer(tee(world, "GET", "/servers/n0"))
    assert (details["maintenance_pending_window_id"], details["target_version"]) == ("w1", "2.0")
    status, code, detail = refusal(tee(world, "PUT", "/servers/n1/maintenance"))
    assert (status, code, detail["eligible"]) == (409, Code.MAINTENANCE_CONFLICT, False)
    assert detail["denial_reasons"] == [
        {
            "reason": "concurrency_cap",
            "current_version": "1.0",
            "target_version": "2.0",
            "window_id": "w1",
            "current_slots": 1,
            "limit": 1,
            "blocking": ["n0"],
        }
    ]
    world.app = at("2.0")
    boot(world, vm="vm-0")
    details = answer(tee(world, "GET", "/servers/n0"))
    assert (details["version"], details["maintenance_pending_window_id"]) == ("2.0", None)
    assert "target_version" not in details
    assert answer(tee(world, "PUT", "/servers/n1/maintenance"))
    granted = [row.reason for row in world.rows(AuditRow) if row.event == "begin maintenance"]
    assert granted == [f"server n{n}: window w1, from 1.0 to 2.0" for n in range(2)]


def test_a_window_is_shown_when_it_is_closed_too(world):
    for now, is_open in ((NOW - 1, False), (NOW, True), (NOW + 86_399, True), (NOW + 86_400, False)):
        world.now = now
        policy = answer(tee(world, "GET", "/servers/maintenance/policy"))
        assert (policy["active_window"]["id"], policy["window_open"]) == ("w1", is_open)
        assert answer(tee(world, "GET", "/servers/n1/maintenance/preflight"))["eligible"] == is_open
    world.app = at("1.0", None)
    policy = answer(tee(world, "GET", "/servers/maintenance/policy"))
    assert (policy["active_window"], policy["window_open"]) == (None, False)


def test_a_server_that_is_registered_again_is_in_no_maintenance(world):
    """The limit counts what is registered, and keeps nobody from booting."""
    assert answer(tee(world, "PUT", "/servers/n0/maintenance"))
    assert refusal(tee(world, "PUT", "/servers/n1/maintenance"))[:2] == (409, Code.MAINTENANCE_CONFLICT)
    assert answer(tee(world, "DELETE", "/servers/n0"))
    assert register(world, id="n0", name="vm-0", host="1.2.3.0", gpus=[gpu(uuid="GPU-0")]).status == 201
    assert answer(tee(world, "PUT", "/servers/n1/maintenance"))


# Each row's fault and those of all rows below, and the upper one wins.
ORDER = [
    ("no signature", 401, Code.SIGNATURE_INVALID),
    ("time", 401, Code.SIGNATURE_STALE),
    ("purpose", 401, Code.SIGNATURE_INVALID),
    ("name", 422, Code.VALIDATION_ERROR),
    ("another's", 404, Code.SERVER_NOT_FOUND),
    ("in maintenance", 409, Code.MAINTENANCE_CONFLICT),
    ("closed", 403, Code.MAINTENANCE_DENIED),
]


@pytest.mark.parametrize("first", range(len(ORDER)), ids=[row[0] for row in ORDER])
def test_the_order_of_checks_of_a_maintenance(world, first):
    wrong = [name for name, *_ in ORDER[first:]]
    if "in maintenance" in wrong:
        assert answer(tee(world, "PUT", "/servers/n0/maintenance"))
    if "closed" in wrong:
        world.app = at("1.0", evolve(WINDOW, end=NOW))
    server = "a%20b" if "name" in wrong else "n0"
    pair = OTHER if "another's" in wrong else MINER
    more: dict[str, Any] = {"purpose": "miner"} if "purpose" in wrong else {}
    before = world.rows(ServerRow)
    more["nonce"] = "9" if "time" in wrong else None
    sent = tee(world, "PUT", f"/servers/{server}/maintenance", pair=pair, **more)
    if "no signature" in wrong:
        sent = world.ask("PUT", f"/servers/{server}/maintenance")
    assert refusal(sent)[:2] == ORDER[first][1:]
    assert world.rows(ServerRow) == before


# The same for the operations that write nothing: each has the checks up to its last one.
READ_ORDER = [
    ("no signature", 401, Code.SIGNATURE_INVALID),
    ("time", 401, Code.SIGNATURE_STALE),
    ("coverage", 401, Code.SIGNATURE_INVALID),
    ("hotkey", 401, Code.HOTKEY_UNKNOWN),
    ("form", 422, Code.VALIDATION_ERROR),
    ("another's", 404, Code.SERVER_NOT_FOUND),
]
READS = {
    "GET /servers/maintenance/policy": "hotkey",
    "GET /servers/{}/maintenance/preflight": "another's",
    "GET /miner/servers/": "hotkey",
    "GET /miner/inventory": "hotkey",
    "POST /servers/tdx/host_profiles/status": "form",
    "POST /servers/snp/host_profiles/status": "form",
    "POST /servers/tdx/preflight": "form",
}
NAMES = [name for name, *_ in READ_ORDER]
CASES = [(read, name) for read, last in READS.items() for name in NAMES[: NAMES.index(last) + 1]]


@pytest.mark.parametrize(("read", "first"), CASES)
def test_the_order_of_checks_of_what_is_read(world, read, first):
    wrong = NAMES[NAMES.index(first) : NAMES.index(READS[read]) + 1]
    method, path = read.split()
    if "hotkey" in wrong:
        world.app = App(evolve(world.app.service, hotkeys={}))
    target = path.format("a%20b" if "form" in wrong else "n0")
    body: Any = None if method == "GET" else [HOST] if "form" in wrong else HOST
    more: dict[str, Any] = {"purpose": "miner"} if path.startswith("/miner/") else {}
    if "coverage" in wrong:
        more = {"purpose": "other", "coverage": "purpose"}
    more["nonce"] = "9" if "time" in wrong else None
    sent = world.ask_signed(method, target, body, pair=OTHER if "another's" in wrong else MINER, **more)
    if "no signature" in wrong:
        sent = world.ask(method, target, body)
    assert refusal(sent)[:2] == READ_ORDER[NAMES.index(first)][1:]


@pytest.mark.parametrize(
    ("server", "window", "reasons"),
    [
        ("n2", WINDOW, ["not_tee"]),
        ("n0", None, ["no_active_window"]),
        ("n0", evolve(WINDOW, start=NOW + 99), ["no_active_window"]),
        ("n0", evolve(WINDOW, target_version="1.0"), ["already_at_target"]),
        ("n2", None, ["not_tee", "no_active_window"]),
    ],
)
def test_why_a_server_may_not_begin(world, server, window, reasons):
    world.app = at("1.0", window)
    judged = answer(tee(world, "GET", f"/servers/{server}/maintenance/preflight"))
    assert [reason["reason"] for reason in judged["denial_reasons"]] == reasons
    assert refusal(tee(world, "PUT", f"/servers/{server}/maintenance"))[2] == judged


def test_versions_are_compared_by_their_numbers():
    assert is_older("1.9", "1.10")
    assert is_older(None, "1.0")
    assert is_older("nightly", "1.0")
    assert not is_older("1.10.1", "1.10")
    assert not is_older("nightly", "nightly")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"start": "2026-12-01"}, "start is a time like"),
        ({"end": "soon"}, "end is a time like"),
        ({"end": "2026-11-01T00:00:00Z"}, "start before end"),
        ({"max_concurrent_per_miner": 0}, "at least 1"),
        ({"target_version": "new"}, "has not the form"),
        ({"id": ""}, "go together"),
        ({"end": None}, "go together"),
    ],
)
def test_a_window_that_makes_no_sense_is_a_problem_of_the_configuration(changes, problem):
    options = MaintenanceOptions("w", "1.4.1", "2026-12-01T00:00:00Z", "2026-12-02T00:00:00+01:00")
    assert options.window == Window("w", "1.4.1", 1_796_083_200, 1_796_083_200 + 23 * 3600, 1)
    assert MaintenanceOptions().window is None
    with pytest.raises(ValueError, match=problem):
        _ = evolve(options, **changes).window


# --- inventory ---


def test_the_inventory_of_a_miner(world):
    found = answer(world.ask_signed("GET", "/miner/servers/", purpose="miner"))["servers"]
    assert [one["server_id"] for one in found] == ["n2", "n1", "n0"]
    assert list(found[0]) == [
        *("server_id", "name", "ip", "is_tee", "version", "maintenance_pending", "created_at", "updated_at", "gpus"),
    ]
    assert [one["is_tee"] for one in found] == [False, True, True]
    assert found[-1]["gpus"] == [
        {
            "uuid": "GPU-0",
            "gpu_identifier": "h200",
            "device_index": 0,
            "verified_at": None,
            "verification_error": None,
        }
    ]
    assert answer(world.ask_signed("GET", "/miner/inventory", purpose="miner")) == []
    for path in ("/miner/servers/", "/miner/inventory"):
        assert refusal(world.ask_signed("GET", path))[:2] == (401, Code.SIGNATURE_INVALID)  # purpose tee
    nobodys = world.ask_signed("GET", "/miner/servers/", purpose="miner", pair=OTHER)
    assert answer(nobodys) == {"servers": []}


# --- host profiles ---


def host(world: World, path: str = f"{HOSTS_PATH}/status", profile: Any = HOST, **more: Any) -> HttpResponse:
    return world.ask_signed("POST", path, profile, coverage="body", **more)


def test_a_host_is_unknown_then_pending_then_accepted(world):
    own = hashlib.sha256(
        b'{"cpu":{"count":2},"gpus":[{"bars":[{"index":0,"size_mb":64}],"vendor":"10de"}]}'
    ).hexdigest()
    asked = answer(host(world))
    assert list(asked) == ["fingerprint", "status", "measurements", "detail"]
    assert (asked["fingerprint"], asked["status"]) == (own, "unknown")
    registered = answer(host(world, HOSTS_PATH))
    assert list(registered) == ["fingerprint", "status", "stored", "detail"]
    assert (registered["status"], registered["stored"]) == ("pending", True)
    assert answer(host(world, HOSTS_PATH, dict(reversed(HOST.items()))))["stored"] is False
    assert answer(host(world))["status"] == "pending"
    assert answer(world.ask("GET", HOSTS_PATH)) == []
    (pending,) = answer(world.ask("GET", f"{HOSTS_PATH}?include_pending=true"))
    assert pending == {"fingerprint": own, "measured": False, "measurements": [], "profile": HOST}
    assert answer(host(world, "/servers/tdx/preflight?version=1.0&rc=false"))["launchable"] is False
    _ = world.store.transact(NameHost(NOW, own[:8], PROFILE.name, None, "test"))
    accepted = answer(host(world))
    assert (accepted["status"], accepted["measurements"]) == ("accepted", [{"version": "1.0", "rc": False}])
    assert answer(world.ask("GET", HOSTS_PATH))[0]["measured"] is True
    assert answer(host(world, "/servers/tdx/preflight?version=1.0&rc=false"))["launchable"] is True
    assert answer(host(world, "/servers/tdx/preflight?version=1.0&rc=true"))["launchable"] is False
    _ = world.store.transact(NameHost(NOW, own, PROFILE.name, "ab" * 32, "test"))
    assert answer(host(world))["fingerprint"] == "ab" * 32
    snp = answer(host(world, "/servers/snp/host_profiles/status"))
    assert (snp["status"], snp["measurements"]) == ("unknown", [])


def test_a_release_candidate_is_named_to_the_tool_and_not_to_the_public(world):
    own = answer(host(world, HOSTS_PATH))["fingerprint"]
    _ = world.store.transact(NameHost(NOW, own, PROFILE.name, None, "test"))
    service = world.app.service
    rc = {key: evolve(served, rc=True) for key, served in service.profiles.items()}
    world.app = App(evolve(service, profiles=rc))
    assert answer(host(world))["measurements"] == [{"version": "1.0", "rc": True}]
    assert answer(world.ask("GET", HOSTS_PATH)) == []


def test_a_revoked_hotkey_registers_no_host(world: World) -> None:
    world.store.transact(Revoke(NOW, 1, "hotkey", MINER.hotkey.address, None, "somebody: stolen"))
    status, code, detail = refusal(host(world, HOSTS_PATH))
    assert (status, code, "stolen" in detail) == (403, Code.REVOKED, False)
    assert not world.rows(HostProfileRow)
    world.store.transact(Allow(NOW, 2, "hotkey", MINER.hotkey.address, "somebody"))
    assert answer(host(world, HOSTS_PATH))["stored"]


def test_hosts_of_all_miners_together_register_so_often(world):
    """Asking for the status costs nothing of it."""
    for number in range(120):
        assert world.app.service.all_host_rates.take("", world.uptime) == 0, number
    limited = world.ask_signed("POST", HOSTS_PATH, HOST, coverage="body")
    assert refusal(limited) == (429, Code.RATE_LIMITED, "Rate limit exceeded. Try again later.")
    assert limited.header("retry-after") == "30"
    assert answer(host(world))["status"] == "unknown"


def test_a_few_hotkeys_do_not_fill_all_places(world):
    """A newcomer takes the place of the oldest that no operator named, of the hotkey that has most of these."""
    text = f'{{"a":"{"x" * 1000}"}}'
    rows = [HostProfileRow(f"{number:064x}", f"miner {number % 16}", text, NOW + number) for number in range(HOSTS)]
    for row in rows:
        _ = world.store.transact(RegisterHost(row))
    _ = world.store.transact(NameHost(NOW, rows[0].fingerprint, PROFILE.name, None, "test"))
    for expected in (rows[1], rows[2]):
        assert answer(host(world, HOSTS_PATH, {**HOST, "numa": {"node_count": int(expected.hotkey[6:])}}))["stored"]
        assert expected.fingerprint not in {row.fingerprint for row in world.rows(HostProfileRow)}
    assert len(world.rows(HostProfileRow)) == HOSTS
    with pytest.raises(Unavailable):  # one of those that have most
        _ = world.store.transact(RegisterHost(HostProfileRow("a" * 64, "miner 5", "{}", NOW)))
    for row in world.rows(HostProfileRow):
        _ = world.store.transact(NameHost(NOW, row.fingerprint, PROFILE.name, None, "test"))
    with pytest.raises(Unavailable):
        _ = world.store.transact(RegisterHost(HostProfileRow("a" * 64, "new", "{}", NOW)))


def test_large_profiles_give_way_to_a_small_one_and_not_the_other_way_round(world):
    """Anyone may ask for the list of all: it must not be as long as 256 of the largest."""

    def profile(number: int, hotkey: str, size: int) -> HostProfileRow:
        return HostProfileRow(f"{number:064x}", hotkey, f'{{"a":"{"x" * (size - 8)}"}}', NOW + number)

    def kept() -> set[HostProfileRow]:
        return {*world.rows(HostProfileRow)}

    large = 32 * 1024
    rows = {number: profile(number, f"miner {number}", large) for number in range(HOSTS_BYTES // large)}
    for row in rows.values():
        assert world.store.transact(RegisterHost(row)) == (row, True)
    assert kept() == {*rows.values()}
    assert answer(host(world, HOSTS_PATH))["stored"]
    assert kept() >= {*rows.values()} - {rows.pop(0)}
    assert len(kept()) == len(rows) + 1
    with pytest.raises(Unavailable):
        _ = world.store.transact(RegisterHost(profile(1000, "larger", large + 1)))
    same = profile(1001, "as large", large)
    _ = world.store.transact(RegisterHost(same))
    assert kept() >= {same, *rows.values()} - {rows.pop(1)}
    assert len(kept()) == len(rows) + 2


HOST_ORDER = [
    ("no signature", 401, Code.SIGNATURE_INVALID),
    ("body", 401, Code.SIGNATURE_INVALID),
    ("unknown member", 422, Code.VALIDATION_ERROR),
    ("form", 422, Code.VALIDATION_ERROR),
    ("blacklisted", 401, Code.HOTKEY_BLACKLISTED),
    ("too often", 429, Code.RATE_LIMITED),
    ("large", 413, Code.BODY_TOO_LARGE),
    ("full", 503, Code.HOST_PROFILES_FULL),
]


@pytest.mark.parametrize("first", range(len(HOST_ORDER)), ids=[row[0] for row in HOST_ORDER])
def test_the_order_of_checks_of_a_host_profile(world, first):
    wrong = [name for name, *_ in HOST_ORDER[first:]]
    for number in range(HOSTS_OF_HOTKEY if "full" in wrong else 0):
        row = HostProfileRow(f"{number:064x}", MINER.hotkey.address, "{}", NOW)
        _ = world.store.transact(RegisterHost(row))
    for _ in range(10 if "too often" in wrong else 0):
        assert world.app.service.host_rates.take(MINER.hotkey.address, world.uptime) == 0
    if "blacklisted" in wrong:
        world.app = App(evolve(world.app.service, blacklist={MINER.hotkey.address: "why"}))
    profile: dict[str, Any] = {**HOST, "numa": {"node_count": 1}}
    profile |= {"secret": 1} if "unknown member" in wrong else {}
    profile |= {"qemu": "7"} if "form" in wrong else {}
    profile |= {"memory": {"x": "y" * 33_000}} if "large" in wrong else {}
    before = world.rows(HostProfileRow)
    sent = host(world, HOSTS_PATH, profile)
    if "body" in wrong:
        sent = world.ask_signed("POST", HOSTS_PATH, profile, coverage="purpose")
    if "no signature" in wrong:
        sent = world.ask("POST", HOSTS_PATH, profile)
    assert refusal(sent)[:2] == HOST_ORDER[first][1:]
    assert world.rows(HostProfileRow) == before


def test_the_public_list_has_the_kept_text_of_a_profile(world):
    """Anyone may ask for it: while a mebibyte of profiles is decoded and encoded, the server answers nobody else."""
    for number in range(2):
        row = HostProfileRow(f"{number:064x}", MINER.hotkey.address, '{"memory":{"guest_gb":1e2}}', NOW + number)
        _ = world.store.transact(RegisterHost(row))
    found = world.ask("GET", f"{HOSTS_PATH}?include_pending=true").body
    about = [b'{"fingerprint":"%064x","measured":false,"measurements":[],"profile":' % number for number in range(2)]
    assert found == b"[" + b",".join(each + b'{"memory":{"guest_gb":1e2}}}' for each in about) + b"]"


def test_the_public_list_asks_for_nothing_but_the_store(world):
    assert answer(world.ask("GET", f"{HOSTS_PATH}?include_pending=maybe", headers={"x-chutes-nonce": "9"})) == []

    def away(effect: Effect[Any]) -> None:
        if isinstance(effect, Transact):
            raise StoreError("away")

    world.before = away
    assert refusal(world.ask("GET", HOSTS_PATH))[:2] == (503, Code.STORE_UNAVAILABLE)
