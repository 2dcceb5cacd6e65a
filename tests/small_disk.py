"""A disk of two megabytes, to fill it or to take the right to write it away."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.postgres import Cluster, schema


@contextmanager
def small_disk(place: Path, *, owner: int = 0) -> Generator[Path]:
    """A disk of its own at ``place``; where none can be made the test is skipped.

    It ends with the test, also with one that is killed: another process unmounts it when its input ends.
    """
    place.mkdir(exist_ok=True)  # of a test that was skipped
    mount = ["mount", "-t", "tmpfs", "-o", f"size=2m,mode=700,uid={owner}", "tmpfs", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root may mount a small disk, where the machine lets it")
    unmount = ["sh", "-c", 'cat; exec umount --lazy "$0"', str(place)]
    with subprocess.Popen(unmount, stdin=subprocess.PIPE, start_new_session=True) as keeper:
        yield place
    assert keeper.returncode == 0
    place.rmdir()


@contextmanager
def schema_on_small_disk(cluster: Cluster) -> Generator[tuple[Path, str]]:
    """A small disk, and the URL of an empty schema whose tables are on it."""
    with (
        small_disk(cluster.folder / "disk", owner=cluster.folder.stat().st_uid) as disk,
        psycopg.connect(cluster.url(), autocommit=True) as connection,
    ):
        _ = connection.execute(f"CREATE TABLESPACE small LOCATION '{disk}'".encode())
        try:
            with schema(cluster.url()) as url:
                yield disk, f"{url}%20-cdefault_tablespace%3Dsmall"
        finally:
            _ = connection.execute("DROP TABLESPACE small")


def fill(disk: Path) -> Path:
    """Fill a disk to its last byte; return the file that does."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 1):
            try:
                while True:
                    _ = file.write(bytes(size))
            except OSError:
                continue
    return filler


def remount(disk: Path, option: str) -> None:
    _ = subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)
