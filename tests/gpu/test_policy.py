"""What a policy demands of GPUs, and what verification says of a machine."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from chutes_proto.auth import der
from chutes_proto.gpu import (
    NVIDIA,
    DeviceEvidence,
    EvidenceFormatError,
    EvidenceRefusedError,
    GpuCollateral,
    GpuPolicy,
    GpuPolicyError,
    GpuRoots,
    GpuVerificationError,
    PinnedMeasurements,
    Revocation,
    Rims,
    authenticate,
    compare,
    parse_evidence,
    parse_gpu_policy,
    parse_report,
    read_root,
    verify,
    verify_rim,
)
from chutes_proto.gpu import _steps as steps
from chutes_proto.gpu._certificates import verify_chain
from chutes_proto.gpu._report import FWID
from chutes_proto.gpu._revocation import answer_about, read_status
from chutes_proto.testing import SimulatedGpus
from chutes_proto.testing._gpu_drafts import DIGITAL_SIGNATURE, GpuCertificate, StatusDraft, block, crl, sign
from chutes_proto.testing._gpu_faults import GpuFault
from chutes_proto.testing._pki import Keys, flipped, pem
from tests.gpu.simulated import GPUS, MACHINE, NONCE, NOW, refused, verified
from tests.work import work_of

UNCHECKED = GpuPolicy(measurements="unchecked", revocation="off")


CONTRADICTIONS: list[dict[str, Any]] = [
    {"min_driver": "new"},
    {"min_vbios": {"GH100": "96"}},
    {"min_vbios": "96.00.9F.00.01"},
    {"boards": ("1010_0200_882",)},
    {"min_vbios": {"": "96.00.9F.00.01"}},
    {"min_vbios": {"gh100": "96.00.9F.00.01"}},
    {"min_vbios": {"LS_10": "96.00.9F.00.01"}},
    {"min_vbios": {"H200": "96.00.9F.00.01"}},
    {"modes": frozenset({"CC"})},
    {"modes": frozenset()},
    {"models": frozenset()},
    {"models": frozenset({"h 200"})},
    {"models": "h100_sxm"},
    {"boards": {"a b": "h200"}},
    {"measurements": "some"},
    {"revocation": "maybe"},
    {"revocation": "grace"},
    {"revocation_grace": 5},
    {"revocation_grace": -1},
    {"revocation": "grace", "revocation_grace": 1.5},
    {"allow_rim_signer_on_hold": 1},
    {"pinned": [1]},
]


@pytest.mark.parametrize("fields", CONTRADICTIONS, ids=str)
def test_a_policy_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(GpuPolicyError, match=f"^{next(iter(fields)).split('_grace', maxsplit=1)[0]}"):
        _ = GpuPolicy(**fields)


@pytest.mark.parametrize("fields", [{"chip": ""}, {"driver": 1}, {"values": {}}, {"values": {-1: b"x"}}], ids=str)
def test_pinned_measurements_mean_something(fields: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"chip": "GH100", "driver": "1.0", "vbios": "9", "values": {0: b"x"}}
    with pytest.raises(GpuPolicyError):
        _ = PinnedMeasurements(**{**usual, **fields})


def test_a_policy_gives_all_its_reasons() -> None:
    policy = GpuPolicy(
        min_driver="600.10.02",
        min_vbios={"GH100": "96.00.FF.00.02"},
        modes=frozenset({"PPCIE"}),
        models=frozenset({"b200"}),
    )
    error = refused(GPUS, policy=policy).error
    assert isinstance(error, steps.GpuAppraisalError)
    assert [refusal.code for refusal in error.refusals] == ["driver_too_old", "mode", "model", "vbios_too_old"]
    assert str(error).startswith(
        "driver_too_old: the driver is too old (got 600.10.01, expected at least 600.10.02); mode: "
    )
    same = GpuPolicy(min_driver="600.10.01", min_vbios={"GH100": "96.00.FF.00.01"}, models=frozenset({"h200"}))
    assert verified(GPUS, policy=same).devices[0].model == "h200"


def test_a_switch_has_a_lowest_vbios_too() -> None:
    switch = verified(MACHINE).devices[-1]
    assert switch.arch == "LS10"
    same, later = (GpuPolicy(min_vbios={"LS10": vbios}) for vbios in (str(switch.vbios), "FF.00.00.00.00"))
    assert verified(MACHINE, policy=same).devices[-1].error is None
    *gpus, switch = refused(MACHINE, policy=later).devices
    assert [gpu.error for gpu in gpus] == [None] * 3
    assert switch.error is not None
    assert switch.error.code == "vbios_too_old"


def test_a_board_can_be_named() -> None:
    blackwell = SimulatedGpus(GPUS.seed, arch="BLACKWELL")
    demands = {"models": frozenset({"b200"})}
    assert refused(blackwell, policy=GpuPolicy(**demands)).code == "model"  # type: ignore[arg-type]
    named = GpuPolicy(boards={"G525_0220_886": "b200"}, **demands)  # type: ignore[arg-type]
    assert verified(blackwell, policy=named).devices[0].model == "b200"


def test_every_mismatch_is_told_with_whether_the_others_agree() -> None:
    one = refused(MACHINE.having("measurement", "measurement_vbios")).devices
    assert [(m.index, m.source, m.shared) for m in one[0].mismatches] == [(9, "driver", False), (52, "vbios", False)]
    assert one[1].mismatches == ()
    text = str(one[0].error)
    assert "index 52 (vbios)" in text
    assert "unlike on other GPUs" in text
    assert "reboot the host" in text
    both = SimulatedGpus(GPUS.seed, count=2)
    same = verified_evidence(both.having("measurement"), both.having("measurement").another(1))
    assert [m.shared for device in same for m in device.mismatches] == [True, True]
    most = verified_evidence(both.having("measurement"), both.having("measurement").another(1), both.another(2))
    assert [m.shared for device in most for m in device.mismatches] == [False, False]
    beside_a_switch = SimulatedGpus(GPUS.seed, switches=1)
    for alone in (GPUS, beside_a_switch):
        assert refused(alone.having("measurement")).devices[0].mismatches[0].shared is None


def verified_evidence(*machines: SimulatedGpus) -> tuple[Any, ...]:
    """The reports on the first device of each machine, as if they were one machine's."""
    evidence = [machine.evidence(NONCE)[0] for machine in machines]
    rims = Rims.of(verify_rim(data, now=NOW, roots=GPUS.roots) for data in GPUS.rims(NOW))
    policy = GpuPolicy(revocation="off")
    with pytest.raises(EvidenceRefusedError) as caught:
        _ = verify(evidence, nonce=NONCE, now=NOW, rims=rims, revocation=Revocation(), policy=policy, roots=GPUS.roots)
    return caught.value.devices


