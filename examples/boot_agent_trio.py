"""A boot agent on trio: attest, open each disk with its key, format only where no data can be lost.

python examples/boot_agent_trio.py https://keys.example:8443 HOTKEY VM_NAME auto ca.pem
    storage=/dev/vdb tdx-cache=/dev/vdc

`chutes-proto agent run` is a whole agent. In one of your own let cryptsetup read a checked copy of each header, never
the disk's, which the host can change: docs/explanation/disks.md.
"""

import sys
from pathlib import Path

import trio

from chutes_proto_trio import BootAgent, has_luks_header, make_quoter


async def unlock(url, hotkey, vm_name, quoter, ca_pem, devices):
    async with BootAgent(url, hotkey=hotkey, vm_name=vm_name, quoter=quoter, ca_pem=ca_pem) as agent:
        grant = await agent.boot()
        open_disk("root", grant.root_passphrase, may_format=False)
        keys = await agent.sync({volume: has_luks_header(device) for volume, device in devices.items()})
        for key in keys:
            open_disk(key.volume, key.passphrase, may_format=key.may_format)


def open_disk(volume, passphrase, *, may_format):
    """Stands for ``cryptsetup luksFormat``, and ``open --header COPY``, with the passphrase on standard input."""
    print(f"{volume}: {'format and open' if may_format else 'open'} with a passphrase of {len(passphrase)} bytes")


if __name__ == "__main__":
    if len(sys.argv) < 7 or not all("=" in disk for disk in sys.argv[6:]):
        raise SystemExit(f"usage: {sys.argv[0]} URL HOTKEY VM_NAME QUOTER CA_FILE VOLUME=DEVICE...")
    url, hotkey, vm_name, quoter, ca_file, *disks = sys.argv[1:]
    devices = dict(disk.split("=", 1) for disk in disks)
    trio.run(unlock, url, hotkey, vm_name, make_quoter(quoter), Path(ca_file).read_bytes(), devices)
