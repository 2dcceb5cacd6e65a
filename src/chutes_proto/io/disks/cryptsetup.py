"""Disks, carried out: what `InspectDisk` and `ActOnDisk` do, with the program ``cryptsetup``.

Rules kept here:

* the program never reads the header on a disk, which the host can change at any moment. The header is copied into
  memory, checked and written anew there; the program works on that copy;
* what the program made of the copy is checked again, and tested with the key, before it goes back to the disk: first
  the key slots, then one copy of the header, then the other, each flushed before the next, so that at every instant a
  copy holds and the key slots that stay are whole; where there was none, a mark goes before them all;
* a device is what it was when it was looked at, or nothing is done: its path is resolved once, and its node and its
  number may not change, nor its size shrink;
* a key goes through a pipe: into no argument, environment or file.

``docs/explanation/disks.md`` says what this protects against.
"""

from __future__ import annotations

import fcntl
import math
import os
import signal
import stat
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from attrs import frozen

from chutes_proto.errors import DiskError, LocalProtocolError
from chutes_proto.luks.disk import LOOKED_AT, UNFINISHED, Blank, Disk, Foreign, Luks, judge
from chutes_proto.luks.header import HEAD_SIZE, MAX_SLOTS, CheckedHeader, check_header
from chutes_proto.luks.plan import Action, AddKey, Format, KeepKey, Key, Keys, Open
from chutes_proto.secret import Secret

if TYPE_CHECKING:
    import subprocess

HOW_TO_INSTALL: Final = "apt-get install cryptsetup-bin"

_OFFSET: Final = 16 * 1024 * 1024
"""Where the data of a disk begins that is formatted here, as `cryptsetup` would choose itself."""
_LEAST: Final = _OFFSET + LOOKED_AT
_PIECE: Final = 32 * 1024
"""Bytes that are read or written at once: an agent has little memory."""
_MAX_KEY: Final = 4096  # a pipe holds it
_SECONDS: Final = 300.0
_LATE_SECONDS: Final = 60.0
"""For one run of the program; the second where it begins near the caller's end, or after it. As long as a checked
header's key slots may cost."""
_KDF: Final = ("--pbkdf", "pbkdf2", "--hash", "sha256", "--pbkdf-force-iterations", "1000")
"""A passphrase has 512 random bits: to stretch it would cost time at each boot and add nothing."""
_CIPHER: Final = ("--cipher", "aes-xts-plain64", "--key-size", "512")
_REFUSED, _BUSY = 2, 5  # cryptsetup(8), RETURN CODES
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def has_luks_header(device: str, *, images: bool = False) -> bool:
    """Return whether the disk at ``device`` has a LUKS2 header that may be used; False for a blank disk.

    ``images`` allows a regular file in place of a block device. Raises `DiskError` for a disk that holds anything else,
    since that must not be formatted, and for a header that is not allowed.
    """
    match Disks(images=images).inspect(device):
        case Foreign() as disk:
            raise DiskError("foreign", f"{disk}: it is not touched; wipe it if nothing on it is needed", device)
        case disk:
            return isinstance(disk, Luks)


