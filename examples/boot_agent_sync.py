"""A boot agent without an event loop: attest, open all disks, format blank ones where no data can be lost, rotate keys.

python examples/boot_agent_sync.py https://keys.example:8443 HOTKEY VM_NAME auto ca.pem
    /dev/vda2 storage=/dev/vdb tdx-cache=/dev/vdc

The root disk is named first. `chutes-proto agent run` is the same with settings in a file, for an initramfs.
"""

import sys
from pathlib import Path

from chutes_proto.sync import BootAgent, make_quoter


def unlock(url, hotkey, vm_name, quoter, ca_pem, root, disks):
    with BootAgent(url, hotkey=hotkey, vm_name=vm_name, quoter=quoter, ca_pem=ca_pem) as agent:
        unlocked = agent.unlock(disks, root=root)
    for disk in unlocked.volumes:
        print(f"{disk.device} is {disk.path}{', without a file system' if disk.formatted else ''}")


if __name__ == "__main__":
    if len(sys.argv) < 8 or not all("=" in disk for disk in sys.argv[7:]):
        raise SystemExit(f"usage: {sys.argv[0]} URL HOTKEY VM_NAME QUOTER CA_FILE ROOT_DEVICE VOLUME=DEVICE...")
    url, hotkey, vm_name, quoter, ca_file, root, *named = sys.argv[1:]
    disks = dict(disk.split("=", 1) for disk in named)
    unlock(url, hotkey, vm_name, make_quoter(quoter), Path(ca_file).read_bytes(), root, disks)
