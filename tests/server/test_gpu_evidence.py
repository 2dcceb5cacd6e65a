"""GPU evidence at registrations and runtime attestations: recorded or required, and never at a boot."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from chutes_proto.effects import FetchGpuCollateral
from chutes_proto.errors import CollateralUnavailable, StoreBusy
from chutes_proto.gpu import (
    GpuCollateral,
    GpuPolicy,
    PinnedMeasurements,
    Revocation,
    Rims,
    parse_report,
    verify_rim,
)
from chutes_proto.gpu._rim import authenticate_rim
from chutes_proto.server._app import App
from chutes_proto.server._gpu_evidence import Demand, GpuAppraisal
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.server._service import Callback
from chutes_proto.store._rows import AuditRow, Claim, GpuDeviceRow, Read, ServerRow
from chutes_proto.testing import SimulatedGpus
from chutes_proto.testing._platform import PROFILE
from chutes_proto.units.records import SignedGpu, SignedGpus
from chutes_proto.units.servers import keep_gpus
from chutes_proto.wire import json
from chutes_proto.wire.codec import encode_quote
from chutes_proto.wire.codes import Code
from tests.server.test_callbacks import VALIDATOR, Hosted
from tests.server.test_runtime import PATH, nonce_of, quote
from tests.server.test_servers import boot, gpu, register, registered
from tests.server.world import MINER, NOW, OTHER, answer, refusal, service

GPUS = SimulatedGpus(b"the GPUs of a server's tests")
EXPECTED = evolve(PROFILE, expected_gpus=("h200",))


class WithGpus(Hosted):
    """A world whose hosts show the evidence of simulated GPUs, over the nonce that they are asked with."""

    shows: SimulatedGpus | None = GPUS
    arch: str | None = None
    """The host's word for its devices, in place of the true one."""

    def perform(self, effect: Any) -> Any:
        if self.shows is not None and hasattr(effect, "target"):
            nonce = bytes.fromhex(effect.target.rpartition("=")[2])
            devices = json.decode(self.shows.evidence_json(nonce))
            told = {} if self.arch is None else {"arch": self.arch}
            self.lie["members"] = {"nvtrust_evidence": json.encode([each | told for each in devices]).decode()}
        return super().perform(effect)


def collateral(gpus: SimulatedGpus = GPUS, now: int = NOW) -> GpuCollateral:
    rims = Rims.of(verify_rim(data, now=now, roots=gpus.roots) for data in gpus.rims(now))
    return GpuCollateral(rims, Revocation.of(gpus.status(now)))


def make(demand: Demand, *, callback: bool = True, policy: GpuPolicy = GpuPolicy(), verifies: bool = True) -> WithGpus:
    options: dict[str, Any] = {
        "profiles": {EXPECTED.identity: ServedProfile(EXPECTED, None, False, False, gpu_evidence=demand)},
        "gpu_appraisal": GpuAppraisal(policy, GPUS.roots) if verifies else None,
    }
    if callback:
        options |= {"registration_evidence": "callback", "callback": Callback(VALIDATOR.hotkey, VALIDATOR.sign)}
    world = WithGpus(App(service(**options)))
    world.gpus = collateral()
    return world


def audited(world: WithGpus) -> str:
    return str(world.rows(AuditRow)[-1].reason)


@pytest.mark.parametrize("demand", ["record", "require"])
def test_a_registration_says_which_devices_verified(demand: Demand) -> None:
    world = make(demand)
    registered(register(world))
    (device,) = world.rows(GpuDeviceRow)
    (server,) = world.rows(ServerRow)
    assert device.server_id == server.server_id
    assert "GPU evidence verified: 1 devices (GH100 driver 600.10.01 VBIOS 96.00.FF.00.01)" in audited(world)
    assert "measurements rims" in audited(world)
    assert "revocation checked" in audited(world)
    assert device.serial_number in audited(world)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("measurement", "measurement_mismatch"),
        ("report_signature", "report_signature"),
        ("nonce_other", "nonce_mismatch"),
        ("board_unknown", "model"),
        ("duplicate", "duplicate_device"),
        ("empty", "gpu_count"),
    ],
)
def test_evidence_that_does_not_verify_is_refused_only_if_it_is_required(fault: str, code: str) -> None:
    world = make("require")
    world.shows = GPUS.having(fault)
    status, found, text = refusal(register(world))
    assert (status, found) == (403, Code.GPU_EVIDENCE_REJECTED)
    assert text.endswith(code)
    assert world.rows(ServerRow) == ()
    recording = make("record")
    recording.shows = GPUS.having(fault)
    registered(register(recording))
    assert f"GPU evidence NOT accepted: {code}" in audited(recording)
    assert recording.rows(GpuDeviceRow) == ()


