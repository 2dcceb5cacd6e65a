"""What commands that ask a server share: how long they try, what they say meanwhile, and what no trying again mends."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeVar

from chutes_proto.cli import console

if TYPE_CHECKING:
    from collections.abc import Callable

    from chutes_proto.boot._retry_policy import RetryPolicy
    from chutes_proto.errors import ChutesError
    from chutes_proto.log import Record
    from chutes_proto.wire.http import HttpRequest, HttpResponse

Asked = TypeVar("Asked")


def add_wait(parser: argparse.ArgumentParser, seconds: float) -> None:
    """The option that `retry_policy` reads."""
    console.add(
        parser,
        "--wait",
        metavar="SECONDS",
        type=float,
        default=seconds,
        help=f"try again for this long where there is no answer, or it is: not now (default: {seconds:g}; 0: once)",
    )


def retry_policy(options: argparse.Namespace) -> RetryPolicy:
    """Raises `ConfigurationError`."""
    from chutes_proto.boot._retry_policy import RetryPolicy
    from chutes_proto.errors import ConfigurationError

    if not 0 <= options.wait <= 86400:
        raise ConfigurationError("--wait: 0 to 86400 seconds")
    return RetryPolicy(deadline=options.wait) if options.wait else RetryPolicy(attempts=1)


def tell(record: Record) -> None:
    """Progress, one line a record. A client's records hold no secret."""
    fields = dict(record.fields)
    match record.event.rpartition("_")[2]:
        case "step":
            console.tell(f"{fields['step']} (attempt {fields['attempt']})")
        case "delayed":
            console.tell(f"{fields['step']} failed: {fields['reason']}; next attempt in {fields['wait']} s")
        case _:
            pass


def telling(
    ask: Callable[[Asked], HttpResponse], fault: Callable[[str], ChutesError]
) -> Callable[[Asked], HttpResponse]:
    """``ask``, which raises ``fault`` of the reason where the certificate of who was asked does not verify."""
    import ssl

    from chutes_proto.errors import TransportError

    def asking(asked: Asked) -> HttpResponse:
        try:
            return ask(asked)
        except TransportError as exc:
            cause: BaseException | None = exc
            while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise fault(cause.verify_message or str(cause)) from None

    return asking


def verified(send: Callable[[HttpRequest], HttpResponse], url: str) -> Callable[[HttpRequest], HttpResponse]:
    """``send``, which raises `ConfigurationError`, that no flow tries again, where the certificate does not verify."""
    from chutes_proto.errors import ConfigurationError

    return telling(
        send,
        lambda told: ConfigurationError(
            f"the certificate of {url} does not verify: {told}; is its CA the one in --ca?"
        ),
    )
