"""The test vectors as cases, and how what we decide may differ from what they expect."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from attrs import frozen

from chutes_proto.quote._attributes import AttributePolicy
from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._layout import Quote, SgxReport, TdReport15, TdReport15Ex, parse_quote
from chutes_proto.quote._policy import Policy, TcbPolicy
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
from chutes_proto.quote._statements import TcbStatus
from chutes_proto.quote._verify import Verdict, verify_genuine
from tests.conftest import ROOT

FOLDER = ROOT.parent / "shared" / "vectors"
ABSENT = f"no test vectors: {FOLDER} is not there"

DCAP_QVL_POLICY = Policy(
    tcb=TcbPolicy(accepted_statuses=frozenset(TcbStatus) - {TcbStatus.REVOKED}),
    attributes=AttributePolicy(attributes_allowed=(1 << 64) - 1, xfam_required=0, xfam_allowed=(1 << 64) - 1),
    measurements="unchecked",
)
"""Decisions of dcap-qvl besides verification: no debugging, migration or service TD, SEPT_VE_DISABLE; any XFAM."""

POLICY_HINTS = frozenset({"debug", "td_attributes", "service_td"})
"""Refusals of dcap-qvl's that are a policy's here: verification alone answers as Intel's does (``relaxed``)."""

Answer = tuple[str, str | None]
REFUSED: Answer = ("error", None)

DIFFERENCES: dict[str, tuple[Answer, str]] = {
    "synthetic/chain-no-root": (
        ("ok", "UpToDate"),
        "the root is pinned by its key; a chain may leave its certificate out",
    ),
    "synthetic/pckext-components-lower-than-cpusvn": (
        REFUSED,
        "for TCB type 0, the only one that is read, Intel copies the CPUSVN into the components: so they must be equal",
    ),
    "synthetic/crl-chain-garbage": (
        REFUSED,
        "collateral is verified before a quote is seen, so the PCK CRL needs its issuer's chain, as in Intel's QvE",
    ),
    "synthetic/qeid-status-OutOfDateConfigurationNeeded": (
        REFUSED,
        "to ignore it is to trust an outdated enclave; Intel's library counted it as out of date, and now refuses it",
    ),
    "intel-sample/intelqvl-sample-sgx": (
        REFUSED,
        "its certification data is a PPID (type 1): only a PCK chain in the quote (type 5) is verified here",
    ),
}
"""Cases that we decide otherwise on purpose, in verification alone and with a policy, and why. TCB info of version 2,
which dcap-qvl cannot read, does not count as a difference: Intel's answer (``relaxed``) is ours."""


@frozen
class Case:
    name: str
    expected: dict[str, Any]

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def hint(self) -> str:
        hint: str | None = self.expected.get("error_class_hint")
        return hint or ""

    @property
    def strict(self) -> Answer:
        """The result of dcap-qvl's choices, but for TCB info of version 2."""
        source = self.expected["relaxed"] if self.hint == "tcb_info_v2" else self.expected
        return source["outcome"], source["tcb_status"]

    @property
    def alone(self) -> Answer:
        """The answer of verification without a policy."""
        if self.hint in POLICY_HINTS:
            return self.expected["relaxed"]["outcome"], self.expected["relaxed"]["tcb_status"]
        return self.strict

    @property
    def now(self) -> int:
        return int((self.folder / "now.txt").read_text())

    @property
    def root(self) -> TrustedRoot:
        file = self.folder / "root.der"
        return TrustedRoot.from_der(file.read_bytes()) if file.exists() else INTEL_ROOT

    @property
    def quote_bytes(self) -> bytes:
        return (self.folder / "quote.bin").read_bytes()

    @property
    def collateral_bytes(self) -> bytes:
        return (self.folder / "collateral.json").read_bytes()

    def quote(self) -> Quote:
        return parse_quote(self.quote_bytes, sgx=True)

    def verify(self) -> Verdict:
        collateral = Collateral.from_json(self.collateral_bytes)
        return verify_genuine(self.quote_bytes, collateral, now=self.now, report_data=None, root=self.root, sgx=True)


