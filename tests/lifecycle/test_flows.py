"""The same with everything real but the network, the disk and the clock: client flows, application, units, quotes.

Each request of a boot is lost, its answer is lost, or it is doubled; the store and the collateral are busy for as long
as the server waits, and longer; then the disk opens within a few boots.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import pytest
from attrs import define, field
from cryptography.x509 import load_pem_x509_certificate
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.auth.certificates import make_client_identity
from chutes_proto.client.flows import BootSettings, attest_volumes, boot_and_sync, confirm_volumes
from chutes_proto.client.retry import RetryPolicy
from chutes_proto.effects import Effect, FetchCollateral, Transact, run
from chutes_proto.errors import ChutesError, CollateralUnavailable, StoreBusy
from chutes_proto.server.app import App
from chutes_proto.server.profiles import ServedProfile
from chutes_proto.store.rows import Exchange, GenerationRow
from chutes_proto.testing.network import Fate, SimulatedNetwork
from chutes_proto.testing.platform import PROFILE
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.server.world import HOTKEY, NOW, World, service

VOLUMES = ("storage", "tdx-cache")
RETRY = RetryPolicy(attempts=3, base=1.0, cap=4.0, deadline=200.0)
BUSY = (0, 1, 19, 20, 22, 25)
"""For how many seconds of a boot the store, or the collateral, is not to be had."""


@define
class Vm:
    """A VM with two disks, whose headers hold these passphrases."""

    exchange: Exchange
    slots: dict[str, set[bytes]] = field(factory=lambda: {name: set[bytes]() for name in VOLUMES})
    server: World = field(init=False)
    boots: int = 0

    def __attrs_post_init__(self) -> None:
        served = ServedProfile(PROFILE, None, False, False, self.exchange)
        self.server = World(app=App(service(profiles={PROFILE.name: served})))

    def boot(
        self, fates: list[Fate], busy: int = 0, what: type[Effect[Any]] = Transact, killed: int | None = None
    ) -> bool:
        """One boot; True if all disks are open. ``killed``: after so many writes to disks the VM is off."""
        self.boots += 1
        identity = make_client_identity(NOW, self.boots.to_bytes(32, "big"))
        self.server.certificate = load_pem_x509_certificate(identity.certificate_pem)
        self.server.now += 30
        until = self.server.uptime + busy
        stages: list[Literal["boot", "runtime"]] = []

        def before(effect: Effect[Any]) -> None:
            if isinstance(effect, what) and self.server.uptime < until:
                raise StoreBusy("busy") if what is Transact else CollateralUnavailable("busy")

        def serve(request: HttpRequest) -> HttpResponse:
            return self.server.ask(request.method, request.target, request.body, headers=dict(request.headers))

        def quote(report_data: bytes) -> bytes:
            """The stage is the boot's until a grant was answered."""
            granted = any(record.event == "grant_received" for record in network.records)
            stages.append("runtime" if granted else "boot")
            return self.server.platform.quote(report_data, stage=stages[-1])

        self.server.before = before
        seed = hashlib.sha256(self.boots.to_bytes(4, "big")).digest()
        network = SimulatedNetwork(serve, quoter=quote, fates=fates, started=self.server.now, seed=seed)
        settings = BootSettings(HOTKEY, "vm-1", identity.spki_sha256, retry=RETRY)
        writes = iter(range(1000 if killed is None else killed))
        try:
            if self.exchange == "base":
                return self._base(settings, network, writes)
            return self._two_phase(settings, network, writes)
        except (ChutesError, StopIteration):
            return False

    def _base(self, settings: BootSettings, network: SimulatedNetwork, writes: Any) -> bool:
        formatted = [name for name in VOLUMES if self.slots[name]]
        _, keys = run(boot_and_sync(settings, VOLUMES, formatted=formatted), network.perform)
        for name, passphrase in keys.passphrases.items():
            if self.slots[name]:
                if passphrase.reveal() not in self.slots[name]:
                    return False
            else:
                assert name not in keys.in_use
                next(writes)
                self.slots[name] = {passphrase.reveal()}
        return True

    def _two_phase(self, settings: BootSettings, network: SimulatedNetwork, writes: Any) -> bool:
        formatted = [name for name in VOLUMES if self.slots[name]]
        rotation = run(attest_volumes(settings, VOLUMES, formatted), network.perform)
        up = True
        for name, pair in rotation.keys.items():
            opener = (pair.current or pair.next).reveal()
            if not self.slots[name]:
                assert name not in rotation.in_use
                next(writes)
                self.slots[name] = {opener}
            elif opener not in self.slots[name]:
                rotation.left_out(name)
                up = False
                continue
            next(writes)
            self.slots[name].add(pair.next.reveal())
            rotation.added(name)
        try:
            run(confirm_volumes(rotation, retry=RETRY), network.perform)
        except ChutesError:
            return up
        for name, pair in rotation.keys.items():
            if rotation.report.get(name):
                next(writes)
                self.slots[name] = {pair.next.reveal()}
        return up


boots = st.tuples(
    st.lists(st.sampled_from(Fate), max_size=8),
    st.sampled_from(BUSY),
    st.sampled_from([Transact, FetchCollateral]),
    st.none() | st.integers(0, 6),
)


@pytest.mark.parametrize("exchange", ["base", "two-phase"])
@given(st.lists(boots, min_size=1, max_size=4))
def test_the_disks_open_again(exchange: Exchange, disturbed: list[Any]) -> None:
    vm = Vm(exchange)
    for fates, busy, what, killed in disturbed:
        _ = vm.boot(fates, busy, what, killed)
    assert any(vm.boot([]) for _ in range(4))
    assert all(vm.boot([]) for _ in range(2))
    rows = vm.server.rows(GenerationRow)
    assert {row.volume for row in rows} == {*VOLUMES, "root", *(["k3s"] if exchange == "two-phase" else [])}
    assert all(row.sealed for row in rows)
    assert len(vm.slots["storage"]) == 1


def test_an_undisturbed_life_rotates_at_every_boot() -> None:
    vm = Vm("two-phase")
    seen: list[set[bytes]] = []
    for _ in range(4):
        assert vm.boot([])
        seen.append(vm.slots["storage"])
    assert len({key for slots in seen for key in slots}) == 4
