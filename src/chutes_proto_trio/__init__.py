"""chutes-proto on trio: the boot agent, the driver of flows."""

from chutes_proto_trio.client import BootAgent
from chutes_proto_trio.perform import Performer

__all__ = ["BootAgent", "Performer"]
