"""Quotes, and evidence of GPUs, from an external program.

Rules kept here:

* no shell runs; the program gets the report data or the nonce, which is not secret, and nothing else;
* at its time limit, it and every process that it has started are killed, but for one that left its session;
* its output is bounded, and a file for the quote is in a directory that only this user can enter.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Final, cast

from chutes_proto.boot._quoter_names import check_command, cut_command
from chutes_proto.errors import ConfigurationError, QuoteUnavailable
from chutes_proto.io import how_it_ended, seconds_left
from chutes_proto.io.quoters import MAX_QUOTE

if TYPE_CHECKING:
    import subprocess

_OUTPUT = "{output}"
_TAIL: Final = 300


class CommandQuoter:
    """An external program as a quoter.

    ``command`` is a list of arguments, or a line that is split as a shell would split it (no shell runs). The program
    gets the report data in hex, as one line on its standard input and wherever an argument says ``{report_data}``. It
    writes the quote to its standard output, or, where an argument says ``{output}``, to the file of that name, and
    exits with 0 within ``timeout`` seconds. ``what`` names its output, of at most ``most`` bytes, in messages, and
    ``data`` its input. Raises `ConfigurationError` for an empty or unbalanced command.
    """

    def __init__(
        self,
        command: Sequence[str] | str,
        *,
        timeout: float = 30.0,
        what: str = "quote",
        data: str = "report_data",
        most: int = MAX_QUOTE,
    ) -> None:
        try:
            self._command = cut_command(command) if isinstance(command, str) else check_command(command)
        except ConfigurationError as exc:
            raise ConfigurationError(f"the {what} command: {exc}") from None
        self._timeout = timeout
        self._what = what
        self._place = f"{{{data}}}"
        self._most = most

    def __str__(self) -> str:
        return f"the {self._what} command {self._command[0]}"

    def __call__(self, report_data: bytes) -> bytes:
        """Return the program's output. Raises `QuoteUnavailable` with its exit status and its last lines."""
        text = report_data.hex()
        arguments = [argument.replace(self._place, text) for argument in self._command]
        if not any(_OUTPUT in argument for argument in arguments):
            return self._run(arguments, text)
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory(prefix="chutes-proto-quote-") as directory:
            output = Path(directory, "quote")
            _ = self._run([argument.replace(_OUTPUT, str(output)) for argument in arguments], text)
            try:
                descriptor = os.open(output, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
                with os.fdopen(descriptor, "rb") as file:
                    quote = file.read(self._most + 1)
            except OSError as exc:
                raise QuoteUnavailable(f"{self} ended with 0, but {output} cannot be read: {exc.strerror}") from exc
        self._check_size(quote)
        return quote

    def _run(self, arguments: list[str], text: str) -> bytes:
        import signal
        import subprocess

        end = time.monotonic() + self._timeout
        pipe = subprocess.PIPE
        try:
            # A session of its own: one signal reaches all that it starts.
            process = subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        except (OSError, ValueError) as exc:  # ValueError: a character that no argument can have
            why = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise QuoteUnavailable(f"{self} cannot be run: {why}") from exc
        with process:
            try:
                output, said = self._talk(process, f"{text}\n".encode(), end)
                status = process.wait(seconds_left(end))
            except BaseException as exc:
                has_ended = _has_ended(process)
                with suppress(ProcessLookupError):  # it has just ended: that must not hide why we end it
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(exc, TimeoutError | subprocess.TimeoutExpired):
                    late = f"did not end within {self._timeout:g} s"
                    if has_ended:
                        late = f"ended, but its child held its output for {self._timeout:g} s; redirect that"
                    raise QuoteUnavailable(f"{self} {late}") from None
                raise
        if status != 0:
            last = said.decode("utf-8", "replace").strip()[-_TAIL:]
            raise QuoteUnavailable(f"{self} {how_it_ended(status)}: {last or 'it wrote no error'}")
        return output

    def _talk(self, process: subprocess.Popen[bytes], line: bytes, end: float) -> tuple[bytes, bytes]:
        """Return the whole of standard output and the end of standard error, once the program has closed both."""
        import selectors

        stdin, stdout, stderr = cast("tuple[IO[bytes], ...]", (process.stdin, process.stdout, process.stderr))
        with suppress(BrokenPipeError):  # it need not read; a line this short never blocks
            _ = os.write(stdin.fileno(), line)
        stdin.close()
        output, said = bytearray(), bytearray()
        with selectors.DefaultSelector() as selector:
            _ = selector.register(stdout, selectors.EVENT_READ, output)
            _ = selector.register(stderr, selectors.EVENT_READ, said)
            while selector.get_map():
                for key, _events in selector.select(seconds_left(end)):
                    piece = os.read(key.fd, 16384)
                    if not piece:
                        _ = selector.unregister(key.fileobj)
                    key.data.extend(piece)
                self._check_size(output)
                del said[: -4 * _TAIL]
        return bytes(output), bytes(said)

    def _check_size(self, output: bytes | bytearray) -> None:
        if len(output) > self._most:
            raise QuoteUnavailable(f"{self} gave more than {self._most} bytes, more than any {self._what} has")


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Return whether it has ended, and leave it to be waited for: until then its group is nobody else's."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