def test_a_refusal_comes_whole_out_of_another_process() -> None:
    error = refused(MACHINE.having("measurement"))
    made: EvidenceRefusedError = pickle.loads(pickle.dumps(error))
    assert str(made) == str(error)
    assert [rim.digest for rim in made.devices[1].rims] == [rim.digest for rim in error.devices[1].rims] != []


def test_the_decoder_that_is_disabled_exempts_index_35() -> None:
    hopper = verified(GPUS.having("measurement_35"))
    assert hopper.devices[0].mismatches == ()
    blackwell = SimulatedGpus(GPUS.seed, arch="BLACKWELL").having("measurement_35")
    assert [m.index for m in refused(blackwell).devices[0].mismatches] == [35]


def test_pinned_measurements_stand_in_for_a_missing_rim() -> None:
    report = parse_report(GPUS.evidence(NONCE)[0].report)
    observed = {index - 1: value for index, value in report.measurements.items()}
    pinned = PinnedMeasurements(chip="GH100", driver="600.10.01", vbios="96.00.FF.00.01", values=observed)
    policy = GpuPolicy(revocation="off", pinned=(pinned,))
    without = GPUS.having("rim_driver_missing")
    (device,) = verified(without, policy=policy).devices
    assert (device.reference, device.compared, device.rims) == ("pinned", 64, ())
    altered = refused(without.having("measurement"), policy=policy)
    assert [(m.index, m.source) for m in altered.devices[0].mismatches] == [(9, "pinned")]
    assert verified(GPUS, policy=policy).devices[0].reference == "rims"
    changes: list[dict[str, Any]] = [{"chip": "GB100"}, {"driver": "1.0"}, {"vbios": "1.0"}]
    for change in changes:
        other = attrs.evolve(pinned, **change)
        assert refused(without, policy=GpuPolicy(revocation="off", pinned=(other,))).code == "rim_missing"


