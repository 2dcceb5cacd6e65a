"""Policies: a caller's demands on GPUs; and `verify`, which returns only evidence that one accepts.

    accepted = verify(evidence, nonce=nonce, now=now, rims=rims, revocation=revocation, policy=GpuPolicy(), count=8)

Rules kept here:

* a policy is checked when it is made; the defaults compare with RIMs and demand OCSP answers for every certificate;
* what a policy leaves unchecked is said by the result, device by device;
* `AcceptedEvidence` is made by `verify` only. A refusal has a report on every device, with every difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from attrs import evolve, field, frozen

from chutes_proto._proof import PROOF, NoTruthValue, Proven
from chutes_proto.gpu import _steps as steps
from chutes_proto.gpu._certificates import NVIDIA, GpuRoots
from chutes_proto.gpu._chips import Arch, is_chip, model_of
from chutes_proto.gpu._errors import GpuError, GpuPolicyError, GpuVerificationError
from chutes_proto.gpu._evidence import DeviceEvidence, parse_evidence
from chutes_proto.gpu._findings import GpuRefusal, Mismatch
from chutes_proto.gpu._measurements import differences, told_beside
from chutes_proto.gpu._revocation import Revocation, check_chain_status, check_floor
from chutes_proto.gpu._rim import RimReference, VerifiedRim
from chutes_proto.gpu._verify import DEVICE, GenuineDevice, Rims, authenticate, check_nonce, compare
from chutes_proto.quote._arguments import check_kind
from chutes_proto.quote._terms import check_seconds

Mode: TypeAlias = Literal["SPT", "MPT", "PPCIE"]
Reference: TypeAlias = Literal["rims", "pinned", "unchecked"]
RevocationDemand: TypeAlias = Literal["require", "grace", "off"]

_DRIVER: Final = re.compile(r"[0-9]{1,5}(\.[0-9]{1,5}){1,3}")
_VBIOS: Final = re.compile(r"[0-9A-F]{2}(\.[0-9A-F]{2}){4}")
_WORD: Final = re.compile(r"[!-~]{1,64}")


@frozen(kw_only=True)
class PinnedMeasurements:
    """Measurements that the operator observed, for a driver and VBIOS that NVIDIA has no RIM for.

    ``values`` are by the RIM's index. They show that a device is as the observed one was, and not that this is good.
    Raises `GpuPolicyError` for values that mean nothing.
    """

    chip: str
    driver: str
    vbios: str
    values: Mapping[int, bytes] = field(repr=False)

    def __attrs_post_init__(self) -> None:
        for name in ("chip", "driver", "vbios"):
            if not isinstance(getattr(self, name), str) or not _WORD.fullmatch(getattr(self, name)):
                raise GpuPolicyError(f"{name}: must be a word")
        values = cast("Mapping[object, object]", self.values)
        if not values or not all(
            type(index) is int and 0 <= index <= 254 and isinstance(value, bytes) and value
            for index, value in values.items()
        ):
            raise GpuPolicyError("values: must be measurements by their index, from 0")


@frozen(kw_only=True)
class GpuPolicy:
    """A caller's demands on GPUs. Raises `GpuPolicyError` for fields that contradict each other.

    ``min_driver`` is the oldest driver, ``min_vbios`` the oldest VBIOS by chip (like ``GH100``, in capitals): one that
    it lacks has no minimum. ``modes`` and ``models`` are all that are accepted, None for any; ``boards`` names models
    that are not known here, by project, project SKU and chip SKU. ``measurements`` "unchecked" compares none.
    ``revocation`` "require" demands a valid OCSP answer for each certificate, "grace" one that ended at most
    ``revocation_grace`` seconds ago, "off" none; a revocation that is known refuses in each case.
    ``allow_rim_signer_on_hold`` accepts RIMs whose signer's certificate is on hold.
    """

    min_driver: str | None = None
    min_vbios: Mapping[str, str] = field(factory=dict[str, str])
    modes: frozenset[Mode] | None = None
    models: frozenset[str] | None = None
    boards: Mapping[str, str] = field(factory=dict[str, str])
    measurements: Literal["rims", "unchecked"] = "rims"
    revocation: RevocationDemand = "require"
    revocation_grace: int = 0
    allow_rim_signer_on_hold: bool = False
    pinned: tuple[PinnedMeasurements, ...] = ()

    def __attrs_post_init__(self) -> None:
        for problem in self._problems():
            raise GpuPolicyError(problem)

    def _problems(self) -> Iterator[str]:
        if self.min_driver is not None and not _matches(_DRIVER, self.min_driver):
            yield 'min_driver: must be a version like "570.124.06"'
        for name in ("min_vbios", "boards"):
            if not isinstance(getattr(self, name), Mapping):
                yield f"{name}: must be a table, in code a dict"
        for chip, vbios in self.min_vbios.items():
            if not is_chip(chip):  # it would be the minimum of no device
                yield f"min_vbios: {str(chip)[:64]!r} names no chip; write it like GH100, GB100 or LS10"
            if not _matches(_VBIOS, vbios):
                yield 'min_vbios: must be versions like "96.00.9F.00.01", by chip'
        if self.modes is not None and not (self.modes and {*self.modes} <= {*get_args(Mode)}):
            yield f"modes: must be some of {', '.join(get_args(Mode))}"
        models = cast("Any", self.models)
        is_text = isinstance(models, str)  # in which any part would be found
        if models is not None and (is_text or not models or not all(_matches(_WORD, one) for one in models)):
            yield "models: must be keys of the GPU table"
        if not all(_matches(_WORD, board) and _matches(_WORD, model) for board, model in self.boards.items()):
            yield "boards: must be keys of the GPU table, by project, project SKU and chip SKU"
        if self.measurements not in ("rims", "unchecked"):
            yield 'measurements: must be "rims" or "unchecked"'
        if self.revocation not in get_args(RevocationDemand):
            yield 'revocation: must be "require", "grace" or "off"'
        if type(self.revocation_grace) is not int or self.revocation_grace < 0:
            yield "revocation_grace: must be a whole number of seconds that is not negative"
        elif (self.revocation == "grace") != (self.revocation_grace > 0):
            yield 'revocation_grace: goes with revocation = "grace", and that with some seconds'
        if type(self.allow_rim_signer_on_hold) is not bool:
            yield "allow_rim_signer_on_hold: must be true or false"
        if type(self.pinned) is not tuple or not all(
            isinstance(one, PinnedMeasurements) for one in cast("tuple[object, ...]", self.pinned)
        ):
            yield "pinned: must be a tuple of PinnedMeasurements"

    def model(self, device: GenuineDevice) -> str | None:
        """The key of the GPU table for a device, or None for a board that is not known."""
        return model_of(device.board, self.boards)

    def refusals(self, device: GenuineDevice) -> list[GpuRefusal]:
        """List every reason to refuse a genuine device, but for its measurements and revocation."""
        report = device.report
        found: list[GpuRefusal] = []

        def refuse(code: str, detail: str, got: object, expected: object) -> None:
            found.append(GpuRefusal(code, detail, str(got), str(expected)))

        if device.arch != "LS10":
            if self.min_driver is not None and _numbers(report.driver, 10) < _numbers(self.min_driver, 10):
                refuse("driver_too_old", "the driver is too old", report.driver, f"at least {self.min_driver}")
            if self.modes is not None and report.mode not in self.modes:
                refuse("mode", "the mode is not accepted", report.mode, " or ".join(sorted(self.modes)))
            model = self.model(device)
            if self.models is not None and model not in self.models:
                got = model or f"the unknown board {device.board}"
                refuse("model", "the model is not accepted", got, " or ".join(sorted(self.models)))
        least = self.min_vbios.get(device.chip)
        if least is not None and _numbers(report.vbios, 16) < _numbers(least, 16):
            refuse("vbios_too_old", "the VBIOS is too old", report.vbios, f"at least {least}")
        return found

    def pinned_for(self, device: GenuineDevice) -> PinnedMeasurements | None:
        """The pinned measurements for a device's chip, driver and VBIOS."""
        of = (device.chip, device.report.driver, device.report.vbios)
        return next((one for one in self.pinned if (one.chip, one.driver, one.vbios) == of), None)


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _numbers(version: str | None, base: int) -> list[int]:
    """A version for comparison; one that cannot be read is older than any."""
    try:
        return [int(part, base) for part in (version or "").split(".")]
    except ValueError:
        return []


