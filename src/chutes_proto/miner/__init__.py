"""A miner's flows: its servers at a key server."""
