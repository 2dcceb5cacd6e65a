"""Operations 3, 4 and 16, and the frame of all: routing, retries, log lines."""

from email.utils import parsedate_to_datetime
from urllib.parse import urljoin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.effects import Transact, run
from chutes_proto.errors import BadRequest, FateUnknown, StoreBusy
from chutes_proto.server._app import App
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.store._rows import BootRow, GenerationRow
from chutes_proto.testing._platform import PROFILE
from chutes_proto.wire import openapi
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import HttpResponse, MalformedRequest
from tests.server.world import CERTIFICATES, HOTKEY, World, answer, content, refusal, service

BOTH = {"volumes": ["storage", "tdx-cache"]}


def legacy(world: World, token: str, query: str = f"?hotkey={HOTKEY}", vm: str = "vm-1") -> HttpResponse:
    return world.ask("GET", f"/servers/{vm}/luks{query}", headers={"x-boot-token": token})


def test_a_sync_makes_keys_and_gives_them_again(world):
    first = answer(world.sync(world.token(), BOTH))
    assert list(first) == ["storage", "tdx-cache"]  # clients that know no list of names take any member for a key
    assert len({first["storage"], first["tdx-cache"]}) == 2
    assert all(len(bytes.fromhex(first[name])) == 64 for name in BOTH["volumes"])
    named = {"volumes": ["tdx-cache", "storage", "storage"], "formatted": []}
    second = answer(world.sync(world.token(), named))
    assert list(second) == ["tdx-cache", "storage", "in_use"]
    assert second["storage"] == first["storage"]
    assert first["storage"] not in repr((world.log, world.rows(GenerationRow)))


def test_operation_3_reads_and_does_not_spend(world):
    token = world.token()
    assert refusal(legacy(world, token))[:2] == (404, Code.KEY_NOT_FOUND)
    keys = answer(world.sync(token, BOTH))
    token = world.token()
    assert answer(legacy(world, token)) == {"passphrase": keys["storage"]}
    assert answer(legacy(world, token)) == {"passphrase": keys["storage"]}
    world.certificate = None  # as deployed clients ask
    assert answer(legacy(world, token)) == {"passphrase": keys["storage"]}
    assert answer(world.sync(token, BOTH))["storage"] == keys["storage"]
    assert refusal(legacy(world, token))[:2] == (401, Code.BOOT_TOKEN_INVALID)


@pytest.mark.parametrize(
    ("headers", "query", "expected"),
    [
        ({}, f"?hotkey={HOTKEY}", (400, Code.BOOT_TOKEN_REQUIRED, "Boot token is required (X-Boot-Token header)")),
        ({"x-boot-token": ""}, "", (400, Code.BOOT_TOKEN_REQUIRED, "Boot token is required (X-Boot-Token header)")),
        ({"x-boot-token": "t"}, "", (400, Code.HOTKEY_REQUIRED, "Hotkey is required")),
        ({"x-boot-token": "t"}, "?hotkey=", (400, Code.HOTKEY_REQUIRED, "Hotkey is required")),
        (
            {"x-boot-token": "t", "x-chutes-hotkey": "a"},
            "?hotkey=b",
            (400, Code.HOTKEY_CONFLICT, "Hotkey differs between header and query"),
        ),
        *(
            (headers, f"?hotkey={HOTKEY}", (401, Code.BOOT_TOKEN_INVALID, "Boot token not found or expired"))
            for headers in ({"x-boot-token": "t"}, {"x-boot-token": "t", "x-chutes-hotkey": HOTKEY})
        ),
    ],
)
def test_credentials(world, headers, query, expected):
    assert refusal(world.ask("GET", f"/servers/vm-1/luks{query}", headers=headers)) == expected
    assert refusal(world.ask("POST", f"/servers/vm-1/luks{query}", BOTH, headers=headers)) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"volumes": []}, (400, Code.VOLUMES_REQUIRED, "volumes is required and must be non-empty")),
        (
            {"volumes": ["storage", "x"]},
            (400, Code.VOLUME_UNKNOWN, "Invalid volume name(s): ['x']. Supported: ['storage', 'tdx-cache']"),
        ),
        (
            {"volumes": ["storage"], "rekey": ["tdx-cache"]},
            (400, Code.REKEY_NOT_SUBSET, "rekey must be a subset of volumes; not in volumes: ['tdx-cache']"),
        ),
        (
            {"volumes": ["storage"], "formatted": ["root"]},
            (
                400,
                Code.VOLUME_UNKNOWN,
                "Invalid formatted volume name(s): ['root']. Supported: ['storage', 'tdx-cache']",
            ),
        ),
    ],
)
def test_what_needs_no_rows_is_checked_before_the_token(world, body, expected):
    token = world.token()
    assert refusal(world.sync(token, body)) == expected
    assert refusal(world.sync("not a token", body)) == expected
    assert answer(world.sync(token, BOTH))  # the token was not consumed


