"""A key server as an ASGI application, behind a proxy that ends TLS. Its configuration has a [proxy] table.

    CHUTES_CONFIG=server.toml uvicorn --no-proxy-headers --uds keys.sock asgi_app:app
    CHUTES_CONFIG=server.toml hypercorn --bind unix:keys.sock asgi_app:app
    CHUTES_CONFIG=server.toml hypercorn --worker-class trio --bind unix:keys.sock asgi_app:app

`mounted` has it under a path of another application.
"""

import os
from contextlib import asynccontextmanager

from chutes_proto.io.collateral.aio import open_performer
from chutes_proto.io.server.setup import check_keys, load_setup
from chutes_proto.server._app import App
from chutes_proto.transport.asgi import AsgiApp

if "CHUTES_CONFIG" not in os.environ:
    raise SystemExit("usage: CHUTES_CONFIG=server.toml uvicorn --no-proxy-headers --uds keys.sock asgi_app:app")
setup = load_setup(os.environ["CHUTES_CONFIG"])
store = setup.store.open()
_ = check_keys(store, setup.service.vault)
app = AsgiApp(App(setup.service), open_performer(store, setup.collateral), limits=setup.limits)


def mounted():
    """A FastAPI application with the key server under /keys."""
    from fastapi import FastAPI

    @asynccontextmanager
    async def lifespan(_):
        async with app:
            yield

    fastapi = FastAPI(lifespan=lifespan)
    fastapi.mount("/keys", app)
    return fastapi
