"""The same with everything real but the network and the clock: flows, application, units, quotes; some disks too.

Each request of a boot is lost, its answer is lost, or it is doubled; the store and the collateral are busy for as long
as the server waits, and longer; then the disk opens within a few boots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field
from cryptography.x509 import load_pem_x509_certificate
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.auth.client_identity import make_client_identity
from chutes_proto.boot._disks import Unlocked, unlock
from chutes_proto.boot._flows import BootSettings
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.effects import ActOnDisk, Effect, FetchCollateral, InspectDisk, Transact, run
from chutes_proto.errors import ChutesError, CollateralUnavailable, DiskError, StoreBusy
from chutes_proto.log import Record
from chutes_proto.luks.volume import Volume
from chutes_proto.server._app import App
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.store._rows import Exchange, GenerationRow
from chutes_proto.testing._platform import PROFILE
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.lifecycle.disks import Killed, RealDisks, SimulatedDisks, VmDisks
from tests.luks import headers
from tests.network import Fate, SimulatedNetwork
from tests.server.world import HOTKEY, NOW, World, service

VOLUMES = ("storage", "tdx-cache")
RETRY = RetryPolicy(attempts=3, base=1.0, cap=4.0, deadline=200.0)
BUSY = (0, 1, 19, 20, 22, 25)
"""For how many seconds of a boot the store, or the collateral, is not to be had."""


@define
class Vm:
    """A VM with two disks."""

    exchange: Exchange
    disks: VmDisks = field(factory=SimulatedDisks)
    folder: str = "/dev"
    server: World = field(init=False)
    boots: int = 0
    records: list[Record] = field(factory=list[Record])

    def __attrs_post_init__(self) -> None:
        served = ServedProfile(PROFILE, None, False, False, self.exchange)
        self.server = World(app=App(service(profiles={PROFILE.identity: served})))

    def device(self, name: str) -> str:
        return f"{self.folder}/{name}.img"

    def slots(self) -> list[int]:
        """How many keys open each of the disks."""
        return [self.disks.slots(self.device(name)) for name in VOLUMES]

    def boot(self, fates: list[Fate], busy: int = 0, what: type[Effect[Any]] = Transact) -> Unlocked:
        """One boot. Raises what it ends with."""
        self.boots += 1
        identity = make_client_identity(NOW, self.boots.to_bytes(32, "big"))
        self.server.certificate = load_pem_x509_certificate(identity.certificate_pem)
        self.server.now += 30
        until = self.server.uptime + busy

        def before(effect: Effect[Any]) -> None:
            if isinstance(effect, what) and self.server.uptime < until:
                raise StoreBusy("busy") if what is Transact else CollateralUnavailable("busy")

        def serve(request: HttpRequest) -> HttpResponse:
            return self.server.ask(request.method, request.target, request.body, headers=dict(request.headers))

        def quote(report_data: bytes) -> bytes:
            """The stage is the boot's until a grant was answered."""
            granted = any(record.event == "grant_received" for record in network.records)
            return self.server.platform.quote(report_data, stage="runtime" if granted else "boot")

        def perform(effect: Effect[Any]) -> object:
            match effect:
                case InspectDisk(device):
                    return self.disks.inspect(device)
                case ActOnDisk(action, keys):
                    return self.disks.act(action, keys)
                case _:
                    return network.perform(effect)

        self.server.before = before
        seed = hashlib.sha256(self.boots.to_bytes(4, "big")).digest()
        network = SimulatedNetwork(serve, quoter=quote, fates=fates, started=self.server.now, seed=seed)
        self.records = network.records
        settings = BootSettings(HOTKEY, "vm-1", identity.spki_sha256, retry=RETRY)
        return run(unlock(settings, [Volume(name, self.device(name)) for name in VOLUMES]), perform)

    def survives(self, *disturbed: Any, killed: int | None = None) -> bool:
        """Whether the disks are open after a boot; ``killed``: after so many writes to disks the VM is off."""
        if isinstance(self.disks, SimulatedDisks):
            self.disks.writes = 1000 if killed is None else killed
        try:
            _ = self.boot(*disturbed)
        except (ChutesError, Killed):
            return False
        return True


boots = st.tuples(
    st.lists(st.sampled_from(Fate), max_size=8),
    st.sampled_from(BUSY),
    st.sampled_from([Transact, FetchCollateral]),
    st.none() | st.integers(0, 6),
)


