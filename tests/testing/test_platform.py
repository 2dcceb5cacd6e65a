"""The simulated platform, checked by independent libraries: dcap-qvl and pyca/cryptography.

``tests/quote/test_steps.py`` has the answer of this project's own verifier to each fault.
"""

from __future__ import annotations

import datetime
import json

import dcap_qvl
import pytest
from cryptography import x509

from chutes_proto.errors import LocalProtocolError
from chutes_proto.quote._measurements import Stage
from chutes_proto.quote._pck import Ca
from chutes_proto.quote._policy import Policy
from chutes_proto.quote._verify import verify_genuine
from chutes_proto.testing._faults import FAULTS, Fault
from chutes_proto.testing._platform import (
    BOOT_RTMRS,
    COLLATERAL_SECONDS,
    MRTD,
    PROFILE,
    RUNTIME_RTMRS,
    SimulatedPlatform,
)
from chutes_proto.testing._quotes import Form

NOW = 1_780_000_000
REPORT_DATA = bytes(range(64))
HONEST = SimulatedPlatform(bytes(range(32)))
STAGES: tuple[Stage, Stage] = ("boot", "runtime")

ACCEPTED_BY_DCAP_QVL = {
    # It reads on where a length leaves bytes over, and does not look at the outer type.
    "auth_trailing": "UpToDate",
    "inner_trailing": "UpToDate",
    "outer_type": "UpToDate",
    "qe_report_data_tail": "UpToDate",
    # Left to the caller's appraisal.
    "xfam": "UpToDate",
    "mrtd": "UpToDate",
    "rtmr0": "UpToDate",
    "rtmr1": "UpToDate",
    "rtmr2": "UpToDate",
    "rtmr3": "UpToDate",
    "report_data_nonce": "UpToDate",
    "report_data_key": "UpToDate",
    # Statuses that it grades and leaves to the caller.
    "qe_outdated": "OutOfDate",
    "module_outdated": "OutOfDate",
    "tcb_sw_hardening_needed": "SWHardeningNeeded",
    "tcb_configuration_needed": "ConfigurationNeeded",
    "tcb_configuration_and_sw_hardening_needed": "ConfigurationAndSWHardeningNeeded",
    "tcb_out_of_date": "OutOfDate",
    "tcb_out_of_date_configuration_needed": "OutOfDateConfigurationNeeded",
    "relaunch_advised": "TDRelaunchAdvised",
    "relaunch_advised_configuration_needed": "TDRelaunchAdvisedConfigurationNeeded",
    "current_tcb_out_of_date": "UpToDate",  # as here: the policy looks at the TCB at present
    # Certificates have no roles for it, the root no end, chains no fixed length.
    "chain_extra": "UpToDate",
    "root_expired": "UpToDate",
    "intermediate_common_name": "UpToDate",
    "pck_signed_by_root": "UpToDate",
    "pck_common_name": "UpToDate",
    "tcb_signer_common_name": "UpToDate",
    # It matches on the CPUSVN, finds items wherever they are, and takes the first of two.
    "sgx_extension_trailing": "UpToDate",
    "sgx_component_missing": "UpToDate",
    "sgx_order": "UpToDate",
    "sgx_cpu_svn": "UpToDate",
    # CRLs: beginning, number and key identifier unread, and the PCK CRL's own chain.
    "root_crl_future": "UpToDate",
    "root_crl_no_number": "UpToDate",
    "root_crl_no_aki": "UpToDate",
    "pck_crl_future": "UpToDate",
    "pck_crl_no_number": "UpToDate",
    "pck_crl_no_aki": "UpToDate",
    "pck_crl_chain": "UpToDate",
    # TCB info and QE identity: members that it does not compare.
    "tcb_info_version": "UpToDate",
    "tcb_info_tcb_type": "UpToDate",
    "tcb_info_pce_id": "UpToDate",
    "tcb_info_duplicate_levels": "UpToDate",
    "qe_identity_version": "UpToDate",
}
"""The faults that dcap-qvl 0.7 accepts, with its status. It refuses every other fault."""


def ask_dcap_qvl(
    platform: SimulatedPlatform, *, root: SimulatedPlatform = HONEST, now: int = NOW, padding: int = 0
) -> str:
    """Return the TCB status of dcap-qvl. Raises ValueError if it refuses."""
    collateral = dcap_qvl.QuoteCollateralV3.from_json(platform.collateral_json(NOW).decode())
    quote = platform.quote(REPORT_DATA, padding=padding)
    return str(dcap_qvl.verify_with_root_ca(quote, collateral, root.root_der, now).status)


