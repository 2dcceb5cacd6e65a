"""Operations 5 to 9 and 15 in process: who calls, what is registered, what a claim removes, and hostile values."""

from __future__ import annotations

import json as stdlib_json
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.auth.signing import body_message
from chutes_proto.effects import Effect, Resolve, Transact, run
from chutes_proto.errors import Refused, StoreBusy, TransportError
from chutes_proto.quote._measurements import parse_profiles_json
from chutes_proto.secret import Secret
from chutes_proto.server._app import App
from chutes_proto.server._gpus import GPUS, Gpu
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.store._rows import AuditRow, BootRow, Claim, GenerationRow, GpuRow, ServerRow, StoreOp, VmRow
from chutes_proto.store._run import Ask, run_script
from chutes_proto.testing._platform import PROFILE
from chutes_proto.units.fleet import ReadServers, ReadServersAndGpus
from chutes_proto.units.records import Quote
from chutes_proto.units.servers import SERVERS_OF_HOTKEY, RecordRuntimeRefusal, RegisterServer
from chutes_proto.wire import json
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.server.world import MINER, NOW, OTHER, World, answer, content, refusal, service

HOST = "1.2.3.4"


def gpu(uuid: Any = "GPU-0", **changes: Any) -> dict[str, Any]:
    return {
        "uuid": uuid,
        "name": "NVIDIA H200",
        "memory": 150_000_000_000,
        "major": 9,
        "minor": 0,
        "clock_rate": 1_980_000.0,
        "device_index": 0,
        "gpu_identifier": "h200",
        "verification_host": HOST,
        "verification_port": 30443,
    } | changes


def server(**changes: Any) -> dict[str, Any]:
    return {"host": HOST, "id": "n1", "name": "vm-1", "gpus": [gpu()]} | changes


def register(world: World, pair: HotkeyPair = MINER, **changes: Any) -> HttpResponse:
    return world.ask_signed("POST", "/servers/", server(**changes), pair=pair)


def registered(response: HttpResponse) -> None:
    assert (response.status, content(response)) == (201, {"message": "Server registered successfully."})


def boot(world: World, pair: HotkeyPair = MINER, vm: str = "vm-1", address: str = HOST) -> None:
    body, headers = world.attestation(miner_hotkey=pair.hotkey.address, vm_name=vm)
    response = world.ask("POST", "/servers/boot/attestation", body, headers=headers, peer_address=address)
    assert response.status == 200, response.body


def everything(world: World) -> tuple[Any, ...]:
    return tuple(world.rows(kind) for kind in (ServerRow, GpuRow, AuditRow, VmRow, GenerationRow))


def test_a_kind_of_gpu_that_the_configuration_knows(world):
    declared = gpu(name="NVIDIA B300 SXM6", gpu_identifier="b300", memory=288 * 10**9, clock_rate=2e6)
    assert refusal(register(world, gpus=[declared]))[:2] == (400, Code.GPU_INVALID)
    world.app.service = service(gpus=GPUS | {"b300": Gpu(" B300", 288, 160, 2048, 1000, 2000)})
    registered(register(world, gpus=[declared]))
    (row,) = world.rows(GpuRow)
    assert stdlib_json.loads(row.declared)["processors"] == 160
    wrong = declared | {"uuid": "GPU-9", "name": "NVIDIA B200"}
    assert refusal(register(world, id="n2", host="5.6.7.8", gpus=[wrong]))[:2] == (400, Code.GPU_INVALID)


# --- the life of a server ---


def test_register_list_show_rename_remove(world):
    registered(register(world))
    world.now += 5
    registered(register(world, id="n2", name=None, host="5.6.7.8", gpus=[gpu("GPU-1")]))
    listed = answer(world.ask_signed("GET", "/servers/"))
    assert [row["server_id"] for row in listed] == ["n2", "n1"]
    first = {
        "server_id": "n1",
        "name": "vm-1",
        "ip": HOST,
        "created_at": "2027-01-15T08:00:00+00:00",
        "updated_at": None,
    }
    assert listed[1] == first
    assert list(listed[1]) == list(first)
    assert listed[0]["name"] == "n2"
    shown = answer(world.ask_signed("GET", "/servers/n1"))
    assert list(shown) == [*list(first)[:3], "version", "maintenance_pending_window_id", *list(first)[3:]]
    assert shown == first | {"version": None, "maintenance_pending_window_id": None}
    renamed = answer(world.ask_signed("PATCH", "/servers/n1?server_name=vm-9"))
    assert renamed == {
        "name": "vm-9",
        "ip": HOST,
        "created_at": "2027-01-15T08:00:00+00:00",
        "updated_at": "2027-01-15T08:00:05+00:00",
    }
    assert answer(world.ask_signed("PATCH", "/servers/n1?server_name=vm-9")) == renamed  # the same name changes nothing
    gone = {"name": "vm-9", "message": "Server removed successfully"}
    assert answer(world.ask_signed("DELETE", "/servers/vm-9")) == gone
    assert refusal(world.ask_signed("DELETE", "/servers/vm-9")) == (404, "server_not_found", "Server vm-9 not found")
    assert answer(world.ask_signed("DELETE", "/servers/n2"))["name"] == "n2"
    assert answer(world.ask_signed("GET", "/servers/")) == []
    assert world.rows(GpuRow) == ()
    assert [(row.event, row.reason) for row in world.rows(AuditRow)] == [
        ("register server", f"server n1 at {HOST}: no link; 1 GPUs"),
        ("register server", "server n2 at 5.6.7.8: no link; 1 GPUs"),
        ("rename server", "server n1 renamed to vm-9"),
        ("remove server", f"server n1 at {HOST}; keys are kept"),
        ("remove server", "server n2 at 5.6.7.8; keys are kept"),
    ]
    told = {record.fields["request_id"] for record in world.log if record.event.startswith("server_")}
    assert {row.request_id for row in world.rows(AuditRow)} < told  # a name that stays the same is only logged


