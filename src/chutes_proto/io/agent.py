"""The boot agent's access to its machine, besides disks and quotes: config volume, state, servers, signer, the end.

Rules kept here:

* the host writes the config volume: only regular files of it are read, by a name without a path and up to a limit; no
  link, pipe or device is opened or waited for;
* state with a token is written to a file system in memory, never over another file, for its owner alone, and read only
  while that still holds;
* no request, quote or signature continues for long after the deadline.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chutes_proto.errors import (
    ConfigurationError,
    FileUnavailable,
    HandoverRejected,
    LocalProtocolError,
    NotInMemory,
    QuoteUnavailable,
    SignatureUnavailable,
)
from chutes_proto.io import how_it_ended
from chutes_proto.io.files import make_directory, read_file, reason, unavailable
from chutes_proto.io.http.https import HttpsSender, TimeLimits
from chutes_proto.io.quoters.choose import OutOfTimeError, Quoter

if TYPE_CHECKING:
    import ssl

    from chutes_proto.auth.signing import Signer
    from chutes_proto.boot._settings import VmIdentity
    from chutes_proto.secret import Secret
    from chutes_proto.wire.http import HttpRequest, HttpResponse

IN_MEMORY: Final = frozenset({"tmpfs", "ramfs", "rootfs"})  # the last is an initramfs itself
LEAST_SECONDS: Final = 5.0
"""The least time for a request, quote or signature that begins near the deadline, or after it in an exchange."""
SIGN_SECONDS: Final = 30.0

_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")
_SIGNATURE: Final = re.compile(rb"(?:0x)?([0-9a-fA-F]{128})\s*")


# --- the config volume ---


def read_config_volume(directory: str, names: Iterable[str], *, limit: int) -> dict[str, bytes]:
    """Return those files of ``names`` that exist, up to one byte more than ``limit``.

    Raises `FileUnavailable` for a directory or file that cannot be read, or is not a regular file.
    """
    found: dict[str, bytes] = {}
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        raise FileUnavailable(f"config volume {directory}: {reason(exc)}; is it mounted there?") from None
    try:
        for name in names:
            with unavailable("config volume", name), suppress(FileNotFoundError):
                found[name] = _plain_file(name, folder, limit)
    finally:
        os.close(folder)
    return found


def _plain_file(name: str, folder: int, limit: int) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):  # opening a device may do harm
        raise OSError(errno.EINVAL, "not a plain file")
    with os.fdopen(os.open(name, flags, dir_fd=folder), "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        data = b""
        while len(data) <= limit and (more := file.read(limit + 1 - len(data))):
            data += more
        return data


# --- state ---


def boot_id() -> str:
    """Return the kernel's identifier of this boot. Raises `FileUnavailable`."""
    return read_file("/proc/sys/kernel/random/boot_id", limit=64).decode("ascii", "replace").strip()


def check_place(path: str, *, on_disk: bool = False, make: bool = True) -> None:
    """Make the directory of a state file if it is missing; without ``make``, look only at where it would be made.

    Raises `NotInMemory` if its file system is not in memory, unless ``on_disk`` allows that, and `FileUnavailable`.
    """
    parent = Path(path).parent
    with unavailable(parent, "cannot be made"):
        if make:
            _ = make_directory(parent, mode=0o700)
        kind = file_system(next(place for place in (parent, *parent.parents) if place.exists()))
    if not on_disk and kind not in IN_MEMORY:
        raise NotInMemory(
            f"{path}: on {kind}, not in memory: a boot token is not written there; name a file on tmpfs, or say"
            " state.on_disk = true"
        )


def write_state(path: str, data: Secret, *, on_disk: bool = False) -> None:
    """Make a file that only its owner can read, in place of an earlier run's. Raises as `check_place`."""
    check_place(path, on_disk=on_disk)
    with unavailable(path, "cannot be written"):
        Path(path).unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            _ = file.write(data.reveal())


def read_state(path: str, *, limit: int) -> bytes:
    """Return the bytes of a state file that this user made. Raises `FileUnavailable`, `HandoverRejected`."""
    with unavailable(path, "cannot be read"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FileUnavailable(f"{path}: not there: `agent run` leaves it, `agent resume` uses it once") from None
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise HandoverRejected(f"{path}: not a plain file that is this user's alone; it is not used")
            return file.read(limit + 1)


def remove_state(path: str) -> None:
    """Remove the file, if it exists. Raises `FileUnavailable`."""
    with unavailable(path, "cannot be removed"):
        Path(path).unlink(missing_ok=True)


def file_system(path: str | Path) -> str:
    """Return the kernel's name of the type of file system that ``path`` is on. Raises `OSError`."""
    device = Path(os.path.realpath(path)).stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}".encode()
    kinds = [kind for mounted, kind in _mounts(Path("/proc/self/mountinfo").read_bytes()) if mounted == number]
    return kinds[-1] if kinds else "an unknown file system"


def _mounts(mountinfo: bytes) -> list[tuple[bytes, str]]:
    """Device numbers and types (proc(5)): ``36 35 98:0 /root /mount options [tags] - type source options``."""
    lines = [line.partition(b" - ") for line in mountinfo.splitlines()]
    return [(head.split()[2], tail.split()[0].decode("ascii", "replace")) for head, _, tail in lines if tail]


# --- servers ---


