"""What the boot agent needs of the machine beside disks and a quoter: config volume, state in memory, servers, an end.

Rules kept here:

* a config volume is the host's: only plain files of it are read, by a name without a path, to a bound, and nothing
  that stands for one (a link, a pipe, a device) is opened or waited for;
* state with a token in it is written to a file system in memory, never over anything, for its owner alone, and read
  only where that is still so;
* no request, no quote and no signature goes on for long after the deadline.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chutes_proto.errors import (
    ConfigurationError,
    FileUnavailable,
    HandoverRejected,
    NotInMemory,
    QuoteUnavailable,
    SignatureUnavailable,
)
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
"""What is given to a request, quote or signature that begins near the deadline, or in an exchange after it."""
SIGN_SECONDS: Final = 30.0

_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")
_SIGNATURE: Final = re.compile(rb"(?:0x)?([0-9a-fA-F]{128})\s*")


# --- the config volume ---


def read_config_volume(directory: str, names: Iterable[str], *, limit: int) -> dict[str, bytes]:
    """The files of ``names`` that are there, up to one byte more than ``limit``.

    Raises `FileUnavailable` for a directory or file that cannot be read, or is not a plain one.
    """
    found: dict[str, bytes] = {}
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        raise FileUnavailable(f"config volume {directory}: {_why(exc)}; is it mounted there?") from None
    try:
        for name in names:
            try:
                found[name] = _plain_file(name, folder, limit)
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise FileUnavailable(f"config volume: {name}: {_why(exc)}") from None
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
    """The kernel's name for this boot. Raises `FileUnavailable`."""
    from chutes_proto.io.files import read_file

    return read_file("/proc/sys/kernel/random/boot_id", limit=64).decode("ascii", "replace").strip()


def check_place(path: str, *, on_disk: bool = False) -> None:
    """Make the directory of a state file where it is missing.

    Raises `NotInMemory` where its file system is not, unless ``on_disk`` permits that, and `FileUnavailable`.
    """
    parent = Path(path).parent
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        kind = file_system(parent)
    except (OSError, ValueError) as exc:
        raise FileUnavailable(f"{parent}: cannot be made: {_why(exc)}") from None
    if not on_disk and kind not in IN_MEMORY:
        raise NotInMemory(
            f"{path}: on {kind}, not in memory: a boot token is not written there; name a file on tmpfs, or say"
            " state.on_disk = true"
        )


def write_state(path: str, data: Secret, *, on_disk: bool = False) -> None:
    """Make a file that only its owner can read; what a run before left there goes first. Raises as `check_place`."""
    check_place(path, on_disk=on_disk)
    try:
        Path(path).unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            _ = file.write(data.reveal())
    except (OSError, ValueError) as exc:
        raise FileUnavailable(f"{path}: cannot be written: {_why(exc)}") from None


def read_state(path: str, *, limit: int) -> bytes:
    """The bytes of a state file that this user made. Raises `FileUnavailable`, `HandoverRejected`."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise HandoverRejected(f"{path}: not a plain file that is this user's alone; it is not used")
            return file.read(limit + 1)
    except FileNotFoundError:
        raise FileUnavailable(f"{path}: not there: `agent run` leaves it, and `agent resume` takes it once") from None
    except (OSError, ValueError) as exc:
        raise FileUnavailable(f"{path}: cannot be read: {_why(exc)}") from None


def remove_state(path: str) -> None:
    """The file is gone afterwards. Raises `FileUnavailable`."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as exc:
        raise FileUnavailable(f"{path}: cannot be removed: {_why(exc)}") from None


