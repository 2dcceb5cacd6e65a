"""The program that an image has besides its script: it signs with the hotkey of the config volume, and quotes.

The program itself asks the process of the tests: to import all that signs and quotes, at each of six calls, takes
longer than the rest of a boot.
"""

from __future__ import annotations

import base64
import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.secret import Secret
from chutes_proto.testing._platform import SimulatedPlatform

PLATFORM = SimulatedPlatform(bytes(32))
PAIR = HotkeyPair.from_secret(Secret(bytes(range(32))))
PROGRAM = """#!{python} -IS
import socket, sys
with socket.create_connection(("127.0.0.1", {port})) as asked:
    asked.sendall(" ".join(sys.argv[1:]).encode())
    asked.shutdown(socket.SHUT_WR)
    while answer := asked.recv(65536):
        sys.stdout.write(answer.decode())
"""


def answer(what: str, *words: str) -> str:
    if what == "sign":
        return PAIR.sign(words[0].encode()).hex()
    data = bytes.fromhex(words[1])
    quote = PLATFORM.quote(data, stage="boot") if words[0] == "boot" else PLATFORM.quote(data, stage="runtime")
    return base64.b64encode(quote).decode()


class _Asked(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        _ = self.wfile.write(answer(*self.rfile.read().decode().split()).encode())


@contextmanager
def helper_program(folder: Path) -> Iterator[Path]:
    """The program in ``folder``, for as long as it is answered."""
    path = folder / "helper"
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Asked) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        _ = path.write_text(PROGRAM.format(python=sys.executable, port=server.server_address[1]))
        path.chmod(0o755)
        try:
            yield path
        finally:
            server.shutdown()
            thread.join()