def test_of_two_rims_for_one_version_the_fitting_one_counts() -> None:
    corrected = GPUS.having("rim_corrected").rims(NOW)
    rims = Rims.of(verify_rim(data, now=NOW, roots=GPUS.roots) for data in (*corrected, *GPUS.rims(NOW)))
    assert len(rims.rims) == 3
    for order in (rims, Rims(rims.rims[::-1])):
        (device,) = verified(GPUS, rims=order).devices
        assert device.rims[0].digest != rims.rims[0].digest
    assert refused(GPUS, rims=Rims(rims.rims[:2])).code == "measurement_mismatch"


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("status", ["revoked", "missing"])
def test_a_rim_that_was_signed_again_counts_beside_the_old_one(status: str, order: int) -> None:
    signed = GpuFault(
        "signed_again",
        "another signer of RIMs",
        rim_signer=lambda signer: attrs.evolve(signer, key="the next signer"),
        driver_rim=lambda rim: attrs.evolve(rim, signer="the next signer"),
        vbios_rim=lambda rim: attrs.evolve(rim, signer="the next signer"),
    )
    again = attrs.evolve(GPUS, faults=(signed,))
    old, new = ([verify_rim(data, now=NOW, roots=GPUS.roots) for data in gpus.rims(NOW)] for gpus in (GPUS, again))
    known = again.status(NOW)
    if status == "revoked":
        known += GPUS.having("rim_signer_on_hold").status(NOW)
    revocation = Revocation.of(known)
    (device,) = verified(GPUS, rims=Rims.of([*old, *new][::order]), revocation=revocation).devices
    assert {rim.digest for rim in device.rims} == {rim.digest for rim in new}
    code = "certificate_revoked" if status == "revoked" else "status_missing"
    assert refused(GPUS, rims=Rims.of(old), revocation=revocation).code == code


def test_revocation_has_grace_hold_and_a_floor() -> None:
    late = Revocation.of(GPUS.status(NOW - 90_000))
    assert refused(GPUS, revocation=late).code == "status_expired"
    assert verified(GPUS, revocation=late, policy=GpuPolicy(revocation="grace", revocation_grace=4000)).devices
    assert refused(GPUS, revocation=late, policy=GpuPolicy(revocation="grace", revocation_grace=3000)).code == (
        "status_expired"
    )
    last = Revocation.of(GPUS.status(NOW - 86_400))
    assert verified(GPUS, revocation=last).devices, "the end is inclusive"
    held, lenient = GPUS.having("rim_signer_on_hold"), GpuPolicy(allow_rim_signer_on_hold=True)
    assert verified(held, policy=lenient).devices
    for other in ("rim_ca_on_hold", "device_on_hold"):
        assert refused(GPUS.having(other), policy=lenient).code == "certificate_revoked"
    off = GpuPolicy(revocation="off")
    assert not verified(GPUS, revocation=Revocation(), policy=off).devices[0].revocation_checked
    assert verified(GPUS, revocation=Revocation.of(GPUS.crls(NOW)), policy=off).devices
    named = Revocation.of(GPUS.crls(NOW, "Simulated GH100 ICA"))
    assert refused(GPUS, revocation=named, policy=off).code == "certificate_revoked"
    (signer, issuer), keys = ("Simulated RIM Signer", "Simulated Reference Value CA"), Keys(GPUS.seed)
    of_rims = Revocation.of([crl(keys, issuer, issuer, (keys.serial(signer),), NOW)])
    assert refused(GPUS, revocation=of_rims, policy=off).code == "certificate_revoked"
    forged = Revocation.of(SimulatedGpus(b"another world of GPUs").crls(NOW, "Simulated GH100 ICA"))
    assert refused(GPUS, revocation=forged, policy=off).code == "status_signature"


