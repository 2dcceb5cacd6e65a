"""`demo` end to end, that it can fail, and how it looks in a terminal and elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chutes_proto.cli.page import Page, make_console
from chutes_proto.io import demonstration as show
from chutes_proto.testing._platform import SimulatedPlatform
from tests.cli.conftest import PROGRAM, Ended

REFUSED = {
    "replayed nonce": "401 nonce_invalid",
    "another TLS key": "403 certificate_mismatch",
    "altered kernel": "403 measurement_mismatch",
    "debug TD": "403 attributes_rejected",
    "revoked platform": "403 quote_rejected",
    "reused boot token": "401 boot_token_invalid",
    "altered GPU firmware": "403 gpu_evidence_rejected",
    "old GPU evidence": "403 gpu_evidence_rejected",
}


@pytest.fixture
def no_cryptsetup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "find_cryptsetup", lambda: None)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("lines", [1, 9])
def test_a_reader_that_has_seen_enough_is_no_check_that_failed(lines: int) -> None:
    """Before the server runs, and while it does."""
    with subprocess.Popen([*PROGRAM, "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(lines):
            assert process.stdout.readline()
        process.stdout.close()
        assert (process.wait(timeout=60), process.stderr and process.stderr.read()) == (141, b"")


@pytest.mark.trio
@pytest.mark.usefixtures("no_cryptsetup")
@pytest.mark.parametrize("step", ["quote", "GPUs"])
async def test_a_reader_that_goes_while_an_agent_makes_something_ends_it(step: str, tmp_path: Path) -> None:
    """An agent tries again where its quoter fails, so nothing is written there."""

    class _Gone(Page):
        def step(self, name: str, text: str, *, passed: bool = True) -> None:
            if name == step:
                raise BrokenPipeError
            super().step(name, text, passed=passed)

    with pytest.raises(BrokenPipeError):
        _ = await show.show(tmp_path, _Gone(make_console(plain=True), plain=True))


def test_everything_goes_as_it_should_in_time_and_leaves_nothing(
    tmp_path: Path, require_program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _ = require_program("cryptsetup")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = subprocess.run([*PROGRAM, "demo"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    passed = [line for line in done.stdout.splitlines() if line.startswith("   ok ")]
    assert f"ok All {len(passed)} checks passed" in done.stdout
    assert "2 boots granted, 8 attacks refused" in done.stdout
    for attack, answer in REFUSED.items():
        assert re.search(rf"   ok  {attack[:20]}.* {answer}", done.stdout), attack
    for volume in ("storage", "tdx-cache"):
        assert re.search(rf"   ok  {volume} +([0-9a-f]{{8}})\.\.  =   \1\.\.  opens the LUKS2 disk", done.stdout)
    assert "verified: 8 devices (GH100 driver 600.10.01 VBIOS 96.00.FF.00.01), measurements rims" in flat(done.stdout)
    assert list(tmp_path.iterdir()) == []


def flat(shown: str) -> str:
    """A page without its lines and the times at their ends."""
    return " ".join(re.sub(r" [0-9.]+ s *$", "", line).strip() for line in shown.splitlines())


@pytest.mark.usefixtures("no_cryptsetup")
def test_without_cryptsetup_it_says_so_and_how_to_get_it(command: Callable[..., Ended]) -> None:
    ended = command("demo")
    assert ended.code == 0
    (line,) = [line for line in ended.out.splitlines() if "cryptsetup" in line]
    assert "apt-get install cryptsetup-bin" in line
    assert re.search(r"ok  root +([0-9a-f]{8})\.\.  =   \1\.\.", ended.out)


@pytest.mark.usefixtures("no_cryptsetup")
def test_an_attack_that_succeeds_is_a_failure(command: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedPlatform, "having", lambda platform, *_: platform)
    ended = command("demo")
    assert ended.code == 1
    assert re.search(r"NO  altered kernel +none; expected 403 measurement_mismatch +NOT refused", ended.out)
    assert re.search(r"ok  replayed nonce", ended.out)
    assert re.search(r"^NO \d of \d+ checks FAILED", ended.out, re.MULTILINE)


def test_its_pictures_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    tool = [sys.executable, "-m", "tools.demo_picture", str(tmp_path)]
    _ = subprocess.run(tool, check=True, stdout=subprocess.DEVNULL, timeout=60)
    for name in ("light", "dark"):
        picture = (tmp_path / f"demo-{name}.svg").read_text("utf-8")
        assert "replayed" in picture
        assert not re.search(r"@font-face|@import|href=|url\((?!#)", picture)
