"""Follows the README and the tutorials as somebody does who knows nothing: ``python -m tools.docs.newcomer``.

It makes a wheel of the checkout and a fresh environment with it, and does in an empty directory what each page says, to
the letter: saves its files, runs its commands, compares what they print. It ends with an error if a command fails
although the page does not say so, prints something else, or takes longer than the page promises.

Rules kept here:

* ``…`` in an output stands for any text; on a line of its own for any lines, or none;
* a command may fail only if the page shows ``echo $?`` next;
* a fence with the title ``Terminal 1`` is another terminal; a command there may go on for ever, once it printed what
  the page shows, also into the file that ``tee`` writes, after it has printed;
* the one thing that is not to the letter: a port of the page is replaced by a free one, since others use this machine.

With ``--quick`` the environment borrows the packages of the one that runs this; otherwise it installs them, from their
pins.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from attrs import define, field

from tools.docs.pages import DOCS, ROOT, Fence, Step, fences, steps
from tools.ports import free_port

README = ROOT / "README.md"
PAGES = (
    README,
    DOCS / "tutorials" / "verifier.md",
    DOCS / "tutorials" / "key-server.md",
    DOCS / "tutorials" / "boot-agent.md",
)
PORT = "8443"
LONGEST_STEP = 60.0
"""Seconds that one command may take on a slow machine; the page's promise is for all of it."""


class NotAsPromised(AssertionError):
    """The page promised something else."""


# --- a terminal ---


