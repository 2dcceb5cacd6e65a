"""The key server: its configuration, and the application to embed.

``chutes_proto_trio`` and ``chutes_proto_asyncio`` have ``serve``, for a program that listens itself;
``chutes-proto serve`` is the server as a process. The operations themselves are flows; ``_app.py`` runs them.
"""

from typing import TYPE_CHECKING

from chutes_proto._lazy import lazily

if TYPE_CHECKING:
    from chutes_proto.server._asgi import asgi_app
    from chutes_proto.server._config import ServerConfig
    from chutes_proto.transport.asgi import AsgiApp
else:
    __getattr__ = lazily(
        globals(),
        {
            "chutes_proto.server._asgi": "asgi_app",
            "chutes_proto.server._config": "ServerConfig",
            "chutes_proto.transport.asgi": "AsgiApp",
        },
    )

__all__ = ["AsgiApp", "ServerConfig", "asgi_app"]
