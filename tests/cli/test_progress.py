"""The texts of the agent at a console: whatever a peer says, they are plain, short and steer nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chutes_proto.cli.agent import progress as module
from chutes_proto.cli.agent.progress import WIDTH, Progress, said
from chutes_proto.errors import DiskError, TransportError, refusal
from chutes_proto.log import LONGEST, Level, Record, Value
from chutes_proto.luks.plan import Format, Key, Open

STEP: dict[str, Value] = {"step": "nonce", "attempt": "2/30", "seconds_left": 7.5}
WHY = {"reason": "later", "code": "busy", "request_id": "r-1"}


def lines(capsys: pytest.CaptureFixture[str], event: str, **fields: Any) -> list[str]:
    Progress(as_json=False, seconds=100.0, server=lambda: "https://a")(Record(Level.INFO, event, fields))
    out, err = capsys.readouterr()
    assert out == ""
    return [line.removeprefix("  100s ").strip() for line in err.splitlines()]


def test_the_longest_text_of_a_peer_leaves_a_slow_console_to_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    """The result of a volume is any text of at most a mebibyte; a console of 115,200 baud takes 90 s for that."""
    said = lines(capsys, "rotation_confirmed", volumes=["storage: " + "x " * 500_000])
    assert len(" ".join(said)) < 2 * LONGEST


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(), st.text(max_size=50))
def test_no_text_steers_a_terminal_or_breaks_the_width(
    capsys: pytest.CaptureFixture[str], text: str, name: str
) -> None:
    for event in ("boot_delayed", "boot_stopped", "disk_failed", "disk_found", "strange"):
        fields = {**STEP, "wait": 1.0, "reason": text, "text": text, "volume": name, "holds": text, "request_id": name}
        Progress(as_json=False, seconds=100.0, server=lambda: text)(Record(Level.INFO, event, {**fields, "code": "x"}))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.isascii()
    for line in err.split("\n"):
        assert len(line) <= WIDTH
        assert line == "" or line.isprintable()


def test_records_for_programs_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(as_json=True, seconds=100.0, server=lambda: "https://a")
    progress(Record(Level.WARNING, "boot_delayed", {**STEP, "reason": "a\nb\x1b"}))
    progress.tell("quotes come from tsm")
    progress.finish("agent_failed", {"reason": "x"}, [("", "BOOT FAILED")], failed=True)
    out, err = capsys.readouterr()
    assert err == ""
    first, told, last = [json.loads(line) for line in out.splitlines()]
    assert (first["level"], first["reason"], first["server"], first["seconds_left"]) == (
        *("warning", "a\nb\x1b"),
        *("https://a", 7.5),
    )
    assert (told["event"], told["text"]) == ("told", "quotes come from tsm")
    assert (last["event"], last["level"], last["reason"]) == ("agent_failed", "error", "x")


MADE = Format("a", "/dev/a", Key.CURRENT)
OPENED = Open("a", "/dev/a", "a", (Key.CURRENT,))


def test_what_was_done_to_disks_is_remembered() -> None:
    progress = Progress(as_json=True, seconds=100.0)
    for action in (MADE, OPENED):
        progress(Record(Level.INFO, "disk_action", {**action.as_dict()}))
        assert progress.written == ([] if action is MADE else [str(MADE)])  # not begun yet
        progress.acts(action)
    assert progress.written == [str(MADE)]


def test_what_was_begun_and_failed_is_not_told_as_done() -> None:
    progress = Progress(as_json=True, seconds=100.0)
    failed = Record(Level.ERROR, "disk_failed", {"volume": "a", "text": "no"})
    progress.acts(MADE)
    progress.acts(OPENED)
    progress(failed)
    assert progress.written == [str(MADE)]  # what failed was to open it
    progress.acts(MADE)
    progress(failed)
    assert progress.written[1:] == [f"{MADE}: FAILED"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_console_that_takes_nothing_is_given_up(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the test would never end: nobody reads from the pipe, and it is full."""
    monkeypatch.setattr(module, "STUCK", 0.1)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with pytest.raises(BlockingIOError):
        while True:
            _ = os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    with os.fdopen(writing, "w") as console:
        monkeypatch.setattr(sys, "stdout" if as_json else "stderr", console)
        progress = Progress(as_json=as_json, seconds=100.0)
        for _ in range(3):
            progress.tell("x" * 70)
        progress.finish("agent_failed", {}, [("", "BOOT FAILED")], failed=True)
        assert os.path.samestat(os.fstat(writing), Path(os.devnull).stat())
    os.close(reading)


def test_errors_as_fields() -> None:
    assert said(refusal(403, "x", "no", request_id="r"), {}) == {
        "reason": "no",
        "status": "403",
        "code": "x",
        "request_id": "r",
    }
    assert said(DiskError("kind", "no", "/dev/a"), {}) == {"reason": "/dev/a: no", "code": "kind", "device": "/dev/a"}
    assert said(TransportError("cut", maybe_delivered=False), {}) == {"reason": "cut", "error": "TransportError"}


def test_the_record_of_what_stopped_counts_for_peers_texts() -> None:
    progress = Progress(as_json=True, seconds=100.0)
    progress(Record(Level.ERROR, "boot_stopped", {**STEP, "reason": "not ***", "code": "x", "request_id": "***"}))
    error = refusal(403, "x", "not a-token", request_id="a-token")
    assert said(error, progress.stopped) == {"reason": "not ***", "status": "403", "code": "x", "request_id": "***"}
    progress(Record(Level.WARNING, "rotation_undecided", {"volumes": ["a"], **WHY}))
    assert progress.stopped == {}
