"""A boot agent on trio: attest, open each disk with its key, format only where no data can be lost.

python examples/boot_agent_trio.py https://keys.example:8443 HOTKEY VM_NAME auto ca.pem
    /dev/vda2 storage=/dev/vdb tdx-cache=/dev/vdc

The root disk, named first, must have its passphrase already. `chutes-proto agent run` is a whole agent, which also
rotates keys.
"""

import sys
from pathlib import Path

import trio

from chutes_proto_trio import BootAgent, has_luks_header, make_quoter, open_disk


async def unlock(url, hotkey, vm_name, quoter, ca_pem, root, disks):
    async with BootAgent(url, hotkey=hotkey, vm_name=vm_name, quoter=quoter, ca_pem=ca_pem) as agent:
        grant = await agent.boot()
        open_disk(root, "root", grant.root_passphrase)
        keys = await agent.sync({volume: has_luks_header(device) for volume, device in disks.items()})
        for key in keys:
            open_disk(disks[key.volume], key.volume, key.passphrase, may_format=key.may_format)


if __name__ == "__main__":
    if len(sys.argv) < 8 or not all("=" in disk for disk in sys.argv[7:]):
        raise SystemExit(f"usage: {sys.argv[0]} URL HOTKEY VM_NAME QUOTER CA_FILE ROOT_DEVICE VOLUME=DEVICE...")
    url, hotkey, vm_name, quoter, ca_file, root, *named = sys.argv[1:]
    disks = dict(disk.split("=", 1) for disk in named)
    trio.run(unlock, url, hotkey, vm_name, make_quoter(quoter), Path(ca_file).read_bytes(), root, disks)
