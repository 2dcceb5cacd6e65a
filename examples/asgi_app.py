"""A key server as an ASGI application, behind a proxy that terminates TLS. Its configuration has a [proxy] table.

    CHUTES_CONFIG=server.toml uvicorn --no-proxy-headers --uds keys.sock asgi_app:app
    CHUTES_CONFIG=server.toml hypercorn --bind unix:keys.sock asgi_app:app
    CHUTES_CONFIG=server.toml hypercorn --worker-class trio --bind unix:keys.sock asgi_app:app

`mounted` serves it under a path of another application.
"""

import os
from contextlib import asynccontextmanager

from chutes_proto.server import ServerConfig, asgi_app

app = asgi_app(ServerConfig.load(os.environ.get("CHUTES_CONFIG", "server.toml")))


def mounted():
    """Return a FastAPI application with the key server under /keys."""
    from fastapi import FastAPI

    @asynccontextmanager
    async def lifespan(_):
        async with app:
            yield

    fastapi = FastAPI(lifespan=lifespan)
    fastapi.mount("/keys", app)
    return fastapi
