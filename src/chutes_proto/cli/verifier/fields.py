"""Shared by the verifying commands: options, exit codes, and how a report is shown."""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

import click

from chutes_proto import quote as verifier
from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Decorator
from chutes_proto.errors import ConfigurationError, FileUnavailable, QuoteError
from chutes_proto.io.files import MAX_SIZE, read_file, read_head, reason, unavailable
from chutes_proto.quote import _eventlog as eventlog
from chutes_proto.quote._steps import UntrustedRootError

_WIDTH: Final = 26
QUOTE_FORMS: Final = "bytes, or their hexadecimal digits or base64"
LOG_FORMS: Final = "a CCEL's bytes, or dstack's JSON"
OTHER_ROOT: Final = (
    "is under another root than Intel's, or than that of --root, which names one to trust"
    " (that of the simulated platform is in the root.der that `simulate` writes)"
)
"""The remedy where a chain ends at a root that is not trusted."""


def with_root_hint(problem: str) -> str:
    """A problem, with the remedy where a root is not trusted: a cache keeps only the words of the error."""
    return f"{problem}. It {OTHER_ROOT}." if UntrustedRootError.rule in problem else problem


quote_argument: Decorator = click.argument(
    "quote",
    cls=Argument,
    metavar="QUOTE",
    help=f"a file with a quote, - for standard input: {QUOTE_FORMS}",
)
root_option: Decorator = click.option("--root", metavar="DER", help="a root to trust instead of Intel's")
stage_option: Decorator = click.option(
    "--stage", type=click.Choice(("boot", "runtime")), default="boot", show_default=True, help="measurements of"
)


class _ListFaults(click.Option):
    """Lists ``faults``, texts by name, in place of what the command does; then no other option is missing."""

    def __init__(self, *args: Any, faults: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._faults = dict(faults)

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        if opts.get("list_faults") and not ctx.resilient_parsing:
            if opts.get("json"):
                console.say_json({"faults": self._faults})
            else:
                width = max(map(len, self._faults))
                for name, told in self._faults.items():
                    console.say(f"{name:{width}} {told}")
            ctx.exit()
        return super().handle_parse_result(ctx, opts, args)


def list_faults_option(faults: Mapping[str, str]) -> Decorator:
    """``--list-faults``, which is not passed to the function; ``faults`` are texts by name."""
    told = "list the names for --fault, and do nothing else"
    return click.option(
        "--list-faults", cls=_ListFaults, faults=faults, is_flag=True, is_eager=True, expose_value=False, help=told
    )


_SHORTEST: Final = 1024
"""No quote has fewer digits."""


def read_quote_file(path: str) -> bytes:
    """The bytes of a quote from a file, or from standard input for ``-``; hexadecimal digits and base64 are decoded.

    Raises `FileUnavailable`.
    """
    data = sys.stdin.buffer.read(MAX_SIZE + 1) if path == "-" else read_head(path, MAX_SIZE + 1)
    text = b"".join(data.split())
    if len(text) >= _SHORTEST:
        if re.fullmatch(rb"(?:0x)?(?:[0-9a-fA-F]{2})+", text):
            return bytes.fromhex(text.removeprefix(b"0x").decode("ascii"))
        if re.fullmatch(rb"[A-Za-z0-9+/_-]+={0,2}", text):
            padded = text.translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
            with suppress(ValueError):
                return base64.b64decode(padded + b"=" * (-len(padded) % 4))
    return data


def read_files(path: str, suffix: str = "") -> Iterator[tuple[str, bytes | str]]:
    """The file, or those of a directory with the name of each; of one there that cannot be read, the reason.

    Raises `FileUnavailable` for what is named itself.
    """
    if not Path(path).is_dir():
        yield path, read_file(path)
        return
    with unavailable(path, "cannot be read"):
        found = sorted(Path(path).iterdir())
    for file in found:
        if file.name.startswith(".") or not file.name.endswith(suffix) or not file.is_file():  # a pipe would be awaited
            continue
        try:
            content: bytes | str = read_file(file)
        except FileUnavailable as exc:
            content = reason(exc, file)
        yield str(file), content


def read_event_log(path: str) -> bytes:
    """The bytes of an event log, and one more than any log has. Raises `FileUnavailable`."""
    return read_head(path, eventlog.MAX_SIZE + 1)


def parse_event_log(data: bytes) -> verifier.EventLog:
    """Read a log in either form; a CCEL begins with the number of a register. Raises `EventLogFormatError`."""
    is_json = data.lstrip()[:1] in (b"[", b"{")
    return verifier.parse_event_log_json(data) if is_json else verifier.parse_event_log(data)


def trusted_root(path: str | None) -> verifier.TrustedRoot:
    """The root of ``--root``, or Intel's. Raises `ConfigurationError`."""
    if path is None:
        return verifier.INTEL_ROOT
    data = read_file(path)
    try:
        return verifier.TrustedRoot.from_der(data)
    except QuoteError as exc:
        raise ConfigurationError(f"--root: {path}: {exc}") from None


def refusal(code: str, detail: str) -> dict[str, str]:
    """One of ``refusals`` in a report."""
    return {"code": code, "detail": detail}


def say_verdict(report: Mapping[str, object], headline: str) -> None:
    """The first lines of a report: a headline with its state, and each refusal."""
    output.prose(headline, "good" if report["accepted"] else "bad")
    for one in cast("list[dict[str, str]]", report["refusals"]):
        output.prose(f"{one['code']}: {one['detail']}")


def say_fields(fields: Mapping[str, object]) -> None:
    """One line each; members of a mapping are named after it, an empty list and None are a dash."""
    for name, value in fields.items():
        match value:
            case dict():
                members = cast("dict[str, object]", value)
                say_fields({f"{name}.{member}": inner for member, inner in members.items()})
                continue
            case None | []:
                text = "-"
            case bool():
                text = "yes" if value else "no"
            case list():
                text = ", ".join(map(str, cast("list[object]", value)))
            case _:
                text = str(value)
        output.prose(f"{name:{_WIDTH}} {text}", rest=_WIDTH + 1)
