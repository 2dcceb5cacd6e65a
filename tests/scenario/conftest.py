"""No scenario leaves a store open, or a server running."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from chutes_proto.server._app import App
from tests.scenario.operations import LOOPS, Scene, Site, close_stores, open_store
from tests.scenario.premises import Premises
from tests.server.world import service


@pytest.fixture(autouse=True)
def stores_are_closed() -> Iterator[None]:
    yield
    close_stores()


@pytest.fixture
def scene(loop: str, tmp_path: Path) -> Scene:
    return lambda **policy: Site(LOOPS[loop], open_store(tmp_path), App(service(**policy)))


@pytest.fixture(params=["sqlite", "postgresql"])
def premises(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Premises]:
    """An operator's premises with a store of either kind, whose schema is made."""
    store = "sqlite:keys.db" if request.param == "sqlite" else request.getfixturevalue("migrated_schema")
    premises = Premises(tmp_path / "site", store)
    yield premises
    premises.close()
