"""A disk of two megabytes, to fill it or to take the right to write it away."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, *, owner: int = 0) -> Generator[Path]:
    """A disk of its own at ``place``; where none can be made the test is skipped.

    It ends with the test, also with one that is killed: another process unmounts it when its input ends.
    """
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size=2m,mode=700,uid={owner}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root may mount a small disk, where the machine lets it")
    unmount = ["sh", "-c", 'cat; exec umount --lazy "$0"', str(place)]
    with subprocess.Popen(unmount, stdin=subprocess.PIPE, start_new_session=True) as keeper:
        yield place
    assert keeper.returncode == 0


def remount(disk: Path, option: str) -> None:
    _ = subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)
