"""A simulated TDX platform: the quotes and the collateral of a real one, under a root of its own.

    platform = SimulatedPlatform(bytes(32))
    quote = platform.quote(report_data)
    collateral = platform.collateral(now)
    wrong = platform.having("debug").quote(report_data)

Rules kept here:

* no clock and no entropy: the same seed, arguments and faults give the same bytes;
* the formats are complete, so that an independent verifier, given the root, accepts what an honest platform makes;
* nothing here is Intel's: to trust `SimulatedPlatform.root_der` is to trust everyone who knows the seed.
"""

from __future__ import annotations

import json
from hashlib import sha384
from typing import Final, TypeVar

from attrs import evolve, field, frozen

from chutes_proto.auth.der import octets
from chutes_proto.errors import LocalProtocolError
from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._measurements import Profile, Stage
from chutes_proto.quote._pck import Ca
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.testing._faults import FAULTS, Chain, Fault
from chutes_proto.testing._pki import (
    PCK_CERTIFICATE,
    PLATFORM_CA,
    PROCESSOR_CA,
    ROOT_CA,
    TCB_SIGNING,
    CertificateDraft,
    CrlDraft,
    Keys,
    SgxItems,
    enumerated,
    flipped,
    pem,
    sgx_configuration,
    sgx_tcb,
)
from chutes_proto.testing._quotes import Form, HeaderDraft, QeReportDraft, QuoteDraft, TdReportDraft
from chutes_proto.testing._statements import (
    PCE_SVN,
    SGX_COMPONENTS,
    SVN_LADDER,
    QeIdentity,
    Statement,
    TcbInfo,
    tee_tcb_svn,
)

T = TypeVar("T")

COLLATERAL_SECONDS: Final = 30 * 86400
"""How long collateral is valid, from the time at which it was made."""

_TCB_SIGNER: Final = "TCB signing"


def _measured(label: str) -> bytes:
    return sha384(f"simulated {label}".encode()).digest()


MRTD: Final = _measured("MRTD")
BOOT_RTMRS: Final = (_measured("RTMR0"), _measured("RTMR1"), _measured("RTMR2"), bytes(48))
RUNTIME_RTMRS: Final = (*BOOT_RTMRS[:3], _measured("RTMR3"))
PROFILE: Final = Profile(name="simulated", version="1", mrtd=MRTD, boot=BOOT_RTMRS, runtime=RUNTIME_RTMRS)
"""The image that all simulated TDs run."""