@frozen(kw_only=True)
class DeviceReport(NoTruthValue):
    """The findings about one device, accepted or not. Members are None where verification did not come so far.

    ``steps`` are the numbers of the steps that it passed, ``reference`` says what its measurements were compared with,
    ``rims`` the RIMs, ``revocation_checked`` whether OCSP answers were demanded; ``mismatches`` are all measurements
    that differ; ``error`` is why it is refused.
    """

    serial_number: str | None = None
    device_id: str | None = None
    arch: Arch | None = None
    chip: str | None = None
    driver: str | None = None
    vbios: str | None = None
    mode: str | None = None
    board: str | None = None
    model: str | None = None
    steps: tuple[int, ...] = ()
    is_fresh: bool = False
    reference: Reference = "unchecked"
    compared: int = 0
    rims: tuple[RimReference, ...] = ()
    revocation_checked: bool = False
    mismatches: tuple[Mismatch, ...] = ()
    error: GpuError | None = None


class EvidenceRefusedError(GpuError):
    """The evidence of a machine is refused.

    ``devices`` has a report on every device; ``error`` is the first reason, of a device or of the whole.
    """

    def __init__(self, error: GpuError, devices: Sequence[DeviceReport]) -> None:
        super().__init__(str(error))
        self.error = error
        self.code: str = error.code
        self.devices: tuple[DeviceReport, ...] = tuple(devices)

    def __str__(self) -> str:
        own = [device for device in self.devices if device.error is self.error]
        which = f"device {self.devices.index(own[0])}: " if own else ""
        return f"{which}{self.error}"


