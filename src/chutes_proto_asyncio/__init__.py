"""chutes-proto on asyncio: the boot agent, a miner's client, the key server, the driver of flows.

One implementation on anyio serves both loops: the names and signatures of chutes_proto_trio and
``chutes_proto_asyncio`` are the same.
"""

from chutes_proto.io.clients.aio import BootAgent, MinerClient
from chutes_proto.io.disks.cryptsetup import has_luks_header
from chutes_proto.io.drivers.aio import Performer
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.quoters.choose import auto_quoter, make_quoter
from chutes_proto.io.server.aio import Server

__all__ = [
    "BootAgent",
    "MinerClient",
    "Performer",
    "Server",
    "TimeLimits",
    "auto_quoter",
    "has_luks_header",
    "make_quoter",
]
