"""Quotes of the TDX guest device's report, made by Intel's quote generation service on the host.

Source: Linux ``include/uapi/linux/tdx-guest.h`` for the report; `chutes_proto.transport.qgs` for the service.

Rules kept here:

* a report leaves this machine only to be quoted; the verifier appraises the quote;
* the service has one time limit, from the connection to the last byte, and a bounded answer.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Final

from attrs import frozen

from chutes_proto.errors import LocalProtocolError, QuoteUnavailable, RemoteProtocolError
from chutes_proto.io import seconds_left
from chutes_proto.transport.qgs import FRAME_SIZE, REPORT_SIZE, message_size, quote_request, read_quote

DEVICE: Final = "/dev/tdx_guest"
REPORT_DATA_SIZE: Final = 64
TDX_CMD_GET_REPORT0: Final = 3 << 30 | (REPORT_DATA_SIZE + REPORT_SIZE) << 16 | ord("T") << 8 | 1
"""``_IOWR('T', 1, struct tdx_report_req)``: 64 bytes of report data, then space for the report's 1024."""


@frozen
class VsockService:
    """The service at a vsock address; by default the host's (VMADDR_CID_HOST) at the port of Intel's configuration."""

    cid: int = 2
    port: int = 4050

    def __str__(self) -> str:
        return f"vsock {self.cid}:{self.port}"

    def connect(self, timeout: float) -> socket.socket:
        """Connect within ``timeout`` seconds. Raises `OSError`."""
        return _connected(socket.AF_VSOCK, (self.cid, self.port), timeout)


@frozen
class UnixService:
    """The service at a Unix socket, which the host or a proxy in the VM offers."""

    path: str

    def __str__(self) -> str:
        return self.path

    def connect(self, timeout: float) -> socket.socket:
        """Connect within ``timeout`` seconds. Raises `OSError`."""
        return _connected(socket.AF_UNIX, self.path, timeout)


class DeviceQuoter:
    """The TDX guest device and a quote generation service as a quoter; the service has ``timeout`` seconds."""

    def __init__(
        self,
        service: VsockService | UnixService = VsockService(),
        *,
        device: str | Path = DEVICE,
        timeout: float = 30.0,
    ) -> None:
        self._service = service
        self._device = device
        self._timeout = timeout

    def __str__(self) -> str:
        return f"TDX guest device {self._device} with a quote generation service at {self._service}"

    def __call__(self, report_data: bytes) -> bytes:
        """Return the quote of 64 bytes of report data. Raises `QuoteUnavailable`, which says what to do."""
        return request_quote(self._service, self._report(report_data), self._timeout)

    def _report(self, report_data: bytes) -> bytes:
        if len(report_data) != REPORT_DATA_SIZE:
            raise LocalProtocolError(f"report data: {len(report_data)} bytes; a report binds {REPORT_DATA_SIZE}")
        try:
            return get_report(report_data, self._device)
        except FileNotFoundError:
            raise QuoteUnavailable(f"{self._device} is not there: load the module tdx_guest; is this a TD?") from None
        except OSError as exc:
            raise QuoteUnavailable(f"{self._device} gives no report: {exc.strerror}") from exc


def request_quote(service: VsockService | UnixService, report: bytes, timeout: float) -> bytes:
    """Return the service's quote of a TDREPORT (1024 bytes). Raises `QuoteUnavailable`."""
    end = time.monotonic() + timeout
    named = f"the quote generation service at {service}"
    try:
        with service.connect(timeout) as connection:
            connection.settimeout(seconds_left(end))
            connection.sendall(quote_request(report))
            return read_quote(_receive(connection, message_size(_receive(connection, FRAME_SIZE, end)), end))
    except OSError as exc:
        if isinstance(exc, TimeoutError) and exc.errno is None:  # ours; the kernel's have an errno
            raise QuoteUnavailable(f"{named} did not answer within {timeout:g} s") from None
        raise QuoteUnavailable(f"{named} cannot be reached: {exc.strerror or exc}; does the host run it?") from exc
    except RemoteProtocolError as exc:
        raise QuoteUnavailable(f"{named}: {exc}") from exc


def get_report(report_data: bytes, device: str | Path = DEVICE) -> bytes:
    """Return a TDREPORT (subtype 0, 1024 bytes) that binds 64 bytes of report data. Raises `OSError`."""
    import fcntl

    request = bytearray(report_data + bytes(REPORT_SIZE))
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        _ = fcntl.ioctl(descriptor, TDX_CMD_GET_REPORT0, request)
    finally:
        os.close(descriptor)
    return bytes(request[REPORT_DATA_SIZE:])


def _connected(family: socket.AddressFamily, address: tuple[int, int] | str, timeout: float) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


def _receive(connection: socket.socket, size: int, end: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        connection.settimeout(seconds_left(end))
        if not (piece := connection.recv(size - len(data))):
            raise RemoteProtocolError(f"it closed the connection after {len(data)} of {size} bytes")
        data += piece
    return bytes(data)