@frozen(kw_only=True, eq=False)
class AcceptedEvidence(Proven):
    """The evidence of a machine that a policy accepts: every device in it, GPUs and switches.

    It does not say that the devices are in the machine that handed it over; see ``docs/explanation/gpus.md``.
    """

    devices: tuple[DeviceReport, ...]
    nonce: bytes | None
    verified_at: int

    @property
    def gpus(self) -> tuple[DeviceReport, ...]:
        """The GPUs, without switches."""
        return tuple(device for device in self.devices if device.arch != "LS10")


def verify(
    data: bytes | Sequence[DeviceEvidence],
    *,
    nonce: bytes | None,
    now: int,
    rims: Rims,
    revocation: Revocation,
    policy: GpuPolicy,
    count: int | None = None,
    roots: GpuRoots = NVIDIA,
) -> AcceptedEvidence:
    """Verify the evidence of a machine's GPUs, and return it only if the policy accepts every device (steps 0 to 32).

    ``data`` is what the host's tool wrote, or the devices' evidence already read. ``nonce`` are the 32 bytes that every
    report must be over; pass None only where something else makes the evidence fresh. ``now`` is in whole unix seconds.
    ``count`` is how many GPUs there must be; None for any number but 0. Pass the number that you rely on: a machine's
    software chooses what it hands over. Evidence of switches alone is accepted for a ``count`` of 0 only.

    Raises `EvidenceRefusedError` with a report on every device; `EvidenceFormatError` for bytes that are no evidence;
    `TypeError` for arguments of another type, `ValueError` for a negative count.
    """
    check_kind("rims", rims, Rims, "Rims")
    check_kind("revocation", revocation, Revocation, "Revocation")
    check_kind("policy", policy, GpuPolicy, "GpuPolicy")
    check_count(count)
    opened = open_evidence(data, nonce=nonce, now=now, roots=roots)
    return accept(opened, nonce=nonce, now=now, rims=rims, revocation=revocation, policy=policy, counts=(count,))


def check_count(count: object) -> None:
    """Check a number of GPUs. Raises `TypeError`, and `ValueError` for fewer than none."""
    if count is None:
        return
    if type(count) is not int:
        raise TypeError(f"count: must be an int, or None, not {count!r}")
    if count < 0:
        raise ValueError(f"count: must not be negative, not {count}")


