"""Replay the event log of a TD's firmware and boot loader (CCEL) against the RTMRs of a quote.

    log = parse_event_log(data)                                  /sys/firmware/acpi/tables/data/CCEL
    replayed = replay(log, verdict.quote.body.rtmrs)             the RTMRs were extended with this log
    replayed.secure_boot, replayed.kernel_command_lines

Rules kept here:

* for all bytes, `parse_event_log` returns or raises `EventLogFormatError`; size and number of events are bounded;
* a log is of version 2.0 of its specification, with any errata: another version may have another form;
* every event has just one SHA-384 digest and a register that a TD has; after the log there is nothing but padding, all
  of zeros or all of ones: no event hides behind it;
* all four RTMRs are compared: one without events must be zero;
* a replay vouches for digests and their order within a register, for nothing else: not for an event's type, its data or
  the order between registers. Data count only where a digest is theirs (`Event.measured`), and extractors use nothing
  else. An event that is there was measured, unless it extends no RTMR: EV_NO_ACTION and those of MRTD are the word of
  the log's writer only. An absent one proves nothing.

Sources: TCG PC Client Platform Firmware Profile, 10 (crypto agile log; 10.4.5.1, Spec ID event); UEFI Specification,
38.4 (virtual platform CC event log: register 0 is MRTD, 1 to 4 are RTMR0 to RTMR3); GNU GRUB manual, "Measuring boot
components".
"""

from __future__ import annotations

from enum import IntEnum
from hashlib import sha384
from itertools import zip_longest
from struct import Struct, error
from typing import Any, Final, cast

from attrs import frozen

from chutes_proto._proof import PROOF, Proven
from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote._arguments import BytesLike, as_bytes, as_utf8, check_kind
from chutes_proto.quote._errors import PolicyError, QuoteError
from chutes_proto.quote._measurements import REGISTERS, Rtmrs

LOG: Final = "an EventLog, as of parse_event_log or parse_event_log_json"
MAX_SIZE: Final = 4 * 1024 * 1024
MAX_JSON_SIZE: Final = 1024 * 1024
MAX_EVENTS: Final = 4096
"""A boot with GRUB has about 100 events."""
MAX_ALGORITHMS: Final = 8
RUNTIME_EVENT: Final = 0x08000001
"""The type of events that dstack extends RTMR3 with: SHA-384(type ‖ ":" ‖ name ‖ ":" ‖ payload).

Where the payload has colons, the digest does not say which of them ends the name: here it is the first.
"""


class EventType(IntEnum):
    """The types of events that have names, which begin with ``EV_``."""

    PREBOOT_CERT = 0x0
    POST_CODE = 0x1
    NO_ACTION = 0x3
    SEPARATOR = 0x4
    ACTION = 0x5
    EVENT_TAG = 0x6
    S_CRTM_CONTENTS = 0x7
    S_CRTM_VERSION = 0x8
    PLATFORM_CONFIG_FLAGS = 0xA
    TABLE_OF_DEVICES = 0xB
    COMPACT_HASH = 0xC
    IPL = 0xD
    EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
    EFI_VARIABLE_BOOT = 0x80000002
    EFI_BOOT_SERVICES_APPLICATION = 0x80000003
    EFI_BOOT_SERVICES_DRIVER = 0x80000004
    EFI_RUNTIME_SERVICES_DRIVER = 0x80000005
    EFI_GPT_EVENT = 0x80000006
    EFI_ACTION = 0x80000007
    EFI_PLATFORM_FIRMWARE_BLOB = 0x80000008
    EFI_HANDOFF_TABLES = 0x80000009
    EFI_PLATFORM_FIRMWARE_BLOB2 = 0x8000000A
    EFI_HANDOFF_TABLES2 = 0x8000000B
    EFI_VARIABLE_BOOT2 = 0x8000000C
    EFI_VARIABLE_AUTHORITY = 0x800000E0


_SHA384: Final = 0xC
_SIZES: Final = {0x4: 20, 0xB: 32, _SHA384: 48, 0xD: 64, 0x12: 32}
"""Digests of SHA-1, SHA-256, SHA-384, SHA-512 and SM3."""

