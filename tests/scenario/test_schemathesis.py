"""schemathesis against a live server: whatever it asks is answered as the server's own OpenAPI document says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chutes_proto.wire.endpoints import ENDPOINTS
from tests.cli.conftest import Server, end, start_server
from tests.conftest import SOAK

EXAMPLES = 100 if SOAK else 3
"""Test cases of each operation: a number, not a time, so that a slow machine asks as much as a quick one."""
SEED = 1
LIMIT_SECONDS = 900
CONFIGURATION = """
# 400: what a header or a query lacks, or names twice. The rest are the defaults.
[checks]
positive_data_acceptance.expected-statuses = ["2xx", 400, 401, 403, 404, 409, 429]
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = start_server("--dev", "--platform", tmp_path / "platform")
    yield started
    end(started.process)


def test_a_live_server_is_as_its_document_says(server: Server, tmp_path: Path) -> None:
    _ = (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    options = ["--tls-verify", server.ca, "--max-examples", EXAMPLES, "--seed", SEED, "--continue-on-failure"]
    options += ["--suppress-health-check", "all"]  # they judge the machine's speed, not the server
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json", *options]
    ended = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert ended.returncode == 0, ended.stdout
    assert re.search(rf"Tested: {len(ENDPOINTS) - 1}\b", ended.stdout), ended.stdout  # all but the document itself
    assert server.process.poll() is None