def test_a_refusal_of_names_is_short_whatever_was_asked(world):
    many = [f"{n}{'v' * 60}" for n in range(900)]
    for body in (
        {"volumes": many},
        {"volumes": ["storage"], "formatted": many},
        {"volumes": ["storage"], "rekey": many},
    ):
        status, _, told = refusal(world.sync("x", body))
        assert (status, "and 896 more" in told) == (400, True)
        assert len(told) < 500
    status, _, told = refusal(world.sync("x", {"volumes": ["v" * 60000]}))
    assert (status, f"['{'v' * 64}']. Supported" in told) == (400, True)


def test_a_token_is_one_vms_of_one_hotkey(world):
    token = world.token()
    other = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
    mismatch = refusal(world.sync(token, BOTH, hotkey=other))
    assert mismatch == (401, Code.HOTKEY_MISMATCH, "Hotkey does not match boot token")
    assert refusal(world.sync(token, BOTH, vm="vm-2")) == (
        401,
        Code.VM_NAME_MISMATCH,
        "VM name does not match boot token",
    )
    world.certificate = CERTIFICATES[1]
    assert refusal(world.sync(token, BOTH))[:2] == (401, Code.BOOT_TOKEN_INVALID)
    world.certificate = CERTIFICATES[0]
    assert answer(world.sync(token, BOTH))


def test_a_token_ends(world):
    token = world.token()
    world.now += 600
    assert refusal(world.sync(token, BOTH))[:2] == (401, Code.BOOT_TOKEN_INVALID)


def test_a_lost_answer_is_given_again_to_its_caller_alone(world):
    token = world.token()
    body = b'{"volumes":["storage","tdx-cache"],"rekey":["storage"]}'
    first = world.sync(token, body)
    again = world.sync(token, body)
    assert answer(first)
    assert again.body == first.body
    assert len(world.rows(GenerationRow)) == 3  # storage, tdx-cache, and root: nothing was done twice
    assert refusal(world.sync(token, body + b" "))[:2] == (401, Code.BOOT_TOKEN_INVALID)  # other bytes
    world.certificate = None
    assert refusal(world.sync(token, body))[:2] == (401, Code.BOOT_TOKEN_INVALID)


def test_a_profile_can_demand_the_certificate(world):
    world.app = App(service(profiles={PROFILE.identity: ServedProfile(PROFILE, None, False, True)}))
    token = world.token()
    world.certificate = None
    assert refusal(world.sync(token, BOTH))[:2] == (401, Code.BOOT_TOKEN_INVALID)
    assert refusal(legacy(world, token))[:2] == (401, Code.BOOT_TOKEN_INVALID)
    world.certificate = CERTIFICATES[0]
    assert answer(world.sync(token, BOTH))


def test_rekey_prune_and_revive(world):
    first = answer(world.sync(world.token(), BOTH))
    rekeyed = answer(world.sync(world.token(), BOTH | {"rekey": ["storage"]}))
    assert rekeyed["storage"] != first["storage"]
    assert rekeyed["tdx-cache"] == first["tdx-cache"]
    assert list(answer(world.sync(world.token(), {"volumes": ["storage"]}))) == ["storage"]
    revived = answer(world.sync(world.token(), BOTH))
    assert revived["tdx-cache"] == first["tdx-cache"]  # the disk was only missing for one boot
    assert all(row.sealed for row in world.rows(GenerationRow))  # nothing is ever removed


