"""Faults that verifiers in the field have had, each by the name under which it was published."""

from __future__ import annotations

import inspect
import tracemalloc
from collections.abc import Callable
from functools import partial
from struct import pack

import attrs
import pytest

from chutes_proto.quote import _steps as steps
from chutes_proto.quote._certificates import common_name, read_certificate, read_crl
from chutes_proto.quote._errors import QuoteError, QuoteFormatError
from chutes_proto.quote._eventlog import parse_event_log
from chutes_proto.quote._layout import parse_quote
from chutes_proto.quote._pck import read_pck_extension
from chutes_proto.quote._verify import verify_collateral, verify_genuine, verify_quote
from chutes_proto.testing._faults import Fault
from chutes_proto.testing._quotes import HeaderDraft, QuoteDraft
from tests.quote.logs import spec
from tests.quote.simulated import NOW, PLATFORM, REPORT_DATA, ROOT, collateral_of, signed_of


def test_cve_2026_33697_report_data_is_not_forgotten() -> None:
    """Attested TLS took quotes that were bound to other keys: here the caller has to say what the quote must bind."""
    parameter = inspect.signature(verify_genuine).parameters["report_data"]
    assert (parameter.kind, parameter.default) == (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty)
    for other in (bytes(64), REPORT_DATA[:32], REPORT_DATA + b"\0", b""):
        with pytest.raises(steps.ReportDataMismatchError):
            _ = verify_genuine(
                PLATFORM.quote(REPORT_DATA), collateral_of(PLATFORM), now=NOW, report_data=other, root=ROOT
            )


@pytest.mark.parametrize(
    "fault", ["auth_length_huge", "outer_length_huge", "qe_auth_length_huge", "cert_length_huge", "body_size"]
)
def test_length_bombs_allocate_nothing(fault: str) -> None:
    """dcap-qvl #129: memory was allocated by a length that the quote's maker chose."""
    data = PLATFORM.having(fault).quote(REPORT_DATA)
    tracemalloc.start()
    try:
        with pytest.raises(QuoteFormatError):
            _ = parse_quote(data)
        assert tracemalloc.get_traced_memory()[1] < 256 * 1024
    finally:
        tracemalloc.stop()


HUGE = [
    (read_certificate, b"\x30\x83\xff\xff\xff\x30\x83\xff\xff\xf0\xa0\x03\x02\x01\x02"),
    (read_crl, b"\x30\x83\xff\xff\xff\x30\x83\xff\xff\xf0\x02\x01\x01"),
    (common_name, b"\x30\x83\xff\xff\xff\x31\x83\xff\xff\xf0"),
    (partial(read_pck_extension, ca="platform", tee="TDX"), b"\x30\x83\xff\xff\xff\x30\x83\xff\xff\xf0"),
    (parse_event_log, spec() + pack("<IIIH", 1, 4, 0xFFFFFFFF, 0xC)),
    (parse_event_log, spec() + pack("<IIIH", 1, 4, 1, 0xC) + bytes(48) + pack("<I", 0xFFFFFFFF)),
    (parse_event_log, pack("<II20sI16sI4BI", 0, 3, b"", 0xFFFFFFFF, b"Spec ID Event03", 0, 0, 2, 0, 2, 0xFFFFFFFF)),
]
"""Lengths and counts of gigabytes, in a few bytes."""


@pytest.mark.parametrize(("read", "data"), HUGE)
def test_length_bombs_in_der_and_event_logs_allocate_nothing(read: Callable[[bytes], object], data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(QuoteError):
            _ = read(data)
        assert tracemalloc.get_traced_memory()[1] < 256 * 1024
    finally:
        tracemalloc.stop()


def test_no_crl_is_no_empty_crl() -> None:
    for piece in ("root_ca_crl", "pck_crl"):
        with pytest.raises(steps.CrlFormatError):
            _ = verify_collateral(attrs.evolve(collateral_of(PLATFORM), **{piece: b""}), now=NOW, root=ROOT)


def test_a_revocation_counts_for_what_was_seen_before() -> None:
    """A remembered chain must not outlive its revocation."""
    signed = signed_of(PLATFORM.quote(REPORT_DATA))
    _ = verify_quote(signed, verify_collateral(collateral_of(PLATFORM), now=NOW, root=ROOT), now=NOW, report_data=None)
    for fault in ("pck_revoked", "intermediate_revoked"):
        with pytest.raises(QuoteError):
            revoking = verify_collateral(collateral_of(PLATFORM.having(fault)), now=NOW, root=ROOT)
            _ = verify_quote(signed, revoking, now=NOW, report_data=None)


@attrs.frozen(kw_only=True)
class _HeaderWithSvns(HeaderDraft):
    def encode(self) -> bytes:
        data = HeaderDraft.encode(self)
        return data[:8] + b"\xff\xff\xff\xff" + data[12:]


def _with_svns(draft: QuoteDraft) -> QuoteDraft:
    return attrs.evolve(draft, header=_HeaderWithSvns(**attrs.asdict(draft.header)))


@pytest.mark.parametrize("name", ["tcb_out_of_date", "qe_outdated", None])
def test_svns_in_the_header_that_no_cpu_signed_change_nothing(name: str | None) -> None:
    """QE SVN and PCE SVN of the header are the attestation key's word only: TCB levels do not look at them."""
    platform = PLATFORM.having(*([name] if name else []))
    lying = platform.having(Fault(name="header SVNs", side="quote", what="SVNs of 65535", quote=_with_svns))
    honest = verify_genuine(
        platform.quote(REPORT_DATA), collateral_of(platform), now=NOW, report_data=REPORT_DATA, root=ROOT
    )
    verdict = verify_genuine(
        lying.quote(REPORT_DATA), collateral_of(lying), now=NOW, report_data=REPORT_DATA, root=ROOT
    )
    assert (verdict.quote.header.qe_svn, verdict.quote.header.pce_svn) == (0xFFFF, 0xFFFF)
    assert (honest.quote.header.qe_svn, honest.quote.header.pce_svn) == (0, 0)
    for part in ("tcb_status", "platform", "qe", "module", "tcb_date"):
        assert getattr(verdict, part) == getattr(honest, part)


def test_a_malleable_signature_is_no_other_quote_to_remember() -> None:
    """(r, n - s) verifies as well: what is remembered by bytes only misses, and the verdict is the same."""
    quote = PLATFORM.quote(REPORT_DATA)
    signature = parse_quote(quote).qe_report_signature
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    other = signature[:32] + (order - int.from_bytes(signature[32:])).to_bytes(32)
    for data in (quote, quote.replace(signature, other)):
        verdict = verify_genuine(data, collateral_of(PLATFORM), now=NOW, report_data=REPORT_DATA, root=ROOT)
        assert verdict.tcb_status == "UpToDate"