def test_removing_a_server_keeps_the_keys_of_its_vm(world):
    boot(world)
    registered(register(world))
    keys = world.rows(GenerationRow)
    assert keys
    answer(world.ask_signed("DELETE", "/servers/n1"))
    assert world.rows(GenerationRow) == keys
    assert world.rows(AuditRow)[-1].boot_id == world.rows(BootRow)[0].boot_id


def test_what_the_table_knows_is_filled_in(world):
    registered(register(world, gpus=[gpu("GPU-Ab")]))
    (row,) = world.rows(GpuRow)
    declared = stdlib_json.loads(row.declared)
    assert (declared["processors"], declared["max_threads_per_processor"]) == (132, 2048)
    assert (row.uuid, declared["uuid"], row.server_id) == ("gpu-ab", "GPU-Ab", "n1")


def test_a_stranger_hears_that_there_is_no_such_server(world):
    registered(register(world))
    before = everything(world)
    for method, target in [
        ("GET", "/servers/n1"),
        ("PATCH", "/servers/n1?server_name=x"),
        ("DELETE", "/servers/n1"),
        ("DELETE", "/servers/vm-1"),
        ("GET", "/servers/n1/nonce"),
        ("GET", "/servers/n1/attestation/status"),
    ]:
        status, code, detail = refusal(world.ask_signed(method, target, pair=OTHER))
        assert (status, code) == (404, "server_not_found")
        assert detail == f"Server {target.split('/')[2].partition('?')[0]} not found"
    assert answer(world.ask_signed("GET", "/servers/", pair=OTHER)) == []
    assert everything(world) == before


# --- conflicts ---

CONFLICTS = [
    ({"host": HOST}, Code.HOST_TAKEN),
    ({"host": "same.example"}, Code.HOST_TAKEN),
    ({"id": "n1"}, Code.SERVER_TAKEN),
]


@pytest.mark.parametrize("pair", [MINER, OTHER], ids=["owner", "stranger"])
@pytest.mark.parametrize(("taken", "code"), CONFLICTS)
def test_what_is_a_servers_is_no_others(world, taken, code, pair):
    world.names["same.example"] = (HOST,)
    registered(register(world))
    before = everything(world)
    fresh = {"id": "n2", "name": "other", "host": "5.6.7.8", "gpus": [gpu("GPU-1")]}
    status, got, detail = refusal(register(world, pair, **(fresh | taken)))
    assert (status, got) == (409, code)
    if pair is OTHER:
        assert "n1" not in detail
        assert "vm-1" not in detail
    assert everything(world) == before


@pytest.mark.parametrize("pair", [MINER, OTHER], ids=["owner", "stranger"])
def test_a_declared_uuid_keeps_no_other_server_out(world, pair):
    """Nobody has signed it, so each server has its own declaration; the audit tells an operator of the others."""
    registered(register(world))
    both = [gpu("gpu-0"), gpu("GPU-1", device_index=1)]
    registered(register(world, pair, id="n2", name="x", host="5.6.7.8", gpus=both))
    assert [(row.uuid, row.server_id) for row in world.rows(GpuRow)] == [
        ("gpu-0", "n1"),
        ("gpu-0", "n2"),
        ("gpu-1", "n2"),
    ]
    assert "2 GPUs, of which server n1 declared gpu-0 before" in world.rows(AuditRow)[-1].reason
    answer(world.ask_signed("DELETE", "/servers/n1"))
    assert [(row.uuid, row.server_id) for row in world.rows(GpuRow)] == [("gpu-0", "n2"), ("gpu-1", "n2")]


@pytest.mark.parametrize(
    "names", [{"id": "n2", "name": "vm-1"}, {"id": "n2", "name": "n1"}, {"id": "vm-1", "name": "x"}]
)
def test_names_and_ids_of_one_miner_do_not_meet(world, names):
    registered(register(world))
    response = register(world, **names, host="5.6.7.8", gpus=[gpu("GPU-1")])
    assert refusal(response)[:2] == (409, Code.NAME_TAKEN)
    registered(register(world, OTHER, **(names | {"id": "n3"}), host="5.6.7.8", gpus=[gpu("GPU-1")]))


def test_a_name_that_is_taken_is_not_given(world):
    registered(register(world))
    registered(register(world, id="n2", name="b", host="5.6.7.8", gpus=[gpu("GPU-1")]))
    for name in ("vm-1", "n1"):
        before = everything(world)
        assert refusal(world.ask_signed("PATCH", f"/servers/n2?server_name={name}")) == (
            409,
            Code.NAME_TAKEN,
            f"name '{name}' already in use by another server for this miner",
        )
        assert everything(world) == before
    answer(world.ask_signed("PATCH", "/servers/n2?server_name=n2"))  # its own id is free to it


