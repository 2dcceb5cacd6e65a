"""A boot agent without an event loop: the same flows, driven by a loop of function calls.

python examples/boot_agent_sync.py https://keys.example:8443 HOTKEY VM_NAME 'quote-command {report_data}' [ca.pem]
"""

import os
import sys
import time
from pathlib import Path

import httpx

from chutes_proto.auth.certificates import ENTROPY_SIZE, make_client_identity
from chutes_proto.blocking.http import HttpxSender
from chutes_proto.blocking.perform import Performer
from chutes_proto.blocking.quoting import CommandQuoter
from chutes_proto.blocking.tls import client_context
from chutes_proto.client.flows import BootSettings, boot, sync_volumes


def unlock(url, hotkey, vm_name, quoter, ca_pem, volumes, open_disk):
    identity = make_client_identity(int(time.time()), os.urandom(ENTROPY_SIZE))
    settings = BootSettings(hotkey, vm_name, identity.spki_sha256)
    with httpx.Client(verify=client_context(identity, ca_pem), trust_env=False) as client:
        performer = Performer(send=HttpxSender(client, url), quoter=quoter)
        grant = performer.run(boot(settings))
        open_disk("root", grant.root_passphrase.reveal())
        keys = performer.run(sync_volumes(grant, volumes))
        for volume, passphrase in keys.passphrases.items():
            open_disk(volume, passphrase.reveal())


def open_disk(name, passphrase):
    """Stands for ``cryptsetup open --key-file=- DEVICE NAME`` with the passphrase on its standard input."""
    print(f"{name}: a passphrase of {len(passphrase)} bytes")


if __name__ == "__main__":
    url, hotkey, vm_name, command, *ca = sys.argv[1:]
    ca_pem = Path(ca[0]).read_bytes() if ca else None
    unlock(url, hotkey, vm_name, CommandQuoter(command), ca_pem, ["storage", "tdx-cache"], open_disk)
