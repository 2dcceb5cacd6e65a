"""The steps of verification, held against the simulated platform: each fault is refused by the check it is for."""

from __future__ import annotations

import re

import pytest

from chutes_proto.quote import _steps
from chutes_proto.quote._attested import CertificateEvidenceError
from chutes_proto.quote._errors import AppraisalError, QuoteFormatError, VerificationError
from chutes_proto.quote._policy import Policy
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._verify import verify_genuine
from chutes_proto.testing._faults import FAULTS
from tests.conftest import ROOT as PROJECT
from tests.quote.simulated import NOW, PLATFORM, PROFILE, REPORT_DATA, ROOT, collateral_of, verdict_of
from tools.docs import generate

Step = type[VerificationError]
STEPS: list[Step] = [
    kind for kind in vars(_steps).values() if type(kind) is type and kind.__base__ is VerificationError
]

REFUSED = {
    "qe_vendor": "vendor_id",
    "certification_type": "cert_type",
    "chain_form": "chain_garbage chain_extra",
    "certificate_format": "pck_sha384 pck_curve pck_critical_extension",
    "certificate_role": (
        "chain_order chain_missing_intermediate intermediate_common_name intermediate_not_ca pck_common_name "
        "pck_is_ca tcb_signer_common_name tcb_signer_is_ca pck_crl_chain"
    ),
    "untrusted_root": "other_root tcb_chain_order",
    "certificate_issuer": "intermediate_issuer pck_issuer pck_signed_by_root tcb_signer_issuer",
    "certificate_signature": "intermediate_signature pck_signature tcb_signer_signature",
    "certificate_not_yet_valid": "intermediate_not_yet_valid pck_not_yet_valid tcb_signer_not_yet_valid",
    "certificate_expired": "root_expired intermediate_expired pck_expired tcb_signer_expired",
    "pck_extension": (
        "sgx_extension_missing sgx_extension_trailing sgx_extension_deep sgx_ppid_missing sgx_tcb_missing "
        "sgx_pce_id_missing sgx_fmspc_missing sgx_type_missing sgx_component_missing sgx_fmspc_duplicate "
        "sgx_fmspc_length sgx_fmspc_type sgx_order sgx_cpu_svn"
    ),
    "crl_format": "root_crl_no_number root_crl_no_aki pck_crl_no_number pck_crl_no_aki pck_crl_trailing",
    "crl_issuer": "root_crl_issuer pck_crl_issuer crls_swapped",
    "crl_signature": "root_crl_signature pck_crl_signature",
    "certificate_revoked": "intermediate_revoked tcb_signer_revoked root_revoked",
    "statement_signature": (
        "tcb_info_signature tcb_info_altered tcb_info_whitespace qe_identity_signature qe_identity_altered"
    ),
    "statement_format": (
        "tcb_info_garbage tcb_info_duplicate_key tcb_info_date tcb_info_sgx_components_short "
        "tcb_info_tdx_components_short tcb_info_svn_range tcb_info_svn_negative tcb_info_svn_float "
        "tcb_info_status_unknown tcb_info_status_relaunch tcb_info_duplicate_levels tcb_info_no_levels "
        "tcb_info_no_evaluation_number qe_identity_garbage qe_identity_duplicate_key qe_identity_no_levels"
    ),
    "statement_kind": "tcb_info_id tcb_info_version tcb_info_tcb_type qe_identity_id qe_identity_version",
    "collateral_not_yet_valid": "root_crl_future pck_crl_future tcb_info_future qe_identity_future",
    "collateral_expired": "root_crl_expired pck_crl_expired tcb_info_expired qe_identity_expired",
    "collateral_tee": "collateral_of_sgx",
    "collateral_ca": "collateral_of_other_ca",
    "fmspc_mismatch": "tcb_info_fmspc",
    "pce_id_mismatch": "tcb_info_pce_id",
    "pck_chain_mismatch": "pck_chain_other",
    "pck_revoked": "pck_revoked",
    "qe_report_signature": "qe_report_signature qe_report_altered",
    "qe_report_data": "qe_report_data qe_report_data_tail qe_auth_altered attestation_key_substituted",
    "attestation_key": "attestation_key_invalid",
    "qe_debug": "qe_debug",
    "qe_identity_mismatch": "qe_mrsigner qe_prod_id qe_misc_select qe_attributes",
    "quote_signature": "quote_signature body_altered header_altered attestation_key",
    "tdx_module_mismatch": "seam_attributes module_mrsigner module_unknown module_identities_missing",
    "tcb_not_supported": "qe_not_supported module_not_supported tcb_not_supported current_tcb_not_supported",
    "tcb_revoked": "qe_revoked module_revoked tcb_revoked current_tcb_revoked",
    "report_data_mismatch": "report_data_nonce report_data_key",
}
"""By the code of the step that refuses them."""
STEP_OF = {step.code: step for step in STEPS}
BY_FAULT = {fault: STEP_OF[code] for code, faults in REFUSED.items() for fault in faults.split()}
WITHOUT_FAULT = {"root_mismatch"}
"""Only a caller can make it fail."""