@pytest.mark.parametrize("demand", ["record", "require"])
def test_the_hosts_word_for_a_device_is_legible_in_the_audit_and_in_the_log(demand: Demand) -> None:
    """PostgreSQL takes no NUL, so that a host would make the store look faulty; other characters steer a terminal."""
    world = make(demand)
    world.arch = "HOPPER\n\x1b[2J\u202e\0" + "x" * 5000
    assert register(world).status == (201 if demand == "record" else 403)
    told = [str(record.fields[name]) for record in world.log for name in ("gpus", "reason") if name in record.fields]
    reasons = [row.reason for row in world.rows(AuditRow)]
    assert len(told) == 1
    assert len(reasons) == (demand == "record")
    for text in (*told, *reasons):
        assert "calls the device another kind (got HOPPER\ufffd\ufffd[2J\ufffd\ufffdx" in text
        assert text.isprintable()
        assert len(text) < 1500


def test_as_many_devices_as_gpus_are_declared() -> None:
    world = make("require")
    world.shows = SimulatedGpus(GPUS.seed, count=2)
    world.gpus = collateral(world.shows)
    assert refusal(register(world))[1] == Code.GPU_EVIDENCE_REJECTED
    registered(register(world, gpus=[gpu("a"), gpu("b")]))
    assert len(world.rows(GpuDeviceRow)) == 2


def test_our_missing_collateral_is_our_fault_and_stops_no_boot() -> None:
    for gpus in (None, GpuCollateral(), collateral(now=NOW - 100_000)):
        world = make("require")
        world.gpus = gpus
        assert refusal(register(world))[:2] == (503, Code.COLLATERAL_UNAVAILABLE)
        boot(world)
        recording = make("record")
        recording.gpus = gpus
        registered(register(recording))
        assert "GPU evidence NOT accepted" in audited(recording)


@pytest.mark.parametrize(
    "fault",
    [
        *("rim_signer_expired", "rim_other_product", "rim_driver_missing", "rims_none", "rim_conflict"),
        *("status_expired", "status_responder_expired", "status_signature", "status_missing"),
    ],
)
def test_rims_and_answers_that_are_no_good_are_our_fault(fault: str) -> None:
    """The devices are genuine: whoever registers them comes again when we have got better ones."""
    faulty = GPUS.having(fault)
    world = make("require")
    rims = Rims.of(authenticate_rim(data, roots=GPUS.roots) for data in faulty.rims(NOW))
    world.gpus = GpuCollateral(rims, Revocation.of(faulty.status(NOW)))
    assert refusal(register(world))[:2] == (503, Code.COLLATERAL_UNAVAILABLE)


def test_a_device_whose_certificate_has_expired_is_not_our_fault() -> None:
    world = make("require")
    world.shows = GPUS.having("brom_expired")
    status, code, text = refusal(register(world))
    assert (status, code) == (403, Code.GPU_EVIDENCE_REJECTED)
    assert text.endswith("certificate_expired")


def test_an_answer_that_was_made_while_it_was_fetched_counts() -> None:
    class Slow(WithGpus):
        def perform(self, effect: Any) -> Any:
            if isinstance(effect, FetchGpuCollateral):
                self.now = NOW + 5
                self.gpus = GpuCollateral(collateral().rims, Revocation.of(GPUS.status(self.now)))
            return super().perform(effect)

    world = Slow(make("require").app)
    registered(register(world))
    assert len(world.rows(GpuDeviceRow)) == 1


def test_a_gpu_belongs_to_the_server_that_showed_it() -> None:
    """Whatever uuid is declared, and whichever firmware made the certificate."""
    demands: tuple[Demand, ...] = ("require", "record")
    for demand in demands:
        world = make(demand)
        registered(register(world))
        world.shows = GPUS.having("leaf_renewed")
        world.names["second.example"] = ("9.9.9.9",)
        second = register(world, OTHER, id="n2", host="second.example", gpus=[gpu("another")])
        if demand == "require":
            assert refusal(second)[:2] == (409, Code.GPU_TAKEN)
        else:
            registered(second)
            assert "was shown by server n1 before" in audited(world)
        assert [row.server_id for row in world.rows(GpuDeviceRow)] == ["n1"]


def test_a_miner_is_told_which_server_of_its_own_has_a_gpu() -> None:
    """A GPU that was moved to another machine; of another miner's server nothing is told."""
    world = make("require")
    registered(register(world))
    world.names["second.example"] = ("9.9.9.9",)
    for pair, told in ((MINER, "your server n1 (vm-1) until you remove that: "), (OTHER, "another server: ")):
        detail = refusal(register(world, pair, id="n2", name="vm-2", host="second.example", gpus=[gpu("another")]))[2]
        assert detail.startswith(f"A GPU belongs to {told}")


