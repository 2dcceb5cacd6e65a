"""Real LUKS2 images in files, where `cryptsetup` is installed: neither root nor device-mapper is needed.

A passphrase goes through a pipe. It has 512 random bits, so that stretching it would cost time and add nothing.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

from attrs import frozen

from chutes_proto.secret import Secret

HOW_TO_INSTALL: Final = "apt-get install cryptsetup-bin"

_SIZE: Final = 20 * 1024 * 1024  # a LUKS2 header takes 16 MiB
_FORMAT: Final = "--type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --batch-mode --key-file=-".split()
_SECONDS: Final = 20


class LuksError(Exception):
    """cryptsetup did not do what it was asked to; the text is its own."""


@frozen
class Cryptsetup:
    """The program at ``path``."""

    path: str

    @classmethod
    def find(cls) -> Cryptsetup | None:
        """The installed one. Distributions keep it where only root's PATH looks."""
        path = shutil.which("cryptsetup") or shutil.which("cryptsetup", path="/usr/local/sbin:/usr/sbin:/sbin")
        return None if path is None else cls(path)

    def format(self, image: Path, passphrase: Secret) -> None:
        """Make ``image`` a LUKS2 volume. Raises `LuksError`."""
        with image.open("wb") as file:
            _ = file.truncate(_SIZE)
        self._run("luksFormat", *_FORMAT, str(image), passphrase=passphrase)

    def open(self, image: Path, passphrase: Secret) -> None:
        """See that ``passphrase`` opens ``image``. Raises `LuksError` if it does not."""
        self._run("open", "--test-passphrase", "--key-file=-", str(image), passphrase=passphrase)

    def _run(self, *arguments: str, passphrase: Secret) -> None:
        try:
            done = subprocess.run(
                [self.path, *arguments], input=passphrase.reveal(), capture_output=True, timeout=_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise LuksError(f"cryptsetup {arguments[0]}: {exc}") from None
        if done.returncode != 0:
            said = done.stderr.decode("utf-8", "replace").strip()
            raise LuksError(f"cryptsetup {arguments[0]} ended with {done.returncode}: {said}")