FORMAT = {
    "truncated_body": "quote_too_short",
    "truncated_auth": "quote_structure",
    "version": "quote_version",
    "tee_type": "quote_tee_type",
    "key_type": "quote_key_type",
    "body_type": "quote_structure",
    "body_size": "quote_structure",
    "auth_length_huge": "quote_structure",
    "outer_length_huge": "quote_structure",
    "qe_auth_length_huge": "quote_structure",
    "cert_length_huge": "quote_structure",
    "auth_trailing": "quote_structure",
    "inner_trailing": "quote_structure",
    "outer_type": "quote_structure",
}
STATUS = {
    "qe_outdated": "OutOfDate",
    "module_outdated": "OutOfDate",
    "tcb_sw_hardening_needed": "SWHardeningNeeded",
    "tcb_configuration_needed": "ConfigurationNeeded",
    "tcb_configuration_and_sw_hardening_needed": "ConfigurationAndSWHardeningNeeded",
    "tcb_out_of_date": "OutOfDate",
    "tcb_out_of_date_configuration_needed": "OutOfDateConfigurationNeeded",
    "relaunch_advised": "TDRelaunchAdvised",
    "relaunch_advised_configuration_needed": "TDRelaunchAdvisedConfigurationNeeded",
}
AT_PRESENT = {"current_tcb_out_of_date": "OutOfDate"}
ATTRIBUTES = {
    "debug": "debug",
    "profiling": "profiling",
    "reserved_tud": "td_attributes_reserved",
    "reserved_sec": "td_attributes_reserved",
    "reserved_other": "td_attributes_reserved",
    "sept_ve_disable_clear": "sept_ve_disable",
    "migratable": "migratable",
    "servtd_ext": "servtd_ext",
    "service_td": "service_td",
    "xfam": "xfam",
}
MEASUREMENTS = {"mrtd": "MRTD", "rtmr0": "RTMR0", "rtmr1": "RTMR1", "rtmr2": "RTMR2", "rtmr3": "RTMR3"}


def test_the_steps_are_in_order() -> None:
    """From the form of the bytes to the policy."""
    steps: list[Step] = [QuoteFormatError, *STEPS, AppraisalError, CertificateEvidenceError]
    assert [step.step for step in steps] == list(range(len(steps)))
    assert set(VerificationError.__subclasses__()) == set(steps)
    assert len({step.code for step in STEPS}) == len({step.rule for step in steps}) - 3 == len(STEPS)


def test_the_reference_lists_the_steps() -> None:
    rows = [f"| {step.step} | `{step.code}` | {step.rule} |" for step in STEPS]
    page = generate.filled((PROJECT / "docs" / "reference" / "verification.md").read_text("utf-8"))
    assert re.findall(r"^\| \d+ \| `\w+` \| .*$", page, re.MULTILINE) == rows


def test_every_fault_has_one_place() -> None:
    placed = [*BY_FAULT, *FORMAT, *STATUS, *AT_PRESENT, *ATTRIBUTES, *MEASUREMENTS]
    assert sorted(placed) == sorted(FAULTS)
    assert set(STEP_OF) - set(REFUSED) == WITHOUT_FAULT


@pytest.mark.parametrize("fault", sorted(BY_FAULT))
def test_a_fault_is_refused_by_its_step(fault: str) -> None:
    platform = PLATFORM.having(fault)
    root = TrustedRoot.from_der(platform.root_der) if fault == "root_expired" else ROOT
    with pytest.raises(VerificationError) as caught:
        _ = verify_genuine(
            platform.quote(REPORT_DATA), collateral_of(platform), now=NOW, report_data=REPORT_DATA, root=root
        )
    assert type(caught.value) is BY_FAULT[fault], str(caught.value)
    assert f"step {caught.value.step}" in str(caught.value)


@pytest.mark.parametrize(("fault", "code"), FORMAT.items())
def test_a_fault_of_the_form_does_not_parse(fault: str, code: str) -> None:
    with pytest.raises(QuoteFormatError) as caught:
        _ = verdict_of(PLATFORM, fault)
    assert caught.value.code == code


@pytest.mark.parametrize(("fault", "status"), STATUS.items())
def test_a_status_is_graded_and_left_to_the_policy(fault: str, status: str) -> None:
    verdict = verdict_of(PLATFORM, fault)
    assert verdict.tcb_status == status
    _assert_refused(verdict_of(PLATFORM, fault), [("tcb", "tcb_status", None)])


@pytest.mark.parametrize(("fault", "status"), AT_PRESENT.items())
def test_a_status_at_present_is_left_to_the_policy(fault: str, status: str) -> None:
    verdict = verdict_of(PLATFORM, fault)
    assert (verdict.tcb_status, verdict.current_status) == ("UpToDate", status)
    _assert_refused(verdict, [("tcb", "current_tcb_status", None)])


@pytest.mark.parametrize(("fault", "code"), ATTRIBUTES.items())
def test_attributes_are_left_to_the_policy(fault: str, code: str) -> None:
    _assert_refused(verdict_of(PLATFORM, fault), [("attributes", code, None)])


@pytest.mark.parametrize(("fault", "register"), MEASUREMENTS.items())
def test_measurements_are_left_to_the_policy(fault: str, register: str) -> None:
    _assert_refused(verdict_of(PLATFORM, fault), [("measurement", "measurement_mismatch", register)])


def _assert_refused(verdict: object, expected: list[tuple[str, str, str | None]]) -> None:
    with pytest.raises(AppraisalError) as caught:
        _ = Policy(profiles=(PROFILE,)).appraise(verdict, now=NOW, stage="boot")  # type: ignore[arg-type]
    assert [(refusal.part, refusal.code, refusal.register) for refusal in caught.value.refusals] == expected