_FIRST: Final = Struct("<II20sI")
_SPEC: Final = Struct("<16sI4BI")
_SPEC_SIGNATURE: Final = b"Spec ID Event03\0"
_SPEC_VERSION: Final = (2, 0)
_ALGORITHM: Final = Struct("<HH")
_EVENT: Final = Struct("<III")
_U8: Final = Struct("<B")
_U16: Final = Struct("<H")
_U32: Final = Struct("<I")
_VARIABLE: Final = Struct("<16sQQ")
_SHIM: Final = Struct("<16sI")

_GRUB_COMMAND: Final = b"grub_cmd: "
_KERNEL_COMMAND_LINE: Final = b"kernel_cmdline: "
_SHIM_COMMAND_LINE: Final = b"td_payload_info\0"

_GLOBAL_VARIABLE: Final = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")
"""EFI_GLOBAL_VARIABLE, in the byte order in which it is measured."""


def _secure_boot(value: bytes) -> bytes:
    """The digest of the variable SecureBoot with this value (UEFI_VARIABLE_DATA)."""
    name = "SecureBoot"
    return sha384(_VARIABLE.pack(_GLOBAL_VARIABLE, len(name), len(value)) + name.encode("utf-16-le") + value).digest()


_SECURE_BOOT_ON: Final = _secure_boot(b"\x01")
_SECURE_BOOT_OFF: Final = frozenset({_secure_boot(b"\x00"), _secure_boot(b"")})


class EventLogFormatError(QuoteError):
    """The bytes are not an event log of a TD."""

    code = "event_log_format"


@frozen
class Event:
    """An event of a log. ``number`` counts from 0 through the log, ``register`` is one of `REGISTERS`.

    ``label`` is what the log calls a runtime event; nothing vouches for it but `name`.
    """

    number: int
    register: str
    type: int
    digest: bytes
    data: bytes
    label: str = ""

    @property
    def name(self) -> str | None:
        """The name that the digest covers, up to the first colon, as of a runtime event of dstack; None for others."""
        return None if (covered := self._covered()) is None else covered[0]

    @property
    def value(self) -> bytes | None:
        """The data that the digest covers: `measured`, or the payload of a runtime event."""
        if self.type != RUNTIME_EVENT:
            return self.measured
        return None if (covered := self._covered()) is None else covered[1]

    def _covered(self) -> tuple[str, bytes] | None:
        """Name and payload of a runtime event; None if its digest is not theirs, or extends no RTMR."""
        if not self.extends_rtmr:
            return None
        text = self.label.encode("utf-8", "surrogatepass") + b":" + self.data
        if self.type != RUNTIME_EVENT or sha384(self.type.to_bytes(4, "little") + b":" + text).digest() != self.digest:
            return None
        name, _, payload = text.partition(b":")
        return name.decode("utf-8", "surrogatepass"), payload

    @property
    def type_name(self) -> str:
        try:
            return f"EV_{EventType(self.type).name}"
        except ValueError:
            return f"0x{self.type:x}"

    @property
    def extends_rtmr(self) -> bool:
        """Whether an RTMR is extended with its digest. A replay does not vouch for any other event."""
        return self.type != EventType.NO_ACTION and self.register != "MRTD"

    @property
    def digest_verified(self) -> bool:
        """Whether the digest is that of the whole data, so that the RTMR vouches for all of them."""
        return self.extends_rtmr and sha384(self.data).digest() == self.digest

    @property
    def measured(self) -> bytes | None:
        """The part of the data that the digest covers; None if it covers none, as with images and files.

        It is the whole data, or the text after the label in GRUB's, the value in an EFI variable's, the payload in
        TD-Shim's events. Nothing vouches for the bytes before it, and for no byte where the event extends no RTMR.
        """
        return next((part for part in self._parts() if sha384(part).digest() == self.digest), None)

    def _parts(self) -> tuple[bytes, ...]:
        data = self.data
        if not self.extends_rtmr:
            return ()
        if self.type == EventType.IPL:
            return data, data.partition(b": ")[2].removesuffix(b"\0")
        if self.type == EventType.EFI_VARIABLE_BOOT and len(data) >= _VARIABLE.size:
            _, name_size, size = _VARIABLE.unpack_from(data)
            if _VARIABLE.size + 2 * name_size + size == len(data):
                return data, data[len(data) - size :]
        if self.type == EventType.PLATFORM_CONFIG_FLAGS and len(data) >= _SHIM.size:
            _, size = _SHIM.unpack_from(data)
            if _SHIM.size + size == len(data):
                return data, data[_SHIM.size :]
        return (data,)

    def __str__(self) -> str:
        return f"event {self.number}, {self.type_name}, digest {self.digest.hex()}"


