"""Strict JSON, collateral files and statements: a value or the one error of each, whatever the bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._errors import CollateralFormatError
from chutes_proto.quote._statements import AnotherKindError, TcbStatus, read_qe_identity, read_tcb_info
from chutes_proto.quote._strict_json import MAX_DEPTH, JsonError, decode
from tests.quote.simulated import PLATFORM, collateral_of
from tests.work import MIB, work_of

FILE = PLATFORM.collateral_json(1_800_000_000)
TCB_INFO = collateral_of(PLATFORM).tcb_info
QE_IDENTITY = collateral_of(PLATFORM).qe_identity
SVNS = {f"sgxtcbcomp{number:02}svn": number for number in range(1, 17)}
NUMBERED = json.dumps(
    {
        "version": 2,
        **{name: json.loads(TCB_INFO)[name] for name in ("issueDate", "nextUpdate", "fmspc", "pceId", "tcbType")},
        "tcbEvaluationDataNumber": 17,
        "tcbLevels": [
            {"tcb": {**SVNS, "pcesvn": 13}, "tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": "UpToDate"},
            {"tcb": {**SVNS, "pcesvn": 11}, "tcbDate": "2025-01-01T00:00:00Z", "tcbStatus": "OutOfDate"},
        ],
    },
    separators=(",", ":"),
).encode()
"""TCB info of version 2, for SGX."""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a":1,"a":1}', "a member twice: 'a'"),
        (b'{"a":1.0}', "not whole"),
        (b'{"a":1e3}', "not whole"),
        (b'{"a":NaN}', "NaN"),
        (b"-Infinity", "Infinity"),
        (b"[" * 17 + b"]" * 17, "deeper"),
        (b"[" * 100_000, "deeper"),
        (b'{"a":' * 17 + b"1" + b"}" * 17, "deeper"),
        (b"\xff", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"1" * 5000, "too long"),
        (b'["\\ud800"]', "surrogate"),
        (b'{"\\udfff":1}', "surrogate"),
        (b"{" + b",".join(b'"%d":0' % n for n in range(60_000)) + b',"59999":0}', "twice: '59999'"),
        (b'["' + b'\\"' * 500_000, "not JSON"),
        (b'["' + b"\\" * 1_000_000, "not JSON"),
        (b"{} {}", "not JSON"),
        (b" " * (strict_json.MAX_SIZE + 1), "more than"),
        (b"[" + b"0," * (strict_json.MAX_VALUES - 1) + b"[]]", "more than 262144 values"),
    ],
)
def test_json_that_could_mean_two_things(text: bytes, problem: str) -> None:
    with pytest.raises(JsonError, match=problem):
        _ = decode(text)


def test_json_has_so_many_values() -> None:
    most = strict_json.MAX_VALUES
    assert decode(b"[" + b"0," * (most - 2) + b"[]]") == [0] * (most - 2) + [[]]
    longest = b"1." + b"0" * (strict_json.MAX_FLOAT - 2)
    assert decode(longest, fractions=True) == 1.0
    with pytest.raises(JsonError, match="too long"):
        _ = decode(longest + b"0", fractions=True)


@pytest.mark.parametrize("part", [b"[]", b"{}", b'{"":0}', b"0", b"1e9"])
def test_the_work_for_json_is_bounded(part: bytes) -> None:
    data = b"[" + b",".join([part] * (4 * MIB // (len(part) + 1) - 1)) + b"]"

    def read() -> None:
        with suppress(JsonError):
            _ = decode(data, limit=4 * MIB, fractions=True)

    work = work_of(read)
    assert work.calls < 2 * strict_json.MAX_VALUES
    assert work.peak < 16 * MIB


@pytest.mark.parametrize("value", ["[[[", '"]', "\\", '\\"[{', '[["]]', "{" * 50])
def test_brackets_in_strings_are_no_depth(value: str) -> None:
    deep: Any = value
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert decode(json.dumps(deep).encode()) == deep
    with pytest.raises(JsonError, match="deeper"):
        _ = decode(json.dumps([deep]).encode())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_json_comes_back(value: Any) -> None:
    assert decode(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")) == json.loads(
        json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    )


@pytest.mark.parametrize(
    ("text", "unix"),
    [("1970-01-01T00:00:00Z", 0), ("2026-06-01T00:00:00Z", 1780272000)],
)
def test_dates(text: str, unix: int) -> None:
    assert strict_json.date(text, "at") == unix


@pytest.mark.parametrize(
    "text",
    [
        "2026-06-01T00:00:00+00:00",
        "2026-06-01 00:00:00Z",
        "2026-06-01T00:00:00z",
        "2026-06-31T00:00:00Z",
        "2026-06-01T24:00:00Z",
        "2026-06-01T00:00:00.0Z",
        "2026-6-1T0:0:0Z",
        "1969-12-31T23:59:59Z",
        "２026-06-01T00:00:00Z",
        "2026-06-01T00:00:00Z\n",
        "",
    ],
)
def test_dates_that_are_none(text: str) -> None:
    with pytest.raises(JsonError, match="at "):
        _ = strict_json.date(text, "at")


@pytest.mark.parametrize("text", ["00 1", "0x01", "１１11", "001", "00110", "zzzz"])
def test_hexadecimal_that_is_none(text: str) -> None:
    with pytest.raises(JsonError, match="value"):
        _ = strict_json.hexadecimal(text, "value", 2)


# --- statements ---


def _edited(text: bytes, **changes: Any) -> bytes:
    table = json.loads(text)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = table
        for parent in parents:
            place = place[int(parent) if parent.isdigit() else parent]
        place[int(last) if last.isdigit() else last] = value
    return json.dumps(table).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"tcbLevels__0__tcb__sgxtcbcomponents__3": {"svn": True}},
        {"tcbLevels__0__tcb__sgxtcbcomponents__3": {"svn": "1"}},
        {"tcbLevels__0__tcb__sgxtcbcomponents__3": {"svn": 256}},
        {"tcbLevels__0__tcb__tdxtcbcomponents__3": {"svn": -1}},
        {"tcbLevels__0__tcb__sgxtcbcomponents__3": {}},
        {"tcbLevels__0__tcb__sgxtcbcomponents__3": 3},
        {"tcbLevels__0__tcb__sgxtcbcomponents": {"svn": 1}},
        {"tcbLevels__0__tcb__pcesvn": 65536},
        {"tcbLevels__0__tcb__pcesvn": True},
        {"tcbLevels__0__tcb": []},
        {"tcbLevels__0": None},
        {"tcbLevels": []},
        {"tcbLevels__0__advisoryIDs": [1]},
        {"tcbLevels__0__advisoryIDs": "INTEL-SA-00001"},
        {"tcbLevels__0__tcbStatus": "uptodate"},
        {"tcbEvaluationDataNumber": -1},
        {"fmspc": "00"},
        {"tdxModule__attributes": "zz"},
        {"tdxModuleIdentities__0__tcbLevels__0__tcbStatus": "ConfigurationNeeded"},
        {"tdxModuleIdentities__0__tcbLevels": []},
        {"version": "3"},
        {"tcbType": 1},
        {"tdxModule": None},
    ],
)
def test_tcb_info_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(JsonError):
        _ = read_tcb_info(_edited(TCB_INFO, **changes))


@pytest.mark.parametrize("name", ["sgxtcbcomponents", "tdxtcbcomponents"])
def test_a_component_too_many_makes_up_for_none_that_lacks(name: str) -> None:
    table = json.loads(TCB_INFO)
    first, second = (level["tcb"][name] for level in table["tcbLevels"][:2])
    second.insert(0, first.pop())
    with pytest.raises(JsonError, match=rf"length >= 16 - at `\$.tcbLevels\[0\].tcb.{name}`"):
        _ = read_tcb_info(json.dumps(table).encode())


def test_tcb_info_of_version_2() -> None:
    info = read_tcb_info(NUMBERED)
    assert (info.tee, info.version, info.evaluation_number) == ("SGX", 2, 17)
    assert [(level.sgx, level.pce_svn, level.tdx) for level in info.levels] == [
        (bytes(range(1, 17)), 13, b""),
        (bytes(range(1, 17)), 11, b""),
    ]


@pytest.mark.parametrize("change", [*({name: 256} for name in SVNS), {"sgxtcbcomp07svn": -1}, {"pcesvn": 65536}])
def test_tcb_info_of_version_2_that_cannot_be(change: dict[str, int]) -> None:
    (name, value), *_ = change.items()
    with pytest.raises(JsonError, match=name):
        _ = read_tcb_info(_edited(NUMBERED, **{f"tcbLevels__0__tcb__{name}": value}))


@pytest.mark.parametrize(
    "changes", [{"isvprodid": 65536}, {"isvprodid": -1}, {"tcbLevels__0__tcb__isvsvn": 65536}, {"mrsigner": "00"}]
)
def test_a_qe_identity_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(JsonError):
        _ = read_qe_identity(_edited(QE_IDENTITY, **changes))


@pytest.mark.parametrize("status", TcbStatus)
def test_a_quoting_enclave_is_up_to_date_or_out_of_date_or_revoked(status: TcbStatus) -> None:
    """As Intel says and its Quote Verification Library demands; a configuration is a platform's."""
    text = _edited(QE_IDENTITY, tcbLevels__0__tcbStatus=str(status))
    if status in ("UpToDate", "OutOfDate", "Revoked"):
        assert read_qe_identity(text).levels[0].stated.status == status
    else:
        with pytest.raises(JsonError, match="tcbStatus is not one that can be stated here"):
            _ = read_qe_identity(text)


