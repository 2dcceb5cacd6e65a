"""The supplemental data of Intel's Quote Verification Enclave, by its names, from a verdict.

Source: Intel SGX and TDX DCAP, ``sgx_qve_header.h`` (``sgx_ql_qv_supplemental_t``, version 3.5).
"""

from __future__ import annotations

from hashlib import sha384
from typing import Any

from chutes_proto.quote._layout import TEE_SGX, TEE_TDX


def supplemental(verdict: Any) -> dict[str, object]:  # a Verdict, whose module imports this one
    """Make the fields; times are unix seconds, byte strings bytes. ``root_key_id`` is of the point with its ``04``."""
    terms = (*verdict.signed.opened.chain.terms, *verdict.verified.terms)
    pck, issue = verdict.pck, verdict.collateral
    has_present = verdict.current_status is not None
    return {
        "earliest_issue_date": min(term.begin for term in terms),
        "latest_issue_date": max(term.begin for term in terms),
        "earliest_expiration_date": min(term.end for term in terms),
        "tcb_level_date_tag": verdict.platform.date,
        "pck_crl_num": issue.pck_crl_number,
        "root_ca_crl_num": issue.root_crl_number,
        "tcb_eval_ref_num": issue.evaluation_number,
        "root_key_id": sha384(b"\x04" + verdict.root.point).digest(),
        "pck_ppid": pck.ppid,
        "tcb_cpusvn": pck.cpu_svn,
        "tcb_pce_isvsvn": pck.pce_svn,
        "pce_id": pck.pce_id,
        "tee_type": TEE_TDX if verdict.quote.tee == "TDX" else TEE_SGX,
        "sgx_type": pck.sgx_type,
        "platform_instance_id": pck.platform_instance_id,
        "dynamic_platform": pck.dynamic_platform,
        "cached_keys": pck.cached_keys,
        "smt_enabled": pck.smt,
        "sa_list": verdict.advisory_ids,
        "tcb_status": verdict.tcb_status,
        "tcb_status_current": verdict.current_status if has_present else verdict.tcb_status,
        "sa_list_current": verdict.current_advisory_ids if has_present else verdict.advisory_ids,
    }
