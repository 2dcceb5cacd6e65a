"""Redemptions of nonces are forgotten beside the requests, rarely: in a boot that would conflict with other boots."""

from __future__ import annotations

from typing import Final, NoReturn

from chutes_proto.effects import Flow, Now, Sleep, Transact
from chutes_proto.errors import StoreError
from chutes_proto.server._readiness import Readiness
from chutes_proto.units.nonces import ForgetNonces, RaiseHorizon

LOOK_SECONDS: Final = 300.0
"""The time between two looks whether it is time."""

PAUSE_SECONDS: Final = 0.1
"""The time between two units that delete."""


def sweep_nonces(readiness: Readiness) -> Flow[NoReturn]:
    """Forget what the horizon covers, for ever; a store that fails, or refuses us, is asked again later."""
    while True:
        try:
            if readiness.fault is None and (yield from Transact(RaiseHorizon((yield from Now())))):
                while (yield from Transact(ForgetNonces((yield from Now())))):
                    yield from Sleep(PAUSE_SECONDS)
        except StoreError:  # `watch_store` tells the operator
            pass
        yield from Sleep(LOOK_SECONDS)
