"""A miner registers a server, attests it at runtime, and lists the status of all its servers.

python examples/miner_client.py https://keys.example:8443 ~/.bittensor/wallets/w/hotkeys/h auto ca.pem
    node-1 203.0.113.7 gpus.json

Run it in the server's VM, which can make quotes. ``gpus.json`` is a list of objects with the members of `Gpu`.
"""

import json
import sys
from pathlib import Path

from chutes_proto.miner import Gpu
from chutes_proto.sync import MinerClient, make_quoter, read_hotkey


def attest(url, pair, quoter, ca_pem, server_id, host, gpus):
    with MinerClient(url, hotkey=pair.hotkey.address, signer=pair.sign, quoter=quoter, ca_pem=ca_pem) as miner:
        if server_id not in {server.server_id for server in miner.servers()}:
            miner.register(server_id, host=host, gpus=gpus)
        _ = miner.attest(server_id)
        for server in miner.servers():
            status = miner.status(server.server_id)
            verified = "fresh" if status.is_fresh else "not fresh"
            print(f"{server.server_id} at {server.host}, registered {server.created_at:%Y-%m-%d}: {verified}")


if __name__ == "__main__":
    if len(sys.argv) != 8:
        raise SystemExit(f"usage: {sys.argv[0]} URL HOTKEY_FILE QUOTER CA_FILE SERVER_ID HOST GPUS_FILE")
    url, hotkey_file, quoter, ca_file, server_id, host, gpus_file = sys.argv[1:]
    gpus = [Gpu(**gpu) for gpu in json.loads(Path(gpus_file).read_bytes())]
    attest(url, read_hotkey(hotkey_file), make_quoter(quoter), Path(ca_file).read_bytes(), server_id, host, gpus)