@frozen
class EventLog:
    """A parsed log. Nothing in it is verified."""

    events: tuple[Event, ...]

    def of(self, register: str) -> tuple[Event, ...]:
        """The events that extend an RTMR, in their order; none of MRTD. Raises `PolicyError` for another name."""
        if register not in REGISTERS:  # "rtmr3", as a profile spells it, would be a register without events
            raise PolicyError(f"register: must be one of {', '.join(REGISTERS)}, not {register!r}")
        return tuple(event for event in self.events if event.register == register and event.extends_rtmr)

    @property
    def rtmrs(self) -> Rtmrs:
        """RTMR0 to RTMR3 after these events: from zero on, SHA-384(register ‖ digest) for each event."""
        values: dict[str, bytes] = dict.fromkeys(REGISTERS, bytes(48))
        for event in self.events:
            if event.extends_rtmr:
                values[event.register] = sha384(values[event.register] + event.digest).digest()
        return values["RTMR0"], values["RTMR1"], values["RTMR2"], values["RTMR3"]


@frozen
class Difference:
    """The first event of a register that differs from the log of a known-good boot; None where a log has no event."""

    register: str
    got: Event | None
    expected: Event | None

    def __str__(self) -> str:
        return f"{self.register}: got {self.got or 'no more events'}, expected {self.expected or 'no more events'}"


class EventLogMismatchError(QuoteError):
    """The event log does not match the RTMRs.

    ``register`` is the first that differs, ``registers`` are all; ``got`` is the quote's value, ``expected`` the
    log's. ``difference`` is the first event in which the log differs from the known-good one, if that was given.
    """

    code = "event_log_mismatch"

    def __init__(
        self, registers: tuple[str, ...], got: bytes, expected: bytes, difference: Difference | None = None
    ) -> None:
        text = f"{registers[0]} is not what the log replays to (got {got.hex()}, expected {expected.hex()})"
        super().__init__(text if difference is None else f"{text}; first different event, {difference}")
        self.register: str = registers[0]
        self.registers = registers
        self.got = got
        self.expected = expected
        self.difference = difference


@frozen(kw_only=True, eq=False)
class ReplayedLog(Proven):
    """A log whose digests are those that the RTMRs were extended with, in their order.

    The extractors say what was measured. Where the label of a text is outside what the digest is of (GRUB), it is the
    log's word only; none says that nothing else was measured.
    """

    log: EventLog

    @property
    def secure_boot(self) -> bool | None:
        """Whether UEFI secure boot was on; None if firmware did not measure that, or measured it both on and off.

        Read from RTMR0's digests alone: neither an event's type nor its data can lie about it.
        """
        digests = {event.digest for event in self.log.of("RTMR0")}
        on, off = _SECURE_BOOT_ON in digests, not digests.isdisjoint(_SECURE_BOOT_OFF)
        return None if on == off else on

    @property
    def kernel_command_lines(self) -> tuple[str, ...]:
        """Command lines of kernels, as GRUB and TD-Shim measure them."""
        shim = self._measured("RTMR1", EventType.PLATFORM_CONFIG_FLAGS, _SHIM_COMMAND_LINE)
        return (*(_text(part.partition(b"\0")[0]) for part in shim), *self._grub(_KERNEL_COMMAND_LINE))

    @property
    def grub_commands(self) -> tuple[str, ...]:
        """The commands that GRUB ran."""
        return self._grub(_GRUB_COMMAND)

    @property
    def boot_applications(self) -> tuple[bytes, ...]:
        """The Authenticode SHA-384 of what firmware and boot loaders started: no path, as nothing vouches for one.

        Nothing vouches for an event's type either. The log's writer can pass another event of RTMR1 off as one of
        these, or hide one of them: look for digests that you know.
        """
        return tuple(
            event.digest for event in self.log.of("RTMR1") if event.type == EventType.EFI_BOOT_SERVICES_APPLICATION
        )

    def _grub(self, label: bytes) -> tuple[str, ...]:
        parts = self._measured("RTMR2", EventType.IPL, label)
        return tuple(_text(part.removeprefix(label).removesuffix(b"\0")) for part in parts)

    def _measured(self, register: str, kind: int, label: bytes) -> list[bytes]:
        events = (e for e in self.log.of(register) if e.type == kind and e.data.startswith(label))
        return [part for event in events if (part := event.measured) is not None]


