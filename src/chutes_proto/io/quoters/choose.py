"""Choice of a quoter: a callable that takes 64 bytes of report data and returns the quote; it may block.

`make_quoter` makes the one that a configuration names; the simulated platform's is its method
``SimulatedPlatform.quote``. Every fault of a quoter reaches a flow as `QuoteUnavailable`, whose text says what was
tried.

Rules kept here:

* "auto" never chooses the simulated platform or a program: only tests and operators ask for these;
* a kind of quoter is imported when one is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from chutes_proto.boot._quoter_names import parse_quoter
from chutes_proto.errors import ConfigurationError, LocalProtocolError, QuoteUnavailable
from chutes_proto.io.quoters import MAX_QUOTE

Quoter: TypeAlias = Callable[[bytes], bytes]
"""A callable that returns a quote of 64 bytes of report data. It may block, and raises `QuoteUnavailable`."""

GpuTool: TypeAlias = Callable[[bytes], bytes]
"""A callable that has GPUs make evidence over a nonce of 32 bytes, and returns it as JSON.

It may block, and raises `QuoteUnavailable`.
"""

_Stage: TypeAlias = Literal["boot", "runtime"]  # `Stage` of the verifier, which no agent loads


def check_quoter(quoter: object) -> None:
    """Raise `LocalProtocolError` for an object that cannot be a quoter, before a server is asked for anything."""
    if not callable(quoter):
        kind = type(quoter).__name__
        raise LocalProtocolError(
            f'quoter: {kind} cannot be called; say make_quoter("auto") or make_quoter(command), or give a function'
            " that returns the quote of 64 bytes of report data"
        )


def check_gpu_tool(tool: object) -> None:
    """Raise `LocalProtocolError` for an object that cannot be a `GpuTool`, before a server is asked for anything."""
    if not callable(tool):
        kind = type(tool).__name__
        raise LocalProtocolError(
            f"gpu_tool: {kind} cannot be called; say make_gpu_tool(command), or give a function that returns the"
            " evidence over a nonce of 32 bytes"
        )


def take_gpu_evidence(tool: GpuTool, nonce: bytes) -> bytes:
    """Return the GPUs' evidence over ``nonce``. Raises `QuoteUnavailable`, also for none.

    Raises `LocalProtocolError` for a tool that returns something else, as `take_quote` does.
    """
    try:
        evidence = _bytes("gpu_tool", "evidence", tool(nonce))
    except OSError as exc:
        raise QuoteUnavailable(f"the GPU tool failed: {exc}") from exc
    if not evidence.strip():
        raise QuoteUnavailable("the GPU tool gave no evidence")
    return evidence


def take_quote(quoter: Quoter, report_data: bytes) -> bytes:
    """Return the quote of ``report_data``. Raises `QuoteUnavailable`, also for one of no or too many bytes.

    Raises `LocalProtocolError` for a quoter that returns something else, such as text, None or a coroutine.
    """
    try:
        quote = _bytes("quoter", "a quote", quoter(report_data))
    except OSError as exc:
        raise QuoteUnavailable(f"the quoter failed: {exc}") from exc
    if not 0 < len(quote) <= MAX_QUOTE:
        raise QuoteUnavailable(f"the quoter gave {len(quote)} bytes; a quote has 1 to {MAX_QUOTE}")
    return quote


def _bytes(part: str, what: str, given: object) -> bytes:
    """The bytes that a caller's function returned. Raises `LocalProtocolError` for text, None or a coroutine."""
    if not isinstance(given, bytes | bytearray):
        kind = type(given).__name__
        raise LocalProtocolError(f"{part}: it returned {kind}, not the bytes of {what}; it is called, never awaited")
    return bytes(given)


def log_line(text: str) -> None:
    """Write a text to the standard library's ``logging``, logger ``chutes_proto``."""
    import logging

    logging.getLogger("chutes_proto").info("%s", text)


class OutOfTimeError(BaseException):
    """Raised into a quoter by a caller that has no more time; not an `Exception`, so that no quoter handles it."""