@pytest.mark.parametrize("claims", [{}, {"host": "same.example"}, {"id": "n1", "gpus": [gpu("gpu-0")]}])
def test_a_server_without_evidence_yields_its_address_to_a_boot_from_there(world, claims):
    world.names["same.example"] = (HOST,)
    registered(register(world, OTHER, gpus=[gpu(), gpu("GPU-2", device_index=1)]))
    boot(world, vm="mine")
    registered(register(world, **({"id": "n2", "name": "mine", "gpus": [gpu("GPU-1")]} | claims)))
    (row,) = world.rows(ServerRow)
    assert row.hotkey == MINER.hotkey.address
    assert [gpu_row.server_id for gpu_row in world.rows(GpuRow)] == [row.server_id]  # all that the other held is free
    told = [audit for audit in world.rows(AuditRow) if audit.event == "server yields"]
    assert [audit.vm.hotkey for audit in told] == [OTHER.hotkey.address]


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({"id": "n1"}, Code.SERVER_TAKEN),
        ({"id": "n1", "gpus": [gpu("gpu-0")]}, Code.SERVER_TAKEN),
        ({"host": HOST}, Code.HOST_TAKEN),
        ({"host": "same.example"}, Code.HOST_TAKEN),
        ({"host": HOST, "id": "n1", "gpus": [gpu("gpu-0")]}, Code.HOST_TAKEN),
    ],
)
@pytest.mark.parametrize("neighbour", [False, True], ids=["alone", "neighbour"])
def test_a_boot_shows_no_id_and_no_address_but_its_own(world, claims, code, neighbour):
    """The claimant's own address may be held without evidence: that holder stays too where the rest is refused."""
    world.names["same.example"] = (HOST,)
    registered(register(world))
    if neighbour:
        registered(register(world, id="n5", name="b", host="6.6.6.6", gpus=[gpu("GPU-5")]))
    boot(world, OTHER, vm="x", address="6.6.6.6")
    before = everything(world)
    fresh = {"id": "n2", "name": "x", "host": "6.6.6.6", "gpus": [gpu("GPU-1")]}
    status, got, detail = refusal(register(world, OTHER, **(fresh | claims)))
    assert (status, got) == (409, code)
    assert MINER.hotkey.address not in detail
    assert f"held by server n1 of {MINER.hotkey.address}" in world.log[-1].fields["reason"]
    assert everything(world) == before


def test_a_boot_is_advised_only_where_it_frees_the_address(world):
    """Neither an own server gives way to a boot, nor one with evidence."""
    registered(register(world))
    assert refusal(register(world))[1] == Code.HOST_TAKEN
    assert "boot the VM again" not in world.log[-1].fields["reason"]
    assert refusal(register(world, OTHER))[1] == Code.HOST_TAKEN
    assert "boot the VM again" in world.log[-1].fields["reason"]
    boot(world, vm="linked", address="6.6.6.6")
    registered(register(world, id="n2", name="linked", host="6.6.6.6"))
    assert refusal(register(world, OTHER, id="n3", host="6.6.6.6"))[1] == Code.HOST_TAKEN
    assert "boot the VM again" not in world.log[-1].fields["reason"]


def test_a_name_is_no_claim_to_another_miners_server(world):
    registered(register(world))
    boot(world, OTHER, vm="x", address="6.6.6.6")
    registered(register(world, OTHER, id="n2", name="vm-1", host="6.6.6.6", gpus=[gpu("GPU-1")]))
    boot(world, OTHER, vm="n1", address="6.6.6.7")
    registered(register(world, OTHER, id="n3", name="n1", host="6.6.6.7", gpus=[gpu("GPU-2")]))
    assert [(row.server_id, row.hotkey == MINER.hotkey.address) for row in world.rows(ServerRow)] == [
        ("n1", True),
        ("n2", False),
        ("n3", False),
    ]


@pytest.mark.parametrize(("holder_booted_after", "status"), [(-1, 201), (0, 409), (1, 409)])
def test_an_address_is_whose_boot_from_there_is_the_newest(world, holder_booted_after, status):
    """A miner that had the address before cannot remove the server of one that has booted there since."""
    registered(register(world, name="unlinked"))
    boots = [(0, OTHER, "x"), (holder_booted_after, MINER, "vm-1")]
    for after, pair, vm in sorted(boots, key=lambda row: row[0]):
        world.now = NOW + 10 + after
        boot(world, pair, vm=vm)
    before = everything(world)
    response = register(world, OTHER, id="n2", name="x", gpus=[gpu("GPU-1")])
    assert response.status == status
    assert (everything(world) == before) == (status == 409)


@pytest.mark.parametrize(("age", "status"), [(86_400, 201), (86_401, 409)])
def test_a_boot_of_long_ago_does_not_show_whose_an_address_is_now(world, age, status):
    boot(world, OTHER, vm="x")
    world.now += age
    registered(register(world, name="unlinked"))  # by who has the address since
    assert register(world, OTHER, id="n2", name="x", gpus=[gpu("GPU-1")]).status == status
    if status == 409:
        assert "boot the VM again" in world.log[-1].fields["reason"]


ADDRESSES = ["1.2.3.4", "5.6.7.8", "6.6.6.6"]
MINERS = [MINER, OTHER, HotkeyPair.from_secret(Secret(b"a third miner's seed".ljust(32, b"!")))]
ACTS = st.one_of(
    st.tuples(st.just("boot"), st.sampled_from(MINERS), st.sampled_from(["a", "b"]), st.sampled_from(ADDRESSES)),
    st.tuples(
        st.just("register"),
        st.sampled_from(MINERS),
        st.fixed_dictionaries(
            {
                "id": st.sampled_from(["n1", "n2", "n3"]),
                "name": st.sampled_from(["a", "b", "c"]),
                "host": st.sampled_from(ADDRESSES),
                "gpus": st.sampled_from([[gpu("GPU-1")], [gpu("GPU-2")], [gpu("GPU-1"), gpu("GPU-2")]]),
            }
        ),
    ),
)


