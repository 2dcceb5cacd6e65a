"""CPU time by layer: the calls of a layer are timed, each without what other layers do within it.

Timing costs some itself, so a profile says in which proportion the time is spent, and the whole is measured without it.
"""

from __future__ import annotations

import functools
import sqlite3
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from time import thread_time
from typing import Any

from chutes_proto.effects import Effect
from chutes_proto.io.server.log_writer import LogWriter
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.keys.vault import Vault
from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.server import _app, _boot, _evidence
from chutes_proto.server._app import App
from chutes_proto.server._nonces import NonceMint
from chutes_proto.transport.connections import Connections
from chutes_proto.transport.h1 import ServerConnection
from chutes_proto.transport.tls import TlsSession
from chutes_proto.wire import endpoints

LAYERS: tuple[tuple[str, tuple[tuple[Any, tuple[str, ...]], ...]], ...] = (
    ("TLS", ((TlsSession, ("__init__", "receive_data", "send_data", "close", "data_to_send")),)),
    (
        "HTTP",
        (
            (ServerConnection, ("__init__", "receive_data", "next_request", "send_response", "data_to_send")),
            (Connections, ("next_step", "remove")),
        ),
    ),
    ("routes and messages", ((_app, ("decode_request", "encode_answer")), (endpoints, ("route",)))),
    ("signatures", ((ecdsa, ("load_point", "verify", "verify_raw")),)),
    (
        "evidence",
        (
            (_evidence, ("decode_quote", "parse_quote", "open_quote", "check_signed", "verify_quote")),
            (_boot, ("appraise", "client_key")),
            (NonceMint, ("issue", "check")),
        ),
    ),
    ("keys sealed and opened", ((Vault, ("seal", "open")),)),
    ("log", ((LogWriter, ("__call__",)),)),
    ("units and their operations", ((SqliteStore, ("transact", "transact_all")),)),
)
STATEMENTS = "SQLite: statements"
COMMITS = "SQLite: commits"
FLOWS = "flows of the operations"
NAMES = (*(name for name, _ in LAYERS), STATEMENTS, COMMITS, FLOWS)
OPERATIONS = (
    "routes and messages",
    "evidence",
    "keys sealed and opened",
    "log",
    "units and their operations",
    FLOWS,
)
"""What a boot is to the server, in Python; the rest is what brings it its bytes and keeps its rows, and signatures."""


Execute = Callable[..., sqlite3.Cursor]


def watched(around: Callable[[str, Execute], Execute]) -> type[sqlite3.Connection]:
    """Return a kind of connections that execute statements by ``around(sql, execute)`` in place of ``execute``."""

    class Cursor(sqlite3.Cursor):
        def execute(self, sql: str, *values: Any) -> Any:
            return around(sql, super().execute)(sql, *values)

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            return around(sql, super().execute)(sql, *values)

        def cursor(self, factory: Any = Cursor) -> Any:
            return super().cursor(factory)

    return Connection


class Layers:
    """Times the layers of all threads, from `install` on: ``spent`` in seconds, ``calls`` in number."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.calls = Counter[str]()
        self._of_thread = threading.local()

    def install(self) -> None:
        """Replace the functions of each layer by timed ones, for as long as this process lives."""
        for layer, owners in LAYERS:
            for owner, names in owners:
                for name in names:
                    setattr(owner, name, self.timed(layer, getattr(owner, name)))
        layers = self

        def around(sql: str, execute: Execute) -> Execute:
            return layers.timed(COMMITS if sql == "COMMIT" else STATEMENTS, execute)

        setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=watched(around)))  # noqa: B010
        handle = App.handle

        def stepped(*arguments: Any) -> Generator[Effect[Any], Any, Any]:
            """The flow of a request, each of whose steps is timed; no fault is thrown into a usual one."""
            flow = handle(*arguments)
            step = self.timed(FLOWS, flow.send)
            reply = None
            try:
                while True:
                    reply = yield step(reply)
            except StopIteration as stop:
                return stop.value

        setattr(App, "handle", stepped)  # noqa: B010

    def timed(self, layer: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work``, whose time is the layer's, but for what other layers do within it."""

        @functools.wraps(work)
        def timing(*arguments: Any, **named: Any) -> Any:
            here = self._of_thread.__dict__
            entered: list[str] = here.setdefault("entered", [])
            start = thread_time()
            if entered:
                self.spent[entered[-1]] += start - here["since"]
            entered.append(layer)
            here["since"] = start
            try:
                return work(*arguments, **named)
            finally:
                end = thread_time()
                self.spent[entered.pop()] += end - here["since"]
                self.calls[layer] += 1
                here["since"] = end

        return timing
