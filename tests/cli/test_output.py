"""How results look on a terminal, in a pipe, and where a text would steer the terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chutes_proto._extras import EXTRAS
from chutes_proto.cli import console, output
from chutes_proto.cli.extras import extra_of
from chutes_proto.cli.main import guarded, main
from chutes_proto.cli.output import Cell
from chutes_proto.errors import StoreError
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.store._rows import AuditRow, Vm
from tests.cli.conftest import PROGRAM, Ended
from tests.waiting import wait_until

Shown = Callable[[], str]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shown:
    """Both streams are a terminal of 80 columns; returns what it has shown since the last time."""
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    return lambda: "".join(capsys.readouterr())


ROWS = [("5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY/vm-1", Cell("refused", "bad"), "a word " * 30)]
COLUMNS: output.Columns = {"VM": lambda row: row[0], "STATE": lambda row: row[1], "REASON": lambda row: row[2]}


def test_a_table_fits_the_terminal_and_colours_a_state(terminal: Shown) -> None:
    output.table(COLUMNS, ROWS, empty="none")
    shown = terminal()
    assert "\x1b[31mrefused" in shown
    assert max(map(len, shown.replace("\x1b[31m", "").replace("\x1b[0m", "").replace("\x1b[1m", "").splitlines())) <= 80


def test_no_colour_where_it_is_not_wanted(terminal: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    output.table(COLUMNS, ROWS, empty="none")
    assert "\x1b[3" not in terminal()


def test_a_pipe_gets_whole_values_in_columns(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(COLUMNS, ROWS, empty="none")
    heads, row = capsys.readouterr().out.splitlines()
    assert heads.split() == [*COLUMNS]
    assert row == f"{ROWS[0][0]}  refused  {ROWS[0][2]}".rstrip()


def test_a_name_of_a_file_adds_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "none\nchutes-proto: all is well"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == r"chutes-proto: 'none\nchutes-proto: all is well': cannot be read: No such file or directory"


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_a_text_of_a_row_adds_no_line(terminal: Shown, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    row = AuditRow(1, "vm", "boot", "refused", "x\ngranted", Vm("5G", "a\nb"))
    cells: output.Columns = {"VM": lambda row: output.vm(row.vm.hotkey, row.vm.name), "REASON": lambda row: row.reason}
    output.table(cells, [row], empty="none")
    output.prose(row.reason, "bad")
    shown = terminal()
    assert shown.count("\\ngranted") == 2
    assert "a\\nb" in shown


@pytest.mark.parametrize("hostile", ["\x1b]0;owned\x07", "\x1b[2J", "[red]x[/red][link=file:///]", "\x9b2J", "\u202e"])
def test_no_text_steers_a_terminal(terminal: Shown, hostile: str) -> None:
    output.table({"A": str, "B": lambda row: Cell(row, "good")}, [hostile], empty="none")
    output.prose(f"note: {hostile}", "warn")
    console.complain(f"{hostile}: {hostile}; {hostile}")
    shown = terminal()
    for known in ("\x1b[1m", "\x1b[0m", "\x1b[32m", "\x1b[33m"):
        shown = shown.replace(known, "")
    assert shown.replace("\n", "").isprintable()
    assert hostile.isprintable() == (hostile in shown)


ERROR = "kek: permissions are 0644, which is too open; run chmod 600 kek"


@pytest.mark.parametrize(
    ("words", "closed"),
    [
        ("--help", ">&-"),
        ("vm --help", "2>&-"),
        ("vm list", "<&- >&-"),
        ("no-such-command", ">&- 2>&-"),
        ("agent --help", ">&- 2>&-"),
        ("serve --help", ">&-"),
        ("collateral serve --help", "<&- >&-"),
        ("agent --help", "<&-"),
    ],
)
def test_a_stream_that_is_closed_is_a_fault_only_where_it_had_the_result(words: str, closed: str) -> None:
    """A server, and a boot in an initramfs, may be started without one: they do their work."""
    done = subprocess.run(
        ["bash", "-c", f'"$@" {closed}', "bash", *PROGRAM, *words.split()], capture_output=True, text=True, check=False
    )
    is_lost = " >&-" in f" {closed}" and not words.startswith(("agent", "serve", "collateral serve"))
    assert (done.returncode, "Traceback" in done.stderr) == (0 if "help" in words and not is_lost else 2, False)
    if is_lost and "help" in words and "2>" not in closed:
        assert done.stderr == "chutes-proto: standard output: Bad file descriptor\n"


def test_standard_input_that_is_closed_is_empty() -> None:
    command = ["bash", "-c", '"$@" <&-', "bash", *PROGRAM, "inspect", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "0 bytes" in done.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&- 2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_descriptor_of_a_stream_that_is_closed(closed: str, tmp_path: Path) -> None:
    """A disk would get what a library writes to standard error, and a program that is started would read from it."""
    code = "import os, sys; from chutes_proto.cli.main import main; main(['agent', '--help'])\n"
    code += "opened = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
    code += "_ = os.write(opened, str([opened, *map(os.get_inheritable, range(3))]).encode())\n"
    program = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, "-c", code, str(tmp_path / "disk")]
    _ = subprocess.run(program, stdout=subprocess.DEVNULL, check=True)
    assert (tmp_path / "disk").read_text() == "[3, True, True, True]"


@pytest.mark.parametrize(
    ("words", "code", "is_full"),
    [("no-such-command", 2, True), ("vm list --config /none", 2, False), ("hotkey inspect 5F", 1, True)],
)
def test_an_error_that_cannot_be_written_has_its_own_exit_code(words: str, code: int, is_full: bool) -> None:
    heard, said = os.pipe()
    os.close(heard)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("wb") as full, os.fdopen(said, "wb") as unheard:
        command, stream = [*PROGRAM, *words.split()], full if is_full else unheard
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=stream, env=buffered, check=False)
    assert done.returncode == code


def test_a_list_that_an_error_ends_leaves_the_next_line_whole(capsys: pytest.CaptureFixture[str]) -> None:
    def members() -> Iterator[int]:
        yield 1
        raise StoreError("it went away")

    with pytest.raises(StoreError):
        console.say_json_list({}, "rows", members())
    console.say_json({"ok": False})
    assert capsys.readouterr().out.splitlines() == ['{"rows": [1', '{"ok": false}']


def test_a_line_that_is_not_taken_hides_no_later_one(tmp_path: Path) -> None:
    """A disk may be full for a moment, while a command that works for long says how far it is."""
    program = (
        "import resource, sys; from chutes_proto.cli import console;"
        " limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY));"
        " limit(0); console.tell('progress'); limit(resource.RLIM_INFINITY); console.tell('error')"
    )
    with (tmp_path / "log").open("wb") as log:
        _ = subprocess.run([sys.executable, "-c", program], stderr=log, check=True)
    assert (tmp_path / "log").read_text().endswith("error\n")


def test_an_error_is_one_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    console.complain(ERROR)
    assert capsys.readouterr().err == f"chutes-proto: {ERROR}\n"


def test_results_do_not_go_to_the_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_SHOWN_AFTER", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = ""

    def is_shown() -> bool:
        nonlocal shown
        shown += capsys.readouterr().err
        return "VMs" in shown

    with output.progress("VMs", 10):
        _ = wait_until(is_shown)
        console.say("a result")
    assert capsys.readouterr().out == "a result\n"


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_is_one_line(extra: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = next(one for one in EXTRAS[extra] if extra_of(one) == extra)

    def run(_: object) -> int:
        raise ModuleNotFoundError(name=f"{module}.part")

    assert guarded(run, []) == 2
    told = f"chutes-proto: this command needs the extra {extra}: pip install 'chutes-proto[{extra}]'\n"
    assert capsys.readouterr().err == told


def without(*modules: str) -> list[str]:
    """The program in a Python where these modules are not installed."""
    hide = f"""
import sys
class Finder:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {modules!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Finder, sys.meta_path)
from chutes_proto.cli.main import main
sys.exit(main())
"""
    return [sys.executable, "-c", hide]


@pytest.mark.parametrize(
    ("words", "hidden", "told"),
    [
        (["--help"], ("click",), "extra cli"),
        (["serve", "--dev"], ("trio", "anyio"), "extra asyncio"),
        (["serve", "--dev", "--transport", "trio"], ("trio",), "extra trio"),
    ],
)
def test_a_command_names_its_extra(words: list[str], hidden: tuple[str, ...], told: str) -> None:
    done = subprocess.run([*without(*hidden), *words], capture_output=True, text=True, check=False)
    assert (done.returncode, told in done.stderr, len(done.stderr.splitlines())) == (2, True, 1), done.stderr


def test_the_store_needs_no_extra_but_cli(command: Callable[..., Ended], tmp_path: Path) -> None:
    address = f"sqlite:{tmp_path}/keys.db"
    SqliteStore(tmp_path / "keys.db").close()
    hidden = without("httpx", "anyio", "trio", "h11", "OpenSSL", "sr25519", "psycopg", "rich")
    done = subprocess.run([*hidden, "store", "check", "--store", address], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