def test_what_a_statement_does_not_have_is_not_looked_at() -> None:
    assert read_qe_identity(_edited(QE_IDENTITY, tcbType="x")) == read_qe_identity(QE_IDENTITY)
    assert read_tcb_info(_edited(NUMBERED, tdxModule=None)) == read_tcb_info(NUMBERED)


@pytest.mark.parametrize(("text", "read"), [(TCB_INFO, read_tcb_info), (QE_IDENTITY, read_qe_identity)])
def test_a_statement_of_no_kind(text: bytes, read: Callable[[bytes], object]) -> None:
    table = json.loads(text)
    del table["id"]
    with pytest.raises(JsonError, match="id is missing") as raised:
        _ = read(json.dumps(table).encode())
    assert not isinstance(raised.value, AnotherKindError)


@pytest.mark.parametrize("changes", [{"id": "TD"}, {"version": 4}])
@pytest.mark.parametrize(("text", "read"), [(TCB_INFO, read_tcb_info), (QE_IDENTITY, read_qe_identity)])
def test_a_statement_of_another_kind_is_one_if_it_can_mean_nothing_else(
    text: bytes, read: Callable[[bytes], object], changes: dict[str, Any]
) -> None:
    other = _edited(text, **changes)
    with pytest.raises(AnotherKindError):
        _ = read(other)
    with pytest.raises(JsonError, match="twice") as raised:
        _ = read(b'{"x":1,"x":2,' + other[1:])
    assert not isinstance(raised.value, AnotherKindError)


