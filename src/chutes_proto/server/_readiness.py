"""Readiness: whether boots would be granted, found out beside the requests, for balancers that ask.

Rules kept here:

* a server whose store refuses every transaction until an operator acts (another schema, for example) is not ready. The
  store is asked all the time, so a server without requests finds out as well, and gets ready again by itself;
* a store that is away or busy does not change this: all servers share the fault, and boots wait for it.
"""

from __future__ import annotations

from typing import Final, NoReturn

from attrs import define

from chutes_proto.effects import Flow, Log, Sleep, Transact
from chutes_proto.errors import StoreBusy, StoreError, Unavailable
from chutes_proto.log import Level, Record
from chutes_proto.store._run import Ask
from chutes_proto.store.rows import ReadTimes
from chutes_proto.wire.codes import Code

WATCH_SECONDS: Final = 1.0
"""The time between two looks at the store."""


@define
class Readiness:
    """The fault of the store that the last look found, None if it takes transactions."""

    fault: str | None = None

    def require(self) -> None:
        """Raise `Unavailable` while boots are not served."""
        if self.fault is not None:
            text = "The store cannot be used. Retry shortly."
            raise Unavailable(Code.STORE_UNAVAILABLE, text, reason=self.fault)


def watch_store(readiness: Readiness) -> Flow[NoReturn]:
    """Look at the store for ever; log each change."""
    while True:
        try:
            _ = yield from Transact(Ask(ReadTimes()))
            fault = None
        except StoreBusy:
            fault = readiness.fault
        except StoreError as exc:
            fault = str(exc)
        if fault != readiness.fault:
            readiness.fault = fault
            yield from Log(
                Record(Level.INFO, "store_accepted", {})
                if fault is None
                else Record(Level.ERROR, "store_refused", {"error": fault})
            )
        yield from Sleep(WATCH_SECONDS)
