"""A quoter of one's own: any callable that turns 64 bytes of report data into a quote.

python examples/own_quoter.py http://127.0.0.1:8700/quote https://keys.example:8443 HOTKEY VM_NAME ca.pem

This one asks a service of the VM's own over HTTP. The service need not be trusted: the server verifies every quote.
"""

import sys
from pathlib import Path

import httpx

from chutes_proto.errors import QuoteUnavailable
from chutes_proto.sync import BootAgent


def quoter_of(service):
    def quote(report_data):
        try:
            return httpx.post(service, content=report_data, timeout=10).raise_for_status().content
        except httpx.HTTPError as exc:  # the agent tries again, as its retry policy says
            raise QuoteUnavailable(f"{service} gives no quote: {exc}") from exc

    return quote


def boot(service, url, hotkey, vm_name, ca_pem):
    with BootAgent(url, hotkey=hotkey, vm_name=vm_name, quoter=quoter_of(service), ca_pem=ca_pem) as agent:
        return agent.boot()


if __name__ == "__main__":
    if len(sys.argv) != 6:
        raise SystemExit(f"usage: {sys.argv[0]} QUOTE_SERVICE URL HOTKEY VM_NAME CA_FILE")
    service, url, hotkey, vm_name, ca_file = sys.argv[1:]
    grant = boot(service, url, hotkey, vm_name, Path(ca_file).read_bytes())
    print(f"granted: root passphrase of {len(grant.root_passphrase)} bytes")
