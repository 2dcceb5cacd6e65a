"""Event logs: what parses, what the RTMRs vouch for, and where two boots part."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha384
from struct import pack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.quote import _eventlog as eventlog
from chutes_proto.quote._errors import PolicyError
from chutes_proto.quote._eventlog import (
    RUNTIME_EVENT,
    EventLogFormatError,
    EventLogMismatchError,
    ReplayedLog,
    first_difference,
    parse_event_log,
    parse_event_log_json,
    replay,
)
from chutes_proto.quote._measurements import REGISTERS
from tests.quote.cases import ABSENT, FOLDER
from tests.quote.logs import (
    APPLICATION,
    COMMAND_LINE,
    EVENTS,
    IPL,
    NO_ACTION,
    PLATFORM_CONFIG,
    SEPARATOR,
    VARIABLE,
    VARIABLE_BOOT,
    event,
    grub,
    log,
    spec,
    variable,
)
from tests.work import MIB, work_of

CASES = sorted(file.parent for file in FOLDER.glob("ccel/*/expected.json"))


def replayed(*events: bytes) -> ReplayedLog:
    parsed = parse_event_log(log(*events))
    return replay(parsed, parsed.rtmrs)


# --- the vectors ---


@pytest.mark.skipif(not CASES, reason=ABSENT)
@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_vectors(folder: Any) -> None:
    data, expected = (folder / "ccel.bin").read_bytes(), json.loads((folder / "expected.json").read_text())
    rtmrs: Any = tuple(map(bytes.fromhex, expected["rtmr_expected"]))
    if expected["error_class_hint"] in ("parse", "trailing_data"):
        with pytest.raises(EventLogFormatError):
            _ = parse_event_log(data)
        return
    parsed = parse_event_log(data)
    counts = {str(i): sum(e.register == name for e in parsed.events) for i, name in enumerate(REGISTERS)}
    assert (len(parsed.events), counts) == (expected["events"], expected["events_per_register"])
    assert sum(e.digest_verified for e in parsed.events) == expected["digest_verified"]
    assert [rtmr.hex() for rtmr in parsed.rtmrs] == list(expected["replayed"].values())
    if expected["outcome"] == "ok":
        assert replay(parsed, rtmrs).log is parsed
    else:
        with pytest.raises(EventLogMismatchError) as raised:
            _ = replay(parsed, rtmrs)
        index = REGISTERS.index(raised.value.register) - 1
        assert raised.value.got == rtmrs[index] != parsed.rtmrs[index]
        assert rtmrs[:index] == parsed.rtmrs[:index]


@pytest.mark.skipif(not CASES, reason=ABSENT)
@pytest.mark.parametrize(
    ("name", "secure_boot", "command_lines", "commands", "applications"),
    [
        ("real-evidence-api", False, ["/boot/vmlinuz-6.2.16-v5.2.mvp42-generic root="], 56, 4),
        ("real-gcp-cos113-dupe-separator", False, ["/syslinux/vmlinuz.A init="], 14, 2),
        ("real-trustee-ccel-data", None, ["root=/dev/vda1 console=hvc0 rw"], 0, 0),
        ("real-trustee-ccel-data-gcp", False, [], 0, 2),
        ("syn-zero-padding", False, [], 0, 1),
    ],
)
def test_what_real_boots_say(
    name: str, secure_boot: bool | None, command_lines: list[str], commands: int, applications: int
) -> None:
    parsed = parse_event_log((FOLDER / "ccel" / name / "ccel.bin").read_bytes())
    boot = replay(parsed, parsed.rtmrs)
    assert boot.secure_boot is secure_boot
    assert len(boot.kernel_command_lines) == len(command_lines)
    assert all(map(str.startswith, boot.kernel_command_lines, command_lines))
    assert (len(boot.grub_commands), len(boot.boot_applications)) == (commands, applications)


# --- replay ---


def test_a_boot() -> None:
    boot = replayed(*EVENTS)
    assert boot.secure_boot is True
    assert boot.kernel_command_lines == (COMMAND_LINE.decode(),)
    assert boot.grub_commands == ("linux " + COMMAND_LINE.decode(),)
    assert boot.boot_applications == (sha384(b"an image").digest(),)
    assert [e.digest_verified for e in boot.log.events] == [False, True, True, False, True, False, False, False, False]
    assert [e.measured is not None for e in boot.log.events] == [False, *[True] * 4, False, True, False, True]


def test_registers_are_extended_from_zero() -> None:
    parsed = parse_event_log(log(event(1, SEPARATOR, b"a"), event(1, SEPARATOR, b"b")))
    first = sha384(bytes(48) + sha384(b"a").digest()).digest()
    assert parsed.rtmrs == (sha384(first + sha384(b"b").digest()).digest(), *[bytes(48)] * 3)


def test_the_events_of_an_unknown_register_are_not_given() -> None:
    """In the spelling of a profile's file a loop over the events would see none, and refuse nothing."""
    with pytest.raises(PolicyError, match="not 'rtmr3'"):
        _ = parse_event_log(log()).of("rtmr3")


