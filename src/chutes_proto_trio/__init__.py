"""chutes-proto on trio: the boot agent, a miner's client, the key server, the driver of flows."""

from chutes_proto_trio.client import BootAgent
from chutes_proto_trio.miner import MinerClient
from chutes_proto_trio.perform import Performer
from chutes_proto_trio.server import Server, serve_until_stopped

__all__ = ["BootAgent", "MinerClient", "Performer", "Server", "serve_until_stopped"]
