"""A simulated collateral service: answers as a PCS or a PCCS would, for simulated platforms.

    service = CollateralService((platform,))
    response = service.answer(HttpRequest("GET", "/tdx/certification/v4/tcb?fmspc=…"), now)

Rules kept here:

* no clock and no network: the caller passes requests and the time, at which all collateral is made;
* paths, parameters, headers and forms are those of the real services: issuer chains are percent-encoded, the PCK CRL is
  PEM or, with ``encoding=der``, DER; the root CA's CRL is hexadecimal as of a PCCS, and DER at Intel's path;
* an unknown platform gets a 404.

Sources: Intel SGX and TDX Provisioning Certification Service API, version 4; Intel SGX/TDX Provisioning Certificate
Caching Service (PCCS), design guide.
"""

from __future__ import annotations

from urllib.parse import parse_qsl, quote

from attrs import evolve, frozen

from chutes_proto.auth.der import pem
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.wire.http import Headers, HttpRequest, HttpResponse


@frozen
class CollateralService:
    """A service for ``platforms``, one or more, all of one world."""

    platforms: tuple[SimulatedPlatform, ...]

    def answer(self, request: HttpRequest, now: int) -> HttpResponse:
        """Return the answer to a request at ``now`` (unix seconds)."""
        path, _, query = request.target.partition("?")
        parameters = dict(parse_qsl(query))
        made = self.platforms[0].collateral(now)
        if request.method != "GET":
            return _text(405, "GET only", (("allow", "GET"),))
        match path.removesuffix("/"):
            case "/sgx/certification/v4/pckcert":
                return self._pck_certificate(parameters)
            case "/tdx/certification/v4/tcb":
                return self._tcb_info(parameters.get("fmspc", ""), now)
            case "/tdx/certification/v4/qe/identity":
                chain = ("sgx-enclave-identity-issuer-chain", _encoded(made.qe_identity_issuer_chain))
                return _statement("enclaveIdentity", made.qe_identity, made.qe_identity_signature, chain)
            case "/sgx/certification/v4/pckcrl":
                return self._pck_crl(parameters.get("ca"), parameters.get("encoding"), now)
            case "/sgx/certification/v4/rootcacrl":
                return _text(200, made.root_ca_crl.hex())
            case "/IntelSGXRootCA.der":
                return HttpResponse(200, (("content-type", "application/pkix-crl"),), made.root_ca_crl)
            case _:
                return _text(404, "there is nothing here")

    def _tcb_info(self, fmspc: str, now: int) -> HttpResponse:
        for platform in self.platforms:
            if platform.fmspc.hex() == fmspc.lower():
                made = platform.collateral(now)
                chain = ("tcb-info-issuer-chain", _encoded(made.tcb_info_issuer_chain))
                return _statement("tcbInfo", made.tcb_info, made.tcb_info_signature, chain)
        return _text(404, "no platform here has this FMSPC")

    def _pck_certificate(self, parameters: dict[str, str]) -> HttpResponse:
        """By the encrypted PPID, which here is the PPID and zeros: nobody decrypts it."""
        for platform in self.platforms:
            if parameters.get("encrypted_ppid", "").lower().startswith(platform.ppid.hex()):
                leaf, *issuers = platform.pck_chain()
                chain = b"".join(pem("CERTIFICATE", issuer) for issuer in issuers)
                headers = (
                    ("sgx-pck-certificate-issuer-chain", _encoded(chain)),
                    ("content-type", "application/x-pem-file"),
                )
                return HttpResponse(200, headers, pem("CERTIFICATE", leaf))
        return _text(404, "no platform here has this PPID")

    def _pck_crl(self, ca: str | None, encoding: str | None, now: int) -> HttpResponse:
        match ca:
            case "platform" | "processor":
                made = evolve(self.platforms[0], ca=ca).collateral(now)
            case _:
                return _text(400, "ca is platform or processor")
        headers = (("sgx-pck-crl-issuer-chain", _encoded(made.pck_crl_issuer_chain)),)
        if encoding == "der":
            return HttpResponse(200, (*headers, ("content-type", "application/pkix-crl")), made.pck_crl)
        return HttpResponse(200, (*headers, ("content-type", "application/x-pem-file")), pem("X509 CRL", made.pck_crl))


def _statement(name: str, text: bytes, signature: bytes, chain: tuple[str, str]) -> HttpResponse:
    body = b'{"%s":%s,"signature":"%s"}' % (name.encode(), text, signature.hex().encode())
    return HttpResponse(200, (("content-type", "application/json"), chain), body)


def _encoded(chain: bytes) -> str:
    return quote(chain, safe="")


def _text(status: int, text: str, headers: Headers = ()) -> HttpResponse:
    return HttpResponse(status, (("content-type", "text/plain"), *headers), text.encode())
