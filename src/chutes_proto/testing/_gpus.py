"""The simulated GPUs of a machine: evidence, RIMs and OCSP answers of full shape, under roots of their own.

    gpus = SimulatedGpus(b"the world of my tests", count=8)
    evidence, rims, status = gpus.evidence_json(nonce), gpus.rims(now), gpus.status(now)
    wrong = gpus.having("measurement").evidence_json(nonce)

Rules kept here:

* no clock and no entropy: the same seed, arguments and faults give the same bytes;
* faults of one device are those of the first; the others are honest;
* nothing here is NVIDIA's: to trust `SimulatedGpus.roots` is to trust everyone who knows the seed.
"""

from __future__ import annotations

import json
from base64 import b64encode
from functools import reduce
from hashlib import sha384
from typing import Any, Final

from attrs import evolve, field, frozen

from chutes_proto.auth import der
from chutes_proto.errors import LocalProtocolError
from chutes_proto.gpu._certificates import GpuRoots, read_root
from chutes_proto.gpu._chips import Arch
from chutes_proto.gpu._evidence import DeviceEvidence
from chutes_proto.testing._gpu_drafts import (
    BEGIN,
    COMPOSITE_ID,
    DIGITAL_SIGNATURE,
    OCSP_SIGNING,
    TCB_INFO,
    GpuCertificate,
    ReportDraft,
    RimDraft,
    StatusDraft,
    composite_id,
    crl,
    tcb_info,
)
from chutes_proto.testing._gpu_faults import GPU_FAULTS, GpuFault
from chutes_proto.testing._pki import Keys, pem

_DEVICE_ROOT: Final = "Simulated Device Identity CA"
_RIM_ROOT: Final = "Simulated RIM signing Root CA"
_RIM_SIGNER: Final = "Simulated RIM Signer"

SIMULATED_SEED: Final = b"the simulated GPUs of every machine"
"""The seed of the GPUs that `gpu simulate`, `attest --gpu-tool simulated` and `serve --dev` know."""

RIM_SECONDS: Final = 2 * 365 * 86400
STATUS_SECONDS: Final = 86400


@frozen
class _Kind:
    """The facts that devices of an architecture have in common."""

    chip: str
    leaf: str
    measurements: int
    fields: dict[int, bytes]
    driver_values: tuple[int, ...]
    vbios: str


def _text(text: str) -> bytes:
    return text.encode() + b"\0"


DRIVER: Final = "600.10.01"
_KINDS: Final[dict[Arch, _Kind]] = {
    "HOPPER": _Kind(
        "GH100",
        "GH100 A01 GSP FMC LF",
        64,
        {
            3: _text(DRIVER),
            6: bytes.fromhex("00ff009601000000"),
            11: b"\x55",
            15: _text("895"),
            17: _text("G520"),
            18: _text("0280"),
            21: b"\x55",
            34: b"\1\0",
            36: b"\0\0",
        },
        tuple(range(5, 26)),
        "96.00.FF.00.01",
    ),
    "BLACKWELL": _Kind(
        "GB100",
        "GB100 A01 GSP FMC LF",
        64,
        {
            3: _text(DRIVER),
            6: bytes.fromhex("00ff009701000000"),
            11: b"\xaa",
            15: _text("886"),
            17: _text("G525"),
            18: _text("0220"),
            34: b"\1\0",
            35: _text("GB100"),
            36: b"\1\0",
        },
        tuple(range(5, 26)),
        "97.00.FF.00.01",
    ),
    "LS10": _Kind("LS10", "LS_10 A01 FSP FMC LF", 31, {6: b"96.10.FF.00.01", 22: bytes(8)}, (), "96.10.FF.00.01"),
}
_VBIOS_VALUES: Final = (*range(26, 36), 40, 52)


