"""Nonces: what holds, for whom, how long; and that no bit of one can be changed."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.errors import Refused, Unavailable
from chutes_proto.quote._terms import rfc3339
from chutes_proto.secret import Secret
from chutes_proto.server._nonces import RANDOM_SIZE, MacKey, NonceMint, expires_at
from chutes_proto.server._tags import TagKey
from chutes_proto.units.nonces import Nonce
from chutes_proto.wire.codes import Code

NOW = 1_800_000_000
KEY = MacKey(5, TagKey(Secret(b"k" * 32)))
OLD = MacKey(9, TagKey(Secret(b"o" * 32)))
MINT = NonceMint((KEY,))
RANDOM = bytes(range(RANDOM_SIZE))


def refused(check: Callable[[], object]) -> Refused:
    with pytest.raises(Refused) as caught:
        check()
    assert (caught.value.status, caught.value.code) == (401, Code.NONCE_INVALID)
    assert caught.value.detail == "Invalid nonce supplied"
    return caught.value


@given(
    st.binary(min_size=RANDOM_SIZE, max_size=RANDOM_SIZE),
    st.none() | st.text(max_size=50),
    st.integers(-60, 600),
    st.sampled_from(["boot", "runtime"]),
    st.text(max_size=20),
)
def test_what_was_issued_holds(random, hotkey, age, purpose, scope):
    value = MINT.issue(purpose, NOW, random, hotkey=hotkey, scope=scope)
    assert len(value) == 32
    nonce = MINT.check(value.hex(), purpose, NOW + age, hotkey=hotkey, scope=scope)
    assert nonce == Nonce(value, purpose, NOW)


@pytest.mark.parametrize("age", [601, 86_400, 10**9])
def test_too_old(age):
    value = MINT.issue("boot", NOW, RANDOM)
    assert f"{age} s old" in refused(lambda: MINT.check(value.hex(), "boot", NOW + age)).reason


@pytest.mark.parametrize("ahead", [61, 86_400, 10**9])
def test_our_own_nonce_from_the_future_is_the_fault_of_a_clock_of_ours(ahead):
    """A final refusal would power off a VM with which nothing is wrong; a forged nonce is refused whatever it says."""
    value = MINT.issue("boot", NOW + ahead, RANDOM).hex()
    with pytest.raises(Unavailable) as caught:
        MINT.check(value, "boot", NOW)
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (503, Code.SERVER_FAULT, 10)
    for told in (rfc3339(NOW + ahead), f"this server's clock says {rfc3339(NOW)}", "compare the clocks"):
        assert told in caught.value.reason
    refused(lambda: MINT.check(value[:-1] + ("1" if value[-1] == "0" else "0"), "boot", NOW))


@given(st.integers(0, 255))
def test_each_bit_counts(bit):
    value = bytearray(MINT.issue("boot", NOW, RANDOM, hotkey="5F"))
    value[bit // 8] ^= 1 << bit % 8
    refused(lambda: MINT.check(value.hex(), "boot", NOW, hotkey="5F"))


@given(st.text(max_size=70))
def test_any_text(text):
    refused(lambda: MINT.check(text, "boot", NOW))


@pytest.mark.parametrize(
    "change", [str.upper, lambda t: t + "\n", lambda t: " " + t, lambda t: t[:-1], lambda t: t * 2]
)
def test_the_text_is_compared_as_it_is(change):
    text = NonceMint((MacKey(0xA, KEY.key),)).issue("boot", NOW, b"\xaa" * RANDOM_SIZE).hex()
    refused(lambda: MINT.check(change(text), "boot", NOW))


def test_a_missing_nonce():
    refused(lambda: MINT.check(None, "boot", NOW))


def test_the_purpose_the_scope_and_the_key_bind():
    value = MINT.issue("runtime", NOW, RANDOM, scope="server-1").hex()
    assert MINT.check(value, "runtime", NOW, scope="server-1")
    refused(lambda: MINT.check(value, "boot", NOW, scope="server-1"))
    refused(lambda: MINT.check(value, "runtime", NOW, scope="server-2"))
    refused(lambda: NonceMint((MacKey(5, OLD.key),)).check(value, "runtime", NOW, scope="server-1"))


def test_lengths_keep_parts_apart():
    value = MINT.issue("boot", NOW, RANDOM, hotkey="ab", scope="c").hex()
    refused(lambda: MINT.check(value, "boot", NOW, hotkey="a", scope="bc"))


def test_a_nonce_for_a_hotkey_is_that_hotkeys():
    bound = MINT.issue("boot", NOW, RANDOM, hotkey="5Fmine").hex()
    assert MINT.check(bound, "boot", NOW, hotkey="5Fmine")
    refused(lambda: MINT.check(bound, "boot", NOW, hotkey="5Fother"))
    refused(lambda: MINT.check(bound, "boot", NOW))
    free = MINT.issue("boot", NOW, RANDOM).hex()
    assert MINT.check(free, "boot", NOW, hotkey="5Fany")


@pytest.mark.parametrize(
    ("issued", "same", "other"),
    [
        ("203.0.113.7", "203.0.113.7", "203.0.113.8"),
        ("203.0.113.7", "::ffff:203.0.113.7", "::ffff:203.0.113.8"),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:2::1"),
    ],
)
def test_address_binding_takes_ipv4_whole_and_the_ipv6_network(issued, same, other):
    mint = NonceMint((KEY,), bind_address=True)
    value = mint.issue("boot", NOW, RANDOM, address=issued).hex()
    assert mint.check(value, "boot", NOW, address=same)
    refused(lambda: mint.check(value, "boot", NOW, address=other))
    unbound = MINT.issue("boot", NOW, RANDOM, address=issued).hex()
    assert mint.check(unbound, "boot", NOW, address=other)  # made before the option was turned on


def test_two_keys_live_during_a_rotation():
    both = NonceMint((KEY, OLD))
    assert both.check(NonceMint((OLD,)).issue("boot", NOW, RANDOM).hex(), "boot", NOW)
    assert both.issue("boot", NOW, RANDOM) == MINT.issue("boot", NOW, RANDOM)
    same_id = NonceMint((KEY, MacKey(KEY.key_id, OLD.key)))
    assert same_id.check(NonceMint((MacKey(KEY.key_id, OLD.key),)).issue("boot", NOW, RANDOM).hex(), "boot", NOW)


def test_a_nonce_under_another_key_is_refused():
    value = NonceMint((OLD,)).issue("boot", NOW, RANDOM).hex()
    refused(lambda: MINT.check(value, "boot", NOW))


def test_two_nonces_differ_and_every_random_bit_shows():
    base = MINT.issue("boot", NOW, bytes(RANDOM_SIZE))
    others = {MINT.issue("boot", NOW, (1 << bit).to_bytes(RANDOM_SIZE, "big")) for bit in range(8 * RANDOM_SIZE)}
    assert len(others | {base}) == 8 * RANDOM_SIZE + 1


def test_the_end_is_rfc_3339_in_whole_seconds():
    assert expires_at(1767225600) == "2026-01-01T00:10:00+00:00"
