"""Verify that a report is genuine, of a genuine NVIDIA device, and compare it with reference values.

    device = authenticate(evidence, nonce=nonce, now=now)     the device made this report, just now
    rims = Rims(verify_rim(data, now=now) for data in files)  once for many reports
    comparison = compare(device, rims, now=now)               its measurements are NVIDIA's reference values

Rules kept here:

* each stage returns a value that only it can make, and takes the value of the one before;
* a device is identified by its certificate's serial number, and by that of the key burnt into it, which issued the
  certificate: firmware that is updated changes the first and not the second. A UUID is in no signature;
* the nonce is compared whole. Without one, evidence may be of any time, and of any machine's making.

A genuine report says that an honest device measured itself so. It does not say that the device is in this machine:
evidence may be relayed, until TDISP binds a device to a TD.
"""

from __future__ import annotations

from collections.abc import Iterable
from hmac import compare_digest
from typing import ClassVar, Final, cast

from attrs import frozen

from chutes_proto._proof import PROOF, Proven
from chutes_proto.gpu import _steps as steps
from chutes_proto.gpu._certificates import (
    CHAIN_STEPS,
    NVIDIA,
    TIME_STEPS,
    GpuRoots,
    VerifiedChain,
    check_times,
    read,
    read_chain,
    verify_chain,
)
from chutes_proto.gpu._chips import Arch, board_of, chip_of, driver_rim_id, vbios_rim_id
from chutes_proto.gpu._evidence import DeviceEvidence
from chutes_proto.gpu._findings import Mismatch, Source
from chutes_proto.gpu._measurements import check_nvdec, differences
from chutes_proto.gpu._report import NONCE_SIZE, Report, parse_report
from chutes_proto.gpu._rim import VerifiedRim
from chutes_proto.quote import _der as der
from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.quote._arguments import check_kind
from chutes_proto.quote._certificates import Certificate, common_name
from chutes_proto.quote._der import DerError
from chutes_proto.quote._ecdsa import P384
from chutes_proto.quote._terms import check_seconds

DEVICE: Final = "device's"

_COMPOSITE_ID: Final = bytes.fromhex("678105050401")
_TCB_INFO: Final = bytes.fromhex("67810505040101")
_FWIDS: Final = 0xA6
_SHA384_SIZE: Final = 48


@frozen(kw_only=True, eq=False)
class GenuineDevice(Proven):
    """A device of NVIDIA's that made ``report``.

    ``serial_number`` is that of its certificate, in upper case hex, which NVIDIA calls ueid; ``device_id`` that of the
    certificate above it, of the key burnt into the chip. ``board`` is project, project SKU and chip SKU. ``is_fresh``:
    the report is over the nonce that was given.
    """

    report: Report
    arch: Arch
    chip: str
    serial_number: str
    device_id: str
    board: str | None
    is_fresh: bool
    chain: VerifiedChain
    steps: tuple[int, ...]

    @property
    def driver_rim_id(self) -> str | None:
        """The id of the RIM of its driver; None for a switch, or if the report does not say the driver."""
        if self.arch == "LS10" or self.report.driver is None:
            return None
        return driver_rim_id(self.arch, self.chip, self.report.driver)

    @property
    def vbios_rim_id(self) -> str | None:
        """The id of the RIM of its VBIOS; None if the report does not say the VBIOS or the board."""
        if self.board is None or self.report.vbios is None:
            return None
        return vbios_rim_id(self.arch, self.board, self.report.vbios)


