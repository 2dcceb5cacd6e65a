"""Disks: performs `InspectDisk` and `ActOnDisk` with the program ``cryptsetup``.

Rules kept here:

* the program never reads the header on a disk, which the host can change at any moment. The header is copied into
  memory, checked and written again there; the program works on that copy;
* the program's result is checked again, and tested with the key, before it is written back to the disk: first the key
  slots, then one copy of the header, then the other, each flushed before the next, so that at every instant one copy is
  valid and the key slots that stay are whole; on a blank disk, a mark comes before them all;
* a device must be the one that was inspected, or nothing is done: its path is resolved once, its node and its number
  may not change, and its size may not shrink;
* a key goes through a pipe, never into an argument, the environment or a file.

``docs/explanation/disks.md`` names the attacks that this stops.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import signal
import stat
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from attrs import frozen

from chutes_proto.errors import DiskError, LocalProtocolError
from chutes_proto.io import how_it_ended
from chutes_proto.log import Level, Record
from chutes_proto.luks.disk import DATA_OFFSET, LEAST_SIZE, LOOKED_AT, UNFINISHED, Blank, Disk, Foreign, Luks, judge
from chutes_proto.luks.header import FRESH_IMAGE_TOKEN, HEAD_SIZE, MAX_SLOTS, CheckedHeader, check_header
from chutes_proto.luks.plan import Action, AddKey, Format, KeepKey, Key, Keys, Open, RemoveMark
from chutes_proto.secret import Secret

if TYPE_CHECKING:
    import subprocess

HOW_TO_INSTALL: Final = "apt-get install cryptsetup-bin"

_PIECE: Final = 32 * 1024
"""How many bytes are read or written at once: an agent has little memory."""
_MAX_KEY: Final = 4096  # a pipe holds it
_SECONDS: Final = 300.0
_LATE_SECONDS: Final = 60.0
"""Time limits for one run of the program; the second for one that begins near the caller's end, or after it. They cover
the most that the key slots of a checked header can cost."""
_KDF: Final = ("--pbkdf", "pbkdf2", "--hash", "sha256", "--pbkdf-force-iterations", "1000")
"""A passphrase has 512 random bits: stretching it would cost time at each boot and add nothing."""
_CIPHER: Final = ("--cipher", "aes-xts-plain64", "--key-size", "512")
_REFUSED, _BUSY = 2, 5  # cryptsetup(8), RETURN CODES
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def has_luks_header(device: str, *, images: bool = False) -> bool:
    """Return whether the disk at ``device`` has a LUKS2 header that may be used; False for a blank disk.

    This is the header of the moment, which a host can change before `cryptsetup` reads it: `BootAgent.unlock` opens
    disks by a checked copy.

    ``images`` allows a regular file in place of a block device. Raises `DiskError` for a disk with any other content,
    which must not be formatted, for a header that is not allowed, and for a device that cannot be read.
    """
    match Disks(images=images).look_at(device):
        case Foreign() as disk:
            raise DiskError("foreign", f"{disk}: it is not touched; wipe it if nothing on it is needed", device)
        case disk:
            return isinstance(disk, Luks)


class Disks:
    """Inspects disks and acts on them, with the program at ``program`` (None: the installed one).

    For tests and demonstrations, ``images`` allows regular files in place of block devices, and without ``mapping``
    (None: with ``images``) a volume is not mapped, but its key is tried. Runs end soon after ``end``, on the clock of
    ``time.monotonic``.
    ``opened`` has the mappings that this object has made and not closed, in their order.
    """

    def __init__(
        self, program: str | None = None, *, images: bool = False, mapping: bool | None = None, end: float = math.inf
    ) -> None:
        self._program = program
        self._images = images
        self._mapping = not images if mapping is None else mapping
        self._end = end
        self._seen: dict[str, _Identity] = {}
        self.opened: list[str] = []

    def inspect(self, device: str) -> Disk:
        """Return the content of the disk. Raises `DiskError`, also without the program: no key could open the disk."""
        found = self.look_at(device)
        if self._find_program() is None:
            raise _no_program(device)
        return found

    def look_at(self, device: str) -> Disk:
        """Return the content of the disk, on which nothing is to be done. Raises `DiskError`."""
        with self._device(device) as disk:
            return disk.judge()

    def act(self, action: Action[Any], keys: Keys) -> object:
        """Perform one action; return the key that opened the disk, for `Open`. Raises `DiskError`."""
        match action:
            case Format():
                self._format(action, keys[action.key])
            case Open():
                return self._open(action, keys)
            case AddKey():
                self._add(action, keys)
            case KeepKey():
                self._keep(action, keys)
            case RemoveMark():
                self._remove_mark(action)
            case _:
                raise LocalProtocolError(f"{type(action).__name__} is not a known action")
        return None

    def close(self, log: Callable[[Record], None]) -> None:
        """Close what is in ``opened``, the last one first, and log what came of it. Raises no error of the system."""
        import subprocess

        while self.opened:
            mapping = self.opened.pop()
            try:
                status = run_cryptsetup([self._find_program() or "cryptsetup", "close", mapping], 60).returncode
            except (OSError, subprocess.TimeoutExpired) as exc:
                problem = str(exc)
            else:
                problem = f"cryptsetup close {how_it_ended(status)}" if status else ""
            if problem:
                log(Record.of(Level.ERROR, "disk_left_open", mapping=mapping, text=problem))
            else:
                log(Record.of(Level.INFO, "disk_closed", mapping=mapping))

    # --- actions ---

    def _format(self, action: Format, key: Secret) -> None:
        with self._device(action.device, os.O_RDWR | os.O_EXCL) as disk, self._memory(LEAST_SIZE, disk) as copy:
            found = disk.judge()
            if not isinstance(found, Blank):
                raise disk.error("not_blank", f"it was blank and now is {found}: nothing was written")
            sector = "4096" if disk.size % 4096 == 0 else "512"
            layout = ("--sector-size", sector, "--offset", str(DATA_OFFSET // 512))
            _ = copy.run(
                "luksFormat", "--type", "luks2", *_CIPHER, *_KDF, *layout, "--key-file=-", copy.path, keys=[key]
            )
            header = copy.check()
            copy.must_open(key)
            disk.write(0, UNFINISHED)
            os.fsync(disk.descriptor)  # with key slots and without the mark, the disk would not be ours
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
                    self.opened += [action.mapping] if self._mapping else []
                    return key
            first, *more = [key.value for key in action.keys]
            tried = (
                f"no key opens it ({', '.join([first, *more])} tried)" if more else f"the {first} key does not open it"
            )
            raise disk.error(
                "key_refused",
                f"{tried}: it is another disk, or its key was replaced on the server; there,"
                " keys history shows the older keys, and keys restore brings one back",
            )

    def _add(self, action: AddKey, keys: Keys) -> None:
        added, others = keys[action.key], [secret for key, secret in keys.items() if key is not action.key]
        with self._copied(action.device, os.O_RDWR) as (disk, copy, header):
            if copy.opens(added):
                return
            if len(header.keyslots) == MAX_SLOTS:
                header = self._free_slots(disk, copy, header, others)
            for opener in others:
                arguments = ("luksAddKey", *_KDF, "--key-file=-", copy.path)
                if copy.run(*arguments, keys=[opener, added], refusable=True):
                    break
            else:
                raise disk.error("key_refused", f"no key opens it, so the {action.key.value} key cannot be added")
            copy.must_open(added)
            copy.must_open(opener)
            disk.put(copy, copy.check(), header)

    def _free_slots(self, disk: _Device, copy: _Copy, header: CheckedHeader, keys: Sequence[Secret]) -> CheckedHeader:
        """Remove the slots that none of ``keys`` opens, unless none opens any.

        This is an update of its own: the copies of a header may differ by added slots or by removed slots, not by both.
        """
        opener = next((key for key in keys if copy.opens(key)), None)
        if opener is None:
            return header
        unknown = [slot for slot in header.keyslots if not any(copy.opens(key, slot) for key in keys)]
        self._remove(copy, opener, unknown)
        fewer = copy.check()
        disk.put(copy, fewer, header)
        return fewer

    def _keep(self, action: KeepKey, keys: Keys) -> None:
        key = keys[action.key]
        with self._copied(action.device, os.O_RDWR) as (disk, copy, header):
            kept = [copy.slot(key, header.keyslots)]
            if kept == [None]:
                raise disk.error("key_refused", f"the {action.key.value} key does not open it: all keys stay on it")
            if action.beside is not None:
                kept.append(copy.slot(keys[action.beside], [slot for slot in header.keyslots if slot not in kept]))
            others = [slot for slot in header.keyslots if slot not in kept]
            if others:
                self._remove(copy, key, others)
                disk.put(copy, copy.check(), header)

    def _remove_mark(self, action: RemoveMark) -> None:
        with self._copied(action.device, os.O_RDWR) as (disk, copy, header):
            if header.is_fresh_image:
                _ = copy.run("token", "remove", "--token-id", FRESH_IMAGE_TOKEN, copy.path, keys=[])
                disk.put(copy, copy.check(), header)

    @staticmethod
    def _remove(copy: _Copy, key: Secret, slots: Sequence[int]) -> None:
        for slot in slots:
            _ = copy.run("luksKillSlot", "--batch-mode", "--key-file=-", copy.path, str(slot), keys=[key])
        copy.must_open(key)

    # --- devices and copies ---

    @contextmanager
    def _device(self, path: str, flags: int = os.O_RDONLY) -> Generator[_Device, None, None]:
        """Open the device at ``path``, which must be the one that was inspected. Raises `DiskError`."""
        seen = self._seen.get(path)
        try:
            real = os.path.realpath(path, strict=True)
            # Before it is opened: opening a pipe would wait, and opening a tape moves it.
            kind = os.lstat(real).st_mode
            if not (stat.S_ISBLK(kind) or (self._images and stat.S_ISREG(kind))):
                raise DiskError("kind", f"it is {_kind(kind)}, not a block device", path)
            if not stat.S_ISBLK(kind):
                flags &= ~os.O_EXCL
            descriptor = os.open(real, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise DiskError("unavailable", f"it cannot be opened: {_why(exc, flags)}", path) from exc
        try:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            status = os.fstat(descriptor)
            identity = _Identity(real, (status.st_dev, status.st_ino, status.st_rdev), size)
            if size == 0:
                raise DiskError("empty", "it has 0 bytes: is a medium in the drive?", path)
            if seen is not None:
                seen.check(identity, path)
            self._seen[path] = identity
            yield _Device(path, real, descriptor, size)
        except OSError as exc:
            raise DiskError("unreadable", f"it cannot be read or written: {_why(exc, flags)}", path) from exc
        finally:
            os.close(descriptor)

    @contextmanager
    def _copied(self, path: str, flags: int) -> Generator[tuple[_Device, _Copy, CheckedHeader], None, None]:
        """Open the device, and copy its checked header into memory."""
        with ExitStack() as stack:
            disk = stack.enter_context(self._device(path, flags))
            found = disk.judge()
            if not isinstance(found, Luks):
                raise disk.error("changed", f"it was a LUKS2 volume and now is {found}")
            header = found.header
            copy = stack.enter_context(self._memory(header.offset + LOOKED_AT, disk))
            copy.write(0, header.area)
            for offset, length in _pieces(*header.slots):
                copy.write(offset, disk.read(offset, length))
            if flags & os.O_RDWR and not header.whole:
                disk.put(copy, header, header)  # otherwise an interrupted update would leave copies two updates apart
            yield disk, copy, header

    @contextmanager
    def _memory(self, size: int, disk: _Device) -> Generator[_Copy, None, None]:
        descriptor = os.memfd_create("luks2-header", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.truncate(descriptor, size)
            yield _Copy(descriptor, self._find_program(), disk, self._end)
        finally:
            os.close(descriptor)

    def _find_program(self) -> str | None:
        return self._program or find_cryptsetup()


def _no_program(device: str) -> DiskError:
    return DiskError("no_cryptsetup", f"cryptsetup is not installed; get it with: {HOW_TO_INSTALL}", device)


def find_cryptsetup() -> str | None:
    """Return the path of the installed program, also in directories that are only in root's PATH."""
    folders = (*os.get_exec_path(), "/usr/local/sbin", "/usr/sbin", "/sbin")
    paths = (Path(folder, "cryptsetup") for folder in folders)
    # `access` says no in a folder in which this user may not look, and `is_file` raises.
    return next((str(path) for path in paths if os.access(path, os.X_OK) and path.is_file()), None)