@given(acts=st.lists(ACTS, min_size=2, max_size=8))
def test_no_registration_removes_another_server_but_one_without_evidence_at_its_address(acts):
    world = World()
    for act, pair, *rest in acts:
        world.now += 1
        if act == "boot":
            boot(world, pair, *rest)
            continue
        (claims,) = rest
        before, servers = everything(world), set(world.rows(ServerRow))
        response = register(world, pair, **claims)
        gone = servers - set(world.rows(ServerRow))
        if response.status != 201:
            assert refusal(response)[0] == 409
            assert everything(world) == before
        assert {row.server_id for row in world.rows(GpuRow)} == {row.server_id for row in world.rows(ServerRow)}
        for row in gone:
            assert row.hotkey != pair.hotkey.address
            assert (row.address, row.boot_id, row.pin) == (claims["host"], None, None)
            rivals = [
                one.vm.hotkey
                for one in sorted(boots(world), key=lambda one: one.created_at)
                if one.peer_address == row.address and one.vm.hotkey in (row.hotkey, pair.hotkey.address)
            ]
            assert rivals[-1] == pair.hotkey.address


@pytest.mark.parametrize("address", [HOST, "8.8.8.8"])
def test_a_server_with_a_link_does_not_yield(world, address):
    boot(world, address=address)
    registered(register(world))
    world.now += 1
    world.platform = world.platform.another(1)
    boot(world, OTHER, vm="x")
    before = everything(world)
    assert refusal(register(world, OTHER, id="n2", name="x"))[0] == 409
    assert everything(world) == before


# --- links and policies ---


def test_a_server_is_linked_by_name_else_by_address(world):
    boot(world, vm="a", address="8.8.8.8")
    boot(world, vm="b", address=HOST)
    registered(register(world, name="a"))
    assert world.rows(ServerRow)[0].boot_id == next(r.boot_id for r in boots(world) if r.vm.name == "a")
    answer(world.ask_signed("DELETE", "/servers/n1"))
    registered(register(world, name="c"))
    linked = world.rows(ServerRow)[0].boot_id
    assert linked == next(r.boot_id for r in boots(world) if r.vm.name == "b")
    answer(world.ask_signed("PATCH", "/servers/n1?server_name=a"))
    assert world.rows(ServerRow)[0].boot_id == linked  # a rename moves nothing


def boots(world: World) -> Any:
    return world.rows(BootRow)


def test_another_hotkeys_boot_is_no_link(world):
    boot(world, OTHER)
    registered(register(world))
    assert world.rows(ServerRow)[0].boot_id is None


def test_the_policy_boot_wants_a_boot(world):
    world.app = App(service(registration_evidence="boot"))
    assert refusal(register(world))[:2] == (403, Code.BOOT_REQUIRED)
    assert world.rows(ServerRow) == ()
    boot(world)
    registered(register(world))


@pytest.mark.parametrize(
    ("expected", "count", "text"),
    [
        (("b200",), None, "GPU mismatch for measurement config 'simulated': Expected GPUs ['b200'], but got ['h200']"),
        (("h200",), 8, "GPU count mismatch for measurement config 'simulated': Expected 8 GPUs, but got 1"),
        (("h200", "b200"), 1, None),
        ((), None, None),
    ],
)
def test_gpus_are_held_against_the_linked_boots_profile(world, expected, count, text):
    profile = evolve(PROFILE, expected_gpus=expected, gpu_count=count)
    served = {profile.identity: ServedProfile(profile, None, False, False)}
    world.app = App(service(profiles=served))
    boot(world)
    response = register(world)
    if text is None:
        registered(response)
    else:
        assert refusal(response) == (400, Code.GPU_INVALID, f"Server registration failed - {text}")
        assert world.rows(ServerRow) == ()


# --- declared GPUs and hosts ---


@pytest.mark.parametrize(
    "gpus",
    [
        [],
        [gpu(), gpu()],
        [gpu("A"), gpu("a")],
        [gpu(gpu_identifier="h9000")],
        [gpu(name="NVIDIA H100 PCIe")],
        [gpu(name="")],
        [gpu(name="x" * 257)],
        [gpu(uuid="")],
        [gpu(uuid="a b")],
        [gpu(uuid="x" * 129)],
        [gpu(memory=138 * 10**9)],
        [gpu(memory=153 * 10**9)],
        [gpu(memory=10**400)],
        [gpu(memory=-1)],
        [gpu(processors=131)],
        [gpu(max_threads_per_processor=1024)],
        [gpu(clock_rate=1_589_999)],
        [gpu(clock_rate=2_178_001)],
        [gpu(clock_rate=-1)],
        [gpu(device_index=-1)],
        [gpu(device_index=10)],
        [gpu(f"GPU-{number}", device_index=number % 10) for number in range(11)],
        [gpu(major=-1)],
        [gpu(minor=10**30)],
        [gpu(verification_port=79)],
        [gpu(verification_port=65536)],
        [gpu(verification_host="")],
        [gpu(verification_host="\x7f")],
    ],
)
def test_gpus_that_cannot_be(world, gpus):
    assert refusal(register(world, gpus=gpus))[:2] == (400, Code.GPU_INVALID)
    assert world.rows(ServerRow) == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": 139 * 10**9},
        {"memory": 151 * 10**9},
        {"clock_rate": 1_590_000},
        {"clock_rate": 2_177_999.0},
        {"device_index": 9},
        {"processors": 132, "max_threads_per_processor": 2048, "sxm": True, "ecc": False, "concurrent_kernels": True},
    ],
)
def test_gpus_at_the_bounds(world, changes):
    registered(register(world, gpus=[gpu(**changes)]))


def test_a_server_has_at_most_ten_gpus(world):
    registered(register(world, gpus=[gpu(f"GPU-{number}", device_index=number) for number in range(10)]))