def test_in_use_says_which_disks_hold_data(world):
    assert answer(world.sync(world.token(), BOTH | {"formatted": []}))["in_use"] == []
    assert answer(world.sync(world.token(), BOTH | {"formatted": ["storage"]}))["in_use"] == ["storage"]
    assert answer(world.sync(world.token(), BOTH | {"formatted": []}))["in_use"] == ["storage"]


def busy_for(world: World, times: int) -> None:
    left = [times]

    def fail(effect: object) -> None:
        if isinstance(effect, Transact) and left[0]:
            left[0] -= 1
            raise StoreBusy("locked")

    world.before = fail


def test_a_busy_store_is_waited_for(world):
    token = world.token()
    busy_for(world, 40)
    start = world.uptime
    assert answer(world.sync(token, BOTH))
    assert 19 < world.uptime - start < 21


def test_but_not_longer_than_the_client_waits(world):
    token = world.token()
    busy_for(world, 1000)
    start = world.uptime
    response = world.sync(token, BOTH)
    assert refusal(response)[:2] == (503, Code.STORE_UNAVAILABLE)
    assert response.header("retry-after")
    assert 24 < world.uptime - start <= 25
    world.before = lambda _: None
    assert answer(world.sync(token, BOTH))


def lost_at_the_commit(world: World) -> None:
    """The next transaction is committed, and its caller hears nothing of that."""

    def commit_and_fail(effect: object) -> None:
        if isinstance(effect, Transact):
            world.before = lambda _: None
            _ = world.store.transact(effect.unit)
            raise FateUnknown("lost at the commit")

    world.before = commit_and_fail


def test_a_sync_whose_commit_was_not_answered_is_asked_again_and_done_once(world):
    token = world.token()
    lost_at_the_commit(world)
    keys = answer(world.sync(token, BOTH))
    (boot,) = world.rows(BootRow)
    assert boot.spent_at is not None
    assert [row.generation for row in world.rows(GenerationRow) if row.volume != "root"] == [1, 1]
    assert answer(world.sync(token, BOTH)) == keys


def test_a_boot_whose_commit_was_not_answered_is_not_run_again(world):
    """Its nonce may be redeemed, and a 401 would be final; the client begins again with another nonce."""
    nonce = world.nonce()
    lost_at_the_commit(world)
    assert refusal(world.boot(nonce))[:2] == (503, Code.STORE_UNAVAILABLE)
    assert answer(world.boot())


def test_no_transaction_starts_too_late(world):
    token = world.token()
    transactions = len([effect for effect in world.asked if isinstance(effect, Transact)])
    headers = {"x-boot-token": token, "x-chutes-hotkey": HOTKEY}
    late = world.ask("POST", "/servers/vm-1/luks", BOTH, headers=headers, arrived=world.uptime - 25.1)
    assert refusal(late)[:2] == (503, Code.STORE_UNAVAILABLE)
    assert len([effect for effect in world.asked if isinstance(effect, Transact)]) == transactions
    assert answer(world.ask("POST", "/servers/vm-1/luks", BOTH, headers=headers, arrived=world.uptime - 24.9))


def test_the_description_is_served(world):
    assert world.ask("GET", "/openapi.json").body == openapi.document()


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("GET", "/", (404, Code.NOT_FOUND, "Not Found")),
        ("GET", "/servers/a%2Fb/luks", (404, Code.NOT_FOUND, "Not Found")),
        ("DELETE", "/servers/nonce", (405, Code.METHOD_NOT_ALLOWED, "Method Not Allowed")),
        ("PUT", "/servers/vm-1/luks?hotkey=5x", (405, Code.METHOD_NOT_ALLOWED, "Method Not Allowed")),
    ],
)
def test_other_paths_and_verbs(world, method, target, expected):
    response = world.ask(method, target)
    assert refusal(response) == expected
    assert (response.header("allow") is not None) == (expected[0] == 405)


def test_a_final_slash_is_redirected(world):
    """By a relative reference, that holds behind any proxy and repeats nothing of the request's Host."""
    response = world.ask("GET", "/servers/nonce/?a=1", headers={"host": "keys.example:8443"})
    assert (response.status, response.header("location"), response.body) == (307, "../nonce?a=1", b"")
    assert urljoin("https://proxy:8443/mount/servers/nonce/?a=1", "../nonce?a=1").endswith("/mount/servers/nonce?a=1")