def test_an_event_of_no_action_extends_nothing() -> None:
    assert parse_event_log(log(event(2, NO_ACTION, b"x"), event(0, SEPARATOR, b"x"))).rtmrs == (bytes(48),) * 4


@pytest.mark.parametrize(
    "unvouched",
    [
        event(3, NO_ACTION, b"quiet"),
        event(0, SEPARATOR, b"quiet"),
        event(0, IPL, b"kernel_cmdline: quiet\0", b"quiet"),
        event(0, RUNTIME_EVENT, b"quiet", RUNTIME_EVENT.to_bytes(4, "little") + b"::quiet"),
    ],
    ids=["no action", "of MRTD", "a text of MRTD", "a runtime event of MRTD"],
)
def test_a_replay_vouches_for_no_event_that_extends_no_rtmr(unvouched: bytes) -> None:
    """A host can put such events into a log that replays."""
    good = parse_event_log(log(*EVENTS))
    added = replay(parse_event_log(log(*EVENTS, unvouched)), good.rtmrs).log.events[-1]
    assert (added.name, added.value, added.measured, added.digest_verified) == (None, None, None, False)
    assert not added.extends_rtmr


@pytest.mark.parametrize("register", range(4))
def test_a_register_without_events_must_be_zero(register: int) -> None:
    parsed = parse_event_log(log())
    rtmrs: Any = tuple(b"\x01" * 48 if i == register else bytes(48) for i in range(4))
    with pytest.raises(EventLogMismatchError) as raised:
        _ = replay(parsed, rtmrs)
    assert raised.value.registers == (f"RTMR{register}",)
    assert raised.value.difference is None


def test_a_mismatch_names_the_first_register_and_the_first_event() -> None:
    good = parse_event_log(log(*EVENTS))
    other = [*EVENTS]
    other[6], other[5] = grub("grub_cmd", b"linux /evil"), event(2, APPLICATION, b"a device path", b"another image")
    bad = parse_event_log(log(*other))
    with pytest.raises(EventLogMismatchError, match="RTMR1 is not what the log replays to") as raised:
        _ = replay(bad, good.rtmrs, good=good)
    error = raised.value
    assert (error.register, error.registers) == ("RTMR1", ("RTMR1", "RTMR2"))
    assert (error.got, error.expected) == (good.rtmrs[1], bad.rtmrs[1])
    assert error.difference is not None
    assert error.difference.register == "RTMR1"
    assert (error.difference.got, error.difference.expected) == (bad.events[5], good.events[5])
    assert "event 5, EV_EFI_BOOT_SERVICES_APPLICATION" in str(error)


def test_logs_may_part_at_an_end() -> None:
    short, full = parse_event_log(log(*EVENTS[:-1])), parse_event_log(log(*EVENTS))
    assert first_difference(full, full) is None
    less, more = first_difference(short, full), first_difference(full, short)
    assert less is not None
    assert more is not None
    assert (less.got, less.expected) == (None, full.events[-1])
    assert (more.got, more.expected) == (full.events[-1], None)
    assert str(less).startswith("RTMR2: got no more events, expected event 8, EV_IPL")


