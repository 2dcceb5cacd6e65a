"""The floor of a boot: a blocking server of what cannot be left out, which parses nothing.

For each connection: a TLS handshake in which the client proves the key of a certificate, three answers that are the
same for everyone, two ECDSA P-256 signatures (the quote's, and the quoting enclave's, which a server remembers), and
two SQLite transactions that are durable when the answer leaves.

``python -m bench.floor FOLDER`` prints its URL, and at SIGUSR1 its CPU time. With a `Recording` as second argument,
its transactions are those of a real boot: the same statements with the same values, but for those that are new in each
boot. So the difference is what SQLite needs for the rows of a boot, and what is left to a server is everything else.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

from attrs import frozen
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from OpenSSL import SSL

from chutes_proto.secret import Secret
from chutes_proto.transport.tls import server_context

Statement = tuple[str, tuple[Any, ...]]
ANSWERS = 3
MOST_BOOTS = 2000
_TOKEN = "0" * 64
_BODY = json.dumps(dict.fromkeys(("nonce", "key", "boot_token", "storage", "tdx-cache"), _TOKEN)).encode()
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)


@frozen
class Recording:
    """Two boots of one VM as statements to an SQLite store, whose file after them is at ``store``."""

    store: Path
    settings: tuple[str, ...]
    boots: tuple[Sequence[Statement], Sequence[Statement]]

    def transactions(self) -> Generator[tuple[Statement, ...]]:
        """Yield the transactions of one boot after another, each with new values where those of the two boots differ.

        A value that is the same in several places of a boot stays the same there.
        """
        pairs = [
            (text, values, [values[index] != other[index] for index in range(len(values))])
            for (text, values), (_, other) in zip(*self.boots, strict=True)
        ]
        for boot in count(1):
            known: dict[Any, Any] = {}
            statements: list[Statement] = []
            for text, values, differ in pairs:
                for value, is_new in zip(values, differ, strict=True):
                    if is_new and value not in known:
                        known[value] = _other(value, boot)
                made = (known[value] if is_new else value for value, is_new in zip(values, differ, strict=True))
                statements.append((text, tuple(made)))
                if text == "COMMIT":
                    yield tuple(statements)
                    statements.clear()


def _other(value: Any, boot: int) -> Any:
    """Return another value of the same type and size."""
    match value:
        case str():
            return os.urandom(len(value)).hex()[: len(value)]
        case bytes():
            return os.urandom(len(value))
        case _:
            return value + boot


def serve(folder: Path, recording: Recording | None) -> None:
    """Serve one connection after the other."""
    context = server_context((folder / "server.pem").read_bytes(), Secret((folder / "server.key").read_bytes()))
    message = os.urandom(632)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    signed = [(key.public_key(), key.sign(message, ec.ECDSA(SHA256()))) for key in keys]
    database = sqlite3.connect(folder / "floor.db" if recording is None else recording.store, isolation_level=None)
    for setting in ("journal_mode = wal", "synchronous = 2", *(() if recording is None else recording.settings)):
        _ = database.execute(f"PRAGMA {setting}").fetchone()
    # Made before the boots, whose time it would count for.
    transactions = None if recording is None else iter([*islice(recording.transactions(), 2 * MOST_BOOTS)])
    _ = database.execute(
        "CREATE TABLE IF NOT EXISTS event (id INTEGER PRIMARY KEY, what TEXT NOT NULL, digest BLOB NOT NULL)"
    )

    def work(got: bytes) -> None:
        """Do the work of an attestation (the second request) and of a sync (the third)."""
        if b" /servers/nonce " in got:
            return
        if b" /servers/boot/attestation " in got:
            for public, signature in signed:
                public.verify(signature, message, ec.ECDSA(SHA256()))
        if transactions is not None:
            for text, values in next(transactions):
                _ = database.execute(text, values).fetchall()
            return
        _ = database.execute("BEGIN IMMEDIATE")
        digest = hashlib.sha256(got).digest()
        _ = database.execute("INSERT INTO event (what, digest) VALUES (?, ?)", ("boot", digest))
        _ = database.execute("COMMIT")

    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(f"https://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    while True:
        accepted, _ = listener.accept()
        with accepted, suppress(SSL.Error, OSError):
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = SSL.Connection(context, accepted)
            connection.set_accept_state()
            for _ in range(ANSWERS):
                work(connection.recv(64 * 1024))
                connection.sendall(_ANSWER)
            _ = connection.shutdown()


def _report(*_: object) -> None:
    print(json.dumps({"whole": time.process_time(), "system": getrusage(RUSAGE_SELF).ru_stime}), flush=True)


if __name__ == "__main__":
    _ = signal.signal(signal.SIGUSR1, _report)
    serve(Path(sys.argv[1]), pickle.loads(Path(sys.argv[2]).read_bytes()) if sys.argv[2:] else None)  # noqa: S301
