"""Clients that own their connection and their driver. Without a loop one file each, so that agents load no miner's."""
