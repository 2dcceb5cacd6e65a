"""A TD's kernel and host, simulated within a virtual machine that is not a TD: a program for its initramfs.

It makes ``/dev/tdx_guest`` a character device in user space (CUSE), whose ``ioctl`` gives a TDREPORT, and hands on what
comes in by vsock to the quote generation service outside, from the second report on: until then nobody listens.

Python's standard library alone. Source: Linux ``include/uapi/linux/tdx-guest.h`` for what the device does,
``include/uapi/linux/fuse.h`` and ``fs/fuse/cuse.c`` for how it says so.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 # pyright: ignore[reportUnusedImport] - sockets want it, after the initramfs is gone
import errno
import os
import socket
import struct
import sys
import threading

REPORT_DATA_AT = 128
"""Where REPORTDATA stands in a TDREPORT (Intel TDX Module ABI, REPORTMACSTRUCT)."""
UNANSWERED = {2, 36, 42}
"""FORGET, INTERRUPT, BATCH_FORGET."""
PORT = 4050

_GET_REPORT0 = 0xC4405401
"""``TDX_CMD_GET_REPORT0`` as the C compiler computes it."""


def answer_ioctl(body: bytes) -> bytes:
    """The answer to FUSE_IOCTL. Raises `OSError` for a command that the device has not."""
    _, _, command, _, size, _ = struct.unpack_from("<QIIQII", body)
    if command != _GET_REPORT0:
        raise OSError(errno.ENOTTY, "")
    assert size == 64 + 1024
    report_data = body[32 : 32 + 64]
    report = b"\x81" + bytes(REPORT_DATA_AT - 1) + report_data + bytes(1024 - REPORT_DATA_AT - 64)
    return struct.pack("<iIII", 0, 0, 0, 0) + report_data + report


def hand_on(listener: socket.socket, outside: tuple[str, int]) -> None:
    """Each request goes outside, whole, and what comes back goes in until it ends."""
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as request, socket.create_connection(outside) as service:
            size = request.read(4)
            service.sendall(size + request.read(int.from_bytes(size, "big")))
            while piece := service.recv(4096):
                connection.sendall(piece)


def main(host: str, port: str) -> None:
    """Serve the device until the machine goes off."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, PORT))
    reports = 0
    descriptor = os.open("/dev/cuse", os.O_RDWR | os.O_CLOEXEC)
    while True:
        request = os.read(descriptor, 1 << 18)
        _, opcode, unique = struct.unpack_from("<IIQ", request)
        if opcode in UNANSWERED:
            continue
        answer, error = b"", 0
        match opcode:
            case 4096:  # CUSE_INIT
                answer = struct.pack("<8I40x", 7, 31, 0, 0, 4096, 4096, 0, 0) + b"DEVNAME=tdx_guest\0"
            case 14:  # OPEN
                answer = struct.pack("<QII", 0, 0, 0)
            case 39:  # IOCTL
                try:
                    answer = answer_ioctl(request[40:])
                except OSError as exc:
                    error = exc.errno or errno.EIO
                else:
                    reports += 1
                if reports == 2:
                    listener.listen()
                    threading.Thread(target=hand_on, args=(listener, (host, int(port))), daemon=True).start()
            case 18:  # RELEASE
                pass
            case _:
                error = errno.ENOSYS
        _ = os.write(descriptor, struct.pack("<IiQ", 16 + len(answer), -error, unique) + answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
