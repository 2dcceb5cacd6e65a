"""A development server as a process of its own, as an operator starts it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen


@frozen
class DevServer:
    """Where it listens, its CA's certificate, and the folder of the platform that it trusts."""

    url: str
    ca: Path
    platform: Path


@contextmanager
def dev_server(platform: Path) -> Iterator[DevServer]:
    command = [sys.executable, "-m", "chutes_proto", "serve", "--dev", "--platform", str(platform)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield _listening(process, platform)
        finally:
            process.terminate()


def _listening(process: subprocess.Popen[str], platform: Path) -> DevServer:
    url = ca = ""
    assert process.stdout is not None
    while not (url and ca):
        line = process.stdout.readline()
        assert line, "the server ended before it said where it listens"
        last = line.split()[-1]
        url = last if last.startswith("https://") else url
        ca = last if last.endswith(".pem") else ca
    return DevServer(url, Path(ca), platform)
