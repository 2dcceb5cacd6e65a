"""The canary in every test sings: a secret that is told anywhere is found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chutes_proto.errors import Refused, StoreError
from chutes_proto.log import Level, Record
from chutes_proto.secret import Secret
from chutes_proto.wire.codes import Code
from tests import canary
from tests.conftest import ROOT

WORD = "c0ffee15900d" * 10
TOLD: list[Callable[[], object]] = [
    lambda: Record(Level.INFO, "granted", {"key": WORD}),
    lambda: Record(Level.INFO, WORD),
    lambda: StoreError(f"the row {WORD!r}"),
    lambda: Refused(Code.NOT_FOUND, "Not Found", reason=f"passphrase {WORD}"),
    lambda: canary.look("output", f'{{"storage":"{WORD}"}}'),
    lambda: canary.look("output", f"key={WORD}"),
    lambda: canary.look("output", f"storage/{WORD}"),
    lambda: canary.look("output", f"vm-{WORD}-1"),
    lambda: canary.look("output", WORD.upper()),
    lambda: canary.look("output", WORD[: len(WORD) // 2]),
    lambda: canary.look("output", f"x{WORD[7:60]}"),
]


@pytest.mark.usefixtures("told_on_purpose")
@pytest.mark.parametrize("tell", TOLD)
def test_a_secret_that_is_told_is_found(tell: Callable[[], object]) -> None:
    _ = tell()
    assert canary._TOLD == []
    _ = Secret(WORD.encode())
    _ = tell()
    assert len(canary._TOLD) >= 1


TESTS = f"""
import pytest
from chutes_proto.log import Level, Record
from chutes_proto.secret import Secret

def test_prints():
    print("key:", Secret(b"{WORD}").reveal().decode())

def test_logs():
    Record(Level.INFO, "granted", {{"key": Secret(b"{WORD}").reveal().decode()}})

@pytest.mark.usefixtures("told_on_purpose")
def test_tells_on_purpose():
    print(Secret(b"{WORD}").reveal().decode())

def test_is_silent():
    print(Secret(b"{WORD}"))
"""


def test_what_is_told_fails_a_test(tmp_path: Path) -> None:
    _ = (tmp_path / "conftest.py").write_text("from tests.canary import *\n")
    _ = (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins take longer than these tests
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout
    assert "2 failed, 2 passed" in said, said
    assert "a secret is in what was printed or logged" in said
    assert "a secret is in a log record" in said