def test_the_latest_answer_counts_but_a_revocation_stands() -> None:
    old, new = GPUS.status(NOW - 1000), GPUS.status(NOW)
    assert verified(GPUS, revocation=Revocation.of((*old, *new))).devices
    assert verified(GPUS, revocation=Revocation.of((*new, *old))).devices
    was_held = GPUS.having("rim_signer_on_hold").status(NOW - 1000)
    assert verified(GPUS, revocation=Revocation.of((*was_held, *new))).devices
    was_revoked = GPUS.having("revoked").status(NOW - 1000)
    assert refused(GPUS, revocation=Revocation.of((*was_revoked, *new))).code == "certificate_revoked"


def test_a_responder_is_one_until_its_certificate_ends() -> None:
    def ending(draft: StatusDraft) -> StatusDraft:
        return attrs.evolve(draft, responder=attrs.evolve(draft.responder, not_after=NOW))

    until = GpuFault("until", "a responder until now", status=ending)
    answers = Revocation.of(attrs.evolve(GPUS, faults=(until,)).status(NOW - 60))
    assert verified(GPUS, revocation=answers).devices
    assert refused(GPUS, revocation=answers, now=NOW + 1).code == "certificate_expired"


def test_an_answer_names_the_key_that_signed_it() -> None:
    named = GpuFault("named", "another key", status=lambda d: attrs.evolve(d, signed=lambda data: flipped(data, 12)))
    assert refused(attrs.evolve(GPUS, faults=(named,))).code == "status_responder"


def test_an_answer_about_another_issuers_certificate_is_none() -> None:
    """It may have the same serial number."""
    answers = []
    for answer in GPUS.status(NOW):
        issuer = ocsp.load_der_ocsp_response(answer).issuer_key_hash
        answers.append(answer.replace(issuer, flipped(issuer)))
    assert refused(GPUS, revocation=Revocation.of(answers)).code == "status_missing"


def test_an_answer_that_says_only_that_it_is_one_is_none() -> None:
    with pytest.raises(steps.StatusFormatError, match="it cannot answer"):
        _ = read_status(b"\x30\x03\x0a\x01\x00")


def test_a_crl_is_no_answer_about_one_certificate() -> None:
    with pytest.raises(GpuVerificationError, match="it is a CRL"):
        _ = answer_about(GPUS.crls(NOW)[0], b"", b"", b"\1", "certificate")


def test_unusual_forms_are_read() -> None:
    for fault in ("status_by_issuer", "status_by_name", "rim_declared"):
        assert verified(GPUS.having(fault)).devices


def test_the_number_of_gpus_is_the_expected_one() -> None:
    assert len(verified(MACHINE, count=3).gpus) == 3
    assert refused(MACHINE, count=4).code == "gpu_count"
    assert refused(MACHINE, count=2).code == "gpu_count"


def test_switches_alone_are_accepted_only_for_a_count_of_none() -> None:
    switches = SimulatedGpus(GPUS.seed, count=0, switches=2)
    error = refused(switches).error
    assert (error.code, error.got, error.expected) == ("gpu_count", 0, "at least 1")  # type: ignore[attr-defined]
    accepted = verified(switches, count=0)
    assert (len(accepted.devices), accepted.gpus) == (2, ())