class Servers:
    """Performs `Send` at one of several servers, and `NextServer`. ``deadline`` is on the clock of ``time.monotonic``.

    Near the deadline a request gets less time than usual, but at least `LEAST_SECONDS`.
    """

    def __init__(self, context: ssl.SSLContext, origins: Sequence[str], deadline: float, *, first: str = "") -> None:
        self._context = context
        self._origins = list(origins)
        self._at = self._origins.index(first) if first else 0
        self._deadline = deadline
        self._sender: HttpsSender | None = None

    @property
    def origin(self) -> str:
        """The present server."""
        return self._origins[self._at]

    def begin(self) -> None:
        """Begin a connection to the first server, which answers while the caller prepares its request."""
        self._sender = HttpsSender(self._context, self.origin, TimeLimits())
        self._sender.begin()

    def next(self) -> str:
        """Change to the next server; return its origin."""
        self.close()
        self._at = (self._at + 1) % len(self._origins)
        return self.origin

    def close(self) -> None:
        """Close the connection."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()

    def __call__(self, request: HttpRequest) -> HttpResponse:
        """Return the whole answer. Raises as `HttpsSender` does."""
        usual = TimeLimits()
        left = max(self._deadline - time.monotonic(), LEAST_SECONDS)
        if left < usual.total:
            self.close()
            limits = TimeLimits(min(usual.connect, left), min(usual.read, left), left)
            with HttpsSender(self._context, self.origin, limits) as send:
                return send(request)
        self._sender = self._sender or HttpsSender(self._context, self.origin, usual)
        return self._sender(request)


# --- quoting ---


class TimedQuoter:
    """Ends a quoter at ``deadline``, on the clock of ``time.monotonic``, but not before `LEAST_SECONDS`.

    The process's timer (SIGALRM) ends it, whatever it waits for, even in the kernel: so it must be called in the main
    thread, and nothing else may use that timer.
    """

    def __init__(self, quoter: Quoter, deadline: float) -> None:
        self._quoter = quoter
        self._deadline = deadline

    def __str__(self) -> str:
        return str(self._quoter)

    def __call__(self, report_data: bytes) -> bytes:
        """Return its quote. Raises `QuoteUnavailable`, also at the deadline."""
        import signal

        def end(*_: object) -> None:
            raise OutOfTimeError("the deadline, retry.deadline_seconds, ended it")

        left = max(self._deadline - time.monotonic(), LEAST_SECONDS)
        try:
            before = signal.signal(signal.SIGALRM, end)
            try:
                _ = signal.setitimer(signal.ITIMER_REAL, left)
                return self._quoter(report_data)
            finally:
                _ = signal.setitimer(signal.ITIMER_REAL, 0)
                _ = signal.signal(signal.SIGALRM, before)
        except OutOfTimeError as exc:
            raise QuoteUnavailable(f"{self}: {exc}") from None


# --- signing ---


def make_signer(text: str | None, identity: VmIdentity, deadline: float = math.inf) -> Signer | None:
    """Return the signer that the settings name: none, the secret of the VM's identity, or a program.

    A program has the time of a quote, see `TimedQuoter`. Raises `ConfigurationError`, also if sr25519 is not installed.
    """
    from chutes_proto.boot._quoter_names import COMMAND

    if text is None:
        return None
    if text.startswith(COMMAND):
        return command_signer(text.removeprefix(COMMAND), deadline=deadline)
    from chutes_proto.auth.hotkey import HotkeyError, HotkeyPair, check_installed

    try:
        check_installed()
    except LocalProtocolError:
        raise ConfigurationError(
            "signer: config-volume needs py-sr25519-bindings; install it for the agent's Python, or name a program that"
            " signs"
        ) from None
    if identity.secret is None:
        raise ConfigurationError(
            "signer: the config volume has no seed and no private key; add one, or name a program that signs"
        )
    try:
        pair = HotkeyPair.from_secret(identity.secret)
    except HotkeyError as exc:
        raise ConfigurationError(f"config volume: the hotkey's secret cannot be used: {exc}") from None
    if pair.hotkey != identity.hotkey:
        raise ConfigurationError(
            f"config volume: the seed or private key is not that of the hotkey {identity.hotkey.address}"
        )
    return pair.sign


def command_signer(command: str, *, timeout: float = SIGN_SECONDS, deadline: float = math.inf) -> Signer:
    """Return a signer that runs a program: it reads the message in hex and writes the signature, 64 bytes in hex.

    It is run and ended as a quote command is. Raises `ConfigurationError`; the signer raises `SignatureUnavailable`,
    after which the flow tries again.
    """
    from chutes_proto.io.quoters.command import CommandQuoter

    run: Quoter = CommandQuoter(command, timeout=timeout, what="signature")
    if deadline < math.inf:
        run = TimedQuoter(run, deadline)

    def sign(message: bytes) -> bytes:
        try:
            signature = _SIGNATURE.fullmatch(run(message))
        except QuoteUnavailable as exc:
            raise SignatureUnavailable(str(exc)) from exc
        if signature is None:
            raise SignatureUnavailable(f"{run} did not write a signature, 64 bytes in hex")
        return bytes.fromhex(signature[1].decode("ascii"))

    return sign


# --- the end ---


def end_with(command: Sequence[str], wait: float, *, sleep: Callable[[float], None] = time.sleep) -> str | None:
    """Wait ``wait`` seconds, then run ``command`` after a failed boot until it ends; return its problem, or None."""
    import subprocess

    sleep(wait)
    try:
        done = subprocess.run(command, check=False)
    except OSError as exc:
        return f"{command[0]} cannot be run: {exc.strerror}"
    return f"{command[0]} {how_it_ended(done.returncode)}" if done.returncode else None
