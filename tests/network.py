"""A network that loses, doubles and delays messages on command, with a clock that moves only when somebody waits.

`SimulatedNetwork.perform` drives client flows against a server in the same process: nothing is random but what the test
drew, nothing sleeps, and everything that happened can be read afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from chutes_proto.effects import Effect, Entropy, Log, MakeQuote, Now, Send, Sleep, Uptime
from chutes_proto.errors import LocalProtocolError, QuoteUnavailable, TransportError
from chutes_proto.log import Record
from chutes_proto.wire.http import HttpRequest, HttpResponse


class Fate(Enum):
    """The outcome of one request."""

    DELIVERED = "delivered"
    REQUEST_LOST = "request lost"
    ANSWER_LOST = "answer lost"
    DOUBLED = "doubled"


class SimulatedNetwork:
    """One client's connection to ``server``, with the client's clock, entropy, quoter and log.

    The requests meet the ``fates`` in order; all later ones are delivered. A lost message costs ``timeout`` seconds.
    ``elapsed`` is the number of seconds since the start, ``sent`` has every request in order, ``records`` every log
    record.
    """

    def __init__(
        self,
        server: Callable[[HttpRequest], HttpResponse],
        *,
        quoter: Callable[[bytes], bytes] | None = None,
        fates: Iterable[Fate] = (),
        started: int = 0,
        timeout: float = 30.0,
        seed: bytes = b"",
    ) -> None:
        self.elapsed = 0.0
        self.sent: list[HttpRequest] = []
        self.records: list[Record] = []
        self._server = server
        self._quoter = quoter
        self._fates = iter(fates)
        self._started = started
        self._timeout = timeout
        self._entropy = hashlib.sha256(seed)

    @property
    def wall_clock(self) -> int:
        """Unix seconds, as `Now` replies them."""
        return self._started + int(self.elapsed)

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.elapsed += seconds

    def perform(self, effect: Effect[Any]) -> object:
        """Carry out one effect of a client flow."""
        reply: object = None
        match effect:
            case Send(request):
                reply = self._carry(request)
            case MakeQuote(report_data):
                if self._quoter is None:
                    raise QuoteUnavailable("this simulation has no quoter")
                reply = self._quoter(report_data)
            case Sleep(seconds):
                self.wait(seconds)
            case Uptime():
                reply = self.elapsed
            case Now():
                reply = self.wall_clock
            case Entropy(size):
                self._entropy.update(b"more")
                reply = hashlib.shake_256(self._entropy.digest()).digest(size)
            case Log(record):
                self.records.append(record)
            case _:
                raise LocalProtocolError(f"{type(effect).__name__} is not an effect of client flows")
        return reply

    def _carry(self, request: HttpRequest) -> HttpResponse:
        self.sent.append(request)
        fate = next(self._fates, Fate.DELIVERED)
        if fate is not Fate.REQUEST_LOST:
            response = self._server(request)
            if fate is Fate.DOUBLED:
                response = self._server(request)
            if fate is not Fate.ANSWER_LOST:
                return response
        self.wait(self._timeout)
        raise TransportError(f"{fate.value}: no answer in {self._timeout} s", maybe_delivered=True)
