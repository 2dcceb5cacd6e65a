"""When the things end that a server serves by, and from when on that is worth a word.

`--check`, the log, the metrics, ``/readyz`` and the page all ask here, so they say the same.

Rules kept here:

* an end is told `EARLY` before it; of something that lives shorter than three times that, in the last third of its
  life;
* the server's own certificate is a problem once it has ended, and before it begins: no VM connects. All else that has
  ended is a note: it may concern few VMs, and every server of the store lacks it alike;
* a key-encryption key does not end, it is due: `KEK_SECONDS` after it was made;
* services of collateral are asked again when their answers are used, so OCSP answers of services are left out.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from attrs import frozen
from cryptography import x509

from chutes_proto.errors import CollateralUnavailable, Refused
from chutes_proto.gpu import GpuCollateral, GpuPolicy, Revocation, VerifiedRim
from chutes_proto.io.collateral.directory import CollateralDirectory
from chutes_proto.io.collateral.gpu_directory import GpuCollateralDirectory
from chutes_proto.io.collateral.upstream import UpstreamCollateral
from chutes_proto.io.finding import Finding, State
from chutes_proto.io.server.setup import ServerSetup
from chutes_proto.quote._collateral import VerifiedCollateral
from chutes_proto.quote._measurements import Profile
from chutes_proto.quote._terms import rfc3339

Kind: TypeAlias = Literal["certificate", "admin_certificate", "collateral", "profile", "kek", "gpu_rim", "gpu_status"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

DAY: Final = 86_400
EARLY: Final[Mapping[Kind, int]] = {
    "certificate": 30 * DAY,
    "admin_certificate": 30 * DAY,
    "collateral": 7 * DAY,
    "profile": 30 * DAY,
    "kek": 30 * DAY,
    "gpu_rim": 30 * DAY,
    "gpu_status": 7 * DAY,
}
"""How long before its end each is worth a note. Intel's collateral lives for 30 days and is fetched again each day."""

KEK_SECONDS: Final = 365 * DAY
"""The age at which a key-encryption key is due: half of what NIST SP 800-57 part 1, 5.3.6, allows for such a key."""

_VERBS: Final[Mapping[Kind, tuple[str, str]]] = {"profile": ("ends", "ended"), "kek": ("is due", "was due")}
_OTHER_VERBS: Final = ("expires", "expired")
_UNITS: Final = ((DAY, "days"), (3600, "hours"))
_FETCH_GPUS: Final = "chutes-proto gpu fetch EVIDENCE --out DIR"


