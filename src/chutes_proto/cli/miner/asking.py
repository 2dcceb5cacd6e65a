"""Commands that ask a key server: whose options they share, for how long they try, and which errors no retry mends."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import click
from attrs import frozen

from chutes_proto.auth.client_identity import ENTROPY_SIZE, ClientIdentity, make_client_identity
from chutes_proto.auth.signing import WINDOW
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Command, F, answer, json_option, platform_option
from chutes_proto.cli.describe import wrong_usage
from chutes_proto.effects import Flow
from chutes_proto.errors import ChutesError, ConfigurationError, Refusal, TransportError
from chutes_proto.io.drivers.sync import Performer
from chutes_proto.io.hotkey_file import read_hotkey
from chutes_proto.io.http.https import HttpsSender
from chutes_proto.io.http.tls import context_trusting
from chutes_proto.io.quoters.choose import GpuTool, Quoter, make_quoter
from chutes_proto.log import Record
from chutes_proto.miner._flows import Miner
from chutes_proto.quote import Stage
from chutes_proto.wire.codes import Code

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


class MakePerformer(Protocol):
    """Makes a performer with a quoter and a tool for GPU evidence."""

    def __call__(self, quoter: Quoter | None, tool: GpuTool | None = None, /) -> Performer: ...


_UNVERIFIED = "the certificate of {url} does not verify: {reason}; is its CA the one in --ca, and the clock right?"
_NO_ANSWER = "no answer from {url}: {reason}; is the server running there, and its CA in --ca?"


_CLOCK = f"The clocks of this machine and of the server are {WINDOW // 60} minutes apart or more: set this one's first."


@frozen
class Peer:
    """The key server that a command line names."""

    url: str
    ca: str | None
    retry: RetryPolicy

    @contextmanager
    def connected(self, identity: ClientIdentity, log: Callable[[Record], None]) -> Generator[MakePerformer]:
        """Give a function that makes a performer with a quoter. Raises `ConfigurationError` where nobody answers."""

        def fault(reason: str) -> ConfigurationError:
            return ConfigurationError(_UNVERIFIED.format(url=self.url, reason=reason))

        with HttpsSender(context_trusting(self.ca, identity), self.url) as sender:
            send = reporting(sender, fault)
            try:
                yield lambda quoter, tool=None: Performer(send=send, quoter=quoter, gpu_tool=tool, log=log)
            except TransportError as exc:
                raise ConfigurationError(_NO_ANSWER.format(url=self.url, reason=exc)) from None


class PeerCommand(Command):
    """A command that asks a key server; its function takes a `Peer` first."""

    exits: Mapping[int, str] = {
        0: "done",
        1: "the server refused, or was still not available at the end of --wait",
        2: wrong_usage("a file that cannot be read", "no answer"),
    }
    wait: float = 10.0

    def __init__(self, *args: Any, params: list[click.Parameter] | None = None, **kwargs: Any) -> None:
        url = Argument(["url"], metavar="URL", help="the key server, https://host:port")
        ca = click.Option(["--ca"], metavar="FILE", help="PEM certificates to trust (default: the system's)")
        told = f"retry for this long while the server does not answer or says 503 (default: {self.wait:g}; 0: ask once)"
        wait = click.Option(["--wait"], metavar="SECONDS", type=float, default=self.wait, help=told)
        super().__init__(*args, params=[url, *(params or []), ca, wait], **kwargs)
        _ = json_option(self)

    def invoke(self, ctx: click.Context) -> Any:
        wait = ctx.params.pop("wait")
        if not 0 <= wait <= 86400:
            raise click.UsageError("--wait: 0 to 86400 seconds", ctx)
        retry = RetryPolicy(deadline=wait) if wait else RetryPolicy(attempts=1)
        ctx.obj = self.asker(ctx.params, Peer(ctx.params.pop("url"), ctx.params.pop("ca"), retry))
        try:
            return super().invoke(ctx)
        except Refusal as exc:
            return _answer_refusal(exc)

    def asker(self, params: dict[str, Any], peer: Peer) -> Any:
        """The first argument of the function."""
        del params
        return peer


def _answer_refusal(refusal: Refusal) -> int:
    def people() -> None:
        output.prose(f"refused: {refusal}", "bad")
        for code in Code:
            if code == refusal.code:  # the text before is often that of deployed servers, which says little
                output.prose(_CLOCK if code is Code.SIGNATURE_STALE else f"{code}: {code.meaning}")
        if refusal.request_id:
            output.prose(f"the server's log has the reason under request {refusal.request_id}")

    said = {"granted": False, "status": refusal.status, "code": str(refusal.code), "detail": refusal.detail}
    return answer({**said, "request_id": refusal.request_id}, people, ok=False)


@frozen
class Asker:
    """A miner at a key server."""

    peer: Peer
    hotkey_file: str
    signatures: Any

    def ask(self, flow: Callable[[Miner], Flow[Answered]]) -> Answered:
        """Run a flow. Raises `Refusal`, and `ConfigurationError` where nobody answers."""
        return self.ask_as(lambda miner, _: flow(miner))

    def ask_as(
        self,
        flow: Callable[[Miner, ClientIdentity], Flow[Answered]],
        quoter: Callable[[], Quoter | None] = lambda: None,
        gpu_tool: GpuTool | None = None,
    ) -> Answered:
        """Run a flow that needs the client's TLS key, and perhaps a quoter and a tool for GPU evidence."""
        pair = read_hotkey(self.hotkey_file)
        identity = new_identity()
        miner = Miner(pair.hotkey.address, pair.sign, self.signatures, self.peer.retry)
        with self.peer.connected(identity, _tell_delay) as performer:
            return performer(quoter(), gpu_tool).run(flow(miner, identity))


