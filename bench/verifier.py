"""The verifier beside dcap-qvl's wheel and beside the bare P-256 checks that each step cannot do without.

Steps: ``cold`` has seen nothing; ``collateral verified`` has it as a `VerifiedCollateral`; ``PCK leaf seen`` also
remembers the PCK chain; ``QE report seen`` also the quoting enclave. The
bare checks are the same keys and messages, each key loaded from its bytes where the step must load it. dcap-qvl has one
step only: all of it, each time.

Below each table are the parts of the two dearest steps, each in a loop of its own, and what it adds that each runs only
once: caches and branch predictors are full of what ran before. The rest is the verifier's bookkeeping, and that the
checks stand between the parts and not before them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import dcap_qvl

from bench.measure import Work, microseconds, one_core
from chutes_proto.quote import _certificates as certificates
from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote import _verify as verify
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
from chutes_proto.quote._layout import parse_quote
from chutes_proto.quote._pck import read_pck_extension
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
from chutes_proto.quote._statements import read_qe_identity, read_tcb_info
from chutes_proto.quote._tcb import assess
from chutes_proto.testing._platform import SimulatedPlatform

VECTORS = Path(__file__).resolve().parent.parent.parent / "shared" / "vectors"
NOW = 1_800_000_000

STEPS = ("cold", "collateral verified", "PCK leaf seen", "QE report seen")


def run() -> None:
    one_core()
    platform = SimulatedPlatform(b"a world to measure in")
    _table("a simulated TDX v4 quote", platform.quote(bytes(64)), platform.collateral_json(NOW), NOW, platform.root_der)
    for folder in sorted(VECTORS.glob("real/tdx-v4-*"))[-1:]:
        quote, collateral = (folder / "quote.bin").read_bytes(), (folder / "collateral.json").read_bytes()
        _table(folder.name, quote, collateral, int((folder / "now.txt").read_text()), None)
    _imports()


def _table(title: str, quote: bytes, collateral: bytes, now: int, root_der: bytes | None) -> None:
    root = INTEL_ROOT if root_der is None else TrustedRoot.from_der(root_der)
    pieces = Collateral.from_json(collateral)
    verified = verify.verify_collateral(pieces, now=now, root=root)
    theirs = dcap_qvl.QuoteCollateralV3.from_json(collateral.decode())

    def dcap() -> object:
        if root_der is None:
            return dcap_qvl.verify(quote, theirs, now)
        return dcap_qvl.verify_with_root_ca(quote, theirs, root_der, now)

    def whole() -> object:
        return verify.verify_genuine(quote, pieces, now=now, report_data=None, root=root)

    def warm() -> object:
        return verify.verify_quote(
            verify.check_signed(verify.open_quote(quote, now=now, root=root)), verified, now=now, report_data=None
        )

    def forget() -> None:
        _forget_texts()
        _forget_platform()

    def forget_platform() -> None:
        _forget_platform()
        _ = verify._signer(root, pieces.pck_crl_issuer_chain, verify._PCK_CA)
        _forget_pem(pieces)

    def forget_enclave() -> None:
        ecdsa.recall_raw.cache_clear()
        ecdsa.load_point.cache_clear()

    ours: dict[str, tuple[Work, Work]] = {
        "cold": (forget, whole),
        "collateral verified": (forget_platform, warm),
        "PCK leaf seen": (forget_enclave, warm),
        "QE report seen": (_nothing, warm),
        "parse only": (_nothing, lambda: parse_quote(quote)),
    }
    bare = _bare_checks(quote, pieces, root)
    times = microseconds(
        ours
        | {f"bare {step}": (_nothing, work) for step, work in bare.items()}
        | {"dcap-qvl": (_nothing, dcap), "dcap-qvl parse only": (_nothing, lambda: dcap_qvl.parse_quote(quote))}
    )
    print(f"{title}: microseconds, medians of the quickest turns; dcap-qvl {version('dcap-qvl')}")
    print(
        f"  {'step':<22}{'ours':>8}{'dcap-qvl':>10}{'ours/theirs':>13}{'theirs/ours':>13}{'bare':>8}{'ours/bare':>11}"
    )
    for step in (*STEPS, "parse only"):
        mine = times[step]
        other = times["dcap-qvl parse only" if step == "parse only" else "dcap-qvl"]
        row = f"  {step:<22}{mine:>8.1f}{other:>10.1f}{mine / other:>13.2f}{other / mine:>13.2f}"
        if step in bare:
            row += f"{times[f'bare {step}']:>8.1f}{mine / times[f'bare {step}']:>11.2f}"
        print(row)
    alone, one_pass = _parts(quote, pieces, verified, bare)
    for step, parts in alone.items():
        terms = {"bare checks": times[f"bare {step}"], **parts}
        terms["as each runs once in a pass, not in a loop"] = one_pass[step] - sum(terms.values())
        terms["the rest"] = times[step] - one_pass[step]
        print(f"  {step} = {' + '.join(f'{time:.0f} {name}' for name, time in terms.items())}")


def _nothing() -> None:
    pass


def _all(works: Sequence[Work]) -> None:
    for work in works:
        _ = work()


def _forget_texts() -> None:
    for pure in (certificates._read_body, certificates.common_name, strict_json._unix_seconds):
        pure.cache_clear()


def _forget_platform() -> None:
    for pure in (certificates.read_certificate, ecdsa.load_point, ecdsa.recall, ecdsa.recall_raw):
        pure.cache_clear()


def _forget_pem(pieces: Collateral) -> None:
    """Forget all certificates except those of the collateral."""
    certificates._read_body.cache_clear()
    _ = certificates.read_pem(pieces.pck_crl_issuer_chain)


def _parts(
    data: bytes, pieces: Collateral, verified: VerifiedCollateral, bare: dict[str, Callable[[], object]]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Measure the parts of the two most expensive steps besides the bare checks, each in its own loop."""
    quote = parse_quote(data)
    leaf, issuer, *_ = certificates.read_pem(quote.certification)
    tcb_signer, *_ = certificates.read_pem(pieces.tcb_info_issuer_chain)
    extension = certificates.read_certificate(leaf).extensions[certificates.SGX_EXTENSION]
    pck = read_pck_extension(extension, ca=verified.ca, tee=quote.tee)
    statements = (pieces.tcb_info, pieces.qe_identity)

    def read(*certificate_ders: bytes) -> None:
        for der in certificate_ders:
            certificate = certificates.read_certificate.__wrapped__(der)
            certificates.check_kind(certificate, "CA" if der is issuer else "end entity")
            _ = certificates.common_name(certificate.subject)

    def crls() -> None:
        for crl in (pieces.root_ca_crl, pieces.pck_crl):
            _ = certificates.revoked_serials(certificates.read_crl(crl))

    def pems() -> None:
        for pem in (quote.certification, pieces.pck_crl_issuer_chain, pieces.tcb_info_issuer_chain):
            _ = certificates.read_pem(pem)

    both: dict[str, Work] = {
        "quote": lambda: parse_quote(data),
        "PCK extension": lambda: read_pck_extension(extension, ca=verified.ca, tee=quote.tee),
        "TCB levels": lambda: assess(verified.tcb_info, verified.qe_identity, pck, quote.body, quote.qe_report),
    }
    works: dict[str, tuple[Work, dict[str, Work]]] = {
        "cold": (
            _forget_texts,
            {
                **both,
                "PEM": pems,
                "certificates": lambda: read(leaf, issuer, tcb_signer),
                "CRLs": crls,
                "TCB info and QE identity": lambda: (read_tcb_info(statements[0]), read_qe_identity(statements[1])),
            },
        ),
        "collateral verified": (
            lambda: _forget_pem(pieces),
            {**both, "PEM": lambda: certificates.read_pem(quote.certification), "certificates": lambda: read(leaf)},
        ),
    }
    alone: dict[str, dict[str, float]] = {}
    passes: dict[str, tuple[Work, Work]] = {}
    for step, (prepare, parts) in works.items():
        alone[step] = microseconds({name: (prepare, work) for name, work in parts.items()})
        passes[step] = (prepare, partial(_all, [bare[step], *parts.values()]))
    return alone, microseconds(passes)


