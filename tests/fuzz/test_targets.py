"""The promises of the fuzz targets, on inputs that Hypothesis makes of the seeds."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.io.yaml_file import read_yaml
from chutes_proto.quote._attested import read_evidence
from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._eventlog import parse_event_log, parse_event_log_json
from chutes_proto.quote._measurements import parse_profiles_json
from chutes_proto.quote._policy import AnyOf, Policy, parse_policy_toml
from chutes_proto.quote._policy_set import parse_policy_set
from chutes_proto.quote._published import parse_profile_file
from chutes_proto.quote._verify import open_quote, verify_collateral
from chutes_proto.transport.qgs import read_quote
from tests.fuzz import targets
from tests.fuzz.targets import TARGETS
from tests.quote.test_published import KEYS

SEEDS = cache(lambda name: TARGETS[name].seeds())

names = pytest.mark.parametrize("name", TARGETS)


@st.composite
def mutations(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with some stretches of it removed, repeated, cut off or written over."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(start + 64, len(data))))
        match draw(st.sampled_from(["overwrite", "insert", "remove", "repeat", "truncate"])):
            case "overwrite":
                data[start:end] = draw(st.binary(min_size=end - start, max_size=end - start))
            case "insert":
                data[start:start] = draw(st.binary(max_size=16))
            case "remove":
                del data[start:end]
            case "repeat":
                data[start:start] = data[start:end]
            case _:
                del data[start:]
    return bytes(data)


def test_honest_inputs_are_accepted() -> None:
    """Else a target would see no more than the first check of what it tests."""
    for quote in targets.quotes():
        chain = targets.CHAIN
        _ = open_quote(quote, now=targets.NOW, root=targets.ROOT, sgx=True, pck_certificate_chain=chain)
    for collateral in targets.collaterals():
        _ = verify_collateral(Collateral.from_json(collateral), now=targets.NOW, root=targets.ROOT)
    assert all(parse_event_log(data).events for data in targets.event_logs()[:-1])
    assert parse_event_log_json(targets.event_logs()[-1]).events
    for file in targets.platform_collaterals():
        assert all(Collateral.from_json(file, quote=quote) for quote in targets.quotes()[:3])
    assert all(read_evidence(data) for data in targets.attested_certificates()[:-1])
    first, with_tcb, listed, either = targets.policies()
    one, other = parse_policy_toml(first), parse_policy_toml(with_tcb)
    assert isinstance(one, Policy)
    assert isinstance(other, Policy)
    assert one.profiles == other.profiles
    assert isinstance(parse_policy_toml(either), AnyOf)
    assert parse_profiles_json(listed)
    assert all(parse_profile_file(data, read_yaml, extra_keys=KEYS).profiles for data in targets.reference_values())
    assert all(len(parse_policy_set(data).exceptions) == 11 for data in targets.policy_sets())
    assert read_quote(targets.qgs_answers()[0][4:]) == read_quote(targets.qgs_answers()[1][4:])
    assert [len(targets.exchange([stream])[0]) for stream in targets.http_requests()] == [1, 2, 1, 2, 1]
    taken = [targets.answer_in([stream]) for stream in targets.http_answers()]
    assert [answer and answer.status for answer in taken] == [200, 503, 200, 307, None]


@names
def test_seeds(name: str) -> None:
    for seed in SEEDS(name):
        TARGETS[name].check(seed)


@names
@given(data=st.data())
def test_mutated_seeds(name: str, data: st.DataObject) -> None:
    TARGETS[name].check(data.draw(mutations(SEEDS(name))))


@names
@given(data=st.binary(max_size=512))
def test_any_bytes(name: str, data: bytes) -> None:
    TARGETS[name].check(data)
