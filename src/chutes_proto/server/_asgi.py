"""The key server as an ASGI application, for programs that embed it."""

from __future__ import annotations

from chutes_proto.server._config import ServerConfig
from chutes_proto.transport.asgi import AsgiApp


def asgi_app(config: ServerConfig) -> AsgiApp:
    """Return the key server of ``config`` as an ASGI 3 application, for ASGI servers on asyncio or trio.

    The ASGI server listens, so ``listen``, ``tls`` and ``proxy.unix`` of the configuration are checked and not used;
    ``admin`` and ``control`` have no effect. A proxy in front of it ends TLS: clients show their
    certificates to the proxy, and a ``[[proxy]]`` entry must name it.
    With ``proxy.unix`` a request whose scope has no ``client`` counts as one over that socket, and its headers are
    believed: what calls the application must name the client of every other connection.

    Reads all files that ``config`` names, opens the store to check that it can be written and that its keys can be
    opened, and closes it again. It is open while the application lives: from its start to its end in the lifespan
    protocol, or while another application that mounts it holds it by ``async with``. The log goes to the standard
    library's ``logging``, logger ``chutes_proto``.

    Raises `ConfigurationError` with all problems, one a line, and `StoreError`.
    """
    from chutes_proto.io.server.serving import make_asgi_app

    return make_asgi_app(config)