def _tell_delay(record: Record) -> None:
    if record.event == "request_delayed":
        tell(record)


class MinerCommand(PeerCommand):
    """A command whose requests a hotkey signs; its function takes an `Asker` first."""

    def __init__(self, *args: Any, params: list[click.Parameter] | None = None, **kwargs: Any) -> None:
        told = "the hotkey as wallets write it, JSON with ss58Address, and privateKey or secretSeed; permissions 0600"
        file = click.Option(["--hotkey-file"], metavar="FILE", required=True, help=told)
        told = "sign as deployed servers expect, or the whole request, so that a captured signature cannot be reused"
        kinds = click.Choice(("compatible", "request"))
        signatures = click.Option(["--signatures"], type=kinds, default="compatible", show_default=True, help=told)
        super().__init__(*args, params=[*(params or []), file, signatures], **kwargs)

    def asker(self, params: dict[str, Any], peer: Peer) -> Asker:
        return Asker(peer, params.pop("hotkey_file"), params.pop("signatures"))


def new_identity() -> ClientIdentity:
    """An ephemeral TLS key."""
    return make_client_identity(int(time.time()), os.urandom(ENTROPY_SIZE))


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


def reporting(ask: Callable[[Asked], Answered], fault: Callable[[str], ChutesError]) -> Callable[[Asked], Answered]:
    """``ask``, which raises ``fault`` of the reason where the peer's certificate does not verify: no retry mends it."""

    def asking(asked: Asked) -> Answered:
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


_QUOTER = click.option(
    "--quoter",
    metavar="QUOTER",
    default="simulated",
    show_default=True,
    help="'tsm' (the kernel's configfs-TSM), 'vsock' or 'vsock:CID:PORT' (the TDX guest device and the host's quote"
    " generation service), 'unix:PATH' (that service at a Unix socket), 'auto' (the first of tsm and vsock that gives a"
    " quote), 'simulated' (for trials), or a command that gets 64 bytes of report data in hex, on standard input and in"
    " place of {report_data}, and writes the quote to standard output or to the file {output}; no shell runs",
)


def quoter_options(function: F) -> F:
    """The options that `open_quoter` takes."""
    return _QUOTER(platform_option(function))


def open_quoter(quoter: str, platform: str | None, stage: Stage = "boot") -> Quoter:
    """Return the quoter; a simulated TD measures as it does at ``stage``. Raises `ConfigurationError`."""
    return make_quoter(quoter, tell=console.tell, platform=platform, stage=stage)