def file_system(path: str | Path) -> str:
    """The type of the file system that ``path`` is on, as the kernel calls it. Raises `OSError`."""
    place = os.path.realpath(path)
    device = Path(place).stat().st_dev
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

    Near the deadline a request gets less time than usual; `LEAST_SECONDS` it always has.
    """

    def __init__(self, context: ssl.SSLContext, origins: Sequence[str], deadline: float, *, first: str = "") -> None:
        self._context = context
        self._origins = list(origins)
        self._at = self._origins.index(first) if first else 0
        self._deadline = deadline
        self._sender: HttpsSender | None = None

    @property
    def origin(self) -> str:
        """The server that is asked now."""
        return self._origins[self._at]

    def begin(self) -> None:
        """Begin a connection to the first server, which answers while the caller prepares what it asks."""
        self._sender = HttpsSender(self._context, self.origin, TimeLimits())
        self._sender.begin()

    def next(self) -> str:
        """Go on to the next one; says which."""
        self.close()
        self._at = (self._at + 1) % len(self._origins)
        return self.origin

    def close(self) -> None:
        """Leave no connection behind."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()

    def __call__(self, request: HttpRequest) -> HttpResponse:
        """The whole answer. Raises as `HttpsSender` does."""
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
    """A quoter that gets what is left until ``deadline``, on the clock of ``time.monotonic``, `LEAST_SECONDS` at least.

    The process's alarm clock (SIGALRM) ends it, whatever it waits for, the kernel too: so it is called in the main
    thread, and has that clock for itself.
    """

    def __init__(self, quoter: Quoter, deadline: float) -> None:
        self._quoter = quoter
        self._deadline = deadline

    def __str__(self) -> str:
        return str(self._quoter)

    def __call__(self, report_data: bytes) -> bytes:
        """Its quote. Raises `QuoteUnavailable`, also for what the deadline ended."""
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
    """What ``signer`` of the settings means: nothing, the seed that came with the VM's identity, or a program.

    A program gets no longer than a quote does, see `TimedQuoter`. Raises `ConfigurationError`, and `LocalProtocolError`
    where sr25519 is not installed.
    """
    from chutes_proto.boot._quoter_names import COMMAND

    if text is None:
        return None
    if text.startswith(COMMAND):
        return command_signer(text.removeprefix(COMMAND), deadline=deadline)
    from chutes_proto.auth.hotkey import HotkeyError, HotkeyPair

    if identity.seed is None:
        raise ConfigurationError("signer: the config volume has no seed")
    try:
        pair = HotkeyPair.from_seed(identity.seed)
    except HotkeyError as exc:
        raise ConfigurationError(f"config volume: the seed is of no use: {exc}") from None
    if pair.hotkey != identity.hotkey:
        raise ConfigurationError("config volume: the seed is not that of the hotkey")
    return pair.sign


def command_signer(command: str, *, timeout: float = SIGN_SECONDS, deadline: float = math.inf) -> Signer:
    """A program that signs: the message in hex on its standard input, 64 bytes in hex on its standard output.

    It is run as a quote command is, and ended as one. Raises `ConfigurationError`; the signer,
    `SignatureUnavailable`, which is tried again.
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


def close_mappings(program: str | None, mappings: Iterable[str]) -> list[str]:
    """Close what is mapped, the last one first; says what went wrong, if anything did."""
    import subprocess

    from chutes_proto.io.disks.cryptsetup import run_cryptsetup

    problems: list[str] = []
    for mapping in reversed([*mappings]):
        try:
            done = run_cryptsetup([program or "cryptsetup", "close", mapping], 60)
        except (OSError, subprocess.TimeoutExpired) as exc:
            problems.append(f"/dev/mapper/{mapping}: {exc}")
        else:
            if done.returncode:
                problems.append(f"/dev/mapper/{mapping}: cryptsetup close ended with exit status {done.returncode}")
    return problems


def end_with(command: Sequence[str], wait: float, *, sleep: Callable[[float], None] = time.sleep) -> str | None:
    """Wait, then run what follows a failed boot, until it ends; says what went wrong with it, if anything did."""
    import subprocess

    sleep(wait)
    try:
        done = subprocess.run(command, check=False)
    except OSError as exc:
        return f"{command[0]} cannot be run: {exc.strerror}"
    return f"{command[0]} ended with exit status {done.returncode}" if done.returncode else None


def _why(exc: Exception) -> str:
    match exc:
        case OSError(errno=errno.ELOOP):
            return "not a plain file, but a link"
        case OSError(strerror=str(text)):
            return text
        case _:
            return "no such name"