def authenticate(evidence: DeviceEvidence, *, nonce: bytes | None, now: int, roots: GpuRoots = NVIDIA) -> GenuineDevice:
    """Verify a device's chain and report (steps 0 to 12).

    ``nonce`` are the 32 bytes that the report must be over; pass None only where something else makes it fresh.
    ``now`` is in whole unix seconds. Raises `GpuVerificationError`; `TypeError` for arguments of another type.
    """
    check_seconds("now", now)
    check_nonce(nonce)
    check_kind("evidence", evidence, DeviceEvidence, "DeviceEvidence, as of parse_evidence")
    check_kind("roots", roots, GpuRoots, "GpuRoots")
    report = parse_report(evidence.report)  # 0
    chain = verify_chain(read_chain(evidence.chain, DEVICE), roots.device, DEVICE)  # 1-6
    if len(chain.certificates) < 2:  # 1
        raise steps.ChainFormError(DEVICE, "no certificate of the key in the chip is between device and root")
    check_times(chain.terms, now)  # 7, 8
    arch, chip = chip_of(_name(chain.leaf), report, evidence.arch)  # 9
    taken = [*CHAIN_STEPS, *TIME_STEPS, 9]
    if report.fwid is not None:
        _check_fwid(chain.leaf, report.fwid)  # 10
        taken.append(10)
    try:
        ecdsa.verify_raw(chain.leaf_key, report.signature, report.signed, P384)  # 11
    except ecdsa.InvalidSignature:
        raise steps.ReportSignatureError("report", "the device did not sign it") from None
    taken.append(11)
    if nonce is not None:
        if not compare_digest(report.nonce, nonce):  # 12
            raise steps.NonceMismatchError("report", "it is over another nonce", got=report.nonce, expected=nonce)
        taken.append(12)
    certificates = chain.certificates
    return GenuineDevice(
        report=report,
        arch=arch,
        chip=chip,
        serial_number=_hex(certificates[0].serial),
        device_id=_hex(certificates[1].serial),
        board=board_of(report, arch),
        is_fresh=nonce is not None,
        chain=chain,
        steps=(0, *taken),
        proof=PROOF,
    )


def check_nonce(nonce: object) -> None:
    """Check what reports must be over. Raises `TypeError`: of a part of a nonce, nothing would be fresh."""
    if nonce is not None and (type(nonce) is not bytes or len(nonce) != NONCE_SIZE):
        raise TypeError(f"nonce: must be {NONCE_SIZE} bytes, or None")


@frozen
class ClaimedLeaf:
    """A device certificate's name and serial number, which nothing has verified."""

    name: str
    serial_number: str


def read_leaf(chain: bytes) -> ClaimedLeaf:
    """Read the device certificate of a chain in PEM, without verifying it. Raises `GpuVerificationError`."""
    leaf = read(read_chain(chain, DEVICE)[0], f"{DEVICE} certificate")
    return ClaimedLeaf(_name(leaf), _hex(leaf.serial))


def _hex(serial: bytes) -> str:
    return serial.lstrip(b"\0").hex().upper()


def _name(leaf: Certificate) -> str:
    try:
        return common_name(leaf.subject).decode("ascii", "replace")
    except DerError as exc:
        raise steps.ChipError("device certificate", str(exc)) from None


def _check_fwid(leaf: Certificate, fwid: bytes) -> None:
    try:
        certified = _certified_fwid(leaf)
    except DerError as exc:
        raise steps.FwidMismatchError("device certificate", str(exc)) from None
    if certified != fwid:
        raise steps.FwidMismatchError("report", "its firmware is another one", got=fwid, expected=certified)


def _certified_fwid(leaf: Certificate) -> bytes:
    """The firmware's digest in a device's certificate: TCG's composite device id, or DICE TcbInfo's first FWID."""
    if (value := leaf.extensions.get(_TCB_INFO)) is not None:
        members = der.elements(value, *der.only(value, 0, len(value), der.SEQUENCE))
        lists = [member for member in members if member[0] == _FWIDS]
        if len(lists) != 1:
            raise DerError("not exactly one list of FWIDs")
        first, *_ = der.several(value, lists[0][2], lists[0][3], 1, 64)
        pair = first
    elif (value := leaf.extensions.get(_COMPOSITE_ID)) is not None:
        *_, pair = der.several(value, *der.only(value, 0, len(value), der.SEQUENCE), 3, 3)
    else:
        raise DerError("it has no FWID")
    if pair[0] != der.SEQUENCE:
        raise DerError("malformed FWID")
    _, digest = der.members(value, pair[2], pair[3], der.OBJECT_IDENTIFIER, der.OCTET_STRING)
    if len(der.content(value, digest)) != _SHA384_SIZE:
        raise DerError("the FWID is not a SHA-384 digest")
    return der.content(value, digest)


