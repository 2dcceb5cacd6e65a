"""A key server as an ASGI application, behind a proxy that terminates TLS. Its configuration has a [[proxy]] entry.

    CHUTES_CONFIG=server.toml uvicorn --no-proxy-headers --uds proxied/keys.sock asgi_app:app
    CHUTES_CONFIG=server.toml hypercorn --umask 007 --bind unix:proxied/keys.sock asgi_app:app
    CHUTES_CONFIG=server.toml hypercorn --umask 007 --worker-class trio --bind unix:proxied/keys.sock asgi_app:app

Everybody who may open the socket is trusted, and uvicorn lets every user open it: `proxied` is a folder of mode 0750.
With `--umask 007` its group may open hypercorn's, too.
``fastapi_app.py`` has it under a path of another application.
"""

import os

from chutes_proto.server import ServerConfig, asgi_app

app = asgi_app(ServerConfig.load(os.environ.get("CHUTES_CONFIG", "server.toml")))
