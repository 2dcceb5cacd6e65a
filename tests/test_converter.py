"""Plain data becomes values strictly: nothing is coerced, and each problem is named by its place."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Any, Literal

import pytest
from attrs import field, frozen
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto._converter import MOST, MismatchError, ProblemsError, StrictConverter, load_toml, string


@frozen
class Part:
    word: Literal["a", "b"]
    size: int = 1


@frozen
class Whole:
    name: str
    parts: tuple[Part, ...] = ()
    named: Mapping[str, Part | None] = field(factory=dict[str, "Part | None"])
    ratio: float = 1.0
    on: bool = False
    maybe: str | None = None


class ContradictionError(Exception):
    pass


@frozen
class Range:
    low: int
    high: int

    def __attrs_post_init__(self) -> None:
        if self.low > self.high:
            raise ContradictionError("low: must not be above high")


CONVERTER = StrictConverter(own_file=True)


def problems(value: object, converter: StrictConverter = CONVERTER) -> list[tuple[str, str]]:
    with pytest.raises(ProblemsError) as caught:
        _ = converter.structure(value, Whole)
    return [(".".join(map(str, problem.path)), problem.kind) for problem in caught.value.problems]


def test_values_are_made() -> None:
    value = {"name": "n", "parts": [{"word": "a"}], "named": {"x": {"word": "b", "size": 2}, "y": None}, "ratio": 2}
    made = CONVERTER.structure(value, Whole)
    assert made == Whole("n", (Part("a"),), {"x": Part("b", 2), "y": None}, 2.0)
    assert CONVERTER.structure({"name": "n", "maybe": None}, Whole) == Whole("n")
    assert type(made.ratio) is float


def test_each_problem_has_its_place() -> None:
    value = {"parts": [{"word": "c"}, 1, {}], "named": {"first": {"word": 0, "size": True}}, "ratio": "1", "on": 1}
    assert problems({**value, "maybe": [], "z": 1, "y": 2}) == [
        ("name", "missing"),
        ("parts.0.word", "literal_error"),
        ("parts.1", "dict_type"),
        ("parts.2.word", "missing"),
        ("named.first.word", "literal_error"),
        ("named.first.size", "int_type"),
        ("ratio", "float_type"),
        ("on", "bool_type"),
        ("maybe", "string_type"),
        ("y", "extra_forbidden"),
        ("z", "extra_forbidden"),
    ]
    assert problems([]) == [("", "dict_type")]


@pytest.mark.parametrize("wrong", [True, "1", None, float("nan"), float("inf"), 10**400])
def test_what_is_no_number(wrong: object) -> None:
    assert problems({"name": "n", "ratio": wrong}) == [("ratio", "float_type")]


@pytest.mark.parametrize("wrong", ["", "a", {}, (), None])
def test_what_is_no_list(wrong: object) -> None:
    assert problems({"name": "n", "parts": wrong}) == [("parts", "list_type")]


def test_unknown_keys_may_be_ignored() -> None:
    assert StrictConverter().structure({"name": "n", "more": 1}, Whole) == Whole("n")


def test_a_type_may_have_a_hook_of_its_own() -> None:
    def part(value: object, _: object) -> Part:
        if string(value) != "a":
            raise MismatchError("no_a", "Input should be a")
        return Part("a")

    converter = StrictConverter({Part: part})
    assert converter.structure({"name": "n", "parts": ["a"]}, Whole).parts == (Part("a"),)
    assert problems({"name": "n", "parts": ["a", "b", 0]}, converter) == [
        ("parts.1", "no_a"),
        ("parts.2", "string_type"),
    ]


def test_no_text_repeats_a_value() -> None:
    with pytest.raises(ProblemsError) as caught:
        _ = StrictConverter().structure({"name": 17171, "named": {"secret": "secret"}, "parts": ["secret"]}, Whole)
    assert str(caught.value) == (
        "name: Input should be a valid string; parts.0: Input should be a valid dictionary;"
        " named.0: Input should be a valid dictionary"
    )


def test_the_author_of_a_file_hears_of_arrays() -> None:
    """Of a message, the text is a part of the wire."""
    for of_file, told in ((True, "an array"), (False, "a valid list")):
        with pytest.raises(ProblemsError, match=rf"parts: Input should be {told}$"):
            _ = StrictConverter(own_file=of_file).structure({"name": "n", "parts": "a"}, Whole)


def test_the_author_of_a_file_hears_of_tables() -> None:
    """Of a message, the text is a part of the wire."""
    converter = StrictConverter(own_file=True)
    for value in (3, {"name": "n", "parts": [3]}, {"name": "n", "named": 3}, {"name": "n", "named": {"a": 3}}):
        with pytest.raises(ProblemsError, match=r"Input should be a table of names and values \(in JSON, an object\)$"):
            _ = converter.structure(value, Whole)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.sampled_from(["", "a", "b", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["word", "size", "name", "parts", "named", "ratio", "on", "maybe", "x"]), inner
        )
    ),
    max_leaves=12,
)
PARTS = st.fixed_dictionaries({"word": st.sampled_from(["a", "b"])}, optional={"size": st.integers() | st.booleans()})
WHOLES = st.fixed_dictionaries(
    {"name": st.text(max_size=3)},
    optional={
        "parts": st.lists(PARTS, max_size=3),
        "named": st.dictionaries(st.text(max_size=3), st.none() | PARTS, max_size=3),
        "ratio": st.floats() | st.integers(),
        "on": st.booleans(),
        "maybe": st.none() | st.text(max_size=3),
    },
)
NEARLY_WHOLES = st.builds(
    lambda whole, name, value: {**whole, name: value},
    WHOLES,
    st.sampled_from(["name", "parts", "named", "ratio", "on", "maybe", "x"]),
    PLAIN,
)


@pytest.mark.parametrize("own_file", [False, True])
@given(value=WHOLES | NEARLY_WHOLES | PLAIN)
def test_the_pass_that_lists_problems_accepts_what_the_fast_one_does(own_file: bool, value: object) -> None:
    converter = StrictConverter(own_file=own_file)
    made: list[object] = []
    for one_pass in (converter._fast, converter._detailed):
        try:
            made.append(one_pass.structure(value, Whole))
        except converter._failures:
            made.append(None)
    assert made[0] == made[1]
    if made[0] is None:
        assert problems(value, converter)
    else:
        assert converter.structure(converter.unstructure(made[0]), Whole) == made[0]


def test_only_so_many_problems_are_reported() -> None:
    many = {"name": "n", "parts": [{"size": "1"}] * 1000, "named": {str(name): 0 for name in range(1000)}, "on": 0}
    assert len(problems(many)) == MOST


def test_a_class_may_refuse_what_contradicts_itself() -> None:
    converter = StrictConverter(refusal=ContradictionError)
    with pytest.raises(ProblemsError) as caught:
        _ = converter.structure([{"low": 2, "high": 1}, {"low": 1, "high": 2}, {"low": 1}], tuple[Range, ...])
    assert str(caught.value) == "0.low: must not be above high; 2.high: Field required"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xff", "decode"),
        (b"\xef\xbb\xbfname = 1", "it begins with a byte order mark; save it as UTF-8 without one"),
        (b"name", "Expected"),
        (b"name = " + b"[" * 100_000, ""),
    ],
    ids=["bytes", "mark", "words", "depth"],
)
def test_what_is_no_toml(data: bytes, why: str) -> None:
    with pytest.raises(ProblemsError, match=f"not TOML: .*{why}"):
        _ = CONVERTER.from_toml(data, Whole, lambda _: ())


DEEP = (("a", "."), ('"a.b"', " . "), ("'a'", "\t."), ('"\\""', "."))


@pytest.mark.parametrize(("part", "dot"), DEEP)
@pytest.mark.parametrize(
    "form", ["{} = 1", "b = 1\r\n  {} = 1", "[{}]", "[[ {}]]", "b = {{ {} = 1 }}", "b = [{{c = 1,{} = 1}}]"]
)
def test_a_key_has_few_parts(form: str, part: str, dot: str) -> None:
    """tomllib takes a time with the square of their number: half a minute for 20 kB."""
    with pytest.raises(ProblemsError, match="a key of more than 32 parts"):
        _ = load_toml(form.format(dot.join([part] * 33)).encode())
    _ = load_toml(form.format(dot.join([part] * 32)).encode())


def test_a_text_with_many_dots_is_not_a_key() -> None:
    text = ".".join(["a"] * 99)
    assert load_toml(f'# {text}\nb = "{text}"\nc = ["{text}"]'.encode()) == {"b": text, "c": [text]}


@pytest.mark.parametrize("name", ["a" * 1_000_000, "a\nb", "\x1b[31m"])
def test_a_name_adds_no_line_and_is_not_endless(name: str) -> None:
    with pytest.raises(ProblemsError) as caught:
        _ = CONVERTER.structure({"name": "n", name: 1}, Whole)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("kind", [bytes, dict[int, str], list[str], set[str], tuple[str, int], str | int, object])
def test_a_type_without_a_rule_is_refused(kind: Any) -> None:
    with pytest.raises(TypeError):
        _ = StrictConverter().structure("x", kind)


@pytest.mark.parametrize(("kind", "value"), [(StrEnum("Words", ["A"]), "a"), (IntEnum("Numbers", ["A"]), 1)])
def test_an_enumeration_is_not_made_of_what_it_is_derived_from(kind: Any, value: object) -> None:
    with pytest.raises(ProblemsError):
        _ = StrictConverter().structure(value, kind)


def test_values_become_plain_data() -> None:
    whole = Whole("n", (Part("a"),), {"x": None}, maybe=None)
    plain = {"name": "n", "parts": [{"word": "a", "size": 1}], "named": {"x": None}, "ratio": 1.0, "on": False}
    assert CONVERTER.unstructure(whole) == {**plain, "maybe": None}
    assert StrictConverter(omit_none=True).unstructure(whole) == plain
    assert StrictConverter(plain={bytes: bytes.hex}).unstructure({"a": (b"\1", [b"\2"])}) == {"a": ["01", ["02"]]}
