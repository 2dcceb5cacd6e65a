"""No scenario leaves a store open."""

from collections.abc import Iterator

import pytest

from tests.scenario.operations import close_stores


@pytest.fixture(autouse=True)
def stores_are_closed() -> Iterator[None]:
    yield
    close_stores()
