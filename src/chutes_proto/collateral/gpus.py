"""The caches of RIMs and OCSP answers for GPU evidence, from NVIDIA's services or mirrors of them.

Rules kept here:

* only evidence whose chain and report verify causes a fetch: evidence that anybody can make costs nothing;
* an answer is kept only if it verifies: a RIM of the device's chip and version, an OCSP answer about that certificate;
* a RIM is not replaced by one whose signer ends earlier, an OCSP answer not by an older one, but by a revocation of any
  time; a revocation by nothing, and it counts after its end, too;
* one that is missing stops no other: the caller has all that there is.

Sources: NVIDIA's RIM service, ``GET /v1/rim/{id}``; RFC 6960, 4.1.1 and appendix A.1 (OCSP over HTTP, POST).
"""

from __future__ import annotations

import re
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha384
from typing import TYPE_CHECKING, Final

from attrs import evolve, field, frozen

from chutes_proto.auth import der
from chutes_proto.collateral.cache import Cache, CachePolicy, GiveUp, K, S, V, fetch, settle
from chutes_proto.collateral.pcs import check_service, check_status
from chutes_proto.effects import Get, Now, Post
from chutes_proto.errors import GpuError, UpstreamError
from chutes_proto.gpu import NVIDIA, DeviceEvidence, GenuineDevice, GpuRoots, VerifiedRim, authenticate
from chutes_proto.gpu._certificates import VerifiedChain
from chutes_proto.gpu._revocation import Answer, answer_about
from chutes_proto.gpu._rim import authenticate_rim
from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote._terms import Window

if TYPE_CHECKING:
    from chutes_proto.effects import Flow
    from chutes_proto.log import Value

RIM_SERVICE: Final = "https://rim.attestation.nvidia.com"
OCSP_SERVICE: Final = "https://ocsp.ndis.nvidia.com"

POLICY: Final = CachePolicy(wait=10.0, fetches_per_minute=600, families=8192)
"""One request a fetch, and one key a GPU: a machine that was not seen before causes up to 20."""

_SHA384: Final = "2.16.840.1.101.3.4.2.2"
_OCSP_HEADERS: Final = (("content-type", "application/ocsp-request"), ("accept", "application/ocsp-response"))
_FOREVER: Final = 2**63 - 1
_RIM_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@frozen
class GpuService:
    """A RIM service or an OCSP service."""

    url: str

    @classmethod
    def parse(cls, url: str) -> GpuService:
        """Parse its URL. Raises `ConfigurationError` for anything but https, or http to this machine."""
        return cls(check_service(url))


@frozen
class RimKey:
    """A RIM: its id, and the chip and version that it must be for."""

    rim_id: str
    chip: str
    version: str

    @property
    def file(self) -> str:
        """Where it is in a directory of GPU collateral."""
        return f"rims/{self.rim_id}.xml"

    @property
    def log_fields(self) -> Mapping[str, Value]:
        """The key in a log record."""
        return {"rim": self.rim_id}

    def __str__(self) -> str:
        return f"RIM {self.rim_id}"


@frozen
class StatusKey:
    """The status of a certificate: name and point of its issuer, and its serial number."""

    issuer: bytes = field(repr=False)
    point: bytes = field(repr=False)
    serial: bytes

    @property
    def file(self) -> str:
        """Where it is in a directory of GPU collateral."""
        return f"status/{self.serial.hex()}.der"

    @property
    def log_fields(self) -> Mapping[str, Value]:
        """The key in a log record."""
        return {"certificate": self.serial.hex()}

    def __str__(self) -> str:
        return f"OCSP answer about {self.serial.hex()}"


@frozen(eq=False)
class HeldRim:
    """A RIM in the cache."""

    rim: VerifiedRim

    @property
    def window(self) -> Window:
        """See `Held`."""
        return self.rim.window

    @property
    def usable_until(self) -> int:
        """See `Held`; a RIM has no grace."""
        return self.rim.window[1]