@pytest.mark.parametrize("name", ["tcbType", "tdxModule", "tdxModuleIdentities__0__mrsigner", "tcbLevels__0__tcbDate"])
def test_tcb_info_without_what_it_needs(name: str) -> None:
    *parents, last = name.split("__")
    table = place = json.loads(TCB_INFO)
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    del place[last]
    with pytest.raises(JsonError, match=last):
        _ = read_tcb_info(json.dumps(table).encode())


def test_a_statement_of_more_than_its_bound() -> None:
    table = json.loads(TCB_INFO)
    (level, *_) = table["tcbLevels"]
    table["tcbLevels"] = [{**level, "tcb": {**level["tcb"], "pcesvn": n}} for n in range(4000)]
    text = json.dumps(table, separators=(",", ":")).encode()
    assert len(text) > strict_json.MAX_SIZE
    with pytest.raises(JsonError, match="more than"):
        _ = read_tcb_info(text)


def test_levels_are_sorted_and_never_twice() -> None:
    table = json.loads(TCB_INFO)
    table["tcbLevels"].reverse()
    table["tdxModuleIdentities"][0]["tcbLevels"].reverse()
    table["tdxModuleIdentities"].append({**table["tdxModuleIdentities"][0], "id": "tdx_7f"})
    info = read_tcb_info(json.dumps(table).encode())
    assert info.levels == read_tcb_info(TCB_INFO).levels
    assert info.modules["TDX_7F"].levels == next(iter(read_tcb_info(TCB_INFO).modules.values())).levels
    table["tdxModuleIdentities"].append({**table["tdxModuleIdentities"][-1], "id": "TDX_7F"})
    with pytest.raises(JsonError, match="TDX_7F"):
        _ = read_tcb_info(json.dumps(table).encode())


@pytest.mark.parametrize("name", ["tcbLevels", "tdxModuleIdentities__0__tcbLevels"])
def test_a_level_twice(name: str) -> None:
    levels = json.loads(TCB_INFO)
    for key in name.split("__"):
        levels = levels[int(key) if key.isdigit() else key]
    twice = [*levels, {**levels[0], "tcbStatus": "OutOfDate"}]
    with pytest.raises(JsonError, match="twice"):
        _ = read_tcb_info(_edited(TCB_INFO, **{name: twice}))


@pytest.mark.parametrize(
    ("addition", "problem"),
    [
        (b'"version":3,', "a member twice: 'version'"),
        (b'"future":{"a":1,"a":2},', "a member twice: 'a'"),
        (b'"future":1e999,', "too large"),
        (b'"future":NaN,', "NaN"),
        (b'"future":"\\ud800",', "surrogate"),
        (b'"future":"\xff",', "not UTF-8"),
        (b'"future":' + b"[" * 20 + b"]" * 20 + b",", "deeper"),
        (b'"future":' + b"[" * 100_000 + b"]" * 100_000 + b",", "deeper"),
        (b'"future":' + b"1" * 5000 + b",", "too long"),
        (b" " * strict_json.MAX_SIZE, "more than"),
    ],
)
@pytest.mark.parametrize(("text", "read"), [(TCB_INFO, read_tcb_info), (QE_IDENTITY, read_qe_identity)])
def test_a_statement_that_could_mean_two_things(
    text: bytes, read: Callable[[bytes], object], addition: bytes, problem: str
) -> None:
    with pytest.raises(JsonError, match=problem):
        _ = read(b"{" + addition + text[1:])


