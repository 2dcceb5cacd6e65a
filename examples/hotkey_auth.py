"""Signed requests with an httpx client of one's own: list a hotkey's servers without `MinerClient`.

python examples/hotkey_auth.py https://keys.example:8443 ~/.bittensor/wallets/w/hotkeys/h ca.pem
"""

import ssl
import sys

import httpx

from chutes_proto.sync import read_hotkey
from chutes_proto_asyncio import HotkeyAuth


def servers(url, pair, ca_file):
    auth = HotkeyAuth(pair.hotkey.address, pair.sign, signatures="request")
    with httpx.Client(base_url=url, auth=auth, verify=ssl.create_default_context(cafile=ca_file)) as client:
        return client.get("/servers/").raise_for_status().json()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(f"usage: {sys.argv[0]} URL HOTKEY_FILE CA_FILE")
    url, hotkey_file, ca_file = sys.argv[1:]
    for server in servers(url, read_hotkey(hotkey_file), ca_file):
        print(server["server_id"], server["name"])
