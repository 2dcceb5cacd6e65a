"""Quotes and collateral that nobody here made decide as expected, or differ for a reason that stands in a table."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._errors import AppraisalError, VerificationError
from chutes_proto.quote._layout import TdReport10
from chutes_proto.quote._measurements import Profile
from tests.conftest import ROOT
from tests.quote.cases import ABSENT, DCAP_QVL_POLICY, DIFFERENCES, FOLDER, Case, cases, described

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=ABSENT)

ALL = cases("real", "real-mutated", "synthetic", "intel-sample")
PARSED = cases("real", "parse-only", "intel-sample")
DEBUG_ENCLAVES_OF_OLD_TCB_INFO = {
    "real/sgx-v3-00606a000000-ecd2fabd-20250619",
    "real/sgx-v3-00906ed50000-3346527d-20250611",
    "real/sgx-v3-00906ed50000-ad730280-20250611",
}
"""dcap-qvl stops at the TCB info; a verifier that reads it finds debug enclaves."""

CODES = {
    "attestation_key": {"attestation_key"},
    "cert_chain": {
        "chain_form",
        "certificate_format",
        "certificate_role",
        "certificate_issuer",
        "certificate_signature",
        "untrusted_root",
    },
    "cert_data_type": {"certification_type"},
    "crl_issuer": {"crl_issuer"},
    "crl_parse": {"crl_format"},
    "crl_signature": {"crl_signature"},
    "expired": {"certificate_expired", "collateral_expired"},
    # Collateral of another platform may also be of another time.
    "fmspc_mismatch": {"fmspc_mismatch", "certificate_not_yet_valid"},
    "intermediate_revoked": {"certificate_revoked"},
    "not_yet_valid": {"certificate_not_yet_valid", "collateral_not_yet_valid"},
    "parse": {"quote_structure", "quote_too_short", "quote_version", "quote_tee_type"},
    "pck_extension": {"pck_extension"},
    "pck_mismatch": {"pck_chain_mismatch"},
    "pck_revoked": {"pck_revoked"},
    "qe_debug": {"qe_debug"},
    "qe_identity_chain": {"chain_form", "untrusted_root"},
    "qe_identity_format": {"statement_format"},
    "qe_identity_mismatch": {"statement_kind", "qe_identity_mismatch"},
    "qe_identity_signature": {"statement_signature"},
    "qe_identity_version": {"statement_kind"},
    # Flipped bits may also hit a length.
    "qe_report_data": {"qe_report_data", "quote_structure"},
    # The chain beside the collateral is compared before any signature by it.
    "qe_report_signature": {"qe_report_signature", "pck_chain_mismatch"},
    "quote_signature": {"quote_signature", "quote_structure"},
    "root_revoked": {"certificate_revoked"},
    "tcb_info_chain": {"chain_form", "certificate_role", "untrusted_root"},
    "tcb_info_format": {"statement_format", "statement_kind"},
    "tcb_info_mismatch": {"collateral_tee", "statement_kind", "certificate_not_yet_valid"},
    "tcb_info_signature": {"statement_signature"},
    "tcb_info_version": {"statement_kind"},
    "tcb_not_supported": {"tcb_not_supported"},
    "tcb_revoked": {"tcb_revoked"},
    "tcb_signer_revoked": {"certificate_revoked"},
    "tcb_signing_cert": {"certificate_role", "chain_form"},
    "tdx_module_mismatch": {"tdx_module_mismatch", "statement_format"},
    "tee_body_mismatch": {"quote_structure", "quote_tee_type"},
    "unsupported_key_type": {"quote_key_type"},
    "unsupported_tee": {"quote_tee_type"},
    "unsupported_version": {"quote_version", "quote_tee_type"},
    "vendor_id": {"qe_vendor"},
}
"""Which of our codes a class of faults may come out as."""

WITH_POLICY = {"debug": {"debug"}, "service_td": {"service_td"}, "td_attributes": set[str]()}
"""Which codes a policy must give; TD attributes have many."""


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_verification_alone(case: Case) -> None:
    expected, status = DIFFERENCES[case.name][0] if case.name in DIFFERENCES else case.alone
    if expected == "error":
        with pytest.raises(VerificationError) as caught:
            _ = case.verify()
        assert case.hint not in CODES or caught.value.code in CODES[case.hint], str(caught.value)
        return
    verdict = case.verify()
    assert verdict.tcb_status == status
    if case.expected.get("advisory_ids") is not None:
        assert sorted(verdict.advisory_ids) == sorted(case.expected["advisory_ids"])
    if window := case.expected.get("valid_window"):
        assert verdict.window == tuple(int(datetime.fromisoformat(moment).timestamp()) for moment in window)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_with_the_choices_of_dcap_qvl(case: Case) -> None:
    expected, status = DIFFERENCES[case.name][0] if case.name in DIFFERENCES else case.strict
    if case.name in DEBUG_ENCLAVES_OF_OLD_TCB_INFO:
        expected = "error"
    if expected == "ok":
        verdict = case.verify()
        assert DCAP_QVL_POLICY.appraise(verdict, now=verdict.verified_at, stage="boot").tcb_status == status
    elif case.alone[0] == "ok" and case.name not in DIFFERENCES:
        verdict = case.verify()
        with pytest.raises(AppraisalError) as caught:
            _ = DCAP_QVL_POLICY.appraise(verdict, now=verdict.verified_at, stage="boot")
        assert {refusal.part for refusal in caught.value.refusals} == {"attributes"}
        assert WITH_POLICY.get(case.hint, {"debug"}) <= {refusal.code for refusal in caught.value.refusals}


def test_every_difference_is_one() -> None:
    by_name = {case.name: case for case in ALL}
    for name, (answer, reason) in DIFFERENCES.items():
        assert by_name[name].alone != answer
        assert reason


def test_every_difference_is_documented() -> None:
    page = (ROOT / "docs/explanation/choosing-a-verifier.md").read_text("utf-8")
    assert all(name.rpartition("/")[2] in page for name in DIFFERENCES)


def test_the_examples_in_the_reference_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real quote that a policy without profiles accepts, with a profile of its own measurements."""
    page = (ROOT / "docs/reference/verification.md").read_text("utf-8")
    case = next(case for case in cases("real") if case.strict == ("ok", "UpToDate") and "tdx-v4" in case.name)
    body = case.quote().body
    assert isinstance(body, TdReport10)
    profile = Profile(name="its own", version="1", mrtd=body.mr_td, boot=body.rtmrs, runtime=body.rtmrs)
    monkeypatch.chdir(tmp_path)
    _ = Path("policy.toml").write_text(profile.to_toml())
    _ = Path("collateral.json").write_bytes(case.collateral_bytes)
    names: dict[str, Any] = {
        "quote": case.quote_bytes,
        "quote_bytes": case.quote_bytes,
        "file_bytes": case.collateral_bytes,
        "now": case.now,
        "expected": body.report_data,
    }
    at_once, kept, staged, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for block, result in ((at_once, "verdict"), (kept, "verdict"), (staged, "accepted")):
        exec(block, names)
        assert (names[result].profile, names[result].tcb_status) == (profile, "UpToDate")


@pytest.mark.parametrize("case", [case for case in PARSED if "parsed" in case.expected], ids=lambda case: case.name)
def test_fields(case: Case) -> None:
    fields = described(case.quote())
    for part, expected in case.expected["parsed"].items():
        assert fields[part] == expected


@pytest.mark.parametrize("case", cases("real"), ids=lambda case: case.name)
def test_collateral_files_come_back(case: Case) -> None:
    collateral = Collateral.from_json(case.collateral_bytes)
    written = collateral.to_json()
    assert Collateral.from_json(written) == collateral
    original = json.loads(case.collateral_bytes)
    assert {name: text.lower() for name, text in json.loads(written).items()} == {
        name: text.lower() for name, text in original.items()
    }
