"""Operation 15 as strangers may ask it: often."""

from __future__ import annotations

from attrs import evolve

from chutes_proto.quote._policy import Policy
from chutes_proto.server._app import App
from chutes_proto.testing._platform import PROFILE
from tests.server.world import World, answer, service


def test_the_measurements_are_encoded_once_for_each_service() -> None:
    one = World()
    first, again = (one.ask("GET", "/servers/tee/measurements") for _ in "12")
    assert first.body is again.body
    other = evolve(one.app.service, policy=Policy(profiles=(evolve(PROFILE, name="other"),)))
    (listed,) = answer(World(App(other)).ask("GET", "/servers/tee/measurements"))
    assert listed["name"] == "other"
    assert [told["name"] for told in answer(World(App(service())).ask("GET", "/servers/tee/measurements"))] == [
        PROFILE.name
    ]
