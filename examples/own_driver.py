"""A driver of one's own: `http.client` sends the requests of a boot, and nothing else of this project does any I/O.

python examples/own_driver.py https://keys.example:8443 HOTKEY VM_NAME auto ca.pem storage tdx-cache

A flow yields effects and gets replies. These are all that the flows of ``chutes_proto.boot`` ask for, with one server.
"""

import http.client
import os
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from chutes_proto.boot import BootSettings, boot_and_sync, make_client_identity
from chutes_proto.effects import Entropy, HttpResponse, Log, MakeQuote, Send, Sleep, Uptime, run
from chutes_proto.errors import TransportError
from chutes_proto.sync import client_context, make_quoter


def boot(url, hotkey, vm_name, quoter, ca_pem, volumes):
    identity = make_client_identity(int(time.time()), os.urandom(32))
    server, context = urlsplit(url), client_context(identity, ca_pem)

    def send(request):
        connection = http.client.HTTPSConnection(server.hostname, server.port, context=context, timeout=30)
        try:
            connection.connect()
        except OSError as exc:
            raise TransportError(f"no connection: {exc}", maybe_delivered=False) from exc
        try:
            connection.request(request.method, request.target, request.body, dict(request.headers))
            answer = connection.getresponse()
            headers = tuple((name.lower(), value) for name, value in answer.getheaders())
            return HttpResponse(answer.status, headers, answer.read())
        except (OSError, http.client.HTTPException) as exc:  # the flow decides whether to ask again
            raise TransportError(f"no answer: {exc}", maybe_delivered=True) from exc
        finally:
            connection.close()

    def perform(effect):
        match effect:
            case Send(request):
                return send(request)
            case MakeQuote(report_data):
                return quoter(report_data)
            case Entropy(size):
                return os.urandom(size)
            case Uptime():
                return time.monotonic()
            case Sleep(seconds):
                return time.sleep(seconds)
            case Log(record):
                return print(record.event, dict(record.fields), file=sys.stderr)
            case _:
                raise NotImplementedError(effect)

    settings = BootSettings(hotkey, vm_name, identity.spki_sha256)
    return run(boot_and_sync(settings, volumes), perform)


if __name__ == "__main__":
    if len(sys.argv) < 7:
        raise SystemExit(f"usage: {sys.argv[0]} URL HOTKEY VM_NAME QUOTER CA_FILE BLANK_VOLUME...")
    url, hotkey, vm_name, quoter, ca_file, *names = sys.argv[1:]
    volumes = dict.fromkeys(names, False)
    _, keys = boot(url, hotkey, vm_name, make_quoter(quoter), Path(ca_file).read_bytes(), volumes)
    for key in keys:
        print(f"{key.volume}: a passphrase of {len(key.passphrase)} bytes, may format: {key.may_format}")