HOSTS = [
    ("", None),
    ("-a.example", None),
    ("a..example", None),
    ("a_b.example", None),
    ("a.example.", None),
    ("http://1.2.3.4", None),
    ("1.2.3.4:80", None),
    ("::1", None),
    ("2001:4860:4860::8888", None),
    ("10.0.0.1", None),
    ("127.0.0.1", None),
    ("169.254.169.254", None),
    ("100.64.0.1", None),
    ("192.168.1.1", None),
    ("224.0.0.1", None),
    ("240.0.0.1", None),
    ("0.0.0.0", None),
    ("255.255.255.255", None),
    ("203.0.113.7", None),
    ("127.1", ("127.0.0.1",)),
    ("0x7f000001", ("127.0.0.1",)),
    ("2130706433", ("127.0.0.1",)),
    ("1.2.3.4\n", None),
    ("x" * 64 + ".example", ("1.2.3.4",)),
    ("a." * 127 + "example", ("1.2.3.4",)),
    ("nowhere.example", ()),
    ("rebind.example", ("1.2.3.4", "127.0.0.1")),
    ("v6.example", ("::1",)),
    ("mapped.example", ("::ffff:10.0.0.1",)),
    ("nat64.example", ("64:ff9b::a00:1",)),
    ("sixtofour.example", ("2002:0a00:0001::1",)),
    ("teredo.example", ("2001:0:4136:e378:8000:63bf:3fff:fdd2",)),
    ("local.example", ("fe80::1",)),
    ("site.example", ("fec0::1",)),
    ("local-nat64.example", ("64:ff9b:1::1",)),
    ("compatible.example", ("::127.0.0.1",)),
    ("documentation.example", ("3fff::1",)),
    ("multicast.example", ("ff0e::1",)),
    ("dummy.example", ("192.0.0.8",)),
    ("relay.example", ("192.88.99.1",)),
    ("unique.example", ("fd00::1",)),
    ("\N{DIGIT ONE}".replace("1", "\u0661") + ".2.3.4", ("1.2.3.4",)),
    ("b\u00fccher.example", ("1.2.3.4",)),
]


@pytest.mark.parametrize(("host", "addresses"), HOSTS)
def test_hosts_that_are_refused(world, host, addresses):
    world.names[host] = addresses or ()
    assert refusal(register(world, host=host)) == (400, Code.HOST_INVALID, "Invalid verification host provided.")
    assert world.rows(ServerRow) == ()


def test_an_address_has_one_form(world):
    """Else one host could be registered twice."""
    world.names["mapped.example"] = (f"::ffff:{HOST}",)
    registered(register(world))
    other = register(world, OTHER, id="n2", host="mapped.example", gpus=[gpu("GPU-1")])
    assert refusal(other)[:2] == (409, Code.HOST_TAKEN)


def test_a_name_is_resolved_once_and_ipv4_comes_first(world):
    world.names["Good.example"] = ("2001:4860:4860::8888", "9.9.9.9", "1.2.3.4")
    registered(register(world, host="Good.example"))
    (row,) = world.rows(ServerRow)
    assert (row.host, row.address) == ("Good.example", "1.2.3.4")


def test_a_name_that_nobody_can_tell_of_now_is_no_fault_of_the_miners(world):
    def silent(effect: Effect[Any]) -> None:
        if isinstance(effect, Resolve):
            raise TransportError("nobody answers", maybe_delivered=False)

    world.before = silent
    assert refusal(register(world, host="slow.example"))[:2] == (503, Code.BUSY)
    assert world.rows(ServerRow) == ()


def test_one_miner_looks_up_one_name_at_a_time(world):
    """Else one with names that are slow to be found would keep the others from looking up theirs."""
    world.names = {"slow.example": (HOST,), "other.example": ("5.6.7.8",)}
    seen: list[tuple[int, str]] = []

    def meanwhile(effect: Effect[Any]) -> None:
        if effect == Resolve("slow.example") and not seen:
            seen.append((0, ""))
            seen.append(refusal(register(world, id="n2", host="other.example", gpus=[gpu("GPU-1")]))[:2])
            registered(register(world, OTHER, id="n3", host="other.example", gpus=[gpu("GPU-2")]))

    world.before = meanwhile
    registered(register(world, host="slow.example"))
    assert seen[1] == (503, Code.BUSY)


# --- who calls ---

SIGNED = [
    ("POST", "/servers/", server()),
    ("GET", "/servers/", None),
    ("PATCH", "/servers/n1?server_name=x", None),
    ("GET", "/servers/n1", None),
    ("DELETE", "/servers/n1", None),
    ("GET", "/servers/n1/nonce", None),
    ("GET", "/servers/n1/attestation/status", None),
]


def spoilt(world: World, call: tuple[str, str, Any], **headers: str | None) -> HttpResponse:
    """A signed call with some of its headers exchanged, or left out."""
    method, target, body = call
    content = b"" if body is None else json.encode(body)
    kept: list[HttpRequest] = []
    good: Any = world.app
    catch: Any = _Catch(kept)
    world.app = catch
    try:
        world.ask_signed(method, target, content)
    finally:
        world.app = good
    (request,) = kept
    fields = {**dict(request.headers), **{f"x-chutes-{name}": value for name, value in headers.items()}}
    given = tuple((name, value) for name, value in fields.items() if value is not None)
    return run(world.app.handle(evolve(request, headers=given)), world.perform)


class _Catch:
    def __init__(self, kept: list[HttpRequest]) -> None:
        self._kept = kept

    def handle(self, request: HttpRequest) -> Any:
        self._kept.append(request)
        yield from ()
        return HttpResponse(200)


