"""Where quotes come from. A quoter is a callable: 64 bytes of report data in, the quote out; it may block.

The simulated platform's quoter is its method ``SimulatedPlatform.quote``. Whatever goes wrong with a quoter reaches a
flow as `QuoteUnavailable`, whose text says what was tried.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Sequence
from typing import TypeAlias

from chutes_proto.errors import LocalProtocolError, QuoteUnavailable

Quoter: TypeAlias = "Callable[[bytes], bytes]"

MAX_QUOTE = 48 * 1024
"""No more than this fits, in base64, into the 64 KiB body that a server reads."""

_PLACE = "{report_data}"
_TAIL = 300


def check_quoter(quoter: object) -> None:
    """Raises `LocalProtocolError` for what cannot be a quoter, before anything is asked of a server."""
    if not callable(quoter):
        kind = type(quoter).__name__
        raise LocalProtocolError(
            f"a quoter is called with the report data and gives the quote, and {kind} cannot be called; for a command"
            " say CommandQuoter(command)"
        )


def take_quote(quoter: Quoter, report_data: bytes) -> bytes:
    """What the quoter gives for ``report_data``. Raises `QuoteUnavailable`."""
    try:
        quote = quoter(report_data)
    except OSError as exc:
        raise QuoteUnavailable(f"the quoter failed: {exc}") from exc
    if not 0 < len(quote) <= MAX_QUOTE:
        raise QuoteUnavailable(f"the quoter gave {len(quote)} bytes, which is no quote")
    return quote


class CommandQuoter:
    """An external program as a quoter.

    ``command`` is a list of arguments, or a line that is cut as a shell would cut it (no shell runs). The program gets
    the report data in hex, as one line on its standard input and wherever an argument says ``{report_data}``; it
    writes the quote to its standard output and exits with 0 within ``timeout`` seconds.
    """

    def __init__(self, command: Sequence[str] | str, *, timeout: float = 30.0) -> None:
        try:
            self._command = shlex.split(command) if isinstance(command, str) else list(command)
        except ValueError as exc:
            raise QuoteUnavailable(f"the quote command cannot be cut into arguments: {exc}") from None
        self._timeout = timeout
        if not self._command:
            raise QuoteUnavailable("the quote command is empty")

    def __call__(self, report_data: bytes) -> bytes:
        """The program's standard output. Raises `QuoteUnavailable` with its exit status and its last words."""
        text = report_data.hex()
        arguments = [argument.replace(_PLACE, text) for argument in self._command]
        name = arguments[0]
        try:
            done = subprocess.run(
                arguments, input=f"{text}\n".encode(), capture_output=True, timeout=self._timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise QuoteUnavailable(f"the quote command {name} did not end within {self._timeout:g} s") from None
        except OSError as exc:
            raise QuoteUnavailable(f"the quote command {name} cannot be run: {exc.strerror}") from exc
        if done.returncode != 0:
            ended = f"with exit status {done.returncode}" if done.returncode > 0 else f"by signal {-done.returncode}"
            said = done.stderr.decode("utf-8", "replace").strip()[-_TAIL:]
            raise QuoteUnavailable(f"the quote command {name} ended {ended}: {said or 'it said nothing'}")
        return done.stdout