@pytest.mark.parametrize(("text", "read"), [(TCB_INFO, read_tcb_info), (QE_IDENTITY, read_qe_identity)])
def test_a_statement_may_be_written_otherwise(text: bytes, read: Callable[[bytes], object]) -> None:
    table = json.loads(text)
    members = [*table.items(), ("future", {"level": [None, True, "1.0", 1.5]})]
    for same in ({**table, "future": 5}, dict(reversed(members)), json.loads(text.decode())):
        assert read(json.dumps(same, indent=1).encode()) == read(text)


PUT = [
    *(b'"x":1,"x":2,', b'"x":1.0,', b'"svn":1,', b'"\\u0069d":"TDX",', b'"version":3,', b'"x":"\\ud800",'),
    *(b"-", b"1", b"1.0,", b" ", b"null", b"[]", b"{}", b'"', b"\\u0031", b"\xe9", b""),
]


@given(st.sampled_from([TCB_INFO, QE_IDENTITY, NUMBERED]), st.sampled_from(PUT), st.integers(0, 2), st.data())
def test_what_is_read_of_a_mutated_statement_is_all_that_it_says(
    text: bytes, new: bytes, gone: int, data: st.DataObject
) -> None:
    at = data.draw(st.sampled_from([match.end() for match in re.finditer(rb"[{,:]", text)]))
    mutated = text[:at] + new + text[at + gone :]
    for read in (read_tcb_info, read_qe_identity):
        try:
            value = read(mutated)
        except JsonError:
            continue
        assert value == read(json.dumps(decode(mutated, fractions=True)).encode())


# --- collateral files ---


def test_a_collateral_file_comes_back() -> None:
    collateral = Collateral.from_json(FILE)
    assert Collateral.from_json(collateral.to_json()) == collateral
    assert json.loads(collateral.to_json()) == json.loads(FILE)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"extra": "1"}, "'extra'"),
        ({"pck_crl": "0"}, "pck_crl"),
        ({"pck_crl": "00 11"}, "pck_crl"),
        ({"tcb_info": {}}, "tcb_info"),
        ({"tcb_info": None}, "tcb_info"),
        ({"qe_identity": "\ud800"}, "surrogate"),
    ],
)
def test_a_collateral_file_that_is_none(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(CollateralFormatError, match=problem):
        _ = Collateral.from_json(json.dumps({**json.loads(FILE), **change}).encode())


@pytest.mark.parametrize("name", sorted(set(json.loads(FILE)) - {"pck_certificate_chain"}))
def test_every_member_is_needed_once(name: str) -> None:
    table = json.loads(FILE)
    value = table.pop(name)
    with pytest.raises(CollateralFormatError, match=f"{name} is missing"):
        _ = Collateral.from_json(json.dumps(table).encode())
    twice = json.dumps(table)[:-1] + f', "{name}": {json.dumps(value)}' * 2 + "}"
    with pytest.raises(CollateralFormatError, match="twice"):
        _ = Collateral.from_json(twice.encode())


def test_a_file_is_an_object() -> None:
    with pytest.raises(CollateralFormatError, match="not a JSON object"):
        _ = Collateral.from_json(b"[]")


def test_pieces_that_are_no_text_are_not_written() -> None:
    collateral = Collateral.from_json(FILE)
    pieces = {name: getattr(collateral, name) for name in json.loads(FILE)}
    with pytest.raises(CollateralFormatError, match="tcb_info"):
        _ = Collateral(**{**pieces, "tcb_info": b"\xff"}).to_json()


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(CollateralFormatError):
        _ = Collateral.from_json(data)


@given(st.integers(0, len(FILE) - 1), st.binary(max_size=4))
def test_a_mutated_collateral_file(at: int, value: bytes) -> None:
    with suppress(CollateralFormatError):
        _ = Collateral.from_json(FILE[:at] + value + FILE[at + len(value) :])


def test_collateral_may_be_text() -> None:
    assert Collateral.from_json(FILE.decode()) == Collateral.from_json(FILE)
    for text in ("", "{}", "\ud800", '"\ud800"', "\x00"):
        with pytest.raises(CollateralFormatError):
            _ = Collateral.from_json(text)
