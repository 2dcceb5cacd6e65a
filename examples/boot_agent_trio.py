"""A boot agent on trio: attest, hand each passphrase to what opens the disk, format only by consent.

python examples/boot_agent_trio.py https://keys.example:8443 HOTKEY VM_NAME 'quote-command {report_data}' ca.pem
    storage=/dev/vdb tdx-cache=/dev/vdc
"""

import sys
from pathlib import Path

import trio

from chutes_proto.io.quoters.choose import make_quoter
from chutes_proto_trio import BootAgent


async def unlock(url, hotkey, vm_name, quoter, ca_pem, disks, open_disk):
    formatted = [volume for volume, device in disks.items() if is_luks(device)]
    async with BootAgent(url, hotkey=hotkey, vm_name=vm_name, quoter=quoter, ca_pem=ca_pem) as agent:
        grant = await agent.boot()
        open_disk("root", grant.root_passphrase.reveal(), is_blank=False)
        keys = await agent.sync(list(disks), formatted=formatted)
    for volume, passphrase in keys.passphrases.items():
        is_blank = volume not in formatted
        if is_blank and volume in keys.in_use:
            raise SystemExit(f"{volume}: the disk is blank, but the server knows it to hold data; nothing is formatted")
        open_disk(volume, passphrase.reveal(), is_blank=is_blank)


def is_luks(device):
    with Path(device).open("rb") as disk:
        return disk.read(6) == b"LUKS\xba\xbe"


def open_disk(volume, passphrase, *, is_blank):
    """Stands for ``cryptsetup luksFormat`` and ``open`` with the passphrase on standard input (``--key-file=-``)."""
    print(f"{volume}: {'format and open' if is_blank else 'open'} with a passphrase of {len(passphrase)} bytes")


if __name__ == "__main__":
    if len(sys.argv) < 7 or not all("=" in disk for disk in sys.argv[6:]):
        raise SystemExit(f"usage: {sys.argv[0]} URL HOTKEY VM_NAME QUOTE_COMMAND CA_PEM VOLUME=DEVICE...")
    url, hotkey, vm_name, command, ca, *disks = sys.argv[1:]
    volumes = dict(disk.split("=", 1) for disk in disks)
    trio.run(unlock, url, hotkey, vm_name, make_quoter(command), Path(ca).read_bytes(), volumes, open_disk)