def test_another_certificate_does_not_make_two_devices_of_one() -> None:
    """Firmware that was updated has another one, of the same key in the chip; and that key may have two itself."""
    keys, issuer = Keys(GPUS.seed), "Simulated GH100 ICA"

    def certified_again(chain: tuple[bytes, ...]) -> tuple[bytes, ...]:
        old = x509.load_der_x509_certificate(chain[1])
        serial = old.serial_number.to_bytes(20)
        body = old.tbs_certificate_bytes.replace(serial, flipped(serial), 1)
        algorithm = der.sequence(der.oid(old.signature_algorithm_oid.dotted_string))
        again = der.sequence(body, algorithm, der.bits(sign(keys, issuer, body)))
        return (chain[0], again, *chain[2:])

    certified = GpuFault("certified_again", "another certificate of the key in the chip", chain=certified_again)
    for other, serials, ids in (
        (GPUS.having("leaf_renewed"), 2, 1),
        (attrs.evolve(GPUS, faults=(certified,)), 1, 2),
    ):
        both = (*GPUS.evidence(NONCE), *other.evidence(NONCE))
        options: dict[str, Any] = {"now": NOW, "rims": Rims(), "revocation": Revocation(), "roots": GPUS.roots}
        with pytest.raises(EvidenceRefusedError) as caught:
            _ = verify(both, nonce=NONCE, policy=UNCHECKED, **options)
        assert caught.value.code == "duplicate_device"
        assert len({device.serial_number for device in caught.value.devices}) == serials
        assert len({device.device_id for device in caught.value.devices}) == ids


def test_a_digest_of_firmware_is_whole() -> None:
    """Also where the report and the certificate agree on a part of one."""
    certified = GPUS.having("fwid_short")
    reported = GpuFault("short", "the same", report=lambda d: attrs.evolve(d, fields={**d.fields, FWID: b"x"}))
    assert refused(attrs.evolve(certified, faults=(*certified.faults, reported))).code == "fwid_mismatch"


def test_a_rim_of_a_switch_is_none_of_a_gpu() -> None:
    switch = GpuFault("switch", "a RIM of a switch", driver_rim=lambda rim: attrs.evolve(rim, edition="SWITCH"))
    assert refused(attrs.evolve(GPUS, faults=(switch,))).code == "rim_product"


def test_a_nonce_is_compared_whole_or_said_to_be_unchecked() -> None:
    assert not verified(GPUS, nonce=None).devices[0].is_fresh
    assert refused(GPUS, nonce=NONCE[:31] + b"\0").code == "nonce_mismatch"
    for wrong in (NONCE[:31], NONCE + b"\0", NONCE.hex(), bytearray(NONCE)):
        with pytest.raises(TypeError, match=r"^nonce"):
            _ = verified(GPUS, nonce=wrong)


@pytest.mark.parametrize("made", [bytearray, memoryview, bytes.decode, json.loads, lambda _: [1], lambda _: None])
def test_evidence_of_another_type_is_refused(made: Callable[[bytes], Any]) -> None:
    data = made(GPUS.evidence_json(NONCE))
    policy, rims, revocation = GpuPolicy(), Rims(), Revocation()
    with pytest.raises(TypeError, match=r"^data: must be bytes, or a sequence of DeviceEvidence"):
        _ = verify(data, nonce=NONCE, now=NOW, rims=rims, revocation=revocation, policy=policy, roots=GPUS.roots)
    unread: Any = [b"<SoftwareIdentity/>"]
    with pytest.raises(TypeError, match=r"^rims: must be VerifiedRim, as of verify_rim, not bytes"):
        _ = Rims.of(unread)
    with pytest.raises(TypeError, match=r"^evidence: must be DeviceEvidence"):
        _ = authenticate(data, nonce=NONCE, now=NOW, roots=GPUS.roots)


