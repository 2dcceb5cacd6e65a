"""The values that the server's flows share: made once from the configuration, with small counters that may be lost.

All state is in the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Final, Literal

from attrs import Factory, evolve, field, frozen

from chutes_proto.auth.hotkey import Hotkey
from chutes_proto.auth.signing import Signer, SigningPolicy
from chutes_proto.errors import Refused
from chutes_proto.keys.vault import Vault
from chutes_proto.quote._measurements import Profile
from chutes_proto.quote._policy_set import BoundPolicies, PolicySet
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.server._config import LimitOptions
from chutes_proto.server._gpu_evidence import GpuAppraisal
from chutes_proto.server._gpus import GPUS, Gpu
from chutes_proto.server._grounds import Documents, Rules
from chutes_proto.server._known import KnownVms
from chutes_proto.server._limits import Admission, LogThrottle, TokenBuckets
from chutes_proto.server._nonces import NonceMint
from chutes_proto.server._open_boots import OpenBoots
from chutes_proto.server._profiles import ServedProfile, publish
from chutes_proto.server._proxy import Network, TrustedProxies
from chutes_proto.server._readiness import Readiness, Revoked
from chutes_proto.server._tokens import TokenMint
from chutes_proto.units.fleet import Window, parse_version
from chutes_proto.wire.codes import Code
from chutes_proto.wire.evidence import PORT
from chutes_proto.wire.http import HttpRequest, address_prefix
from chutes_proto.wire.public import EncodedMeasurements


@frozen
class Callback:
    """The access to hosts: the hotkey that they answer to, its signer, and the port they listen on."""

    hotkey: Hotkey
    signer: Signer = field(repr=False)
    port: int = PORT


def _verifications(service: Service) -> Admission:
    """Half of all for one kind of platform: where its collateral is slow, the others' quotes have the rest."""
    most = service.limits.verifications
    return Admission(most, share=max(1, most // 2))


def _bound(service: Service) -> BoundPolicies:
    return service.policies.bind(served.measurements for served in service.profiles.values())


def _public(service: Service) -> BoundPolicies:
    """The policies without release candidates, which are for the hotkeys that they name."""
    return service.policies.bind(served.measurements for served in service.profiles.values() if not served.rc)


def _waiting(service: Service, part: int, share: int) -> Admission:
    """A ``part`` of all connections, so that the others are answered; of these a ``share`` for one party."""
    most = max(1, service.limits.connections // part)
    text = "Too many requests wait for the store. Retry shortly."
    return Admission(most, share=max(1, most // share), code=Code.STORE_UNAVAILABLE, text=text)


def _hosts(service: Service) -> Admission:
    text = "A server of this hotkey is being registered, or as many as may be at once. Retry shortly."
    return Admission(service.limits.host_calls, share=1, text=text)


def _rates(service: Service) -> TokenBuckets:
    most = service.limits.requests_per_minute
    return TokenBuckets(most, most / 60)


def _host_rates(service: Service, parties: int) -> TokenBuckets:
    most = parties * service.limits.host_profiles_per_hour
    return TokenBuckets(most, most / 3600)


@frozen
class Service:
    """One key server.

    ``policies`` are those of the operator's file; joined with the measurements of ``profiles``, which are by name and
    version, they are ``policy``. Raises `PolicyError` if they cannot be joined. ``trust`` names the
    root that quotes are verified to: every grant's log line has it, so that trust in a simulated platform is seen.
    ``callback`` goes with that ``registration_evidence``; addresses in ``unsafe_networks`` count as public.
    ``rotate_after`` is the least age of a key, in seconds, that a disk gets in the place of another one.
    ``documents`` are what policies and profiles were read from, which audit rows name.
    """

    vault: Vault
    mint: NonceMint
    root: TrustedRoot
    trust: str
    profiles: Mapping[tuple[str, str], ServedProfile]
    hotkeys: frozenset[str] | Literal["*"]
    policies: PolicySet = field(factory=PolicySet)
    volumes: tuple[str, ...] = ("storage", "tdx-cache")
    netuid: int = 64
    blacklist: Mapping[str, str] = field(factory=dict[str, str])
    minimum_version: str | None = None
    signing_keys: bytes | None = None
    maintenance: Window | None = None
    exchange_downgrade: Literal["refuse", "allow"] = "refuse"
    rotate_after: int = 86_400
    signatures: SigningPolicy = "compatible"
    registration_evidence: Literal["link", "boot", "callback"] = "link"
    callback: Callback | None = None
    unsafe_networks: tuple[Network, ...] = ()
    fresh_seconds: int = 3600
    gpu_appraisal: GpuAppraisal | None = None
    gpus: Mapping[str, Gpu] = field(factory=lambda: GPUS)
    documents: Documents = Documents()
    proxies: TrustedProxies = field(factory=TrustedProxies)
    limits: LimitOptions = field(factory=LimitOptions)
    policy: BoundPolicies = field(init=False, eq=False, default=Factory(_bound, takes_self=True))
    public_policy: BoundPolicies = field(init=False, eq=False, default=Factory(_public, takes_self=True))
    rules: Rules = field(
        init=False,
        eq=False,
        default=Factory(lambda self: Rules(self.policy, self.public_policy, self.profiles), takes_self=True),
    )
    _published: dict[tuple[Profile, ...], EncodedMeasurements] = field(init=False, eq=False, factory=dict)
    verifications: Admission = field(default=Factory(_verifications, takes_self=True))
    tokens: TokenMint = field(default=Factory(lambda self: TokenMint.of(self.vault), takes_self=True))
    attested: Admission = field(default=Factory(lambda self: _waiting(self, 2, 8), takes_self=True))
    """Bounds the requests after a verified quote that wait for the store, by platform and by token."""
    strangers: Admission = field(default=Factory(lambda self: _waiting(self, 4, 2), takes_self=True))
    """Bounds the other ones that wait, by address."""
    hosts: Admission = field(default=Factory(_hosts, takes_self=True))
    boots: OpenBoots = field(factory=OpenBoots)
    host_rates: TokenBuckets = field(default=Factory(lambda self: _host_rates(self, 1), takes_self=True))
    all_host_rates: TokenBuckets = field(default=Factory(lambda self: _host_rates(self, 12), takes_self=True))
    rates: TokenBuckets = field(default=Factory(_rates, takes_self=True))
    refusals: LogThrottle = field(factory=LogThrottle)
    faults: LogThrottle = field(factory=LogThrottle)
    unrecorded: TokenBuckets = field(factory=lambda: TokenBuckets(1, 1 / 86_400, most=1024))
    """Admits one line for each platform and day that says that its denials are not recorded any more."""
    known: KnownVms = field(factory=KnownVms)
    revoked: Revoked = field(factory=Revoked)
    readiness: Readiness = field(factory=Readiness)

    def in_place_of(self, other: Service) -> Service:
        """This service, which goes on with the counters and the limits of the one that it replaces."""
        return evolve(self, **{name: getattr(other, name) for name in _CARRIED})

    def waiting(self, token: bytes, request: HttpRequest) -> AbstractContextManager[None]:
        """A place to wait for the store with ``token``; with one of ours, a place that no stranger can take."""
        if self.tokens.recognises(token):
            return self.attested.of(hashlib.sha256(token).digest())
        return self.strangers.of(address_prefix(request.peer_address))

    def accepted_profiles(self, now: int) -> tuple[Profile, ...]:
        """The profiles that count at the time ``now``, without release candidates."""
        return tuple(profile for profile in self.public_policy.profiles if profile.schedule.accepts(now))

    def published(self, now: int) -> EncodedMeasurements:
        """The answer of operation 15 at the time ``now``; it is made once for each set of profiles that counts."""
        counting = self.accepted_profiles(now)
        if counting not in self._published:
            self._published[counting] = publish(counting)
        return self._published[counting]

    def check_known(
        self, hotkey: Hotkey, code: Code, text: str = "Hotkey is not registered on netuid {netuid}"
    ) -> None:
        """Raise `Refused` with ``code`` unless ``hotkey`` is one of those that are served."""
        if self.hotkeys != "*" and hotkey.address not in self.hotkeys:
            reason = f"hotkey {hotkey.address} is not among the configured hotkeys"
            raise Refused(code, text.format(netuid=self.netuid), reason=reason)

    def check_welcome(self, hotkey: Hotkey) -> None:
        """Raise `Refused` if ``hotkey`` is blacklisted: it boots and registers nothing."""
        if (why := self.blacklist.get(hotkey.address)) is not None:
            raise Refused(Code.HOTKEY_BLACKLISTED, f"Your hotkey has been blacklisted: {why}")

    def check_version(self, profile: Profile, now: int) -> None:
        """Raise `Refused` if the image of ``profile`` is older than ``minimum_version``."""
        if self.minimum_version is None or parse_version(profile.version) >= parse_version(self.minimum_version):
            return
        newest = max((one.version for one in self.accepted_profiles(now)), key=parse_version, default="none")
        text = (
            f"VM version {profile.version} is no longer accepted for boot attestation. Please upgrade to the latest VM"
            f" version ({newest})."
        )
        raise Refused(Code.VERSION_REJECTED, text, reason=f"minimum_version is {self.minimum_version}")


_CARRIED: Final = (
    *("limits", "verifications", "attested", "strangers", "hosts", "boots", "rates", "refusals", "faults", "known"),
    *("unrecorded", "revoked", "readiness", "host_rates", "all_host_rates"),
)
"""The parts of a service that are no policy: they count what happens, so a reload must not forget them."""