def check_evidence(name: str, value: object) -> None:
    """Check that it is evidence, read or not. Raises `TypeError`."""
    if not isinstance(value, bytes) and not _are_devices(value):
        raise TypeError(f"{name}: must be bytes, or a sequence of DeviceEvidence")


def _are_devices(value: object) -> bool:
    is_list = isinstance(value, Sequence)
    return is_list and all(isinstance(one, DeviceEvidence) for one in cast("Sequence[object]", value))


Opened: TypeAlias = Sequence[GenuineDevice | GpuVerificationError]
"""Devices in the evidence's order; in place of those that are not genuine, the reason."""


def open_evidence(
    data: bytes | Sequence[DeviceEvidence], *, nonce: bytes | None, now: int, roots: GpuRoots = NVIDIA
) -> Opened:
    """The first half of `verify`, for callers that then fetch what these devices are verified with (steps 0 to 12)."""
    check_seconds("now", now)
    check_nonce(nonce)
    check_kind("roots", roots, GpuRoots, "GpuRoots")
    check_evidence("data", data)
    evidence = parse_evidence(data) if isinstance(data, bytes) else data
    return [_authenticated(one, nonce, now, roots) for one in evidence]


def accept(
    opened: Opened,
    *,
    nonce: bytes | None,
    now: int,
    rims: Rims,
    revocation: Revocation,
    policy: GpuPolicy,
    counts: Sequence[int | None],
) -> AcceptedEvidence:
    """The second half of `verify`, with the same ``nonce``; ``now`` may be later (steps 13 to 32).

    Each of ``counts`` is as ``count`` there.
    """
    genuine = [device for device in opened if isinstance(device, GenuineDevice)]
    reports: list[DeviceReport] = []
    seen: set[str] = set()
    for device in opened:
        if isinstance(device, GpuVerificationError):
            reports.append(DeviceReport(error=device))
            continue
        reports.append(_examine(device, genuine, seen, rims, revocation, policy, now))
    gpus = sum(report.arch != "LS10" for report in reports)
    error = next((report.error for report in reports if report.error is not None), None)
    demanded = [count for count in counts if count is not None]
    wrong = next((count for count in demanded if count != gpus), None)
    if error is None and (not reports or wrong is not None or not (gpus or demanded)):  # 31
        problem = "another number of GPUs" if reports else "no device"
        expected = "at least 1" if wrong is None or not reports else wrong
        error = steps.GpuCountError("evidence", problem, got=gpus, expected=expected)
    if error is not None:
        raise EvidenceRefusedError(error, reports)
    return AcceptedEvidence(devices=tuple(reports), nonce=nonce, verified_at=now, proof=PROOF)


def _examine(
    device: GenuineDevice,
    genuine: Sequence[GenuineDevice],
    seen: set[str],
    rims: Rims,
    revocation: Revocation,
    policy: GpuPolicy,
    now: int,
) -> DeviceReport:
    """Check one genuine device to its end, or to its first error (steps 18 to 32)."""
    report = DeviceReport(
        serial_number=device.serial_number,
        device_id=device.device_id,
        arch=device.arch,
        chip=device.chip,
        driver=device.report.driver,
        vbios=device.report.vbios,
        mode=device.report.mode,
        board=device.board,
        model=policy.model(device),
        is_fresh=device.is_fresh,
        steps=device.steps,
    )
    try:
        if {device.serial_number, device.device_id} & seen:  # 30
            raise steps.DuplicateDeviceError("device", "it is in the evidence twice", got=device.serial_number)
        seen |= {device.serial_number, device.device_id}
        report = _passed(report, 30)
        report = _with_status(report, device, revocation, policy, now)
        if policy.measurements == "rims":
            report = _with_measurements(report, device, genuine, rims, revocation, policy, now)
        if refusals := policy.refusals(device):  # 32
            raise steps.GpuAppraisalError(refusals)
        return _passed(report, 32)
    except _Refused as exc:
        return evolve(exc.report, error=exc.error)
    except GpuVerificationError as exc:
        return evolve(report, error=exc)


