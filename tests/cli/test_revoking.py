"""`revoke`, `allow` and `revocations`, on both stores."""

from __future__ import annotations

import pytest

from chutes_proto.errors import Refused
from tests.cli import test_operating
from tests.cli.test_operating import HOTKEY, Site

site = test_operating.site


def test_a_vm_is_shut_out_and_allowed_again(site: Site) -> None:
    site.boot("1")
    told = site.json("vm", "revoke", "vm-1", "--until", "2126-12-24", "--reason", "owner left")
    assert (told["subject"], told["ends_at"]) == (f"{HOTKEY}/vm-1", 4_953_744_000)
    assert [(vm["vm"], vm["last_boot_at"] > 0) for vm in told["vms"]] == [("vm-1", True)]
    with pytest.raises(Refused, match="revoked"):
        site.boot("2")
    said = site.do("vm", "revoke", "vm-1", "--reason", "for ever").out
    assert "revoked for good; a VM of it that runs goes on" in said
    (row,) = site.json("revocations")["revocations"]
    assert (row["kind"], row["ends_at"], row["in_force"]) == ("vm", None, True)
    assert row["reason"].endswith(": for ever")
    assert site.do("vm", "allow", "vm-1").code == 0
    assert site.do("vm", "allow", "vm-1").code == 1
    site.boot("3")
    assert site.do("revocations").out == "nothing is revoked\n"
    events = [(row["event"], row["vm"]) for row in site.json("audit", "list", "--vm", "vm-1")["rows"]]
    assert [event for event in events if event[0] not in ("boot", "sync")] == [
        ("vm revoked", "vm-1"),
        ("vm revoked", "vm-1"),
        ("vm allowed", "vm-1"),
    ]


def test_a_hotkey_and_a_platform_with_all_its_vms(site: Site) -> None:
    site.boot("1")
    (listed,) = site.json("vm", "list")["vms"]
    kind, _, value = listed["platform"].partition(":")
    for words in (("hotkey", "revoke", HOTKEY), ("platform", "revoke", f"--{kind}", value)):
        told = site.json(*words)
        assert [vm["vm"] for vm in told["vms"]] == ["vm-1"]
        with pytest.raises(Refused, match="revoked"):
            site.boot("2")
        assert site.do(words[0], "allow", *words[2:]).code == 0
    site.boot("3")
    never = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
    assert site.json("hotkey", "revoke", never)["vms"] == []  # before it was ever seen
    assert site.json("vm", "revoke", f"{never}/vm-7")["vms"] == []


@pytest.mark.parametrize(
    "words",
    [
        ("vm", "revoke", "vm-1", "--until", "2020-01-01"),
        ("platform", "revoke"),
        ("platform", "allow", "--ppid", "00" * 16, "--instance", "00" * 16),
        ("platform", "revoke", "--ppid", "00"),
        ("hotkey", "revoke", "nobody"),
    ],
)
def test_wrong_usage_changes_nothing(site: Site, words: tuple[str, ...]) -> None:
    site.boot("1")
    assert site.do(*words).code == 2
    assert site.json("revocations")["revocations"] == []
