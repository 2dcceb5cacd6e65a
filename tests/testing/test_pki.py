"""The simulated world's keys."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from chutes_proto.testing._pki import CURVE_ORDERS


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()], ids=lambda curve: curve.name)
def test_the_orders_of_the_curves_are_those_that_cryptography_knows(curve: ec.SECP256R1 | ec.SECP384R1) -> None:
    assert CURVE_ORDERS["P-256" if curve.key_size == 256 else "P-384"] == curve.group_order