@frozen(eq=False)
class HeldStatus:
    """An OCSP answer in the cache; the responder's certificate ends at ``responder_until``."""

    data: bytes = field(repr=False)
    answer: Answer
    responder_until: int
    grace: int

    @property
    def window(self) -> Window:
        """See `Held`."""
        return self.answer.this_update, min(self.answer.next_update, self.responder_until)

    @property
    def usable_until(self) -> int:
        """See `Held`; a revocation stands for ever, and a certificate has no grace."""
        if self.answer.state == "revoked":
            return _FOREVER
        end = self.answer.next_update
        return end + self.grace if end <= self.responder_until else self.responder_until


class RimCache(Cache[RimKey, GpuService, HeldRim, bytes]):
    """A `Cache` of RIMs, verified up to ``roots``."""

    def __init__(
        self, upstreams: Sequence[GpuService], *, roots: GpuRoots, policy: CachePolicy = POLICY, seed: bytes = b""
    ) -> None:
        super().__init__(upstreams, policy=policy, seed=seed)
        self.roots = roots

    def obtain(self, upstream: GpuService, key: RimKey) -> Flow[tuple[HeldRim, bytes]]:
        """See `Cache.obtain`."""
        response = yield from Get(f"{upstream.url}/v1/rim/{key.rim_id}")
        check_status(response, "RIM", (yield from Now()), says_unknown=True)
        data = read_rim_answer(response.body)
        return self.read(key, data), data

    def read(self, key: RimKey, data: bytes) -> HeldRim:
        """Verify a RIM, of whatever time. Raises `UpstreamError` for one of something else, and `GpuError`."""
        rim = authenticate_rim(data, roots=self.roots)
        if (rim.product, rim.version.upper()) != (key.chip, key.version.upper()):
            raise UpstreamError(f"it is of {rim.product} {rim.version}")
        return HeldRim(rim)

    def replaces(self, held: HeldRim, fetched: HeldRim, now: int) -> bool:
        """See `Cache.replaces`."""
        if fetched.window[1] < held.window[1]:
            raise UpstreamError("its signer's certificate ends before that of the cached RIM")
        return fetched.rim.digest != held.rim.digest


class StatusCache(Cache[StatusKey, GpuService, HeldStatus, bytes]):
    """A `Cache` of OCSP answers; the chains of the certificates that are asked about were verified."""

    def __init__(
        self, upstreams: Sequence[GpuService], *, policy: CachePolicy = POLICY, grace: int = 0, seed: bytes = b""
    ) -> None:
        super().__init__(upstreams, policy=evolve(policy, grace=grace), seed=seed)

    def obtain(self, upstream: GpuService, key: StatusKey) -> Flow[tuple[HeldStatus, bytes]]:
        """See `Cache.obtain`."""
        response = yield from Post(f"{upstream.url}/", _OCSP_HEADERS, ocsp_request(key))
        check_status(response, "OCSP answer", (yield from Now()))
        return self.read(key, response.body), response.body

    def read(self, key: StatusKey, data: bytes) -> HeldStatus:
        """Verify an OCSP answer, of whatever time. Raises `UpstreamError` for one that says nothing, and `GpuError`."""
        answer, terms = answer_about(data, key.issuer, key.point, key.serial, f"certificate {key.serial.hex()}")
        if answer.state == "unknown":
            raise UpstreamError("the service does not know this certificate")
        return HeldStatus(data, answer, min((term.end for term in terms), default=_FOREVER), self.policy.grace)

    def replaces(self, held: HeldStatus, fetched: HeldStatus, now: int) -> bool:
        """See `Cache.replaces`."""
        is_revoked = fetched.answer.state == "revoked"
        if held.answer.state == "revoked" and not is_revoked:
            raise UpstreamError("it takes a revocation back")
        if is_revoked and held.answer.state != "revoked":
            return True
        if fetched.answer.this_update < held.answer.this_update and now <= held.window[1]:
            raise UpstreamError("it is older than the cached answer")
        return fetched.answer.this_update > held.answer.this_update


def read_rim_answer(body: bytes) -> bytes:
    """The RIM in the answer of NVIDIA's service. Raises `UpstreamError`."""
    try:
        match strict_json.decode(body, fractions=True):
            case {"rim": str(text)}:
                return a2b_base64(text.encode(), strict_mode=True)
            case _:
                raise UpstreamError("the answer has no rim")
    except strict_json.JsonError as exc:
        raise UpstreamError(f"the answer is {exc.problem}") from None
    except Base64Error:
        raise UpstreamError("the rim is not base64") from None


