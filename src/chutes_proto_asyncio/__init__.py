"""chutes-proto on asyncio, by way of anyio: the boot agent and the driver of flows. There is no server here yet."""

from chutes_proto_asyncio.client import BootAgent
from chutes_proto_asyncio.perform import Performer

__all__ = ["BootAgent", "Performer"]