@frozen
class SimulatedGpus:
    """The GPUs (or switches) of one simulated machine.

    ``seed``, at least 16 bytes, determines the world: its roots, CAs and RIM signer. ``count`` devices of ``arch``;
    ``index`` is the number of the first of them, so that machines have devices of their own. ``switches`` LS10 come
    after them. Raises `LocalProtocolError` for a seed that is too short.
    """

    seed: bytes = field(repr=False)
    count: int = field(default=1, kw_only=True)
    arch: Arch = field(default="HOPPER", kw_only=True)
    index: int = field(default=0, kw_only=True)
    switches: int = field(default=0, kw_only=True)
    faults: tuple[GpuFault, ...] = field(default=(), kw_only=True)

    def __attrs_post_init__(self) -> None:
        if len(self.seed) < 16:
            raise LocalProtocolError(f"seed: {len(self.seed)} bytes; simulated GPUs need 16 or more")

    def having(self, *faults: str) -> SimulatedGpus:
        """Return the same machine with these faults too. Raises `LocalProtocolError` for an unknown name."""
        for fault in faults:
            if fault not in GPU_FAULTS:
                raise LocalProtocolError(f"unknown fault {fault!r}; choose one of: {', '.join(GPU_FAULTS)}")
        return evolve(self, faults=(*self.faults, *(GPU_FAULTS[fault] for fault in faults)))

    def another(self, index: int) -> SimulatedGpus:
        """Return a machine under the same roots whose devices are numbered from ``index``."""
        return evolve(self, index=index)

    @property
    def roots(self) -> GpuRoots:
        """The roots, which a verifier must trust explicitly."""
        return GpuRoots(read_root(self.root_der), read_root(self.rim_root_der))

    @property
    def root_der(self) -> bytes:
        """The root certificate of devices in DER."""
        return _root(_DEVICE_ROOT).der(Keys(self.seed))

    @property
    def rim_root_der(self) -> bytes:
        """The root certificate of RIM signers in DER."""
        return _root(_RIM_ROOT).der(Keys(self.seed))

    @property
    def models(self) -> tuple[str, ...]:
        """The key of the GPU table for each GPU; Blackwell's is not known."""
        return ("h200",) * self.count if self.arch == "HOPPER" else ()

    def evidence(self, nonce: bytes) -> tuple[DeviceEvidence, ...]:
        """Make the evidence of every device over ``nonce`` (32 bytes)."""
        found: list[DeviceEvidence] = []
        for number in range(self.count + self.switches):
            arch: Arch = self.arch if number < self.count else "LS10"
            faults = self.faults if number == 0 else ()
            report, chain = self._device(nonce, arch, self.index + number, faults)
            found.append(DeviceEvidence(report, chain, arch))
        return tuple(self._changed("devices", tuple(found)))

    def evidence_json(self, nonce: bytes) -> bytes:
        """The same, in the JSON that a host's tool writes."""
        entries = [
            {
                "certificate": b64encode(one.chain).decode(),
                "evidence": b64encode(one.report).decode(),
                "arch": one.arch,
                "nonce": nonce.hex(),
            }
            for one in self.evidence(nonce)
        ]
        return json.dumps(entries).encode()

    def rims(self, now: int) -> tuple[bytes, ...]:
        """Make the RIMs for all devices, signed at ``now`` (unix seconds)."""
        keys = Keys(self.seed)
        chain = tuple(draft.der(keys) for draft in self._rim_chain(now))
        drafts: list[RimDraft] = []
        for arch in dict.fromkeys((self.arch, *(("LS10",) if self.switches else ()))):
            kind = _KINDS[arch]
            values = _measured(kind)
            edition, signer = ("SWITCH" if arch == "LS10" else "GPU"), _RIM_SIGNER
            vbios_values = range(31) if arch == "LS10" else _VBIOS_VALUES
            for version, indexes, change in (
                (DRIVER, kind.driver_values, "driver_rim"),
                (kind.vbios, vbios_values, "vbios_rim"),
            ):
                if indexes:
                    golden = {index: (bytes(47) + b"\1", values[index + 1]) for index in indexes}
                    draft = RimDraft(product=kind.chip, version=version, edition=edition, values=golden, signer=signer)
                    drafts.append(self._changed(change, draft))
        made = tuple(draft.encode(keys, chain) for draft in drafts)
        return tuple(self._changed("rims", made))

    def status(self, now: int) -> tuple[bytes, ...]:
        """Make the OCSP answers about every certificate between devices, or RIMs, and their roots, at ``now``."""
        keys = Keys(self.seed)
        chains = [self._chain(self.arch, self.index + number) for number in range(self.count)]
        chains += [self._chain("LS10", self.index + self.count + number) for number in range(self.switches)]
        about: dict[str, GpuCertificate] = {one.key: one for chain in chains for one in chain[1:-1]}
        about |= {one.key: one for one in self._rim_chain(now)[:-1]}
        answers: dict[str, bytes] = {}
        for key, certificate in about.items():
            responder = GpuCertificate(
                common_name=f"Simulated OCSP Responder of {certificate.issuer}",
                key=f"responder of {certificate.signer}",
                issuer=certificate.issuer,
                signer=certificate.signer,
                ca=False,
                usage=DIGITAL_SIGNATURE,
                extensions={"2.5.29.37": der.sequence(der.oid(OCSP_SIGNING))},
            )
            draft = StatusDraft(
                serial=keys.serial(key),
                issuer=certificate.issuer,
                issuer_key=certificate.signer,
                this_update=now,
                next_update=now + STATUS_SECONDS,
                responder=responder,
            )
            for fault in self.faults:
                if key.startswith(fault.about):
                    draft = fault.status(draft)
            answers[key] = draft.encode(keys)
        return tuple(self._changed("answers", answers).values())

    def crls(self, now: int, *revoked: str) -> tuple[bytes, ...]:
        """Make the CRL of each issuer of CAs of devices; ``revoked`` are the labels of CAs that they name."""
        keys = Keys(self.seed)
        _, _, ica, identity, _ = self._chain(self.arch, self.index)
        return tuple(
            crl(keys, one.issuer, one.signer, tuple(keys.serial(one.key) for _ in range(one.key in revoked)), now)
            for one in (ica, identity)
        )

    # --- the parts ---

    def _changed(self, what: str, value: Any) -> Any:
        return reduce(lambda found, fault: getattr(fault, what)(found), self.faults, value)

    def _device(self, nonce: bytes, arch: Arch, index: int, faults: tuple[GpuFault, ...]) -> tuple[bytes, bytes]:
        keys = Keys(self.seed)
        honest = self._chain(arch, index)
        leaf, brom, *above = honest
        kind = _KINDS[arch]
        report = ReportDraft(nonce=nonce, measurements=_measured(kind), fields={**kind.fields, 20: _fwid(kind)})
        for fault in faults:
            leaf, brom, report = fault.leaf(leaf), fault.brom(brom), fault.report(report)
            above = [*map(fault.ca, above[:-1]), above[-1]]
        ders = tuple(one.der(keys) for one in (leaf, brom, *above))
        raw = report.encode(keys, leaf.key)
        for fault in faults:
            ders, raw = fault.chain(ders), fault.raw(raw)
        text = pem(ders).encode()
        return raw, reduce(lambda found, fault: fault.pem(found), faults, text)

    def _chain(self, arch: Arch, index: int) -> tuple[GpuCertificate, ...]:
        kind = _KINDS[arch]
        keys = Keys(self.seed)
        family = kind.leaf.partition(" ")[0]
        leaf_key, brom_key = f"device {index}", f"BROM {index}"
        identity, ica, brom = f"Simulated {family} Identity", f"Simulated {family} ICA", f"{family} BROM {index}"
        if arch == "BLACKWELL":
            extension = {TCB_INFO: tcb_info(_fwid(kind))}
        else:
            extension = {COMPOSITE_ID: composite_id(keys, leaf_key, _fwid(kind))}
        return (
            GpuCertificate(
                common_name=kind.leaf,
                key=leaf_key,
                issuer=brom,
                signer=brom_key,
                ca=False,
                usage=DIGITAL_SIGNATURE,
                extensions=extension,
            ),
            GpuCertificate(common_name=brom, key=brom_key, issuer=ica, signer=ica),
            GpuCertificate(common_name=ica, key=ica, issuer=identity, signer=identity),
            GpuCertificate(common_name=identity, key=identity, issuer=_DEVICE_ROOT, signer=_DEVICE_ROOT),
            _root(_DEVICE_ROOT),
        )

    def _rim_chain(self, now: int) -> tuple[GpuCertificate, ...]:
        ca = "Simulated Reference Value CA"
        signer = GpuCertificate(
            common_name=_RIM_SIGNER,
            key=_RIM_SIGNER,
            issuer=ca,
            signer=ca,
            ca=False,
            usage=DIGITAL_SIGNATURE,
            not_before=max(BEGIN, now - 86400),
            not_after=now + RIM_SECONDS,
        )
        signer = self._changed("rim_signer", signer)
        return (
            signer,
            GpuCertificate(common_name=ca, key=ca, issuer=_RIM_ROOT, signer=_RIM_ROOT, path_length=0),
            _root(_RIM_ROOT),
        )


def _root(common_name: str) -> GpuCertificate:
    return GpuCertificate(common_name=common_name, key=common_name, issuer=common_name, signer=common_name)


def _measured(kind: _Kind) -> dict[int, bytes]:
    return {
        index: sha384(f"simulated {kind.chip} measurement {index}".encode()).digest()
        for index in range(1, kind.measurements + 1)
    }


def _fwid(kind: _Kind) -> bytes:
    return sha384(f"simulated {kind.chip} firmware".encode()).digest()


def gpu_files(gpus: SimulatedGpus, nonce: bytes, now: int) -> dict[str, bytes]:
    """The files of a machine's evidence, and of everything to verify it with, by name."""
    rims = {f"rims/{number}.xml": data for number, data in enumerate(gpus.rims(now))}
    status = {f"status/{number}.der": data for number, data in enumerate(gpus.status(now))}
    return {
        "evidence.json": gpus.evidence_json(nonce),
        "nonce.txt": nonce.hex().encode(),
        **rims,
        **status,
        "device-root.der": gpus.root_der,
        "rim-root.der": gpus.rim_root_der,
    }