class Disks:
    """Looks at disks and acts on them, with the program at ``program`` (None: the installed one).

    For tests and demonstrations: ``images`` allows regular files in place of block devices, and without ``mapping`` a
    volume is not mapped, but its key is tried. Nothing takes long after ``end``, on the clock of ``time.monotonic``.
    """

    def __init__(
        self, program: str | None = None, *, images: bool = False, mapping: bool = True, end: float = math.inf
    ) -> None:
        self._program = program
        self._images = images
        self._mapping = mapping
        self._end = end
        self._seen: dict[str, _Identity] = {}

    def inspect(self, device: str) -> Disk:
        """What the disk holds. Raises `DiskError`."""
        with self._device(device) as disk:
            return disk.judge()

    def act(self, action: Action[Any], keys: Keys) -> object:
        """Carry out one action. Raises `DiskError`."""
        match action:
            case Format():
                self._format(action, keys[action.key])
            case Open():
                return self._open(action, keys)
            case AddKey():
                self._add(action, keys)
            case KeepKey():
                self._keep(action, keys[action.key])
            case _:
                raise LocalProtocolError(f"{type(action).__name__} is not an action that is known")
        return None

    # --- actions ---

    def _format(self, action: Format, key: Secret) -> None:
        with self._device(action.device, os.O_RDWR | os.O_EXCL) as disk, self._memory(_LEAST, disk) as copy:
            found = disk.judge()
            if not isinstance(found, Blank):
                raise disk.error("not_blank", f"it was blank and now is {found}: nothing was written")
            if disk.size < _LEAST:
                raise disk.error("too_small", f"it has {disk.size} bytes; a volume needs {_LEAST} at least")
            sector = "4096" if disk.size % 4096 == 0 else "512"
            place = ("--sector-size", sector, "--offset", str(_OFFSET // 512))
            _ = copy.run(
                "luksFormat", "--type", "luks2", *_CIPHER, *_KDF, *place, "--key-file=-", copy.path, keys=[key]
            )
            header = copy.check()
            copy.must_open(key)
            disk.write(0, UNFINISHED)
            os.fsync(disk.descriptor)  # key slots without it would be a disk that is not ours
            disk.put(copy, header, header)

    def _open(self, action: Open, keys: Keys) -> Key:
        with self._copied(action.device, os.O_RDONLY) as (disk, copy, _):
            copy.seal()
            for key in action.keys:
                arguments = ["open", "--type", "luks2", "--key-file=-"]
                if self._mapping:
                    arguments += ["--header", copy.path, disk.path, action.mapping]
                else:
                    arguments += ["--test-passphrase", copy.path]
                if copy.run(*arguments, keys=[keys[key]], refusable=True):
                    return key
            first, *more = [key.value for key in action.keys]
            tried = (
                f"no key opens it ({', '.join([first, *more])} tried)" if more else f"the {first} key does not open it"
            )
            raise disk.error(
                "key_refused",
                f"{tried}: it is another disk, or its key was replaced on the server; there,"
                " keys history shows what was, and keys restore brings one back",
            )

    def _add(self, action: AddKey, keys: Keys) -> None:
        added, others = keys[action.key], [secret for key, secret in keys.items() if key is not action.key]
        with self._copied(action.device, os.O_RDWR) as (disk, copy, header):
            if copy.opens(added):
                return
            if len(header.keyslots) == MAX_SLOTS:
                header = self._make_room(disk, copy, header, others)
            for opener in others:
                arguments = ("luksAddKey", *_KDF, "--key-file=-", copy.path)
                if copy.run(*arguments, keys=[opener, added], refusable=True):
                    break
            else:
                raise disk.error("key_refused", f"no key opens it that the {action.key.value} one could be added with")
            copy.must_open(added)
            copy.must_open(opener)
            disk.put(copy, copy.check(), header)

    def _make_room(self, disk: _Device, copy: _Copy, header: CheckedHeader, keys: Sequence[Secret]) -> CheckedHeader:
        """Take off what none of ``keys`` opens; nothing if none opens any. An update of its own: copies of a header may
        differ by slots that were added or by slots that were taken off."""
        opener = next((key for key in keys if copy.opens(key)), None)
        if opener is None:
            return header
        left = [slot for slot in header.keyslots if not any(copy.opens(key, slot) for key in keys)]
        self._remove(copy, opener, left)
        fewer = copy.check()
        disk.put(copy, fewer, header)
        return fewer

    def _keep(self, action: KeepKey, key: Secret) -> None:
        with self._copied(action.device, os.O_RDWR) as (disk, copy, header):
            kept = next((slot for slot in header.keyslots if copy.opens(key, slot)), None)
            if kept is None:
                raise disk.error("key_refused", f"the {action.key.value} key does not open it: all keys stay on it")
            others = [slot for slot in header.keyslots if slot != kept]
            if others:
                self._remove(copy, key, others)
                disk.put(copy, copy.check(), header)

    @staticmethod
    def _remove(copy: _Copy, key: Secret, slots: Sequence[int]) -> None:
        for slot in slots:
            _ = copy.run("luksKillSlot", "--batch-mode", "--key-file=-", copy.path, str(slot), keys=[key])
        copy.must_open(key)

    # --- devices and copies ---

    @contextmanager
    def _device(self, path: str, flags: int = os.O_RDONLY) -> Generator[_Device, None, None]:
        """The device at ``path``, opened, and the same as ever. Raises `DiskError`."""
        seen = self._seen.get(path)
        try:
            real = os.path.realpath(path, strict=True)
            # Looked at before it is opened: to open a pipe or a tape would wait, or do something.
            kind = os.lstat(real).st_mode
            if not (stat.S_ISBLK(kind) or (self._images and stat.S_ISREG(kind))):
                raise DiskError("kind", f"it is {_kind(kind)}, not a block device", path)
            if not stat.S_ISBLK(kind):
                flags &= ~os.O_EXCL
            descriptor = os.open(real, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise DiskError("unavailable", f"it cannot be opened: {exc.strerror}", path) from exc
        try:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            identity = _Identity.of(real, os.fstat(descriptor), size)
            if size == 0:
                raise DiskError("empty", "it has no bytes: is a medium in it?", path)
            if seen is not None:
                seen.check(identity, path)
            self._seen[path] = identity
            yield _Device(path, real, descriptor, size)
        except OSError as exc:
            raise DiskError("unreadable", f"it cannot be read or written: {exc.strerror}", path) from exc
        finally:
            os.close(descriptor)

    @contextmanager
    def _copied(self, path: str, flags: int) -> Generator[tuple[_Device, _Copy, CheckedHeader], None, None]:
        """The device, and its header in memory as it was checked."""
        with ExitStack() as stack:
            disk = stack.enter_context(self._device(path, flags))
            found = disk.judge()
            if not isinstance(found, Luks):
                raise disk.error("changed", f"it was a LUKS2 volume and now is {found}")
            header = found.header
            copy = stack.enter_context(self._memory(header.offset + LOOKED_AT, disk))
            copy.write(0, header.area)
            for place, length in _pieces(*header.slots):
                copy.write(place, disk.read(place, length))
            if flags & os.O_RDWR and not header.whole:
                disk.put(copy, header, header)  # or the next update that is cut off leaves copies two updates apart
            yield disk, copy, header

    @contextmanager
    def _memory(self, size: int, disk: _Device) -> Generator[_Copy, None, None]:
        descriptor = os.memfd_create("luks2-header", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.truncate(descriptor, size)
            yield _Copy(descriptor, self._program or find_cryptsetup(), disk, self._end)
        finally:
            os.close(descriptor)


def find_cryptsetup() -> str | None:
    """The installed program. Distributions keep it where only root's PATH looks."""
    folders = (*os.get_exec_path(), "/usr/local/sbin", "/usr/sbin", "/sbin")
    paths = (Path(folder, "cryptsetup") for folder in folders)
    return next((str(path) for path in paths if path.is_file() and os.access(path, os.X_OK)), None)


def environment(udev: str = "/run/udev/control") -> dict[str, str]:
    """What the program gets to know.

    It has udev make the nodes of what it maps, and waits for that, where udev's socket is; also if nobody holds that
    any more, as after an initramfs whose system has no udev. Then it makes them itself.

    Source: unix(7), EPROTOTYPE and ECONNREFUSED.
    """
    import socket

    told = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    try:
        # By a socket of another type, which the kernel refuses: a connection would reach udev, and be in its log.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
            asking.connect(udev)
    except (ConnectionRefusedError, FileNotFoundError):
        told["DM_DISABLE_UDEV"] = "1"
    except OSError:  # of another type: somebody holds it; or it is not for this user
        pass
    return told


def run_cryptsetup(
    command: Sequence[str], seconds: float, *, stdin: int | None = None, keep: Sequence[int] = ()
) -> subprocess.CompletedProcess[bytes]:
    """Run the program, with ``stdin`` (None: nothing) and the descriptors in ``keep``.

    In a session of its own: a signal to the caller's process group (Ctrl-C) is the caller's to judge, and where the run
    is given up, one signal ends all that it started. Raises `OSError`, `subprocess.TimeoutExpired`.
    """
    import subprocess

    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=pipe,
        stderr=pipe,
        pass_fds=keep,
        env=environment(),
        start_new_session=True,
    ) as process:
        try:
            output, said = process.communicate(timeout=seconds)
        except BaseException:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, said)


@frozen
class _Identity:
    """What a path was when it was looked at."""

    real: str
    number: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, real: str, status: os.stat_result, size: int) -> _Identity:
        return cls(real, (status.st_dev, status.st_ino, status.st_rdev), size)

    def check(self, now: _Identity, path: str) -> None:
        """Raises `DiskError` if ``now`` is another device, or a smaller one."""
        if (self.real, self.number) != (now.real, now.number):
            raise DiskError("changed", f"it led to {self.real}, and now leads to another device, {now.real}", path)
        if now.size < self.size:
            raise DiskError("shrunk", f"it had {self.size} bytes, and now has {now.size}", path)


@frozen
class _Device:
    """An opened disk. ``name`` is its path as it was given, ``path`` as it was resolved."""

    name: str
    path: str
    descriptor: int
    size: int

    def error(self, reason: str, text: str) -> DiskError:
        return DiskError(reason, text, self.name)

    def judge(self) -> Disk:
        return judge(self.read(0, min(self.size, HEAD_SIZE)), self._rest(), self.size, self.name)

    def _rest(self) -> Iterator[bytes]:
        """What else is in the first and the last `LOOKED_AT` bytes, in pieces."""
        parts = (HEAD_SIZE, min(self.size, LOOKED_AT)), (max(self.size - LOOKED_AT, 0), self.size)
        return (self.read(place, length) for place, length in _pieces(*parts))

    def read(self, place: int, length: int) -> bytes:
        data = _read(self.descriptor, place, length)
        if len(data) < length:
            raise self.error("shrunk", f"it ended at {place + len(data)} while it was read")
        return data

    def write(self, place: int, data: bytes) -> None:
        _write(self.descriptor, place, data)

    def put(self, copy: _Copy, header: CheckedHeader, before: CheckedHeader) -> None:
        """Bring ``header`` and its key slots from ``copy`` to the disk, in an order that may be cut off anywhere.

        ``before`` is the header on the disk: the slots that only it names are overwritten with what is left of them.
        """
        half = len(header.area) // 2
        slots = sorted({*before.slots, *header.slots})
        for place, data in copy.pieces(slots):
            if data != self.read(place, len(data)):
                self.write(place, data)
        os.fsync(self.descriptor)
        for place in (half, 0):
            self.write(place, header.area[place : place + half])
            os.fsync(self.descriptor)
        os.posix_fadvise(self.descriptor, 0, header.offset, os.POSIX_FADV_DONTNEED)
        if any(self.read(place, len(data)) != data for place, data in chain([(0, header.area)], copy.pieces(slots))):
            raise self.error("write_lost", "it does not keep what was written to it; have the disk looked at")


@frozen
class _Copy:
    """A header in memory, and the program that works on it."""

    descriptor: int
    program: str | None
    disk: _Device
    end: float

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self.descriptor}"

    def write(self, place: int, data: bytes) -> None:
        _write(self.descriptor, place, data)

    def pieces(self, parts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
        """What is in the parts, and where each piece of it begins."""
        return ((place, _read(self.descriptor, place, length)) for place, length in _pieces(*parts))

    def seal(self) -> None:
        """From now on nothing changes it."""
        _ = fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)

    def check(self) -> CheckedHeader:
        """What the program made of it."""
        header = check_header(_read(self.descriptor, 0, HEAD_SIZE), self.disk.size, self.disk.name)
        if header is None:
            raise self.disk.error("cryptsetup", "cryptsetup left no header")
        return header

    def opens(self, key: Secret, slot: int | None = None) -> bool:
        """Whether the key opens it; with the slot, if that one does."""
        only = () if slot is None else ("--key-slot", str(slot))
        arguments = ("open", "--test-passphrase", "--type", "luks2", "--key-file=-", *only, self.path)
        return self.run(*arguments, keys=[key], refusable=True)

    def must_open(self, key: Secret) -> None:
        if not self.opens(key):
            raise self.disk.error("key_refused", "a key does not open what cryptsetup made: nothing was written")

    def run(self, *arguments: str, keys: Sequence[Secret], refusable: bool = False) -> bool:
        """Run the program; each key after the first is a key file, the last argument.

        Whether it did what it was asked to; it did not only if ``refusable`` and the key does not fit. Raises
        `DiskError`.
        """
        if self.program is None:
            raise self.disk.error("no_cryptsetup", f"cryptsetup is not installed; get it with: {HOW_TO_INSTALL}")
        import subprocess

        seconds = min(_SECONDS, max(self.end - time.monotonic(), _LATE_SECONDS))
        pipes: list[int] = []
        try:
            pipes += (_pipe(key, self.disk) for key in keys)
            more = [f"/proc/self/fd/{pipe}" for pipe in pipes[1:]]
            command = [self.program, *arguments, *more]
            done = run_cryptsetup(command, seconds, stdin=pipes[0], keep=[self.descriptor, *pipes[1:]])
        except subprocess.TimeoutExpired:
            raise self.disk.error("timeout", f"cryptsetup {arguments[0]} did not end in {seconds:.3g} s") from None
        except OSError as exc:
            raise self.disk.error("no_cryptsetup", f"{self.program} cannot be run: {exc.strerror}") from exc
        finally:
            for pipe in pipes:
                os.close(pipe)
        if done.returncode == 0:
            return True
        if refusable and done.returncode == _REFUSED:
            return False
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[:200] or "it said nothing"
        if done.returncode == _BUSY:
            raise self.disk.error("busy", f"cryptsetup {arguments[0]}: {said}; is it open already?")
        raise self.disk.error("cryptsetup", f"cryptsetup {arguments[0]} ended with {done.returncode}: {said}")


def _pipe(key: Secret, disk: _Device) -> int:
    """The end of a pipe that holds the key and nothing after it."""
    if not 0 < len(key) <= _MAX_KEY:
        raise disk.error("key_size", f"a key of {len(key)} bytes; it may have 1 to {_MAX_KEY}")
    reading, writing = os.pipe()
    try:
        _ = os.write(writing, key.reveal())
    finally:
        os.close(writing)
    return reading


def _pieces(*parts: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Begin and length of the pieces of parts that begin and end somewhere."""
    return ((place, min(_PIECE, end - place)) for begin, end in parts for place in range(begin, end, _PIECE))


def _read(descriptor: int, place: int, length: int) -> bytes:
    data = os.pread(descriptor, length, place)
    while len(data) < length and (more := os.pread(descriptor, length - len(data), place + len(data))):
        data += more
    return data


def _write(descriptor: int, place: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "something else")
