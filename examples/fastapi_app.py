"""A key server under a path of a FastAPI application, behind a proxy that ends TLS.

CHUTES_CONFIG=server.toml uvicorn --no-proxy-headers --uds proxied/keys.sock fastapi_app:app

Everybody who may open the socket is trusted, and uvicorn lets every user open it: `proxied` is a folder of mode 0750.
Its configuration has a [[proxy]] entry. The application's lifespan must open the key server's: it opens the store.
"""

import os
from contextlib import asynccontextmanager

from fastapi import FastAPI

from chutes_proto.server import ServerConfig, asgi_app

keys = asgi_app(ServerConfig.load(os.environ.get("CHUTES_CONFIG", "server.toml")))


@asynccontextmanager
async def lifespan(_):
    async with keys:
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/keys", keys)


@app.get("/")
def index():
    return {"key server": "/keys"}