@frozen
class SimulatedPlatform:
    """One machine of a simulated world.

    ``seed``, at least 16 bytes, determines the world: its root, its CAs, its TCB signer. ``index`` distinguishes
    machines under one root: each has its own FMSPC, PPID, platform instance id, PCK and attestation key. All run the
    same image on the same parts. ``ca`` issues the PCK certificate, ``form`` is the format of the quotes. Raises
    `LocalProtocolError` for a seed that is too short.
    """

    seed: bytes = field(repr=False)
    index: int = field(default=0, kw_only=True)
    ca: Ca = field(default="platform", kw_only=True)
    form: Form = field(default="v4", kw_only=True)
    faults: tuple[Fault, ...] = field(default=(), kw_only=True)

    def __attrs_post_init__(self) -> None:
        if len(self.seed) < 16:
            raise LocalProtocolError(f"seed: {len(self.seed)} bytes; a simulated platform needs 16 or more")

    def having(self, *faults: str | Fault) -> SimulatedPlatform:
        """Return the same platform with these faults too.

        Raises `LocalProtocolError` for a name that is not in `FAULTS`.
        """
        named: list[Fault] = []
        for fault in faults:
            if isinstance(fault, str) and fault not in FAULTS:
                raise LocalProtocolError(f"unknown fault {fault!r}; choose one of: {', '.join(FAULTS)}")
            named.append(FAULTS[fault] if isinstance(fault, str) else fault)
        return evolve(self, faults=(*self.faults, *named))

    def another(self, index: int) -> SimulatedPlatform:
        """Return another machine under the same root."""
        return evolve(self, index=index)

    @property
    def root_der(self) -> bytes:
        """The root certificate in DER, which a verifier must trust explicitly."""
        return self._root().der(Keys(self.seed))

    @property
    def root(self) -> TrustedRoot:
        """`root_der` as a trusted root of the verifier."""
        return TrustedRoot.from_der(self.root_der)

    @property
    def profile(self) -> Profile:
        """The measurements of the image that an honest TD runs."""
        return PROFILE

    @property
    def fmspc(self) -> bytes:
        """6 bytes: the family, model, platform and custom SKU in its PCK certificate."""
        return self._draw("FMSPC", 6)

    @property
    def ppid(self) -> bytes:
        """16 bytes: the platform provisioning id in its PCK certificate."""
        return self._draw("PPID", 16)

    @property
    def platform_instance_id(self) -> bytes | None:
        """16 bytes; None under the processor CA, whose certificates have none."""
        return self._draw("platform instance id", 16) if self.ca == "platform" else None

    def quote(self, report_data: bytes, *, stage: Stage = "boot", padding: int = 0) -> bytes:
        """Return a quote over 64 bytes of report data.

        ``padding`` is the number of zero bytes after its end, which some hosts add. Raises `LocalProtocolError` for
        report data of another length.
        """
        if len(report_data) != 64:
            raise LocalProtocolError(f"report data: {len(report_data)} bytes; a quote binds 64 bytes")
        draft = self._faulty("quote", self._quote_draft(report_data, stage))
        parts = self._faulty("parts", draft.sign(self._keys))
        return self._faulty("raw", parts.encode() + bytes(padding))

    def collateral(self, now: int) -> Collateral:
        """Return the collateral for this platform, valid from ``now`` (unix seconds) for 30 days."""
        return Collateral.from_json(self.collateral_json(now))

    def collateral_json(self, now: int) -> bytes:
        """Return `collateral` as the JSON of a file."""
        root, tcb_signer = self._root(), self._tcb_signer()
        other_ca: Ca = "processor" if self.ca == "platform" else "platform"
        intermediate = self._intermediate(other_ca if any(fault.other_ca for fault in self.faults) else self.ca)
        until = now + COLLATERAL_SECONDS
        root_crl = CrlDraft(
            issuer=root.common_name, signer=root.key, this_update=now, next_update=until, own=intermediate.key
        )
        pck_crl = CrlDraft(
            issuer=intermediate.common_name,
            signer=intermediate.key,
            this_update=now,
            next_update=until,
            own=self._pck().key,
            revoked=("a PCK of another machine",),
        )
        tcb_info = TcbInfo(issued=now, next_update=until, fmspc=self.fmspc)
        qe_identity = QeIdentity(issued=now, next_update=until, mr_signer=self._qe_signer)
        tcb_chain = pem(self._faulty("tcb_chain", (tcb_signer.der(self._keys), root.der(self._keys))))
        members = {
            "pck_crl_issuer_chain": pem((intermediate.der(self._keys), root.der(self._keys))),
            "root_ca_crl": self._faulty("root_crl", root_crl).der(self._keys).hex(),
            "pck_crl": self._faulty("pck_crl", pck_crl).der(self._keys).hex(),
            "tcb_info_issuer_chain": tcb_chain,
            **self._signed("tcb_info", self._faulty("tcb_info", tcb_info)),
            "qe_identity_issuer_chain": tcb_chain,
            **self._signed("qe_identity", self._faulty("qe_identity", qe_identity)),
        }
        for fault in self.faults:
            if fault.chain_beside is not None:
                members["pck_certificate_chain"] = pem(self.another(self.index + fault.chain_beside).pck_chain())
            members = fault.collateral(members)
        return json.dumps(members, indent=1).encode()

    def _faulty(self, field: str, value: T) -> T:
        """Return ``value`` after the change that each fault has in ``field``."""
        for fault in self.faults:
            value = getattr(fault, field)(value)
        return value

    @property
    def _keys(self) -> Keys:
        return self._faulty("keys", Keys(self.seed))

    def _draw(self, label: str, size: int) -> bytes:
        return Keys(self.seed).draw(f"{label} {self.index}", size)

    @property
    def _qe_signer(self) -> bytes:
        return Keys(self.seed).draw("QE signer", 32)

    def _root(self) -> CertificateDraft:
        draft = CertificateDraft(common_name=ROOT_CA, key="root", issuer=ROOT_CA, signer="root", ca=True, path_length=1)
        return self._faulty("root", draft)

    def _intermediate(self, ca: Ca) -> CertificateDraft:
        draft = CertificateDraft(
            common_name=PLATFORM_CA if ca == "platform" else PROCESSOR_CA,
            key=f"{ca} CA",
            issuer=ROOT_CA,
            signer="root",
            ca=True,
            path_length=0,
        )
        return self._faulty("intermediate", draft)

    def _pck(self) -> CertificateDraft:
        intermediate = self._intermediate(self.ca)
        draft = CertificateDraft(
            common_name=PCK_CERTIFICATE,
            key=f"PCK {self.index}",
            issuer=intermediate.common_name,
            signer=intermediate.key,
            sgx=self._sgx(),
        )
        return self._faulty("pck", draft)

    def _tcb_signer(self) -> CertificateDraft:
        draft = CertificateDraft(common_name=TCB_SIGNING, key=_TCB_SIGNER, issuer=ROOT_CA, signer="root")
        return self._faulty("tcb_signer", draft)

    def _sgx(self) -> SgxItems:
        items = (
            (1, octets(self.ppid)),
            (2, sgx_tcb(SGX_COMPONENTS, PCE_SVN, bytes(SGX_COMPONENTS))),
            (3, octets(bytes(2))),
            (4, octets(self.fmspc)),
        )
        if self.platform_instance_id is None:
            return (*items, (5, enumerated(0)))
        dynamic_platform, cached_keys, smt = True, False, True
        return (
            *items,
            (5, enumerated(1)),
            (6, octets(self.platform_instance_id)),
            (7, sgx_configuration(dynamic_platform, cached_keys, smt)),
        )

    def pck_chain(self) -> Chain:
        """Return the certificates in its quotes, in DER: PCK, PCK CA, root."""
        drafts = self._pck(), self._intermediate(self.ca), self._root()
        return self._faulty("pck_chain", tuple(draft.der(self._keys) for draft in drafts))

    def _quote_draft(self, report_data: bytes, stage: Stage) -> QuoteDraft:
        attestation_key = f"attestation key {self.index}"
        mr_td, *rtmrs = PROFILE.registers(stage)
        return QuoteDraft(
            form=self.form,
            header=HeaderDraft(version=4 if self.form == "v4" else 5, user_data=self._draw("QE id", 16) + bytes(4)),
            body=TdReportDraft(
                tee_tcb_svn=tee_tcb_svn(),
                tee_tcb_svn_2=tee_tcb_svn(),
                mr_seam=_measured("TDX module"),
                mr_td=mr_td,
                rtmrs=tuple(rtmrs),
                report_data=report_data,
            ),
            qe_report=QeReportDraft(
                cpu_svn=bytes(SGX_COMPONENTS),
                mr_enclave=Keys(self.seed).draw("QE", 32),
                mr_signer=self._qe_signer,
                svn=SVN_LADDER["UpToDate"],
            ),
            signing_key=attestation_key,
            attestation_key=attestation_key,
            vouched_key=attestation_key,
            pck_key=f"PCK {self.index}",
            cert_data=pem(self.pck_chain()).encode() + b"\0",
        )

    def _signed(self, name: str, statement: Statement) -> dict[str, str]:
        text = statement.text()
        signature = self._keys.sign_raw(_TCB_SIGNER, text.encode())
        if statement.flip_signature:
            signature = flipped(signature)
        return {name: statement.alter(text), f"{name}_signature": signature.hex()}
