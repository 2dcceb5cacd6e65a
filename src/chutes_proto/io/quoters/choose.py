"""Where quotes come from. A quoter is a callable: 64 bytes of report data in, the quote out; it may block.

`make_quoter` makes one of what a configuration names; the simulated platform's is its method
``SimulatedPlatform.quote``. Whatever goes wrong with a quoter reaches a flow as `QuoteUnavailable`, whose text says
what was tried.

Rules kept here:

* "auto" never chooses what only trials and the operator can mean: the simulated platform, and a program;
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
"""Makes a quote of 64 bytes of report data. It may block."""

_Stage: TypeAlias = Literal["boot", "runtime"]  # `Stage` of the verifier, which no agent loads


def check_quoter(quoter: object) -> None:
    """Raises `LocalProtocolError` for what cannot be a quoter, before anything is asked of a server."""
    if not callable(quoter):
        kind = type(quoter).__name__
        raise LocalProtocolError(
            f"a quoter is called with the report data and gives the quote, and {kind} cannot be called; say"
            ' make_quoter("auto"), or make_quoter(command)'
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


def log_line(text: str) -> None:
    """Hand a text to the standard library's ``logging``, logger ``chutes_proto``."""
    import logging

    logging.getLogger("chutes_proto").info("%s", text)


class OutOfTimeError(BaseException):
    """Raised into a quoter by who has no more time; no quoter takes it for a fault that it knows what to do about."""


class AutoQuoter:
    """The first of some quoters that gives a quote; from then on, that one. ``tell`` hears which, and why not others.

    Every quote is the server's to judge, so it does not matter for security which one it is.
    """

    def __init__(self, quoters: Sequence[Quoter], *, tell: Callable[[str], None] = log_line) -> None:
        self._quoters = tuple(quoters)
        self._tell = tell

    def __str__(self) -> str:
        return ", or else ".join(map(str, self._quoters))

    def __call__(self, report_data: bytes) -> bytes:
        """Its quote. Raises `QuoteUnavailable` with the reasons of all."""
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
    """The quoter that ``text``, of a configuration or a command line, names.

    ``auto``
        the first of ``tsm`` and ``vsock`` that gives a quote; ``tell`` hears which
    ``tsm``, ``tsm:DIR``
        the kernel's configfs-TSM, in DIR if it is mounted elsewhere
    ``vsock``, ``vsock:CID:PORT``
        the TDX guest device, and a quote generation service over vsock (``2:4050``)
    ``unix:PATH``
        the TDX guest device, and a quote generation service at a Unix socket
    ``command:LINE``, or any other text
        a program, see `CommandQuoter`
    ``simulated``, ``simulated:DIR``
        the simulated platform in DIR (``platform``, or this user's), made if missing; a simulated TD measures as it
        does at ``stage``

    Raises `ConfigurationError`.
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
    """The first of configfs-TSM and the TDX guest device that gives a quote: ``make_quoter("auto")``."""
    return make_quoter("auto", tell=tell)


def _simulated(directory: str | Path | None, stage: _Stage) -> Quoter:
    import os
    import time
    from functools import partial

    try:
        from chutes_proto.io.quoters.simulated import open_platform, platform_directory
    except ModuleNotFoundError:  # the agent as one file
        raise ConfigurationError(
            'the simulated platform is not in this agent; install chutes-proto, or say quoter = "command:..."'
        ) from None

    record = open_platform(directory or platform_directory(os.environ), int(time.time()))
    return partial(record.platform.quote, stage=stage)
