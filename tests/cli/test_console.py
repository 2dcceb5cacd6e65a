"""The part that every command shares: how its options are read."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from chutes_proto.cli.console import moment, say_json, say_json_lines, say_json_list
from tests.cli.conftest import PROGRAM


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (os.fsdecode(b"quote\xff.bin"), r"quote\udcff.bin"),
        ("\ud800\U0001f600\udc00", "\\ud800\U0001f600\\udc00"),
        (r"\ud800", r"\ud800"),
        ("\\\udcff\\", r"\\udcff" + "\\"),
        ("\U0001f600", "\U0001f600"),
    ],
    ids=ascii,
)
def test_json_has_no_lone_surrogate(name: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A name of a file may be any bytes; many readers of JSON would refuse the whole result for it."""
    say_json({"file": name, name: 1})
    say_json_list({"a": 1}, "files", [name])
    say_json_lines([name])
    one, listed, line = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one, listed["files"], line) == ({"file": told, told: 1}, [told], told)
    assert told.encode()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("1780000000", 1_780_000_000),
        ("253402300799", 253_402_300_799),
        ("123456789", 123_456_789),
        ("1970-01-01", 0),
        ("2026-05-28", 1_779_926_400),
        ("2026-05-28T20:26:40Z", 1_780_000_000),
        ("2026-05-28T20:26:40", 1_780_000_000),
        ("2026-05-28 20:26:40+00:00", 1_780_000_000),
        ("2026-05-28T22:26:40.999+02:00", 1_780_000_000),
        ("9999-12-31T23:59:59Z", 253_402_300_799),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert moment(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "-1", "1.5", "1e9", "253402300800", "9" * 5000, "tomorrow", "2026-02-30", "2026-05", "2026-W22-4"),
        "20260528",
        *("2026-05-28T25:00:00Z", "2026-05-28T20:26Z", "0001-01-01T00:00:00+23:59", "1969-12-31"),
        *("9999-12-31T23:59:59-00:01", "\u0661\u0667", "2026-05-28\n", "2026-05-28T20:26:40+24:00"),
    ],
)
def test_what_is_no_time_is_told_both_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"2026-05-28, 2026-05-28T20:26:40Z or 1780000000"):
        _ = moment(text)


@pytest.mark.parametrize("words", [("simulate", "--list-faults"), ("--help",)], ids=" ".join)
def test_a_full_disk_behind_standard_output_is_told(words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAM, *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (
        2,
        "chutes-proto: standard output: No space left on device\n",
    )