# --- extractors ---

ON, OFF, EMPTY = (variable("SecureBoot", value) for value in (b"\x01", b"\x00", b""))


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([event(1, VARIABLE, ON)], True),
        ([event(1, VARIABLE, OFF)], False),
        ([event(1, VARIABLE, EMPTY)], False),
        ([], None),
        ([event(1, VARIABLE, OFF), event(1, PLATFORM_CONFIG, ON)], None),  # a table of the host's, or so it may be
        ([event(1, SEPARATOR, b"told otherwise", OFF)], False),  # neither type nor data hide it
        ([event(1, VARIABLE, ON, OFF)], False),
        ([event(3, VARIABLE, ON)], None),  # firmware measures it into RTMR0
        ([event(1, NO_ACTION, ON)], None),
    ],
)
def test_secure_boot(events: list[bytes], expected: bool | None) -> None:
    assert replayed(*events).secure_boot is expected


@pytest.mark.parametrize(
    "events",
    [
        event(3, IPL, b"kernel_cmdline: quiet\0", b"init=/bin/sh"),
        event(2, IPL, b"kernel_cmdline: quiet\0", b"quiet"),
        event(3, SEPARATOR, b"kernel_cmdline: quiet\0", b"quiet"),
        event(2, PLATFORM_CONFIG, b"td_payload_info\0" + pack("<I", 5) + b"quiet", b"loud!"),
        event(2, PLATFORM_CONFIG, b"td_payload_info\0" + pack("<I", 4) + b"quiet", b"quiet"),
        event(2, PLATFORM_CONFIG, b"td_payload_info\0", b"quiet"),
    ],
)
def test_only_what_was_measured_is_extracted(events: bytes) -> None:
    boot = replayed(events)
    assert (boot.kernel_command_lines, boot.grub_commands) == ((), ())


def test_texts_as_they_were_measured() -> None:
    whole = event(3, IPL, b"kernel_cmdline: quiet")
    shim = event(2, PLATFORM_CONFIG, b"td_payload_info\0" + pack("<I", 7) + b"quiet\0\0", b"quiet\0\0")
    assert replayed(whole, shim).kernel_command_lines == ("quiet", "quiet")
    assert replayed(grub("grub_cmd", b"echo \xff")).grub_commands == ("echo \ufffd",)
    assert replayed(event(1, VARIABLE_BOOT, b"short", b"x")).log.events[0].measured is None
    assert replayed(event(1, VARIABLE_BOOT, variable("B", b"12") + b"3", b"12")).log.events[0].measured is None


# --- parsing ---

ONE = pack("<IH", 1, 0xC) + bytes(48)


@pytest.mark.parametrize("padding", [b"", b"\0" * 3, b"\0" * 64, b"\xff" * 5, b"\xff" * 64])
def test_padding(padding: bytes) -> None:
    assert len(parse_event_log(log(*EVENTS, padding=padding)).events) == len(EVENTS)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cut off"),
        (spec()[:31], "cut off"),
        (spec()[:-1], "declared"),
        (b"\x05" + spec()[1:], "begin with"),
        (spec()[:4] + b"\x04" + spec()[5:], "begin with"),
        (spec(signature=b"Spec ID Event02\0"), "version 03"),
        (spec(version=(1, 0, 0)), "version 1.0 of its specification, and only 2.0 is read"),
        (spec(version=(0, 2, 0)), "version 0.2 of"),
        (spec(version=(2, 1, 0)), "version 2.1 of"),
        (spec(version=(3, 0, 0)), "version 3.0 of"),
        (spec((0xB, 32)), "SHA-384"),
        (spec((0xC, 32)), "of another size"),
        (spec((0xC, 48), (0xC, 48)), "there twice"),
        (spec((0xC, 48), (0x99, 48)), "not known"),
        (spec(*[(0xC, 48)] * 9), "9 digest algorithms"),
        (spec() + b"\0" * 63 + b"\x01", "more than padding"),
        (spec() + b"\xff" * 63 + b"\0", "more than padding"),
        (spec() + EVENTS[2][:-1], "declared"),
        (spec() + EVENTS[2][:11], "cut off"),
        (log(event(5, SEPARATOR, b"x")), "no register 5"),
        (log(event(0xFFFFFFFE, SEPARATOR, b"x")), "no register"),
        (log(event(1, SEPARATOR, b"x", digests=pack("<I", 0))), "no SHA-384"),
        (log(event(1, SEPARATOR, b"x", digests=pack("<I", 0xFFFFFFFF))), "more digests"),
        (log(event(1, SEPARATOR, b"x", digests=pack("<IH", 1, 0xB) + bytes(32))), "not declared"),
        (log(event(1, SEPARATOR, b"x", digests=pack("<I", 2) + 2 * ONE[4:]), first=spec((0xC, 48), (4, 20))), "twice"),
        (spec() + pack("<II", 1, SEPARATOR) + ONE + b"\xff\xff\xff\xff", "declared"),
        (spec()[:28] + pack("<I", 34) + spec()[32:] + b"\0", "left over"),
    ],
)
def test_what_is_no_log(data: bytes, why: str) -> None:
    with pytest.raises(EventLogFormatError, match=why):
        _ = parse_event_log(data)