def test_what_is_read_must_be_bytes() -> None:
    for wrong in cast("tuple[Any, ...]", (None, 5, {}, Path("rim.xml"), "text")):
        for read, must in (
            (parse_evidence, "data: must be the bytes of evidence"),
            (parse_report, "data: must be the bytes of a report"),
            (lambda data: verify_rim(data, now=NOW), "data: must be the bytes of a RIM"),
            (lambda data: Revocation.of([data]), "pieces: must be the bytes of OCSP answers and CRLs"),
            (read_root, "der: must be the bytes of a certificate in DER"),
            (parse_gpu_policy, "data: must be the bytes or text of a TOML file"),
        ):
            if isinstance(wrong, str) and "text" in must:
                continue
            with pytest.raises(TypeError, match=f"^{must}, not {type(wrong).__name__}$"):
                read(wrong)
    rim = next(iter(GPUS.rims(NOW)))
    assert verify_rim(memoryview(rim), now=NOW, roots=GPUS.roots) == verify_rim(rim, now=NOW, roots=GPUS.roots)


def test_values_are_made_of_what_they_say() -> None:
    report, chain = GPUS.evidence(NONCE)[0].report, GPUS.evidence(NONCE)[0].chain
    text: Any = chain.decode()
    for make, must in (
        (lambda: DeviceEvidence(report, text), "chain: must be bytes, not str"),
        (lambda: DeviceEvidence(text, chain), "report: must be bytes, not str"),
        (lambda: DeviceEvidence(report, chain, text.encode()), "arch: must be a str, or None, not bytes"),
        (lambda: GpuCollateral(text, Revocation()), "rims: must be Rims, not str"),
        (lambda: GpuCollateral(Rims(), text), "revocation: must be Revocation, not str"),
        (lambda: GpuRoots(text, NVIDIA.rim), "device: must be a TrustedRoot, as of read_root, not str"),
        (lambda: GpuRoots(NVIDIA.device, text), "rim: must be a TrustedRoot, as of read_root, not str"),
    ):
        with pytest.raises(TypeError, match=f"^{must}$"):
            _ = make()


def test_a_device_is_compared_only_while_its_certificates_are_valid() -> None:
    brief = GpuFault("brief", "a certificate that ends soon", brom=lambda one: attrs.evolve(one, not_after=NOW + 10))
    gpus = attrs.evolve(GPUS, faults=(brief,))
    device = authenticate(gpus.evidence(NONCE)[0], nonce=NONCE, now=NOW, roots=GPUS.roots)
    rims = Rims.of(verify_rim(data, now=NOW, roots=GPUS.roots) for data in GPUS.rims(NOW))
    assert compare(device, rims, now=NOW + 10).mismatches == ()
    with pytest.raises(steps.CertificateExpiredError, match="device's certificate"):
        _ = compare(device, rims, now=NOW + 11)


def test_a_root_is_a_self_signed_ca() -> None:
    keys = Keys(GPUS.seed)
    root = GpuCertificate(common_name="R", key="r", issuer="R", signer="r")
    assert read_root(root.der(keys)).name
    for wrong in (
        attrs.evolve(root, issuer="S"),
        attrs.evolve(root, signer="s"),
        attrs.evolve(root, ca=False),
        attrs.evolve(root, off_curve=True),
    ):
        with pytest.raises(GpuPolicyError, match="not the certificate of a root CA"):
            _ = read_root(wrong.der(keys))
    assert refused(GPUS, roots=NVIDIA, rims=Rims(), revocation=Revocation()).code == "untrusted_root"


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"gpus": 1}',
        "3",
        "[3]",
        "[" * 40,
        '[{"evidence": "", "certificate": 1}]',
        '[{"evidence": "*", "certificate": "", "arch": "HOPPER"}]',
        '[{"evidence": "", "certificate": "", "arch": 1}]',
        '{"gpus": [{}]}',
        '{"nvswitches": [{"attestation_report": {"py/b64": ""}, "attestation_cert_chain": [1]}]}',
        "[" + ",".join(['{"evidence": "", "certificate": ""}'] * 65) + "]",
    ],
)
def test_what_is_no_evidence_is_refused(text: str) -> None:
    with pytest.raises(EvidenceFormatError):
        _ = parse_evidence(text.encode())


