"""Test your own code that verifies quotes: a simulated platform makes good and faulty ones, under a root of its own.

pytest examples/test_with_quotes.py
"""

import pytest

from chutes_proto.quote import INTEL_ROOT, Policy, VerificationError, verify
from chutes_proto.testing import SimulatedPlatform

NOW = 1_800_000_000
REPORT_DATA = b"\x01" * 64
PLATFORM = SimulatedPlatform(b"the world of these tests")


def admit(quote, collateral, policy, *, now, root=INTEL_ROOT):
    """Stands for your code: admit a machine by the name of its image."""
    return verify(quote, collateral, now=now, report_data=REPORT_DATA, policy=policy, root=root).profile.name


def admitted(machine):
    policy = Policy(profiles=(PLATFORM.profile,))
    return admit(machine.quote(REPORT_DATA), machine.collateral(NOW), policy, now=NOW, root=PLATFORM.root)


def test_a_good_machine_is_admitted():
    assert admitted(PLATFORM) == "simulated"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("quote_signature", "quote_signature"),
        ("pck_revoked", "pck_revoked"),
        ("tcb_out_of_date", "tcb_status"),
        ("debug", "debug"),
        ("rtmr1", "measurement_mismatch"),
    ],
)
def test_a_faulty_machine_is_not(fault, code):
    with pytest.raises(VerificationError) as caught:
        admitted(PLATFORM.having(fault))
    assert caught.value.code == code
