"""Collateral as other tools write it: Intel's PcsClientTool, for many platforms, and dcap-qvl."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import dcap_qvl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._errors import CollateralFormatError, QuoteFormatError
from chutes_proto.quote._layout import parse_quote
from chutes_proto.quote._verify import verify_genuine
from chutes_proto.testing._pki import pem
from chutes_proto.testing._platform import SimulatedPlatform
from tests.quote.platform_files import encrypted_ppid, pcs_client_file
from tests.quote.simulated import NOW, PLATFORM, REPORT_DATA, ROOT, collateral_of, with_certification

OTHER = SimulatedPlatform(PLATFORM.seed, index=1, ca="processor")
QUOTE = PLATFORM.quote(REPORT_DATA)
FILE = pcs_client_file(PLATFORM, OTHER, now=NOW)
NAMED = encrypted_ppid(PLATFORM) + bytes.fromhex(FILE["collaterals"]["pck_certs"][1]["certs"][1]["tcbm"]) + bytes(2)


@pytest.mark.parametrize("platform", [PLATFORM, OTHER], ids=["platform CA", "processor CA"])
@pytest.mark.parametrize("prefix", ["SGX-", ""])
def test_the_collateral_of_the_quote_is_chosen(platform: SimulatedPlatform, prefix: str) -> None:
    text = json.dumps(pcs_client_file(PLATFORM, OTHER, now=NOW, prefix=prefix), indent=1)
    quote = platform.quote(REPORT_DATA)
    collateral = Collateral.from_json(text, quote=quote)
    assert collateral == collateral_of(platform)
    assert verify_genuine(quote, collateral, now=NOW, report_data=None, root=ROOT).pck.fmspc == platform.fmspc


@pytest.mark.parametrize(
    "quote",
    [with_certification(QUOTE, 3, NAMED), with_certification(QUOTE, 4, pem(PLATFORM.pck_chain()[:1]).encode() + b"\0")],
    ids=["type 3", "type 4"],
)
def test_the_chain_that_a_quote_lacks_is_in_the_file(quote: bytes) -> None:
    collateral = Collateral.from_json(json.dumps(FILE), quote=quote)
    assert verify_genuine(quote, collateral, now=NOW, report_data=None, root=ROOT).pck.ppid == PLATFORM.ppid


def test_a_file_of_many_platforms_needs_a_quote() -> None:
    with pytest.raises(CollateralFormatError, match="give the quote"):
        _ = Collateral.from_json(json.dumps(FILE))
    with pytest.raises(QuoteFormatError):
        _ = Collateral.from_json(json.dumps(FILE), quote=b"")


def _changed(*path: Any, value: object) -> dict[str, Any]:
    file: dict[str, Any] = json.loads(json.dumps(FILE))
    table = file["collaterals"]
    for name in path[:-1]:
        table = table[name]
    table[path[-1]] = value
    return file


OTHER_TCB = with_certification(QUOTE, 3, bytes(404))
NO_CHAIN = with_certification(QUOTE, 5, b"no PEM")
NO_EXTENSION = with_certification(QUOTE, 5, pem(PLATFORM.pck_chain()[1:]).encode())


@pytest.mark.parametrize(
    ("file", "quote", "problem"),
    [
        ({"collaterals": []}, QUOTE, "collaterals is missing, or not an object"),
        (_changed("certificates", value=None), QUOTE, "certificates"),
        (_changed("tcbinfos", value=[]), QUOTE, f"FMSPC {PLATFORM.fmspc.hex()}; fetch it"),
        (_changed("tcbinfos", value={}), QUOTE, "tcbinfos is missing, or not a list"),
        (_changed("tcbinfos", 0, "tdx_tcbinfo", "signature", value=1), QUOTE, "signature of tcbInfo"),
        (_changed("tdqeidentity", value=None), QUOTE, "tdqeidentity is missing, or not a text"),
        (_changed("tdqeidentity", value="{"), QUOTE, "tdqeidentity: not JSON"),
        (_changed("pckcacrl", "platformCrl", value="xy"), QUOTE, "platformCrl"),
        (_changed("certificates", "SGX-TCB-Info-Issuer-Chain", value="é"), QUOTE, "percent-encoded"),
        (FILE, OTHER_TCB, "no certificate of the quote's platform"),
        (FILE, with_certification(QUOTE, 3, encrypted_ppid(PLATFORM) + bytes(20)), "-: percent|not 1 to 3"),
        (FILE, with_certification(QUOTE, 3, NAMED[:384] + b"\1" * 20), "no certificate of the quote's platform"),
        (FILE, with_certification(QUOTE, 1, bytes(36)), "no certification data by which to choose"),
        (FILE, NO_CHAIN, "the PCK certificate"),
        (FILE, NO_EXTENSION, "no SGX extension"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_member(file: Any, quote: bytes, problem: str) -> None:
    with pytest.raises(CollateralFormatError, match=problem):
        _ = Collateral.from_json(json.dumps(file), quote=quote)


def test_an_altered_tcb_info_does_not_verify() -> None:
    altered = _changed("tcbinfos", 0, "tdx_tcbinfo", "tcbInfo", "pceId", value="0001")
    from chutes_proto.quote._steps import StatementSignatureError

    collateral = Collateral.from_json(json.dumps(altered), quote=QUOTE)
    with pytest.raises(StatementSignatureError):
        _ = verify_genuine(QUOTE, collateral, now=NOW, report_data=None, root=ROOT)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda some: st.lists(some, max_size=3)))
def test_any_value_in_any_place(value: Any) -> None:
    for name in FILE["collaterals"]:
        for quote in (QUOTE, with_certification(QUOTE, 3, NAMED)):
            with suppress(CollateralFormatError):
                _ = Collateral.from_json(json.dumps(_changed(name, value=value)), quote=quote)


def test_the_file_of_dcap_qvl() -> None:
    """Also as its Rust writes it, with null for a chain that is not there."""
    made = collateral_of(PLATFORM)
    text = dcap_qvl.QuoteCollateralV3.from_json(made.to_json().decode()).to_json()
    assert Collateral.from_json(text) == made
    assert Collateral.from_json(json.dumps({**json.loads(text), "pck_certificate_chain": None})) == made
    chain = parse_quote(QUOTE).certification.rstrip(b"\0").decode()
    beside = Collateral.from_json(json.dumps({**json.loads(text), "pck_certificate_chain": chain}))
    assert beside.pck_certificate_chain == chain.encode()