def test_the_work_for_a_collection_is_bounded() -> None:
    """A chain is no longer than `verify_chain` takes, so that not each of its entries is decoded first."""

    def collection(count: int) -> bytes:
        chain = {"GpuAttestationCertificateChain": [{"pem": ""}] * count}
        entry = {"AttestationReport": {"py/b64": ""}, "CertificateChains": chain}
        return json.dumps({"gpus": [entry]}, separators=(",", ":")).encode()

    assert len(parse_evidence(collection(6))) == 1
    with pytest.raises(EvidenceFormatError, match="device 0: more than 6 certificates"):
        _ = parse_evidence(collection(7))

    def read() -> None:
        with pytest.raises(EvidenceFormatError):
            _ = parse_evidence(collection(80_000))

    assert work_of(read).calls < 3 * 80_000


def test_collections_of_other_tools_are_read() -> None:
    text = (
        '{"gpus": [{"AttestationReport": {"py/b64": "AQ=="}, "Arch": "HOPPER",'
        ' "CertificateChains": {"GpuAttestationCertificateChain": [{"pem": "YQ=="}, {"pem": "Yg=="}]}}],'
        ' "nvswitches": [{"attestation_report": {"py/b64": "Ag=="}, "attestation_cert_chain": [{"pem": "Yw=="}]}]}'
    )
    gpu, switch = parse_evidence(text.encode())
    assert (gpu.report, gpu.chain, gpu.arch) == (b"\1", b"ab", "HOPPER")
    assert (switch.report, switch.chain, switch.arch) == (b"\2", b"c", "LS10")
    (plain,) = parse_evidence(b'[{"evidence": "AQ==", "certificate": "YQ==", "nonce": "ff"}]')
    assert plain.arch is None


def test_a_chain_may_leave_the_root_out_and_is_not_too_long() -> None:
    (evidence,) = GPUS.evidence(NONCE)
    chain = evidence.chain.split(b"-----BEGIN CERTIFICATE-----")
    without = attrs.evolve(evidence, chain=b"-----BEGIN CERTIFICATE-----".join(chain[:-1]))
    assert authenticate(without, nonce=NONCE, now=NOW, roots=GPUS.roots).serial_number
    with pytest.raises(GpuVerificationError, match="too short or too long"):
        _ = verify_chain((), GPUS.roots.device, "no")
    leaf = GpuCertificate(
        common_name="GH100",
        key="d",
        issuer="Simulated Device Identity CA",
        signer="Simulated Device Identity CA",
        ca=False,
        usage=DIGITAL_SIGNATURE,
    )
    short = attrs.evolve(evidence, chain=pem((leaf.der(Keys(GPUS.seed)),)).encode())
    with pytest.raises(GpuVerificationError, match="key in the chip"):
        _ = authenticate(short, nonce=NONCE, now=NOW, roots=GPUS.roots)


@pytest.mark.parametrize("most", [0, 1])
def test_a_ca_has_no_more_cas_below_it_than_it_may(most: int) -> None:
    """The key in the chip is the one CA below this one."""

    def limited(ca: GpuCertificate) -> GpuCertificate:
        return attrs.evolve(ca, path_length=most) if ca.key == "Simulated GH100 ICA" else ca

    gpus = attrs.evolve(GPUS, faults=(GpuFault("limited", "a CA with a path length", ca=limited),))
    if most:
        assert verified(gpus, policy=UNCHECKED).devices
    else:
        assert refused(gpus, policy=UNCHECKED).code == "certificate_role"