@frozen
class End:
    """One thing that ends: from when to when it counts, in unix seconds, and the command that mends it.

    ``begin`` is None for a profile that counts from ever. ``place`` is the file, if a directory has it.
    """

    kind: Kind
    name: str
    begin: int | None
    end: int
    remedy: str
    place: str = ""

    def state(self, now: int) -> State:
        """The state at the time ``now``: "note" where it ends soon."""
        if now >= self.end or self._is_early(now):
            return "problem" if self.kind == "certificate" else "note"
        early = EARLY[self.kind]
        if self.begin is not None:
            early = min(early, (self.end - self.begin) // 3)
        return "note" if self.end - now <= early else "ok"

    def _is_early(self, now: int) -> bool:
        """Whether it is a certificate that is not valid yet: a profile may well begin later."""
        return "certificate" in self.kind and self.begin is not None and now < self.begin

    def text(self, now: int) -> str:
        """When it ends, in words."""
        if self.begin is not None and self._is_early(now):
            return f"{self.name} is valid from {rfc3339(self.begin)} only; is the clock right?"
        left = abs(self.end - now)
        unit, name = next((found for found in _UNITS if left >= 2 * found[0]), (60, "minutes"))
        span = f"{left // unit} {name}"
        ends, ended = _VERBS.get(self.kind, _OTHER_VERBS)
        when = f"{ended} {span} ago" if now >= self.end else f"{ends} in {span}"
        return f"{self.name}{f' ({self.place})' if self.place else ''} {when}, at {rfc3339(self.end)}"

    def finding(self, now: int) -> Finding:
        """The end as a finding."""
        state = self.state(now)
        return Finding(state, self.kind, self.text(now), "" if state == "ok" else self.remedy)


def ends_of(setup: ServerSetup, now: int, *, kept: bool = False) -> tuple[End, ...]:
    """Return everything that ends, what ends first first; ``kept``: files count that an earlier process fetched.

    Other checks tell what cannot be read; it is left out here.
    """
    found = [*_certificates(setup), *_collateral(setup, now, kept=kept), *_profiles(setup), *_kek(setup), *_gpus(setup)]
    return tuple(sorted(found, key=lambda each: (each.end, each.kind, each.name)))


def summary(kind: Kind, ends: Iterable[End], now: int) -> Finding:
    """The worst of one kind in one finding, and how many there are like it."""
    mine = [each for each in ends if each.kind == kind]
    told = [each for each in mine if each.state(now) != "ok"]
    if not told:
        return Finding("ok", kind, mine[0].text(now) if mine else "none has an end")
    more = f", and {len(told) - 1} more" if len(told) > 1 else ""
    first = told[0].finding(now)
    return Finding(first.state, kind, first.detail + more, first.remedy)


def command_for(setup: ServerSetup, words: str) -> str:
    """The command ``words`` for the server of a set-up, as an operator types it."""
    return f"chutes-proto {words} --config {shlex.quote(setup.config.path or 'FILE')}"


def check_profiles(setup: ServerSetup, now: int) -> Finding | None:
    """The problem that no VM of any profile is granted now, if there are profiles and so it is."""
    profiles = [one.measurements for one in setup.service.profiles.values()]
    counting = [profile for profile in profiles if profile.schedule.accepts(now)]
    if not profiles or any(_is_new_enough(setup, profile, now) for profile in counting):
        return None
    told = "none counts now, so no VM is granted; change their schedule"
    if counting:
        least = setup.config.minimum_version
        told = f"none that counts now has minimum_version {least}, so no VM is granted; lower it, or load newer ones"
    return Finding("problem", "profiles", told)


def _is_new_enough(setup: ServerSetup, profile: Profile, now: int) -> bool:
    try:
        setup.service.check_version(profile, now)
    except Refused:
        return False
    return True


def _certificates(setup: ServerSetup) -> Iterator[End]:
    """The chains that are loaded, whatever their files say by now."""
    names: tuple[tuple[Kind, str | None], ...] = (
        ("certificate", setup.config.tls.certificate),
        ("admin_certificate", setup.config.admin.certificate),
    )
    for kind, name in names:
        if name is not None:
            path = setup.base / name
            chain = x509.load_pem_x509_certificates(setup.files.read(path))
            begin = max(int(each.not_valid_before_utc.timestamp()) for each in chain)
            end = min(int(each.not_valid_after_utc.timestamp()) for each in chain)
            remedy = f"{command_for(setup, 'reload')}, when {path} is replaced"
            yield End(kind, name, begin, end, remedy)


def _collateral(setup: ServerSetup, now: int, *, kept: bool) -> Iterator[End]:
    """For each family the piece of collateral that ends last: an older one beside it is of no matter."""
    source = setup.collateral
    found: dict[str, End] = {}
    if isinstance(source, UpstreamCollateral):
        fetched = source.kept(now) if kept else [("", one) for one in source.cache.held()]
        out = "DIR"  # to see why the services have nothing newer
    else:
        fetched, out = _files(source, now), str(source.path)
    for place, one in fetched:
        names = one.fmspc.hex(), one.ca, one.tee
        command = "chutes-proto collateral fetch --fmspc {} --ca {} --tee {} --upstream URL --out"
        end = End("collateral", "-".join(names), *one.window, f"{command.format(*names)} {out}", place)
        if end.name not in found or found[end.name].end < end.end:
            found[end.name] = end
    yield from found.values()


def fetch_command(directory: Path) -> str:
    """The command that puts collateral into a directory, in place of a file that cannot be used."""
    return f"chutes-proto collateral fetch --quote QUOTE --upstream URL --out {shlex.quote(str(directory))}"


def _files(source: CollateralDirectory, now: int) -> list[tuple[str, VerifiedCollateral]]:
    """The collateral in a directory that verifies, after its file; none if it cannot be read."""
    try:
        items = source.items(now)
    except CollateralUnavailable:
        return []
    return [(item.name, item.content) for item in items if isinstance(item.content, VerifiedCollateral)]


def _profiles(setup: ServerSetup) -> Iterator[End]:
    for served in setup.service.profiles.values():
        schedule = served.measurements.schedule
        if schedule.end is not None:
            remedy = command_for(setup, "profiles vms")
            yield End("profile", str(served.measurements), schedule.not_before, schedule.end, remedy)


def _kek(setup: ServerSetup) -> Iterator[End]:
    """The key-encryption key, as old as its file: nothing else says when it was made."""
    path = setup.base / setup.config.kek_file
    try:
        made = int(path.stat().st_mtime)
    except OSError:
        return
    remedy = "chutes-proto keys rewrap --help"
    yield End("kek", setup.service.vault.current.kek_id, made, made + KEK_SECONDS, remedy, str(path))


def _gpus(setup: ServerSetup) -> Iterator[End]:
    """The signers of RIMs; and of the OCSP answers and CRLs in files the first to end."""
    source = setup.gpus
    if source is None:
        return
    files = source if isinstance(source, GpuCollateralDirectory) else source.beside
    try:
        beside = GpuCollateral() if files is None else files.fetch()
    except CollateralUnavailable:
        beside = GpuCollateral()
    rims = list(beside.rims.rims)
    if not isinstance(source, GpuCollateralDirectory) and source.rims is not None:
        rims += [held.rim for held in source.rims.held()]
    yield from _signers(rims)
    appraisal = setup.service.gpu_appraisal
    if files is not None and appraisal is not None:
        yield from _status(beside.revocation, appraisal.policy, str(files.path))


def _signers(rims: Iterable[VerifiedRim]) -> Iterator[End]:
    """For each chip and version the RIM whose signer ends last."""
    found: dict[str, End] = {}
    for rim in rims:
        name = f"signer of the RIM of {rim.product} {rim.version}"
        if name not in found or found[name].end < rim.window[1]:
            found[name] = End("gpu_rim", name, *rim.window, _FETCH_GPUS)
    yield from found.values()


def _status(revocation: Revocation, policy: GpuPolicy, place: str) -> Iterator[End]:
    if policy.revocation == "off":
        return
    newest: dict[str, tuple[int, int]] = {}
    for one in revocation.answers:
        for answer in one.answers:
            name = f"OCSP answer about certificate {answer.about.serial.hex()}"
            newest[name] = max(newest.get(name, (0, 0)), (answer.next_update, answer.this_update))
    if not newest:
        return
    name, (end, begin) = min(newest.items(), key=lambda each: each[1])
    grace = policy.revocation_grace if policy.revocation == "grace" else 0
    of = f", the first of {len(newest)}," if len(newest) > 1 else ""
    yield End("gpu_status", f"{name}{of}", begin, end + grace, _FETCH_GPUS, place)
