"""The boot agent, a miner's client, the key server and the driver of flows on trio.

One implementation on anyio serves both loops: ``chutes_proto_asyncio`` has the same names.
"""

from typing import TYPE_CHECKING

from chutes_proto._extras import missing
from chutes_proto._lazy import lazily

try:
    import trio  # noqa: F401 # pyright: ignore[reportUnusedImport] - anyio imports it late

    from chutes_proto.io.clients.aio import BootAgent, MinerClient
    from chutes_proto.io.collateral.aio import fetch_collateral
    from chutes_proto.io.disks.cryptsetup import has_luks_header
    from chutes_proto.io.drivers.aio import HttpxSender, Performer
    from chutes_proto.io.hotkey_file import read_hotkey
    from chutes_proto.io.http.attested import (
        AttestationFailedError,
        AttestedIdentity,
        attested_callback,
        attested_context,
        make_attested_identity,
    )
    from chutes_proto.io.http.hotkey_auth import HotkeyAuth
    from chutes_proto.io.http.https import TimeLimits
    from chutes_proto.io.http.tls import client_context
    from chutes_proto.io.quoters.choose import GpuTool, Quoter, auto_quoter, make_quoter
    from chutes_proto.io.quoters.gpus import make_gpu_tool
    from chutes_proto.io.server.aio import Server
except ModuleNotFoundError as _error:
    raise missing("trio", _error) from None

if TYPE_CHECKING:
    from chutes_proto.io.server.serving import serve
else:
    __getattr__ = lazily(globals(), {"chutes_proto.io.server.serving": "serve"})  # an agent needs no server

__all__ = [
    "AttestationFailedError",
    "AttestedIdentity",
    "BootAgent",
    "GpuTool",
    "HotkeyAuth",
    "HttpxSender",
    "MinerClient",
    "Performer",
    "Quoter",
    "Server",
    "TimeLimits",
    "attested_callback",
    "attested_context",
    "auto_quoter",
    "client_context",
    "fetch_collateral",
    "has_luks_header",
    "make_attested_identity",
    "make_gpu_tool",
    "make_quoter",
    "read_hotkey",
    "serve",
]