def replay(log: EventLog, rtmrs: Rtmrs, *, good: EventLog | None = None) -> ReplayedLog:
    """Replay a log against RTMRs; take them from a verdict, or nothing vouches for them.

    ``good`` is the log of a known-good boot, to name the event where they part. Raises `EventLogMismatchError`.
    """
    _check_logs(log=log, good=log if good is None else good)
    if not _are_rtmrs(rtmrs):
        raise TypeError("rtmrs: must be the four RTMRs of a verdict, each 48 bytes")
    found = zip(REGISTERS[1:], rtmrs, log.rtmrs, strict=True)
    if different := [(name, got, expected) for name, got, expected in found if got != expected]:
        _, got, expected = different[0]
        difference = None if good is None else first_difference(log, good)
        raise EventLogMismatchError(tuple(name for name, _, _ in different), got, expected, difference)
    return ReplayedLog(log=log, proof=PROOF)


def first_difference(log: EventLog, good: EventLog) -> Difference | None:
    """The first event of the first register in which the digests of two logs differ; None if they measure the same."""
    _check_logs(log=log, good=good)
    found = (difference_in(register, log, good) for register in REGISTERS[1:])
    return next((each for each in found if each is not None), None)


def _check_logs(**logs: object) -> None:
    for name, log in logs.items():
        check_kind(name, log, EventLog, LOG)


def _are_rtmrs(values: object) -> bool:
    return (
        isinstance(values, tuple)
        and [len(value) for value in cast("tuple[object, ...]", values) if isinstance(value, bytes)] == [48] * 4
    )


def difference_in(register: str, log: EventLog, good: EventLog) -> Difference | None:
    """The first event of a register in which the digests of two logs differ; None if they measure the same in it."""
    for got, expected in zip_longest(log.of(register), good.of(register)):
        if got is None or expected is None or got.digest != expected.digest:
            return Difference(register, got, expected)
    return None


def parse_event_log(data: BytesLike) -> EventLog:
    """The events of a log, up to the padding. Raises `EventLogFormatError`, and nothing else, whatever the bytes."""
    data = as_bytes(data, "the bytes of an event log")
    if len(data) > MAX_SIZE:
        raise EventLogFormatError(f"more than {MAX_SIZE} bytes")
    reader = _Reader(data)
    register, kind, _, size = reader.unpack(_FIRST)
    if kind != EventType.NO_ACTION or register >= len(REGISTERS):
        raise EventLogFormatError("it does not begin with a Spec ID event")
    sizes = _algorithms(reader.take(size))
    events: list[Event] = []
    while not reader.at_padding():
        if len(events) == MAX_EVENTS:
            raise EventLogFormatError(f"more than {MAX_EVENTS} events")
        events.append(_event(reader, sizes, len(events)))
    return EventLog(tuple(events))


def parse_event_log_json(data: BytesLike | str) -> EventLog:
    """The events of a log as dstack writes it: a list of objects with imr, event_type, digest, event, event_payload.

    Digest and payload are hexadecimal digits; ``imr`` 0 to 3 is RTMR0 to RTMR3. Raises `EventLogFormatError`, and
    nothing else, whatever the bytes.
    """
    data = as_utf8(data, "the bytes or text of an event log")
    try:
        entries = strict_json.decode(data, limit=MAX_JSON_SIZE)
    except strict_json.JsonError as exc:
        raise EventLogFormatError(str(exc)) from None
    if not isinstance(entries, list):
        raise EventLogFormatError("it is not a list")
    members = cast("list[object]", entries)
    if len(members) > MAX_EVENTS:
        raise EventLogFormatError(f"more than {MAX_EVENTS} events")
    return EventLog(tuple(_json_event(number, member) for number, member in enumerate(members)))


