"""A TD's kernel interfaces for quotes, as a file system in user space: configfs-TSM and the TDX guest device.

It behaves as the kernel does: ``mkdir`` makes an entry's attributes, ``rmdir`` removes them, a write takes effect when
the file is closed and its result is not reported, a read of ``outblob`` has the quote made and blocks meanwhile,
``ioctl`` returns a TDREPORT. The simulated platform makes the quotes. `GuestKernel.faults` has the faults.

Source: Linux ``drivers/virt/coco/tsm.c``, ``drivers/virt/coco/tdx-guest``, ``fs/configfs/file.c`` for what it does;
``include/uapi/linux/fuse.h`` for how it says so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attrs import Factory, define

from chutes_proto.testing._platform import SimulatedPlatform
from tests.guest_device import UNANSWERED, answer_ioctl

_MNT_DETACH = 2
_DIRECT_IO = 1
_ROOT, _REPORTS, _DEVICE = 1, 2, 3


@define
class Entry:
    """An entry of configfs-TSM: what drivers/virt/coco/tsm.c keeps."""

    name: str
    inblob: bytes = b""
    outblob: bytes = b""
    written: int = 0
    read: int = 0


@define
class _Node:
    mode: int
    entry: Entry | None = None
    attribute: str = ""


@define
class _Open:
    node: _Node
    written: bytes = b""
    content: bytes | None = None


@define
class GuestKernel:
    """``faults[name]``: what happens instead, or first, at the next uses of ``mkdir``, ``rmdir``, ``inblob``,
    ``outblob`` or ``ioctl``; it gets the entry and may raise `OSError`.
    """

    mountpoint: Path
    quote: Callable[[bytes], bytes]
    provider: bytes = b"tdx_guest\n"
    counter: bytes = b"%d\n"
    faults: defaultdict[str, deque[Callable[[Entry], None]]] = Factory(lambda: defaultdict(deque))
    entries: dict[str, Entry] = Factory(dict)
    made: list[str] = Factory(list)
    _nodes: dict[int, _Node] = Factory(dict)
    _open: dict[int, _Open] = Factory(dict)
    _next: int = 100

    @property
    def reports(self) -> Path:
        """Where configfs-TSM is."""
        return self.mountpoint / "report"

    @property
    def device(self) -> Path:
        """The TDX guest device."""
        return self.mountpoint / "tdx_guest"

    def vanish(self, entry: Entry) -> None:
        """Somebody removes the entry."""
        del self.entries[entry.name]

    def serve(self, descriptor: int) -> None:
        """Answer until the file system is unmounted."""
        directory = _Node(stat.S_IFDIR | 0o755)
        self._nodes |= {_ROOT: directory, _REPORTS: directory, _DEVICE: _Node(stat.S_IFREG | 0o600)}
        while True:
            try:
                request = os.read(descriptor, 1 << 18)
            except OSError as exc:
                if exc.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return
            _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
            if opcode in UNANSWERED:
                continue
            try:
                answer, error = self._answer(opcode, node, request[40:]), 0
            except OSError as exc:
                answer, error = b"", exc.errno or errno.EIO
            except Exception:  # noqa: BLE001 - a process that waits for the answer could not even be killed
                traceback.print_exc()
                answer, error = b"", errno.EIO
            try:
                _ = os.write(descriptor, struct.pack("<IiQ", 16 + len(answer), -error, unique) + answer)
            except OSError as exc:
                if exc.errno != errno.ENOENT:  # the caller is gone
                    return

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes:
        match opcode:
            case 26:  # INIT
                return struct.pack("<IIIIHHIIHHII24x", 7, 31, 0, 0, 0, 0, 65536, 1, 0, 0, 0, 0)
            case 1:  # LOOKUP
                return self._found(self._child(node, body[:-1].decode()))
            case 9:  # MKDIR
                return self._found(self._make(body[8:-1].decode()))
            case 11:  # RMDIR
                name = body[:-1].decode()
                if name not in self.entries:
                    raise OSError(errno.ENOENT, "")
                self._happens("rmdir", self.entries[name])
                del self.entries[name]
                return b""
            case 3 | 4:  # GETATTR, SETATTR
                return struct.pack("<QII", 0, 0, 0) + self._attributes(node)
            case 14:  # OPEN
                return self._opened(self._nodes[node])
            case 27:  # OPENDIR
                return struct.pack("<QII", 0, 0, 0)
            case 15:  # READ
                handle, offset, size = struct.unpack_from("<QQI", body)
                return self._content(self._open[handle])[offset : offset + size]
            case 16:  # WRITE
                handle, _, size = struct.unpack_from("<QQI", body)
                self._open[handle].written += body[40 : 40 + size]
                return struct.pack("<II", size, 0)
            case 25:  # FLUSH: the file is closed
                self._take(self._open[struct.unpack_from("<Q", body)[0]])
                return b""
            case 39:  # IOCTL
                return self._ioctl(node, body)
            case 18 | 28 | 29 | 38:  # RELEASE, READDIR, RELEASEDIR, DESTROY
                return b""
            case _:
                raise OSError(errno.ENOSYS, "")

    def _happens(self, what: str, entry: Entry) -> None:
        if self.faults[what]:
            self.faults[what].popleft()(entry)

    def _child(self, parent: int, name: str) -> int:
        if parent == _ROOT and name in ("report", "tdx_guest"):
            return _REPORTS if name == "report" else _DEVICE
        for number, node in self._nodes.items():
            entry = node.entry
            if entry is None or self.entries.get(entry.name) is not entry:
                continue
            above = _REPORTS if not node.attribute else self._directory(entry)
            if above == parent and name == (node.attribute or entry.name):
                return number
        raise OSError(errno.ENOENT, "")

    def _directory(self, entry: Entry) -> int:
        return next(number for number, node in self._nodes.items() if node.entry is entry and not node.attribute)

    def _make(self, name: str) -> int:
        entry = Entry(name)
        self._happens("mkdir", entry)
        self.made.append(name)
        self.entries[name] = entry
        modes = {"": stat.S_IFDIR | 0o755, "inblob": stat.S_IFREG | 0o200}
        for attribute in ("", "provider", "generation", "inblob", "outblob"):
            self._next += 1
            self._nodes[self._next] = _Node(modes.get(attribute, stat.S_IFREG | 0o400), entry, attribute)
        return self._next - 4

    def _found(self, node: int) -> bytes:
        return struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + self._attributes(node)

    def _attributes(self, node: int) -> bytes:
        return struct.pack("<6Q10I", node, 0, 0, 0, 0, 0, 0, 0, 0, self._nodes[node].mode, 1, 0, 0, 0, 4096, 0)

    def _opened(self, node: _Node) -> bytes:
        self._next += 1
        self._open[self._next] = _Open(node)
        return struct.pack("<QII", self._next, _DIRECT_IO, 0)

    def _content(self, opened: _Open) -> bytes:
        entry = opened.node.entry
        if entry is None or self.entries.get(entry.name) is not entry:
            raise OSError(errno.ENOENT, "")
        if opened.content is None:
            match opened.node.attribute:
                case "provider":
                    content = self.provider
                case "generation":
                    content = self.counter % entry.written
                case _:
                    self._report(entry)
                    content = entry.outblob
            opened.content = content
        return opened.content

    def _report(self, entry: Entry) -> None:
        if not entry.inblob:
            raise OSError(errno.EINVAL, "")
        if not entry.outblob or entry.read != entry.written:
            generation = entry.written
            self._happens("outblob", entry)
            if len(entry.inblob) != 64:
                raise OSError(errno.EINVAL, "")
            entry.outblob = self.quote(entry.inblob)
            entry.read = generation

    def _take(self, opened: _Open) -> None:
        entry = opened.node.entry
        if opened.written and entry is not None and self.entries.get(entry.name) is entry:
            data, opened.written = opened.written, b""
            try:
                self._happens("inblob", entry)
            except OSError:
                return
            entry.written += 1
            entry.inblob = data

    def _ioctl(self, node: int, body: bytes) -> bytes:
        if node != _DEVICE:
            raise OSError(errno.ENOTTY, "")
        self._happens("ioctl", Entry(""))
        return answer_ioctl(body)


def fail(number: int) -> Callable[[Entry], None]:
    """A fault: the call ends with this error."""

    def failing(_: Entry) -> None:
        raise OSError(number, os.strerror(number))

    return failing


def jump(entry: Entry) -> None:
    """A fault: somebody else writes to the entry."""
    entry.written += 1


@contextmanager
def guest_kernel(mountpoint: Path, quote: Callable[[bytes], bytes] | None = None) -> Iterator[GuestKernel]:
    """The kernel's part, mounted; skips the test where this machine cannot have it."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        pytest.skip(f"this kernel has no file systems in user space: /dev/fuse: {exc.strerror}")
    kernel = GuestKernel(mountpoint, quote or SimulatedPlatform(b"the seed of a TD").quote)
    server = threading.Thread(target=kernel.serve, args=(descriptor,), daemon=True)
    options = f"fd={descriptor},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}".encode()
    try:
        if libc.mount(b"guest-kernel", bytes(mountpoint), b"fuse.tsm", 0, options) != 0:
            pytest.skip(f"file systems in user space cannot be mounted: {os.strerror(ctypes.get_errno())}")
        server.start()
        try:
            yield kernel
        finally:
            _ = libc.umount2(bytes(mountpoint), _MNT_DETACH)
            server.join(60)
    finally:
        os.close(descriptor)