@pytest.mark.parametrize("errata", [0, 105, 255])  # 105 is TD-Shim's
def test_errata_make_no_other_form(errata: int) -> None:
    assert len(parse_event_log(log(*EVENTS, first=spec(version=(2, 0, errata)))).events) == len(EVENTS)


def test_a_type_without_a_name_is_its_number() -> None:
    (one,) = parse_event_log(log(event(1, 0x7777, b"x"))).events
    assert one.type_name == "0x7777"


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventlog, "MAX_EVENTS", 2)
    assert len(parse_event_log(log(*EVENTS[:2])).events) == 2
    with pytest.raises(EventLogFormatError, match="more than 2 events"):
        _ = parse_event_log(log(*EVENTS[:3]))
    with pytest.raises(EventLogFormatError, match="more than 2 events"):
        _ = parse_event_log_json("[0, 0, 0]")
    with pytest.raises(EventLogFormatError, match="more than 4194304 bytes"):
        _ = parse_event_log(bytes(eventlog.MAX_SIZE + 1))
    with pytest.raises(EventLogFormatError, match="more than 1048576 bytes of JSON"):
        _ = parse_event_log_json(b"[" + b" " * eventlog.MAX_JSON_SIZE + b"]")


def test_the_work_for_a_log_is_bounded() -> None:
    """It is compared with registers after it is parsed, so whoever sends it needs no key."""
    in_json = b"[" + b",".join([b"[]"] * 300_000) + b"]"
    binary = log(*[event(1, 1, b"")] * 16_000)
    for parse, data in ((parse_event_log, binary), (parse_event_log_json, in_json)):

        def read(parse: Callable[[bytes], object] = parse, data: bytes = data) -> None:
            with suppress(EventLogFormatError):
                _ = parse(data)

        work = work_of(read)
        assert work.calls < 100_000
        assert work.peak < 8 * MIB


@given(st.permutations(range(len(EVENTS))))
def test_order_counts_within_a_register_only(order: list[int]) -> None:
    good, other = parse_event_log(log(*EVENTS)), parse_event_log(log(*(EVENTS[i] for i in order)))
    same = all([e.digest for e in good.of(r)] == [e.digest for e in other.of(r)] for r in REGISTERS[1:])
    assert (good.rtmrs == other.rtmrs) == same == (first_difference(other, good) is None)


@given(st.integers(0, 8), st.integers(0, 47), st.integers(1, 255))
def test_no_digest_can_be_another(number: int, index: int, flip: int) -> None:
    data = bytearray(EVENTS[number])
    data[14 + index] ^= flip
    good = parse_event_log(log(*EVENTS))
    other = parse_event_log(log(*(bytes(data) if i == number else e for i, e in enumerate(EVENTS))))
    assert (good.rtmrs == other.rtmrs) == (number == 0)
