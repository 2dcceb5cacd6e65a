"""chutes-proto on asyncio: the boot agent, a miner's client, the key server, the driver of flows."""

from chutes_proto_asyncio.client import BootAgent
from chutes_proto_asyncio.miner import MinerClient
from chutes_proto_asyncio.perform import Performer
from chutes_proto_asyncio.server import Server, serve_until_stopped

__all__ = ["BootAgent", "MinerClient", "Performer", "Server", "serve_until_stopped"]
