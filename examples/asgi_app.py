"""A key server as an ASGI application, behind a proxy that terminates TLS. Its configuration has a [proxy] table.

    CHUTES_CONFIG=server.toml uvicorn --no-proxy-headers --uds proxied/keys.sock asgi_app:app
    CHUTES_CONFIG=server.toml hypercorn --bind unix:proxied/keys.sock asgi_app:app
    CHUTES_CONFIG=server.toml hypercorn --worker-class trio --bind unix:proxied/keys.sock asgi_app:app

Everybody who may open the socket is trusted, and uvicorn lets every user open it: `proxied` is a folder of mode 0750.
``fastapi_app.py`` has it under a path of another application.
"""

import os

from chutes_proto.server import ServerConfig, asgi_app

app = asgi_app(ServerConfig.load(os.environ.get("CHUTES_CONFIG", "server.toml")))