@pytest.mark.parametrize("call", SIGNED, ids=lambda call: f"{call[0]} {call[1]}")
def test_each_part_of_the_signature_is_needed(world, call):
    registered(register(world, host="5.6.7.8", id="n1", gpus=[gpu("GPU-9")], name="n"))
    before = everything(world)
    for name in ("hotkey", "nonce", "signature"):
        assert refusal(spoilt(world, call, **{name: None})) == (401, Code.SIGNATURE_INVALID, "Invalid nonce!")
    for nonce in (
        str(NOW - 600),
        str(NOW + 600),
        "",
        "-1",
        "+1800000000",
        "1800000000.0",
        " 1800000000",
        "0x6b49d200",
        "1_800_000_000",
        "\u00b2" * 10,
        "".join(chr(0x660 + int(digit)) for digit in str(NOW)),
        "9" * 5000,
        "1800000000\n",
        "ab" * 32,
    ):
        assert refusal(spoilt(world, call, nonce=nonce)) == (401, Code.SIGNATURE_STALE, "Invalid nonce!")
    for signature in ("", "0x" + "00" * 64, "0" * 127, "0" * 129, "g" * 128, "\u0661" * 128):
        assert refusal(spoilt(world, call, signature=signature)) == (401, Code.SIGNATURE_INVALID, "Invalid signature")
    wrong = f"Invalid request signature for hotkey {MINER.hotkey.address}."
    assert refusal(spoilt(world, call, signature="00" * 64)) == (401, Code.SIGNATURE_INVALID, wrong)
    assert refusal(spoilt(world, call, nonce=str(NOW + 1))) == (401, Code.SIGNATURE_INVALID, wrong)
    status, code, detail = refusal(spoilt(world, call, hotkey=OTHER.hotkey.address))
    assert (status, code) == (401, Code.SIGNATURE_INVALID)
    for hotkey in ("", "x", MINER.hotkey.address + "1", MINER.hotkey.address[:-1], "\u00e9" * 48):
        status, code, detail = refusal(spoilt(world, call, hotkey=hotkey))
        assert (status, code, detail) == (401, Code.SIGNATURE_INVALID, "Invalid request signature.")
    world.app = App(service(hotkeys=frozenset({OTHER.hotkey.address})))
    unknown = (401, Code.HOTKEY_UNKNOWN, "Hotkey is not registered on netuid 64")
    assert refusal(spoilt(world, call)) == unknown
    assert everything(world) == before


@pytest.mark.parametrize("name", ["x-chutes-hotkey", "x-chutes-nonce", "x-chutes-signature"])
def test_a_header_that_comes_twice(world, name):
    kept: list[HttpRequest] = []
    good, world.app = world.app, _Catch(kept)
    world.ask_signed("POST", "/servers/", server())
    world.app = good
    (request,) = kept
    twice = (*request.headers, next(pair for pair in request.headers if pair[0] == name))
    response = run(world.app.handle(evolve(request, headers=twice)), world.perform)
    assert refusal(response)[:2] == (400, Code.BAD_REQUEST)
    assert world.rows(ServerRow) == ()


def test_who_is_unknown_learns_nothing_of_what_is_wrong_with_a_body(world):
    assert refusal(world.ask("POST", "/servers/", b"{"))[0] == 401
    assert refusal(world.ask_signed("POST", "/servers/", b"{"))[0] == 422


@pytest.mark.parametrize("policy", ["compatible", "request"])
def test_a_signature_over_the_whole_request_is_always_taken(world, policy):
    world.app = App(service(signatures=policy))
    registered(world.ask_signed("POST", "/servers/", server(), policy="request"))
    answer(world.ask_signed("PATCH", "/servers/n1?server_name=b", policy="request"))
    answer(world.ask_signed("DELETE", "/servers/b", policy="request"))


def test_the_policy_request_takes_nothing_else(world):
    world.app = App(service(signatures="request"))
    for method, target, body in SIGNED:
        assert refusal(world.ask_signed(method, target, body))[:2] == (401, Code.SIGNATURE_INVALID)


def test_a_signature_over_a_request_is_for_that_request_alone(world):
    registered(register(world))
    kept: list[HttpRequest] = []
    good, world.app = world.app, _Catch(kept)
    world.ask_signed("GET", "/servers/n1", policy="request")
    world.app = good
    (request,) = kept
    for changed in (
        evolve(request, method="DELETE"),
        evolve(request, target="/servers/"),
        evolve(request, target="/servers/n1?"),
        evolve(request, body=b"x"),
    ):
        response = run(world.app.handle(changed), world.perform)
        assert refusal(response)[:2] == (401, Code.SIGNATURE_INVALID)


def test_a_purpose_is_no_signature_over_a_body(world):
    response = world.ask_signed("POST", "/servers/", server(), coverage="purpose")
    assert refusal(response)[:2] == (401, Code.SIGNATURE_INVALID)


def test_one_set_of_headers_serves_for_several_calls(world):
    registered(register(world))
    for _ in range(2):
        answer(world.ask_signed("GET", "/servers/n1", nonce=str(NOW - 599)))


@pytest.mark.parametrize("policy", ["compatible", "request"])
def test_a_signed_request_counts_again_at_any_server_while_its_time_is_near(world, policy):
    """The message has the time, and no server's name."""
    kept: list[HttpRequest] = []
    good, world.app = world.app, _Catch(kept)
    world.ask_signed("POST", "/servers/", server(), coverage="body", policy=policy)
    world.ask_signed("DELETE", "/servers/n1", policy=policy)
    world.app = good
    register_it, remove_it = kept
    for place in (world, World(), world):
        for request, status in ((register_it, 201), (remove_it, 200)):
            assert run(place.app.handle(request), place.perform).status == status
    world.now += 600
    assert refusal(run(world.app.handle(register_it), world.perform))[:2] == (401, Code.SIGNATURE_STALE)