def _json_event(number: int, entry: object) -> Event:
    match entry:
        case {"imr": int(imr), "event_type": int(kind), "digest": str(digest), "event": str(label)} if (
            not isinstance(imr, bool) and not isinstance(kind, bool) and 0 <= imr <= 3 and 0 <= kind < 1 << 32
        ):
            payload: object = cast("dict[str, object]", entry).get("event_payload", "")
            octets = strict_json.digits(digest), strict_json.digits(payload) if isinstance(payload, str) else None
            if octets[0] is not None and len(octets[0]) == 48 and octets[1] is not None:
                return Event(number, REGISTERS[imr + 1], kind, octets[0], octets[1], label)
        case _:
            pass
    raise EventLogFormatError(f"event {number}: not an imr of 0 to 3, a type, a SHA-384 digest, a name and a payload")


def _algorithms(data: bytes) -> dict[int, int]:
    """The digest sizes that the Spec ID event declares, by algorithm."""
    reader = _Reader(data)
    signature, _, minor, major, _, _, count = reader.unpack(_SPEC)  # nothing depends on class, errata or UINTN's size
    if signature != _SPEC_SIGNATURE:
        raise EventLogFormatError("it does not begin with a Spec ID event of version 03")
    if (major, minor) != _SPEC_VERSION:
        raise EventLogFormatError(f"it is of version {major}.{minor} of its specification, and only 2.0 is read")
    if count > MAX_ALGORITHMS:
        raise EventLogFormatError(f"{count} digest algorithms are declared")
    sizes: dict[int, int] = {}
    for _ in range(count):
        algorithm, size = reader.unpack(_ALGORITHM)
        if algorithm in sizes or _SIZES.get(algorithm) != size:
            raise EventLogFormatError(f"the algorithm 0x{algorithm:x} is there twice, not known or of another size")
        sizes[algorithm] = size
    if _SHA384 not in sizes:
        raise EventLogFormatError("SHA-384 is not among the digest algorithms")
    (vendor_size,) = reader.unpack(_U8)
    _ = reader.take(vendor_size)
    if reader.pos != len(data):
        raise EventLogFormatError("bytes are left over in the Spec ID event")
    return sizes


def _event(reader: _Reader, sizes: dict[int, int], number: int) -> Event:
    register, kind, count = map(int, reader.unpack(_EVENT))
    if register >= len(REGISTERS):
        raise EventLogFormatError(f"event {number}: a TD has no register {register}")
    if count > len(sizes):
        raise EventLogFormatError(f"event {number}: more digests than algorithms are declared")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        (algorithm,) = reader.unpack(_U16)
        if algorithm not in sizes or algorithm in digests:
            raise EventLogFormatError(f"event {number}: the algorithm 0x{algorithm:x} is not declared or there twice")
        digests[algorithm] = reader.take(sizes[algorithm])
    if _SHA384 not in digests:
        raise EventLogFormatError(f"event {number}: no SHA-384 digest")
    (size,) = reader.unpack(_U32)
    return Event(number, REGISTERS[register], kind, digests[_SHA384], reader.take(size))


class _Reader:
    """A position in the bytes. Raises `EventLogFormatError` where they are cut off."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0

    def unpack(self, struct: Struct) -> tuple[Any, ...]:
        try:
            values = struct.unpack_from(self.data, self.pos)
        except error:
            raise EventLogFormatError("it is cut off") from None
        self.pos += struct.size
        return values

    def take(self, size: int) -> bytes:
        end = self.pos + size
        if end > len(self.data):
            raise EventLogFormatError(f"{size} bytes are declared, {len(self.data) - self.pos} are there")
        piece, self.pos = self.data[self.pos : end], end
        return piece

    def at_padding(self) -> bool:
        """Whether the events end here. Raises `EventLogFormatError` if there is more than padding after them."""
        head = self.data[self.pos : self.pos + 8]
        if head.strip(b"\0") and head.strip(b"\xff"):
            return False
        rest = self.data[self.pos :]
        if rest.strip(b"\0") and rest.strip(b"\xff"):
            raise EventLogFormatError("there is more than padding after the events")
        return True


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
