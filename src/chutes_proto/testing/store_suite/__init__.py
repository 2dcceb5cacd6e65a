"""The contract of a store, as cases that every store must pass.

A store's tests have a `Harness` and run each of `CASES` with a new one. A case raises `AssertionError`.
"""

from typing import Final

from chutes_proto.testing.store_suite import _operations, _transactions
from chutes_proto.testing.store_suite._parts import Case, Harness

__all__ = ["CASES", "Case", "Harness"]

CASES: Final[tuple[Case, ...]] = (*_operations.CASES, *_transactions.CASES)
"""All cases of the contract."""
