"""A boot agent without an event loop: the same flows, driven by function calls; format only by consent.

python examples/boot_agent_sync.py https://keys.example:8443 HOTKEY VM_NAME 'quote-command {report_data}' ca.pem
    storage=/dev/vdb tdx-cache=/dev/vdc
"""

import os
import sys
import time
from pathlib import Path

from chutes_proto.auth.client_identity import ENTROPY_SIZE, make_client_identity
from chutes_proto.boot._flows import BootSettings, boot, sync_volumes
from chutes_proto.io.drivers.sync import Performer
from chutes_proto.io.http.https import HttpsSender
from chutes_proto.io.http.tls import client_context
from chutes_proto.io.quoters.choose import make_quoter


def unlock(url, hotkey, vm_name, quoter, ca_pem, disks, open_disk):
    formatted = [volume for volume, device in disks.items() if is_luks(device)]
    identity = make_client_identity(int(time.time()), os.urandom(ENTROPY_SIZE))
    settings = BootSettings(hotkey, vm_name, identity.spki_sha256)
    with HttpsSender(client_context(identity, ca_pem), url) as send:
        performer = Performer(send=send, quoter=quoter)
        grant = performer.run(boot(settings))
        open_disk("root", grant.root_passphrase.reveal(), is_blank=False)
        keys = performer.run(sync_volumes(grant, list(disks), formatted=formatted))
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
    unlock(url, hotkey, vm_name, make_quoter(command), Path(ca).read_bytes(), volumes, open_disk)
