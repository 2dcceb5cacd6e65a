"""Quoters: an external program gives a quote, or a clear reason why there is none."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from chutes_proto.blocking.quoting import MAX_QUOTE, CommandQuoter, take_quote
from chutes_proto.errors import QuoteUnavailable

DATA = bytes(range(64))


def python(code: str, *arguments: str) -> CommandQuoter:
    return CommandQuoter([sys.executable, "-c", f"import os, sys, time\n{code}", *arguments])


def test_report_data_comes_as_a_line_and_as_an_argument() -> None:
    quoter = python("print(sys.stdin.readline(), sys.argv[1:], sep='', end='')", "{report_data}", "--hex={report_data}")
    text = DATA.hex()
    assert quoter(DATA).decode() == f"{text}\n['{text}', '--hex={text}']"


def test_a_quote_is_bytes_as_they_are() -> None:
    assert python("sys.stdout.buffer.write(bytes(range(256)))")(DATA) == bytes(range(256))


def test_a_command_line_is_cut_as_a_shell_cuts_it_but_no_shell_runs(tmp_path: Path) -> None:
    interpreter = shlex.quote(sys.executable)
    quoter = CommandQuoter(f"{interpreter} -c 'import sys; print(sys.argv[1:])' 'a b' '$(touch {tmp_path}/x)' ; |")
    assert quoter(DATA) == f"['a b', '$(touch {tmp_path}/x)', ';', '|']\n".encode()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("sys.exit('no such device')", "ended with exit status 1: no such device"),
        ("sys.exit(7)", "ended with exit status 7: it said nothing"),
        ("os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("sys.stderr.write('x' * 1000 + 'the end'); sys.exit(2)", "x" * 293 + "the end"),
        ("sys.stderr.buffer.write(b'\\xff\\xfe'); sys.exit(2)", "\ufffd\ufffd"),
    ],
)
def test_a_program_that_fails(code: str, text: str) -> None:
    with pytest.raises(QuoteUnavailable) as raised:
        python(code)(DATA)
    assert text in str(raised.value)
    assert len(str(raised.value)) < 600


def test_a_program_that_does_not_end() -> None:
    quoter = CommandQuoter([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)
    with pytest.raises(QuoteUnavailable, match=r"did not end within 0\.2 s"):
        quoter(DATA)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(QuoteUnavailable, match="cannot be run: No such file"):
        CommandQuoter(["/no/such/program"])(DATA)
    not_executable = tmp_path / "program"
    not_executable.touch()
    with pytest.raises(QuoteUnavailable, match="cannot be run: Permission denied"):
        CommandQuoter([str(not_executable)])(DATA)
    with pytest.raises(QuoteUnavailable, match="empty"):
        CommandQuoter("  ")


@pytest.mark.parametrize("size", [0, MAX_QUOTE + 1])
def test_what_no_server_would_read_is_no_quote(size: int) -> None:
    with pytest.raises(QuoteUnavailable, match=f"{size} bytes"):
        take_quote(lambda _: bytes(size), DATA)
    assert take_quote(lambda _: bytes(MAX_QUOTE), DATA) == bytes(MAX_QUOTE)


def test_what_the_system_raises_is_translated() -> None:
    def broken(report_data: bytes) -> bytes:
        raise OSError(16, "Device or resource busy")

    with pytest.raises(QuoteUnavailable, match="busy"):
        take_quote(broken, DATA)
