"""Plain data becomes values strictly: nothing is coerced, and each problem is named by its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytest
from attrs import field, frozen

from chutes_proto.errors import ConfigurationError
from chutes_proto.strict import MismatchError, ProblemsError, Structurer, string


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


STRUCTURER = Structurer(own_file=True)


def problems(value: object, structurer: Structurer = STRUCTURER) -> list[tuple[str, str]]:
    with pytest.raises(ProblemsError) as caught:
        _ = structurer.structure(value, Whole)
    return [(".".join(map(str, problem.path)), problem.kind) for problem in caught.value.problems]


def test_values_are_made() -> None:
    value = {"name": "n", "parts": [{"word": "a"}], "named": {"x": {"word": "b", "size": 2}, "y": None}, "ratio": 2}
    made = STRUCTURER.structure(value, Whole)
    assert made == Whole("n", (Part("a"),), {"x": Part("b", 2), "y": None}, 2.0)
    assert STRUCTURER.structure({"name": "n", "maybe": None}, Whole) == Whole("n")
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


def test_unknown_keys_may_be_ignored() -> None:
    assert Structurer().structure({"name": "n", "more": 1}, Whole) == Whole("n")


def test_a_type_may_have_a_hook_of_its_own() -> None:
    def part(value: object) -> Part:
        if string(value) != "a":
            raise MismatchError("no_a", "Input should be a")
        return Part("a")

    structurer = Structurer([(Part, part)])
    assert structurer.structure({"name": "n", "parts": ["a"]}, Whole).parts == (Part("a"),)
    assert problems({"name": "n", "parts": ["a", "b", 0]}, structurer) == [
        ("parts.1", "no_a"),
        ("parts.2", "string_type"),
    ]


def test_no_text_repeats_a_value() -> None:
    with pytest.raises(ProblemsError) as caught:
        _ = Structurer().structure({"name": 17171, "named": {"secret": "secret"}, "parts": ["secret"]}, Whole)
    assert str(caught.value) == (
        "name: Input should be a valid string; parts.0: Input should be a valid dictionary;"
        " named.0: Input should be a valid dictionary"
    )


@pytest.mark.parametrize("data", [b"\xff", b"name", b"name = " + b"[" * 100_000], ids=["bytes", "words", "depth"])
def test_what_is_no_toml(data: bytes) -> None:
    with pytest.raises(ConfigurationError, match="not TOML"):
        _ = STRUCTURER.from_toml(data, Whole, lambda _: ())


@pytest.mark.parametrize("kind", [bytes, dict[int, str], tuple[str, int], str | int])
def test_what_nothing_makes(kind: Any) -> None:
    with pytest.raises(TypeError):
        _ = Structurer().structure("x", kind)
