"""The open boots of this process: granted here, and the VM still has to come back for its keys, or to confirm them.

A server that is told to stop goes on for them, because deployed clients ask for their keys once.

Rules kept here:

* an open boot is one with a boot token, a quote nonce or a confirm nonce that is not redeemed and not expired;
* a VM has one open boot at most, its newest: a VM that boots again has lost the grant before;
* it is complete when the answer that redeems the last of these was sent: a sync, a read of the cache passphrase (older
  images do nothing else) or a confirmation. A refusal completes nothing;
* grants, redemptions and voidings by another process on the same store are not seen here: such a boot is open until it
  expires;
* a limited number is remembered; beyond it the one that expires first is forgotten.
"""

from __future__ import annotations

from collections import OrderedDict

from attrs import define, field

from chutes_proto.keys.generations import ROOT_VOLUME
from chutes_proto.store._rows import Vm
from chutes_proto.units.boot import TOKEN_SECONDS
from chutes_proto.units.rotation import CONFIRM_SECONDS
from chutes_proto.wire import vms
from chutes_proto.wire.endpoint import Message


@define
class OpenBoots:
    """The open boots by VM, at most ``most`` of each lifetime. ``now`` is seconds of a monotonic clock."""

    most: int = 32768
    _expiries: dict[int, OrderedDict[Vm, float]] = field(
        init=False, factory=lambda: {TOKEN_SECONDS: OrderedDict(), CONFIRM_SECONDS: OrderedDict()}
    )  # by lifetime, so that each is in the order of expiry

    def __len__(self) -> int:
        return sum(map(len, self._expiries.values()))

    def note_granted(self, message: Message, now: float) -> None:
        """Note that ``message`` was granted: if it hands out a token or nonce, its VM has an open boot from now on."""
        match message:
            case vms.BootAttestationRequest(vm_name=name, miner_hotkey=hotkey):
                self._open(Vm(hotkey, name), TOKEN_SECONDS, now)
            case vms.VolumeAttestationRequest(vm_name=name, hotkey=str(hotkey)):
                self._open(Vm(hotkey, name), CONFIRM_SECONDS, now)
            case _:
                pass

    def close(self, vm: Vm) -> None:
        """Note that the boot of ``vm`` is complete."""
        for expiries in self._expiries.values():
            _ = expiries.pop(vm, None)

    def last_expiry(self, now: float) -> float:
        """The expiry of the last open boot; ``now`` if none is open. Forgets expired ones."""
        for expiries in self._expiries.values():
            while expiries and next(iter(expiries.values())) <= now:
                _ = expiries.popitem(last=False)
        return max((next(reversed(expiries.values())) for expiries in self._expiries.values() if expiries), default=now)

    def _open(self, vm: Vm, seconds: int, now: float) -> None:
        self.close(vm)
        expiries = self._expiries[seconds]
        expiries[vm] = now + seconds
        if len(expiries) > self.most:
            _ = expiries.popitem(last=False)


def completed_by(message: Message) -> Vm | None:
    """The VM whose boot is complete once ``message`` is granted and answered; None for other messages."""
    match message:
        case (
            vms.CachePassphraseRequest(vm_name=name, hotkey=hotkey, hotkey_header=other)
            | vms.VolumeSyncRequest(vm_name=name, hotkey=hotkey, hotkey_query=other)
        ):
            return Vm(hotkey or other or "", name)
        case vms.VolumeConfirmationRequest(vm_name=name, hotkey=hotkey) if ROOT_VOLUME not in message.volumes:
            return Vm(hotkey or "", name)
        case _:
            return None