def test_a_real_wallets_signature(world, vectors):
    """The rows with a body are registrations; each must decide as it says, up to the check that comes next."""
    rows = stdlib_json.loads((vectors / "signing.json").read_text())["rows"]
    seen = set()
    for row in rows:
        if row["purpose"] is None and row["body"] is None:
            continue  # another message than any request has; `hotkey check` is tried with it
        at_runtime = len(row["nonce"]) == 64  # a server's nonce; others are times
        world.now = NOW if at_runtime else int(row["nonce"])
        headers = {name: row[name.rpartition("-")[2]] for name in ("x-chutes-hotkey", "x-chutes-nonce")}
        headers |= {"x-chutes-signature": row["signature"], "content-type": "application/json"}
        if at_runtime:
            body = (row["body"] or "").encode()
            response = world.ask("POST", "/servers/n1/attestation", body, headers=headers)
        elif row["purpose"] is not None:
            response = world.ask("GET", "/servers/", headers=headers)
        else:
            response = world.ask("POST", "/servers/", row["body"].encode(), headers=headers)
        assert (response.status != 401) == row["valid"], row
        seen.add((row["purpose"], row["valid"]))
    assert {valid for _, valid in seen} == {True, False}
    assert world.rows(ServerRow) == ()


def test_nothing_is_told_of_what_was_signed(world):
    response = spoilt(world, SIGNED[0], signature="ab" * 64)
    message = body_message(MINER.hotkey, str(NOW), json.encode(server()))
    told = response.body + repr(world.log).encode()
    assert b"ab" * 64 not in told
    assert message not in told
    assert str(NOW).encode() not in told


# --- hostile requests ---


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"host":"1.2.3.4","host":"1.2.3.4","id":"n1","gpus":[]}',
        b"[" * 60_000,
        b'{"host":"1.2.3.4","id":"\\ud800","gpus":[]}',
        json.encode(server(id="x" * 10_000)),
        json.encode(server(id="a\0b")),
        json.encode(server(id="")),
        json.encode(server(id="..")),
        json.encode(server(id="a/b")),
        json.encode(server(id="nonce")),
        json.encode(server(id="boot")),
        json.encode(server(id=7)),
        json.encode(server(name="")),
        json.encode(server(name="x" * 129)),
        json.encode(server(name=["a"])),
        json.encode(server(host=None)),
        json.encode(server(gpus=None)),
        json.encode(server(gpus={})),
        json.encode(server(gpus=["a"])),
        json.encode(server(gpus=[gpu(memory=1.5)])),
        json.encode(server(gpus=[gpu(memory=True)])),
        json.encode(server(gpus=[gpu(clock_rate="1")])),
        json.encode(server(gpus=[gpu(clock_rate=True)])),
        json.encode(server(gpus=[gpu(clock_rate=10**400)])),
        json.encode(server(gpus=[gpu(sxm=1)])),
        json.encode(server(gpus=[gpu(device_index=None)])),
        b'{"id":"n1","host":"1.2.3.4","gpus":[{"memory":' + b"1" * 5000 + b"}]}",
    ],
)
def test_bodies_that_are_no_registration(world, body):
    status, code, detail = refusal(world.ask_signed("POST", "/servers/", body))
    assert (status, code) == (422, Code.VALIDATION_ERROR)
    assert all(set(problem) == {"type", "loc", "msg"} for problem in detail)
    assert b"xxxx" not in stdlib_json.dumps(detail).encode()
    assert world.rows(ServerRow) == ()


def test_all_that_is_wrong_is_told_at_once(world):
    body = server(host=1, gpus=[gpu(uuid=1), gpu(memory="x", sxm=3), 4])
    status, _, detail = refusal(world.ask_signed("POST", "/servers/", body))
    assert status == 422
    assert [problem["loc"] for problem in detail] == [
        ["body", "host"],
        ["body", "gpus", 0, "uuid"],
        ["body", "gpus", 1, "memory"],
        ["body", "gpus", 1, "sxm"],
        ["body", "gpus", 2],
    ]


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/servers/a%2Fb", 404),
        ("GET", "/servers/..", 404),
        ("GET", "/servers/%2e%2e", 404),
        ("DELETE", "/servers/%2e", 404),
        ("GET", "/servers/a%00", 422),
        ("GET", "/servers/" + "x" * 10_000, 422),
        ("GET", "/servers/%F0%9F%98%80", 422),
        ("GET", "/servers/%ff", 404),
        ("PATCH", "/servers/n1", 422),
        ("PATCH", "/servers/n1?server_name=", 422),
        ("PATCH", "/servers/n1?server_name=a%00", 422),
        ("PATCH", "/servers/n1?server_name=" + "x" * 10_000, 422),
        ("PATCH", "/servers/n1?server_name=a&server_name=b", 400),
        ("PATCH", "/servers/n1?server_name=%0d%0aSet-Cookie:a", 422),
        ("PUT", "/servers/n1", 405),
        ("PUT", "/servers/", 405),
    ],
)
def test_targets_that_are_nothing(world, method, target, status):
    registered(register(world))
    before = everything(world)
    assert refusal(world.ask_signed(method, target))[0] == status
    assert everything(world) == before


def test_the_verbs_of_a_server_are_told(world):
    assert world.ask("PUT", "/servers/n1").header("allow") == "PATCH, GET, HEAD, DELETE"
    assert world.ask("GET", "/servers").header("location") == "./servers/"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