@cache
def cases(*folders: str) -> list[Case]:
    """All cases of some folders; none where there are no vectors."""
    found = [entry for folder in folders for entry in sorted((FOLDER / folder).glob("*/expected.json"))]
    return [Case(str(file.parent.relative_to(FOLDER)), json.loads(file.read_text())) for file in found]


def described(quote: Quote) -> dict[str, dict[str, Any]]:
    """A quote in the vectors' words: integers of the header as numbers, all else in hex of its bytes."""
    header, body = quote.header, quote.body
    head = {
        "version": header.version,
        "att_key_type": header.key_type,
        "tee_type": header.tee_type,
        "qe_svn": header.qe_svn,
        "pce_svn": header.pce_svn,
        "qe_vendor_id": header.qe_vendor_id.hex(),
        "user_data": header.user_data.hex(),
    }
    if header.version == 5:
        size = len(quote.signed) - 54
        head |= {"body_type": {584: 2, 648: 3, 885: 4}[size], "body_size": size}
    inner = 384 + 64 + 2 + len(quote.qe_auth) + 6 + len(quote.certification)
    signature = {
        "auth_data_len": 128 + inner + (6 if header.version != 3 else 0),
        "isv_signature": quote.signature.hex(),
        "attestation_key": quote.attestation_key.hex(),
        "qe_report": _enclave(quote.qe_report),
        "qe_report_signature": quote.qe_report_signature.hex(),
        "qe_auth_data": quote.qe_auth.hex(),
        "cert_type": quote.certification_type,
        "cert_len": len(quote.certification),
        "trailing_bytes": quote.trailing,
    }
    if header.version != 3:
        signature |= {"outer_cert_type": 6, "outer_cert_len": inner}
    return {"header": head, "report": _report(body), "signature": signature}


def _report(body: Any) -> dict[str, str]:
    if isinstance(body, SgxReport):
        return _enclave(body)
    names = "tee_tcb_svn mr_seam mr_signer_seam mr_td mr_config_id mr_owner mr_owner_config report_data"
    report = {name: getattr(body, name).hex() for name in names.split()}
    report |= {
        name: getattr(body, name).to_bytes(8, "little").hex() for name in ("seam_attributes", "td_attributes", "xfam")
    }
    report |= {f"rtmr{index}": rtmr.hex() for index, rtmr in enumerate(body.rtmrs)}
    if isinstance(body, TdReport15):
        report |= {"tee_tcb_svn2": body.tee_tcb_svn_2.hex(), "mr_service_td": body.mr_service_td.hex()}
    if isinstance(body, TdReport15Ex):
        report |= {
            "vmid": f"{body.vm_id:02x}",
            "td_id": body.td_id.hex(),
            "dev_info": body.dev_info.hex(),
            "init_service_td_hash": body.init_servtd_hash.hex(),
            "init_service_td_attributes": body.init_servtd_attributes.to_bytes(8, "little").hex(),
            "init_cpu_svn": body.init_cpu_svn.hex(),
            "init_tee_tcb_svn": body.init_tee_tcb_svn.hex(),
            "init_tee_fmspc": body.init_tee_fmspc.hex(),
            "cur_service_td_hash": body.current_servtd_hash.hex(),
            "cur_service_td_attributes": body.current_servtd_attributes.to_bytes(8, "little").hex(),
        }
    return report


def _enclave(report: SgxReport) -> dict[str, str]:
    return {
        "cpu_svn": report.cpu_svn.hex(),
        "misc_select": report.misc_select.hex(),
        "reserved1": report.reserved_1.hex(),
        "attributes": report.attributes.hex(),
        "mr_enclave": report.mr_enclave.hex(),
        "reserved2": report.reserved_2.hex(),
        "mr_signer": report.mr_signer.hex(),
        "reserved3": report.reserved_3.hex(),
        "isv_prod_id": report.isv_prod_id.to_bytes(2, "little").hex(),
        "isv_svn": report.isv_svn.to_bytes(2, "little").hex(),
        "reserved4": report.reserved_4.hex(),
        "report_data": report.report_data.hex(),
    }
