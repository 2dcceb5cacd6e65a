"""A fault of the server's collateral is never a VM's: a 503, nothing consumed, and a fetch that mends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from attrs import define, evolve

from chutes_proto.effects import Effect, FetchCollateral
from chutes_proto.quote._verify import authenticate_collateral
from chutes_proto.testing._faults import Fault
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.wire.codes import Code
from tests.server.world import NOW, World, answer, refusal

Changed = Callable[[SimulatedPlatform], SimulatedPlatform]


def having(**changes: Any) -> Changed:
    """A platform with these drafts changed."""
    return lambda platform: platform.having(Fault(name="made here", side="collateral", what="", **changes))


@define(eq=False)
class Collected(World):
    """A world whose collateral is of the platform ``changed``, and takes ``slow`` seconds to come."""

    changed: Changed = lambda platform: platform
    slow: int = 0

    def perform(self, effect: Effect[Any]) -> Any:
        if not isinstance(effect, FetchCollateral):
            return super().perform(effect)
        self.asked.append(effect)
        collateral = self.changed(self.platform).collateral(NOW)
        self.now += self.slow
        return authenticate_collateral(collateral, root=self.app.service.root)


@pytest.fixture
def world() -> Collected:
    return Collected()


def refused(world: Collected) -> str:
    """The operator's reason, of a refusal for collateral, which is not final and consumed nothing."""
    nonce = world.nonce()
    response = world.boot(nonce)
    assert refusal(response)[:2] == (503, Code.COLLATERAL_UNAVAILABLE)
    assert response.header("retry-after") == "10"
    reason = str(world.log[-1].fields["reason"])
    world.changed, world.slow, world.now = lambda platform: platform, 0, NOW
    assert answer(world.boot(nonce))
    return reason


def ends(draft: Any) -> Any:
    return evolve(draft, not_after=NOW + 1)


def begins(draft: Any) -> Any:
    return evolve(draft, not_before=NOW + 60)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tcb_signer": ends}, "certificate_expired: TCB signing certificate"),
        ({"intermediate": ends}, "certificate_expired: PCK CA certificate"),
        ({"tcb_info": lambda draft: evolve(draft, next_update=NOW + 1)}, "collateral_expired: TCB info"),
        ({"pck_crl": lambda draft: evolve(draft, next_update=NOW + 1)}, "collateral_expired: PCK CRL"),
        ({"tcb_signer": begins}, "certificate_not_yet_valid: TCB signing certificate"),
        ({"qe_identity": lambda draft: evolve(draft, issued=NOW + 60)}, "collateral_not_yet_valid: QE identity"),
    ],
)
def test_its_time(world: Collected, changes: dict[str, Any], reason: str) -> None:
    world.changed, world.slow = having(**changes), 2
    assert reason in refused(world)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"intermediate": lambda draft: evolve(draft, key="another CA's")}, "collateral_ca: "),  # its name is the same
        ({"other_ca": True}, "collateral_ca: "),
        ({"tcb_info": lambda draft: evolve(draft, fmspc=bytes(6))}, "fmspc_mismatch: "),
        ({"tcb_info": lambda draft: evolve(draft, pce_id=b"\0\1")}, "pce_id_mismatch: "),
        ({"chain_beside": 1}, "pck_chain_mismatch: "),
    ],
)
def test_that_it_is_another_platforms(world: Collected, changes: dict[str, Any], reason: str) -> None:
    world.changed = having(**changes)
    assert reason in refused(world)


def test_that_it_is_of_two_tcb_recoveries(world: Collected) -> None:
    world.changed = having(qe_identity=lambda draft: evolve(draft, evaluation_number=draft.evaluation_number + 1))
    assert "evaluation_numbers: TCB info and QE identity are of two TCB recoveries" in refused(world)


def _asked_instead(world: Collected) -> bool:
    last = world.asked[-1]
    return isinstance(last, FetchCollateral) and last.instead_of is not None


def test_a_new_key_of_its_ca_is_asked_for_once(world: Collected) -> None:
    """The first collateral is under the old key of the CA, the second under the new one of the platform."""
    renewed = having(intermediate=lambda draft: evolve(draft, key="renewed"))
    world.platform = renewed(world.platform)
    honest = SimulatedPlatform(world.platform.seed)
    world.changed = lambda platform: platform if _asked_instead(world) else honest
    assert answer(world.boot())
    asked = [effect.instead_of is None for effect in world.asked if isinstance(effect, FetchCollateral)]
    assert asked == [True, False]


@pytest.mark.parametrize("fault", ["pck_revoked", "qe_mrsigner", "tcb_revoked"])
def test_what_it_says_of_the_platform_is_final(world: Collected, fault: str) -> None:
    world.platform = world.platform.having(fault)
    assert refusal(world.boot())[:2] == (403, Code.QUOTE_REJECTED)


def test_a_platforms_own_certificate_that_ends_is_its_own_fault(world: Collected) -> None:
    world.platform = having(pck=ends)(world.platform)
    world.slow = 2
    assert refusal(world.boot())[:2] == (403, Code.QUOTE_REJECTED)