def environment(udev: str = "/run/udev/control") -> dict[str, str]:
    """Return the environment of the program.

    The program lets udev make device nodes and waits for it, if udev's socket exists, even if no process has the socket
    open any more, as after an initramfs whose system has no udev. In that case it must make the nodes itself.

    Source: unix(7), EPROTOTYPE and ECONNREFUSED.
    """
    import socket

    variables = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    try:
        # With a socket of another type, which the kernel refuses: a connection would reach udev and appear in its log.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
            asking.connect(udev)
    except (ConnectionRefusedError, FileNotFoundError):
        variables["DM_DISABLE_UDEV"] = "1"
    except OSError:  # EPROTOTYPE: a process has it open; or this user may not use it
        pass
    return variables


def run_cryptsetup(
    command: Sequence[str], seconds: float, *, stdin: int | None = None, keep: Sequence[int] = ()
) -> subprocess.CompletedProcess[bytes]:
    """Run the program, with ``stdin`` (None: nothing) and the descriptors in ``keep``.

    It has a session of its own: a signal to the caller's process group (Ctrl-C) does not reach it, and when the run is
    given up, one signal ends every process that it started. Raises `OSError`, `subprocess.TimeoutExpired`.
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
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, said)


@frozen
class _Identity:
    """The device at a path when it was inspected."""

    real: str
    number: tuple[int, ...]
    size: int

    def check(self, now: _Identity, path: str) -> None:
        """Raise `DiskError` if ``now`` is another device, or a smaller one."""
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
        rest = (HEAD_SIZE, min(self.size, LOOKED_AT)), (max(self.size - LOOKED_AT, 0), self.size)
        pieces = (self.read(offset, length) for offset, length in _pieces(*rest))
        return judge(self.read(0, min(self.size, HEAD_SIZE)), pieces, self.size, self.name)

    def read(self, offset: int, length: int) -> bytes:
        data = _read(self.descriptor, offset, length)
        if len(data) < length:
            raise self.error("shrunk", f"it ended at {offset + len(data)} while it was read")
        return data

    def write(self, offset: int, data: bytes) -> None:
        _write(self.descriptor, offset, data)

    def put(self, copy: _Copy, header: CheckedHeader, before: CheckedHeader) -> None:
        """Write ``header`` and its key slots from ``copy`` to the disk, in an order that is safe to interrupt.

        ``before`` is the header on the disk: the slots that only it names are overwritten with the copy's content.
        """
        half = len(header.area) // 2
        slots = sorted({*before.slots, *header.slots})
        for offset, data in copy.pieces(slots):
            if data != self.read(offset, len(data)):
                self.write(offset, data)
        os.fsync(self.descriptor)
        for offset in (half, 0):
            self.write(offset, header.area[offset : offset + half])
            os.fsync(self.descriptor)
        os.posix_fadvise(self.descriptor, 0, header.offset, os.POSIX_FADV_DONTNEED)
        if any(self.read(offset, len(data)) != data for offset, data in chain([(0, header.area)], copy.pieces(slots))):
            raise self.error("write_lost", "it does not keep what was written to it; replace the disk")


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

    def write(self, offset: int, data: bytes) -> None:
        _write(self.descriptor, offset, data)

    def pieces(self, parts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
        """Yield the content of the parts: the offset and the bytes of each piece."""
        return ((offset, _read(self.descriptor, offset, length)) for offset, length in _pieces(*parts))

    def seal(self) -> None:
        """Make the copy read-only for ever."""
        _ = fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)

    def check(self) -> CheckedHeader:
        """Check the header that the program wrote, and return it."""
        header = check_header(_read(self.descriptor, 0, HEAD_SIZE), self.disk.size, self.disk.name)
        if header is None:
            raise self.disk.error("cryptsetup", "cryptsetup left no header")
        return header

    def opens(self, key: Secret, slot: int | None = None) -> bool:
        """Return whether the key opens the header, or the one slot."""
        only = () if slot is None else ("--key-slot", str(slot))
        arguments = ("open", "--test-passphrase", "--type", "luks2", "--key-file=-", *only, self.path)
        return self.run(*arguments, keys=[key], refusable=True)

    def slot(self, key: Secret, slots: Iterable[int]) -> int | None:
        """Return the first of ``slots`` that the key opens."""
        return next((slot for slot in slots if self.opens(key, slot)), None)

    def must_open(self, key: Secret) -> None:
        if not self.opens(key):
            raise self.disk.error("key_refused", "a key does not open what cryptsetup made: nothing was written")

    def run(self, *arguments: str, keys: Sequence[Secret], refusable: bool = False) -> bool:
        """Run the program; its input is the first key, if there is one, and each further one is a key file argument.

        Returns False only if ``refusable`` and the key does not fit. Raises `DiskError` for every other failure.
        """
        if self.program is None:
            raise _no_program(self.disk.name)
        import subprocess

        seconds = min(_SECONDS, max(self.end - time.monotonic(), _LATE_SECONDS))
        pipes: list[int] = []
        try:
            pipes += (_pipe(key, self.disk) for key in keys)
            more = [f"/proc/self/fd/{pipe}" for pipe in pipes[1:]]
            command = [self.program, *arguments, *more]
            done = run_cryptsetup(
                command, seconds, stdin=pipes[0] if pipes else None, keep=[self.descriptor, *pipes[1:]]
            )
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
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[:200] or "it wrote no error"
        if done.returncode == _BUSY:
            raise self.disk.error("busy", f"cryptsetup {arguments[0]}: {said}; is it open already?")
        raise self.disk.error("cryptsetup", f"cryptsetup {arguments[0]} {how_it_ended(done.returncode)}: {said}")


def _pipe(key: Secret, disk: _Device) -> int:
    """Return the reading end of a pipe that holds the key and nothing else."""
    if not 0 < len(key) <= _MAX_KEY:
        raise disk.error("key_size", f"a key has {len(key)} bytes; it may have 1 to {_MAX_KEY}")
    reading, writing = os.pipe()
    try:
        _ = os.write(writing, key.reveal())
    finally:
        os.close(writing)
    return reading


def _pieces(*parts: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield offset and length of the pieces of ``parts``, each of which is an offset and an end."""
    return ((offset, min(_PIECE, end - offset)) for begin, end in parts for offset in range(begin, end, _PIECE))


def _read(descriptor: int, offset: int, length: int) -> bytes:
    data = os.pread(descriptor, length, offset)
    while len(data) < length and (more := os.pread(descriptor, length - len(data), offset + len(data))):
        data += more
    return data


def _write(descriptor: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _why(exc: OSError, flags: int) -> str:
    """Return the system's text and what to do; which error a write to a read-only disk is depends on the kernel."""
    why = exc.strerror or str(exc)
    if exc.errno == errno.ENOENT:
        return f"{why}; attach the disk to the VM, or correct the device's path: lsblk lists the disks that are there"
    forbidden = flags & os.O_RDWR and exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    return f"{why}; if it is read-only, attach it for writing" if forbidden else why


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "something else")