def test_head_is_served_where_get_is(world):
    """The transport leaves the body out (RFC 9110, section 9.3.2)."""
    got, asked = world.ask("GET", "/openapi.json"), world.ask("HEAD", "/openapi.json")
    assert (asked.status, asked.body) == (got.status, got.body) == (200, got.body)
    assert world.ask("HEAD", "/servers/boot/attestation").status == 405


def test_every_answer_has_a_date(world):
    for response in (world.ask("GET", "/servers/nonce"), world.ask("GET", "/")):
        assert parsedate_to_datetime(response.header("date")).timestamp() == world.now


def test_the_operator_reads_the_reason_under_the_request_id(world):
    response = world.sync("x", BOTH)
    (record,) = [record for record in world.log if record.event == "refused"]
    assert record.fields["request_id"] == content(response)["request_id"]
    assert record.fields["code"] == Code.BOOT_TOKEN_INVALID


def test_many_refusals_are_counted_not_printed(world):
    for _ in range(100):
        assert refusal(world.ask("GET", "/nothing"))
    assert len(world.log) == 20
    world.uptime += 5
    assert refusal(world.ask("GET", "/nothing"))
    assert world.log[-1].fields["held_back"] == 80


@given(
    method=st.sampled_from(["GET", "POST", "DELETE", "HEAD", "x"]),
    target=st.sampled_from(["/servers/nonce", "/servers/boot/attestation", "/servers/vm-1/luks"])
    | st.text(max_size=40),
    headers=st.dictionaries(
        st.sampled_from(["x-boot-token", "x-chutes-hotkey", "x-chutes-nonce", "x-chutes-signature", "content-type"]),
        st.text(st.characters(max_codepoint=255), max_size=80),
    ),
    body=st.binary(max_size=100),
)
def test_any_request_gets_an_answer_of_the_documented_shape(method, target, headers, body):
    world = World()
    response = world.ask(method, target, body, headers=headers)
    assert response.status < 500
    if response.status >= 400:
        assert refusal(response)


def test_bytes_that_never_became_a_request_have_an_id_and_a_line_too(world):
    malformed = MalformedRequest(BadRequest(Code.REQUEST_TIMEOUT, "Request timeout"), "192.0.2.1")
    response = run(world.app.handle(malformed), world.perform)
    assert refusal(response) == (408, Code.REQUEST_TIMEOUT, "Request timeout")
    (record,) = world.log
    assert record.fields["request_id"] == content(response)["request_id"]
    assert record.fields["peer"] == "192.0.2.1"


def test_a_draining_server_ends_connections_with_their_next_answer(world):
    assert world.ask("GET", "/openapi.json").header("connection") is None
    world.app.draining = True
    assert world.ask("GET", "/openapi.json").header("connection") == "close"


def test_junk_does_not_silence_the_line_about_a_genuine_vm(world):
    for _ in range(50):
        assert refusal(world.ask("GET", "/nothing"))
    world.platform = world.platform.having("rtmr1")
    response = world.boot()
    assert refusal(response)[1] == Code.MEASUREMENT_MISMATCH
    assert world.log[-1].fields["request_id"] == content(response)["request_id"]
    assert "RTMR1" in str(world.log[-1].fields["reason"])


def test_every_line_of_a_grant_says_which_root_is_trusted(world):
    token = world.token()
    assert answer(world.sync(token, BOTH))
    assert answer(legacy(world, world.token()))
    granted = [record for record in world.log if record.event in ("boot_granted", "volumes_synced", "passphrase_read")]
    assert len(granted) == 4
    assert {record.fields["trust"] for record in granted} == {"simulated"}


@pytest.mark.parametrize("name", ["x-client-cert", "client-cert", "x-forwarded-for", "x-attestation-proxy-auth"])
def test_without_a_proxy_nobody_may_speak_as_one(world, name):
    assert refusal(world.ask("GET", "/servers/nonce", headers={name: "x"}))[:2] == (400, Code.BAD_REQUEST)


def test_faults_of_connections_cannot_fill_the_log(world):
    for _ in range(100):
        assert run(world.app.complain("connection_failed", RuntimeError("a defect")), world.perform) is None
    assert len(world.log) == 20
    assert world.log[0].fields == {"error": "RuntimeError: a defect"}
