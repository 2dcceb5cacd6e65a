"""The part that clients without an event loop share: one connection, and the driver of their flows."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from chutes_proto.auth.client_identity import ClientIdentity
from chutes_proto.io.drivers.sync import DiskWorker, Performer
from chutes_proto.io.http.https import HttpsSender, TimeLimits
from chutes_proto.io.http.tls import client_context, presented
from chutes_proto.io.quoters.choose import GpuTool, Quoter, check_gpu_tool, check_quoter
from chutes_proto.log import Record


class Connected:
    """A client's connection and driver; the connection is closed at the end."""

    def __init__(
        self,
        url: str,
        identity: ClientIdentity | None,
        ca_pem: bytes | None,
        limits: TimeLimits,
        quoter: Quoter | None,
        log: Callable[[Record], None],
        gpu_tool: GpuTool | None = None,
        disks: DiskWorker | None = None,
    ) -> None:
        if quoter is not None:
            check_quoter(quoter)
        if gpu_tool is not None:
            check_gpu_tool(gpu_tool)
        self._identity = presented(identity)
        self._sender = HttpsSender(client_context(self._identity, ca_pem), url, limits)
        self._run = Performer(send=self._sender, quoter=quoter, gpu_tool=gpu_tool, disks=disks, log=log).run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sender.close()
