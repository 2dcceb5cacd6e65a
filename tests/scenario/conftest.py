"""No scenario leaves a store open, or a server running."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenario.operations import close_stores
from tests.scenario.premises import Premises


@pytest.fixture(autouse=True)
def stores_are_closed() -> Iterator[None]:
    yield
    close_stores()


@pytest.fixture(params=["sqlite", "postgresql"])
def premises(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Premises]:
    """An operator's premises with a store of either kind, whose schema is made."""
    store = "sqlite:keys.db" if request.param == "sqlite" else request.getfixturevalue("empty_schema")
    premises = Premises(tmp_path / "site", store)
    yield premises
    premises.close()