@frozen(eq=False)
class Rims:
    """RIMs to compare with; several may be of one version. Raises `TypeError` for anything but a `VerifiedRim`."""

    rims: tuple[VerifiedRim, ...] = ()

    def __attrs_post_init__(self) -> None:
        check_kind("rims", self.rims, tuple, "a tuple; Rims.of takes any iterable")
        for rim in cast("tuple[object, ...]", self.rims):
            check_kind("rims", rim, VerifiedRim, "VerifiedRim, as of verify_rim")

    @classmethod
    def of(cls, rims: Iterable[VerifiedRim]) -> Rims:
        """These RIMs, each content once."""
        given = cls(tuple(rims)).rims
        return cls(tuple({rim.digest: rim for rim in given}.values()))

    def find(
        self, device: GenuineDevice, version: str | None, name: str, rim_id: str | None
    ) -> tuple[VerifiedRim, ...]:
        """All that are of this version and for this device (steps 25 and 26)."""
        edition = "SWITCH" if device.arch == "LS10" else "GPU"
        versions = [rim for rim in self.rims if rim.version.upper() == (version or "").upper()]
        found = tuple(rim for rim in versions if (rim.product, rim.edition) == (device.chip, edition))
        if not found and versions:
            got, expected = f"{versions[0].product} ({versions[0].edition})", f"{device.chip} ({edition})"
            raise steps.RimProductError(f"RIM of the {name}", "it is for another chip", got=got, expected=expected)
        if not found:
            wanted = rim_id or f"of an unknown {name}"
            raise steps.RimMissingError(f"RIM of the {name}", "there is none", got="none", expected=wanted)
        return found

    def fitting(self, devices: Iterable[GenuineDevice]) -> tuple[VerifiedRim, ...]:
        """All that `find` may return for one of these devices."""
        wanted = {
            (device.chip, version.upper())
            for device in devices
            for version in (device.report.driver, device.report.vbios)
            if version is not None
        }
        return tuple(rim for rim in self.rims if (rim.product, rim.version.upper()) in wanted)


@frozen(kw_only=True, eq=False)
class Comparison(Proven):
    """The result of a comparison: the RIMs that were used, and all differences. It decides nothing."""

    rims: tuple[VerifiedRim, ...]
    mismatches: tuple[Mismatch, ...]
    compared: int
    steps: tuple[int, ...]
    _instead: ClassVar[str] = "measurements may differ; look at its mismatches, or call verify with a policy"


def compare(device: GenuineDevice, rims: Rims, *, now: int) -> Comparison:
    """Compare a device's measurements with the reference values for its driver and VBIOS (steps 7, 8 and 25 to 28).

    Of several RIMs for one version, all signed, the one with the fewest differences counts, so that an old machine is
    not refused because NVIDIA corrected a RIM; the comparison says which. Expired ones do not count beside valid ones.
    Raises `GpuVerificationError` for everything but differences, which the comparison has.
    """
    check_seconds("now", now)
    check_kind("device", device, GenuineDevice, "a GenuineDevice, as of authenticate")
    check_kind("rims", rims, Rims, "Rims")
    check_times(device.chain.terms, now)  # 7, 8: the device may have been verified earlier
    report = device.report
    wanted: list[tuple[Source, str | None, str, str | None]] = []
    if device.arch != "LS10":
        check_nvdec(report)  # 28
        wanted.append(("driver", report.driver, "driver", device.driver_rim_id))
    wanted.append(("vbios", report.vbios, "VBIOS", device.vbios_rim_id))
    chosen: list[VerifiedRim] = []
    found: list[Mismatch] = []
    for source, version, name, rim_id in wanted:
        candidates = rims.find(device, version, name, rim_id)  # 25, 26
        valid = [rim for rim in candidates if rim.window[0] <= now <= rim.window[1]]
        if not valid:
            check_times(candidates[0].chain.terms, now)  # 7, 8
        pairs = [(differences(report, rim.values, source), rim) for rim in valid]
        mismatches, rim = min(pairs, key=lambda pair: len(pair[0]))
        chosen.append(rim)
        found += mismatches
    if len(chosen) > 1 and (both := chosen[0].values.keys() & chosen[1].values.keys()):  # 27
        raise steps.RimConflictError("RIMs", "an index is in both", got=f"index {min(both)}")
    return Comparison(
        rims=tuple(chosen),
        mismatches=tuple(sorted(found, key=lambda one: one.index)),
        compared=sum(len(rim.values) for rim in chosen),
        steps=(25, 26, 27, 28),
        proof=PROOF,
    )
