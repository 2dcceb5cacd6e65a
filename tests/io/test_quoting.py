"""Quoters: their names in settings, checks of their quotes, and programs as quoters."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest

from chutes_proto.errors import ConfigurationError, LocalProtocolError, QuoteUnavailable
from chutes_proto.io import agent
from chutes_proto.io.agent import TimedQuoter, command_signer
from chutes_proto.io.quoters import MAX_QUOTE
from chutes_proto.io.quoters.choose import AutoQuoter, make_quoter, take_quote
from chutes_proto.io.quoters.command import CommandQuoter
from chutes_proto.io.quoters.simulated import open_platform
from tests.waiting import wait_until

DATA = bytes(range(64))


# --- which one ---


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the quote command: it names no program"),
        ("command:", "the quote command: it names no program"),
        ("'", "the quote command: it cannot be split into arguments: No closing quotation"),
        ("a\0b", "the quote command: it contains a NUL"),
        ("auto:", "auto is followed by nothing"),
        ("tsm:", "tsm is followed by nothing, or :DIR"),
        ("unix", "unix is followed by :PATH"),
        ("unix:" + "s" * 108, "1 to 107 bytes"),
        ("unix:a\0b", "none of them NUL"),
        ("unix:\ud800", "1 to 107 bytes"),
        ("simulated:", "simulated is followed by nothing, or :DIR"),
        ("vsock:", "two numbers below"),
        ("vsock:2:-1", "two numbers below"),
        ("vsock:2:4294967296", "two numbers below"),
        ("vsock:2:\u0663", "two numbers below"),
    ],
)
def test_a_text_that_names_none(text: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        _ = make_quoter(text)


def test_the_simulated_platform_by_its_directory(tmp_path: Path) -> None:
    platform = open_platform(tmp_path / "named", 1_800_000_000).platform
    assert make_quoter(f"simulated:{tmp_path}/named")(DATA) == platform.quote(DATA, stage="boot")
    given = make_quoter("simulated", platform=tmp_path / "named", stage="runtime")
    assert given(DATA) == platform.quote(DATA, stage="runtime") != platform.quote(DATA, stage="boot")


def test_auto_chooses_the_first_that_quotes_and_keeps_it() -> None:
    asked: list[str] = []
    told: list[str] = []

    class Part:
        def __init__(self, name: str, *quotes: bytes | Exception) -> None:
            self._name, self._quotes = name, list(quotes)

        def __str__(self) -> str:
            return self._name

        def __call__(self, report_data: bytes) -> bytes:
            assert report_data == DATA
            asked.append(self._name)
            quote = self._quotes.pop(0)
            if isinstance(quote, Exception):
                raise quote
            return quote

    absent = Part("a", QuoteUnavailable("a: not there"), b"later")
    faulty = Part("b", OSError(5, "Input/output error"), b"later")
    there = Part("c", b"quote", QuoteUnavailable("c: busy"), b"quote")
    quoter = AutoQuoter([absent, faulty, there, Part("d", b"another")], tell=told.append)
    assert str(quoter) == "a, or else b, or else c, or else d"
    assert quoter(DATA) == b"quote"
    assert told == [
        "no quote from a: not there",
        "no quote from the quoter failed: [Errno 5] Input/output error",
        "quotes come from c",
    ]
    with pytest.raises(QuoteUnavailable, match="c: busy"):
        _ = quoter(DATA)
    assert quoter(DATA) == b"quote"
    assert asked == ["a", "b", "c", "c", "c"]
    assert len(told) == 3


def test_auto_on_a_machine_without_quotes() -> None:
    """The error names each attempt and its reason; the simulated platform and programs are never tried."""
    if Path("/dev/tdx_guest").exists() or Path("/sys/kernel/config/tsm/report").exists():
        pytest.skip("this machine is a TD")
    told: list[str] = []
    with pytest.raises(QuoteUnavailable) as raised:
        _ = make_quoter("auto", tell=told.append)(DATA)
    first, second = str(raised.value).split("; this", 1)[0], str(raised.value)
    assert first.startswith("configfs-TSM at /sys/kernel/config/tsm/report: not there")
    assert "/dev/tdx_guest is not there: load the module tdx_guest" in second
    assert told == []


# --- what is taken ---


@pytest.mark.parametrize("size", [0, MAX_QUOTE + 1])
def test_a_quote_that_is_empty_or_too_long_is_refused(size: int) -> None:
    with pytest.raises(QuoteUnavailable, match=f"{size} bytes"):
        _ = take_quote(lambda _: bytes(size), DATA)
    assert take_quote(lambda _: bytes(MAX_QUOTE), DATA) == bytes(MAX_QUOTE)


async def awaited(report_data: bytes) -> bytes:
    return report_data


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize(
    ("quoter", "told"),
    [(bytes.hex, "str, not the bytes"), (print, "NoneType"), (list, "list"), (awaited, "coroutine.*never awaited")],
)
def test_a_quoter_that_returns_something_else_is_told(quoter: Callable[..., Any], told: str) -> None:
    with pytest.raises(LocalProtocolError, match=f"quoter: it returned {told}"):
        _ = take_quote(quoter, DATA)
    assert take_quote(lambda data: cast("bytes", bytearray(data)), DATA) == DATA


def test_errors_of_the_system_are_translated() -> None:
    def broken(report_data: bytes) -> bytes:
        raise OSError(16, "Device or resource busy")

    with pytest.raises(QuoteUnavailable, match="busy"):
        _ = take_quote(broken, DATA)


# --- programs ---


def python(code: str, *arguments: str, timeout: float = 60.0) -> CommandQuoter:
    command = [sys.executable, "-c", f"import os, subprocess, sys, time\n{code}", *arguments]
    return CommandQuoter(command, timeout=timeout)


def test_report_data_comes_as_a_line_and_as_an_argument() -> None:
    quoter = python("print(sys.stdin.read(), sys.argv[1:], sep='', end='')", "{report_data}", "--hex={report_data}")
    text = DATA.hex()
    assert quoter(DATA).decode() == f"{text}\n['{text}', '--hex={text}']"


def test_a_quote_in_a_file() -> None:
    """The file is private, and removed afterwards."""
    code = (
        "path = sys.argv[1].removeprefix('--out=')\nprint('progress')\n"
        "mode = oct(os.stat(os.path.dirname(path)).st_mode)\nopen(path, 'w').write(f'{path} {mode}')"
    )
    path, mode = python(code, "--out={output}")(DATA).decode().split()
    assert mode == "0o40700"
    assert not Path(path).parent.exists()


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("print('a quote')", "ended with 0, but .*/quote cannot be read: No such file"),
        ("os.mkdir(sys.argv[1])", "cannot be read: Is a directory"),
        (f"open(sys.argv[1], 'wb').write(bytes({MAX_QUOTE} + 1))", "gave more than 49152 bytes"),
        ("sys.exit('no luck')", "ended with exit status 1: no luck"),
    ],
)
def test_a_file_that_is_not_a_quote(code: str, told: str) -> None:
    with pytest.raises(QuoteUnavailable, match=told):
        _ = python(code, "{output}")(DATA)


def test_a_pipe_in_the_place_of_a_quote_is_not_waited_for() -> None:
    with pytest.raises(QuoteUnavailable, match="gave 0 bytes"):
        _ = take_quote(TimedQuoter(python("os.mkfifo(sys.argv[1])", "{output}"), time.monotonic() + 20), DATA)


def test_a_command_line_is_split_as_by_a_shell_but_no_shell_runs(tmp_path: Path) -> None:
    interpreter = shlex.quote(sys.executable)
    quoter = CommandQuoter(f"{interpreter} -c 'import sys; print(sys.argv[1:])' 'a b' '$(touch {tmp_path}/x)' ; |")
    assert quoter(DATA) == f"['a b', '$(touch {tmp_path}/x)', ';', '|']\n".encode()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("sys.exit('no such device')", "ended with exit status 1: no such device"),
        ("sys.exit(7)", "ended with exit status 7: it wrote no error"),
        ("os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("sys.stderr.write('x' * 100000 + 'the end'); sys.exit(2)", "x" * 293 + "the end"),
        ("sys.stderr.buffer.write(b'\\xff\\xfe'); sys.exit(2)", "\ufffd\ufffd"),
        ("os.close(0); sys.exit(3)", "exit status 3"),
    ],
)
def test_a_program_that_fails(code: str, text: str) -> None:
    with pytest.raises(QuoteUnavailable) as raised:
        _ = python(code)(DATA)
    assert text in str(raised.value)
    assert len(str(raised.value)) < 600


def test_a_program_without_end_of_output() -> None:
    with pytest.raises(QuoteUnavailable, match="gave more than 49152 bytes, more than any quote has"):
        _ = python("while True: sys.stdout.write('x' * 4096)")(DATA)


@pytest.mark.parametrize(
    "code",
    [
        "time.sleep(60)",
        "os.close(1); os.close(2); time.sleep(60)",
        "sys.stderr.write('still waiting'); sys.stderr.flush(); time.sleep(60)",
    ],
)
def test_a_program_that_does_not_end(code: str) -> None:
    with pytest.raises(QuoteUnavailable, match=r"did not end within 0\.2 s"):
        _ = python(code, timeout=0.2)(DATA)


ENDLESS = (
    "held = os.open(sys.argv[1], os.O_WRONLY)\nos.set_inheritable(held, True)\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], close_fds=False)\ntime.sleep(600)"
)


@contextmanager
def all_ended(fifo: Path) -> Iterator[None]:
    """Program and child have one end of a FIFO open: the other is at its end when both have ended."""
    os.mkfifo(fifo)
    watched = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield

        def is_at_its_end() -> bool:
            with suppress(BlockingIOError):
                assert os.read(watched, 1) == b""
                return True
            return False

        _ = wait_until(is_at_its_end)
    finally:
        os.close(watched)


def test_the_children_of_a_program_end_with_it(tmp_path: Path) -> None:
    fifo = tmp_path / "alive"
    with all_ended(fifo), pytest.raises(QuoteUnavailable, match="did not end within 2 s"):
        _ = python(ENDLESS, str(fifo), timeout=2)(DATA)


def test_a_child_that_holds_the_output_of_a_program_that_ended(tmp_path: Path) -> None:
    fifo = tmp_path / "alive"
    code = ENDLESS.removesuffix("time.sleep(600)") + "print('quote')"
    with all_ended(fifo), pytest.raises(QuoteUnavailable, match="ended, but its child held its output for 2 s"):
        _ = python(code, str(fifo), timeout=2)(DATA)


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(QuoteUnavailable, match="cannot be run: No such file"):
        _ = CommandQuoter(["/no/such/program"])(DATA)
    with pytest.raises(QuoteUnavailable, match=r"cannot be run: .*surrogates not allowed"):
        _ = CommandQuoter(["true", "\ud800"])(DATA)
    not_executable = tmp_path / "program"
    not_executable.touch()
    with pytest.raises(QuoteUnavailable, match="cannot be run: Permission denied"):
        _ = CommandQuoter([str(not_executable)])(DATA)


def test_a_stop_is_not_lost_when_the_program_has_just_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(KeyboardInterrupt):
        pass

    wait = subprocess.Popen.wait

    def stopped(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        monkeypatch.undo()
        _ = wait(process, timeout)  # as by a signal right after it
        raise Stop

    monkeypatch.setattr(subprocess.Popen, "wait", stopped)
    with pytest.raises(Stop):
        _ = CommandQuoter(["true"])(DATA)


# --- a deadline ---


@pytest.fixture
def least(monkeypatch: pytest.MonkeyPatch) -> float:
    """The least time of a quote, made short: a small part of its own limit."""
    monkeypatch.setattr(agent, "LEAST_SECONDS", 0.3)
    return 0.3


@contextmanager
def ended_by_the_deadline(text: str) -> Iterator[None]:
    before, begun = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(QuoteUnavailable, match=f"{text}: the deadline, retry.deadline_seconds, ended it$"):
        yield
    assert 0.2 < time.monotonic() - begun < 60
    assert signal.getsignal(signal.SIGALRM) is before


def waiting(reading: int) -> Callable[[bytes], bytes]:
    """Wait in the kernel, as for a host that does not answer."""

    class Waiting:
        def __call__(self, _: bytes) -> bytes:
            return os.read(reading, 1)

        def __str__(self) -> str:
            return "the kernel"

    return Waiting()


@pytest.fixture
def never() -> Iterator[int]:
    """A descriptor on which no data arrives."""
    reading, writing = os.pipe()
    yield reading
    os.close(reading)
    os.close(writing)


def test_the_deadline_ends_a_program_and_its_children(tmp_path: Path, least: float) -> None:
    fifo = tmp_path / "alive"
    with all_ended(fifo), ended_by_the_deadline("^the quote command .*"):
        _ = TimedQuoter(python(ENDLESS, str(fifo)), time.monotonic() + 2 + least)(DATA)


def test_the_deadline_ends_a_wait_in_the_kernel(least: float, never: int) -> None:
    with ended_by_the_deadline("^the kernel"):
        _ = TimedQuoter(waiting(never), time.monotonic() + 2 * least)(DATA)


def test_the_deadline_ends_auto_as_a_whole(least: float, never: int) -> None:
    def absent(_: bytes) -> bytes:
        raise QuoteUnavailable("a: not there")

    def last(_: bytes) -> bytes:
        pytest.fail("asked although the time is over")

    with ended_by_the_deadline("^a: not there; the kernel"):
        _ = TimedQuoter(AutoQuoter([absent, waiting(never), last]), time.monotonic())(DATA)


def test_the_deadline_ends_a_program_that_signs(least: float) -> None:
    with ended_by_the_deadline("^the signature command sleep"):
        _ = command_signer("sleep 600", deadline=time.monotonic() + least)(DATA)


def test_a_quote_in_time_is_given_also_after_the_deadline() -> None:
    assert TimedQuoter(python("print(1)"), time.monotonic() - 60)(DATA) == b"1\n"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert TimedQuoter(lambda _: b"quote", time.monotonic() + 60)(DATA) == b"quote"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(QuoteUnavailable, match="exit status 1"):
        _ = TimedQuoter(python("sys.exit(1)"), time.monotonic() + 60)(DATA)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