@given(
    changes=st.dictionaries(st.sampled_from(["host", "id", "name", "gpus"]), JSON, max_size=2),
    of_gpu=st.dictionaries(st.sampled_from(sorted(gpu())), JSON, max_size=2),
)
def test_any_registration_is_answered_as_documented(changes, of_gpu):
    world = World()
    response = world.ask_signed("POST", "/servers/", server(gpus=[gpu(**of_gpu)]) | changes)
    if response.status == 201:
        assert len(world.rows(ServerRow)) == 1
    else:
        assert refusal(response)[0] in (400, 422)
        assert world.rows(ServerRow) == ()


@given(hotkey=st.text(max_size=60), nonce=st.text(max_size=80), signature=st.text(max_size=140))
def test_any_headers_are_refused(hotkey, nonce, signature):
    world = World()
    headers = {"x-chutes-hotkey": hotkey, "x-chutes-nonce": nonce, "x-chutes-signature": signature}
    assert refusal(world.ask("GET", "/servers/", headers=headers))[0] == 401
    assert not any(isinstance(effect, Transact) for effect in world.asked)


# --- operation 15 ---


def test_the_published_measurements_are_the_profiles(world):
    profile = evolve(PROFILE, expected_gpus=("h200",), gpu_count=8, fingerprints=(bytes(32),))
    older = evolve(PROFILE, version="0.9", mrtd=bytes(48))  # one name in two versions
    served = {one.identity: ServedProfile(one, None, False, False) for one in (profile, older)}
    world.app = App(service(profiles=served))
    response = world.ask("GET", "/servers/tee/measurements")
    listed = answer(response)
    assert [list(entry) for entry in listed] == [
        ["version", "name", "mrtd", "boot_rtmrs", "runtime_rtmrs", "expected_gpus", "gpu_count", "fingerprint"],
        ["version", "name", "mrtd", "boot_rtmrs", "runtime_rtmrs", "expected_gpus", "gpu_count"],
    ]
    assert tuple(one for one, _ in parse_profiles_json(response.body)) == (profile, older)
    assert listed[0]["boot_rtmrs"] == {f"RTMR{n}": one.hex().upper() for n, one in enumerate(PROFILE.boot)}
    assert listed[0]["mrtd"] == PROFILE.mrtd.hex().upper()


def test_a_server_shows_the_version_that_its_vm_booted(world):
    registered(register(world))
    boot(world)
    assert answer(world.ask_signed("GET", "/servers/n1"))["version"] == PROFILE.version


def test_a_boot_of_a_name_that_is_bound_elsewhere_is_no_link(world):
    boot(world)
    _ = world.store.connection.execute("UPDATE vm SET platform_id = x'00'")
    registered(register(world))
    assert world.rows(ServerRow)[0].boot_id is None


def test_what_another_transaction_claims_meanwhile_is_tried_again(world):
    unit = RegisterServer(
        now=NOW,
        request_id="r",
        hotkey=MINER.hotkey.address,
        server_id="n1",
        name="vm-1",
        host=HOST,
        address=HOST,
        gpus=(),
        profiles={},
        peer_address="",
    )
    with pytest.raises(StoreBusy, match="claimed meanwhile"):
        _ = run_script(unit.script(), lambda op: False if isinstance(op, Claim) else world.store.perform(op))


def test_a_miner_has_so_many_servers(world):
    """No evidence is needed for one, and while very many are listed the boots of others wait for the store."""
    registered(register(world))
    (first,) = world.rows(ServerRow)
    for number in range(1, SERVERS_OF_HOTKEY):
        more = {name: f"{name} {number}" for name in ("server_id", "registration", "name", "host", "address")}
        assert world.store.transact(Ask(Claim(evolve(first, **more))))
    one_more: dict[str, Any] = {"id": "n2", "name": "other", "host": "5.6.7.8", "gpus": [gpu("GPU-1")]}
    status, code, detail = refusal(register(world, **one_more))
    assert (status, code) == (409, Code.SERVERS_FULL)
    assert detail == "This miner has 1000 servers, and may have no more. Please remove one."
    registered(register(world, OTHER, **(one_more | {"id": "n3", "host": "5.6.7.9"})))
    answer(world.ask_signed("DELETE", "/servers/n1"))
    registered(register(world, **one_more))


@pytest.mark.parametrize("unit", [ReadServers, ReadServersAndGpus])
def test_a_list_takes_as_many_questions_for_many_servers_as_for_one(world, unit):
    """With PostgreSQL each is a round trip, and other boots wait."""

    def questions() -> int:
        asked: list[object] = []

        def perform(op: StoreOp[Any]) -> Any:
            asked.append(op)
            return world.store.perform(op)

        assert len(run_script(unit(first.hotkey).script(), perform)) == len(world.rows(ServerRow))
        return len(asked)

    registered(register(world))
    (first,) = world.rows(ServerRow)
    before = questions()
    for number in range(40):
        more = {name: f"{name} {number}" for name in ("server_id", "registration", "name", "host", "address")}
        assert world.store.transact(Ask(Claim(evolve(first, **more))))
    assert questions() == before


def test_a_verdict_on_a_server_that_was_registered_anew_is_not_its(world):
    registered(register(world))
    (before,) = world.rows(ServerRow)
    answer(world.ask_signed("DELETE", "/servers/n1"))
    world.now += 1
    registered(register(world))
    unit = RecordRuntimeRefusal(
        now=NOW,
        request_id="r",
        server=before,
        nonce=bytes(32),
        quote=Quote.refused(bytes(32)),
        code="quote_rejected",
        detail="",
        reason="",
        peer_address="",
    )
    with pytest.raises(Refused, match="not found"):
        _ = world.store.transact(unit)
