"""`why` on both stores and on a log: what was refused, where it differs, and what to do."""

from __future__ import annotations

import io
import json
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest
from attrs import evolve

from chutes_proto.io.server.setup import make_setup
from chutes_proto.quote._eventlog import parse_event_log
from chutes_proto.server import ServerConfig
from chutes_proto.server._why import Denial, Difference, Finding, explain
from chutes_proto.store._rows import Platform, Vm
from chutes_proto.units.boot import RecordRefusal
from tests.cli import test_operating
from tests.cli.test_operating import HOTKEY, NOW, Site
from tests.quote.logs import EVENTS, as_json, grub, log

site = test_operating.site

FINDING = Finding(
    38, "measurement_mismatch", "the policy accepts it", "boot", "8xh200 1.4.0", (Difference("RTMR1", "aa", "bb"),)
)
ID = "a1" * 16
REFUSED = RecordRefusal(
    now=NOW - 60,
    request_id=ID,
    vm=Vm(HOTKEY, "vm-1"),
    platform=Platform(None, bytes(16)),
    code="measurement_mismatch",
    reason="measurement_mismatch: RTMR1 does not match",
    quote_digest=bytes(32),
    peer_address="192.0.2.1",
    finding=FINDING.to_json(),
)


def record(site: Site, *units: RecordRefusal) -> None:
    with closing(make_setup(ServerConfig.load(site.configuration)).store.open()) as store:
        for unit in units:
            assert store.transact(unit)


@pytest.mark.parametrize("subject", ["vm-1", f"{HOTKEY}/vm-1", HOTKEY, ID, ID.upper()])
def test_by_vm_hotkey_or_request(site: Site, subject: str) -> None:
    earlier = evolve(REFUSED, request_id="2" * 32, now=NOW - 90, code="tcb_rejected", finding=None)
    strangers = evolve(REFUSED, request_id="3" * 32, now=NOW, vm=Vm("another", "vm-2"))
    record(site, earlier, REFUSED, strangers)
    told = site.json("why", subject)
    (refusal,) = told["refusals"]
    assert (refusal["request_id"], refusal["step"], refusal["profile"]) == (ID, 38, "8xh200 1.4.0")
    assert refusal["peer_address"] == "192.0.2.1"
    assert refusal["differences"] == [{"what": "RTMR1", "found": "aa", "expected": "bb"}]
    said = site.do("why", subject).out
    assert f"request {ID}, peer 192.0.2.1: " in " ".join(said.split())
    for part in ("8xh200 1.4.0", "RTMR1: found aa, expected bb", "step 38", "do: if you rolled"):
        assert part in said
    if subject.lower() != ID:
        both = [each["code"] for each in site.json("why", subject, "--last", 9)["refusals"]]
        assert both == ["tcb_rejected", "measurement_mismatch"]
    assert told["granted_at"] is None
    site.boot("1", at=NOW)
    assert site.json("why", subject)["granted_at"] == NOW
    (row,) = site.json("audit", "list", "--request-id", ID)["rows"]
    assert row["request_id"] == ID


def test_what_was_never_refused(site: Site) -> None:
    site.boot("1")
    ended = site.do("why", "vm-1", "--json")
    assert (ended.code, ended.json["ok"]) == (1, False)
    assert "name it with --log" in ended.err
    assert site.do("why", "no name at all").code == 2


def test_the_log_has_what_the_store_has_not(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    record(site, REFUSED)
    denial = Denial("nonce_invalid", "nonce expired", "4" * 32, HOTKEY, "vm-1")
    names = ("code", "reason", "request_id", "hotkey", "vm")
    line = {"at": "2126-11-29T03:34:03.747+00:00", "event": "refused", "step": None, "why": str(explain(denial))}
    line |= {"peer": "192.0.2.2"} | {name: getattr(denial, name) for name in names}
    other = line | {"vm": "vm-2", "request_id": "5" * 32}
    told = [line, other, {**line, "event": "boot_granted"}, "text", None]
    deep = '{"a":' + "[" * 50_000
    text = "Nov 29 host chutes-proto: " + f"\nkernel: {{[\n{deep}\n".join(map(json.dumps, told)) + "\n"
    _ = (site.directory / "log").write_text(text)
    (refusal,) = site.json("why", "vm-1", "--log", site.directory / "log")["refusals"]
    assert (refusal["request_id"], refusal["text"]) == ("4" * 32, line["why"])
    assert refusal["peer_address"] == "192.0.2.2"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    both = site.json("why", "vm-1", "--log", "-", "--last", 5)["refusals"]
    assert [each["request_id"] for each in both] == [ID, "4" * 32]
    assert site.do("why", "vm-1", "--log", site.directory / "nothing").code == 2


def test_an_event_log_names_the_event_that_differs(site: Site) -> None:
    good, other = log(*EVENTS), log(*EVENTS[:-1], grub("kernel_cmdline", b"init=/bin/sh\x1b[2J"))
    found, expected = (parse_event_log(data).rtmrs[2].hex() for data in (other, good))
    differs = (Difference("RTMR2", found, expected), Difference("MRTD", "aa", "bb"))
    record(site, evolve(REFUSED, finding=evolve(FINDING, differences=differs).to_json()))
    for name, data in (("CCEL", other), ("good", good), ("neither", log(*EVENTS[:3])), ("dstack.json", as_json(other))):
        _ = (site.directory / name).write_bytes(data)
    of_vm, against = ("--event-log", site.directory / "CCEL"), ("--against", site.directory / "good")

    (traced,) = site.json("why", "vm-1", *of_vm, *against)["refusals"][0]["event_log"]
    assert (traced["register"], traced["is_of_boot"], traced["is_good"]) == ("RTMR2", True, True)
    said = site.do("why", "vm-1", *of_vm, *against).out
    assert "RTMR2: first event that differs: found event 8" in " ".join(said.split())
    assert "init=/bin/sh" in said
    assert "\x1b" not in said
    of_dstack = ("--event-log", site.directory / "dstack.json")
    (dstack,) = site.json("why", "vm-1", *of_dstack, *against)["refusals"][0]["event_log"]
    assert (dstack["is_of_boot"], dstack["is_good"]) == (True, True)
    (alone,) = site.json("why", "vm-1", *of_vm)["refusals"][0]["event_log"]
    assert (alone["is_of_boot"], alone["is_good"]) == (True, None)
    (strange,) = site.json("why", "vm-1", "--event-log", site.directory / "neither")["refusals"][0]["event_log"]
    assert "is not of this boot" in strange["text"]
    (bad,) = site.json("why", "vm-1", *of_vm, "--against", site.directory / "neither")["refusals"][0]["event_log"]
    assert bad["is_good"] is False
    assert "does not lead to the expected value" in bad["text"]
    assert site.json("why", "vm-1")["refusals"][0]["event_log"] == []

    _ = (site.directory / "bad").write_bytes(b"no log")
    for words in (against, ("--event-log", site.directory / "bad"), ("--event-log", site.directory / "nowhere")):
        assert site.do("why", "vm-1", *words).code == 2
