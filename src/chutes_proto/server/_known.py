"""The VMs that this server knows, so that log lines about them are not dropped because strangers cause many.

Rules kept here:

* a VM is known once it is bound to a platform, at whichever server of the store it booted;
* the names are read from the store beside the requests, page by page: a stranger's request costs no look at the store;
* each known VM has lines of its own; what is refused under other names does not count against it.
"""

from __future__ import annotations

from typing import Final, NoReturn

from attrs import define, field

from chutes_proto.effects import Flow, Sleep, Transact
from chutes_proto.errors import StoreError
from chutes_proto.server._limits import TokenBuckets
from chutes_proto.store._rows import ReadPage, Vm, VmRow
from chutes_proto.store._run import Ask

LOOK_SECONDS: Final = 600.0
"""The time between two readings of all names."""
PAUSE_SECONDS: Final = 0.1
PAGE: Final = 1000
MOST: Final = 200_000
"""How many VMs are known at most; each takes about 70 bytes."""


def _own() -> TokenBuckets:
    return TokenBuckets(20, 0.2, most=16384)


@define
class KnownVms:
    """The known VMs, by hashes of their names; ``lines`` limits the log lines of each."""

    lines: TokenBuckets = field(factory=_own)
    _known: set[int] = field(init=False, factory=set[int])

    def note(self, vm: Vm) -> None:
        """Note a VM that was granted a boot, or is bound to a platform."""
        if len(self._known) < MOST:
            self._known.add(hash(vm))

    def __contains__(self, vm: Vm) -> bool:
        return hash(vm) in self._known


def learn_vms(known: KnownVms) -> Flow[NoReturn]:
    """Read the names of all VMs, again and again; a store that fails is asked again later."""
    while True:
        after: VmRow | None = None
        try:
            while page := (yield from Transact(Ask(ReadPage(VmRow, after, PAGE)))):
                for row in page:
                    known.note(row.vm)
                after = page[-1] if len(page) == PAGE else None
                if after is None:
                    break
                yield from Sleep(PAUSE_SECONDS)
        except StoreError:  # `watch_store` tells the operator
            pass
        yield from Sleep(LOOK_SECONDS)