@define
class Terminal:
    """A shell that keeps its directory and variables from one command to the next."""

    directory: Path
    environment: dict[str, str]
    _heard: queue.Queue[str | None] = field(factory=queue.Queue, init=False)
    _process: subprocess.Popen[str] = field(init=False)
    _listener: threading.Thread = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._process = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self._heard.put(line)
        self._heard.put(None)

    def run(self, command: str, expected: str | None, *, may_stay: bool) -> tuple[str, int | None]:
        """Return the output of ``command`` and its status; None if it runs on and has printed all of ``expected``."""
        mark = f"newcomer-{os.urandom(8).hex()}"
        assert self._process.stdin is not None
        _ = self._process.stdin.write(f'eval {shlex.quote(command)} </dev/null; echo "{mark} $?"\n')
        self._process.stdin.flush()
        printed, until = "", time.monotonic() + LONGEST_STEP
        while True:
            if may_stay and expected is not None and agrees(expected, printed):
                return printed, None
            try:
                line = self._heard.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise NotAsPromised(
                    f"$ {command}\ntook longer than {LONGEST_STEP:g} s; it printed:\n{printed}"
                ) from None
            if line is None:
                raise NotAsPromised(f"$ {command}\nended the shell; it printed:\n{printed}")
            text, found, status = line.partition(mark)
            printed += text
            if found:
                _ = self._process.stdin.write(f"(exit {int(status)})\n")  # what `echo $?` shows next
                self._process.stdin.flush()
                return printed, int(status)

    def close(self) -> None:
        """End the shell and everything that runs in it, which may first remove what it has made."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            self._listener.join(5)  # the output ends with the last of them
        _ = self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def agrees(expected: str, printed: str) -> bool:
    """Whether what was printed is what the page shows."""
    pattern = ""
    for line in expected.splitlines():
        pattern += r"(?:.*\n)*?" if line.strip() == "…" else re.escape(line.rstrip()).replace("…", ".*?") + r"[ \t]*\n"
    return re.fullmatch(pattern, printed if printed.endswith("\n") or not printed else printed + "\n") is not None


# --- a page ---


def follow(page: Path, directory: Path, environment: dict[str, str]) -> Iterator[str]:
    """Do in ``directory`` what the page says; yields each command. Raises `NotAsPromised`."""
    minutes = re.search(r"^minutes: (\d+)$", page.read_text("utf-8"), re.MULTILINE)
    started = time.monotonic()
    port = str(free_port())
    terminals: dict[str, Terminal] = {}
    try:
        for fence in fences(page):
            if page == README and fence.language != "console":
                continue  # `follow_readme` runs what is for the checkout; the rest is for a machine of the reader's
            yield from _do(fence, directory, environment, terminals, port)
    except NotAsPromised as exc:
        raise NotAsPromised(f"{page.relative_to(ROOT)}: {exc}") from None
    finally:
        for terminal in terminals.values():
            terminal.close()
    took = time.monotonic() - started
    if minutes is not None and took > 60 * int(minutes[1]):
        raise NotAsPromised(f"{page.relative_to(ROOT)}: took {took:.0f} s; it promises {minutes[1]} minutes")


def _do(
    fence: Fence, directory: Path, environment: dict[str, str], terminals: dict[str, Terminal], port: str
) -> Iterator[str]:
    if fence.language not in ("sh", "console"):
        if fence.title:
            _ = (directory / fence.title).write_text(fence.text.replace(PORT, port), "utf-8")
        return
    terminal = terminals.get(fence.title) or Terminal(directory, environment)
    terminals[fence.title] = terminal
    listed = list(steps(fence))
    for number, step in enumerate(listed):
        command = step.command.replace(PORT, port)
        expected = None if step.output is None else step.output.replace(PORT, port)
        yield command
        printed, status = terminal.run(command, expected, may_stay=bool(fence.title))
        if status is None and expected is not None and (copied := re.search(r"\| tee (\S+)$", command)):
            _wait_for(directory / copied[1], expected)
        if expected is not None and not agrees(expected, printed):
            raise NotAsPromised(f"$ {command}\nshould print\n{expected}\nand printed\n{printed}")
        if status and not _shows_status(listed[number + 1 :]):
            raise NotAsPromised(f"$ {command}\nended with {status}; it printed\n{printed}")


def _wait_for(file: Path, expected: str) -> None:
    until = time.monotonic() + LONGEST_STEP
    while not (file.exists() and agrees(expected, file.read_text("utf-8"))):
        if time.monotonic() > until:
            raise NotAsPromised(f"{file.name} does not have what was printed")
        time.sleep(0.01)


def _shows_status(following: Sequence[Step]) -> bool:
    return bool(following) and following[0].command.strip() == "echo $?"


# --- a fresh environment ---


def make_wheel(folder: Path) -> Path:
    """A wheel of the checkout."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _ = subprocess.run([*build, "--no-build-isolation", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path, *, quick: bool) -> Path:
    """A new virtual environment with ``wheel`` and what it needs; its directory of programs."""
    venv.create(folder, with_pip=not quick, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)] if quick else [str(python), "-m", "pip"]
    install = [*pip, "--disable-pip-version-check", "--quiet", "--no-input", "install"]
    if quick:
        (packages,) = (folder / "lib").glob("python*/site-packages")
        mine = Path(sys.executable).parent.parent / packages.relative_to(folder)
        # Only this file is read, and not the .pth files in that directory, one of which names the checkout.
        _ = (packages / "borrowed.pth").write_text(f"{mine}\n")
        what = ["--no-deps", str(wheel)]
    else:
        pins = re.findall(r"^[\w.-]+==[^\\\n]+", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
        constraints = folder / "constraints.txt"
        _ = constraints.write_text("\n".join(pins))
        what = ["--constraint", str(constraints), f"{wheel}[all]"]
    _ = subprocess.run([*install, *what], check=True)
    return folder / "bin"


def outside(environment: dict[str, str], programs: Path, home: Path) -> dict[str, str]:
    """The variables of somebody who has just activated that environment."""
    kept = {name: value for name, value in environment.items() if not name.startswith(("PYTHON", "CHUTES", "COV_"))}
    path = f"{programs}:{kept.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return {
        **kept,
        "PATH": path,
        "VIRTUAL_ENV": str(programs.parent),
        "HOME": str(home),
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }


def follow_readme() -> None:
    """Run the commands of the README's "Try it" here, but for the tests, which run this."""
    for fence in fences(README):
        if fence.heading == "Try it" and fence.language == "sh":
            for line in fence.text.splitlines():
                command = line.partition("#")[0].strip()
                if command != "make test":
                    print(f"  $ {command}", flush=True)
                    _ = subprocess.run(command, shell=True, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # noqa: S602


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.docs.newcomer", description=__doc__.partition("\n")[0])
    _ = parser.add_argument("page", nargs="*", type=Path, default=PAGES, help="a page (default: every tutorial)")
    _ = parser.add_argument("--quick", action="store_true", help="borrow the packages of this environment")
    options = parser.parse_args(arguments)
    if not options.quick:
        follow_readme()
    with tempfile.TemporaryDirectory(prefix="chutes-proto-newcomer-") as name:
        folder = Path(name)
        programs = make_environment(folder / "venv", make_wheel(folder), quick=options.quick)
        for page in options.page:
            directory = folder / page.stem
            directory.mkdir()
            started = time.monotonic()
            try:
                for command in follow(page.resolve(), directory, outside(dict(os.environ), programs, folder)):
                    print(f"  $ {command.strip()}", flush=True)
            except NotAsPromised as exc:
                print(exc, file=sys.stderr)
                return 1
            print(f"{page.stem}: as promised, in {time.monotonic() - started:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
