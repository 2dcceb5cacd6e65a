"""Fetch the RIMs and OCSP answers for GPU evidence from NVIDIA's services, and parse their answers.

Rules kept here:

* only evidence whose chain and report verify causes a fetch: evidence that anybody can make costs nothing;
* an answer is kept only if it verifies: a RIM of the device's chip and version, an OCSP answer about that certificate.
  Of other answers nothing is kept, and the problem is told;
* one that is missing stops no other: the caller has all that there is.

Sources: NVIDIA's RIM service, ``GET /v1/rim/{id}``; RFC 6960, 4.1.1 and appendix A.1 (OCSP over HTTP, POST).
"""

from __future__ import annotations

from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Iterable
from hashlib import sha384
from typing import Final

from attrs import field, frozen

from chutes_proto.auth import der
from chutes_proto.effects import Flow, Get, Send
from chutes_proto.errors import GpuError, TransportError, UpstreamError
from chutes_proto.gpu import NVIDIA, DeviceEvidence, GpuRoots, Revocation, authenticate
from chutes_proto.gpu._certificates import VerifiedChain
from chutes_proto.gpu._revocation import check_chain_status
from chutes_proto.gpu._rim import VerifiedRim, authenticate_rim
from chutes_proto.gpu._verify import GenuineDevice
from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.wire.http import HttpRequest

RIM_SERVICE: Final = "https://rim.attestation.nvidia.com"
OCSP_SERVICE: Final = "https://ocsp.ndis.nvidia.com"

_SHA384: Final = "2.16.840.1.101.3.4.2.2"
_OCSP_HEADERS: Final = (("content-type", "application/ocsp-request"), ("accept", "application/ocsp-response"))


@frozen
class GpuFetched:
    """The RIMs by their ids and OCSP answers by serial numbers, all of which verified; and the problems with others."""

    rims: dict[str, bytes] = field(factory=dict[str, bytes], repr=False)
    status: dict[str, bytes] = field(factory=dict[str, bytes], repr=False)
    problems: list[str] = field(factory=list[str])


def fetch_gpu_collateral(
    evidence: Iterable[DeviceEvidence], *, now: int, roots: GpuRoots = NVIDIA, rim_service: str = RIM_SERVICE
) -> Flow[GpuFetched]:
    """Fetch everything that evidence is verified with. `Send` goes to the OCSP service. Raises nothing."""
    found = GpuFetched()
    chains: list[tuple[VerifiedChain, str, int]] = []
    for number, one in enumerate(evidence):
        try:
            device = authenticate(one, nonce=None, now=now, roots=roots)
        except GpuError as exc:
            found.problems.append(f"device {number}: {exc}")
            continue
        chains.append((device.chain, "device's", 1))
        for rim_id, version in (
            (device.driver_rim_id, device.report.driver),
            (device.vbios_rim_id, device.report.vbios),
        ):
            if rim_id is not None and rim_id not in found.rims:
                rim = yield from _rim(found, device, rim_id, str(version), roots, rim_service)
                if rim is not None:
                    chains.append((rim.chain, "RIM signer's", 0))
    for chain, subject, first in chains:
        yield from _status(found, chain, subject, first, now)
    return found


def _rim(
    found: GpuFetched, device: GenuineDevice, rim_id: str, version: str, roots: GpuRoots, service: str
) -> Flow[VerifiedRim | None]:
    try:
        response = yield from Get(f"{service}/v1/rim/{rim_id}")
        if response.status != 200:
            raise UpstreamError(f"status {response.status}", unknown=response.status == 404)
        data = read_rim_answer(response.body)
        rim = authenticate_rim(data, roots=roots)
        if (rim.product, rim.version.upper()) != (device.chip, version.upper()):
            raise UpstreamError(f"it is of {rim.product} {rim.version}")
    except (GpuError, TransportError, UpstreamError) as exc:
        found.problems.append(f"{rim_id}: {exc}")
        return None
    found.rims[rim_id] = data
    return rim


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


def _status(found: GpuFetched, chain: VerifiedChain, subject: str, first: int, now: int) -> Flow[None]:
    for place in range(first, len(chain.certificates)):
        serial = chain.certificates[place].serial.hex()
        if serial in found.status:
            continue
        try:
            request = HttpRequest("POST", "/", _OCSP_HEADERS, ocsp_request(chain, place))
            response = yield from Send(request)
            if response.status != 200:
                raise UpstreamError(f"status {response.status}")
            answers = Revocation.of([response.body])
            about = {answer.about.serial for ocsp in answers.answers for answer in ocsp.answers}
            if about != {chain.certificates[place].serial}:
                raise UpstreamError("the OCSP answer is not about this certificate")
            _ = check_chain_status(chain, subject, answers, now=now, grace=0, first=len(chain.certificates), hold=True)
        except (GpuError, TransportError, UpstreamError) as exc:
            found.problems.append(f"OCSP answer about {serial}: {exc}")
            continue
        found.status[serial] = response.body


def ocsp_request(chain: VerifiedChain, place: int) -> bytes:
    """The OCSP request about one certificate, in DER."""
    name, point = chain.issuer_of(place)
    about = der.sequence(
        der.sequence(der.oid(_SHA384), der.tlv(0x05)),
        der.octets(sha384(name).digest()),
        der.octets(sha384(b"\x04" + point).digest()),
        der.integer(int.from_bytes(chain.certificates[place].serial)),
    )
    return der.sequence(der.sequence(der.sequence(der.sequence(about))))