@pytest.mark.parametrize("ca", ["platform", "processor"])
@pytest.mark.parametrize("form", ["v4", "v5-td10", "v5-td15", "v5-td15ex"])
def test_an_independent_verifier_accepts_every_form(form: Form, ca: Ca) -> None:
    platform = SimulatedPlatform(bytes(32), form=form, ca=ca)
    assert ask_dcap_qvl(platform, root=platform) == "UpToDate"
    assert ask_dcap_qvl(platform, root=platform, padding=70) == "UpToDate"


@pytest.mark.parametrize("ca", ["platform", "processor"])
@pytest.mark.parametrize("form", ["v4", "v5-td10", "v5-td15", "v5-td15ex"])
def test_this_verifier_accepts_every_form_and_names_the_machine(form: Form, ca: Ca) -> None:
    machine = SimulatedPlatform(HONEST.seed, index=3, form=form, ca=ca)
    for stage in STAGES:
        quote = machine.quote(REPORT_DATA, stage=stage)
        verdict = verify_genuine(quote, machine.collateral(NOW), now=NOW, report_data=REPORT_DATA, root=HONEST.root)
        assert Policy(profiles=(PROFILE,)).appraise(verdict, now=NOW, stage=stage).profile == PROFILE
        pck = verdict.pck
        assert (pck.ca, pck.fmspc, pck.ppid) == (ca, machine.fmspc, machine.ppid)
        assert pck.platform_instance_id == machine.platform_instance_id


def test_only_a_verifier_that_trusts_the_simulated_root_accepts() -> None:
    collateral = dcap_qvl.QuoteCollateralV3.from_json(HONEST.collateral_json(NOW).decode())
    with pytest.raises(ValueError, match=r"."):
        dcap_qvl.verify(HONEST.quote(REPORT_DATA), collateral, NOW)
    with pytest.raises(ValueError, match=r"."):
        ask_dcap_qvl(HONEST, root=SimulatedPlatform(bytes(32)))


@pytest.mark.parametrize("name", FAULTS)
def test_an_independent_verifier_answers_every_fault_as_known(name: str) -> None:
    try:
        status = ask_dcap_qvl(HONEST.having(name))
    except ValueError:
        status = None
    assert status == ACCEPTED_BY_DCAP_QVL.get(name)


def test_the_known_answers_are_about_faults_that_exist() -> None:
    assert ACCEPTED_BY_DCAP_QVL.keys() <= FAULTS.keys()


@pytest.mark.parametrize("fault", FAULTS.values(), ids=lambda fault: fault.name)
def test_a_fault_travels_where_its_side_says(fault: Fault) -> None:
    wrong = HONEST.having(fault)
    quote_differs = wrong.quote(REPORT_DATA) != HONEST.quote(REPORT_DATA)
    collateral_differs = wrong.collateral_json(NOW) != HONEST.collateral_json(NOW)
    if fault.side == "certificates":
        assert quote_differs
    else:
        assert (quote_differs, collateral_differs) == (fault.side == "quote", fault.side == "collateral")


def test_faults_combine_and_callers_may_make_them() -> None:
    late = Fault(name="late", side="quote", what="cut to nothing", raw=lambda _: b"")
    both = HONEST.having("debug").having("mrtd", late)
    assert [fault.name for fault in both.faults] == ["debug", "mrtd", "late"]
    assert both.quote(REPORT_DATA) == b""
    honest, wrong = HONEST.quote(REPORT_DATA), HONEST.having("debug", "mrtd").quote(REPORT_DATA)
    assert honest[:632] != wrong[:632]
    assert {at for at in range(632) if honest[at] != wrong[at]} == {48 + 120} | {
        at for at in range(48 + 136, 48 + 184) if honest[at] != wrong[at]
    }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_world() -> None:
    again, other = SimulatedPlatform(HONEST.seed), SimulatedPlatform(bytes(32))
    assert again.quote(REPORT_DATA) == HONEST.quote(REPORT_DATA)
    assert again.collateral_json(NOW) == HONEST.collateral_json(NOW)
    assert other.root_der != HONEST.root_der
    assert other.fmspc != HONEST.fmspc


def test_the_seed_is_not_shown() -> None:
    assert HONEST.seed.hex() not in repr(HONEST)
    assert repr(HONEST.seed) not in repr(HONEST)


def test_two_machines_share_a_root_and_nothing_that_names_a_machine() -> None:
    other = HONEST.another(1)
    assert other.root_der == HONEST.root_der
    assert other.fmspc != HONEST.fmspc
    assert other.ppid != HONEST.ppid
    assert other.platform_instance_id != HONEST.platform_instance_id
    assert other.pck_chain()[0] != HONEST.pck_chain()[0]
    assert other.pck_chain()[1:] == HONEST.pck_chain()[1:]
    assert ask_dcap_qvl(other) == "UpToDate"
    collateral = dcap_qvl.QuoteCollateralV3.from_json(HONEST.collateral_json(NOW).decode())
    with pytest.raises(ValueError, match="Fmspc mismatch"):
        dcap_qvl.verify_with_root_ca(other.quote(REPORT_DATA), collateral, HONEST.root_der, NOW)