def test_who_declares_a_gpu_without_showing_it_keeps_nobody_out() -> None:
    """The first declaration of a uuid is a stranger's, whose host showed nothing."""
    world = make("record")
    world.shows = None
    world.names["stranger.example"] = ("9.9.9.9",)
    registered(register(world, OTHER, id="n9", host="stranger.example", gpus=[gpu("GPU-0")]))
    world.app.service = evolve(world.app.service, profiles=make("require").app.service.profiles)
    world.shows = GPUS
    registered(register(world, gpus=[gpu("GPU-0")]))
    assert [row.server_id for row in world.rows(GpuDeviceRow)] == ["n1"]


def attest(world: WithGpus, gpus: SimulatedGpus | None) -> Any:
    nonce = nonce_of(world)
    body: dict[str, Any] = {"quote": encode_quote(quote(world, nonce))}
    if gpus is not None:
        body["gpu_evidence"] = gpus.evidence_json(bytes.fromhex(nonce)).decode()
    return world.ask_signed("POST", PATH, body, nonce=nonce, coverage="nonce")


def test_a_runtime_attestation_may_bring_evidence() -> None:
    world = make("record", callback=False)
    boot(world)
    registered(register(world))
    answer(attest(world, None))
    assert "no GPU evidence" in audited(world)
    answer(attest(world, GPUS))
    assert "GPU evidence verified" in audited(world)
    answer(attest(world, GPUS.having("leaf_renewed")))
    (device,) = world.rows(GpuDeviceRow)
    assert device.serial_number in audited(world)


def test_a_runtime_attestation_must_bring_required_evidence() -> None:
    world = make("require", callback=False)
    boot(world)
    registered(register(world))
    assert refusal(attest(world, None))[:2] == (403, Code.GPU_EVIDENCE_REJECTED)
    assert refusal(attest(world, GPUS.having("measurement")))[:2] == (403, Code.GPU_EVIDENCE_REJECTED)
    answer(attest(world, GPUS))


def test_a_runtime_attestation_shows_as_many_gpus_as_the_server_declared() -> None:
    """Whatever the profile says of their number: it is the declared GPUs that the evidence is to be of."""
    both = SimulatedGpus(GPUS.seed, count=2)
    world = make("require", callback=False)
    world.gpus = collateral(both)
    registered(register(world, gpus=[gpu("a"), gpu("b")]))
    status, code, text = refusal(attest(world, GPUS))
    assert (status, code) == (403, Code.GPU_EVIDENCE_REJECTED)
    assert text.endswith("gpu_count")
    answer(attest(world, both))


def test_a_runtime_attestation_shows_as_many_gpus_as_its_profile_has() -> None:
    both = SimulatedGpus(GPUS.seed, count=2)
    world = make("require", callback=False)
    world.gpus = collateral(both)
    profile = evolve(EXPECTED, gpu_count=2)
    profiles = {profile.identity: ServedProfile(profile, None, False, False, gpu_evidence="require")}
    world.app.service = evolve(world.app.service, profiles=profiles)
    registered(register(world, gpus=[gpu("a")]))
    for shown in (GPUS, both):
        assert refusal(attest(world, shown))[2].endswith("gpu_count")


def test_without_reference_values_evidence_is_recorded_and_not_verified() -> None:
    world = make("record", verifies=False)
    registered(register(world))
    assert "GPU evidence NOT verified" in audited(world)


def test_a_policy_with_models_of_its_own_counts() -> None:
    world = make("require", policy=GpuPolicy(models=frozenset({"b200"})))
    assert refusal(register(world))[2].endswith("model")


def test_the_audit_says_what_was_pinned_and_what_was_not_checked() -> None:
    report = parse_report(GPUS.evidence(bytes(32))[0].report)
    observed = {index - 1: value for index, value in report.measurements.items()}
    pinned = PinnedMeasurements(chip="GH100", driver="600.10.01", vbios="96.00.FF.00.01", values=observed)
    world = make("require", policy=GpuPolicy(revocation="off", pinned=(pinned,)))
    world.gpus = GpuCollateral()
    registered(register(world))
    assert "measurements pinned" in audited(world)
    assert "revocation NOT checked" in audited(world)


def test_a_lost_directory_is_told() -> None:
    world = make("record")
    world.gpus = None
    registered(register(world))
    assert str(CollateralUnavailable("the directory is gone")) in audited(world)


def test_a_device_that_another_transaction_took_meanwhile_is_asked_again() -> None:
    world = make("record", callback=False)
    registered(register(world))
    (server,) = world.rows(ServerRow)
    script = keep_gpus(SignedGpus("text", (SignedGpu("41A0", "53C2"),)), server, NOW)
    assert isinstance(next(script), Read)
    assert isinstance(script.send(None), Claim)
    with pytest.raises(StoreBusy):
        _ = script.send(False)
