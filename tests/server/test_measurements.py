"""Operations 15 and 19 as strangers may ask them, and paths that nobody serves."""

from __future__ import annotations

import pytest
from attrs import evolve

from chutes_proto.server._app import App
from chutes_proto.server._profiles import ServedProfile, check_signing_keys
from chutes_proto.testing._platform import PROFILE
from chutes_proto.wire import json
from chutes_proto.wire.codes import Code
from tests.server.world import World, answer, refusal, service


def test_the_measurements_are_encoded_once_for_each_service() -> None:
    one = World()
    first, again = (one.ask("GET", "/servers/tee/measurements") for _ in "12")
    assert first.body is again.body
    renamed = evolve(PROFILE, name="other")
    other = evolve(one.app.service, profiles={renamed.identity: ServedProfile(renamed, None, False, False)})
    (listed,) = answer(World(App(other)).ask("GET", "/servers/tee/measurements"))
    assert listed["name"] == "other"
    assert [told["name"] for told in answer(World(App(service())).ask("GET", "/servers/tee/measurements"))] == [
        PROFILE.name
    ]


def test_signing_keys_are_public_and_the_operators_own() -> None:
    keys = {"version": 3, "keys": {"cosign/chutes.pub": "QQ=="}, "signatures": {"cosign/chutes.pub": "Qg=="}}
    world = World(App(service(signing_keys=check_signing_keys(json.encode(keys)))))
    assert answer(world.ask("GET", "/servers/signing-keys")) == keys
    unset = refusal(World(App(service())).ask("GET", "/servers/signing-keys"))
    assert unset == (503, Code.SIGNING_KEYS_UNAVAILABLE, "Signing keys bundle not available")
    for wrong in (
        b"[]",
        b'{"version":"1","keys":{},"signatures":{}}',
        b'{"version":1,"keys":{"a":"b"},"signatures":{}}',
    ):
        with pytest.raises(ValueError, match="signature in base64 for each key"):
            _ = check_signing_keys(wrong)


@pytest.mark.parametrize(
    "target",
    [
        *("GET /servers/n1/maintenance/other", "POST /servers/snp/host_profiles", "POST /servers/sgx/preflight"),
        *("GET /miner/other", "PUT /servers/vm-1/vm-root-ca", "GET /elsewhere"),
    ],
)
def test_a_path_that_is_not_served_is_404_before_anybody_is_authenticated(target: str) -> None:
    assert refusal(World().ask(*target.split())) == (404, Code.NOT_FOUND, "Not Found")