@pytest.mark.no_cover  # what chance covers, no floor may rest on
@pytest.mark.parametrize("exchange", ["base", "two-phase"])
@given(st.lists(boots, min_size=1, max_size=4))
def test_the_disks_open_again(exchange: Exchange, disturbed: list[Any]) -> None:
    vm = Vm(exchange)
    for fates, busy, what, killed in disturbed:
        _ = vm.survives(fates, busy, what, killed=killed)
    assert any(vm.survives([]) for _ in range(4))
    assert all(vm.survives([]) for _ in range(2))
    rows = vm.server.rows(GenerationRow)
    assert {row.volume for row in rows} == {*VOLUMES, "root", *(["k3s"] if exchange == "two-phase" else [])}
    assert all(row.sealed for row in rows)
    assert vm.slots() == ([1, 1] if exchange == "base" else [2, 2])


def test_an_undisturbed_life_rotates_at_every_boot() -> None:
    disks = SimulatedDisks()
    vm = Vm("two-phase", disks)
    seen: list[set[bytes]] = []
    for _ in range(4):
        _ = vm.boot([])
        seen.append({*disks.keys[vm.device("storage")]})
    assert len({key for slots in seen for key in slots}) == 4


# --- real disks ---


@pytest.fixture
def real(require_program: Callable[[str], str], tmp_path: Path) -> RealDisks:
    _ = require_program("cryptsetup")
    return RealDisks(tmp_path, *VOLUMES)


def living(exchange: Exchange, real: RealDisks, *boots: list[Fate]) -> Vm:
    """A VM with real disks after these boots."""
    vm = Vm(exchange, real, str(real.path("x").parent))
    for fates in boots:
        real.boot()
        _ = vm.boot(fates)
    real.boot()
    return vm


def test_real_disks_are_formatted_once_and_open_at_each_boot(real: RealDisks) -> None:
    vm = living("base", real, [])
    assert [volume.formatted for volume in vm.boot([]).volumes] == [False, False]
    assert vm.slots() == [1, 1]


TO_CONFIRMATION = [Fate.DELIVERED] * 3  # nonce, attestation, attestation of the volumes
UNKNOWN = [*TO_CONFIRMATION, *[Fate.ANSWER_LOST] * RETRY.attempts]
UNHEARD = [*TO_CONFIRMATION, *[Fate.REQUEST_LOST] * RETRY.attempts]


@pytest.mark.parametrize("lost", [UNKNOWN, UNHEARD], ids=["answer", "request"])
def test_a_lost_confirmation_keeps_both_keys_on_real_disks_until_one_is_heard(
    real: RealDisks, lost: list[Fate]
) -> None:
    vm = living("two-phase", real, [], [])
    assert vm.slots() == [2, 2]
    _ = vm.boot(lost)
    assert vm.slots() == [3, 3]
    assert any(record.event == "rotation_undecided" for record in vm.records)
    real.boot()
    _ = vm.boot(lost)
    assert max(vm.slots()) <= 4
    real.boot()
    _ = vm.boot([])
    assert vm.slots() == [2, 2]
    real.boot()
    _ = vm.boot([])


def test_a_blank_disk_in_the_place_of_one_in_use_stops_the_boot(real: RealDisks) -> None:
    """In the base exchange the server hears of a format at the next boot, else with the confirmation."""
    lives: tuple[tuple[Exchange, int], ...] = (("base", 2), ("two-phase", 1))
    for exchange, boots in lives:
        vm = living(exchange, real, *[[]] * boots)
        real.blank("storage")
        before = real.path("tdx-cache").read_bytes()
        with pytest.raises(DiskError, match="the server knows it to hold data") as caught:
            _ = vm.boot([])
        assert (caught.value.reason, caught.value.device) == ("blank_in_use", vm.device("storage"))
        assert not any(real.path("storage").read_bytes())
        assert real.path("tdx-cache").read_bytes() == before
        for name in VOLUMES:
            real.blank(name)


def test_what_a_host_does_to_real_disks_stops_the_boot(real: RealDisks) -> None:
    vm = living("base", real, [])
    whole = real.path("storage").read_bytes()
    area = whole[4096 : headers.AREA].rstrip(b"\0")
    null = headers.both(area.replace(b'"aes-xts-plain64","sector', b'"cipher_null-ecb","sector'))[: 2 * headers.AREA]
    for reason, altered in (
        ("cipher", null + whole[len(null) :]),
        ("checksum", bytes(8) + whole[8:16400] + bytes(4096) + whole[20496:]),
        ("segment_offset", whole[: 16 << 20]),
        ("foreign", b"\0" * 0x438 + b"\x53\xef".ljust(len(whole) - 0x438, b"\0")),
        ("empty", b""),
        ("key_refused", real.path("tdx-cache").read_bytes()),
    ):
        _ = real.path("storage").write_bytes(altered)
        real.boot()
        with pytest.raises(DiskError) as caught:
            _ = vm.boot([])
        assert (caught.value.reason, caught.value.device) == (reason, vm.device("storage"))
        assert real.path("storage").read_bytes() == altered
    _ = real.path("storage").write_bytes(whole)
    real.boot()
    _ = vm.boot([])