def test_collateral_expires_and_is_made_again_under_the_same_root() -> None:
    end = NOW + COLLATERAL_SECONDS
    assert ask_dcap_qvl(HONEST, now=end - 1) == "UpToDate"
    with pytest.raises(ValueError, match=r"[Ee]xpired"):
        ask_dcap_qvl(HONEST, now=end)
    with pytest.raises(ValueError, match="future"):
        ask_dcap_qvl(HONEST, now=NOW - 1)
    anew = dcap_qvl.QuoteCollateralV3.from_json(HONEST.collateral_json(end).decode())
    report = dcap_qvl.verify_with_root_ca(HONEST.quote(REPORT_DATA), anew, HONEST.root_der, end)
    assert report.status == "UpToDate"


@pytest.mark.parametrize(("stage", "rtmrs"), [("boot", BOOT_RTMRS), ("runtime", RUNTIME_RTMRS)])
def test_an_independent_parser_finds_the_measurements_of_the_stage(stage: Stage, rtmrs: tuple[bytes, ...]) -> None:
    quote = HONEST.quote(REPORT_DATA, stage=stage)
    report = dcap_qvl.parse_quote(quote).report
    assert (report.rt_mr0, report.rt_mr1, report.rt_mr2, report.rt_mr3) == rtmrs
    assert (report.mr_td, report.report_data) == (MRTD, REPORT_DATA)
    assert len({MRTD, *rtmrs}) == 5


def test_an_independent_parser_finds_the_identity_of_the_machine() -> None:
    for ca in ("platform", "processor"):
        machine = SimulatedPlatform(HONEST.seed, ca="platform" if ca == "platform" else "processor")
        quote = dcap_qvl.parse_quote(machine.quote(REPORT_DATA))
        extension = quote.pck_extension()
        assert quote.ca() == ca
        assert (extension.ppid, extension.fmspc) == (machine.ppid, machine.fmspc)
        assert extension.platform_instance_id == machine.platform_instance_id


def test_an_independent_x509_library_accepts_the_certificates() -> None:
    root = x509.load_der_x509_certificate(HONEST.root_der)
    root.verify_directly_issued_by(root)
    leaf, intermediate, embedded_root = map(x509.load_der_x509_certificate, HONEST.pck_chain())
    assert embedded_root == root
    leaf.verify_directly_issued_by(intermediate)
    intermediate.verify_directly_issued_by(root)
    members = json.loads(HONEST.collateral_json(NOW))
    signer, _ = x509.load_pem_x509_certificates(members["tcb_info_issuer_chain"].encode())
    signer.verify_directly_issued_by(root)
    for certificate, ca in ((root, True), (intermediate, True), (leaf, False), (signer, False)):
        extensions = certificate.extensions
        assert extensions.get_extension_for_class(x509.BasicConstraints).value.ca is ca
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (ca, ca, not ca)
        identifier = extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        assert identifier == x509.SubjectKeyIdentifier.from_public_key(certificate.public_key())
        assert certificate.not_valid_before_utc.year == 2018
        assert certificate.not_valid_after_utc.year == 2049
        organization = certificate.subject.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME)
        assert [attribute.value for attribute in organization] == ["Simulated Platform"]


@pytest.mark.parametrize(("member", "signer"), [("root_ca_crl", 2), ("pck_crl", 1)])
def test_an_independent_x509_library_accepts_the_crls(member: str, signer: int) -> None:
    crl = x509.load_der_x509_crl(bytes.fromhex(json.loads(HONEST.collateral_json(NOW))[member]))
    issuer = x509.load_der_x509_certificate(HONEST.pck_chain()[signer])
    assert crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # a P-256 key
    assert crl.issuer == issuer.subject
    assert crl.last_update_utc == datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 1
    leaf = x509.load_der_x509_certificate(HONEST.pck_chain()[0])
    assert crl.get_revoked_certificate_by_serial_number(leaf.serial_number) is None
    revoked = json.loads(HONEST.having("pck_revoked").collateral_json(NOW))["pck_crl"]
    entry = x509.load_der_x509_crl(bytes.fromhex(revoked)).get_revoked_certificate_by_serial_number(leaf.serial_number)
    assert entry is not None


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_has_sixty_four_bytes(size: int) -> None:
    with pytest.raises(LocalProtocolError, match="64 bytes"):
        _ = HONEST.quote(bytes(size))


def test_a_fault_that_is_not_in_the_table_is_an_error_that_lists_the_table() -> None:
    with pytest.raises(LocalProtocolError, match=r"debugg.*service_td"):
        _ = HONEST.having("debugg")


def test_a_short_seed_is_an_error() -> None:
    with pytest.raises(LocalProtocolError, match="seed"):
        _ = SimulatedPlatform(bytes(15))