def test_a_report_that_lacks_versions_has_no_rim() -> None:
    policy = GpuPolicy(min_driver="1.0", min_vbios={"GH100": "00.00.00.00.00"}, measurements="unchecked")
    for fault, code in (("driver_none", "driver_too_old"), ("vbios_none", "vbios_too_old")):
        assert refused(GPUS.having(fault)).code == "rim_missing"
        assert refused(GPUS.having(fault), policy=policy).code == code
    assert verified(GPUS.having("driver_word"), rims=Rims(), policy=UNCHECKED).devices[0].driver == "beta"
    assert refused(GPUS.having("driver_word"), policy=policy).code == "driver_too_old"
    assert refused(GPUS.having("leaf_no_name")).code == "chip"


def test_a_rim_is_used_in_its_time_only() -> None:
    later = NOW + 3 * 365 * 86400
    with pytest.raises(steps.CertificateExpiredError):
        _ = verify_rim(GPUS.rims(NOW)[0], now=later, roots=GPUS.roots)
    old = Rims.of(verify_rim(data, now=NOW, roots=GPUS.roots) for data in GPUS.rims(NOW))
    options: dict[str, Any] = {"now": later, "policy": GpuPolicy(revocation="off")}
    assert refused(GPUS, rims=old, **options).code == "certificate_expired"
    held = Revocation.of(GPUS.having("rim_signer_on_hold").status(later))
    assert refused(GPUS, rims=old, revocation=held, now=later).code == "certificate_expired"  # its status is no matter
    new = Rims.of(verify_rim(data, now=later, roots=GPUS.roots) for data in GPUS.rims(later))
    early = Revocation.of(GPUS.having("rim_signer_on_hold").status(NOW))
    assert refused(GPUS, rims=new).code == "certificate_not_yet_valid"
    assert refused(GPUS, rims=new, revocation=early).code == "certificate_not_yet_valid"
    both = Rims.of((*old.rims, *new.rims))
    assert verified(GPUS, rims=both, **options).devices[0].rims == tuple(rim.reference for rim in new.rims)
    assert str(new.rims[0]).startswith("RIM of GH100 600.10.01 (SHA-256 ")


def test_few_zeros_may_follow_a_report() -> None:
    report = GPUS.evidence(NONCE)[0].report
    assert parse_report(report + bytes(64)).signature == parse_report(report).signature
    with pytest.raises(EvidenceFormatError, match="bytes after the signature"):
        _ = parse_report(report + bytes(65))


def test_a_measurement_is_not_empty() -> None:
    empty = GpuFault("empty", "no value", report=lambda d: attrs.evolve(d, blocks=block(1, b""), count=1))
    with pytest.raises(EvidenceFormatError, match="empty"):
        _ = parse_report(attrs.evolve(GPUS, faults=(empty,)).evidence(NONCE)[0].report)


def test_a_report_tells_the_ports_beside_a_switch() -> None:
    *_, switch = MACHINE.evidence(NONCE)
    assert parse_report(switch.report).pdis == (bytes(8),)


def test_ocsp_answers_of_another_form_are_refused() -> None:
    honest = GPUS.status(NOW)[0]
    for part in ("2b0601050507300101", "06082a8648ce3d040303"):  # a basic answer; its signature's algorithm
        octets = bytes.fromhex(part)
        with pytest.raises(GpuVerificationError, match="step 18"):
            _ = Revocation.of([honest.replace(octets, flipped(octets), 1)])
    for fault in ("status_version", "status_no_responder", "status_extensions", "status_certificates"):
        with pytest.raises(GpuVerificationError, match="step 18"):
            _ = Revocation.of(GPUS.having(fault).status(NOW))
    (responder,) = ocsp.load_der_ocsp_response(honest).certificates
    at = honest.index(responder.public_bytes(Encoding.DER)) - 8  # two tags with lengths of three bytes are before it
    assert honest[at] == 0xA0
    with pytest.raises(GpuVerificationError, match=r"malformed certificates \[step 18"):
        _ = Revocation.of([honest[:at] + b"\xa1" + honest[at + 1 :]])