class _Refused(Exception):
    """A refusal with the report as far as it came."""

    def __init__(self, error: GpuVerificationError, report: DeviceReport) -> None:
        super().__init__()
        self.error = error
        self.report = report


def _with_status(
    report: DeviceReport, device: GenuineDevice, revocation: Revocation, policy: GpuPolicy, now: int
) -> DeviceReport:
    """Steps 18 to 24 for the device's chain. NVIDIA's OCSP service does not know the device certificates themselves."""
    check_floor(device.chain, DEVICE, revocation)
    if policy.revocation == "off":
        return report
    grace = policy.revocation_grace
    _ = check_chain_status(device.chain, DEVICE, revocation, now=now, grace=grace, first=1, hold=False)
    return evolve(_passed(report, 18, 19, 20, 21, 22, 23, 24), revocation_checked=True)


def _with_measurements(
    report: DeviceReport,
    device: GenuineDevice,
    genuine: Sequence[GenuineDevice],
    rims: Rims,
    revocation: Revocation,
    policy: GpuPolicy,
    now: int,
) -> DeviceReport:
    """Steps 25 to 29, with the RIMs or with pinned measurements; steps 18 to 24 for the signers of the RIMs."""
    usable, error = _usable(device, rims, revocation, policy, now)
    try:
        comparison = compare(device, usable, now=now)
    except steps.RimMissingError:
        if error is not None:
            raise error from None
        pinned = policy.pinned_for(device)
        if pinned is None:
            raise
        values = {index: (value,) for index, value in pinned.values.items()}
        mismatches = differences(device.report, values, "pinned")
        report = evolve(report, reference="pinned", compared=len(values))
    else:
        mismatches = comparison.mismatches
        taken = {*comparison.steps, *(step for rim in comparison.rims for step in rim.steps)}
        used = tuple(rim.reference for rim in comparison.rims)
        report = evolve(_passed(report, *taken), reference="rims", compared=comparison.compared, rims=used)
    if mismatches:  # 29
        others = [
            other.report
            for other in genuine
            if other is not device
            and (other.chip, other.report.driver, other.report.vbios)
            == (device.chip, device.report.driver, device.report.vbios)
        ]
        told = told_beside(mismatches, others)
        raise _Refused(steps.MeasurementMismatchError(told), evolve(report, mismatches=told))
    return _passed(report, 29)


def _usable(
    device: GenuineDevice, rims: Rims, revocation: Revocation, policy: GpuPolicy, now: int
) -> tuple[Rims, GpuVerificationError | None]:
    """The RIMs without those for this device whose signer's status refuses them, and the first such refusal.

    NVIDIA signs a RIM again when its signer is revoked, or its certificate ends: the new one counts beside the old one.
    """
    refused: dict[VerifiedRim, GpuVerificationError] = {}
    for rim in rims.fitting([device]):
        if not rim.window[0] <= now <= rim.window[1]:
            continue  # it does not count beside a valid one, and is refused for its times without one
        try:
            check_floor(rim.chain, _SIGNER, revocation)
            if policy.revocation != "off":
                grace, hold = policy.revocation_grace, policy.allow_rim_signer_on_hold
                _ = check_chain_status(rim.chain, _SIGNER, revocation, now=now, grace=grace, first=0, hold=hold)
        except GpuVerificationError as exc:
            refused[rim] = exc
    if not refused:
        return rims, None
    return Rims(tuple(rim for rim in rims.rims if rim not in refused)), next(iter(refused.values()))


_SIGNER: Final = "RIM signer's"


def _passed(report: DeviceReport, *numbers: int) -> DeviceReport:
    return evolve(report, steps=tuple(sorted({*report.steps, *numbers})))


def _authenticated(
    evidence: DeviceEvidence, nonce: bytes | None, now: int, roots: GpuRoots
) -> GenuineDevice | GpuVerificationError:
    try:
        return authenticate(evidence, nonce=nonce, now=now, roots=roots)
    except GpuVerificationError as exc:
        return exc
