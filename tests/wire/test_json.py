"""JSON as the API takes it: hostile bytes give its one error, quickly."""

import json as stdlib_json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.wire import json


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"nul",
        b"\xff",
        b'"\xed\xa0\x80"',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        b'{"a":1,"a":2}',
        b'{"x":{"a":1,"a":1}}',
        b"[NaN]",
        b"[-Infinity]",
        b"[1e999]",
        b'["\\ud800"]',
        b'{"\\udfff":1}',
        b"[" * 17 + b"]" * 17,
        b'{"a":' * 17 + b"1" + b"}" * 17,
        b"[" * 60_000,
        b"1" * 5000,
        b'["' + b"\\" * 60_000,
        b'{"a":1} x',
    ],
)
def test_hostile_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(json.JsonError) as caught:
        json.decode(data)
    assert len(str(caught.value)) < 100  # the input is not repeated


def test_depth_counts_brackets_outside_strings_only() -> None:
    assert json.decode(b"[" * 16 + b"]" * 16)
    assert json.decode(b'["' + b"[" * 100 + b'\\"[{"]') == ["[" * 100 + '"[{']


def test_paired_surrogates_are_a_character() -> None:
    assert json.decode(b'"\\ud83d\\ude00"') == "\U0001f600"


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    try:
        value = json.decode(data)
    except json.JsonError:
        return
    assert value == stdlib_json.loads(data.decode())


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(_JSON)
def test_what_is_encoded_decodes_and_is_compact(value: object) -> None:
    text = json.encode(value)
    assert text.isascii()
    assert json.decode(text) == value
    assert stdlib_json.dumps(value, separators=(",", ":")).encode() == text
