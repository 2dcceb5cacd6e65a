"""What the server's flows know: values made once from the configuration, and small counters that may be lost.

The store is the state. `Slots` and `Quiet` only bound what peers can make one process do and print.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Literal

from attrs import Factory, define, field, frozen

from chutes_proto.errors import Unavailable
from chutes_proto.server._config import LimitOptions
from chutes_proto.server._gpus import GPUS, Gpu
from chutes_proto.server._open_boots import OpenBoots
from chutes_proto.server._profiles import ServedProfile, publish
from chutes_proto.server._proxy import TrustedProxies
from chutes_proto.server._rates import Buckets, Rates
from chutes_proto.wire.codes import Code
from chutes_proto.wire.evidence import PORT
from chutes_proto.wire.http import address_prefix

if TYPE_CHECKING:
    from chutes_proto.auth.hotkey import Hotkey
    from chutes_proto.auth.signing import Signer, SigningPolicy
    from chutes_proto.keys.vault import Vault
    from chutes_proto.quote._policy import Policy
    from chutes_proto.quote._roots import TrustedRoot
    from chutes_proto.server._nonces import NonceMint
    from chutes_proto.server._proxy import Network
    from chutes_proto.wire.public import EncodedMeasurements


@frozen
class Callback:
    """How hosts are asked: the hotkey that they let ask, what signs with it, and the port they answer on."""

    hotkey: Hotkey
    signer: Signer = field(repr=False)
    port: int = PORT


@define
class Slots:
    """At most ``size`` at once, and ``share`` for one of those who come, so that none keeps all others out."""

    size: int
    share: int
    held: Counter[Hashable] = field(init=False, factory=Counter[Hashable])

    def of(self, whose: Hashable) -> _Slot:
        """``with slots.of(whose):`` holds one, or raises `Unavailable` when none is free."""
        return _Slot(self, whose)


@frozen
class _Slot:
    slots: Slots
    whose: Hashable

    def __enter__(self) -> None:
        held = self.slots.held
        if held.total() >= self.slots.size or held[self.whose] >= self.slots.share:
            raise Unavailable(Code.BUSY, "Too many verifications at once. Retry shortly.")
        held[self.whose] += 1

    def __exit__(self, *_: object) -> None:
        held = self.slots.held
        held[self.whose] -= 1
        if not held[self.whose]:
            del held[self.whose]


@define
class Quiet:
    """Which log lines are let through: of each address so many at once and as they flow in, and of all together.

    All together have room for what twenty addresses may cause, so nobody with fewer hides what is said of a VM. Of IPv6
    an address is its /64; IPv4 counts whole, because those who share a network of a data centre need not know each
    other.
    """

    _each: Buckets = field(factory=lambda: Buckets(size=20, per_second=0.2, most=1024))
    _all: Buckets = field(factory=lambda: Buckets(size=400, per_second=4, most=1))
    _held_back: int = field(init=False, default=0)

    def admits(self, address: str, now: float) -> int | None:
        """None: hold this line back. Else the number of lines held back since the last one; ``now`` never steps."""
        if self._each.take(address_prefix(address), now) or self._all.take(b"", now):
            self._held_back += 1
            return None
        held_back, self._held_back = self._held_back, 0
        return held_back


def _verifications(service: Service) -> Slots:
    """Half of the slots for one kind of platform: where its collateral is slow, the others' quotes have the rest."""
    most = service.limits.verifications
    return Slots(most, share=max(1, most // 2))


@frozen
class Service:
    """One key server.

    ``policy`` holds the measurement profiles, ``profiles`` what is served under each, by name. ``trust`` says which
    root quotes are verified to: it stands in every grant's log line, so that no one trusts a simulated platform
    unawares. ``callback`` goes with that ``registration_evidence``; addresses in ``unsafe_networks`` count as public.
    """

    vault: Vault
    mint: NonceMint
    root: TrustedRoot
    trust: str
    policy: Policy
    profiles: Mapping[str, ServedProfile]
    hotkeys: frozenset[str] | Literal["*"]
    volumes: tuple[str, ...] = ("storage", "tdx-cache")
    netuid: int = 64
    platform_binding: Literal["pin", "off"] = "pin"
    exchange_downgrade: Literal["refuse", "allow"] = "refuse"
    pruned: Literal["revive", "new"] = "revive"
    signatures: SigningPolicy = "compatible"
    registration_evidence: Literal["link", "boot", "callback"] = "link"
    callback: Callback | None = None
    unsafe_networks: tuple[Network, ...] = ()
    fresh_seconds: int = 3600
    gpus: Mapping[str, Gpu] = field(factory=lambda: GPUS)
    proxies: TrustedProxies = field(factory=TrustedProxies)
    limits: LimitOptions = field(factory=LimitOptions)
    published: EncodedMeasurements = field(
        init=False, eq=False, default=Factory(lambda self: publish(self.policy.profiles), takes_self=True)
    )
    verifications: Slots = field(default=Factory(_verifications, takes_self=True))
    hosts: Slots = field(factory=lambda: Slots(16, share=1))
    boots: OpenBoots = field(factory=OpenBoots)
    rates: Rates = field(default=Factory(lambda self: Rates(self.limits.requests_per_minute), takes_self=True))
    refusals: Quiet = field(factory=Quiet)
    faults: Quiet = field(factory=Quiet)
