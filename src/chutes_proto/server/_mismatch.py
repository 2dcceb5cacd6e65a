"""A VM that speaks another exchange than its profile grants: the one mistake of an operator that a VM cannot name.

Such a VM is granted its boot, finds no token or nonce of its kind in the answer, and asks for its keys without one. The
refusal is the same as for any other request without one; its reason in the log, and one audit row for the boot, name
the exchange and the profile. An image from 1.4.0 on shows its exchange in the boot's request already (``_boot.py``).
"""

from __future__ import annotations

from typing import Any, Final

from chutes_proto.effects import Flow, Transact
from chutes_proto.errors import Refusal, StoreError
from chutes_proto.server._call import Call
from chutes_proto.server._profiles import ServedExchange
from chutes_proto.store._rows import Vm
from chutes_proto.units.boot import RecordMismatch
from chutes_proto.wire import vms
from chutes_proto.wire.codes import Code
from chutes_proto.wire.names import HEX_32

_LACKS: Final = (Code.BOOT_TOKEN_REQUIRED, Code.BOOT_TOKEN_INVALID, Code.QUOTE_NONCE_INVALID)
_NO_TOKEN: Final = ("", "null")
"""The token that an image sends which found none in the answer; its script prints JSON's null."""
_ASKED_FOR: Final[dict[ServedExchange, str]] = {
    "base": "volumes with a boot token",
    "two-phase": "volumes with a quote nonce and without proof of its hotkey",
    "provisioned": "volumes with a quote nonce and proof of its hotkey",
}


def name_mismatch(call: Call[Any], refusal: Refusal) -> Flow[None]:
    """Give ``refusal`` its reason, and record it once for the boot, if the VM was granted another exchange."""
    spoken, vm, token = _speaks(call.message)
    if refusal.code not in _LACKS or spoken is None or vm is None:
        return
    if token not in _NO_TOKEN and not HEX_32.fullmatch(token):
        return  # no image sends such a token, and the store is not asked for a stranger's
    unit = RecordMismatch(
        now=call.now,
        request_id=call.request_id,
        vm=vm,
        spoken=spoken,
        asked_for=_ASKED_FOR[spoken],
        peer_address=call.request.peer_address,
    )
    try:
        found = yield from Transact(unit)
    except StoreError:  # its checks tell that; a line for each request would be a stranger's to cause
        return
    if found is not None:
        refusal.reason, refusal.recorded = found


def _speaks(message: object) -> tuple[ServedExchange | None, Vm | None, str]:
    """Return the exchange that the sender speaks, the VM, and its token or nonce."""
    match message:
        case vms.CachePassphraseRequest(vm_name=name, hotkey=one, hotkey_header=other, boot_token=token):
            return "base", Vm(one or other or "", name), token or ""
        case vms.VolumeSyncRequest(vm_name=name, hotkey=one, hotkey_query=other, boot_token=token):
            return "base", Vm(one or other or "", name), token or ""
        case vms.ProvisionRequest(vm_name=name, hotkey=hotkey, quote_nonce=token):
            return "provisioned", Vm(hotkey or "", name), token or ""
        case vms.VolumeAttestationRequest(vm_name=name, hotkey=hotkey, quote_nonce=token):
            return "two-phase", Vm(hotkey or "", name), token or ""
        case _:
            return None, None, ""
