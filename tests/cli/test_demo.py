"""`demo` end to end, and that it can fail."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from chutes_proto.cli import show
from chutes_proto.testing._platform import SimulatedPlatform
from tests.cli.conftest import PROGRAM, Ended

REFUSED = {
    "a replayed nonce": "401 nonce_invalid; operator reads: nonce",
    "a quote for another TLS key": "403 certificate_mismatch; operator reads: ",
    "a wrong measurement": "403 measurement_mismatch; operator reads: measurement_mismatch: RTMR1",
    "a debug TD": "403 attributes_rejected; operator reads: debug: ",
    "a revoked PCK certificate": "403 quote_rejected; operator reads: pck_revoked: ",
    "a used boot token with another body": "401 boot_token_invalid; operator reads: ",
}


def test_everything_goes_as_it_should_in_time_and_leaves_nothing(
    tmp_path: Path, require_program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _ = require_program("cryptsetup")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = subprocess.run([*PROGRAM, "demo"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    *steps, summary = done.stdout.splitlines()
    assert summary.startswith(f"All {len(steps)} steps went as they should")
    assert all(" s  ok " in step for step in steps)
    for what, answer in REFUSED.items():
        assert sum(f"refused: {what}: {answer}" in step for step in steps) == 1, what
    for volume in ("storage", "tdx-cache"):
        assert any(f"reboot: the passphrase received now opens {volume}" in step for step in steps)
    assert list(tmp_path.iterdir()) == []


def test_without_cryptsetup_it_says_so_and_how_to_get_it(
    command: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "find_cryptsetup", lambda: None)
    ended = command("demo")
    assert ended.code == 0
    (line,) = [line for line in ended.out.splitlines() if "cryptsetup" in line]
    assert "apt-get install cryptsetup-bin" in line
    assert "the same passphrases" in ended.out


def test_what_is_granted_but_should_not_be_is_a_failure(
    command: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "find_cryptsetup", lambda: None)
    monkeypatch.setattr(SimulatedPlatform, "having", lambda platform, *_: platform)
    ended = command("demo")
    assert ended.code == 1
    assert "FAILED  a wrong measurement was NOT refused" in ended.out
    assert "one did NOT go as it should" in ended.out.splitlines()[-1]


def test_a_refusal_for_another_reason_is_a_failure(
    command: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "find_cryptsetup", lambda: None)
    having = SimulatedPlatform.having
    monkeypatch.setattr(SimulatedPlatform, "having", lambda platform, name: having(platform, name.replace("1", "2")))
    ended = command("demo")
    assert ended.code == 1
    assert "FAILED  refused: a wrong measurement" in ended.out
    assert "expected 403 measurement_mismatch and 'RTMR1'" in ended.out


def test_a_disk_that_does_not_open_is_a_failure(
    command: Callable[..., Ended],
    require_program: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    program = tmp_path / "cryptsetup"
    _ = program.write_text(f'#!/bin/sh\n[ "$1" = luksFormat ] || exit 2\nexec {require_program("cryptsetup")} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(show, "find_cryptsetup", lambda: str(program))
    ended = command("demo")
    assert ended.code == 1
    assert "storage.img: a key does not open what cryptsetup made: nothing was written" in ended.out