def ocsp_request(key: StatusKey) -> bytes:
    """The OCSP request about one certificate, in DER."""
    about = der.sequence(
        der.sequence(der.oid(_SHA384), der.tlv(0x05)),
        der.octets(sha384(key.issuer).digest()),
        der.octets(sha384(b"\x04" + key.point).digest()),
        der.integer(int.from_bytes(key.serial)),
    )
    return der.sequence(der.sequence(der.sequence(der.sequence(about))))


# --- what evidence needs ---


def rim_keys(devices: Iterable[GenuineDevice]) -> tuple[RimKey, ...]:
    """The RIMs of devices, each once, but for those that no service could know."""
    found: dict[RimKey, None] = {}
    for device in devices:
        report = device.report
        for rim_id, version in ((device.driver_rim_id, report.driver), (device.vbios_rim_id, report.vbios)):
            if rim_id is not None and version is not None and _RIM_ID.fullmatch(rim_id):
                found[RimKey(rim_id, device.chip, version)] = None
    return tuple(found)


def status_keys(devices: Iterable[GenuineDevice], rims: Iterable[VerifiedRim] = ()) -> tuple[StatusKey, ...]:
    """The certificates of devices and RIM signers, each once; the service does not know the devices' own."""
    chains: list[tuple[VerifiedChain, int]] = [(device.chain, 1) for device in devices]
    chains += [(rim.chain, 0) for rim in rims]
    return tuple(
        dict.fromkeys(
            StatusKey(*chain.issuer_of(place), chain.certificates[place].serial)
            for chain, first in chains
            for place in range(first, len(chain.certificates))
        )
    )


# --- fetched once, for a directory ---


@frozen
class GpuFetched:
    """The RIMs and OCSP answers that verified, by their keys; and the problems with others."""

    pieces: dict[RimKey | StatusKey, bytes] = field(factory=dict[RimKey | StatusKey, bytes], repr=False)
    problems: list[str] = field(factory=list[str])


def fetch_gpu_collateral(
    evidence: Iterable[DeviceEvidence],
    rims: RimCache,
    status: StatusCache,
    *,
    now: int,
    roots: GpuRoots = NVIDIA,
    kept: Callable[[RimKey | StatusKey], bytes | None] = lambda _: None,
) -> Flow[GpuFetched]:
    """Fetch everything that evidence is verified with, into empty caches. Raises nothing.

    ``kept`` returns the piece that was fetched before: what `Cache.replaces` does not replace stays, and the problem
    says so.
    """
    found = GpuFetched()
    devices: list[GenuineDevice] = []
    for number, one in enumerate(evidence):
        try:
            devices.append(authenticate(one, nonce=None, now=now, roots=roots))
        except GpuError as exc:
            found.problems.append(f"device {number}: {exc}")
    verified: list[VerifiedRim] = []
    for rim_key in rim_keys(devices):
        held = yield from _fetched(found, rims, rim_key, rims.read, kept(rim_key))
        if held is not None:
            verified.append(held.rim)
    for key in status_keys(devices, verified):
        _ = yield from _fetched(found, status, key, status.read, kept(key))
    return found


def _fetched(
    found: GpuFetched, cache: Cache[K, S, V, bytes], key: K, read: Callable[[K, bytes], V], kept: bytes | None
) -> Flow[V | None]:
    if kept is not None:
        with suppress(GpuError, UpstreamError):  # it is replaced
            cache.restore(key, read(key, kept))
    data = yield from fetch(cache, key)
    outcome = yield from settle(cache, key)
    if isinstance(outcome, GiveUp):
        found.problems.append(outcome.reason)
        return None
    if why := cache.trouble(key, (yield from Now())):
        found.problems.append(f"{key} is left as it is: {why}")
    elif (piece := kept if data is None else data) is not None and isinstance(key, RimKey | StatusKey):
        found.pieces[key] = piece
    return outcome.collateral
