"""Which collateral serves a platform: never an old file, never another platform's, and an error that helps."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve
from msgspec.structs import replace

from chutes_proto._proof import PROOF
from chutes_proto.collateral.library import Item, choose
from chutes_proto.errors import CollateralUnavailable
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._verify import open_quote, verify_collateral
from chutes_proto.testing._platform import COLLATERAL_SECONDS, SimulatedPlatform

NOW = 1_780_000_000
END = NOW + COLLATERAL_SECONDS
PLATFORM = SimulatedPlatform(bytes(32))
ROOT = TrustedRoot.from_der(PLATFORM.root_der)


def identity(platform: SimulatedPlatform = PLATFORM) -> PckIdentity:
    return open_quote(platform.quote(bytes(64)), now=NOW, root=ROOT).pck


def verified(platform: SimulatedPlatform = PLATFORM, at: int = NOW) -> VerifiedCollateral:
    return verify_collateral(Collateral.from_json(platform.collateral_json(at)), now=at, root=ROOT)


def numbered(number: int, at: int = NOW) -> VerifiedCollateral:
    content = verified(at=at)
    return evolve(
        content,
        proof=PROOF,
        issue=replace(content.issue, tcb_info_number=number, qe_identity_number=number),
    )


def missing(*items: Item, wanted: PckIdentity | None = None, now: int = NOW) -> str:
    with pytest.raises(CollateralUnavailable) as caught:
        _ = choose(items, wanted or identity(), now, "/source")
    return str(caught.value)


def test_each_platform_gets_its_own() -> None:
    others = [PLATFORM.another(1), evolve(PLATFORM, ca="processor")]
    items = [Item(str(index), verified(platform)) for index, platform in enumerate([PLATFORM, *others])]
    for index, platform in enumerate([PLATFORM, *others]):
        assert choose(items, identity(platform), NOW, "") is items[index].content
    for platform in others:
        text = missing(items[0], wanted=identity(platform))
        assert f"no collateral for FMSPC {platform.fmspc.hex()}, {platform.ca} CA, TDX" in text
    assert "SGX" in missing(items[0], wanted=replace(identity(), tee="SGX"))


@pytest.mark.parametrize(("now", "clock"), [(NOW - 1, ", or set this machine's clock right"), (END + 1, "")])
def test_what_is_not_valid_now_is_missing_and_named(now: int, clock: str) -> None:
    text = missing(Item("/source/a.json", verified()), now=now)
    assert f"is in /source: put a fresh file there{clock}; /source/a.json: FMSPC" in text
    assert "valid 2026-05-28T20:26:40Z to 2026-06-27T20:26:40Z" in text


@pytest.mark.parametrize("wrong", [float("nan"), float(NOW), True])
def test_a_time_is_an_integer(wrong: Any) -> None:
    with pytest.raises(TypeError, match="now: must be an int"):
        _ = choose([Item("a", verified())], identity(), wrong, "")


@pytest.mark.parametrize("now", [NOW, END])
def test_both_ends_are_valid(now: int) -> None:
    item = Item("a", verified())
    assert choose([item], identity(), now, "") is item.content


def test_an_old_file_beside_a_new_one_changes_nothing() -> None:
    old, new, newest = numbered(4, at=NOW + 9), numbered(5), numbered(5, at=NOW + 5)
    for order in ([old, new, newest], [newest, new, old]):
        assert choose([Item("", content) for content in order], identity(), NOW + 10, "") is newest
        assert choose([Item("", content) for content in order], identity(), NOW + 2, "") is new


def test_an_old_file_beside_a_new_one_hides_no_revocation() -> None:
    old = PLATFORM.collateral(NOW - 86400)
    revoking = evolve(old, pck_crl=PLATFORM.having("pck_revoked").collateral(NOW).pck_crl)
    items = [Item(name, verify_collateral(each, now=NOW, root=ROOT)) for name, each in (("a", old), ("b", revoking))]
    for order in (items, items[::-1]):
        assert choose(order, identity(), NOW, "") is items[1].content


def test_files_of_no_use_are_named_unless_one_fits() -> None:
    useless = [Item(f"/source/{number}.json", "not JSON") for number in range(7)]
    text = missing(*useless)
    assert "/source" in text
    assert "/source/4.json: unusable: not JSON" in text
    assert "/source/5.json" not in text
    assert "not JSON" not in missing(*useless, Item("old", verified()), now=END + 1)


def test_an_empty_place_is_named() -> None:
    assert "/source" in missing()


def test_past_its_time_only_within_the_grace_and_only_where_nothing_is_valid() -> None:
    stale = verify_collateral(PLATFORM.collateral(NOW), now=NOW, root=ROOT, grace=60)
    ahead = evolve(stale, proof=PROOF, issue=replace(stale.issue, tcb_info_number=99, qe_identity_number=99))
    fresh = verified(at=NOW + 10)
    assert choose([Item("", stale)], identity(), END + 60, "") is stale
    assert "valid" in missing(Item("", stale), now=END + 61)
    for items in ([ahead, fresh], [fresh, ahead]):
        assert choose([Item("", content) for content in items], identity(), END + 1, "") is fresh
