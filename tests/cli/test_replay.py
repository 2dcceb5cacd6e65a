"""`replay`: whose log it is, where two boots part, exit codes, and files that are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chutes_proto.quote._eventlog import parse_event_log
from chutes_proto.quote._layout import parse_quote
from chutes_proto.testing._platform import SimulatedPlatform
from tests.cli.conftest import Ended
from tests.quote.logs import EVENTS, as_json, grub, log

QUOTE = SimulatedPlatform(bytes(32)).quote(bytes(64))


def quote_of(data: bytes) -> bytes:
    """A quote, signed by nobody, with the registers that a log replays to."""
    start = QUOTE.index(b"".join(parse_quote(QUOTE).body.rtmrs))  # type: ignore[union-attr]
    return QUOTE[:start] + b"".join(parse_event_log(data).rtmrs) + QUOTE[start + 4 * 48 :]


@pytest.fixture
def replay(command: Callable[..., Ended], tmp_path: Path) -> Callable[..., Ended]:
    """Writes a log, a quote and perhaps a good log, then runs the command."""

    def run(data: bytes, quote: bytes, *options: str, good: bytes | None = None) -> Ended:
        _ = (tmp_path / "log").write_bytes(data)
        _ = (tmp_path / "quote").write_bytes(quote)
        against: list[object] = []
        if good is not None:
            _ = (tmp_path / "good").write_bytes(good)
            against = ["--against", tmp_path / "good"]
        return command("replay", tmp_path / "log", "--quote", tmp_path / "quote", *against, *options)

    return run


GOOD = log(*EVENTS)
OTHER = log(*EVENTS[:-1], grub("kernel_cmdline", b"init=/bin/sh"))


def test_a_log_of_the_quote(replay: Callable[..., Ended]) -> None:
    said = replay(GOOD, quote_of(GOOD), "--json", good=GOOD)
    assert said.code == 0
    assert (said.json["accepted"], said.json["replayed"], said.json["refusals"]) == (True, True, [])
    assert said.json["secure_boot"] is True
    assert said.json["kernel_command_lines"] == ["/vmlinuz root=/dev/vda1 ro"]
    told = replay(GOOD, quote_of(GOOD))
    assert told.code == 0
    assert told.out.startswith("ACCEPTED: the log replays to the RTMRs of the quote\n")
    assert "was not verified" in told.out


def test_a_log_in_json(replay: Callable[..., Ended]) -> None:
    said = replay(as_json(GOOD), quote_of(GOOD), "--json", good=as_json(GOOD))
    assert (said.code, said.json["refusals"]) == (0, [])
    said = replay(as_json(OTHER), quote_of(OTHER), "--json", good=as_json(GOOD))
    assert [refusal["code"] for refusal in said.json["refusals"]] == ["event_log_difference"]
    for wrong in (b'{"event_log": []}', b" [{}]"):
        said = replay(wrong, quote_of(GOOD), "--json")
        assert (said.code, said.json["refusals"][0]["code"]) == (1, "event_log_format")
        assert "Spec ID" not in said.json["refusals"][0]["detail"]


def test_a_log_of_another_boot(replay: Callable[..., Ended]) -> None:
    said = replay(GOOD, quote_of(OTHER), "--json")
    assert said.code == 1
    assert said.json["register"] == "RTMR2"
    assert [refusal["code"] for refusal in said.json["refusals"]] == ["event_log_mismatch"]
    assert "kernel_command_lines" not in said.json
    assert replay(GOOD, quote_of(OTHER)).out.startswith("REFUSED: the log does not replay")


def test_where_a_boot_went_another_way(replay: Callable[..., Ended]) -> None:
    said = replay(OTHER, quote_of(OTHER), "--json", good=GOOD)
    assert (said.code, said.json["replayed"]) == (1, True)
    assert [refusal["code"] for refusal in said.json["refusals"]] == ["event_log_difference"]
    told = replay(OTHER, quote_of(OTHER), good=GOOD).out.splitlines()
    assert told[0] == "REFUSED: the log replays to the RTMRs of the quote, but differs from the good boot's"
    difference = said.json["difference"]
    assert (difference["register"], difference["got"]["number"], difference["expected"]["number"]) == ("RTMR2", 8, 8)
    assert bytes.fromhex(difference["got"]["data"]) == b"kernel_cmdline: init=/bin/sh\0"
    assert said.json["parsed"] is True
    shorter = replay(log(*EVENTS[:-1]), quote_of(GOOD), "--json", good=GOOD)
    assert shorter.json["difference"]["got"] is None
    assert [r["code"] for r in shorter.json["refusals"]] == ["event_log_difference", "event_log_mismatch"]


def test_each_file_that_is_none_is_named(replay: Callable[..., Ended], tmp_path: Path) -> None:
    headline = "REFUSED: nothing was compared, because a file does not parse\n"
    told = replay(GOOD, quote_of(GOOD), good=GOOD[:300]).out
    assert told.startswith(f"{headline}event_log_format: {tmp_path}/good: ")
    assert f"{tmp_path}/log" not in told
    told = replay(b"", b"none", good=GOOD[:300]).out
    assert told.startswith(headline)
    assert [line.split(": ")[:2] for line in told.splitlines()[1:4]] == [
        ["event_log_format", f"{tmp_path}/log"],
        ["quote_too_short", f"{tmp_path}/quote"],
        ["event_log_format", f"{tmp_path}/good"],
    ]
