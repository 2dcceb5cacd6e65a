"""Files as block devices (losetup(8)), and a `cryptsetup` that maps them, also in a kernel without a device mapper."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import CI

# The real program, but a file beside each mapping, or in its place, says that it is there.
CRYPTSETUP = """#!/bin/sh
case "$*" in
open*--header*)
    [ ! -e {folder}/mapped/"$8" ] || {{ echo "Device $8 already exists." >&2; exit 5; }}
    {real} {open} || exit
    {held}
    touch {folder}/mapped/"$8" ;;
close*)
    {close}
    rm {folder}/mapped/"$2" && echo "$2" >> {folder}/closed ;;
*)
    exec {real} "$@" ;;
esac
"""


@contextmanager
def attached(path: Path | str, require_program: Callable[[str], str]) -> Iterator[str]:
    """A block device over the file; skips where there can be none."""
    program = require_program("losetup")
    attach = [program, "--find", "--show", str(path)]
    done = subprocess.run(attach, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        refuse = pytest.fail if CI and os.geteuid() == 0 else pytest.skip
        refuse(f"this kernel, or this user, makes no loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        _ = subprocess.run([program, "--detach", device], check=True)


class Mappings:
    """The mappings of a `cryptsetup` in ``folder``, which runs the lines ``held`` between a mapping and its file."""

    def __init__(self, folder: Path, real: str, held: str = ":") -> None:
        self.folder = folder
        self._maps = real if "device-mapper" in Path("/proc/misc").read_text() else ""
        (folder / "mapped").mkdir()
        program = folder / "cryptsetup"
        how = {"open": '"$@"' if self._maps else 'open --test-passphrase --type luks2 --key-file=- "$6"'}
        how["close"] = f'{real} "$@" || exit' if self._maps else ":"
        _ = program.write_text(CRYPTSETUP.format(real=real, folder=folder, held=held, **how))
        program.chmod(0o755)

    @property
    def path(self) -> str:
        """For the environment."""
        return f"{self.folder}:{os.environ['PATH']}"

    @property
    def open(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "mapped").iterdir())

    @property
    def closed(self) -> list[str]:
        return (self.folder / "closed").read_text().split()

    def close(self, *mappings: str) -> None:
        """Close what a test may have left."""
        for mapping in mappings:
            (self.folder / "mapped" / mapping).unlink(missing_ok=True)
            if self._maps:
                _ = subprocess.run([self._maps, "close", mapping], capture_output=True, check=False)
