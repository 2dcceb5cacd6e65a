"""chutes-proto on asyncio: the boot agent, a miner's client, the key server, the driver of flows."""

from chutes_proto.io.clients.boot_agent import BootAgent
from chutes_proto.io.clients.miner_client import MinerClient
from chutes_proto.io.drivers.aio import Performer
from chutes_proto.io.server.aio import Server

__all__ = ["BootAgent", "MinerClient", "Performer", "Server"]