class AutoQuoter:
    """Chooses the first of several quoters that gives a quote, and keeps it.

    ``tell`` is called with its name and with the reasons against the others. The choice does not matter for security:
    the server appraises every quote.
    """

    def __init__(self, quoters: Sequence[Quoter], *, tell: Callable[[str], None] = log_line) -> None:
        self._quoters = tuple(quoters)
        self._tell = tell

    def __str__(self) -> str:
        return ", or else ".join(map(str, self._quoters))

    def __call__(self, report_data: bytes) -> bytes:
        """Return the quote. Raises `QuoteUnavailable` with the reasons of all."""
        reasons: list[str] = []
        for quoter in self._quoters:
            try:
                quote = take_quote(quoter, report_data)
            except QuoteUnavailable as exc:
                reasons.append(str(exc))
                continue
            except OutOfTimeError as exc:
                raise QuoteUnavailable("; ".join([*reasons, f"{quoter}: {exc}"])) from None
            if len(self._quoters) > 1:
                for reason in reasons:
                    self._tell(f"no quote from {reason}")
                self._tell(f"quotes come from {quoter}")
                self._quoters = (quoter,)
            return quote
        raise QuoteUnavailable("; ".join(reasons))


def make_quoter(
    text: str,
    *,
    tell: Callable[[str], None] = log_line,
    platform: str | Path | None = None,
    stage: _Stage = "boot",
) -> Quoter:
    """Return the quoter that ``text`` names, as settings and command lines have it.

    ``auto``
        the first of ``tsm`` and ``vsock`` that gives a quote; ``tell`` is called with the choice
    ``tsm``, ``tsm:DIR``
        the kernel's configfs-TSM, at DIR if it is mounted elsewhere
    ``vsock``, ``vsock:CID:PORT``
        the TDX guest device, and a quote generation service over vsock (``2:4050``)
    ``unix:PATH``
        the TDX guest device, and a quote generation service at a Unix socket
    ``command:LINE``, or any other text
        a program that gets the report data in hex on its standard input and writes the quote
    ``simulated``, ``simulated:DIR``
        the simulated platform in DIR (``platform``, or this user's), made if missing; its RTMRs are those of ``stage``

    Raises `ConfigurationError` for a text that names none, and for a simulated platform that cannot be opened.
    """
    kind, rest = parse_quoter(text)
    match kind:
        case "auto":
            return AutoQuoter([make_quoter("tsm"), make_quoter("vsock")], tell=tell)
        case "tsm":
            from chutes_proto.io.quoters.tsm import ROOT, TsmQuoter

            return TsmQuoter(rest or ROOT)
        case "vsock":
            from chutes_proto.io.quoters.device import DeviceQuoter, VsockService

            return DeviceQuoter(VsockService(*map(int, rest.split(":"))) if rest else VsockService())
        case "unix":
            from chutes_proto.io.quoters.device import DeviceQuoter, UnixService

            return DeviceQuoter(UnixService(rest))
        case "simulated":
            return _simulated(rest or platform, stage)
        case _:
            from chutes_proto.io.quoters.command import CommandQuoter

            return CommandQuoter(rest)


def auto_quoter(*, tell: Callable[[str], None] = log_line) -> Quoter:
    """Return a quoter that uses configfs-TSM or else the TDX guest device: ``make_quoter("auto")``.

    ``tell`` is called with the choice, once the first quote is made.
    """
    return make_quoter("auto", tell=tell)


def _simulated(directory: str | Path | None, stage: _Stage) -> Quoter:
    import os
    import time
    from functools import partial

    try:
        from chutes_proto.io.quoters.simulated import open_platform, platform_directory
    except ModuleNotFoundError:  # the agent as one file
        raise ConfigurationError(
            'quoter: this agent has no simulated platform; install chutes-proto, or say quoter = "command:..."'
        ) from None

    record = open_platform(directory or platform_directory(os.environ), int(time.time()))
    return partial(record.platform.quote, stage=stage)
