"""A boot agent on trio: attest, print nothing secret, hand each passphrase to what opens the disk.

python examples/boot_agent_trio.py https://keys.example:8443 HOTKEY VM_NAME 'quote-command {report_data}' [ca.pem]
"""

import sys
from pathlib import Path

import trio

from chutes_proto.blocking.quoting import CommandQuoter
from chutes_proto_trio import BootAgent


async def unlock(url, hotkey, vm_name, quoter, ca_pem, volumes, open_disk):
    async with BootAgent(url, hotkey=hotkey, vm_name=vm_name, quoter=quoter, ca_pem=ca_pem) as agent:
        grant = await agent.boot()
        open_disk("root", grant.root_passphrase.reveal())
        keys = await agent.sync(volumes)
        for volume, passphrase in keys.passphrases.items():
            open_disk(volume, passphrase.reveal())


def open_disk(name, passphrase):
    """Stands for ``cryptsetup open --key-file=- DEVICE NAME`` with the passphrase on its standard input."""
    print(f"{name}: a passphrase of {len(passphrase)} bytes")


if __name__ == "__main__":
    url, hotkey, vm_name, command, *ca = sys.argv[1:]
    ca_pem = Path(ca[0]).read_bytes() if ca else None
    trio.run(unlock, url, hotkey, vm_name, CommandQuoter(command), ca_pem, ["storage", "tdx-cache"], open_disk)