def _bare_checks(data: bytes, pieces: Collateral, root: TrustedRoot) -> dict[str, Callable[[], object]]:
    """Return for each step the signature checks that it needs, and nothing else."""
    quote = parse_quote(data)
    leaf, issuer, *_ = map(certificates.read_certificate, certificates.read_pem(quote.certification))
    tcb_signer = certificates.read_certificate(certificates.read_pem(pieces.tcb_info_issuer_chain)[0])
    root_crl, pck_crl = certificates.read_crl(pieces.root_ca_crl), certificates.read_crl(pieces.pck_crl)
    load, check, check_raw = ecdsa.load_point.__wrapped__, ecdsa.verify, ecdsa.verify_raw
    root_key, issuer_key = load(root.point), load(issuer.point)
    leaf_key, quote_key = load(leaf.point), load(quote.attestation_key)

    def qe_report_seen() -> None:
        check_raw(quote_key, quote.signature, quote.signed)

    def leaf_seen() -> None:
        check_raw(leaf_key, quote.qe_report_signature, quote.qe_report_bytes)
        check_raw(load(quote.attestation_key), quote.signature, quote.signed)

    def _platform(key: ecdsa.EllipticCurvePublicKey) -> None:
        check(key, leaf.signature, leaf.signed)
        check_raw(load(leaf.point), quote.qe_report_signature, quote.qe_report_bytes)
        check_raw(load(quote.attestation_key), quote.signature, quote.signed)

    def cold() -> None:
        check(root_key, root_crl.signature, root_crl.signed)
        check(root_key, issuer.signature, issuer.signed)
        key = load(issuer.point)
        check(key, pck_crl.signature, pck_crl.signed)
        check(root_key, tcb_signer.signature, tcb_signer.signed)
        tcb_key = load(tcb_signer.point)
        check_raw(tcb_key, pieces.tcb_info_signature, pieces.tcb_info)
        check_raw(tcb_key, pieces.qe_identity_signature, pieces.qe_identity)
        _platform(key)

    works: list[Callable[[], object]] = [cold, lambda: _platform(issuer_key), leaf_seen, qe_report_seen]
    return dict(zip(STEPS, works, strict=True))


def _imports() -> None:
    """Measure imports, each in its own processes, alternately, with byte code, as after a first use."""
    names = ("cryptography.x509, attrs", "chutes_proto.quote._verify")
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="chutes-proto-bench-") as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
        for _ in range(16):
            for name in names:
                text = f"import time\nstart = time.perf_counter()\nimport {name}\nprint(time.perf_counter() - start)"
                done = subprocess.run(
                    [sys.executable, "-c", text], capture_output=True, check=True, env=environment, text=True
                )
                times[name].append(float(done.stdout))
    base, ours = (median(times[name][1:]) * 1e3 for name in names)
    print(f"import chutes_proto.quote._verify: {ours:.1f} ms, {ours / base:.2f} x import cryptography.x509, attrs")
