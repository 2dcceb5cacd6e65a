"""Event logs as firmware would write them, for the tests of this room and the fuzz targets."""

from __future__ import annotations

import json
from hashlib import sha384
from struct import pack

from chutes_proto.quote._eventlog import parse_event_log

NO_ACTION, SEPARATOR, TAG, PLATFORM_CONFIG, IPL, ACTION = 0x3, 0x4, 0x6, 0xA, 0xD, 0x80000007
VARIABLE, VARIABLE_BOOT, APPLICATION = 0x80000001, 0x80000002, 0x80000003
GLOBAL_VARIABLE = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")
COMMAND_LINE = b"/vmlinuz root=/dev/vda1 ro"


def spec(
    *algorithms: tuple[int, int],
    vendor: bytes = b"",
    signature: bytes = b"Spec ID Event03\0",
    version: tuple[int, int, int] = (2, 0, 0),
) -> bytes:
    """The first event: declares digest algorithms and their sizes; the version's last number counts errata."""
    major, minor, errata = version
    declared = b"".join(pack("<HH", *algorithm) for algorithm in algorithms or [(0xC, 48)])
    data = (
        signature
        + pack("<I4BI", 0, minor, major, errata, 2, len(declared) // 4)
        + declared
        + bytes([len(vendor)])
        + vendor
    )
    return pack("<II20sI", 0, NO_ACTION, bytes(20), len(data)) + data


def event(register: int, kind: int, data: bytes, measured: bytes | None = None, digests: bytes | None = None) -> bytes:
    """An event that extends a register with the digest of ``measured``, which is ``data`` if it is not given."""
    if digests is None:
        digests = pack("<IH", 1, 0xC) + sha384(data if measured is None else measured).digest()
    return pack("<II", register, kind) + digests + pack("<I", len(data)) + data


def variable(name: str, value: bytes) -> bytes:
    return GLOBAL_VARIABLE + pack("<QQ", len(name), len(value)) + name.encode("utf-16-le") + value


def grub(label: str, text: bytes) -> bytes:
    return event(3, IPL, label.encode() + b": " + text + b"\0", text)


EVENTS = (
    event(0, NO_ACTION, b"who made the firmware", digests=pack("<IH", 1, 0xC) + bytes(48)),
    event(1, VARIABLE, variable("SecureBoot", b"\x01")),
    event(1, SEPARATOR, bytes(4)),
    event(1, VARIABLE_BOOT, variable("BootOrder", b"\0\0"), b"\0\0"),
    event(2, ACTION, b"Calling EFI Application from Boot Option"),
    event(2, APPLICATION, b"a device path", b"an image"),
    grub("grub_cmd", b"linux " + COMMAND_LINE),
    event(3, IPL, b"/vmlinuz\0", b"a kernel"),
    grub("kernel_cmdline", COMMAND_LINE),
)
"""A boot with secure boot, a boot loader and a kernel."""


def log(*events: bytes, first: bytes | None = None, padding: bytes = b"\xff" * 64) -> bytes:
    return b"".join((spec() if first is None else first, *events, padding))


def as_json(data: bytes) -> bytes:
    """The same log as dstack writes it."""
    events = [event for event in parse_event_log(data).events if event.register != "MRTD"]
    return json.dumps(
        [
            {
                "imr": int(event.register[-1]),
                "event_type": event.type,
                "digest": event.digest.hex(),
                "event": "",
                "event_payload": event.data.hex(),
            }
            for event in events
        ]
    ).encode()
